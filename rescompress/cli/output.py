"""The one sink of the command line: data to stdout, progress, hints and errors to stderr.

Text from files is made harmless twice. What `Output` writes passes through `log_line` before it is styled; and `guarded`
stands before both streams of the process, so that what anything else prints (the parser of the command line, warnings of
libraries, tracebacks) passes, too.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

from rescompress.core.text import json_text, log_line, shown

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType

LONGEST = 4000
"""Letters of an error that are shown; a file may hold a name of any length."""


class Output:
    """Where a command's words go.

    Attributes:
        json: One JSON document on stdout instead of tables.
        verbosity: -1 quiet, 0 normal, 1 with all details.
        debug: Show tracebacks.
    """

    def __init__(self) -> None:
        self.json = False
        self.verbosity = 0
        self.debug = False

    def console(self) -> Console:
        """Return a console on stderr, for progress."""
        return _console(stderr=True, quiet=self.verbosity < 0)

    @property
    def interactive(self) -> bool:
        """Whether moving progress can be drawn: stderr is a terminal and nobody asked for quiet."""
        return sys.stderr.isatty() and self.verbosity >= 0

    def result(self, document: Any, *human: RenderableType) -> None:
        """Print the outcome of a command: the document as JSON, or the renderables; as much of it as the reader wants."""
        try:
            self._print(document, *human)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_stdout()

    def text(self, text: str) -> None:
        """Print a text that has a form of its own (CSV, Markdown) on stdout; as much of it as the reader wants."""
        try:
            sys.stdout.write(log_line(text))
            sys.stdout.flush()
        except BrokenPipeError:
            discard_stdout()

    def workflow_command(self, line: str) -> None:
        """Print a line that a CI runner obeys, with its parts escaped as the runner asks for."""
        stream = sys.stderr
        (stream.unguarded if isinstance(stream, _Guarded) else stream).write(line + "\n")

    def _print(self, document: Any, *human: RenderableType) -> None:
        if self.json:
            import json

            sys.stdout.write(json_text(json.dumps(document, indent=1, allow_nan=False)) + "\n")
            return
        console = _console() if sys.stdout.isatty() else _console(width=_width())
        for renderable in human:
            # lines of text are never broken: commands among them are there to be copied
            console.print(renderable, soft_wrap=isinstance(renderable, str))

    def hint(self, text: str) -> None:
        """Print a line for the person at the keyboard, unless quiet."""
        if self.verbosity >= 0:
            _say(text)

    def detail(self, text: str) -> None:
        """Print a line that only ``-v`` shows."""
        if self.verbosity > 0:
            _say(text)

    def failure(self, error: Exception) -> int:
        """Print an error and return its exit code."""
        from rescompress.core.errors import RescompressError

        if self.debug:
            import traceback

            traceback.print_exception(error)
        code = 1
        if isinstance(error, RescompressError):
            code = error.exit_code
            text = f"{error.where}: {error.what}" if error.where else error.what
            _say(f"error: {text}")
            if error.remedy:
                _say(f"  -> {error.remedy}")
        elif _is_out_of_memory(error):
            code = 7
            remedy = "use a smaller --batch-size (or --train-batch), or fewer --calib images"
            _say(f"error: out of memory\n  -> {remedy}")
        elif _is_out_of_address_space(error):
            code = 7
            _say(f"error: out of memory while libraries were loaded: {error}\n  -> allow the process more memory (ulimit -v)")
        elif isinstance(error, OSError) and error.errno == 28:
            code = 7
            _say(f"error: the disk is full: {error.filename or ''}\n  -> free some space and run again")
        elif isinstance(error, BrokenPipeError):
            code = 0
        elif isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_SYSTEM:
            code = 7
            _say(f"error: {error.filename}: {error.strerror}\n  -> correct its owner, its rights or its disk")
        else:
            _say(f"error: {type(error).__name__}: {error}\n  -> a bug of rescompress; --debug shows where")
        return code


_OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.EMFILE, errno.ENFILE)
"""What a system says of a file that no program can help; wherever it is met."""


def _say(text: str) -> None:
    """Print text from anywhere on stderr."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    sys.stderr.write(log_line(text) + "\n")


def _console(**options: Any) -> Console:
    """Return a console that takes text for text: there is no markup in it, no emoji, and no control character."""
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions
    from rich.segment import Segment

    class Console(RichConsole):
        def on_broken_pipe(self) -> None:  # Rich's own ends with 1, whatever the command came to
            self.quiet = True
            discard_stdout()

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                text = segment.text  # what a table holds comes by once for each thing around it
                plain = segment.control or text == "\n" or (text.isascii() and text.isprintable())
                yield segment if plain else Segment(shown(text), segment.style)

    return Console(markup=False, emoji=False, highlight=False, **options)


_STYLE = re.compile(r"(\x1b\[[0-?]*[ -/]*[@-~]|\r(?!\n))")
"""What Rich sends to a terminal: colours and moves of the cursor; it writes no title and opens no link."""


class _Guarded:
    """A stream that takes no command from the text that is written to it.

    Attributes:
        unguarded: The stream behind it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream
        self._line = ""

    def write(self, text: str) -> int:
        """Write the text, made harmless; on a terminal colours and moves of the cursor are kept."""
        if not isinstance(text, str):
            raise TypeError("a stream of text")
        if not text:
            return 0
        if self.unguarded.isatty():
            parts = _STYLE.split(text)
            parts[::2] = map(shown, parts[::2])
            self.unguarded.write("".join(parts))
        else:
            begun = self._line
            self.unguarded.write(log_line(begun + text)[len(begun) :])
            line = (begun + text).rpartition("\n")[2]
            self._line = line if line.strip() in ("", ":") and len(line) < LONGEST else f"x{line[-2:]}"
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let nothing that is printed inside reach stdout and stderr as a command to a terminal or to a CI runner."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Guarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch had no memory left; on a CPU torch says so in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def _is_out_of_address_space(error: Exception) -> bool:
    """Whether a library or a thread of one found no memory; the loader of shared objects says so in words alone."""
    if isinstance(error, OSError) and error.errno == 12:
        return True
    words = ("failed to map segment", "cannot allocate memory", "can't start new thread", "cannot map zero-fill")
    return isinstance(error, ImportError | OSError | RuntimeError) and any(w in str(error).lower() for w in words)


def output_of(ctx: typer.Context) -> Output:
    """Return the sink of the running command."""
    output = ctx.obj
    assert isinstance(output, Output)
    return output


def discard_stdout() -> None:
    """Let what is still printed go nowhere: its reader has seen enough."""
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _width() -> int:
    """Width for redirected output: the COLUMNS variable, or wide enough that no table is cut."""
    import os

    said = os.environ.get("COLUMNS", "")
    return int(said) if re.fullmatch("[1-9][0-9]{0,4}", said) else 160
