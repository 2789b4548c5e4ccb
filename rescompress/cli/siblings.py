"""A check that ``compress``, ``export`` and ``edge_targets`` are ours: their names are common enough to clash."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rescompress.core.errors import ToolMissing

SIBLINGS = ("compress", "export", "edge_targets")
_MARKS = {"compress": "resnet.py", "export": "to_onnx.py", "edge_targets": "catalog.py"}


def check_siblings() -> None:
    """Raise ToolMissing, naming the culprit, if another package hides one of ours."""
    for name in SIBLINGS:
        found = importlib.util.find_spec(name)
        places = list(found.submodule_search_locations or []) if found else []
        if not any((Path(place) / _MARKS[name]).is_file() for place in places):
            culprit = places[0] if places else (found.origin if found else "nothing at all")
            raise ToolMissing(
                f"the package '{name}' that Python finds is not ours but {culprit}",
                remedy=f"move that away or start elsewhere; rescompress needs its own '{name}'",
            )
