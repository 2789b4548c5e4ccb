"""What a plan refuses: a stage or a target that would not take the network it is given is named before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import ptq
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.path import states_int8
from edge_targets.catalog import load_target, target_names
from export.to_onnx import ExportOptions
from rescompress.core.errors import BadInput, TargetError
from rescompress.runs.config import RunConfig
from rescompress.runs.plan import check_int8, run_plan
from rescompress.runs.search_settings import PRECISION, default_space
from rescompress.runs.settings import Settings
from rescompress.runs.stages.target import for_target
from rescompress.search.worker import check_space

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of ours in INT8."""
    path = tmp_path_factory.mktemp("int8") / "int8.safetensors"
    network = load_checkpoint(DIGITS)
    images = torch.rand(8, *network.spec.input_shape, generator=torch.Generator().manual_seed(0))
    save_checkpoint(ptq(network, [images]), path)
    return path


def plan_of(checkpoint: Path, **keys: object) -> list[str]:
    """Names of the stages of a run."""
    config = RunConfig.model_validate({"checkpoint": str(checkpoint), "data": "builtin:digits", **keys})
    return [stage.name for stage in run_plan(config, Settings(config.data))]


def stage_takes(network: Checkpoint, name: str) -> bool:
    """Whether the stage of a target takes a network: the oracle of the plan."""
    try:
        for_target(ExportOptions(), network, load_target(name))
    except TargetError:
        return False
    return True


def test_targets_are_refused_as_their_stages_would_refuse_them(int8: Path) -> None:
    network = load_checkpoint(int8)
    lacking = [name for name in target_names() if not stage_takes(network, name)]
    assert {"jetson-nano", "jetson-tx2"} <= set(lacking)
    for name in target_names():
        if name not in lacking:
            check_int8(["cpu", name], "why")
            continue
        with pytest.raises(TargetError, match="does not run int8, and why") as refused:
            check_int8(["cpu", name], "why")
        assert name in str(refused.value.where)


def test_a_plan_asks_it_wherever_int8_comes_from(int8: Path) -> None:
    for keys, checkpoint in (({"quantize": {}}, DIGITS), ({}, int8)):
        assert "target:jetson-tx2" not in plan_of(checkpoint, targets=["jetson"], **keys)
        with pytest.raises(TargetError, match="Jetson TX2 does not run int8"):
            plan_of(checkpoint, targets=["jetson", "jetson-tx2"], **keys)
    assert "target:jetson-tx2" in plan_of(DIGITS, targets=["jetson-tx2"])


@pytest.mark.parametrize("stage", ["prune", "finetune", "quantize"])
def test_a_plan_gives_a_quantized_network_to_no_stage_that_wants_a_float_one(int8: Path, stage: str) -> None:
    with pytest.raises(BadInput, match=f"quantized already.*{stage}"):
        plan_of(int8, **{stage: {}})
    assert "export" in plan_of(int8)


def test_a_run_and_quantize_end_before_anything_is_computed(rescompress, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"checkpoint: {DIGITS}\ndata: builtin:digits\nquantize: {{mode: ptq}}\ntargets: [jetson-nano]\n")
    done = rescompress("run", config, "-o", tmp_path / "out", cwd=tmp_path, code=5)
    assert "Jetson Nano does not run int8" in done.stderr
    assert not (tmp_path / "out").exists()
    done = rescompress("quantize", DIGITS, "--data", "builtin:digits", "--target", "jetson-nano", cwd=tmp_path, code=5)
    assert "Jetson Nano does not run int8" in done.stderr
    assert not (tmp_path / "rescompress-out").exists()


def test_a_search_offers_no_precision_that_a_target_lacks() -> None:
    document = {"targets": ["jetson", "jetson-nano"], "quantize": None, "search": {"boards": [], "space": {}}}
    assert PRECISION not in default_space(document)
    assert PRECISION in default_space({**document, "targets": ["jetson"]})
    base = RunConfig.model_validate({"checkpoint": str(DIGITS), "data": "builtin:digits"}).model_dump(mode="json")
    for space, own in (({"precision": ["float", "int8"]}, None), ({"prune.scope": ["inner", "all"]}, {"mode": "ptq"})):
        wanted = {**base, "targets": ["jetson-nano"], "quantize": own, "search": {"boards": [], "space": space}}
        with pytest.raises(TargetError, match="does not run int8"):
            check_space(wanted)
        check_space({**wanted, "targets": ["jetson"]})


VALUES = st.sampled_from([None, True, 1, "", "rescompress", "{}", [], {}, ["rescompress"]])
HEADERS = st.one_of(VALUES, st.fixed_dictionaries({}, optional={"format": VALUES, "quantization": VALUES}))
WHOLE = st.one_of(VALUES, st.fixed_dictionaries({}, optional={"__metadata__": HEADERS}))


def as_file(header: object) -> bytes:
    """A file that begins as safetensors do."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@given(st.one_of(st.binary(max_size=20), WHOLE.map(as_file)))
def test_any_file_is_answered(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    told = states_int8(path)
    try:
        stated = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        assert told == (stated["format"] == "rescompress" and bool(stated["quantization"]))
    except (ValueError, KeyError, TypeError, IndexError):
        assert not told
