"""The documents that ``--json`` prints, as models: what a reader may rely on. `SCHEMAS` names every document with a schema.

Keys may be added to a document, so that a schema allows more than it names; the tests do not.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rescompress.core.manifest import StageResult

Severity = Literal["error", "warning", "note"]
Verdict = Literal["pass", "fail", "inconclusive"]


class Document(BaseModel):
    """What all documents share: more keys may stand in them."""

    model_config = ConfigDict(extra="allow")


class Finding(Document):
    """One finding of ``lint``."""

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str


class Latency(Document):
    """A latency with where it is from."""

    p50_ms: float
    provenance: Literal["measured", "predicted"]
    device: str | None
    runtime: str | None
    precision: str | None
    threads: int | None
    batch: int | None
    low: float | None
    high: float | None
    model: str | None
    power_mode: str | None
    n: int | None


class Row(Document):
    """One row of the trade-off table; each metric is a `Metric` without what is not known."""

    run: str
    created: str
    stage: str
    status: Literal["done", "skipped", "failed", "unfinished"]
    reason: str | None
    metrics: dict[str, dict[str, Any]]
    against_dense: dict[str, Any]
    dominated: bool
    best: list[str]
    note: str


class Totals(Document):
    """What a network comes to."""

    params: int
    macs: int
    size_bytes: int
    conv_layers: int
    blocks: int
    depth: int


class Inspect(Document):
    """``inspect --json``: what a checkpoint is."""

    path: str
    architecture: str
    arch: str
    format: str
    container: str | None
    origin: dict[str, Any] | None
    published: dict[str, Any] | None
    input_shape: list[int]
    preprocessing: dict[str, Any]
    num_classes: int | None
    outputs: list[dict[str, Any]]
    labels: list[str] | None
    notes: list[str]
    quantization: dict[str, Any] | None
    totals: Totals
    blocks: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    spec_sha256: str


class Named(Document):
    """Something with a name and a line about it."""

    name: str
    description: str


class Formats(Document):
    """``formats --json``: what can be read, and what can be stated about it."""

    formats: list[Named]
    architectures: list[str]
    preprocessing: list[str]
    preprocessing_keys: dict[str, str]
    arch_options: dict[str, str]


class Target(Document):
    """One entry of ``targets --json``."""

    name: str
    device: str
    runtime: str
    precisions: list[str]
    sm: str | None
    sm_count: int | None
    align: dict[str, int]
    opset: int
    profile: str
    tensorrt: str | None
    jetpack: str | None
    strongly_typed: bool | None
    peak_tops: dict[str, float] | None
    predicts_latency: bool
    facts: dict[str, Any]
    alias_of: str | None = None


class Method(Named):
    """One entry of ``methods --json``."""

    needs_data: bool


class Piece(Document):
    """Something that may be installed."""

    name: str
    found: str | None
    required: bool
    purpose: str
    remedy: str


class Doctor(Document):
    """``doctor --json``: what is installed here."""

    environment: dict[str, Any]
    pieces: list[Piece]
    problem: str | None


class Prune(Document):
    """``prune --json``."""

    output: str
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    method: str
    widths: dict[str, int]
    widths_before: dict[str, int]
    dropped_blocks: list[str]
    seconds: float
    achieved_ratio: float
    notes: list[str]
    plan: str
    top1_before: float | None = None
    top1_after: float | None = None


class Finetune(Document):
    """``finetune --json``."""

    output: str
    top1: float = Field(ge=0, le=1)
    n: int
    epochs: list[dict[str, Any]]


class Quantize(Document):
    """``quantize --json``."""

    output: str
    mode: Literal["ptq", "qat"]
    profile: str
    top1_before: float | None
    top1_after: float | None


class Curve(Document):
    """What removing more and more of a group costs."""

    order: list[int]
    error: list[float]


class Sensitivity(Document):
    """``sensitivity --json``."""

    method: str
    unit: str
    groups: dict[str, Curve]
    blocks: dict[str, float] | None
    picture: str | None
    int8: list[dict[str, Any]] | None = None


class Run(Document):
    """``run --json`` and ``demo --json``."""

    folder: str
    manifest: str
    ran: list[str]
    reused: list[str]
    stages: list[StageResult]
    rows: list[Row]


class Init(Document):
    """``init --json``."""

    output: str
    config: str


class Export(Document):
    """``export --json``."""

    target: str
    onnx: str
    engine: str | None
    engine_status: str
    precision: str
    opset: int
    size_bytes: int
    macs: int
    parity: dict[str, Any]
    parity_in_integers: dict[str, Any] | None
    float16: dict[str, Any] | None
    lint: list[Finding]
    validity_gate: Any
    latency: Latency | None
    archive: str | None
    files: list[str]
    notes: list[str]
    top1: float | None = None


class Deploy(Document):
    """``deploy --json``: the best engine, and all of them in ``results``; with ``--dry-run`` the commands alone."""

    target: str
    commands: list[str]
    notes: list[str]
    verdict: Literal["measured", "inconclusive"] | None = None
    results: list[dict[str, Any]] | None = None
    manifest: str | None = None


class Evaluate(Document):
    """``evaluate --json``."""

    top1: float = Field(ge=0, le=1)
    top5: float | None = None
    n: int
    runtime: str
    std_error: float
    split: str
    notes: list[str]


class Bench(Document):
    """One file measured: ``bench --json`` of one file, or a row of it."""

    model: str
    target: str
    p50_ms: float
    p50_low_ms: float | None
    p50_high_ms: float | None
    p90_ms: float
    p99_ms: float
    mean_ms: float
    spread: float
    images_per_s: float
    n: int
    device: str | None
    runtime: str
    precision: str | None
    threads: int | None
    batch: int | None
    provenance: Literal["measured"]
    latency_runs: list[float]
    runtime_options: dict[str, Any] | None
    notes: list[str] | None = None


class Benches(Document):
    """``bench --json`` of several files."""

    rows: list[Bench]
    notes: list[str]


class Kernel(Document):
    """A kernel of a prediction."""

    name: str
    kind: str
    ms: float
    overhead_ms: float
    compute_ms: float
    memory_ms: float


class Predict(Document):
    """``predict --json``."""

    model_file: str
    target: str
    alias: str | None
    p50_ms: float
    low_ms: float
    high_ms: float
    provenance: Literal["predicted"]
    device: str
    precision: str
    batch: int
    power_mode: str
    sm_count: int
    gpu_mhz: float
    emc_mhz: float
    model: str
    notes: list[str]
    layers: list[Kernel]


class Compare(Document):
    """``compare --json``."""

    rows: list[Row]
    trends: list[dict[str, Any]] | None = None


class Report(Document):
    """``report --json``."""

    report: str
    size_bytes: int
    runs: list[str]
    model_card: str | None = None
    tracked: list[str] | None = None


class Check(Document):
    """One check of a gate."""

    name: str
    verdict: Verdict
    value: float | None
    limit: float | None
    unit: str
    interval: list[float] | None
    bounds: list[float] | None
    baseline: str
    candidate: str
    stale: bool
    samples_needed: int | None
    message: str


class Gate(Document):
    """``gate --json``; with ``--save-baseline`` alone only where the baseline was written."""

    baseline: str
    verdict: Verdict | None = None
    checks: list[Check] | None = None
    stale_baseline: list[str] | None = None
    notes: list[str] | None = None
    candidate: str | None = None


class Front(Document):
    """``search --json`` and ``search front --json``."""

    name: str
    objectives: list[str]
    units: dict[str, str]
    front: list[dict[str, Any]]
    concluded: bool
    dense: dict[str, Any] | None = None
    folder: str | None = None


class SearchStatus(Document):
    """``search status --json``."""

    name: str
    trials: int
    states: dict[str, int]
    rungs: list[dict[str, Any]]
    rank_correlation: list[dict[str, Any]]
    running: list[dict[str, Any]]
    concluded: bool
    stopping: bool


class SearchBest(Document):
    """``search best --json``: a row of the front."""

    trial: int
    choices: dict[str, Any]
    held_out_top1: float
    costs: dict[str, float]
    bands: dict[str, list[float]]
    clear: bool
    folder: str
    top1: float
    n: int
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    max_drop: float
    by: str
    words: str
    passed: list[int]
    unjudged: int
    output: str | None = None


class SearchWork(Document):
    """``search worker --json``: how many candidates came to what."""

    finished: dict[str, int]


class SearchStop(Document):
    """``search stop --json``."""

    stopping: Literal[True]


class Schema(Document):
    """One entry of ``schema --json``."""

    name: str
    about: Literal["output", "file"]
    description: str


OUTPUTS: dict[str, Any] = {
    "bench": Bench | Benches,
    "compare": Compare,
    "demo": Run,
    "deploy": Deploy,
    "doctor": Doctor,
    "evaluate": Evaluate,
    "export": Export,
    "finetune": Finetune,
    "formats": Formats,
    "gate": Gate,
    "init": Init,
    "inspect": Inspect,
    "lint": list[Finding],
    "methods": list[Method],
    "predict": Predict,
    "prune": Prune,
    "quantize": Quantize,
    "report": Report,
    "run": Run,
    "schema": list[Schema],
    "search": Front | SearchStatus | SearchBest | SearchWork | SearchStop,
    "sensitivity": Sensitivity,
    "targets": list[Target],
}
"""By command, what it prints with ``--json``."""

FILES: dict[str, tuple[str, str]] = {
    "config-file": ("rescompress.runs.config", "RunConfig"),
    "device-file": ("edge_targets.device", "Device"),
    "limits-file": ("rescompress.show.gate.limits", "Limits"),
    "manifest-file": ("rescompress.core.manifest", "Manifest"),
    "outcomes-file": ("rescompress.core.outcomes", "Outcomes"),
    "plan-file": ("compress.prune.plan", "PruningPlan"),
    "spec": ("rescompress.core.spec", "ModelSpec"),
}
"""By name, the model of what stands in a file; imported when its schema is asked for."""

SCHEMAS = (*OUTPUTS, *FILES)


def described() -> list[dict[str, str]]:
    """Return name, kind and first line of every document with a schema."""
    found = [{"name": name, "about": "output", "description": f"what `{name} --json` prints"} for name in OUTPUTS]
    for name, (module, attribute) in FILES.items():
        about = (getattr(importlib.import_module(module), attribute).__doc__ or "").partition("\n")[0].rstrip(".")
        found.append({"name": name, "about": "file", "description": about})
    return found


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a document.

    Args:
        name: One of `SCHEMAS`.
    """
    if name in OUTPUTS:
        kind = OUTPUTS[name]
    else:
        module, attribute = FILES[name]
        kind = getattr(importlib.import_module(module), attribute)
    found = TypeAdapter(kind).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"rescompress/{name}", **found}
