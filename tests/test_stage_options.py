"""Every setting of a config reaches the function that it is for; what chooses or learns sees training images only.

The tables below have a row for every field of the config classes: a field without one fails the test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantize_zoo import checkpoint_of
from recorders import NETWORK, Readers, Spy, network, spy_on, watch_images, write_inputs
from torch import Tensor

from compress import checkpoints, data, quantize, train
from compress import prune as pruning
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.prune import PruningPlan, load_plan
from compress.prune import sparsity as sparse
from compress.quantize.sensitivity import MixedPrecision
from edge_targets import benchmark, latency
from edge_targets.backends import onnxruntime
from export import to_onnx
from rescompress import api
from rescompress.core.artifact import write_text
from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest
from rescompress.core.settings import PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs.config import RunConfig, validate
from rescompress.runs.pipeline import run_stages
from rescompress.runs.plan import run_plan
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings

SEED = 5
LR = 0.0123


class Bench:
    """Runs configs on a small network and small images, with spies in place of what takes time."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, readers: Readers) -> None:
        self.folder = folder
        self.readers = readers
        self.paths = write_inputs(folder)
        self.spies: dict[str, Spy] = {}
        for real, stand_in in (
            (pruning.prune, self._prune),
            (pruning.prune_by_plan, None),
            (sparse.sparsify, lambda context, checkpoint: sparse.Sparse(checkpoint, ("conv1",), ())),
            (train.train, self._train),
            (quantize.ptq, self._ptq),
            (quantize.mixed_precision, lambda *_, **__: MixedPrecision(("conv1",), 0.1, 0.2)),
            (quantize.prepare_qat, None),
            (quantize.best_of, lambda candidates, batches: candidates[0]),
            (data.load_dataset, self._load_dataset),
            (checkpoints.load_checkpoint, lambda path, **_: load_checkpoint(path)),
            (torch.set_num_threads, lambda threads: None),
            (latency.predict, None),
            (latency.cost_function, None),
            (benchmark.measure_processes, self._measure),
            (to_onnx.to_onnx, None),
        ):
            name = real.__name__
            if real is torch.set_num_threads:  # a builtin without a signature
                self.spies[name] = Spy(lambda threads: None)
                patch.setattr(torch, name, self.spies[name])
            else:
                self.spies[name] = spy_on(patch, real, stand_in)
        self.spies["runner"] = Spy(onnxruntime.runner)
        patch.setattr(onnxruntime, "runner", self.spies["runner"])
        self.real_prune, self.real_ptq = _REAL_PRUNE, _REAL_PTQ

    def __getitem__(self, name: str) -> Spy:
        return self.spies[name]

    def run(self, *, only: Sequence[str] = (), settings: dict[str, Any] | None = None, **config: Any) -> Manifest:
        """Run those stages of a config whose names begin so; by default those that make networks."""
        document = {"checkpoint": self.paths["net"], "data": self.paths["data"], "targets": [], **config}
        loaded = validate(document, "test")
        given = {"data": loaded.data, "labels": loaded.labels, "seed": loaded.seed, **(settings or {})}
        chosen = tuple(only) or ("dense", "prune", "finetune", "quantize")
        stages = [s for s in run_plan(loaded, Settings(**given)) if s.name.startswith(chosen)]
        return run_stages(stages, self.folder / "out", {}, reporter=Silent()).manifest

    def _prune(self, checkpoint: Checkpoint, settings: PruneSettings, **_: Any) -> Any:
        return self.real_prune(checkpoint, QUARTER)

    def _ptq(
        self, checkpoint: Checkpoint, batches: Any, settings: QuantizeSettings, *, profile: Any, keep_float: Any, **_: Any
    ) -> Checkpoint:
        few = list(batches)[:1]
        quick = QuantizeSettings(calibration="max", bias_correction=False)
        return self.real_ptq(checkpoint, few, quick, profile=profile, keep_float=keep_float)

    def _train(self, model: Any, split: Any, settings: Any, **_: Any) -> Any:
        split.pixels(np.arange(2))
        return train.TrainLog([{"epoch": 1.0, "loss": 1.0}])

    def _load_dataset(self, source: str, spec: Any, **more: Any) -> Any:
        return _REAL_LOAD(source, spec, seed=more.get("seed", 0))

    def _measure(self, candidates: Any, **_: Any) -> Any:
        metrics = benchmark.summarize([1.0] * 20, benchmark.Conditions(device="cpu", runtime="onnxruntime", batch=1))
        return [benchmark.Measured(metrics, (1.0, 1.0)) for _ in candidates]


_REAL_PRUNE, _REAL_PTQ, _REAL_LOAD = pruning.prune, quantize.ptq, data.load_dataset
QUARTER = PruneSettings(method="magnitude", ratio=0.25, align=1)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with watch_images(monkeypatch) as readers:
        yield Bench(monkeypatch, tmp_path, readers)


@dataclass(frozen=True)
class Row:
    """A setting that is not the default, and what some function must get for it.

    Attributes:
        said: The section of the config.
        spy: The function.
        found: What it got, out of the arguments of its only call.
        wanted: The same, as it should be.
        more: Other sections.
    """

    said: dict[str, Any]
    spy: str
    found: Callable[[Spy], Any]
    wanted: Any
    more: dict[str, Any] | None = None


def of(name: str) -> Callable[[Spy], Any]:
    return lambda spy: spy[name]


def setting(name: str) -> Callable[[Spy], Any]:
    return lambda spy: getattr(spy["settings"], name)


def rows(batches: Sequence[Tensor]) -> int:
    return sum(len(x) for x in batches)


def weights(spy: Spy) -> float | None:
    """Return the first weight of the teacher that trains."""
    teacher = spy["teacher"]
    return None if teacher is None else float(teacher.state_dict()["conv1.weight"].flatten()[0])


DENSE_WEIGHT = float(network().state_dict["conv1.weight"].flatten()[0])
TEACHER_WEIGHT = float(network(shifted=True).state_dict["conv1.weight"].flatten()[0])
PTQ: dict[str, Any] = {"mode": "ptq"}
QAT: dict[str, Any] = {"mode": "qat"}
JETSON: dict[str, Any] = {"targets": ["jetson"]}

PRUNE: dict[str, list[Row]] = {
    "latency": [
        Row({"latency": 0.8}, "prune", lambda spy: spy["cost"] is not None, True, JETSON),
        Row({"latency": 0.8}, "cost_function", lambda spy: spy["device"].name, "jetson-orin-nano-8gb-super", JETSON),
        Row({"macs": 0.8}, "prune", of("cost"), None, JETSON),
    ],
    "align": [
        Row({"align": "auto"}, "prune", of("multiple"), 8),
        Row({"align": 4}, "prune", lambda spy: spy["settings"].align, 4),
    ],
    "calib": [Row({"calib": 7}, "prune", lambda spy: len(spy["calibration_x"]), 7)],
    "iterations": [
        Row(
            {"iterations": 2, "macs": 0.25},
            "prune",
            lambda spy: [call["settings"].macs for call in spy.calls],
            [0.5, 0.25],
            {"finetune": {}},
        ),
        Row(
            {"iterations": 2},
            "prune",
            lambda spy: [call["reference"] == NETWORK for call in spy.calls],
            [True, True],
            {"finetune": {}},
        ),
        Row(
            {"iterations": 2},
            "train",
            lambda spy: [call["settings"].epochs for call in spy.calls],
            [1.5, 1.5],
            {"finetune": {"epochs": 3.0}},
        ),
    ],
    "sparsity": [
        Row({"sparsity": "2:4", "calib": 9}, "sparsify", lambda spy: len(spy["context"].calibration_NCHW), 9),
        Row({"sparsity": "2:4"}, "sparsify", lambda spy: spy["context"].seed, SEED),
        Row({"sparsity": "2:4", "plan": "plan.json"}, "sparsify", lambda spy: len(spy.calls), 1),
    ],
    "plan": [
        Row({"plan": "plan.json"}, "prune", lambda spy: spy.calls, []),
        Row({"plan": "plan.json"}, "prune_by_plan", lambda spy: spy["plan"].method, "by-hand"),
        Row({"plan": "plan.json", "calib": 7}, "prune_by_plan", lambda spy: len(spy["calibration_x"]), 7),
        Row({"plan": "plan.json", "repair": False}, "prune_by_plan", lambda spy: spy["settings"].repair, False),
        Row({"plan": "plan.json"}, "prune_by_plan", of("seed"), SEED),
    ],
}

FINETUNE: dict[str, list[Row]] = {
    "teacher": [
        Row({}, "train", weights, DENSE_WEIGHT),
        Row({"teacher": "teacher.safetensors"}, "train", weights, TEACHER_WEIGHT),
        Row({"teacher": None}, "train", weights, None),
    ],
    "features": [
        Row({"features": 0.7, "teacher": None}, "train", setting("features"), 0.0),
    ],
    "seed": [Row({"seed": 8}, "train", setting("seed"), 8), Row({}, "train", setting("seed"), SEED)],
}


def held(spy: Spy) -> int:
    return rows([x for x, _ in spy["batches"]])


QUANTIZE: dict[str, list[Row]] = {
    "mode": [
        Row({"mode": "ptq"}, "train", lambda spy: len(spy.calls), 0),
        Row({"mode": "qat"}, "train", lambda spy: len(spy.calls), 1),
    ],
    "epochs": [Row(QAT | {"epochs": 2.5}, "train", setting("epochs"), 2.5)],
    "profile": [
        Row(PTQ | {"profile": "openvino"}, "ptq", of("profile"), "openvino"),
        Row(PTQ | {"profile": "onnxruntime"}, "ptq", of("profile"), "onnxruntime"),
        Row(PTQ, "ptq", of("profile"), "openvino", {"targets": ["cpu"]}),
    ],
    "calib": [
        Row(PTQ | {"calib": 7}, "ptq", lambda spy: rows(spy["batches"]), 7),
        Row(PTQ | {"calib": 7, "keep_float": 1}, "mixed_precision", lambda spy: rows(spy["batches"]), 7),
    ],
    "keep_float": [
        Row(PTQ | {"keep_float": ["fc"]}, "ptq", of("keep_float"), frozenset({"fc"})),
        Row(PTQ | {"keep_float": 2}, "mixed_precision", of("layers"), 2),
        Row(PTQ | {"keep_float": "auto"}, "mixed_precision", of("layers"), None),
        Row(
            PTQ | {"keep_float": "auto"},
            "mixed_precision",
            lambda spy: (spy["reference"].quantization, spy["checkpoint"].quantization is not None),
            (None, True),
        ),
        Row(
            PTQ | {"keep_float": "auto"},
            "ptq",
            lambda spy: [call["keep_float"] for call in spy.calls],
            [frozenset(), frozenset({"conv1"})],
        ),
    ],
    "max_divergence": [Row(PTQ | {"keep_float": "auto", "max_divergence": 0.4}, "mixed_precision", of("max_divergence"), 0.4)],
    "max_slowdown": [
        Row(
            PTQ | {"keep_float": "auto", "max_slowdown": 1.25},
            "mixed_precision",
            lambda spy: spy["max_cost"] / spy["cost"](frozenset()),
            1.25,
            JETSON,
        ),
    ],
    "learnable_scales": [Row(QAT | {"learnable_scales": True}, "prepare_qat", of("learnable_scales"), True)],
    "freeze_bn_after": [Row(QAT | {"freeze_bn_after": 0.6}, "train", setting("freeze_bn_after"), 0.6)],
    "hold_out": [
        Row(QAT | {"hold_out": 0.25}, "best_of", held, 10),
        Row(QAT | {"hold_out": 0.25}, "train", lambda spy: len(spy["split"]), 30),
        Row(QAT | {"hold_out": 0.0}, "best_of", lambda spy: spy.calls, []),
        Row(QAT | {"hold_out": 0.0}, "train", lambda spy: len(spy["split"]), 40),
    ],
    "lr": [Row(QAT | {"lr": LR}, "train", setting("lr"), LR)],
    "batch_size": [Row(QAT | {"batch_size": 6}, "train", setting("batch_size"), 6)],
    "augment": [Row(QAT | {"augment": "photo"}, "train", setting("augment"), "photo")],
    "workers": [Row(QAT | {"workers": 1}, "train", setting("workers"), 1)],
    "teacher": [
        Row(QAT, "train", weights, DENSE_WEIGHT),
        Row(QAT, "train", setting("distill"), 1.0),
        Row(QAT | {"teacher": "teacher.safetensors"}, "train", weights, TEACHER_WEIGHT),
        Row(QAT | {"teacher": None}, "train", weights, None),
        Row(QAT | {"teacher": None}, "train", setting("distill"), 0.0),
    ],
}

SECTIONS = {"prune": PRUNE, "finetune": FINETUNE, "quantize": QUANTIZE}
"""Settings that mean something outside of the engine, too; the engine itself gets the section as it is."""

WHOLE: dict[str, tuple[str, PruneSettings | TrainSettings | QuantizeSettings]] = {
    "prune": ("prune", PruneSettings(method="fpgm", params=0.6, scope="all", align=2, drop_blocks=True, repair=False)),
    "finetune": (
        "train",
        TrainSettings(
            epochs=3.5, lr=LR, batch_size=6, distill=0.3, temperature=2.5, features=0.7, precision="bf16", augment="photo",
            mixup=0.3, cutmix=0.9, ema=0.99, momentum=0.8, accumulate=2, clip=1.5, hold_out=0.2, patience=3, seed=8,
            device="cpu", workers=1,
        ),
    ),
    "quantize": ("ptq", QuantizeSettings(mode="ptq", calibration="percentile", percentile=99.5, bias_correction=False)),
}  # fmt: skip


@pytest.mark.parametrize("section", WHOLE)
def test_an_engine_gets_the_section_as_it_is(bench: Bench, section: str) -> None:
    engine, settings = WHOLE[section]
    bench.run(**{section: settings.model_dump(exclude_unset=True)})
    assert bench[engine]["settings"] == settings


@pytest.mark.parametrize("section", SECTIONS)
def test_what_has_rows_is_a_field(section: str) -> None:
    assert set(SECTIONS[section]) <= set(type(WHOLE[section][1]).model_fields)


CASES = [
    pytest.param(section, field, tuple(group), id=f"{section}-{field}-{number}")
    for section, table in SECTIONS.items()
    for field, found in table.items()
    for number, (_, group) in enumerate(itertools.groupby(found, key=lambda row: (repr(row.said), repr(row.more))))
]


@pytest.mark.parametrize(("section", "field", "group"), CASES)
def test_a_setting_arrives(bench: Bench, section: str, field: str, group: tuple[Row, ...]) -> None:
    said = {**group[0].said}
    for name in ("plan", "teacher"):
        if isinstance(said.get(name), str):
            said[name] = str(bench.folder / said[name])
    if "plan" in said:
        made = _REAL_PRUNE(network(), QUARTER).plan
        write_text(Path(said["plan"]), made.model_copy(update={"method": "by-hand"}).model_dump_json())
        bench["prune_by_plan"].does = lambda checkpoint, plan, *_, **__: checkpoint
    bench.run(**{section: said, "seed": SEED, **(group[0].more or {})})
    for row in group:
        wanted = pytest.approx(row.wanted) if isinstance(row.wanted, float) else row.wanted
        assert row.found(bench[row.spy]) == wanted, row


# what the stages share


def test_the_seed_reaches_everything_random(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[str, int]] = []
    take, part = data.Split.take, data.Split.part
    monkeypatch.setattr(data.Split, "take", lambda self, n, seed: (seeds.append(("take", seed)), take(self, n, seed))[1])
    monkeypatch.setattr(data.Split, "part", lambda self, f, seed: (seeds.append(("part", seed)), part(self, f, seed))[1])
    bench.run(seed=SEED, prune={"sparsity": "2:4"}, finetune={}, quantize={"mode": "qat", "hold_out": 0.2})
    assert {name for name, _ in seeds} == {"take", "part"}
    assert {seed for _, seed in seeds} == {SEED}
    assert bench["prune"]["seed"] == SEED
    assert [call["settings"].seed for call in bench["train"].calls] == [SEED, SEED]
    assert {call["seed"] for call in bench["load_dataset"].calls} == {SEED}


def test_settings_of_the_machine_arrive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()
    batches = data.Split.batches

    def seen(self: Any, batch_size: int, **more: Any) -> Any:
        if bench.readers.evaluating:
            sizes.add(batch_size)
        return batches(self, batch_size, **more)

    monkeypatch.setattr(data.Split, "batches", seen)
    given = {"threads": 3, "batch_size": 5, "device": "cpu"}
    bench.run(settings=given, prune={}, finetune={}, quantize={"mode": "qat"})
    assert sizes == {5}
    assert [call["threads"] for call in bench["set_num_threads"].calls] == [3] * 4
    assert [call["settings"].device for call in bench["train"].calls] == ["cpu", "cpu"]


def test_labels_and_source_of_the_data_arrive(bench: Bench) -> None:
    bench.run(labels={"cat": "3", "dog": "7"}, prune={})
    assert {call["source"] for call in bench["load_dataset"].calls} == {bench.paths["data"]}
    assert all(call["labels"] == {"cat": "3", "dog": "7"} for call in bench["load_dataset"].calls)


def test_without_data_nothing_is_calibrated(bench: Bench) -> None:
    bench.run(settings={"data": None}, prune={"method": "magnitude"})
    assert bench["prune"]["calibration_x"] is None


# of the run


RUN: dict[str, dict[str, Any]] = {
    "input": {"input": "3x16x16"},
    "preprocess": {"preprocess": "cifar"},
    "arch_options": {"arch_options": {"stride_at": 1, "max_pool": True}},
    "allow_pickle": {"allow_pickle": True},
}
ELSEWHERE = {
    "checkpoint",
    "data",
    "seed",
    "prune",
    "finetune",
    "quantize",
    "targets",
    "batch",
    "labels",
    "search",
    "skip_corrupt",
}
"""Fields of `RunConfig` that other tests of this file, and of the options, are about."""


def test_what_a_run_states_about_a_checkpoint_holds_for_it_and_its_teacher(bench: Bench) -> None:
    assert set(RUN) | ELSEWHERE == set(RunConfig.model_fields), "a field of a run without a test here"
    said = {key: value for row in RUN.values() for key, value in row.items()}
    bench.run(**said, quantize={"mode": "qat", "teacher": bench.paths["teacher"]})
    calls = {str(call["path"]): call for call in bench["load_checkpoint"].calls}
    for path in (bench.paths["net"], bench.paths["teacher"]):
        assert calls[path]["input_shape"] == (3, 16, 16)
        assert calls[path]["preprocess"] == "cifar"
        assert calls[path]["arch_options"] == {"stride_at": "1", "max_pool": "yes"}
        assert calls[path]["allow_pickle"] is True


def test_fine_tuning_without_pruning_takes_the_teacher_of_the_config(bench: Bench) -> None:
    bench.run(finetune={"teacher": bench.paths["teacher"], "lr": LR})
    assert weights(bench["train"]) == TEACHER_WEIGHT
    assert bench["train"]["settings"].lr == LR


@pytest.mark.parametrize("batch", [3, "dynamic"])
def test_batch_and_threads_reach_file_and_measurement(bench: Bench, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # three threads are many for a small machine
    bench.readers.evaluating += 1  # the file is compared with torch on the images of the evaluation, which chooses nothing
    bench.run(only=["dense", "export", "target"], targets=["cpu-ort", "jetson"], batch=batch, settings={"threads": 3})
    written = [call["options"].batch for call in bench["to_onnx"].calls]
    assert written.count(batch) == 2, "the exported file, which is cpu-ort's too, and that of the board"
    size = batch if isinstance(batch, int) else 1
    candidates = bench["measure_processes"]["candidates"]
    assert candidates[0].batch == size
    assert [c.threads for c in candidates] == [3] * len(candidates)
    assert [c.runtime for c in candidates] == ["onnxruntime"] * len(candidates)
    assert [call["threads"] for call in bench["runner"].calls] == [3]
    predicted = bench["predict"].calls
    assert [call["batch"] for call in predicted] == [size, size]
    assert {call["device"].name for call in predicted} == {"jetson-orin-nano-8gb-super"}


def test_a_teacher_of_other_classes_is_refused(bench: Bench) -> None:
    save_checkpoint(checkpoint_of("pad"), Path(bench.paths["teacher"]))
    for said in ({"finetune": {"teacher": bench.paths["teacher"]}}, {"quantize": {"teacher": bench.paths["teacher"]}}):
        with pytest.raises(BadInput, match="teacher maps"):
            bench.run(**said)
    assert bench["train"].calls == []


def test_the_plan_of_iterations_is_about_the_dense_network(bench: Bench) -> None:
    bench.run(prune={"iterations": 2}, finetune={})
    plan = load_plan(bench.folder / "out" / "plan.json")
    assert isinstance(plan, PruningPlan)
    calls = bench["prune"].calls
    assert plan.spec_digest == _REAL_PRUNE(network(), PruneSettings(method="random", ratio=0.1)).plan.spec_digest
    assert calls[1]["checkpoint"].spec != NETWORK, "the second step prunes what the first left"


# which images


def images_of(tensors: Sequence[Tensor]) -> list[bytes]:
    return [image.numpy().tobytes() for x in tensors for image in x]


def test_what_chooses_or_learns_gets_training_images_only(bench: Bench) -> None:
    held_out = {"mode": "qat", "keep_float": "auto", "hold_out": 0.2, "calib": 16}
    bench.run(seed=SEED, prune={"sparsity": "2:4", "calib": 16}, finetune={}, quantize=held_out)
    split = _REAL_LOAD(bench.paths["data"], NETWORK).train
    known = set(images_of([split.tensor()]))
    got = {
        "prune": images_of([bench["prune"]["calibration_x"]]),
        "sparsify": images_of([bench["sparsify"]["context"].calibration_NCHW]),
        "ptq": images_of([x for call in bench["ptq"].calls for x in call["batches"]]),
        "mixed_precision": images_of(bench["mixed_precision"]["batches"]),
        "best_of": images_of([x for x, _ in bench["best_of"]["batches"]]),
    }
    assert {name for name, found in got.items() if not found or not known.issuperset(found)} == set()
    seen, chosen_on = split.part(0.2, SEED)
    assert got["best_of"] == images_of([chosen_on.tensor()])
    assert torch.cat([y for _, y in bench["best_of"]["batches"]]).tolist() == chosen_on.labels.tolist()
    tuned, quantized = (call["split"] for call in bench["train"].calls)
    assert tuned.samples_sha256 == split.samples_sha256
    assert quantized.samples_sha256 == seen.samples_sha256
    assert not set(got["best_of"]).intersection(images_of([quantized.tensor()]))
    assert bench.readers.val, "the networks were evaluated"


def test_a_followed_plan_is_calibrated_on_training_images(bench: Bench) -> None:
    made = _REAL_PRUNE(network(), QUARTER).plan
    write_text(bench.folder / "plan.json", made.model_dump_json())
    bench.run(prune={"plan": str(bench.folder / "plan.json"), "calib": 16})
    known = set(images_of([_REAL_LOAD(bench.paths["data"], NETWORK).train.tensor()]))
    assert known.issuperset(images_of([bench["prune_by_plan"]["calibration_x"]]))


# the Python face


def test_options_of_the_python_face_arrive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.folder / "model.onnx"
    api.export_onnx(network(), path, batch=4, opset=18)
    api.export_onnx(network(), path, target="jetson")
    api.export_onnx(network(), path, target="jetson", opset=18, batch="dynamic")
    options = [call["options"] for call in bench["to_onnx"].calls]
    assert [(o.batch, o.opset) for o in options] == [(4, 18), (1, _opset("jetson")), ("dynamic", 18)]
    api.predict_latency(network(), "jetson", precision="fp16", batch=6, power_mode="7W")
    call = bench["predict"]
    assert (call["precision"], call["batch"], call["power_mode"]) == ("fp16", 6, "7W")
    api.quantize(network(), [torch.rand(4, 3, 16, 16)], profile="openvino", keep_float=frozenset({"fc"}))
    assert (bench["ptq"]["profile"], bench["ptq"]["keep_float"]) == ("openvino", frozenset({"fc"}))
    settings: list[Any] = []
    monkeypatch.setattr(api, "run_plan", lambda config, shared: settings.append(shared) or [])
    text = f"checkpoint: {bench.paths['net']}\ndata: {bench.paths['data']}\nlabels: {{a: '1'}}\n"
    write_text(bench.folder / "run.yaml", text)
    api.run(bench.folder / "run.yaml", bench.folder / "of-the-face", overrides=("seed=9",))
    assert (settings[0].data, settings[0].labels, settings[0].seed) == (bench.paths["data"], {"a": "1"}, 9)
    assert (bench.folder / "of-the-face" / "manifest.json").is_file()


def _opset(target: str) -> int:
    from edge_targets.catalog import load_target

    return load_target(target).opset
