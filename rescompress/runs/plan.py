"""From settings to stages: the order of a run, and the one or two stages of each command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoints.options import parse_shape
from compress.checkpoints.path import states_int8
from edge_targets.backends import load_backend
from edge_targets.benchmark import check_threads, cpu_name
from edge_targets.board_probe import Probe
from edge_targets.catalog import load_target
from edge_targets.ssh import Board
from rescompress.core.errors import BadInput, TargetError
from rescompress.core.quantizers import Profile
from rescompress.core.settings import DeploySettings, ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs.config import RunConfig
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening, Source, Stage
from rescompress.runs.steps import Dense, Deploy, Export, Finetune, ForTarget, Machine, Prune, Quantize


@dataclass(frozen=True)
class Builder:
    """Builds stages that share settings and, for the first, a checkpoint file.

    Attributes:
        opening: The checkpoint that the first stage reads.
        settings: What all share.
    """

    opening: Opening
    settings: Settings

    def dense(self) -> Dense:
        """Return the stage that evaluates and counts the network as it came."""
        return Dense(source=Source.of(self.opening), common=self.settings)

    def prune(
        self,
        config: PruneSettings,
        targets: Sequence[str],
        source: str | Opening,
        *,
        iteration: int | None = None,
        before: str | None = None,
    ) -> Prune:
        """Return the pruning stage.

        Args:
            config: How.
            targets: What it is for.
            source: The network.
            iteration: Which of several, None for the last.
            before: The pruning stage before this one, where the network has been pruned in an earlier iteration; the
                budget and the plan are about the network of the stage ``dense`` then.
        """
        return Prune(
            source=Source.of(source),
            common=self.settings,
            settings=config,
            targets=tuple(map(load_target, targets)),
            iteration=iteration,
            before=Source.of(before) if before else None,
            whole=Source.of("dense") if before else None,
        )

    def finetune(
        self,
        config: TrainSettings,
        source: str | Opening,
        teacher: str | Opening | None,
        *,
        iteration: int | None = None,
    ) -> Finetune:
        """Return the fine-tuning stage."""
        return Finetune(
            source=Source.of(source),
            common=self.settings,
            settings=config,
            teacher=Source.of(teacher) if teacher is not None else None,
            iteration=iteration,
        )

    def prune_and_tune(self, prune: PruneSettings, tune: TrainSettings | None, targets: Sequence[str]) -> list[Stage]:
        """Return the stages that prune the network of the stage ``dense``, in iterations with fine-tuning between them.

        Args:
            prune: How; with more than one iteration, every step but the last is a stage of its own.
            tune: Fine-tuning; its epochs are shared evenly by the iterations.
            targets: What it is for.

        Raises:
            BadInput: Iterations without fine-tuning.
        """
        steps = prune.iterations
        if tune is None:
            if steps > 1:
                raise BadInput(
                    f"{steps} iterations need fine-tuning between them", where="iterations", remedy="say how many epochs"
                )
            return [self.prune(prune, targets, "dense")]
        share = tune.model_copy(update={"epochs": tune.epochs / steps})
        stages: list[Stage] = []
        last, before = "dense", None
        for number in range(1, steps + 1):
            iteration = number if number < steps else None
            cut = self.prune(prune.step(number), targets, last, iteration=iteration, before=before)
            tuned = self.finetune(share, cut.name, teacher_of(tune.teacher, self.opening), iteration=iteration)
            stages += [cut, tuned]
            last, before = tuned.name, cut.name
        return stages

    def quantize(
        self,
        config: QuantizeSettings,
        profile: Profile,
        source: str | Opening,
        teacher: str | Opening | None,
        *,
        targets: Sequence[str] = (),
    ) -> Quantize:
        """Return the quantization stage; the targets matter for a latency budget only.

        Raises:
            TargetError: A target does not run INT8.
        """
        check_int8(targets, "`quantize` makes an INT8 network")
        mentor = teacher if config.mode == "qat" else None
        return Quantize(
            source=Source.of(source),
            common=self.settings,
            settings=config,
            profile=profile,
            teacher=Source.of(mentor) if mentor is not None else None,
            targets=tuple(map(load_target, targets)) if config.max_slowdown is not None else (),
        )

    def export(self, source: str | Opening, settings: ExportSettings) -> Export:
        """Return the stage that writes and checks the ONNX file."""
        return Export(source=Source.of(source), common=self.settings, settings=settings)

    def target(self, name: str, source: str | Opening, settings: ExportSettings, *, require_engine: bool = False) -> ForTarget:
        """Return the stage of one edge target; a measurement belongs to a machine and a runtime, so its key names them."""
        chosen = load_target(name)
        if settings.precision != "auto":
            chosen.check_precision(settings.precision)
        runtime = None
        if chosen.builds_here:
            runtime = load_backend(chosen.runtime).available().version
            check_threads(self.settings.threads)  # not only after hours of training, where it measures
        return ForTarget(
            source=Source.of(source),
            common=self.settings,
            settings=settings.model_copy(update={"opset": settings.opset or chosen.opset}),
            target=chosen,
            machine=Machine(cpu_name(), self.settings.threads, runtime),
            require_engine=require_engine,
        )

    def deploy(
        self, settings: DeploySettings, board: Board, found: Probe, *, named: str | None = None, baseline: Opening | None = None
    ) -> Deploy:
        """Return the stage of a board.

        Args:
            settings: What is measured.
            board: How it is reached.
            found: What it says about itself.
            named: The target as the user names it; what the board says of itself counts.
            baseline: The same network in float32, beside a quantized ONNX file.

        Raises:
            BadInput: A file is not there.
        """
        chosen = load_target(found.device) if found.device else load_target(named or "jetson")
        return Deploy(
            source=Source.of(self.opening),
            common=self.settings,
            settings=settings,
            target=chosen.model_copy(update={"tensorrt_version": found.version}),
            board=board,
            found=found,
            named=load_target(named) if named else None,
            baseline=Source.of(baseline) if baseline is not None else None,
        )


def profile_for(config: QuantizeSettings, targets: Sequence[str]) -> Profile:
    """Return where quantizers go: what the config says, or what the targets run; a TensorRT target decides."""
    if config.profile != "auto":
        return config.profile
    profiles = [load_target(name).profile for name in targets]
    return "tensorrt" if "tensorrt" in profiles or not profiles else profiles[0]


def check_int8(targets: Sequence[str], why: str) -> None:
    """Make sure that targets run INT8: asked before anything is computed, not at their stages, hours later.

    Raises:
        TargetError: One does not; `why` says where INT8 comes from.
    """
    lacking = next((known for known in map(load_target, targets) if "int8" not in known.precisions), None)
    if lacking is not None:
        raise TargetError(
            f"{lacking.device.title} does not run int8, and {why}",
            where=f"target {lacking.alias or lacking.name}",
            remedy="leave out the one or the other",
        )


def _check_float(config: RunConfig, opening: Opening) -> None:
    """Make sure that a checkpoint that came quantized is given to nothing that takes floating point alone.

    Raises:
        BadInput: A stage, or a target, does not take it.
    """
    if not states_int8(opening.path):
        return
    stage = next((name for name in ("prune", "finetune", "quantize") if getattr(config, name) is not None), None)
    if stage is not None:
        raise BadInput(
            f"is quantized already, and '{stage}' is for a network in floating point",
            where=str(opening.path),
            remedy=f"give the float checkpoint that it was made from, or leave out {stage}",
        )
    check_int8(config.targets, f"{opening.path.name} is an INT8 network")


def run_plan(config: RunConfig, settings: Settings) -> list[Stage]:
    """Return the stages of a run.

    Raises:
        BadInput: The checkpoint or a target is not there, two stages would have one name, or a stage or a target does not
            take the network that it would be given.
    """
    opening = opening_of(config)
    _check_float(config, opening)
    builder = Builder(opening, settings)
    stages: list[Stage] = [builder.dense()]
    last = "dense"
    if config.prune is not None:
        stages += builder.prune_and_tune(config.prune, config.finetune, config.targets)
        last = stages[-1].name
    elif config.finetune is not None:
        stages.append(builder.finetune(config.finetune, last, teacher_of(config.finetune.teacher, opening)))
        last = "finetune"
    if config.quantize is not None:
        profile = profile_for(config.quantize, config.targets)
        stages.append(
            builder.quantize(
                config.quantize, profile, last, teacher_of(config.quantize.teacher, opening), targets=config.targets
            )
        )
        last = "quantize"
    file = ExportSettings(batch=config.batch)
    stages.append(builder.export(last, file))
    stages += [builder.target(name, last, file) for name in config.targets]
    names = [stage.name for stage in stages]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise BadInput(f"{twice} is asked for twice", where="targets", remedy="name each target once; 'jetson' is one of them")
    return stages


def opening_of(config: RunConfig) -> Opening:
    """Return the checkpoint file of a config and what it states about it."""
    shape = parse_shape(config.input) if config.input else None
    return Opening(Path(config.checkpoint), shape, config.preprocess, config.arch_words, config.allow_pickle).fetched()


def teacher_of(text: str | None, opening: Opening) -> str | Opening | None:
    """Return the teacher that a config names: the dense network, a file, or none.

    Args:
        text: What the config says.
        opening: The network's own; what is stated about it holds for the teacher's file, too.
    """
    if text is None or text == "none":
        return None
    return "dense" if text == "dense" else opening.of(Path(text))
