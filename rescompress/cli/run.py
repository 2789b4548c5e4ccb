"""``run`` and ``init``: the whole pipeline from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import output_of

app = typer.Typer()


@app.command()
def run(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of the run.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run.", show_default="rescompress-out/<config>"),
    ] = None,
    overrides: opt.Overrides = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.", show_default="the config's")
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            "--track", metavar="KIND:ADDRESS", help="Record the run: mlflow:URI, tensorboard:FOLDER.", show_default=False
        ),
    ] = None,
    again: Annotated[
        list[str] | None,
        typer.Option("--again", metavar="STAGE", help="Compute a stage again that is done; repeatable.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in the folder that rescompress did not write.", show_default=False)
    ] = False,
) -> None:
    """Take a checkpoint through every stage of a config; run it again to go on where it stopped.

    Example: rescompress run examples/quickstart.yaml --set prune.macs=0.3
    """
    import json

    from compress.data.sources import is_name
    from rescompress.cli.progress import reporting
    from rescompress.core.manifest import json_of
    from rescompress.runs.config import load_config
    from rescompress.runs.pipeline import folder_of, run_stages
    from rescompress.runs.plan import run_plan
    from rescompress.runs.settings import Settings
    from rescompress.show.figures.tables import rows_of, to_document, to_markdown, to_rich

    out = output_of(ctx)
    loaded = load_config(config, tuple(overrides or ()))
    if seed is not None:
        loaded = loaded.model_copy(update={"seed": seed})
    folder = output or folder_of(config, workspace.WORKSPACE)
    settings = Settings(loaded.data, loaded.labels, loaded.seed, device, threads, batch_size, skip_corrupt=loaded.skip_corrupt)
    if track is not None:
        from rescompress.show.track import check

        check(track)
    stages = run_plan(loaded, settings)
    together = workspace.peers()
    if together is not None and not together.is_main:
        out.verbosity = -1
    with reporting(out) as reporter:
        report = run_stages(
            stages,
            folder,
            loaded.model_dump(mode="json"),
            reporter=reporter,
            peers=together,
            config_file=config,
            reads=[] if is_name(loaded.data) else [Path(loaded.data)],
            force=force,
            again=again or (),
        )
    if together is not None and not together.is_main:
        return
    rows = rows_of(report.manifest)
    if report.ran:
        from rescompress.core.artifact import write_text
        from rescompress.runs.claims import TABLE

        write_text(folder / TABLE, to_markdown(rows), follow=False)
    else:
        out.hint(f"nothing to do: all {len(report.reused)} stages are up to date")
    if track is not None:
        from rescompress.show.track import log

        out.hint(f"recorded: {log(track, folder)}")
    document = {
        "folder": str(folder),
        "manifest": str(folder / "manifest.json"),
        "ran": list(report.ran),
        "reused": list(report.reused),
        "stages": [json.loads(json_of(s)) for s in report.manifest.stages],
        "rows": to_document(rows),
    }
    out.result(document, to_rich(rows, title=str(folder)))
    if not report.manifest.unfinished:
        from rescompress.show.report.closing import closing_lines

        for line in closing_lines(report.manifest, folder, example=loaded.data.startswith("builtin:")):
            out.hint(line)


@app.command()
@with_options
def init(
    ctx: typer.Context,
    stated: Annotated[opt.Stated, Options()],
    checkpoint: Annotated[Path | None, typer.Argument(metavar="[CKPT]", help="Checkpoint file.", show_default=False)] = None,
    target: opt.Target = None,
    data: opt.Data = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Config to write.")] = Path("rescompress.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.", show_default=False)] = False,
) -> None:
    """Write a commented config for a checkpoint.

    Example: rescompress init resnet50.pt --data photos/ --target jetson
    """
    from rescompress.core.artifact import write_text
    from rescompress.core.errors import BadInput
    from rescompress.runs.claims import check_outputs
    from rescompress.runs.starter import starter_config

    out = output_of(ctx)
    check_outputs({"--output": output}, [checkpoint] if checkpoint is not None else [])
    if output.exists() and not force:
        raise BadInput("is there already", where=str(output), remedy="choose another -o, or --force")
    opening = None
    if checkpoint is not None:
        opening = stated.opening(checkpoint)
    text = starter_config(opening, data, target, output.parent, tell=lambda text: out.hint(f"note: {text}"))
    write_text(output, text)
    out.result({"output": str(output), "config": text}, f"{output} is written; next: rescompress run {output}")
