"""`RunConfig`: the settings of a run, read from YAML with an error that names the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from compress.data.sources import is_name
from rescompress.core import strict_yaml
from rescompress.core.described import wrong_value
from rescompress.core.errors import BadInput, ConfigError, nearest, shown
from rescompress.core.settings import MOST_TARGETS, Batch, PruneSettings, QuantizeSettings, Section, TrainSettings
from rescompress.runs.search_settings import SearchConfig


class RunConfig(Section):
    """A run: what goes in, the stages, what comes out.

    Attributes:
        checkpoint: The dense network; relative to the config file.
        data: Data as in ``--data``; a path is relative to the config file.
        seed: Of everything random.
        prune: Pruning, or null.
        finetune: Fine-tuning, or null.
        quantize: Quantization, or null.
        targets: Edge targets to build for, and to measure or predict on.
        batch: Images per call of the exported network; ``dynamic`` leaves it open.
        labels: Label of the checkpoint for each class folder of the data.
        input: Input shape CxHxW, where the checkpoint leaves it open.
        preprocess: Preprocessing as with ``--preprocess``, or a mapping with the same keys, where the checkpoint leaves it
            open; kept as a text.
        arch_options: What else it leaves open, as with ``--arch-option``.
        skip_corrupt: Whether images that cannot be read are left out, with a note; each is decoded once more to know.
        allow_pickle: Whether code stored in the checkpoint may run.
        search: What `search` varies and how; other commands leave it aside.
    """

    checkpoint: str
    data: str
    seed: int = Field(0, ge=0, lt=2**32)
    prune: PruneSettings | None = None
    finetune: TrainSettings | None = None
    quantize: QuantizeSettings | None = None
    targets: tuple[str, ...] = Field(("cpu",), max_length=MOST_TARGETS)
    batch: Batch = 1
    labels: dict[str, str] | None = None
    input: str | None = None
    preprocess: str | None = None
    arch_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    skip_corrupt: bool = False
    allow_pickle: bool = False
    search: SearchConfig | None = None

    @field_validator("preprocess", mode="before")
    @classmethod
    def _one_text(cls, said: object) -> object:
        if not isinstance(said, str | dict):
            return said
        from compress.preprocessing import Statement

        try:
            return str(Statement.parse(said, "preprocess"))
        except BadInput as e:
            raise ValueError(f"{e.what} ({e.remedy})") from e

    @property
    def arch_words(self) -> tuple[str, ...]:
        """The architecture options as ``key=value``; YAML takes yes and no for truth values."""
        said = {True: "yes", False: "no"}
        return tuple(f"{k}={said[v] if isinstance(v, bool) else v}" for k, v in self.arch_options.items())


_TEXTS = ("labels",)
"""Settings that hold names of people's folders and classes: text as it is written."""


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Return the config at `path` with overrides applied; paths in it become absolute.

    Args:
        path: A YAML file.
        overrides: Assignments such as ``prune.macs=0.3``; values are YAML.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (the nearest is named), or a value is impossible.
    """
    document = strict_yaml.load(
        path, missing="write one with `rescompress init`", remedy="compare it with `rescompress init`", texts=_TEXTS
    )
    if not isinstance(document, dict):
        raise ConfigError("is no mapping of settings", where=str(path), remedy="write one with `rescompress init`")
    for override in overrides:
        _override(document, override)
    config = validate(document, str(path))
    base = path.parent
    changed: dict[str, Any] = {"checkpoint": _network(config.checkpoint, base)}
    if not is_name(config.data):
        changed["data"] = _absolute(config.data, base)
    code = config.arch_options.get("code")
    if isinstance(code, str) and ":" in code:
        file, _, name = code.rpartition(":")
        changed["arch_options"] = {**config.arch_options, "code": f"{_absolute(file, base)}:{name}"}
    if config.prune is not None and config.prune.plan is not None:
        changed["prune"] = config.prune.model_copy(update={"plan": _absolute(config.prune.plan, base)})
    for name in ("finetune", "quantize"):
        training = getattr(config, name)
        if training is not None and training.teacher not in (None, "none", "dense"):
            changed[name] = training.model_copy(update={"teacher": _network(training.teacher, base)})
    return config.model_copy(update=changed)


def _absolute(text: str, base: Path) -> str:
    if "\0" in text:
        raise ConfigError(f"{shown(text)} is no name of a file: it holds a NUL", where="config", remedy="correct the path")
    path = Path(text).expanduser()
    return str(path if path.is_absolute() else (base / path).resolve())


def _network(text: str, base: Path) -> str:
    """Return the path of a checkpoint, or its name where there is no such file."""
    from compress.checkpoints.named import is_name

    path = _absolute(text, base)
    return text if is_name(text) and not Path(path).exists() else path


def _override(document: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{assignment}' is no assignment", where="--set", remedy="write it like prune.macs=0.3")
    place = document
    *folders, leaf = key.split(".")
    for folder in folders:
        inner = place.get(folder)
        if inner is None:
            inner = place[folder] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"'{folder}' holds no settings", where=f"--set {key}", remedy="compare with the config")
        place = inner
    try:
        value = strict_yaml.parse(text, texts=None if key.split(".")[0] in _TEXTS else ())
        place[leaf] = strict_yaml.parse(text) if key in _TEXTS and isinstance(value, str) else value
    except strict_yaml.StrictYamlError as e:
        raise ConfigError(
            f"{shown(text)} is no YAML value here: {e}", where=f"--set {shown(key)[1:-1]}", remedy="quote it"
        ) from e


def validate(document: dict[str, Any], where: str) -> RunConfig:
    """Return the validated config.

    Args:
        document: The settings.
        where: For the error.

    Raises:
        ConfigError: The first thing that is wrong, with its place and the nearest key.
    """
    try:
        return RunConfig.model_validate(document)
    except ValidationError as e:
        error = e.errors()[0]
        place = [str(p) for p in error["loc"]]
        key = ".".join(place)
        if error["type"] == "extra_forbidden":
            known = _keys(place[:-1])
            raise ConfigError(f"unknown key '{key}'", where=where, remedy=nearest(place[-1], known)) from e
        if error["type"] == "missing":
            raise ConfigError(f"'{key}' is missing", where=where, remedy=f"add a line '{key}: ...'") from e
        key, message = wrong_value(RunConfig, e)
        raise ConfigError(f"{key}: {message}" if key else message, where=where, remedy="correct the value") from e


def _keys(place: list[str]) -> list[str]:
    """Return the keys that are known at a place in the config."""
    model: type[BaseModel] = RunConfig
    for name in place:
        annotation = model.model_fields[name].annotation
        inner = [t for t in get_args(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = inner[0]
    return list(model.model_fields)
