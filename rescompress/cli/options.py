"""Options that several commands share, as annotated types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rescompress.core.choices import beginning

if TYPE_CHECKING:
    from rescompress.runs.settings import Settings
    from rescompress.runs.stage import Opening

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="Checkpoint file or name (timm/resnet50.a1_in1k).", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", metavar="DATA", help="Image folder, .npz, shards, hf:NAME or builtin:digits.", show_default=False
    ),
]


def _target_names() -> list[str]:
    from edge_targets.catalog import target_names

    return target_names()


def _network_names() -> list[str]:
    from compress.zoo import names

    return names()


def _preprocessing_names() -> tuple[str, ...]:
    from compress.zoo import PREPROCESSING_NAMES

    return PREPROCESSING_NAMES


targets = beginning(_target_names)
splits = beginning(lambda: ("val", "train"))


WITHOUT_DATA = "magnitude"
"""The pruning method where none is named and there are no images, which all that repair their loss take."""


_TARGET = typer.Option(
    "--target", "-t", help="Edge target (`rescompress targets`).", show_default=False, autocompletion=targets
)
Target = Annotated[str | None, _TARGET]
Targets = Annotated[list[str] | None, _TARGET]
OutFile = Annotated[Path | None, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.", rich_help_panel="Computation"),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where torch computes: auto, cpu, cuda, cuda:1, mps.",
        rich_help_panel="Computation",
        autocompletion=beginning(lambda: ("auto", "cpu", "cuda", "mps")),
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores", rich_help_panel="Computation")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images per call when evaluating.",
        show_default="by image size",
        rich_help_panel="Computation",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input", help="Input shape CxHxW, such as 3x224x224.", show_default=False, rich_help_panel="Checkpoint and data"
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Run code stored in the file. Only if you trust it.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="Label for each class folder: folder=label,... or a YAML file.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="STATEMENT",
        help="A name (`rescompress formats`), or mean=0.5,0.5,0.5,std=0.25,...,resize=256; else as assumed.",
        show_default=False,
        autocompletion=beginning(_preprocessing_names),
        rich_help_panel="Checkpoint and data",
    ),
]
ArchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arch-option",
        metavar="NAME=VALUE",
        help="A fact the file leaves open (`rescompress formats`); repeatable.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
SkipCorrupt = Annotated[
    bool,
    typer.Option(
        "--skip-corrupt",
        help="Leave out images that cannot be read, and say which.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.", show_default=False),
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in a browser, where there is a display.", show_default=False)]
Code = Annotated[
    str | None,
    typer.Option(
        "--code",
        metavar="FILE:CALLABLE",
        help="Python file, run here, and what in it makes the network of a state_dict.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="NAME",
        help="Known network whose tensors the file holds under other names (`rescompress formats`).",
        show_default=False,
        autocompletion=beginning(_network_names),
        rich_help_panel="Checkpoint and data",
    ),
]
Trunk = Annotated[
    str | None,
    typer.Option(
        "--trunk",
        metavar="auto|TENSOR,...",
        help="Take the known part of a larger program, up to these tensors; the rest stays as it is.",
        show_default=False,
        rich_help_panel="Checkpoint and data",
    ),
]
NeededData = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="DATA", help="Image folder, .npz, shards, hf:NAME or builtin:digits.", show_default=False
    ),
]


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a user may state about a checkpoint file; `rescompress.cli.from_settings.with_options` makes it of its fields."""

    input_shape: InputShape = None
    preprocess: Preprocess = None
    arch_option: ArchOption = None
    code: Code = None
    like: Like = None
    trunk: Trunk = None
    allow_pickle: AllowPickle = False

    def opening(self, path: Path) -> Opening:
        """Return the checkpoint file, fetched where `path` is a name, and what is stated about it.

        Raises:
            BadInput: The shape, the preprocessing or an option is malformed, unknown or impossible.
            EnvironmentFailed: A named network is not in the cache, and there is no connection.
        """
        from compress.checkpoints.options import parse, parse_shape
        from compress.preprocessing import Statement
        from rescompress.runs.stage import Opening

        parse(words := self._words())  # what is wrong with them is said before any work
        shape = parse_shape(self.input_shape) if self.input_shape else None
        preprocess = str(Statement.parse(self.preprocess)) if self.preprocess is not None else None
        return Opening(path, shape, preprocess, words, self.allow_pickle).fetched()

    def _words(self) -> tuple[str, ...]:
        """Return all of it as words of ``--arch-option``; the path of a file of code becomes absolute."""
        words = list(self.arch_option or ())
        if self.code is not None:
            file, colon, name = self.code.rpartition(":")
            words.append(f"code={Path(file).expanduser().resolve()}:{name}" if colon and file else f"code={self.code}")
        if self.like is not None:
            words.append(f"like={self.like}")
        if self.trunk is not None:
            words.append(f"trunk={self.trunk}")
        return tuple(words)


@dataclass(frozen=True, kw_only=True)
class Common:
    """How data is read and where is computed: what the commands for one stage share."""

    labels: Labels = None
    skip_corrupt: SkipCorrupt = False
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = None
    batch_size: BatchSize = None

    def settings(self, data: str | None) -> Settings:
        """Return them with the data as settings of a run.

        Raises:
            BadInput: The labels cannot be read, or there is no such device.
        """
        from compress.data.sources import is_name
        from rescompress.core.labels import parse_labels
        from rescompress.runs.settings import Settings

        if data is not None and not is_name(data):
            data = str(Path(data).expanduser().resolve())
        labels = parse_labels(self.labels)
        return Settings(data, labels, self.seed, self.device, self.threads, self.batch_size, skip_corrupt=self.skip_corrupt)
