"""What may be written over: never what a command reads, never through a link out of a run's folder, and no other person's file.

A run's folder is its own from the first call on: ``.stages/.claimed.json`` names the places that its stages write, before
any of them is written. What lies at such a place in a folder that is no run's yet, or at one that is not claimed yet and is no
recorded output, is somebody else's, and stays until ``--force`` says otherwise.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rescompress.core.artifact import check_writable, file_sha256, open_regular, read_text, write_text
from rescompress.core.errors import BadInput
from rescompress.core.locks import folder_held
from rescompress.core.manifest import MANIFEST_NAME, load_manifest
from rescompress.runs.stage import Stage

RECORDS = ".stages"
RESUME = ".resume"
LOCK = ".lock"
TABLE = "table.md"
SEARCH_MARK = "search.json"
"""In the folder of a search: whose it is. Its candidates' runs lie below."""
_CLAIMED = f"{RECORDS}/.claimed.json"
_REMEDY = "move it away, or choose another folder with -o"


def record_of(stage: str) -> str:
    """Return the place of a stage's record in the run's folder."""
    return f"{RECORDS}/{stage.replace(':', '_').replace('/', '_')}.json"


def lock_of(stage: str) -> str:
    """Return the place of the lock of a stage that works beside a run."""
    return f".{stage.replace(':', '_').replace('/', '_')}.lock"


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file, by links, hard links, or another spelling."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def check_reads(stages: Sequence[Stage], folder: Path, reads: Iterable[Path], *, workspace: bool) -> None:
    """Make sure that no stage would write over a file that this run reads, so that it can be repeated.

    Args:
        stages: In order.
        folder: The run's folder.
        reads: What the run reads besides what its stages name.
        workspace: Whether the stage ``dense`` may be repeated on its own file, and a plan on the network it is for: such a
            file comes out as it was.

    Raises:
        BadInput: One would.
    """
    files = dict.fromkeys([*reads, *(path for stage in stages for path in stage.reads)])
    for stage in stages:
        again = ("dense", "plan") if workspace else ()
        written = _at(folder, (place for place in stage.writes if not place.startswith(again)) if again else stage.writes)
        for read in files:
            clash = next((p for p in [*written, *_at(folder, (record_of(stage.name),))] if same_file(p, read)), None)
            if clash is not None:
                where, what = str(read), "would be replaced by what is made from it"
                raise BadInput(what, where=where, remedy=f"copy it to a place outside of {folder} first")
    for read in files:
        if any(same_file(folder / name, read) for name in (MANIFEST_NAME, LOCK, TABLE)):
            raise BadInput("would be replaced by this run", where=str(read), remedy=f"move it out of {folder} first")


def check_own(folder: Path) -> None:
    """Make sure that the folder is no search's, and the places of the pipeline's own books no links, but what they should be.

    Raises:
        BadInput: It is, or one is.
    """
    for name in (RECORDS, RESUME):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            kind = "is a link" if path.is_symlink() else "is no folder"
            raise BadInput(f"{kind}, a run keeps its records there", where=str(path), remedy="remove it and run again")
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / SEARCH_MARK).read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.keys() == {"name", "storage"}:
            what = f"holds the search '{known['name']}'"
            raise BadInput(what, where=str(folder), remedy="name another folder with -o")


def claim(stages: Sequence[Stage], folder: Path, *, workspace: bool, force: bool) -> None:
    """Take the places that the stages write, unless somebody else's file lies at one.

    Args:
        stages: In order.
        folder: The run's folder.
        workspace: Whether the folder is that of the single commands, which write no table.
        force: Whether other people's files may be replaced.

    Raises:
        BadInput: One lies there.
    """
    with folder_held(folder):  # a run, and deployments beside it, may come at a time
        _claim(stages, folder, workspace=workspace, force=force)


def _claim(stages: Sequence[Stage], folder: Path, *, workspace: bool, force: bool) -> None:
    patterns = sorted({pattern for stage in stages for pattern in stage.writes})
    for pattern in patterns:
        below = (folder / pattern).parent
        if below != folder and ((below / LOCK).exists() or (below / MANIFEST_NAME).exists()):
            raise BadInput("is the folder of a run, and a target's files would go there", where=str(below), remedy=_REMEDY)
    claimed = _claimed(folder)
    if not force and claimed is not None:
        new = [p for p in [*patterns, *([] if workspace else [TABLE])] if p not in claimed]
        outputs = _outputs(folder)
        new = [p for p in new if p not in _deployed(stages, folder)]
        foreign = next((p for p in _at(folder, new) if p.relative_to(folder).as_posix() not in outputs), None)
        if foreign is None and (folder / MANIFEST_NAME).exists() and MANIFEST_NAME not in claimed and not outputs:
            foreign = folder / MANIFEST_NAME if not _is_manifest(folder) else None
        if foreign is not None:
            what = "is a file that rescompress did not write, and this would replace it"
            raise BadInput(
                what, where=str(foreign), remedy=f"{_REMEDY}, or replace it with --force" if not workspace else _REMEDY
            )
    everything = sorted({*(claimed or ()), *patterns, MANIFEST_NAME, *([] if workspace else [TABLE])})
    if claimed is None or everything != sorted(claimed):
        write_text(folder / _CLAIMED, json.dumps(everything, indent=1) + "\n", follow=False)


def _deployed(stages: Sequence[Stage], folder: Path) -> frozenset[str]:
    """Return the places of boards that the manifest has: versions before recorded no claim of them."""
    with contextlib.suppress(BadInput):
        known = {s.stage for s in load_manifest(folder).stages if s.is_deployment}
        return frozenset(place for stage in stages if stage.name in known for place in stage.writes)
    return frozenset()


def check_places(stage: Stage, folder: Path) -> None:
    """Make sure, before a stage works, that nothing leads its files out of the folder or stands in their way.

    Raises:
        BadInput: A place is a link, or no file.
    """
    for pattern in (*stage.writes, record_of(stage.name), f"{RESUME}/{stage.name.replace(':', '_')}.pt"):
        below = (folder / pattern).parent
        if below != folder and (below.is_symlink() or (below.exists() and not below.is_dir())):
            kind = "is a link" if below.is_symlink() else "is no folder"
            raise BadInput(f"{kind}, and {stage.name} writes below it", where=str(below), remedy="remove it and run again")
        for path in _at(folder, (pattern,)):
            if path.is_symlink() or not path.is_file():
                kind = "is a link" if path.is_symlink() else "is no regular file"
                what = f"{kind}, and {stage.name} writes there; a run writes into its own folder alone"
                raise BadInput(what, where=str(path), remedy="remove it and run again")


def folders_of(stages: Sequence[Stage], folder: Path) -> list[Path]:
    """Return the folders into which a run with these stages writes, and no other."""
    names = [RECORDS, RESUME, *(p.rpartition("/")[0] for stage in stages for p in stage.writes)]
    return [folder / name for name in dict.fromkeys(["", *names])]


def check_outputs(outputs: Mapping[str, Path | None], reads: Iterable[Path | None] = (), *, own: Sequence[Path] = ()) -> None:
    """Make sure, before any work, that the files a command writes are none that it reads, none of a run's, and no two the same.

    Args:
        outputs: By option.
        reads: Files; those that are None are left out.
        own: Files in the workspace of which outputs are copies: they may be named, too.

    Raises:
        BadInput: They are.
        EnvironmentFailed: They cannot be written.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    files = [read for read in reads if read is not None]
    for option, path in given.items():
        twin = next((o for o, p in given.items() if o != option and same_file(p, path)), None)
        if twin is not None:
            raise BadInput(f"{option} and {twin} name one file", where=str(path), remedy="give each a name of its own")
        if any(same_file(path, read) for read in files):
            raise BadInput("would be replaced by what is made from it", where=str(path), remedy=f"choose another {option}")
        owner = run_that_owns(path)
        if owner is not None and not any(same_file(path, copied) for copied in own):
            raise BadInput(f"belongs to the run in {owner}", where=str(path), remedy=f"choose another {option}")
        check_writable(path)


PAGE = re.compile(rb'<a class="skip" href="#main">Skip to the content</a>')
CARD = re.compile(rb"^## How it was made\n\nWith rescompress ", re.MULTILINE)
SUMMARY = re.compile(rb"\A## [^\n]* rescompress gate: ")
JUNIT = re.compile(rb'<testsuite name="rescompress gate"')
BASELINE = re.compile(rb'\A\{\s*("schema_version":\s*\d+,\s*)?"rescompress_version":')
CODE_QUALITY = re.compile(rb'\A\[\s*(\]|\{\s*"description":[^\n]*\n\s*"check_name": "rescompress gate: )')
ONNX = re.compile(rb"\A\x08[\x01-\x7f][\x0a\x12\x1a\x22\x28\x32\x3a\x42]")
"""``ir_version``, and behind it another field of a ModelProto."""
_HEAD = 2**20


def check_foreign(path: Path | None, sign: re.Pattern[bytes], option: str, *, force: bool) -> None:
    """Make sure that a file which a command would write over is one that it wrote before, or an empty one.

    Args:
        path: The file, there or not.
        sign: What a file of this kind has near its beginning when it is ours.
        option: That names it.
        force: Whether it may be any file.

    Raises:
        BadInput: It is somebody else's.
    """
    if path is None or force:
        return
    try:
        with open_regular(path) as f:
            head = f.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as e:
        raise BadInput(f"cannot be read: {e.strerror or e}", where=str(path), remedy=f"choose another {option}") from e
    if head and not sign.search(head):
        what = "is a file that this command did not write, and it would be replaced"
        raise BadInput(what, where=str(path), remedy=f"choose another {option}, or replace it with --force")


def check_delivery(source: Path, wanted: Path, names: Iterable[str], *, force: bool) -> None:
    """Make sure that an export's files replace none in the folder they are wanted in but those of another export.

    Those are the files whose hashes ``SHA256SUMS`` of a bundle has, and what lies beside a ``model.onnx`` of ours under its
    name, such as a runtime's own form of it. A file that comes out as it is may be any.

    Args:
        source: The folder they are in.
        wanted: Where copies are wanted.
        names: Of the files, and of those that would be removed.
        force: Whether any file may be replaced.

    Raises:
        BadInput: Another one would be replaced, or is reached through a link.
    """
    if wanted.exists() and not wanted.is_dir():
        raise BadInput("is a file, a folder was expected", where=str(wanted), remedy="name a folder, or a .tar.gz file")
    ours = frozenset() if force else _exported(wanted)
    for name in names:
        path = wanted / name
        owner = run_that_owns(path)
        if owner is not None and not same_file(path, source / name):
            raise BadInput(f"belongs to the run in {owner}", where=str(path), remedy="choose another -o")
        if force or name in ours or not os.path.lexists(path):
            continue
        if (source / name).is_file() and path.is_file() and file_sha256(path) == file_sha256(source / name):
            continue
        what = "is a file that no export wrote, or that was edited since, and it would be replaced"
        raise BadInput(what, where=str(path), remedy="choose another folder with -o, or replace it with --force")


def _exported(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder that an export wrote there, as they were written."""
    found = set()
    model = folder / "model.onnx"
    with contextlib.suppress(OSError), open_regular(model) as f:
        if b"\x12\x0brescompress" in f.read(64):  # producer_name
            found |= {p.name for p in folder.glob("model.*") if p.name != "model.json"}
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        about = json.loads(read_text(folder / "model.json"))
        lines = [line.partition("  ") for line in read_text(folder / "SHA256SUMS").splitlines()]
        sums = {name: sha256 for sha256, _, name in lines}
        if {"onnx_sha256", "preprocessing", "input_shape"} <= about.keys() and "model.json" in sums:
            found |= {n for n, s in sums.items() if "/" not in n and file_sha256(folder / n) == s} | {"SHA256SUMS"}
    return frozenset(found)


def run_that_owns(path: Path) -> Path | None:
    """Return the folder of the run whose manifest, record, lock or recorded output a file is, or None."""
    real = Path(os.path.realpath(path))
    for folder in list(real.parents)[:3]:
        if not (folder / MANIFEST_NAME).is_file():
            continue
        name = real.relative_to(folder).as_posix()
        outputs = _outputs(folder)
        is_run = (folder / RECORDS).is_dir() or any((folder / output).exists() for output in outputs)
        if is_run and (name in (MANIFEST_NAME, LOCK) or name.split("/")[0] in (RECORDS, RESUME) or name in outputs):
            return folder
    return None


def _at(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return what lies at the places of these patterns, dangling links too."""
    found = []
    for pattern in patterns:
        below, _, name = pattern.rpartition("/")
        try:
            there = sorted((folder / below).iterdir())
        except OSError:
            continue
        found += [path for path in there if fnmatch.fnmatchcase(path.name, name)]
    return found


def _claimed(folder: Path) -> frozenset[str] | None:
    """Return the places that are claimed, or None in a folder of an earlier version, where all that stages write is ours."""
    try:
        names = json.loads(read_text(folder / _CLAIMED))
        return frozenset(n for n in names if isinstance(n, str)) if isinstance(names, list) else frozenset()
    except FileNotFoundError:
        return None if (folder / RECORDS).is_dir() else frozenset()
    except (OSError, ValueError, RecursionError):
        return None  # damaged


def _outputs(folder: Path) -> frozenset[str]:
    """Return the outputs that the records and the manifest of a folder name."""
    texts = [folder / MANIFEST_NAME]
    with contextlib.suppress(OSError):
        texts += [p for p in (folder / RECORDS).iterdir() if p.suffix == ".json" and not p.name.startswith(".")]
    return frozenset(name for text in texts for name in _named(text))


def _named(text: Path) -> Iterator[str]:
    try:
        document = json.loads(read_text(text))
    except (OSError, ValueError, RecursionError):
        return
    stages = document.get("stages", [document]) if isinstance(document, dict) else ()
    for stage in stages if isinstance(stages, list) else ():
        outputs = stage.get("outputs") if isinstance(stage, dict) else None
        for output in outputs if isinstance(outputs, list) else ():
            if isinstance(output, dict) and isinstance(output.get("path"), str):
                yield output["path"]


def _is_manifest(folder: Path) -> bool:
    try:
        load_manifest(folder)
    except BadInput:
        return False
    return True
