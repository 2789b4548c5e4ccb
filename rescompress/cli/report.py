"""`rescompress report`: a page to look at, and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.output import output_of

app = typer.Typer()


@app.command()
def report(
    ctx: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs; several are compared.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
    history: Annotated[bool, typer.Option("--history", help="All runs below the folders, oldest first, with trends.")] = False,
    model_card: Annotated[
        Path | None,
        typer.Option("--model-card", metavar="FILE", help="Also write a model card, such as README.md.", show_default=False),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            "--track", metavar="KIND:ADDRESS", help="Record the runs: mlflow:URI, tensorboard:FOLDER.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files of other origin.", show_default=False)] = False,
    show: opt.Open = False,
) -> None:
    """Write one self-contained HTML page: trade-off, charts, widths, the graph before and after, time per layer, the manifest.

    Example: rescompress report rescompress-out/quickstart -o report.html --model-card README.md
    """
    from rescompress.core.artifact import write_text
    from rescompress.runs import claims
    from rescompress.show.report import history as past
    from rescompress.show.report.before_after import networks_of
    from rescompress.show.report.html import page

    output = output_of(ctx)
    claims.check_outputs({"--output": out, "--model-card": model_card})
    claims.check_foreign(out, claims.PAGE, "--output", force=force)
    claims.check_foreign(model_card, claims.CARD, "--model-card", force=force)
    if track is not None:
        from rescompress.show.track import check

        check(track)
    loaded = past.history(runs) if history else past.load_runs(runs)
    if not history:
        for path in runs:
            workspace.tell_workspace(path, output)
    text = page(loaded, history=history, networks=None if history else networks_of(loaded[-1][1], folder_of(runs[-1])))
    write_text(out, text)
    document: dict[str, Any] = {"report": str(out), "size_bytes": len(text.encode()), "runs": [name for name, _ in loaded]}
    if model_card is not None:
        from rescompress.show.report.card import model_card as card

        write_text(model_card, card(*loaded[-1]))
        document["model_card"] = str(model_card)
    if track is not None:
        from rescompress.show.track import log

        folders = past.find_all(runs) if history else [folder_of(path) for path in runs]
        document["tracked"] = [log(track, folder) for folder in folders]
        for text in document["tracked"]:
            output.hint(f"recorded: {text}")
    output.result(document, *[str(document[k]) for k in ("report", "model_card") if k in document])
    if show and not opened(out):
        output.hint(f"no display here: open {out} in a browser")


def folder_of(run: Path) -> Path:
    """Return the folder of a run that is named by its folder or by its manifest."""
    return run if run.is_dir() else run.parent


def opened(page: Path) -> bool:
    """Open a page in the browser of the desktop; return whether there was one."""
    import os
    import sys
    import webbrowser

    if sys.platform not in ("win32", "darwin") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # a text browser would take the terminal
    try:
        return webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        return False
