"""`Host`: the program that a trunk was taken out of, as a checkpoint remembers it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rescompress.core.artifact import file_sha256
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import Frozen

AUTO = "auto"
"""The word of ``--trunk`` for the largest part that is known."""


def wanted_tensors(text: str) -> tuple[str, ...]:
    """Return the tensors that ``--trunk`` names; none for ``auto``."""
    return () if text.strip() == AUTO else tuple(part.strip() for part in text.split(",") if part.strip())


class HostFile(Frozen):
    """A file that a host is made of.

    Attributes:
        path: Absolute, as it was at import.
        sha256: Of its content then.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> HostFile:
        """Return the record of a file."""
        return cls(path=str(path.absolute()), sha256=file_sha256(path))


class Host(Frozen):
    """Where a trunk belongs.

    Attributes:
        kind: ``onnx``, a file; ``code``, a module that a user's Python file builds; ``module``, one that lived in Python.
        files: What it is made of, the first the one that was named; empty for a module that lived in Python.
        borders: Per output of the trunk, in order, the host's tensor that it is.
        input: The host's tensor that the trunk reads.
        last: Whether that has its channels last.
        batch: Images per call that the host is fixed to; None for any number.
        options: What was stated about the host when it was read, by name.
    """

    kind: Literal["onnx", "code", "module"]
    files: tuple[HostFile, ...] = ()
    borders: dict[str, str]
    input: str
    last: bool = False
    batch: int | None = None
    options: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it."""
        return Path(self.files[0].path).name if self.files else "the module"

    def beside(self, folder: Path) -> Host:
        """Return the host with each file that is gone taken from `folder`, where one of that name lies."""
        moved = [
            file.model_copy(update={"path": str(folder.absolute() / Path(file.path).name)})
            if not Path(file.path).is_file() and (folder / Path(file.path).name).is_file()
            else file
            for file in self.files
        ]
        return self.model_copy(update={"files": tuple(moved)})

    def checked(self) -> Path:
        """Return its file, once all of them are seen to be what they were at import.

        Raises:
            CheckpointError: One is gone or was changed, or there is none.
        """
        if not self.files:
            raise CheckpointError(
                "its host is a module that lived in Python, which no file holds",
                remedy="import it with --code FILE:CALLABLE, or from an ONNX file",
            )
        for file in self.files:
            path = Path(file.path)
            try:
                now = file_sha256(path)
            except OSError as e:
                raise CheckpointError(
                    "the host that the trunk was taken out of is not there",
                    where=str(path),
                    remedy="put it back, there or beside the checkpoint",
                ) from e
            if now != file.sha256:
                raise CheckpointError(
                    "the host was changed since the trunk was taken out of it",
                    where=str(path),
                    remedy="put the old file back, or take the trunk out again with --trunk",
                )
        return Path(self.files[0].path)
