"""The commented config that ``rescompress init`` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from compress.data.sources import is_name
from edge_targets.catalog import load_target
from rescompress.core import strict_yaml
from rescompress.core.described import default_of, help_of, plain
from rescompress.core.settings import PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs.config import RunConfig
from rescompress.runs.stage import Opening

_LARGE_SIDE = 64
_LONGEST_COMMENT = 300


def starter_config(
    opening: Opening | None, data: str | None, target: str | None, folder: Path, *, tell: Callable[[str], None] | None = None
) -> str:
    """Return YAML for a checkpoint, with each setting explained.

    Args:
        opening: The network and what is stated about it; opened to see what it is. None leaves a blank.
        data: As in ``--data``.
        target: Edge target; cpu and jetson without one.
        folder: Where the config will stand; paths are written relative to it.
        tell: Called with each warning about the checkpoint.

    Raises:
        BadInput: The checkpoint or the target is not known.
    """
    about = "# Settings of a run; `rescompress run` this file, and again to go on after a stop.\n"
    epochs = 2
    if opening is not None:
        from rescompress.core.layers import total_macs, walk

        spec = opening.load(tell).spec
        shape = "x".join(str(n) for n in spec.input_shape)
        millions = f"{total_macs(walk(spec)) / 1e6:,.0f}"
        about += _comment(f"{spec.arch}: input {shape}, {millions} million MACs, {spec.preprocessing.name} preprocessing")
        epochs = 2 if spec.input_shape[1] <= _LARGE_SIDE else 5
    if target is not None:
        load_target(target)
    targets = target or "cpu, jetson"
    meant = f"; jetson: {load_target('jetson').name} off a board" if "jetson" in targets.split(", ") else ""
    network = opening.name or _path(str(opening.path), folder) if opening else "CHANGE-ME.pt   # the dense network"
    stated = _stated(opening, folder) if opening else ""
    images = _path(data, folder) if data else "CHANGE-ME      # folder with train/ and val/, .npz, or builtin:digits"
    return f"""{about}
checkpoint: {network}
{stated}data: {images}
seed: 0

{_section("prune", PruneSettings, macs=0.5, method=..., scope=..., align=..., calib=...)}
{_section("finetune", TrainSettings, epochs=epochs, teacher=...)}
{_section("quantize", QuantizeSettings, mode=..., epochs=..., profile=...)}
targets: [{targets}]    # rescompress targets lists all{meant}
batch: 1                # {plain(help_of(RunConfig)["batch"])}
"""


def _section(name: str, model: type[BaseModel], **values: object) -> str:
    """Return a section with some of its settings, each with its help; ``...`` stands for the default."""
    about = (model.__doc__ or "").partition("\n")[0]
    helps = help_of(model)
    lines = [f"# {about} null leaves the stage out.", f"{name}:"]
    for key, value in values.items():
        shown = json.dumps(default_of(model.model_fields[key]) if value is ... else value).strip('"')
        lines.append(f"  {key}: {shown}".ljust(24) + f"# {plain(helps[key])}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return a line of YAML that is a comment whatever the text holds: it may come from a stranger's file."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return f"# {shown[:_LONGEST_COMMENT]}\n"


def _stated(opening: Opening, folder: Path) -> str:
    """Return the lines that say what the user stated about the checkpoint; a file of code is named relative to the config."""
    lines = []
    if opening.input_shape is not None:
        lines.append("input: " + "x".join(map(str, opening.input_shape)))
    if opening.preprocess is not None:
        lines.append(f"preprocess: {json.dumps(opening.preprocess)}")
    if opening.arch_options:
        facts = dict(opening.facts)
        if "code" in facts:
            file, _, name = facts["code"].rpartition(":")
            facts["code"] = f"{os.path.relpath(file, folder)}:{name}"
        text = json.dumps(facts, ensure_ascii=False)
        lines.append("arch_options: " + (text if text.isprintable() else json.dumps(facts)))
    if opening.allow_pickle:
        lines.append("allow_pickle: true   # runs code stored in the file")
    return "".join(f"{line}\n" for line in lines)


def _path(path: str, folder: Path) -> str:
    """Return a path relative to the config, in quotes where YAML would read it as something else."""
    text = path if is_name(path) else os.path.relpath(path, folder)
    try:
        plain = strict_yaml.parse(f"at: {text}") == {"at": text}
    except strict_yaml.StrictYamlError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
