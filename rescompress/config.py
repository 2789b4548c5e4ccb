"""`RunConfig`: the settings of a run, read from YAML with an error that names the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from rescompress import strict_yaml
from rescompress.core.choices import Calibration, Mode, ProfileOrAuto, Scope, TrainPrecision
from rescompress.core.errors import BadInput, ConfigError, nearest, shown
from rescompress.core.spec import Frozen
from rescompress.search.settings import SearchConfig

Align = Literal["auto"] | Annotated[int, Field(ge=1)]


class _Section(Frozen):
    """What people write: its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class PruneConfig(_Section):
    """Structured pruning; at most one budget, half of the MACs by default.

    Attributes:
        method: See ``rescompress methods``.
        ratio: Fraction of the channels of every group to remove.
        macs: Fraction of the dense MACs that may remain.
        params: Fraction of the dense parameters that may remain.
        latency: Fraction of the dense predicted latency, on the first target with a prediction, that may remain.
        scope: ``inner`` (inside blocks) or ``all`` (the residual stream, too).
        align: Widths are multiples of this; ``auto`` takes the targets' multiple, 8 without one, and less for small groups.
        calib: Images to calibrate with, from the training split.
        drop_blocks: Whether whole blocks may go; by default where the budget is latency.
        iterations: Steps in which the budget is reached, each followed by its share of the fine-tuning.
        recalibrate: Whether BatchNorm statistics are measured again at the end; by default where nothing was repaired.
        repair: Whether the method makes up for what it removed; long fine-tuning may end higher without.
        sparsity: ``2:4`` also makes two of every four input channels of a weight zero, for sparse tensor cores.
        plan: A plan file to follow instead of searching, relative to the config file; what it says is not to be said again.
    """

    method: str = "reconstruct"
    ratio: float | None = Field(None, gt=0.0, lt=1.0)
    macs: float | None = Field(None, gt=0.0, le=1.0)
    params: float | None = Field(None, gt=0.0, le=1.0)
    latency: float | None = Field(None, gt=0.0, le=1.0)
    scope: Scope = "inner"
    align: Align = "auto"
    calib: int = Field(512, ge=1)
    drop_blocks: bool | None = None
    iterations: int = Field(1, ge=1, le=100)
    recalibrate: bool | None = None
    repair: bool = True
    sparsity: Literal["2:4"] | None = None
    plan: str | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("ratio", "macs", "params", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets, give one of them")
        said = ("ratio", "macs", "params", "latency", "method", "scope", "align", "drop_blocks", "iterations")
        again = sorted(self.model_fields_set.intersection(said), key=said.index)
        if self.plan is not None and again:
            raise ValueError(f"a plan says what goes: leave out {' and '.join(again)}")
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """Kind and value of the budget."""
        for name in ("ratio", "macs", "params", "latency"):
            value = getattr(self, name)
            if value is not None:
                return name, float(value)
        return "macs", 0.5

    @property
    def may_drop(self) -> bool:
        """Whether whole blocks may go: as said, else where the budget is latency."""
        return self.drop_blocks if self.drop_blocks is not None else self.budget[0] == "latency"

    def step(self, number: int) -> PruneConfig:
        """Return the settings of one of the iterations: what is left shrinks by the same factor in each.

        Args:
            number: From 1 to `iterations`.
        """
        kind, value = self.budget
        if number == self.iterations:
            return self
        share = number / self.iterations
        some = 1.0 - (1.0 - value) ** share if kind == "ratio" else value**share
        return self.model_copy(update={kind: some, "sparsity": None})


class FinetuneConfig(_Section):
    """Training of the pruned network.

    Attributes:
        epochs: Passes over the training split.
        teacher: ``dense`` (the network before pruning), a checkpoint file (relative to the config file), or null for
            labels alone.
        lr: Peak learning rate.
        batch_size: Images per step.
        distill: Weight of the teacher's loss.
        temperature: Of the teacher's softmax.
        features: Weight of the distance between the outputs of the blocks and the teacher's, beside the other losses.
        precision: ``fp32``, or ``bf16`` (autocast), which is faster on processors with bfloat16 units.
    """

    epochs: float = Field(2.0, gt=0.0)
    teacher: str | None = "dense"
    lr: float = Field(0.02, gt=0.0)
    batch_size: int = Field(128, ge=2)
    distill: float = Field(0.9, ge=0.0, le=1.0)
    temperature: float = Field(4.0, gt=0.0)
    features: float = Field(0.0, ge=0.0)
    precision: TrainPrecision = "fp32"


class QuantizeConfig(_Section):
    """INT8 quantization.

    Attributes:
        mode: ``ptq`` (calibration only) or ``qat`` (calibration, then training).
        epochs: Passes over the training split for ``qat``.
        profile: Quantizer placement; ``auto`` takes the first target's, or ``tensorrt`` where any target runs TensorRT.
        calib: Images to calibrate with, from the training split.
        calibration: How activation ranges are estimated; ``auto`` takes what is nearest to the float network on training
            images.
        percentile: For ``percentile``, in percent.
        bias_correction: Whether biases make good what rounding does to each channel's mean.
        keep_float: Layers to leave in floating point: names, how many of the most sensitive, or ``auto``.
        max_divergence: Accuracy budget of ``keep_float: auto``: how far the predictions may be from the float network's,
            in nats.
        max_slowdown: Latency budget of ``keep_float: auto``: the predicted latency on the first target, at most so many
            times that of the all-INT8 network.
        learnable_scales: Whether ``qat`` trains the scales too.
        freeze_bn_after: Part of the steps of ``qat`` after which BatchNorm keeps its statistics. 0 trains the very network
            that will run; statistics of augmented batches are noise in a short training (decision 36).
        hold_out: Part of the training images that ``qat`` does not see and that choose between it and ``ptq``; 0 keeps
            what was trained.
        lr: Peak learning rate of ``qat``.
        batch_size: Images per step of ``qat``.
        teacher: As in `FinetuneConfig`.
    """

    mode: Mode = "qat"
    epochs: float = Field(1.0, gt=0.0)
    profile: ProfileOrAuto = "auto"
    calib: int = Field(512, ge=2)
    calibration: Calibration = "auto"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    bias_correction: bool = True
    keep_float: Annotated[int, Field(ge=0, strict=True)] | Literal["auto"] | tuple[str, ...] = ()
    max_divergence: float | None = Field(None, gt=0.0)
    max_slowdown: float | None = Field(None, ge=1.0)
    learnable_scales: bool = False
    freeze_bn_after: float = Field(0.0, ge=0.0, le=1.0)
    hold_out: float = Field(0.02, ge=0.0, le=0.5)
    lr: float = Field(0.002, gt=0.0)
    batch_size: int = Field(128, ge=2)
    teacher: str | None = "dense"

    @model_validator(mode="after")
    def _budget_of_auto(self) -> Self:
        if self.keep_float != "auto" and (self.max_divergence is not None or self.max_slowdown is not None):
            raise ValueError("max_divergence and max_slowdown are budgets of keep_float: auto")
        return self


class RunConfig(_Section):
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
        allow_pickle: Whether code stored in the checkpoint may run.
        search: What `search` varies and how; other commands leave it aside.
    """

    checkpoint: str
    data: str
    seed: int = Field(0, ge=0, lt=2**32)
    prune: PruneConfig | None = None
    finetune: FinetuneConfig | None = None
    quantize: QuantizeConfig | None = None
    targets: tuple[str, ...] = ("cpu",)
    batch: Literal["dynamic"] | Annotated[int, Field(ge=1)] = 1
    labels: dict[str, str] | None = None
    input: str | None = None
    preprocess: str | None = None
    arch_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
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
    changed: dict[str, Any] = {"checkpoint": _absolute(config.checkpoint, base)}
    if not config.data.startswith("builtin:"):
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
            changed[name] = training.model_copy(update={"teacher": _absolute(training.teacher, base)})
    return config.model_copy(update=changed)


def _absolute(text: str, base: Path) -> str:
    if "\0" in text:
        raise ConfigError(f"{shown(text)} is no name of a file: it holds a NUL", where="config", remedy="correct the path")
    path = Path(text).expanduser()
    return str(path if path.is_absolute() else (base / path).resolve())


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
        message = said(error)
        raise ConfigError(f"{key}: {message}" if key else message, where=where, remedy="mend the value") from e


def said(error: ErrorDetails) -> str:
    """Return what is wrong with a setting, and what was given where it is one value."""
    given = "" if isinstance(error["input"], dict) else f" (given: {shown(error['input'])})"
    return error["msg"].removeprefix("Value error, ") + given


def _keys(place: list[str]) -> list[str]:
    """Return the keys that are known at a place in the config."""
    model: type[BaseModel] = RunConfig
    for name in place:
        annotation = model.model_fields[name].annotation
        inner = [t for t in get_args(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = inner[0]
    return list(model.model_fields)
