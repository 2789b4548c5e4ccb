"""The one sink of the command line: data to stdout, progress, hints and errors to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType


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
        from rich.console import Console

        return Console(stderr=True, quiet=self.verbosity < 0)

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

    def _print(self, document: Any, *human: RenderableType) -> None:
        if self.json:
            import json

            sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
            return
        from rich.console import Console as RichConsole

        class Console(RichConsole):
            def on_broken_pipe(self) -> None:  # Rich's own ends with 1, whatever the command came to
                self.quiet = True
                discard_stdout()

        console = Console(highlight=False) if sys.stdout.isatty() else Console(width=_width(), highlight=False)
        for renderable in human:
            # lines of text are never broken: commands among them are there to be copied
            console.print(renderable, soft_wrap=isinstance(renderable, str))

    def hint(self, text: str) -> None:
        """Print a line for the person at the keyboard, unless quiet."""
        if self.verbosity >= 0:
            sys.stderr.write(text + "\n")

    def detail(self, text: str) -> None:
        """Print a line that only ``-v`` shows."""
        if self.verbosity > 0:
            sys.stderr.write(text + "\n")

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
            sys.stderr.write(f"error: {text}\n")
            if error.remedy:
                sys.stderr.write(f"  -> {error.remedy}\n")
        elif _is_out_of_memory(error):
            code = 7
            remedy = "use a smaller --batch-size (or --train-batch), or fewer --calib images"
            sys.stderr.write(f"error: out of memory\n  -> {remedy}\n")
        elif isinstance(error, OSError) and error.errno == 28:
            code = 7
            sys.stderr.write(f"error: the disk is full: {error.filename or ''}\n  -> free some space and run again\n")
        elif isinstance(error, BrokenPipeError):
            code = 0
        else:
            sys.stderr.write(f"error: {type(error).__name__}: {error}\n  -> a bug of rescompress; --debug shows where\n")
        return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch had no memory left; on a CPU torch says so in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


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

    return int(os.environ["COLUMNS"]) if os.environ.get("COLUMNS", "").isdigit() else 160
