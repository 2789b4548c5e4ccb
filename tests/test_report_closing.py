"""The last lines of a run say what the manifest says, and the demo is what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Command
from report_factory import CLASSES, latency, stage, write_run

from compress.checkpoints import load_checkpoint
from rescompress.cli.report import opened
from rescompress.core.artifact import Artifact
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, accuracy, counted
from rescompress.show.report.closing import closing_lines

EXAMPLES = Path(__file__).parents[1] / "examples"


def made_run(now: Metric, before: Metric, n: int = 200) -> Manifest:
    dense = StageResult(
        stage="dense",
        status="done",
        metrics={"top1": accuracy(180, 200, runtime="torch"), "size_bytes": counted(6_000_000, "bytes")},
    )
    small = StageResult(
        stage="quantize",
        status="done",
        metrics={"top1": accuracy(n - 30, n, runtime="torch"), "size_bytes": counted(500_000, "bytes")},
        details={"precision": "int8"},
    )
    target = StageResult(stage="target:cpu", status="done", metrics={"p50_ms": now, "dense_p50_ms": before})
    return Manifest(stages=(dense, small, target))


def test_gains_are_ratios_of_the_figures_in_the_manifest() -> None:
    out, gained, after = closing_lines(made_run(latency(2.0), latency(9.0, precision="fp32")), Path("run"), example=False)
    assert "top-1 85.00" in out
    assert "500 kB" in out
    assert "ONNX file 12.0 times smaller (6.00 MB to 500 kB)" in gained
    assert "-5.00 points" in gained
    assert "4.5 times faster on cpu (9.00 ms to 2.00 ms, measured)" in gained
    assert after == "next:     rescompress report run -o run/report.html --open"


@pytest.mark.parametrize(
    ("kind", "told"), [("onnx", "500 kB)"), ("checkpoint", "500 kB as an ONNX file)"), (None, "500 kB as an ONNX file)")]
)
def test_a_size_is_not_said_of_a_file_that_has_another(kind: str | None, told: str) -> None:
    """That of every stage is its network's as an ONNX file, and a stage may have made a checkpoint alone."""
    run = made_run(latency(2.0), latency(9.0))
    files = (Artifact(kind=kind, path=f"made.{kind}", sha256="0", size_bytes=447_784),) if kind else ()
    small = run.stages[1].model_copy(update={"outputs": files})
    out, *_ = closing_lines(run.with_stage(small), Path("run"), example=False)
    assert out.startswith(f"came out: {files[0].path if files else 'quantize'} (int8, ")
    assert out.endswith(told)


def test_a_loss_is_said_as_one() -> None:
    _, gained, _ = closing_lines(made_run(latency(9.0), latency(2.0, precision="fp32")), Path("run"), example=True)
    assert "4.5 times slower on cpu" in gained


def test_figures_that_do_not_compare_are_not_compared() -> None:
    predicted = closing_lines(made_run(latency(2.0, provenance="predicted"), latency(9.0)), Path("run"), example=True)
    assert "cpu" not in predicted[1]
    other = closing_lines(made_run(latency(2.0), latency(9.0), n=100), Path("run"), example=True)
    assert "on other images" in other[1]
    assert "points" not in other[1]


def test_without_a_network_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert closing_lines(Manifest(stages=()), tmp_path, example=True) == []
    assert closing_lines(Manifest(stages=(stage(tmp_path, "dense"),)), tmp_path, example=True) == []
    assert len(closing_lines(write_run(tmp_path), tmp_path, example=True)) == 3
    assert len(CLASSES) == 10


def test_the_page_opens_only_where_there_is_a_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or True)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not opened(tmp_path / "report.html")
    assert asked == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert opened(tmp_path / "report.html")
    assert asked == [(tmp_path / "report.html").resolve().as_uri()]


def test_report_writes_the_page_and_says_that_it_cannot_show_it(rescompress: Command, tmp_path: Path) -> None:
    write_run(tmp_path)
    done = rescompress("report", str(tmp_path), "-o", str(tmp_path / "p.html"), "--open", DISPLAY="", WAYLAND_DISPLAY="")
    assert "no display here" in done.stderr
    assert (tmp_path / "p.html").stat().st_size > 10_000


def test_the_network_of_the_demo_has_something_to_compress() -> None:
    file = EXAMPLES / "resnet18_digits.safetensors"
    assert file.stat().st_size <= 6_000_000
    layers = walk(load_checkpoint(file).spec)
    assert total_macs(layers) > 500e6
    assert total_params(layers) < 3e6
