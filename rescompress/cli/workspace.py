"""What the commands for one stage share: the workspace, running stages with progress, and copying a result out."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompress.cli.output import Output

if TYPE_CHECKING:
    from rescompress.core.manifest import Manifest, StageResult
    from rescompress.pipeline import Peers, RunReport
    from rescompress.settings import Settings
    from rescompress.stage import Opening, Stage

WORKSPACE = Path("rescompress-out")


def settings(
    data: str | None,
    *,
    labels: str | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    skip_corrupt: bool = False,
) -> Settings:
    """Return the settings that options stand for.

    Raises:
        BadInput: The labels cannot be read, or there is no such device.
    """
    from compress.data.sources import is_name
    from rescompress.labels import parse_labels
    from rescompress.settings import Settings

    if data is not None and not is_name(data):
        data = str(Path(data).expanduser().resolve())
    return Settings(data, parse_labels(labels), seed, device, threads, batch_size, skip_corrupt=skip_corrupt)


def stated(arch_option: Sequence[str] | None, code: str | None, like: str | None, trunk: str | None = None) -> tuple[str, ...]:
    """Return what the user states about a network as words of ``--arch-option``.

    Args:
        arch_option: Such words.
        code: ``FILE:CALLABLE``; the file's path becomes absolute.
        like: Name of a network.
        trunk: ``auto`` or tensors.
    """
    words = list(arch_option or ())
    if code is not None:
        file, colon, name = code.rpartition(":")
        words.append(f"code={Path(file).expanduser().resolve()}:{name}" if colon and file else f"code={code}")
    if like is not None:
        words.append(f"like={like}")
    if trunk is not None:
        words.append(f"trunk={trunk}")
    return tuple(words)


def opening(
    path: Path,
    *,
    input_shape: str | None = None,
    preprocess: str | None = None,
    arch_options: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Opening:
    """Return the checkpoint file, fetched where `path` is a name, and what the user states about it.

    Raises:
        BadInput: The shape, the preprocessing or an option is malformed, unknown or impossible.
        EnvironmentFailed: A named network is not in the cache, and there is no connection.
    """
    from compress.checkpoints.options import parse, parse_shape
    from compress.preprocessing import Statement
    from rescompress.stage import Opening

    parse(arch_options)  # what is wrong with them is said before any work
    shape = parse_shape(input_shape) if input_shape else None
    stated = str(Statement.parse(preprocess)) if preprocess is not None else None
    return Opening(path, shape, stated, tuple(arch_options), allow_pickle).fetched()


def peers() -> Peers | None:
    """Return the processes that ``torchrun`` or ``accelerate launch`` started together with this one, if any."""
    wanted = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch("[1-9][0-9]{0,5}", wanted):
        from rescompress.core.errors import BadInput

        remedy = "torchrun and accelerate set it; otherwise unset it"
        raise BadInput(f"is no number of processes: '{wanted}'", where="WORLD_SIZE", remedy=remedy)
    if int(wanted) < 2:
        return None
    from compress.processes import TorchPeers

    return TorchPeers()


def run_here(stages: Sequence[Stage], output: Output) -> tuple[RunReport, bool]:
    """Run stages in the workspace; return the report, and whether this process is the one that prints.

    Args:
        stages: In order.
        output: Where words go.

    Raises:
        BadInput: A stage would replace a file that it reads by what it makes of it, so that the command could not be repeated.
    """
    from rescompress.cli.progress import reporting
    from rescompress.pipeline import run_stages

    folder = WORKSPACE
    together = peers()
    if together is not None and not together.is_main:
        output.verbosity = -1
    with reporting(output) as reporter:
        report = run_stages(stages, folder, {}, reporter=reporter, peers=together, workspace=True)
    return report, together is None or together.is_main


def tell_workspace(read: Path, output: Output) -> None:
    """Say that it is the workspace that is read where runs of their own lie below it."""
    from rescompress.core.manifest import MANIFEST_NAME, runs_below

    if (read / MANIFEST_NAME).is_file() and (below := runs_below(read)):
        output.hint(f"note: {read} is the workspace of the single commands; runs below it: {', '.join(map(str, below))}")


def final(manifest: Manifest, stage: str) -> StageResult:
    """Return the stage's result."""
    result = manifest.stage(stage)
    assert result is not None, stage
    return result


def file_of(result: StageResult, kind: str, folder: Path = WORKSPACE) -> Path:
    """Return the path of the stage's file of that kind."""
    artifact = result.output(kind)
    assert artifact is not None, (result.stage, kind)
    return folder / artifact.path


def deliver(source: Path, wanted: Path | None) -> Path:
    """Copy a result and its mode to where the user wants it, whole or not at all; return where it is."""
    if wanted is None:
        return source
    from rescompress.core.artifact import atomic_path

    with atomic_path(wanted) as temporary:
        shutil.copy(source, temporary)
    return wanted


def trade_off(manifest: Manifest, last: str) -> Any:
    """Return the trade-off table of a stage and of the stages that its network went through."""
    from rescompress.report.tables import rows_of, to_rich

    names = manifest.lineage(last)
    chosen = manifest.model_copy(update={"stages": tuple(s for s in manifest.stages if s.stage in names)})
    return to_rich(rows_of(chosen))
