"""Trackers: TensorBoard files against TensorBoard's own reader, MLflow against its own store."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Command
from hypothesis import given
from hypothesis import strategies as st
from report_factory import write_run

from rescompress.core.errors import BadInput, ToolMissing
from rescompress.show import track
from rescompress.show.track import tensorboard


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of an event file, each with its two checksums checked."""
    at = 0
    while at < len(content):
        head = content[at : at + 12]
        if len(head) < 12 or struct.unpack("<I", head[8:])[0] != tensorboard._masked_crc(head[:8]):
            raise ValueError("the length of a record is damaged")
        size = struct.unpack("<Q", head[:8])[0]
        data, check_sum = content[at + 12 : at + 12 + size], content[at + 12 + size : at + 16 + size]
        if len(check_sum) < 4 or struct.unpack("<I", check_sum)[0] != tensorboard._masked_crc(data):
            raise ValueError("a record is damaged")
        yield data
        at += 16 + size


def test_crc_of_the_standard_vectors() -> None:
    """RFC 3720, B.4."""
    assert tensorboard.crc32c(b"123456789") == 0xE3069283
    assert tensorboard.crc32c(bytes(32)) == 0x8A9136AA
    assert tensorboard.crc32c(b"\xff" * 32) == 0x62A8AB43


@given(st.binary(min_size=1, max_size=40), st.integers(0, 2000))
def test_a_flipped_bit_is_found(data: bytes, position: int) -> None:
    content = bytearray(tensorboard._record(data))
    assert list(records(bytes(content))) == [data]
    position %= 8 * len(content)
    content[position // 8] ^= 1 << position % 8
    with pytest.raises(ValueError, match="damaged"):
        list(records(bytes(content)))


def test_event_file_holds_curves_and_figures(tmp_path: Path) -> None:
    manifest = write_run(tmp_path / "run")
    where = track.log(f"tensorboard:{tmp_path / 'logs'}", tmp_path / "run")
    events = list(records(Path(where).read_bytes()))
    assert b"brain.Event:2" in events[0]
    figures = sum(len(s.metrics) for s in manifest.stages)
    assert len(events) == 1 + figures + 3 * 2, "loss and top1 of three epochs; the epoch itself is the step"
    loss = [e for e in events if b"finetune/train/loss" in e]
    assert [struct.unpack("<f", e[-4:])[0] for e in loss] == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_runs_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place / "run")
    logs = f"tensorboard:{tmp_path / 'logs'}"
    first, second, again = (track.log(logs, tmp_path / place / "run") for place in ("a", "b", "b"))
    assert second == again != first
    assert sorted(str(f) for f in (tmp_path / "logs").rglob("*tfevents*")) == sorted({first, second})
    assert Path(first).parent.name == "run"


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path / "run")
    track.log(f"tensorboard:{tmp_path / 'logs'}", tmp_path / "run")
    read = EventAccumulator(str(tmp_path / "logs" / "run"))
    read.Reload()
    curve = read.Scalars("finetune/train/loss")
    assert [e.step for e in curve] == [1, 2, 3]
    assert [e.value for e in curve] == pytest.approx([1.0, 1 / 2, 1 / 3])
    assert read.Scalars("target/cpu/p50_ms")[0].value == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("address", "uri"),
    [("sqlite:///{}/runs.db", "sqlite:///{}/runs.db"), ("{}/tracking", "sqlite:///{}/tracking/mlflow.db")],
)
def test_mlflow_keeps_settings_figures_curves_and_files(
    tmp_path: Path, address: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = uri.format(tmp_path)
    write_run(tmp_path / "run")
    assert "already" not in track.log(f"mlflow:{address.format(tmp_path)}#trial", tmp_path / "run")
    assert "already" in track.log(f"mlflow:{address.format(tmp_path)}#trial", tmp_path / "run")
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert len(runs) == 1
    data = runs[0].data
    assert data.params["prune.macs"] == "0.5"
    assert data.metrics["quantize/top1"] == pytest.approx(0.88)
    assert data.metrics["target/cpu/p50_ms"] == pytest.approx(1.2)
    assert data.tags["latency.target_jetson"].startswith("predicted for Jetson Orin Nano")
    assert data.tags["stage.target_rtx-4090"] == "skipped: tensorrt_rtx is not installed"
    history = client.get_metric_history(runs[0].info.run_id, "finetune/train/loss")
    assert [m.step for m in history] == [1, 2, 3]
    names = {a.path for a in client.list_artifacts(runs[0].info.run_id)}
    assert {"manifest.json", "dense"} <= names
    assert runs[0].info.status == "FINISHED"
    assert not (tmp_path / "mlruns").exists(), "nothing is left in the working folder"


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="MLflow is installed")
def test_a_missing_mlflow_is_told_before_the_work() -> None:
    with pytest.raises(ToolMissing, match="rescompress\\[mlflow\\]"):
        track.check("mlflow:sqlite:///x.db")


def test_bad_destinations_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="tensorboard"):
        track.check("tensorbord:logs")
    with pytest.raises(BadInput, match="mlflow:sqlite"):
        track.check("mlflow")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file"):
        track.check(f"tensorboard:{tmp_path / 'file'}")


def test_cli_records_finished_runs(rescompress: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    logs = f"tensorboard:{tmp_path / 'logs'}"
    done = rescompress("report", tmp_path / "run", "-o", tmp_path / "r.html", "--track", logs, "--json", code=0)
    assert Path(json.loads(done.stdout)["tracked"][0]).is_file()
