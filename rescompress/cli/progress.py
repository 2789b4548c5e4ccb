"""Drawing progress: a live list of stages with a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rescompress.cli.output import Output
from rescompress.core.text import log_line
from rescompress.runs.reporter import Reporter, Silent

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_EVERY_S = 10.0


@contextlib.contextmanager
def reporting(output: Output) -> Iterator[Reporter]:
    """Yield the reporter that suits where stderr goes."""
    if output.verbosity < 0:
        yield Silent()
    elif not output.interactive:
        yield PlainReporter()
    else:
        live = LiveReporter(output)
        with live:
            yield live


def _time_left(since: float, done: int, total: int) -> str:
    if not done or done >= total:
        return ""
    seconds = (time.monotonic() - since) * (total - done) / done
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} left"


class PlainReporter:
    """One line per event, and one every few seconds within a step."""

    def __init__(self) -> None:
        self._what = ""
        self._since = 0.0
        self._next = 0.0

    def stage(self, name: str, position: int, total: int) -> None:
        """Write the stage's name."""
        self._line(f"[{position}/{total}] {name}")

    def finished(self, name: str, summary: str) -> None:
        """Write how it ended."""
        self._line(f"  {name}: {summary}")

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Write a line if the last one is some seconds old."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._next = what, now, now + PLAIN_EVERY_S
        elif now >= self._next:
            self._next = now + PLAIN_EVERY_S
            parts = [f"  {what} {done}/{total}", text, _time_left(self._since, done, total)]
            self._line("  ".join(p for p in parts if p))

    def note(self, text: str) -> None:
        """Write it."""
        self._line(f"  note: {text}")

    def _line(self, text: str) -> None:
        sys.stderr.write(log_line(text) + "\n")
        sys.stderr.flush()


class LiveReporter:
    """The list of stages with what each came to, and a bar for the step under way."""

    def __init__(self, output: Output) -> None:
        from rich.live import Live

        self._console = output.console()
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=False)
        self._lines: list[tuple[str, str]] = []
        self._bar: tuple[str, int, int, str] | None = None
        self._since = time.monotonic()

    def __enter__(self) -> LiveReporter:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar = None
        self._live.stop()

    def stage(self, name: str, position: int, total: int) -> None:
        """Begin a line."""
        self._lines.append((f"[{position}/{total}] {name}", ""))
        self._bar = None

    def finished(self, name: str, summary: str) -> None:
        """End the stage's line."""
        label, _ = self._lines[-1]
        self._lines[-1] = (label, summary)
        self._bar = None

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar."""
        if self._bar is None or self._bar[0] != what:
            self._since = time.monotonic()
        self._bar = (what, done, total, text)

    def note(self, text: str) -> None:
        """Print it above the list."""
        self._console.print(f"note: {text}", style="dim")

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 2))
        for label, summary in self._lines:
            mark = Text("done ", style="green") if summary else Text(".... ", style="yellow")
            rows.add_row(mark, Text(label), Text(summary, style="dim"))
        if self._bar is None:
            return rows
        what, done, total, text = self._bar
        bar = Table.grid(padding=(0, 1))
        left = _time_left(self._since, done, total)
        bar.add_row(
            Text(f"      {what}"), ProgressBar(total=total, completed=done, width=30), Text(f"{done}/{total} {text} {left}")
        )
        return Group(rows, bar)
