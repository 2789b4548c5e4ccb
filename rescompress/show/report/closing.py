"""The last lines of a run on the terminal: what came out, what it gained, what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rescompress.core.manifest import Manifest, StageResult
from rescompress.show.figures.columns import duration, percent, quality_of, size
from rescompress.show.figures.tables import DENSE, figure, precision_of


def closing_lines(manifest: Manifest, folder: Path, *, example: bool) -> list[str]:
    """Return at most three lines about a finished run; nothing where there is no network to speak of.

    Args:
        manifest: The run.
        folder: Where it lies.
        example: Whether the run is one that comes with the package: the next step is then one's own network.
    """
    done = [s for s in manifest.stages if s.status == "done"]
    dense = manifest.stage(DENSE)
    last = next((s for s in reversed(done) if s.target is None and quality_of(s.metrics) and s.stage != DENSE), None)
    if dense is None or last is None:
        return []
    gained = [*_smaller(manifest, dense, last), *_faster(done)]
    page = folder / "report.html"
    if example:
        next_step = "rescompress init YOUR.pt --data YOUR_IMAGES/ --target jetson, then rescompress run rescompress.yaml"
    else:
        next_step = f"rescompress report {shlex.quote(str(folder))} -o {shlex.quote(str(page))} --open"
    return [
        f"came out: {_network(manifest, last)}",
        f"gained:   {'; '.join(gained) or 'nothing that was measured'}",
        f"next:     {next_step}",
    ]


def _network(manifest: Manifest, last: StageResult) -> str:
    quality, bytes_ = quality_of(last.metrics) or "top1", figure(manifest, last, "size_bytes")
    good = f"{'top-1' if quality == 'top1' else quality} {percent(last.metrics[quality])}"
    made = next((a for a in reversed(last.outputs) if a.kind in ("onnx", "checkpoint")), None)
    as_onnx = "" if made is not None and made.kind == "onnx" else " as an ONNX file"
    facts = [precision_of(last) or "", good, size(bytes_) + as_onnx if bytes_ is not None else ""]
    return f"{made.path if made is not None else last.stage} ({', '.join(f for f in facts if f)})"


def _smaller(manifest: Manifest, dense: StageResult, last: StageResult) -> list[str]:
    found = []
    before, after = dense.metrics.get("size_bytes"), figure(manifest, last, "size_bytes")
    if before is not None and after is not None and after.value:
        found.append(f"ONNX file {_times(before.value / after.value, 'smaller')} ({size(before)} to {size(after)})")
    first, now = dense.metrics.get("top1"), last.metrics.get("top1")
    if first is not None and now is not None:
        if first.n == now.n:
            found.append(f"top-1 {100 * (now.value - first.value):+.2f} points")
        else:
            found.append(f"top-1 of the dense network {percent(first)}, on other images")
    return found


def _faster(done: list[StageResult]) -> list[str]:
    """Return how much faster each target has become, measured before predicted, the best first."""
    found: list[tuple[bool, float, str]] = []
    for stage in done:
        now, before = stage.metrics.get("p50_ms"), stage.metrics.get("dense_p50_ms")
        if stage.target is None or now is None or before is None or now.value <= 0 or now.provenance != before.provenance:
            continue
        times = before.value / now.value
        words = _times(times, "faster") if times >= 1 else f"{1 / times:.1f} times slower"
        text = f"{words} on {stage.target} ({duration(before.value)} to {duration(now.value)}, {now.provenance})"
        found.append((now.provenance != "measured", -times, text))
    return [text for _, _, text in sorted(found)]


def _times(ratio: float, word: str) -> str:
    return f"{ratio:.1f} times {word}"
