"""Runs as the pipeline writes them, made up but of realistic figures, for the tests of tables, reports and gates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rescompress.core.artifact import Artifact, write_text
from rescompress.core.details import TargetDetails
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, accuracy, counted
from rescompress.core.outcomes import Outcomes, samples_digest

CLASSES = tuple(f"class {k}" for k in range(10))


def digest(n: int, name: str = "val") -> str:
    return samples_digest([f"{name}/{i}" for i in range(n)])


def outcomes_with(n: int, n_lost: int, n_won: int, *, n_wrong: int = 40, name: str = "val") -> tuple[Outcomes, Outcomes]:
    """Return outcomes of a baseline and a candidate: `n_lost` only the baseline has right, `n_won` only the other."""
    base = [True] * n_lost + [False] * n_won + [False] * n_wrong + [True] * (n - n_lost - n_won - n_wrong)
    cand = [False] * n_lost + [True] * n_won + [False] * n_wrong + [True] * (n - n_lost - n_won - n_wrong)
    order = list(range(n))
    random.Random(1).shuffle(order)
    return (
        Outcomes.pack([base[i] for i in order], digest(n, name), CLASSES),
        Outcomes.pack([cand[i] for i in order], digest(n, name), CLASSES),
    )


def latency(
    value: float,
    *,
    provenance: str = "measured",
    device: str = "cpu",
    runtime: str = "openvino",
    precision: str = "int8",
    **extra: Any,
) -> Metric:
    """Return a latency, by default one measured on this machine's CPU."""
    facts: dict[str, Any] = {"threads": 2 if provenance == "measured" else None, "batch": 1, "n": 500, **extra}
    if provenance == "predicted":
        facts = {"low": value * 0.8, "high": value * 1.3, "model": "roofline-1", "batch": 1, **extra}
    return Metric(
        value=value,
        unit="ms",
        provenance=provenance,
        device=device,
        runtime=runtime,
        precision=precision,
        **facts,  # type: ignore[arg-type]
    )


def stage(
    folder: Path, name: str, *, outcomes: Outcomes | None = None, details: dict[str, Any] | None = None, **metrics: Any
) -> StageResult:
    """Return a finished stage; its outcomes are written below `folder`. Integers among `metrics` are counts."""
    found: dict[str, Metric] = {}
    outputs: tuple[Artifact, ...] = ()
    if outcomes is not None:
        found["top1"] = accuracy(outcomes.correct, outcomes.n, runtime="torch")
        path = folder / name.replace(":", "-") / "outcomes.json"
        write_text(path, outcomes.model_dump_json())
        outputs = (Artifact.of("outcomes", path, folder),)
    units = {"macs": "macs", "params": "params", "size_bytes": "bytes"}
    for key, value in metrics.items():
        found[key] = value if isinstance(value, Metric) else counted(value, units[key])
    return StageResult(
        stage=name, status="done", metrics=found, outputs=outputs, duration_s=3.0, details=details or {}, key=f"key-{name}"
    )


def write_run(
    folder: Path,
    *,
    final: Outcomes | None = None,
    n: int = 1000,
    p50_ms: float = 1.2,
    runs_ms: Sequence[float] | None = None,
    created: str = "2026-01-02T03:04:05Z",
    macs: int = 34_000_000,
    params: int = 230_000,
    size_bytes: int = 260_000,
    jetson_ms: float = 0.31,
    dense_runs_ms: Sequence[float] | None = None,
    openvino: str = "2026.4.1",
) -> Manifest:
    """Write a run of five stages and two targets, and one target that was skipped; return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    dense, usual = outcomes_with(n, round(n * 0.02), round(n * 0.01), n_wrong=round(n * 0.1))
    last = final if final is not None else usual
    widths = {f"block{i}.conv1": w for i, w in enumerate([16] * 5 + [32] * 5 + [64] * 5)}
    narrow = {k: w // 2 + (i % 3) for i, (k, w) in enumerate(widths.items())}
    curves = {
        k: {"order": list(range(w)), "error": [(j / w) ** 2 * (0.1 + 0.02 * i) for j in range(w + 1)]}
        for i, (k, w) in enumerate(widths.items())
    }
    half = p50_ms if runs_ms is None else sorted(runs_ms)[len(runs_ms) // 2]
    layers = [{"name": k, "ms": 0.02 + 0.001 * i} for i, k in enumerate(widths)]
    manifest = Manifest(
        rescompress_version="0.1.0",
        created=created,
        config={"checkpoint": "resnet32.th", "data": "cifar10", "seed": 0, "prune": {"method": "reconstruct", "macs": 0.5}},
        environment={
            "python": "3.12.1",
            "platform": "Linux",
            "cpu": "Xeon",
            "threads": 2,
            "packages": {"torch": "2.14.0", "openvino": openvino},
        },
        stages=(
            stage(folder, "dense", outcomes=dense, macs=69_000_000, params=464_000, size_bytes=1_870_000),
            stage(
                folder,
                "prune",
                outcomes=outcomes_with(n, round(n * 0.06), 0, n_wrong=round(n * 0.1))[1],
                macs=macs,
                params=params,
                size_bytes=4 * params,
                details={"widths_before": widths, "widths_after": narrow, "curves": curves},
            ),
            stage(
                folder,
                "finetune",
                outcomes=usual,
                macs=macs,
                params=params,
                size_bytes=4 * params,
                details={"epochs": [{"epoch": e, "loss": 1.0 / (e + 1), "top1": 0.8 + 0.02 * e} for e in range(3)]},
            ),
            stage(folder, "quantize", outcomes=last, macs=macs, params=params, size_bytes=size_bytes),
            stage(folder, "export", outcomes=last, macs=macs, params=params, size_bytes=size_bytes),
            stage(
                folder,
                "target:cpu",
                outcomes=last,
                size_bytes=size_bytes,
                p50_ms=latency(half),
                dense_p50_ms=latency(2.2 * half, precision="fp32"),
                fp32_p50_ms=latency(1.7 * half, precision="fp32"),
                p99_ms=latency(half * 1.4),
                details={"latency_runs": list(runs_ms or [half * (1 + 0.004 * k) for k in range(-2, 3)]), "layers": layers},
            ),
            stage(
                folder,
                "target:jetson",
                size_bytes=size_bytes,
                p50_ms=latency(jetson_ms, provenance="predicted", device="Jetson Orin Nano 8GB", runtime="tensorrt"),
                details={"engine_status": "no TensorRT here; build script written", "layers": layers},
            ),
            StageResult(stage="target:rtx-4090", status="skipped", reason="tensorrt_rtx is not installed"),
        ),
    )
    if dense_runs_ms is not None:
        cpu, first = manifest.stages[5], manifest.stages[0]
        assert cpu.stage == "target:cpu"
        manifest = manifest.with_stage(
            cpu.model_copy(
                update={
                    "details": TargetDetails(**cpu.details.given() | {"dense_latency_runs": list(dense_runs_ms)}),
                    "metrics": {**cpu.metrics, "dense_p50_ms": latency(median(dense_runs_ms), precision="fp32")},
                }
            )
        )
        onnx = folder / "dense.onnx"
        onnx.write_bytes(b"the dense network".ljust(1_870_000))
        artifact = Artifact.of("onnx", onnx, folder)
        manifest = manifest.with_stage(first.model_copy(update={"outputs": (*first.outputs, artifact)}))
    manifest.save(folder)
    return manifest
