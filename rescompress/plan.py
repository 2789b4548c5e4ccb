"""From settings to stages: the order of a run, and the one or two stages of each command.

Nothing heavy is imported here; a stage's work is looked up in `rescompress.stages` when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from compress.checkpoints.options import parse_shape
from edge_targets.backends import load_backend
from edge_targets.benchmark import check_threads, cpu_name
from edge_targets.catalog import load_target
from rescompress.config import RunConfig
from rescompress.core.errors import BadInput
from rescompress.core.manifest import TARGET_PREFIX
from rescompress.core.quantizers import Profile
from rescompress.core.settings import ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.fingerprint import file_identity
from rescompress.settings import Settings
from rescompress.stage import Context, Opening, Outcome, Stage


def _identity(opening: Opening) -> dict[str, Any]:
    """Return what a checkpoint file contributes to a content key."""
    stated = asdict(opening)
    stated.pop("yields")  # follows from being a teacher
    del stated["path"]
    code = opening.facts.get("code")
    if code is not None:
        stated["code_sha256"] = file_identity(code.rpartition(":")[0])
    if opening.name is None:  # a named network is more than its file: what is published beside it counts
        del stated["name"]
    return stated | {"sha256": file_identity(str(opening.path))}


@dataclass(frozen=True)
class Builder:
    """Builds stages that share settings and, for the first, a checkpoint file.

    Attributes:
        opening: The checkpoint that the first stage reads.
        settings: What all share.
    """

    opening: Opening
    settings: Settings

    def _stage(
        self,
        name: str,
        function: str,
        arguments: Mapping[str, Any],
        depends: Mapping[str, Any],
        sources: Mapping[str, str | Opening | None],
        *,
        after: Sequence[str] = (),
        collective: bool = False,
        reads: Sequence[str | None] = (),
        writes: Sequence[str] | None = None,
    ) -> Stage:
        """Return a stage; `sources` are checkpoints by argument name: a stage's name, a file, or None (not for ``source``)."""
        identities = {k: _identity(v) for k, v in sources.items() if isinstance(v, Opening)}
        names = [v for v in sources.values() if isinstance(v, str)]
        settings = self.settings

        def run(context: Context) -> Outcome:
            stages = importlib.import_module("rescompress.stages")
            resolved = {k: _source(stages, v, identities.get(k, {}).get("sha256")) for k, v in sources.items()}
            return cast(Outcome, getattr(stages, function)(context, common=settings, **resolved, **arguments))

        everything = {"common": settings.identity, "sources": identities, **depends}
        source = sources["source"]
        read = source if isinstance(source, str) else identities["source"]["sha256"]
        files = [*(v.path for v in sources.values() if isinstance(v, Opening)), *(Path(p) for p in reads if p is not None)]
        places = tuple(writes) if writes is not None else (f"{name}.safetensors", f"{name}.outcomes.json")
        return Stage(
            name, everything, tuple(dict.fromkeys([*names, *after])), run, collective, read, reads=tuple(files), writes=places
        )

    def dense(self) -> Stage:
        """Return the stage that evaluates and counts the network as it came."""
        writes = ("dense.onnx", "dense.safetensors", "dense.outcomes.json")
        return self._stage("dense", "dense", {}, {}, {"source": self.opening}, writes=writes)

    def prune(
        self,
        config: PruneSettings,
        targets: Sequence[str],
        source: str | Opening,
        *,
        name: str = "prune",
        before: str | None = None,
    ) -> Stage:
        """Return the pruning stage.

        Args:
            config: How.
            targets: What it is for.
            source: The network.
            name: Of the stage.
            before: The pruning stage before this one, where the network has been pruned in an earlier iteration; the
                budget and the plan are about the network of the stage ``dense`` then.
        """
        plan = file_identity(config.plan) if config.plan else None
        depends = {"config": config.model_dump(exclude={"plan"}), "plan": plan, "targets": _facts(targets)}
        arguments = {"config": config, "targets": tuple(targets), "name": name, "before": before, "plan_sha256": plan}
        after = [before, "dense"] if before else []
        writes = (f"plan{name.removeprefix('prune')}.json", f"{name}.safetensors", f"{name}.outcomes.json")
        return self._stage(
            name, "pruned", arguments, depends, {"source": source}, after=after, reads=[config.plan], writes=writes
        )

    def finetune(
        self, config: TrainSettings, source: str | Opening, teacher: str | Opening | None, *, name: str = "finetune"
    ) -> Stage:
        """Return the fine-tuning stage."""
        sources = {"source": source, "teacher": teacher}
        depends = {"config": config.model_dump(exclude={"teacher", "workers", "device"})}
        return self._stage(name, "finetuned", {"config": config, "name": name}, depends, sources, collective=True)

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
            suffix = f"-{number}" if number < steps else ""
            stages.append(self.prune(prune.step(number), targets, last, name=f"prune{suffix}", before=before))
            stages.append(
                self.finetune(share, f"prune{suffix}", teacher_of(tune.teacher, self.opening), name=f"finetune{suffix}")
            )
            last, before = f"finetune{suffix}", f"prune{suffix}"
        return stages

    def quantize(
        self,
        config: QuantizeSettings,
        profile: Profile,
        source: str | Opening,
        teacher: str | Opening | None,
        *,
        targets: Sequence[str] = (),
    ) -> Stage:
        """Return the quantization stage; the targets matter for a latency budget only."""
        priced = tuple(targets) if config.max_slowdown is not None else ()
        arguments = {"config": config, "profile": profile, "targets": priced}
        depends = {"config": config.model_dump(exclude={"teacher", "workers"}), "profile": profile, "targets": _facts(priced)}
        sources = {"source": source, "teacher": teacher if config.mode == "qat" else None}
        return self._stage("quantize", "quantized", arguments, depends, sources, collective=config.mode == "qat")

    def export(self, source: str | Opening, settings: ExportSettings) -> Stage:
        """Return the stage that writes and checks the ONNX file."""
        writes = ("model.onnx", "export.outcomes.json")
        depends = {"options": settings.model_dump()}
        return self._stage("export", "exported", {"settings": settings}, depends, {"source": source}, writes=writes)

    def target(self, name: str, source: str | Opening, settings: ExportSettings, *, require_engine: bool = False) -> Stage:
        """Return the stage of one edge target; a measurement belongs to a machine and a runtime, so its key names them."""
        chosen = load_target(name)
        if settings.precision != "auto":
            chosen.check_precision(settings.precision)
        asked = settings.model_copy(update={"opset": settings.opset or chosen.opset})
        arguments = {"name": name, "settings": asked, "require_engine": require_engine}
        machine: dict[str, Any] = {"cpu": cpu_name(), "threads": self.settings.threads}
        if chosen.builds_here:
            machine["runtime"] = load_backend(chosen.runtime).available().version
            check_threads(self.settings.threads)  # not only after hours of training, where it measures
        depends = {"target": _facts([name]), "options": asked.model_dump(), "machine": machine, "require": require_engine}
        writes = [f"{chosen.name}/{pattern}" for pattern in _TARGET_FILES]
        writes.append(f"target-{chosen.name}.outcomes.json")
        return self._stage(
            TARGET_PREFIX + chosen.name, "target", arguments, depends, {"source": source}, after=["dense"], writes=writes
        )


_TARGET_FILES = (
    "model.*",  # the ONNX file, what runtimes make of it, and the description of a bundle
    "float32-twin.onnx",
    "timing.cache",
    "build.sh",
    "infer.py",
    "trt_builder.py",
    "labels.txt",
    "README.md",
    "SHA256SUMS",
)
"""What the stage of a target may write into its folder."""


def _source(stages: Any, what: str | Opening | None, sha256: str | None) -> Any:
    if what is None:
        return None
    return stages.Source(stage=what) if isinstance(what, str) else stages.Source(opening=what, sha256=sha256)


def _facts(targets: Sequence[str]) -> list[dict[str, Any]]:
    return [load_target(name).model_dump() for name in targets]


def profile_for(config: QuantizeSettings, targets: Sequence[str]) -> Profile:
    """Return where quantizers go: what the config says, or what the targets run; a TensorRT target decides."""
    if config.profile != "auto":
        return config.profile
    profiles = [load_target(name).profile for name in targets]
    return "tensorrt" if "tensorrt" in profiles or not profiles else profiles[0]


def run_plan(config: RunConfig, settings: Settings) -> list[Stage]:
    """Return the stages of a run.

    Raises:
        BadInput: The checkpoint or a target is not there, or two stages would have one name.
    """
    opening = opening_of(config)
    builder = Builder(opening, settings)
    stages = [builder.dense()]
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
