"""`Store`: outcomes of stages by their key, shared by many runs, so that equal work is done once.

A search tries many configs that begin alike: the dense network is evaluated once, the curves of one network serve every
budget, two candidates that differ in their precision alone share their pruning. Files are linked from the store into a
run's folder (copied where the file system has no links); they are replaced whole and never changed in place, so a link is
as good as a copy. What is being computed holds a lock of its key: a second run that needs the same waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rescompress.core.artifact import atomic_path, make_folder, write_text
from rescompress.core.evidence import contradiction
from rescompress.core.locks import FileLock
from rescompress.core.manifest import StageResult

_RESULT = "result.json"


@dataclass(frozen=True)
class Store:
    """A folder of outcomes, one sub-folder a key.

    Attributes:
        folder: Where it is; several processes may share it.
    """

    folder: Path

    @contextlib.contextmanager
    def computing(self, key: str) -> Iterator[None]:
        """Hold the key while its outcome is looked for and, if need be, computed; waits for another process that does."""
        make_folder(self.folder / "locks")
        with FileLock(self.folder / "locks" / key).held():
            yield

    def fetch(self, key: str, into: Path) -> StageResult | None:
        """Return the outcome of a key with its files in the folder `into`, or None if it is not here whole and sound."""
        place = self._place(key)
        try:
            result = StageResult.model_validate_json((place / _RESULT).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError):
            return None
        if result.key != key or result.status != "done" or not all(a.intact(place) for a in result.outputs):
            return None
        if contradiction([result], place) is not None:  # edited
            return None
        for artifact in result.outputs:
            _link(place / artifact.path, into / artifact.path)
        return result

    def put(self, result: StageResult, folder: Path) -> None:
        """Take in an outcome and its files, the record last, so that what is half here is not here."""
        place = self._place(result.key)
        for artifact in result.outputs:
            _link(folder / artifact.path, place / artifact.path)
        write_text(place / _RESULT, result.model_dump_json(indent=1) + "\n")

    def value(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the JSON values of a key, computed once by whoever asks first.

        Args:
            key: Hash of everything the values depend on.
            compute: Called where they are not known.
        """
        path = self._place(key) / "value.json"
        with self.computing(key):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(known, dict):
                    return known
            made = dict(compute())
            write_text(path, json.dumps(made) + "\n")
            return made

    def _place(self, key: str) -> Path:
        return self.folder / "objects" / key[:2] / key


def _link(source: Path, target: Path) -> None:
    """Make `target` a second name of a file, or a copy, in place of what stands there."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy(source, temporary)
