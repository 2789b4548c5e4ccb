"""The user's own OpenSSH client: their config, agent and jump hosts; never a password in our hands.

Every command is one word list, quoted for the shell of the board. Files travel through ``cat`` on the same channel, so a
board needs no more than a shell.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from rescompress.core.artifact import atomic_path
from rescompress.core.errors import BadInput, EnvironmentFailed, ToolMissing

CONNECTION_FAILED = 255
"""Exit code of ssh for its own failures."""


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
            options += ["-o", f"ControlMaster={'yes' if master else 'no'}", "-o", f"ControlPath={self.control}"]
        if self.config is not None:
            options = ["-F", str(self.config), *options]
        if self.port is not None:
            options += ["-p", str(self.port)]
        return ["ssh", *options, "--", self.host, remote]

    def run(self, command: Sequence[str] | str, *, timeout_s: float = 60.0) -> Completed:
        """Run one command on the board and return its exit code and output.

        Args:
            command: Words, which are quoted, or a text for the shell of the board.
            timeout_s: Until it counts as hanging.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, was lost, or the command hangs.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        try:
            done = subprocess.run(
                # a shell that stays turns a death by signal into an exit code; ssh itself would say 255 for it
                self.command(f"{text}\nexit $?"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as e:
            raise EnvironmentFailed(
                f"did not answer within {timeout_s:g} s", where=f"{self.host}: {text}", remedy="is the board busy? try again"
            ) from e
        output = done.stdout.decode(errors="replace")
        if done.returncode == CONNECTION_FAILED:
            raise self.connection_error(output)
        return Completed(done.returncode, output)

    def connection_error(self, output: str) -> EnvironmentFailed:
        """Return the error for what ssh said when it failed."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        reason = next((r for text, r in _REASONS if text in output), None)
        said = lines[-1] if lines else "no reason given"
        what, remedy = reason or (f"connection lost or refused: {said}", "is the board up? try `ssh` by hand, then run again")
        return EnvironmentFailed(what, where=self.host, remedy=remedy)

    def put(self, local: Path, remote: str) -> None:
        """Copy a file to the board.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, or the board could not store the file.
        """
        with local.open("rb") as source:
            done = subprocess.run(
                self.command(f"cat > {shlex.quote(remote)}"), stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        output = done.stdout.decode(errors="replace").strip()
        if done.returncode == CONNECTION_FAILED:
            raise self.connection_error(output)
        size = local.stat().st_size
        counted = self.run(f"wc -c < {shlex.quote(remote)}") if done.returncode == 0 else None
        if counted is None or counted.output.strip() != str(size):
            full = "the disk is full: " if "No space left" in output else ""
            raise EnvironmentFailed(
                f"{full}could not store {local.name} ({size} bytes): {output or 'the copy is short'}",
                where=self.host,
                remedy="free some space on the board and run again",
            )

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the board; `local` appears whole or not at all.

        Raises:
            ToolMissing: There is no ssh here.
            EnvironmentFailed: The connection failed, the file is not there, or the disk is full.
        """
        with atomic_path(local) as temporary:
            with temporary.open("wb") as sink:
                done = subprocess.run(
                    self.command(f"cat < {shlex.quote(remote)}"), stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.PIPE
                )
            said = done.stderr.decode(errors="replace").strip()
            if done.returncode == CONNECTION_FAILED:
                raise self.connection_error(said)
            if done.returncode != 0:
                raise EnvironmentFailed(f"could not fetch {remote}: {said}", where=self.host, remedy="run again")


_REASONS: tuple[tuple[str, tuple[str, str]], ...] = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        ("its host key is not the known one", "check that it is the right board, then mend your known_hosts (ssh-keygen -R)"),
    ),
    ("Host key verification failed", ("its host key is not known", "connect once with `ssh` by hand and check the key")),
    ("Permission denied", ("it refuses your key", "set up a key or an agent (ssh-copy-id); passwords are never asked for")),
    ("Could not resolve hostname", ("no such host", "check the name")),
)


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
            EnvironmentFailed: The connection failed, or the board has no room.
        """
        script = (
            'd=$(mktemp -d "${TMPDIR:-/tmp}/rescompress.XXXXXX") || exit 1; '
            "trap 'rm -rf -- \"$d\"' EXIT; trap 'exit 1' HUP INT TERM PIPE; "
            'printf "%s\\n" "$d"; cat > /dev/null'
        )
        process = subprocess.Popen(
            self.board.command(f"sh -c {shlex.quote(script)}", master=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        self._process = process
        self.path = process.stdout.readline().decode(errors="replace").strip()
        if not self.path.startswith("/"):
            said = _rest(process.stderr)
            code = process.wait()
            if code == CONNECTION_FAILED:
                raise self.board.connection_error(said)
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


def _rest(stream: IO[bytes] | None) -> str:
    return stream.read().decode(errors="replace") if stream is not None else ""
