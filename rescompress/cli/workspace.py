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
    from rescompress.runs.pipeline import Peers, RunReport
    from rescompress.runs.stage import Stage

WORKSPACE = Path("rescompress-out")


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
    from rescompress.runs.pipeline import run_stages

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


def teacher_file(said: str | None, checkpoint: Path) -> Path | None:
    """Return the file of a teacher that was typed, None without one.

    ``dense`` is the network that `checkpoint` was made from, as the workspace holds it: with all that was stated about it when
    it was read, so that it takes neither its code nor its input again.

    Args:
        said: A path, ``dense`` or ``none``.
        checkpoint: The network that is to be taught.

    Raises:
        BadInput: The workspace does not know which network `checkpoint` was made from.
    """
    from rescompress.core.artifact import file_sha256
    from rescompress.core.errors import BadInput
    from rescompress.core.manifest import MANIFEST_NAME, load_manifest

    if said is None or said == "none":
        return None
    if said != "dense" or Path(said).exists():
        return Path(said)
    dense = None
    if checkpoint.is_file() and (WORKSPACE / MANIFEST_NAME).is_file():
        manifest = load_manifest(WORKSPACE)
        before = manifest.ancestry(file_sha256(checkpoint))
        dense = next((s for s in manifest.stages if s.kind == "dense" and s.checkpoint_sha256 in before), None)
    if dense is None:
        raise BadInput(
            f"./{WORKSPACE} does not tell which network {checkpoint} was made from",
            where="--teacher dense",
            remedy="give the teacher's file",
        )
    return file_of(dense, "checkpoint")


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
    from rescompress.show.figures.tables import rows_of, to_rich

    names = manifest.lineage(last)
    chosen = manifest.model_copy(update={"stages": tuple(s for s in manifest.stages if s.stage in names)})
    return to_rich(rows_of(chosen))
