"""The user's own OpenSSH client: their config, agent and jump hosts; never a password in our hands.

Every command is one word list, quoted for the shell of the board. Files travel through ``cat`` on the same channel, so a
board needs no more than a shell. What the start files of that shell print is told apart by a line printed after it.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from rescompress.core.artifact import atomic_path
from rescompress.core.errors import BadInput, EnvironmentFailed, ToolMissing

CONNECTION_FAILED = 255
"""Exit code of ssh for its own failures."""

START_TIMEOUT_S = 60.0
"""Until a work folder must be there, besides the time to connect."""

GRACE_S = 10.0
"""Given to the board, after a time-out here, to end what still runs there."""

LIMITED = r"""if timeout -k 5 1 true 2>/dev/null; then timeout -k 5 LIMIT sh -c COMMAND; else
( n=0; while [ $n -lt LIMIT ] && kill -0 $$; do sleep 1; n=$((n + 1)); done; trap "" TERM; kill -s TERM -- -$$; sleep 5
kill -s KILL -- -$$ ) < /dev/null > /dev/null 2>&1 &
sh -c COMMAND; fi
exit $?"""
"""Runs COMMAND for LIMIT seconds at most, then ends it and what it started. ``timeout`` makes a process group of its own and
ends that. Without it: sshd makes each command the leader of a group, which a loop beside it ends; as the loop looks every
second whether the leader is still there, it does not outlive it by more."""

BEGIN = "@@rescompress"
"""Line that separates what the board's shell prints when it starts from what was asked for."""

PRINT_BEGIN = "printf '@@%s\\n' rescompress"
"""Prints `BEGIN`; in two parts, so that a shell that echoes its commands does not print it too."""


@dataclass(frozen=True)
class Completed:
    """What a command on the board left behind.

    Attributes:
        code: Its exit code.
        output: stdout and stderr together, in order.
    """

    code: int
    output: str


@dataclass(frozen=True)
class Board:
    """A machine that ssh can reach.

    Attributes:
        host: As on the command line of ssh: ``user@board``, or a name from the user's ssh config.
        port: Where it does not listen on the usual one.
        config: An ssh config file instead of the user's own.
        connect_timeout_s: Seconds until a connection counts as failed.
        control: Socket of a connection that is open already and is shared (see `WorkFolder`).
    """

    host: str
    port: int | None = None
    config: Path | None = None
    connect_timeout_s: int = 15
    control: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a host that ssh would take for an option.

        Raises:
            BadInput: It starts with a dash, is empty, or has blanks in it.
        """
        if not self.host or self.host.startswith("-") or any(c.isspace() for c in self.host):
            raise BadInput(
                f"'{self.host}' is no host", where="--host", remedy="write user@board, or a name from your ssh config"
            )

    def command(self, remote: str, *, master: bool = False) -> list[str]:
        """Return the local command that runs the shell text `remote` on the board.

        Args:
            remote: Text for the shell of the board.
            master: Whether this connection is the one that others share.

        Raises:
            ToolMissing: There is no ssh here.
        """
        if shutil.which("ssh") is None:
            raise ToolMissing("there is no ssh client here", remedy="install OpenSSH (Debian: apt install openssh-client)")
        options = [
            "-o", "BatchMode=yes",
            "-o", f"ConnectTimeout={self.connect_timeout_s}",
            "-o", "ServerAliveInterval=5",
            "-o", "ServerAliveCountMax=3",
        ]  # fmt: skip
        if self.control is not None:
            # ssh reads an option like a line of its config: blanks end a word, and % begins a token
            path = str(self.control).replace("%", "%%")
            options += ["-o", f"ControlMaster={'yes' if master else 'no'}", "-o", f'ControlPath="{path}"']
        if self.config is not None:
            options = ["-F", str(self.config), *options]
        if self.port is not None:
            options += ["-p", str(self.port)]
        return ["ssh", *options, "--", self.host, remote]

    def run(self, command: Sequence[str] | str, *, timeout_s: float = 60.0) -> Completed:
        """Run one command on the board and return its exit code and output.

        A command that hangs is ended there too, with what it started: it would disturb the next measurement.

        Args:
            command: Words, which are quoted, or a text for ``sh`` on the board.
            timeout_s: Until it counts as hanging.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, was lost, the command hangs, or the board's shell does not come to it.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        # the clock here starts first, so what it says decides
        limited = LIMITED.replace("LIMIT", str(math.ceil(timeout_s))).replace("COMMAND", shlex.quote(text))
        with subprocess.Popen(
            # a shell that stays turns a death by signal into an exit code; ssh itself would say 255 for it
            self.command(f"{PRINT_BEGIN}\n{limited}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            try:
                said, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as e:
                started = (e.output or b"").decode(errors="replace")
                if started and f"{BEGIN}\n" not in started:
                    raise self.shell_error(started) from e
                if started:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=GRACE_S)
                raise EnvironmentFailed(
                    f"did not answer within {timeout_s:g} s",
                    where=f"{self.host}: {text}",
                    remedy="is the board busy? try again",
                ) from e
            finally:
                process.kill()
        output = said.decode(errors="replace")
        if process.returncode == CONNECTION_FAILED:
            raise self.connection_error(output)
        started, begin, asked = output.partition(f"{BEGIN}\n")
        if not begin:
            raise self.shell_error(started)
        return Completed(process.returncode, asked)

    def connection_error(self, output: str) -> EnvironmentFailed:
        """Return the error for what ssh said when it failed."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        reason = next((r for text, r in _REASONS if text in output), None)
        said = lines[-1] if lines else "no reason given"
        what, remedy = reason or (f"connection lost or refused: {said}", "is the board up? try `ssh` by hand, then run again")
        return EnvironmentFailed(what, where=self.host, remedy=remedy)

    def shell_error(self, output: str) -> EnvironmentFailed:
        """Return the error for a shell that printed `output` and did not come to the command it was given."""
        said = ([line.strip() for line in output.splitlines() if line.strip()] or ["nothing"])[-1]
        return EnvironmentFailed(
            f"its shell does not come to the command it is given; the last it says: {said}",
            where=self.host,
            remedy="let its start file return at once, silently, in a non-interactive shell; first line of ~/.bashrc there: "
            "case $- in *i*) ;; *) return;; esac",
        )

    def put(self, local: Path, remote: str) -> None:
        """Copy a file to the board.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, or the board could not store the file.
        """
        with local.open("rb") as source:
            done = subprocess.run(
                self.command(f"{PRINT_BEGIN}; cat > {shlex.quote(remote)}"),
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        started, begin, asked = done.stdout.decode(errors="replace").partition(f"{BEGIN}\n")
        if done.returncode == CONNECTION_FAILED:
            raise self.connection_error(started + asked)
        if not begin:
            raise self.shell_error(started)
        output = asked.strip()
        size = local.stat().st_size
        stored = self._size(remote) if done.returncode == 0 else None
        if stored != size:
            full = "the disk is full: " if "No space left" in output else ""
            raise EnvironmentFailed(
                f"{full}could not store {local.name} ({size} bytes): {output or 'the copy is short'}",
                where=self.host,
                remedy="free some space on the board and run again",
            )

    def _size(self, remote: str) -> int | None:
        """Return the size in bytes of a file on the board, or None where it cannot be read."""
        said = self.run(f"n=$(wc -c < {shlex.quote(remote)}) && echo @@size $n")
        found = re.search(r"@@size (\d+)$", said.output, re.MULTILINE)
        return int(found[1]) if found else None

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the board; `local` appears whole or not at all.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, the file is not there, the copy is short, or the disk is full.
        """
        size = self._size(remote)
        command = self.command(f"{PRINT_BEGIN}; cat < {shlex.quote(remote)}")
        with atomic_path(local) as temporary:
            with temporary.open("wb") as sink, tempfile.TemporaryFile() as errors:
                with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
                    assert process.stdout is not None
                    try:
                        started, begun = _until_begin(process.stdout)
                        shutil.copyfileobj(process.stdout, sink)
                    except BaseException:
                        process.kill()
                        raise
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
            if process.returncode == CONNECTION_FAILED:
                raise self.connection_error(said)
            if not begun:
                raise self.shell_error(started + said)
            fetched = temporary.stat().st_size
            if process.returncode != 0 or fetched != size:
                reason = said if process.returncode != 0 else f"{fetched} bytes came of {size}"
                raise EnvironmentFailed(f"could not fetch {remote}: {reason}", where=self.host, remedy="run again")


_REASONS: tuple[tuple[str, tuple[str, str]], ...] = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        (
            "its host key is not the known one",
            "check that it is the right board, then correct your known_hosts (ssh-keygen -R)",
        ),
    ),
    ("Host key verification failed", ("its host key is not known", "connect once with `ssh` by hand and check the key")),
    ("Permission denied", ("it refuses your key", "set up a key or an agent (ssh-copy-id); passwords are never asked for")),
    ("Could not resolve hostname", ("no such host", "check the name")),
)


class Turn:
    """A board for oneself, as long as one ssh session lives, whatever ends it: two that measure at a time disturb each other.

    The session locks the board's folder for temporary files, which leaves no file behind, and waits for the end of its
    input. Boards without ``flock`` have no turns; everybody is let in.
    """

    def __init__(self, board: Board, waits: Callable[[str], None] = lambda text: None) -> None:
        """Take the board.

        Args:
            board: Where.
            waits: Told once, where somebody else has the board.
        """
        self.board = board
        self.waits = waits
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Turn:
        """Wait for the board.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed or was lost, or the board's shell does not come to it.
        """
        script = (
            f'{PRINT_BEGIN}; d="${{TMPDIR:-/tmp}}"; '
            'if [ -r "$d" ] && command -v flock > /dev/null; then exec 8< "$d"; '
            "flock -n 8 || { echo busy; flock 8; }; fi; echo yours; cat > /dev/null"
        )
        process, timer = _kept_session(self.board, script)
        assert process.stdout is not None
        self._process = process
        try:
            started, begun = _until_begin(process.stdout)
            said = process.stdout.readline().strip()
            if said == b"busy":
                timer.cancel()
                self.waits(f"{self.board.host} measures for somebody else: waiting for it")
                said = process.stdout.readline().strip()
            if said != b"yours":
                error = process.communicate()[1].decode(errors="replace")
                if begun or process.returncode == CONNECTION_FAILED:
                    raise self.board.connection_error(error)
                raise self.board.shell_error(started + error)
        except BaseException:
            self.__exit__()
            raise
        finally:
            timer.cancel()
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the next one in."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class WorkFolder:
    """A folder on the board that lives as long as one ssh session, whatever ends it.

    The session makes the folder and waits for the end of its input; then it removes the folder. A connection that is lost
    ends the input too, so nothing is left behind on the board. Every other command shares the connection of that session.

    Attributes:
        path: On the board.
        board: The board, over the shared connection.
    """

    def __init__(self, board: Board) -> None:
        """Take the board; the folder is made on entry."""
        self._sockets = tempfile.TemporaryDirectory(prefix="rescompress-ssh-")
        self.board = replace(board, control=Path(self._sockets.name) / "s")
        self._process: subprocess.Popen[bytes] | None = None
        self.path = ""

    def __enter__(self) -> WorkFolder:
        """Make the folder.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, the board has no room, or its shell does not come to making the folder.
        """
        script = (
            f'{PRINT_BEGIN}; d=$(mktemp -d "${{TMPDIR:-/tmp}}/rescompress.XXXXXX") || exit 1; '
            "trap 'rm -rf -- \"$d\"' EXIT; trap 'exit 1' HUP INT TERM PIPE; "
            'printf "%s\\n" "$d"; cat > /dev/null'
        )
        process, timer = _kept_session(self.board, script, master=True)
        assert process.stdout is not None
        self._process = process
        try:
            started, begun = _until_begin(process.stdout)
            self.path = process.stdout.readline().decode(errors="replace").strip()
            made = self.path.startswith("/")
            said = "" if made else process.communicate()[1].decode(errors="replace")
        finally:
            timer.cancel()
        if not made:
            if process.returncode == CONNECTION_FAILED:
                raise self.board.connection_error(said)
            if not begun:
                raise self.board.shell_error(started + said)
            raise EnvironmentFailed(
                f"could not make a work folder: {said.strip() or 'no reason given'}",
                where=self.board.host,
                remedy="free some space on the board, or set TMPDIR there",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the folder and wait until it is gone."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        self._sockets.cleanup()


def _kept_session(board: Board, script: str, *, master: bool = False) -> tuple[subprocess.Popen[bytes], threading.Timer]:
    """Start a session that lives until its input is closed, and the clock that ends it unless it begins in time.

    The caller stops the clock.
    """
    command = board.command(f"sh -c {shlex.quote(script)}", master=master)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    timer = threading.Timer(board.connect_timeout_s + START_TIMEOUT_S, process.kill)
    timer.start()
    return process, timer


def _until_begin(stream: IO[bytes]) -> tuple[str, bool]:
    """Return what stands in a stream before `BEGIN`, and whether that came at all."""
    started = ""
    for line in iter(stream.readline, b""):
        before, begin, _ = line.decode(errors="replace").partition(f"{BEGIN}\n")
        started += before
        if begin:
            return started, True
    return started, False
