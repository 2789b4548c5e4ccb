"""Placement over every network that has a name: nothing missing, nothing extra."""

from __future__ import annotations

import pytest

from compress import zoo
from rescompress.core.layers import walk
from rescompress.core.quantizers import PROFILES, Quantization, place

named = pytest.mark.parametrize("arch", zoo.names())


def places(spec, profile):
    """What the rules of docs/quantization.md say, read off the blocks of the spec instead of the walk."""
    wanted = {"input"}
    for i in range(1, len(spec.stem.convs)):
        wanted.add(f"relu{i}")
    stream = "maxpool" if spec.stem.max_pool else f"relu{len(spec.stem.convs)}"
    for block in spec.blocks:
        convs = len(block.widths)
        wanted.add(stream)
        wanted |= {f"{block.name}.relu{i}" for i in range(1, convs)}
        if block.shortcut == "projection":
            wanted.add(f"{block.name}.downsample." + ("1" if block.batch_norm else "0"))
            if block.shortcut_pool and block.stride == 2:
                wanted.add(f"{block.name}.downsample.pool")
        if block.shortcut == "pad":
            wanted.add(f"{block.name}.shortcut")
        if profile == "onnxruntime":
            wanted.add(f"{block.name}." + ("bn" if block.batch_norm else "conv") + str(convs))
        stream = f"{block.name}.relu"
    wanted.add(stream)
    if spec.head is not None:
        wanted.add("avgpool")
    return wanted


@named
@pytest.mark.parametrize("profile", PROFILES)
def test_the_places_are_those_the_blocks_ask_for(arch, profile):
    spec = zoo.spec(arch)
    placed = place(spec, profile)
    assert {q.tensor for q in placed if q.kind == "activation"} == places(spec, profile)
    weights = [q.tensor for q in placed if q.kind == "weight"]
    assert weights == [layer.name for layer in walk(spec) if layer.op in ("conv", "linear")]
    assert len({(q.kind, q.tensor) for q in placed}) == len(placed)


@named
def test_the_three_profiles_differ_in_signs_and_in_the_ends_of_the_main_branches(arch):
    spec = zoo.spec(arch)
    signed, skip, both = ({(q.kind, q.tensor): q for q in place(spec, p)} for p in ("tensorrt", "openvino", "onnxruntime"))
    assert signed.keys() == skip.keys()
    assert skip.items() <= both.items()
    ends = {layer.inputs[0] for layer in walk(spec) if layer.op == "add"}
    assert {tensor for _, tensor in both.keys() - skip.keys()} == ends
    assert len(ends) == len(spec.blocks)


@named
@pytest.mark.parametrize("profile", ["openvino", "onnxruntime"])
def test_signs_levels_and_shared_scales(arch, profile):
    spec = zoo.spec(arch)
    blocks = {block.name: block for block in spec.blocks}
    for q in place(spec, "tensorrt"):
        assert (q.low, q.high) == ((-127, 127) if q.kind == "weight" else (-128, 127))
    for q in place(spec, profile):
        if q.kind == "activation":
            signed = q.tensor == "input" or q.tensor.split(".")[-1].startswith(("bn", "conv")) or "downsample.1" in q.tensor
            assert (q.low, q.high) == ((-128, 127) if signed else (0, 255)), q.tensor
        shares = q.kind == "activation" and q.tensor.endswith(".shortcut")
        assert (q.shares is not None) == shares
        if shares:
            names = list(blocks)
            position = names.index(q.tensor.removesuffix(".shortcut"))
            assert q.shares == f"{names[position - 1]}.relu"


@named
def test_quantizers_stand_in_the_order_of_computation(arch):
    spec = zoo.spec(arch)
    order = {layer.name: i for i, layer in enumerate(walk(spec))}
    keys = [(order[q.tensor], q.kind != "weight") for q in place(spec, "tensorrt")]
    assert keys == sorted(keys)


def test_quantizers_without_scales_or_with_foreign_ones_are_refused():
    spec = zoo.spec("resnet20")
    placed = place(spec, "tensorrt")
    with pytest.raises(ValueError, match="has no scale"):
        Quantization(profile="tensorrt", quantizers=placed).check(spec)
    counts = {layer.name: layer.out_shape[0] for layer in walk(spec)}
    scaled = tuple(q.model_copy(update={"scale": (1.0,) * (counts[q.tensor] if q.kind == "weight" else 1)}) for q in placed)
    Quantization(profile="tensorrt", quantizers=scaled).check(spec)
    with pytest.raises(ValueError, match="two quantizers"):
        Quantization(profile="tensorrt", quantizers=(*scaled, scaled[0])).check(spec)
    wrong = tuple(q.model_copy(update={"scale": (1.0,) * 3}) if q.tensor == "conv1" else q for q in scaled)
    with pytest.raises(ValueError, match="scales for the 16 channels of conv1"):
        Quantization(profile="tensorrt", quantizers=wrong).check(spec)
    with pytest.raises(ValueError, match="not the placement of profile openvino"):
        Quantization(profile="openvino", quantizers=scaled).check(spec)
    with pytest.raises(ValueError, match="does not have"):
        Quantization(profile="tensorrt", quantizers=scaled).check(spec.replace(stages=spec.stages[:2]))
