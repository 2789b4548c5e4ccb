"""A file is a plugin: names are read off a package's folder without importing anything.

A new pruning method, checkpoint format, runtime or lint rule is one new file in its package. Third parties add theirs
through an entry-point group of the same name as the package (``[project.entry-points."compress.prune.methods"]``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rescompress.core.errors import BadInput, nearest


def _files(package: str) -> list[str]:
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise LookupError(f"{package} is no package")
    return [
        path.stem
        for folder in found.submodule_search_locations
        for path in Path(folder).glob("*.py")
        if not path.stem.startswith("_")
    ]


def names(package: str) -> list[str]:
    """Return the plugin names of `package`, sorted: its files that do not start with ``_``, and entry points."""
    third_party = [e.name for e in importlib.metadata.entry_points(group=package)]
    return sorted({*_files(package), *third_party})


def listed(package: str) -> list[str]:
    """Return the same as `names` for a package of ours, without importing what it is in; for the shell, which waits."""
    top, *below = package.split(".")
    found = importlib.util.find_spec(top)
    places = (found.submodule_search_locations if found is not None else None) or ()
    files = {path.stem for place in places for path in Path(place, *below).glob("[a-z]*.py")}
    return sorted({*files, *(e.name for e in importlib.metadata.entry_points(group=package))})


def file_of(package: str, name: str) -> Path | None:
    """Return the file of a plugin, without importing it or what it is in; None where there is none of that name."""
    top, *below = package.split(".")
    found = importlib.util.find_spec(top)
    for place in (found.submodule_search_locations if found is not None else None) or ():
        path = Path(place, *below, f"{name}.py")
        if path.is_file():
            return path
    entry = next((e for e in importlib.metadata.entry_points(group=package) if e.name == name), None)
    spec = importlib.util.find_spec(entry.module) if entry is not None else None
    return Path(spec.origin) if spec is not None and spec.origin else None


def known(package: str, name: str) -> bool:
    """Return whether `package` has a plugin called `name`; nothing is imported, and entry points are read only if needed."""
    return name in _files(package) or any(e.name == name for e in importlib.metadata.entry_points(group=package))


def load(package: str, name: str, *, what: str = "plugin", offers: type | None = None) -> ModuleType:
    """Return the module of the plugin called `name`.

    Args:
        package: The package whose files are plugins, such as ``compress.prune.methods``.
        name: The plugin.
        what: What the plugins of this package are called in an error.
        offers: The protocol whose names each of them has.

    Raises:
        BadInput: No plugin has that name, or it lacks a name of the protocol.
    """
    module = _module(package, name, what)
    missing = [n for n in _names_of(offers) if not hasattr(module, n)] if offers is not None else []
    if offers is not None and missing:
        raise BadInput(
            f"the {what} '{name}' lacks {', '.join(missing)}",
            where=module.__name__,
            remedy=f"add what {offers.__module__}.{offers.__qualname__} names",
        )
    return module


def _module(package: str, name: str, what: str) -> ModuleType:
    if name in _files(package):
        return importlib.import_module(f"{package}.{name}")
    for entry in importlib.metadata.entry_points(group=package):
        if entry.name == name:
            module = entry.load()
            if not isinstance(module, ModuleType):
                raise BadInput(f"the entry point of {what} '{name}' is no module", remedy="point it at a module")
            return module
    raise BadInput(f"unknown {what} '{name}'", remedy=nearest(name, names(package)))


def _names_of(protocol: type) -> Iterator[str]:
    """Yield what a protocol names itself: values first, then functions."""
    for name in {**protocol.__annotations__, **vars(protocol)}:
        if not name.startswith("_"):
            yield name
