"""Rules about conditions: under the same ones, in proportion, only if large, only once."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_factory import latency

from compress.data.sources import folders
from compress.data.splits import MemoryStore, Split
from edge_targets.kernels import fuse
from rescompress.core.graph import INPUT, Network, Node, Output
from rescompress.core.metric import Metric, accuracy, counted
from rescompress.core.operations import Add, Conv, Input, Relu
from rescompress.core.spec import Preprocessing
from rescompress.runs.fingerprint import data_identity
from rescompress.show.figures.columns import columns_of, conditions
from rescompress.show.figures.tables import Row, dominated

DEVICES = st.sampled_from([{}, {"device": "other"}, {"provenance": "predicted"}, {"precision": "fp32"}])


def rows() -> st.SearchStrategy[list[Row]]:
    def row(values: tuple[int, int, float, dict[str, str]]) -> Row:
        top, size, p50, where = values
        metrics = {"top1": accuracy(top, 10, runtime="torch"), "size_bytes": counted(size, "bytes")}
        return Row(run="", stage="s", metrics={**metrics, "p50_ms": latency(p50, **where)})  # type: ignore[arg-type]

    values = st.tuples(st.integers(0, 2), st.integers(1, 2), st.sampled_from([1.0, 2.0]), DEVICES)
    return st.lists(values.map(row), max_size=6)


def beats(a: dict[str, Metric], b: dict[str, Metric]) -> bool:
    """The definition: at least as good in all that `b` has, under the same conditions, and better in something."""
    costs = [c.metric for c in columns_of(b) if c.is_cost]
    if any(name not in a or conditions(a[name]) != conditions(b[name]) for name in ("top1", *costs)):
        return False
    as_good = a["top1"].value >= b["top1"].value and all(a[name].value <= b[name].value for name in costs)
    return as_good and (a["top1"].value > b["top1"].value or any(a[name].value < b[name].value for name in costs))


@given(rows())
def test_dominance_is_what_its_definition_says(found: list[Row]) -> None:
    wanted = {j for i, j in itertools.permutations(range(len(found)), 2) if beats(found[i].metrics, found[j].metrics)}
    assert dominated(found) == wanted


@given(st.lists(st.integers(1, 120), min_size=2, max_size=5), st.integers(1, 60), st.integers(0, 3))
def test_what_is_taken_of_a_split_is_in_proportion(counts: list[int], n: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.zeros((len(labels), 1, 1, 3), np.uint8)
    preprocessing = Preprocessing(name="half", mean=(0.5,) * 3, std=(0.5,) * 3)
    split = Split(MemoryStore(pixels), labels, tuple("abcde"[: len(counts)]), preprocessing, "x")
    taken = np.bincount(split.take(n, seed).labels, minlength=len(counts))
    assert taken.sum() == min(n, len(labels))
    assert (np.abs(taken - np.array(counts) * taken.sum() / len(labels)) < 1.5).all()


def test_only_large_files_beside_images_are_known_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LARGEST_TABLE", 100)
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / "x.png")
    for size, told in ((40, True), (4000, False)):
        table = tmp_path / "labels.csv"
        table.write_bytes(b"x" * size)
        before = data_identity(str(tmp_path))
        table.write_bytes(b"y" * size)
        assert (data_identity(str(tmp_path)) != before) is told


def test_a_convolution_takes_one_sum_along_only() -> None:
    """A second Add behind the first one, without an activation between them, is a kernel of its own."""
    conv = Conv(width=3, kernel=(1, 1))
    nodes = [
        ("one", conv, (INPUT,)),
        ("two", conv, (INPUT,)),
        ("three", conv, (INPUT,)),
        ("sum", Add(), ("one", "two")),
        ("more", Add(), ("sum", "three")),
        ("out", Relu(), ("more",)),
    ]
    every = [Node(name=INPUT, operation=Input()), *(Node(name=n, operation=o, inputs=i) for n, o, i in nodes)]
    net = Network(input_shape=(3, 8, 8), nodes=tuple(every), outputs=(Output(name="out", tensor="out"),))
    found = {k.name: k.skip for k in fuse(net.layers)}
    assert len(found) == 1 + 3 + 1, "the reformat of the input, three convolutions, one sum"
    assert sum(found.values()) == 2
