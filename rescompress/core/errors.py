"""The error tree, and the exit code each branch of it carries.

::

    RescompressError              (exit 1: never raised itself)
    ├── GateFailed                exit 3   a gate failed; `lint` ends with it, too, but its findings are no error of ours
    ├── ToolMissing               exit 4   a program or package is not installed here
    ├── BadInput                  exit 5   wrong by looking at a file, a name, a value or data
    │   ├── CheckpointError
    │   ├── DataError
    │   ├── ConfigError
    │   ├── BudgetError
    │   ├── TargetError
    │   └── ModelFileError        an ONNX file or an engine
    ├── GateInconclusive          exit 6
    └── EnvironmentFailed         exit 7   disk, memory, connection, engine build

An error says *what* is wrong, *where* (the file, key or option) and *what to do*.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class RescompressError(Exception):
    """An error whose text is meant for the person at the keyboard.

    Args:
        what: What is wrong, one sentence.
        where: The file, option or key it was found in.
        remedy: What to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """Return the three parts in one line."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.remedy})" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword parts when the error crosses a process border."""
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(kind: type[RescompressError], what: str, where: str | None, remedy: str | None) -> RescompressError:
    return kind(what, where=where, remedy=remedy)


class GateFailed(RescompressError):
    """A gate failed."""

    exit_code = 3


class ToolMissing(RescompressError):
    """A program or package that this step needs is not installed here."""

    exit_code = 4


class BadInput(RescompressError):
    """Something found wrong by looking at a file, a name, a value or data."""

    exit_code = 5


class CheckpointError(BadInput):
    """A checkpoint that is missing, damaged, unsafe or no ResNet that is known here."""


class DataError(BadInput):
    """A data set that is missing, empty, or does not fit the checkpoint."""


class ConfigError(BadInput):
    """A run config with an unknown key or an impossible value."""


class BudgetError(BadInput):
    """A pruning budget that no allowed network can meet."""


class TargetError(BadInput):
    """An unknown target, or one that lacks what was asked of it."""


class ModelFileError(BadInput):
    """An ONNX file or engine that is missing, damaged or of another device."""


class GateInconclusive(RescompressError):
    """The data does not suffice to pass or to fail."""

    exit_code = 6


class EnvironmentFailed(RescompressError):
    """The disk, the memory, the connection or an engine build failed."""

    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'cpu'?``, or the whole list of what is known.

    Args:
        name: What the user wrote.
        known: The names that would have been right.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{n}'" for n in close) + "?"
    return "known: " + ", ".join(names)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def shown(value: object) -> str:
    """Return a value that somebody gave, for the text of an error: short, whatever it holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"a {type(value).__name__} too long to show"
