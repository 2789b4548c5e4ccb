"""Names that stand in files and stores which people keep: where the code lives may change, these may not."""

from __future__ import annotations

import ast
import inspect

from graph_zoo import Maker, random_checkpoint

from export.to_onnx import ExportOptions, read_metadata, to_onnx
from rescompress.core.graph import INPUT
from rescompress.core.operations import GlobalPool, Linear
from rescompress.show.gate import render
from rescompress.show.track.mlflow import RUN_TAG


def test_the_facts_of_an_onnx_file_keep_their_keys() -> None:
    m = Maker()
    network = m.network(m.add(Linear(width=2), m.add(GlobalPool(), m.conv(INPUT, 4))), classes=True)
    network = network.replace(labels=("cat", "dog"))
    tensors = {k: v.numpy() for k, v in random_checkpoint(network).state_dict.items()}
    proto = to_onnx(network, tensors, None, ExportOptions())
    kept = {p.key for p in proto.metadata_props}
    assert kept == {"rescompress.network", "rescompress.preprocessing", "rescompress.labels"}
    about = read_metadata(proto)
    assert about is not None
    assert about.spec.labels == ("cat", "dog")


def test_trackers_and_reports_of_tests_keep_theirs() -> None:
    assert RUN_TAG == "rescompress.run"
    words = {n.value for n in ast.walk(ast.parse(inspect.getsource(render))) if isinstance(n, ast.Constant)}
    assert "rescompress.gate" in words
