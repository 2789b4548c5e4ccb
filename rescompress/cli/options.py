"""Options that several commands share, as annotated types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint file.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", metavar="DATA", help="Image folder, .npz file, or builtin:digits.", show_default=False),
]
Target = Annotated[str | None, typer.Option("--target", "-t", help="Edge target (`rescompress targets`).", show_default=False)]
OutFile = Annotated[Path | None, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="Where torch computes: auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images per step.", show_default="by image size")]
InputShape = Annotated[str | None, typer.Option("--input", help="Input shape CxHxW, such as 3x224x224.", show_default=False)]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Run code stored in the file. Only if you trust it.", show_default=False),
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="Label for each class folder: folder=label,... or a YAML file.", show_default=False),
]
Preprocess = Annotated[
    str | None, typer.Option("--preprocess", help="Preprocessing by name, such as imagenet or cifar.", show_default=False)
]
ArchOption = Annotated[
    list[str] | None, typer.Option("--arch-option", help="What the file leaves open, as key=value.", show_default=False)
]
NeededData = Annotated[
    str,
    typer.Option("--data", "-d", metavar="DATA", help="Image folder, .npz file, or builtin:digits.", show_default=False),
]
