"""A model card: what the network is, its figures with their provenance, how it was made, what to beware of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rescompress.core.details import DenseDetails, QuantizeDetails
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.text import code_span, markdown
from rescompress.show.figures.columns import provenance, scaled
from rescompress.show.figures.tables import DENSE, processes, rows_of, run_row, to_markdown


def model_card(name: str, manifest: Manifest) -> str:
    """Return the model card of a run as Markdown, with front matter that model hubs read.

    Args:
        name: Of the run.
        manifest: The run.
    """
    tags = ["resnet", "image-classification", "onnx"]
    stages = {s.stage for s in manifest.stages if s.status == "done"}
    tags += [tag for tag, stage in (("pruned", "prune"), ("int8", "quantize")) if stage in stages]
    parts = [
        "---",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {markdown(name)}",
        "",
        markdown(described(manifest)),
        "",
        "## Figures",
        "",
        to_markdown(rows_of(manifest)).rstrip(),
        "",
        "In brackets: points of difference from the dense network for accuracies, the ratio to it for the rest. "
        "Accuracies are given with their standard error.",
        "",
        "## Where the figures come from",
        "",
        *_origins(manifest),
        "",
        "## How it was made",
        "",
        f"With rescompress {markdown(manifest.rescompress_version) or '(version unknown)'}, "
        f"{markdown(manifest.created) or 'at an unknown time'}.",
        "",
        *_list(manifest.config),
        "",
        "Environment:",
        "",
        *_list(manifest.environment),
        *(f"- {markdown(text)}" for text in manifest.made_elsewhere),
        "",
        "## Files",
        "",
        *_files(manifest),
        "",
        "## Beware",
        "",
        *_limits(manifest),
    ]
    return "\n".join(parts).rstrip() + "\n"


def described(manifest: Manifest) -> str:
    """Return what the network is, in one or two sentences."""
    dense = manifest.stage(DENSE)
    told = dense.details_as(DenseDetails) if dense else None
    arch = told.arch if told else None
    made = [
        word
        for kind, word in (("prune", "pruned"), ("finetune", "fine-tuned"), ("quantize", "quantized to INT8"))
        if any(s.kind == kind and s.status == "done" for s in manifest.stages)
    ]
    row = run_row(manifest, "")
    text = f"A {arch or 'ResNet'} for image classification" + (f", {', '.join(made)}." if made else ".")
    macs = row.metrics.get("macs")
    params = row.metrics.get("params")
    if macs is not None and params is not None:
        text += f" It has {scaled(params.value)} parameters and takes {scaled(macs.value)} multiply-accumulates per image."
    return text


def _origins(manifest: Manifest) -> list[str]:
    lines = ["- MACs, parameters and the sizes of the ONNX files are counted."]
    measured = next((s.metrics["top1"] for s in reversed(manifest.stages) if "top1" in s.metrics), None)
    if measured is not None:
        data = manifest.config.get("data")
        lines.append(
            f"- Accuracies are measured on {measured.n or 'an unknown number of'} samples"
            + (f" of {code_span(_shown(data))}." if data else ".")
        )
    for stage in manifest.stages:
        latency = stage.metrics.get("p50_ms")
        if latency is not None:
            band = "" if latency.low is None or latency.high is None else f", {latency.low:.3g} to {latency.high:.3g} ms"
            spread = processes(stage) or (band if latency.provenance == "predicted" else "")
            lines.append(f"- Latency on {markdown(stage.target or stage.stage)}: {markdown(provenance(latency))}{spread}.")
    return lines


def stated(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings as texts by name; those that say nothing are left out, and where files are on the machine."""
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.append((key, ", ".join(f"{k}: {_shown(v)}" for k, v in value.items() if v not in (None, [], ()))))
        elif value is not None:
            found.append((key, _shown(value)))
    return found


def _list(values: Mapping[str, Any]) -> list[str]:
    lines = [f"- {markdown(key)}" + (f": {code_span(text)}" if text else "") for key, text in stated(values)]
    return lines or ["- not recorded"]


def _shown(value: Any) -> str:
    """Return a setting as text; of a path on the machine that made the run, the name alone."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _files(manifest: Manifest) -> list[str]:
    kinds = ("onnx", "engine", "checkpoint")
    found: list[tuple[StageResult, str]] = []
    for stage in manifest.stages:
        found += [
            (stage, f"- {code_span(a.path)} ({markdown(a.kind)}, {a.size_bytes} bytes, sha256 {code_span(a.sha256)})")
            for a in stage.outputs
            if a.kind in kinds
        ]
    return [line for _, line in found] or ["- none recorded"]


def _limits(manifest: Manifest) -> list[str]:
    lines = ["- The accuracy holds for data like the evaluation data; on other data it must be measured again."]
    if any(m.provenance == "predicted" for s in manifest.stages for m in s.metrics.values()):
        lines.append("- Predicted latencies come from a model of the device; measure on the device before relying on them.")
    for stage in manifest.stages:
        details = stage.details_as(QuantizeDetails)
        if details is not None and details.kept == "ptq" and (notes := details.notes):
            lines.append(f"- Stage {code_span(stage.stage)}: {markdown(notes[0])}.")
        if stage.status != "done":
            lines.append(f"- Stage {code_span(stage.stage)} was {stage.status}: {markdown(stage.reason or 'no reason given')}.")
    return lines
