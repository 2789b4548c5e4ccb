"""Every option of the command line arrives where it belongs: in the config, the settings or the library's function.

The table has an entry for every parameter of every command in it: an option without one fails the test. What takes time is
replaced: the stages by stand-ins that write a word to a file, library functions by spies.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from recorders import Spy, network, spy_on, watch_images, write_inputs
from report_factory import write_run
from test_settings import made_from_settings

from compress import checkpoints as files
from compress import data, prune, quantize
from compress.prune import measure, picture
from compress.quantize import sensitivity
from edge_targets import benchmark, board_probe, board_work, latency, onnx_kernels, remote, ssh
from edge_targets.backends import onnxruntime
from rescompress import api
from rescompress.cli.app import COMMANDS
from rescompress.core.details import KINDS
from rescompress.core.errors import ToolMissing
from rescompress.core.metric import accuracy, counted
from rescompress.core.settings import PruneSettings, QuantizeSettings
from rescompress.runs import pipeline
from rescompress.runs.stage import Context, Outcome
from rescompress.show import gate, track
from rescompress.show.gate import render

QUICK = QuantizeSettings(calibration="max", bias_correction=False)
COMMON = {"help", "json", "verbose", "quiet", "debug", "device_file", "install_completion", "show_completion", "force"}
"""What every command takes, and what typer adds; what ``--force`` does stands in test_run_claims.py."""


class Seen:
    """What the stages and functions were called with.

    Attributes:
        folder: Where the command ran.
        calls: Of the stages, in order: name, and arguments.
        spies: By name of the function.
        out: What the command printed.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.patch = patch
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.spies: dict[str, Spy] = {}
        self.out: Any = None
        for module, function in (
            ("network", "dense"),
            ("network", "pruned"),
            ("network", "finetuned"),
            ("network", "quantized"),
            ("export", "exported"),
            ("target", "target"),
        ):
            patch.setattr(importlib.import_module(f"rescompress.runs.stages.{module}"), function, self._stage(function))

    def _stage(self, function: str) -> Callable[..., Outcome]:
        def run(context: Context, step: Any) -> Outcome:
            name = step.target.name if function == "target" else step.name
            self.calls.append((function, {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}))
            folder = context.folder / str(name) if function == "target" else context.folder
            folder.mkdir(parents=True, exist_ok=True)
            kinds = {"target": ("onnx",), "exported": ("onnx",), "pruned": ("checkpoint", "plan")}.get(
                function, ("checkpoint",)
            )
            suffix = {"onnx": "onnx", "checkpoint": "safetensors", "plan": "json"}
            written = []
            for kind in kinds:
                stem = "model" if kind == "onnx" else "plan" if kind == "plan" else name
                path = folder / f"{stem}.{suffix[kind]}"
                path.write_text(f"{kind} of {name}")
                written.append((kind, path))
            size = next((path.stat().st_size for kind, path in written if kind == "onnx"), 7)
            metrics = {"macs": counted(9, "macs"), "params": counted(8, "params"), "size_bytes": counted(size, "bytes")}
            details = {
                "method": "m", "widths_after": {}, "widths_before": {}, "dropped_blocks": [], "seconds": 1.0,
                "achieved_ratio": 0.5, "notes": [], "epochs": [], "target": name, "engine": None, "engine_status": "none",
                "precision": "fp32", "opset": 17, "parity": {"images": "none", "top1_agreement": 1.0, "max_abs": 0.0},
            }  # fmt: skip
            return Outcome(metrics | {"top1": accuracy(9, 10, runtime="torch")}, written, KINDS[step.kind](**details))

        return run

    def stage(self, function: str) -> dict[str, Any]:
        """Return the arguments of the last call of a stage."""
        return next(given for name, given in reversed(self.calls) if name == function)

    def config(self, function: str) -> Any:
        return self.stage(function)["settings"]

    def shared(self, function: str) -> Any:
        """Return what all stages share, whatever its class."""
        return next(v for v in self.stage(function).values() if hasattr(v, "threads") and hasattr(v, "batch_size"))

    def opening(self, function: str, source: str = "source") -> Any:
        return self.stage(function)[source].opening

    def spy(self, real: Callable[..., Any], stand_in: Callable[..., Any] | None = None) -> None:
        self.spies[real.__name__] = spy_on(self.patch, real, stand_in)

    def __getitem__(self, name: str) -> Spy:
        return self.spies[name]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()


Getter = Callable[[Seen], Any]


@dataclass(frozen=True)
class Case:
    """One call of a command.

    Attributes:
        words: What is typed.
        arrives: By parameter: how to find what arrived, and what that should be.
        code: The exit code.
    """

    words: str
    arrives: dict[str, tuple[Getter, Any]]
    code: int = 0


def config(function: str, name: str, wanted: Any) -> tuple[Getter, Any]:
    return lambda seen: getattr(seen.config(function), name), wanted


def of(spy: str, name: str, wanted: Any) -> tuple[Getter, Any]:
    return lambda seen: seen[spy][name], wanted


def path(seen: Seen, name: str) -> str:
    return str((seen.folder / name).resolve())


def opened(function: str) -> dict[str, tuple[Getter, Any]]:
    """Return the rows of what is stated about a checkpoint, for a stage that reads it."""
    return {
        "checkpoint": (lambda seen: seen.opening(function).path.name, "net.safetensors"),
        "input_shape": (lambda seen: seen.opening(function).input_shape, (3, 16, 16)),
        "preprocess": (lambda seen: seen.opening(function).preprocess, "cifar"),
        "arch_option": (lambda seen: seen.opening(function).arch_options[0], "stride_at=1"),
        "code": (lambda seen: seen.opening(function).facts["code"].rpartition("/")[2], "model.py:make"),
        "like": (lambda seen: seen.opening(function).facts["like"], "resnet20"),
        "trunk": (lambda seen: seen.opening(function).facts["trunk"], "auto"),
        "allow_pickle": (lambda seen: seen.opening(function).allow_pickle, True),
    }


def shared(function: str, *left_out: str) -> dict[str, tuple[Getter, Any]]:
    """Return the rows of what all stages share."""
    wanted = {"labels": {"a": "1", "b": "2"}, "seed": 5, "device": "cpu", "threads": 3, "batch_size": 4}
    found: dict[str, tuple[Getter, Any]] = {"data": (lambda seen: Path(seen.shared(function).data).name, "data.npz")}
    for name, value in wanted.items():
        found[name] = (lambda seen, name=name: getattr(seen.shared(function), name), value)
    return {name: row for name, row in found.items() if name not in left_out}


STATED = "--input 3x16x16 --preprocess cifar --arch-option stride_at=1 --allow-pickle"
NAMED = "--code model.py:make --like resnet20 --trunk auto"
SHARED = "--data data.npz --labels a=1,b=2 --seed 5 --device cpu --threads 3 --batch-size 4"
OPENED = {
    "input_shape": of("load_checkpoint", "input_shape", (3, 16, 16)),
    "preprocess": of("load_checkpoint", "preprocess", "cifar"),
    "arch_option": (lambda seen: seen["load_checkpoint"]["arch_options"]["stride_at"], "1"),
    "allow_pickle": of("load_checkpoint", "allow_pickle", True),
}

BOTH = {
    "code": (lambda seen: seen["load_checkpoint"]["arch_options"]["code"].rpartition("/")[2], "model.py:make"),
    "like": (lambda seen: seen["load_checkpoint"]["arch_options"]["like"], "resnet20"),
    "trunk": (lambda seen: seen["load_checkpoint"]["arch_options"]["trunk"], "auto"),
}

PRUNE = [
    Case(
        f"net.safetensors --macs 0.25 -t jetson -m fpgm --scope all --align 4 --calib 7 --drop-blocks --finetune-epochs 3 "
        f"--iterations 2 --recalibrate --no-repair --sparsity 2:4 --plan-out plan-out.json -o half.safetensors "
        f"--train-batch 6 --skip-corrupt {STATED} {NAMED} {SHARED}",
        {
            **opened("dense"),
            **shared("pruned"),
            "skip_corrupt": (lambda seen: seen.shared("pruned").skip_corrupt, True),
            "target": (lambda seen: [t.alias for t in seen.stage("pruned")["targets"]], ["jetson"]),
            "iterations": (
                lambda seen: [given["settings"].budget for name, given in seen.calls if name == "pruned"],
                [("macs", 0.5), ("macs", 0.25)],
            ),
            "plan_out": (lambda seen: seen.text("plan-out.json"), "plan of prune"),
            "output": (lambda seen: seen.text("half.safetensors"), "checkpoint of finetune"),
        },
    ),
    Case(
        "net.safetensors -o half.safetensors", {"output": (lambda seen: seen.text("half.safetensors"), "checkpoint of prune")}
    ),
    Case(
        "net.safetensors --plan-in plan.json --no-repair --calib 9 --data data.npz --no-recalibrate",
        {},
    ),
]
FINETUNE = [
    Case(
        f"net.safetensors -e 3.5 --teacher teacher.safetensors --lr 0.0123 --train-batch 6 --precision bf16 -o ft.safetensors "
        f"--skip-corrupt {STATED} {NAMED} {SHARED}",
        {
            **opened("finetuned"),
            **shared("finetuned"),
            "skip_corrupt": (lambda seen: seen.shared("finetuned").skip_corrupt, True),
            "teacher": (
                lambda seen: [seen.opening("finetuned", "teacher").path.name, seen.opening("finetuned", "teacher").preprocess],
                ["teacher.safetensors", "cifar"],
            ),
            "output": (lambda seen: seen.text("ft.safetensors"), "checkpoint of finetune"),
        },
    ),
    Case("net.safetensors --data data.npz", {"teacher": (lambda seen: seen.stage("finetuned")["teacher"], None)}),
]
QUANTIZE = [
    Case(
        f"net.safetensors --mode qat -e 3.5 --teacher teacher.safetensors -t jetson --profile openvino --calib 7 "
        f"--calibration mse --keep-float auto --max-divergence 0.4 --max-slowdown 1.25 --lr 0.0123 --train-batch 6 "
        f"-o int8.safetensors --skip-corrupt {STATED} {NAMED} {SHARED}",
        {
            **opened("quantized"),
            **shared("quantized"),
            "skip_corrupt": (lambda seen: seen.shared("quantized").skip_corrupt, True),
            "teacher": (lambda seen: seen.opening("quantized", "teacher").path.name, "teacher.safetensors"),
            "target": (lambda seen: [t.alias for t in seen.stage("quantized")["targets"]], ["jetson"]),
            "profile": (lambda seen: seen.stage("quantized")["profile"], "openvino"),
            "output": (lambda seen: seen.text("int8.safetensors"), "checkpoint of quantize"),
        },
    ),
    Case(
        "net.safetensors --data data.npz --mode qat --keep-float conv1,fc -t cpu",
        {
            "target": (lambda seen: seen.stage("quantized")["profile"], "openvino"),
            "teacher": (lambda seen: seen.opening("quantized", "teacher").path.name, "net.safetensors"),
        },
    ),
]


EXPORT = [
    Case(
        "net.safetensors -t jetson --precision fp16 --batch 4 --opset 18 -o there --archive --require-engine "
        f"--skip-corrupt {STATED} {NAMED} {SHARED}",
        {
            **opened("target"),
            **shared("target"),
            "skip_corrupt": (lambda seen: seen.shared("target").skip_corrupt, True),
            "target": (lambda seen: seen.stage("target")["target"].alias, "jetson"),
            "require_engine": (lambda seen: seen.stage("target")["require_engine"], True),
            "output": (lambda seen: seen.text("there/model.onnx"), "onnx of jetson-orin-nano-8gb-super"),
            "archive": (lambda seen: (seen.folder / "there.tar.gz").is_file(), True),
        },
    ),
    Case(
        "net.safetensors --batch dynamic -o there.tar.gz",
        {
            "output": (lambda seen: (seen.folder / "there.tar.gz").is_file(), True),
            "target": (lambda seen: seen.stage("target")["target"].name, "cpu"),
        },
    ),
]
EVALUATE = [
    Case(
        f"net.safetensors --split train --skip-corrupt {STATED} {SHARED}",
        OPENED
        | {
            "model": (lambda seen: seen["load_checkpoint"]["path"].name, "net.safetensors"),
            "data": (lambda seen: Path(seen["load_dataset"]["source"]).name, "data.npz"),
            "labels": of("load_dataset", "labels", {"a": "1", "b": "2"}),
            "seed": of("load_dataset", "seed", 5),
            "skip_corrupt": of("load_dataset", "skip_corrupt", True),
            "batch_size": of("evaluate", "batch_size", 4),
            "split": (lambda seen: len(seen["evaluate"]["split"]), 40),
            "threads": (lambda seen: [call["threads"] for call in seen["set_num_threads"].calls], [3]),
        },
    ),
    Case("net.safetensors --data data.npz", {"split": (lambda seen: len(seen["evaluate"]["split"]), 12)}),
    Case(f"net.safetensors --data data.npz {NAMED}", BOTH),
    Case(
        "net.safetensors --data data.npz --reference float.onnx",
        {"reference": (lambda seen: "scores classes" in seen.out.stderr, True)},
        5,
    ),
    Case("net.safetensors --data data.npz --device cuda:77", {"device": (lambda seen: "cuda:77" in seen.out.stderr, True)}, 5),
    Case(
        "dynamic.onnx --data data.npz --runtime onnxruntime --threads 3",
        {
            "threads": (lambda seen: seen["runner"]["threads"], 3),
            "runtime": (lambda seen: seen["evaluate"]["runner"].runtime, "onnxruntime"),
        },
    ),
    Case("dynamic.onnx --data data.npz --runtime torch", {"runtime": (lambda seen: "--runtime" in seen.out.stderr, True)}, 5),
]
BENCH = [
    Case(
        "dynamic.onnx -t cpu-ort --batch 4 --input 3x16x16 --threads 3 --seconds 0.5 --rounds 2",
        {
            "models": (lambda seen: seen["measure_processes"]["candidates"][0].path.name, "dynamic.onnx"),
            "target": (lambda seen: seen["measure_processes"]["candidates"][0].runtime, "onnxruntime"),
            "batch": (lambda seen: seen["measure_processes"]["candidates"][0].batch, 4),
            "input_shape": of("kernels_of", "input_shape", (3, 16, 16)),
            "threads": (lambda seen: seen["measure_processes"]["candidates"][0].threads, 3),
            "seconds": (lambda seen: seen["measure_processes"]["effort"].seconds, 0.5),
            "rounds": (lambda seen: seen["measure_processes"]["effort"].rounds, 2),
        },
    ),
    Case(
        "fixed2.onnx -t cpu-ort -t cpu-ort",
        {"batch": (lambda seen: [c.batch for c in seen["measure_processes"]["candidates"]], [2, 2])},
    ),
]


def override(name: str, wanted: Any) -> tuple[Getter, Any]:
    return lambda seen: getattr(seen["predict_kernels"]["overrides"], name), wanted


PREDICT = [
    Case(
        "net.safetensors -t jetson-agx-orin-64gb --precision fp16 --batch 4 --input 3x16x16 --power-mode 30W --sm-count 3 "
        "--gpu-mhz 511 --emc-mhz 1999 --slowest 2",
        {
            "model": (lambda seen: seen["load_checkpoint"]["path"].name, "net.safetensors"),
            "target": (lambda seen: seen["predict_kernels"]["device"].name, "jetson-agx-orin-64gb"),
            "precision": of("predict_kernels", "precision", "fp16"),
            "batch": of("predict_kernels", "batch", 4),
            "input_shape": of("load_checkpoint", "input_shape", (3, 16, 16)),
            "power_mode": of("predict_kernels", "power_mode", "30W"),
            "sm_count": override("sm_count", 3),
            "gpu_mhz": override("gpu_mhz", 511.0),
            "emc_mhz": override("emc_mhz", 1999.0),
            "slowest": (lambda seen: sum("%" in line for line in seen.out.stdout.splitlines()), 2),
        },
    ),
    Case("dynamic.onnx --input 3x16x16", {"input_shape": of("kernels_of", "input_shape", (3, 16, 16))}),
    Case("fixed2.onnx", {"batch": of("predict_kernels", "batch", 2)}),
]


def board(name: str, wanted: Any) -> tuple[Getter, Any]:
    return lambda seen: str(getattr(seen["probe"]["board"], name)), str(wanted)


DEPLOY = [
    Case(
        "dynamic.onnx --host me@there -t jetson --batches 2,4 --input 3x16x16 --data data.npz --limit 6 --labels a=1,b=2 "
        "--seed 5 --runs 3 --seconds 7 --workspace 512 --sparsity --port 2222 --ssh-config ssh.conf -o elsewhere "
        "--builds 2 --soak 5m --cold-start --streams 4 --end-to-end --allow-fallback --photo photo.png --cached",
        {
            "model": (lambda seen: seen["deploy"]["jobs"][0].onnx.name, "dynamic.onnx"),
            "host": board("host", "me@there"),
            "port": board("port", 2222),
            "ssh_config": board("config", "ssh.conf"),
            "target": (lambda seen: seen["deploy"]["target"].alias, "jetson"),
            "input_shape": of("input_of", "input_shape", (3, 16, 16)),
            "data": (lambda seen: Path(seen["load_dataset"]["source"]).name, "data.npz"),
            "limit": (lambda seen: seen["take"]["n"], 6),
            "labels": of("load_dataset", "labels", {"a": "1", "b": "2"}),
            "seed": (lambda seen: (seen["load_dataset"]["seed"], seen["take"]["seed"]), (5, 5)),
            "out": (lambda seen: str(seen["deploy"]["out"]), "elsewhere/deploy/jetson-orin-nano-8gb-super"),
            "photo": (lambda seen: [f.name for f in seen["deploy"]["photos"].files], ["photo.png"]),
            "cached": of("run_beside", "again", False),
            "soak": (lambda seen: seen["deploy"]["settings"].soak, 300),
            "batches": (lambda seen: seen["deploy"]["settings"].batches, (2, 4)),
        },
        4,
    ),
    Case(
        "int8.onnx --baseline float.onnx -t jetson-agx-orin-64gb --dla 1 --dry-run",
        {
            "dla": (lambda seen: seen["dry_run"]["settings"].dla, 1),
            "baseline": (lambda seen: [job.onnx.name for job in seen["dry_run"]["jobs"]], ["int8.onnx", "float.onnx"]),
            "dry_run": (lambda seen: len(seen["deploy"].calls), 0),
        },
    ),
    Case("float.onnx --dry-run --data data.npz", {"data": of("dry_run", "scored", True)}),
]


def limit(name: str, wanted: Any) -> tuple[Getter, Any]:
    return lambda seen: getattr(seen["judge"]["limits"], name), wanted


GATE = [
    Case(
        "candidate -b baseline --max-drop 21 --max-latency 22 --max-size 23 --max-macs 24 --max-params 25 --stage quantize "
        "--on-inconclusive pass --on-missing pass --junit junit.xml --summary gate.md --save-baseline saved.json",
        {
            "run": (lambda seen: seen["judge"]["candidate"].name, "candidate"),
            "baseline": (lambda seen: seen["judge"]["baseline"].name, "baseline"),
            "on_inconclusive": (
                lambda seen: (seen["judge"]["limits"].on_inconclusive, seen["to_junit"]["inconclusive_fails"]),
                ("pass", False),
            ),
            "junit": (lambda seen: "<testsuites" in seen.text("junit.xml"), True),
            "summary": (lambda seen: "accuracy" in seen.text("gate.md"), True),
            "save_baseline": (lambda seen: "stages" in json.loads(seen.text("saved.json")), True),
        },
    ),
    Case(
        "candidate -b baseline --limits limits.yaml --max-drop 21 --on-inconclusive fail --junit junit.xml",
        {
            "limits": limit("max_macs", 31.0),
            "max_drop": limit("max_drop", 21.0),
            "on_inconclusive": of("to_junit", "inconclusive_fails", True),
        },
    ),
]
RUN = [
    Case(
        "run.yaml -o there --again prune "
        "--set prune.macs=0.3 --set finetune.lr=0.0123 --device cpu --threads 3 --batch-size 4 --seed 5 "
        "--track tensorboard:events",
        {
            **shared("pruned", "data", "labels"),
            "config": (lambda seen: seen.opening("dense").path.name, "net.safetensors"),
            "output": (lambda seen: (seen.folder / "there" / "manifest.json").is_file(), True),
            "again": (lambda seen: [name for name, _ in seen.calls].count("pruned"), 1),
            "overrides": (
                lambda seen: (seen.config("pruned").macs, seen.config("finetuned").lr, seen.shared("pruned").skip_corrupt),
                (0.3, 0.0123, True),
            ),
            "track": (
                lambda seen: (seen["check"]["destination"], seen["log"]["destination"], str(seen["log"]["folder"])),
                ("tensorboard:events", "tensorboard:events", "there"),
            ),
        },
    ),
    Case("run.yaml", {"seed": (lambda seen: seen.shared("pruned").seed, 9)}),
]
SENSITIVITY = [
    Case(
        "net.safetensors --data data.npz -m fpgm --scope all --calib 7 -o curves.svg --int8 --labels a=1,b=2 --seed 5 "
        f"--threads 3 --skip-corrupt {STATED}",
        OPENED
        | {
            "checkpoint": (lambda seen: seen["load_checkpoint"]["path"].name, "net.safetensors"),
            "data": (lambda seen: Path(seen["load_dataset"]["source"]).name, "data.npz"),
            "method": of("measure", "method", "fpgm"),
            "scope": of("measure", "scope", "all"),
            "calib": (lambda seen: len(seen["measure"]["calibration_x"]), 7),
            "output": (lambda seen: (seen.folder / "curves.svg").is_file(), True),
            "int8": (lambda seen: sum(len(x) for x in seen["ptq"]["batches"]), 7),
            "labels": of("load_dataset", "labels", {"a": "1", "b": "2"}),
            "seed": (lambda seen: (seen["measure"]["seed"], seen["load_dataset"]["seed"]), (5, 5)),
            "skip_corrupt": of("load_dataset", "skip_corrupt", True),
            "threads": (lambda seen: [call["threads"] for call in seen["set_num_threads"].calls], [3]),
        },
    ),
    Case("net.safetensors --data data.npz --device cuda:77", {"device": (lambda seen: "cuda:77" in seen.out.stderr, True)}, 5),
    Case(f"net.safetensors --data data.npz {NAMED}", BOTH),
]
TABLE = {
    "prune": PRUNE,
    "finetune": FINETUNE,
    "quantize": QUANTIZE,
    "export": EXPORT,
    "evaluate": EVALUATE,
    "bench": BENCH,
    "predict": PREDICT,
    "deploy": DEPLOY,
    "gate": GATE,
    "run": RUN,
    "sensitivity": SENSITIVITY,
}


@pytest.mark.parametrize("command", TABLE)
def test_every_option_has_a_row(command: str) -> None:
    module = importlib.import_module(f"rescompress.cli.{COMMANDS[command][0]}")
    built: Any = typer.main.get_command(module.app)
    known = {p.name for p in getattr(built, "commands", {}).get(command, built).params} - COMMON
    made = {word for _, _, word in made_from_settings(command)}  # which test_settings.py is about
    rows = {name for case in TABLE[command] for name in case.arrives}
    assert known - made == rows - made, "an option without a row in TABLE, or the other way round"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks, images, ONNX files, runs and configs."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    api.export_onnx(network(), folder / "dynamic.onnx", batch="dynamic")
    api.export_onnx(network(), folder / "fixed2.onnx", batch=2)
    api.export_onnx(network(), folder / "float.onnx")
    int8 = quantize.ptq(network(), [torch.rand(4, 3, 16, 16)] * 2, QUICK)
    api.export_onnx(int8, folder / "int8.onnx")
    plan = prune.prune(network(), PruneSettings(method="magnitude", ratio=0.25, align=1)).plan
    (folder / "plan.json").write_text(plan.model_dump_json())
    for name in ("candidate", "baseline"):
        write_run(folder / name)
    (folder / "model.py").write_text("")
    Image.new("RGB", (20, 16)).save(folder / "photo.png")
    (folder / "limits.yaml").write_text("max_drop: 30\nmax_macs: 31\n")
    written = {
        "checkpoint": "net.safetensors",
        "data": "data.npz",
        "seed": 9,
        "prune": {},
        "finetune": {},
        "targets": [],
        "skip_corrupt": True,
    }
    (folder / "run.yaml").write_text(json.dumps(written))
    return folder


@pytest.fixture
def seen(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    for file in inputs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    seen = Seen(monkeypatch, tmp_path)
    real = {f: f for f in (data.load_dataset, files.load_checkpoint, measure, quantize.ptq)}
    load_dataset, load_checkpoint, _, ptq = real

    def refuse(*_: Any, **__: Any) -> Any:
        raise ToolMissing("there is no board")

    def measured(candidates: Any, **_: Any) -> Any:
        metrics = benchmark.summarize(
            [1.0] * 20, benchmark.Conditions(device="cpu", runtime="onnxruntime", batch=1, threads=3, precision="fp32")
        )
        return [benchmark.Measured(metrics, (1.0,)) for _ in candidates]

    found = board_probe.Probe("Jetson", None, "trtexec", "10.3.0", None, None, frozenset(), False, None)
    seen.spy(load_dataset, lambda source, spec, **more: load_dataset(source, spec, seed=more.get("seed", 0)))
    seen.spy(load_checkpoint, lambda path, **_: load_checkpoint(path))
    seen.spy(measure, lambda checkpoint, **_: measure(checkpoint, method="magnitude"))
    seen.spy(ptq, lambda checkpoint, batches, *_, **__: ptq(checkpoint, batches, QUICK))
    seen.spy(sensitivity.sensitivities, lambda *_, **__: [])
    seen.spy(benchmark.measure_processes, measured)
    seen.spy(board_probe.probe, lambda board: found)
    seen.spy(remote.deploy, refuse)
    monkeypatch.setattr(ssh.Turn, "__enter__", lambda self: self)  # nobody else wants a board that is not there
    monkeypatch.setattr(ssh.Turn, "__exit__", lambda *_: None)
    seen.spy(track.check, lambda destination: None)
    seen.spy(track.log, lambda destination, folder, **_: "there")
    for function in (
        onnx_kernels.kernels_of,
        onnx_kernels.input_of,
        latency.predict_kernels,
        board_work.dry_run,
        pipeline.run_beside,
        picture.draw,
        gate.judge,
        render.to_junit,
    ):
        seen.spy(function)
    with watch_images(monkeypatch) as readers:
        seen.spies["evaluate"] = readers.spy
        seen.spies["take"] = Spy(data.Split.take)
        monkeypatch.setattr(data.Split, "take", lambda self, n, seed: seen.spies["take"](self, n, seed))
        seen.spies["runner"] = Spy(onnxruntime.runner)
        monkeypatch.setattr(onnxruntime, "runner", seen.spies["runner"])
        seen.spies["set_num_threads"] = Spy(lambda threads: None)
        monkeypatch.setattr(torch, "set_num_threads", seen.spies["set_num_threads"])
        yield seen


CASES = [pytest.param(command, case, id=f"{command}-{i}") for command, cases in TABLE.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("command", "case"), CASES)
def test_options_arrive(rescompress: Any, seen: Seen, command: str, case: Case) -> None:
    seen.out = rescompress(command, *case.words.split(), cwd=seen.folder, code=case.code)
    lost = {}
    for name, (find, wanted) in case.arrives.items():
        try:
            found = find(seen)
        except (AssertionError, AttributeError, KeyError, StopIteration, OSError) as e:
            found = f"nothing ({type(e).__name__}: {e})"
        if found != wanted and str(found) != str(wanted):
            lost[name] = f"{found!r} arrived, not {wanted!r}"
    assert lost == {}
