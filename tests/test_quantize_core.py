"""Placement, calibration and fake quantization over the zoo of small networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import ptq
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_zoo import SPECS, checkpoint_of, images_for

import rescompress
from compress.quantize import best_of, calibrate, fake_quant_model, finish_qat, integer_weights, integers, prepare_qat
from compress.quantize.bias_correction import carriers
from compress.quantize.fake_quant import weight_scale
from compress.quantize.ptq import divergence, log_probabilities
from compress.quantize.qat import labelled_loss
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError, ConfigError, DataError
from rescompress.core.layers import consumers, walk
from rescompress.core.quantizers import PROFILES, Quantization, place

torch.set_num_threads(1)
zoo = pytest.mark.parametrize("arch", sorted(SPECS))
profiles = pytest.mark.parametrize("profile", PROFILES)


@zoo
@profiles
def test_every_layer_with_weights_is_quantized_and_reads_a_quantized_tensor(arch, profile):
    placed = place(SPECS[arch], profile)
    activations = {q.tensor for q in placed if q.kind == "activation"}
    for layer in walk(SPECS[arch]):
        if layer.op in ("conv", "linear"):
            assert any(q.kind == "weight" and q.tensor == layer.name and (q.low, q.high) == (-127, 127) for q in placed)
            source = layer.inputs[0]
            while source.endswith("dropout"):
                source = source.removesuffix(".dropout") + ".relu" if source != "fc.dropout" else "avgpool"
            assert source in activations


@zoo
@pytest.mark.parametrize("profile", ["tensorrt", "openvino"])
def test_tensorrt_and_openvino_round_only_the_skip_of_an_add(arch, profile):
    spec = SPECS[arch]
    placed = place(spec, profile)
    activations = {q.tensor for q in placed if q.kind == "activation"}
    assert profile != "tensorrt" or all(q.low < 0 for q in placed)
    for layer in walk(spec):
        if layer.op == "add":
            main, skip = layer.inputs
            assert main not in activations
            assert skip in activations
        if layer.op == "global_pool":
            assert layer.inputs[0] in activations


@zoo
def test_onnxruntime_rounds_both_inputs_of_an_add(arch):
    activations = {q.tensor for q in place(SPECS[arch], "onnxruntime") if q.kind == "activation"}
    for layer in walk(SPECS[arch]):
        if layer.op == "add":
            assert set(layer.inputs) <= activations


@zoo
@pytest.mark.parametrize("profile", ["openvino", "onnxruntime"])
def test_cpu_profiles_are_unsigned_exactly_where_values_cannot_be_negative(arch, profile):
    spec = SPECS[arch]
    by_tensor = {q.tensor: q for q in place(spec, profile) if q.kind == "activation"}
    seen: dict[str, float] = {}
    model = build_model(spec, checkpoint_of(arch).state_dict)
    model(torch.cat(images_for(spec)), lambda name, value: seen.__setitem__(name, float(value.detach().min())))
    for tensor, q in by_tensor.items():
        assert (q.low == 0) == (seen[tensor] >= 0.0), tensor


@zoo
@profiles
def test_nothing_is_rounded_that_no_integer_kernel_reads(arch, profile):
    spec = SPECS[arch]
    readers = consumers(walk(spec))
    for q in place(spec, profile):
        if q.kind == "activation":
            assert any(r.op in ("conv", "linear", "add", "dropout", "global_pool") for r in readers[q.tensor]), q.tensor


@zoo
@profiles
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_layers_kept_in_float_lose_their_weight_quantizer_and_nothing_else_gains_one(arch, profile, data):
    spec = SPECS[arch]
    weighted = [layer.name for layer in walk(spec) if layer.op in ("conv", "linear")]
    keep = frozenset(data.draw(st.sets(st.sampled_from(weighted), max_size=len(weighted) - 1)))
    everywhere, placed = place(spec, profile), place(spec, profile, keep_float=keep)
    assert {q.tensor for q in placed if q.kind == "weight"} == set(weighted) - keep
    assert {(q.kind, q.tensor) for q in placed} <= {(q.kind, q.tensor) for q in everywhere}
    assert Quantization(profile=profile, quantizers=placed).keep_float(spec) == keep


def test_placement_refuses_unknown_layers_and_an_empty_placement():
    spec = SPECS["pad"]
    with pytest.raises(ValueError, match="conv9"):
        place(spec, "tensorrt", keep_float=frozenset({"conv9"}))
    weighted = frozenset(layer.name for layer in walk(spec) if layer.op in ("conv", "linear"))
    with pytest.raises(ValueError, match="nothing is left"):
        place(spec, "tensorrt", keep_float=weighted)


@profiles
def test_a_pad_shortcut_takes_the_scale_of_what_it_copies_and_rounds_nothing_new(profile):
    checkpoint = ptq(checkpoint_of("pad"), images_for(SPECS["pad"]), profile=profile, calibration="max")
    quantization = checkpoint.quantization
    shared = [q for q in quantization.quantizers if q.shares]
    assert [q.tensor for q in shared] == ["layer2.0.shortcut", "layer3.0.shortcut"]
    model = fake_quant_model(checkpoint)
    for q in shared:
        assert q.scale == quantization.activation(q.shares).scale
        seen = {}
        model(images_for(SPECS["pad"])[0], lambda name, value, seen=seen: seen.__setitem__(name, value))
        x = seen[q.tensor]
        assert torch.equal(torch.fake_quantize_per_tensor_affine(x, q.scale[0], 0, q.low, q.high), x)
    broken = tuple(q.model_copy(update={"scale": (q.scale[0] * 2,)}) if q.shares else q for q in quantization.quantizers)
    with pytest.raises(ValueError, match="is not that of"):
        Quantization(profile=profile, quantizers=broken).check(SPECS["pad"])


@zoo
@profiles
def test_a_calibrated_network_holds_exactly_the_placement_and_survives_json(arch, profile):
    checkpoint = ptq(checkpoint_of(arch), images_for(SPECS[arch]), profile=profile, calibration="max")
    checkpoint.quantization.check(SPECS[arch])
    again = Quantization.model_validate_json(checkpoint.quantization.model_dump_json())
    assert again == checkpoint.quantization
    for missing in (q for q in again.quantizers if q.kind == "activation"):
        rest = tuple(q for q in again.quantizers if q is not missing)
        with pytest.raises(ValueError, match=f"placement .*{missing.tensor}"):
            Quantization(profile=profile, quantizers=rest).check(SPECS[arch])


def numpy_network(checkpoint, x):
    """The integer network in float64 numpy-style arithmetic: rounding on integers, sums exact."""
    quantization = checkpoint.quantization
    tensors = {k: v.double() for k, v in checkpoint.state_dict.items()}
    for name, w in integer_weights(checkpoint.state_dict, quantization).items():
        scale = np.asarray(quantization.weight(name).scale).reshape(-1, *[1] * (w.ndim - 1))
        tensors[f"{name}.weight"] = torch.from_numpy(w.astype(np.float64) * scale)
    model = build_model(checkpoint.spec, tensors).double()

    def rounded(name, value):
        q = quantization.activation(name)
        if q is None:
            return None
        real = value.numpy()
        return torch.from_numpy(np.clip(np.rint(real / q.scale[0]), q.low, q.high) * q.scale[0])

    with torch.no_grad():
        return model(x.double(), rounded)


@zoo
@profiles
def test_fake_quantization_is_the_integer_network(arch, profile):
    checkpoint = ptq(checkpoint_of(arch), images_for(SPECS[arch]), profile=profile, calibration="max")
    x = torch.cat(images_for(SPECS[arch]))
    with torch.no_grad():
        fake = fake_quant_model(checkpoint)(x).double()
    exact = numpy_network(checkpoint, x)
    span = float(exact.max() - exact.min())
    # A value on the edge between two integers may fall either way; that moves few logits, by little.
    assert float((fake - exact).abs().mean()) <= span / 255
    assert float((fake - exact).abs().median()) <= 2e-3 * span


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.floats(-3e4, 3e4, width=32), min_size=2, max_size=24),
    largest=st.floats(2.0**-20, 2.0**20, width=32),
)
def test_numpy_integers_are_those_of_torchs_kernel(values, largest):
    w = np.asarray(values, dtype=np.float32).reshape(2, -1) if len(values) % 2 == 0 else np.asarray([values], dtype=np.float32)
    scale = np.full(len(w), np.float32(largest) / np.float32(127), dtype=np.float32)
    ours = integers(w, scale, -127, 127)
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(w), torch.from_numpy(scale), torch.zeros(len(w), dtype=torch.int32), 0, -127, 127
    )
    np.testing.assert_array_equal(ours.astype(np.float32) * scale[:, None], theirs.numpy())


def test_numpy_integers_are_those_of_torchs_kernel_at_the_edges():
    torch.manual_seed(0)
    w = torch.randn(64, 20_000)
    scale = weight_scale(w)
    edges = (torch.randint(-127, 127, w.shape) + 0.5) * scale[:, None]  # a half, as near as float32 can say it
    for values in (w, edges):
        theirs = torch.fake_quantize_per_channel_affine(values, scale, torch.zeros(64, dtype=torch.int32), 0, -127, 127)
        ours = integers(values.numpy(), scale.numpy(), -127, 127)
        np.testing.assert_array_equal(ours.astype(np.float32) * scale.numpy()[:, None], theirs.numpy())


def test_a_channel_of_zeros_has_the_scale_one_and_integers_zero():
    w = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert weight_scale(w).tolist() == [1.0, pytest.approx(2 / 127)]
    assert integers(w.numpy(), weight_scale(w).numpy(), -127, 127).tolist() == [[0, 0], [64, -127]]


@zoo
def test_qat_trains_what_the_checkpoint_then_computes(arch):
    quantized = ptq(checkpoint_of(arch), images_for(SPECS[arch]), calibration="max")
    for learnable in (False, True):
        model = prepare_qat(quantized, learnable_scales=learnable)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for x in images_for(SPECS[arch]):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
            assert all(g is not None for g in grads.values())
            assert float(grads["conv1.weight"].abs().max()) > 0
            optimizer.step()
        trained = finish_qat(model, quantized)
        trained.quantization.check(trained.spec)
        assert trained.quantization.method == "qat"
        assert set(trained.state_dict) == set(quantized.state_dict)
        assert not torch.equal(trained.state_dict["conv1.weight"], quantized.state_dict["conv1.weight"])
        x = images_for(SPECS[arch])[0]
        with torch.no_grad():
            torch.testing.assert_close(fake_quant_model(trained)(x), model.eval()(x), rtol=0, atol=0)
        pairs = zip(trained.quantization.quantizers, quantized.quantization.quantizers, strict=True)
        assert any(a.scale != b.scale for a, b in pairs if a.kind == "activation") == learnable


def test_evaluating_under_inference_mode_between_steps_does_not_break_training():
    quantized = ptq(checkpoint_of("basic"), images_for(SPECS["basic"]), calibration="max")
    model = prepare_qat(quantized)
    x = images_for(SPECS["basic"])[0]
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


def test_bad_input_is_named():
    checkpoint, batches = checkpoint_of("basic"), images_for(SPECS["basic"])
    with pytest.raises(DataError, match="no calibration data"):
        ptq(checkpoint, [])
    with pytest.raises(DataError, match="one image"):
        ptq(checkpoint, [batches[0][:1]])
    with pytest.raises(DataError, match="NaN"):
        ptq(checkpoint, [torch.full_like(batches[0], torch.nan)])
    with pytest.raises(DataError, match="activation input is zero"):
        ptq(checkpoint, [torch.zeros_like(batches[0])])
    dead = dict(checkpoint.state_dict)
    for name in ("bn1.weight", "bn1.bias"):
        dead[name] = torch.zeros_like(dead[name])
    with pytest.raises(DataError, match="activation maxpool is zero"):
        ptq(replace(checkpoint, state_dict=dead), batches)
    with pytest.raises(ConfigError, match="conv9"):
        ptq(checkpoint, batches, keep_float=frozenset({"conv9"}))
    broken = {**checkpoint.state_dict, "fc.weight": torch.full_like(checkpoint.state_dict["fc.weight"], torch.nan)}
    with pytest.raises(CheckpointError, match=r"fc\.weight holds NaN"):
        ptq(replace(checkpoint, state_dict=broken), batches)
    quantized = ptq(checkpoint, batches, calibration="max")
    with pytest.raises(CheckpointError, match="already quantized"):
        ptq(quantized, batches)
    for needs in (prepare_qat, fake_quant_model):
        with pytest.raises(CheckpointError, match="not quantized"):
            needs(checkpoint)
    foreign = replace(quantized, spec=SPECS["bottleneck"])
    with pytest.raises(CheckpointError, match="do not fit"):
        fake_quant_model(foreign)
    model = prepare_qat(quantized)
    with torch.no_grad():
        model.get_parameter("fc.weight").fill_(torch.nan)
    with pytest.raises(CheckpointError, match="diverged"):
        finish_qat(model, quantized)


def test_inputs_stay_as_they_are():
    checkpoint, batches = checkpoint_of("basic"), images_for(SPECS["basic"])
    tensors = {k: v.clone() for k, v in checkpoint.state_dict.items()}
    quantized = ptq(checkpoint, batches, calibration="max")
    kept = {k: v.clone() for k, v in quantized.state_dict.items()}
    model = prepare_qat(quantized)
    model(batches[0]).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    finish_qat(model, quantized)
    assert checkpoint.quantization is None
    for k, v in tensors.items():
        assert torch.equal(checkpoint.state_dict[k], v)
        assert torch.equal(quantized.state_dict[k], kept[k])


def test_the_limit_on_images_is_kept():
    batches = images_for(SPECS["basic"])
    assert sum(map(len, calibrate.images(iter(batches), limit=5))) == 5
    assert sum(map(len, calibrate.images([(b, torch.zeros(len(b))) for b in batches]))) == sum(map(len, batches))


@zoo
def test_bias_correction_gives_every_channel_the_float_mean(arch):
    checkpoint, batches = checkpoint_of(arch), images_for(SPECS[arch])
    x = torch.cat(batches)
    quantized = ptq(checkpoint, batches, calibration="max")
    plain = ptq(checkpoint, batches, calibration="max", bias_correction=False)
    assert plain.quantization == quantized.quantization
    changed = {k for k, v in quantized.state_dict.items() if not torch.equal(v, checkpoint.state_dict[k])}
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    names = carriers(model, frozenset(q.tensor for q in quantized.quantization.quantizers if q.kind == "weight"))
    assert changed == {f"{name}.bias" for name in names}
    assert all(torch.equal(plain.state_dict[k], v) for k, v in checkpoint.state_dict.items())

    def means(network):
        seen = {}
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda _, __, y, name=name: seen.__setitem__(name, y.double().mean([d for d in range(y.dim()) if d != 1]))
            )
        with torch.no_grad():
            network(x)
        return seen

    wanted, before, after = (means(m) for m in (model, fake_quant_model(plain), fake_quant_model(quantized)))
    for name in names:
        error = (after[name] - wanted[name]).abs().max()
        assert error <= 5e-3 * wanted[name].abs().max() + 1e-5, name
    assert sum((before[n] - wanted[n]).abs().sum() for n in names) > 10 * sum((after[n] - wanted[n]).abs().sum() for n in names)


def test_a_layer_kept_in_float_keeps_its_bias():
    kept = ptq(checkpoint_of("basic"), images_for(SPECS["basic"]), calibration="max", keep_float=frozenset({"conv1", "fc"}))
    for name in ("bn1.bias", "fc.bias"):
        assert torch.equal(kept.state_dict[name], checkpoint_of("basic").state_dict[name])


def test_auto_takes_the_calibration_that_is_nearest_to_the_float_network_on_the_images_to_choose_by():
    spec = SPECS["bottleneck"]
    checkpoint, batches = checkpoint_of("bottleneck"), images_for(spec, batches=4)
    selection = images_for(spec, batches=8)[4:]
    best = ptq(checkpoint, batches, calibration="auto", selection=selection)
    note = best.provenance["calibration"]
    assert [t["calibration"] for t in note["tried"][:3]] == ["nncf", "max", "mse"]
    assert [t["bias_correction"] for t in note["tried"]] == [False] * 5 + [True]
    model = build_model(spec, checkpoint.state_dict)
    wanted = [log_probabilities(model, x) for x in selection]
    for tried in note["tried"]:
        again = ptq(
            checkpoint,
            batches,
            calibration=tried["calibration"],
            percentile=tried["percentile"] or 99.99,
            bias_correction=tried["bias_correction"],
        )
        assert divergence(fake_quant_model(again), selection, wanted) == pytest.approx(tried["divergence"], rel=1e-6)
        assert tried["divergence"] >= note["chosen"]["divergence"]
        if tried == note["chosen"]:
            assert again.quantization == best.quantization
            assert all(torch.equal(v, best.state_dict[k]) for k, v in again.state_dict.items())


def test_auto_holds_images_out_where_none_are_given():
    checkpoint = checkpoint_of("basic")
    batches = images_for(SPECS["basic"])
    best = ptq(checkpoint, batches, calibration="auto")
    assert best.provenance["calibration"]["chosen"]["divergence"] > 0
    with pytest.raises(DataError, match="too few to choose"):
        ptq(checkpoint, [batches[0][:4]], calibration="auto")
    with pytest.raises(ConfigError, match="'auto', 'nncf'"):
        rescompress.quantize(checkpoint, batches, calibration="entropy")
    with pytest.raises(ConfigError, match="percentile: Input should be greater than 50"):
        rescompress.quantize(checkpoint, batches, calibration="percentile", percentile=3.0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), outlier=st.floats(1.0, 1000.0), levels=st.sampled_from([127, 255]))
def test_estimators_are_ordered_and_mse_is_the_least_square_error(seed, outlier, levels):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)).abs()
    values[0] = values.max() * outlier
    largest = float(values.max())
    reach = calibrate.Reach(largest, largest / 2, torch.histc(values, calibrate.BINS, 0.0, largest).double())

    def error(limit):
        step = limit / levels
        return float(((values / step).round().clamp(max=levels) * step - values).double().square().mean())

    found = {e: calibrate.range_of(reach, e, levels=levels, percentile=99.9) for e in calibrate.ESTIMATORS}
    assert found["max"] == largest
    assert found["mean-max"] == largest / 2
    bin_width = largest / calibrate.BINS
    assert float((values <= found["percentile"] + 1e-6 * largest).double().mean()) >= 0.999
    assert float((values < found["percentile"] - 1.01 * bin_width).double().mean()) <= 0.999
    assert all(0 < f <= largest for f in found.values())
    grid = [largest * k / 40 for k in range(4, 41)]
    assert error(found["mse"]) <= 1.05 * min(error(limit) for limit in grid)


def test_the_better_of_two_networks_is_kept_by_answers_then_by_cross_entropy():
    spec, batches = SPECS["basic"], images_for(SPECS["basic"])
    fine = ptq(checkpoint_of("basic"), batches, calibration="max")
    coarse = replace(
        fine,
        quantization=fine.quantization.model_copy(
            update={
                "quantizers": tuple(
                    q.model_copy(update={"scale": tuple(s * 60 for s in q.scale)}) if q.kind == "weight" else q
                    for q in fine.quantization.quantizers
                )
            }
        ),
    )
    with torch.no_grad():
        labelled = [(x, build_model(spec, checkpoint_of("basic").state_dict)(x).argmax(1)) for x in batches]
    for candidates in ([fine, coarse], [coarse, fine]):
        assert best_of(candidates, labelled) is fine
    again = replace(fine)
    assert best_of([fine, again], labelled) is fine
    wrong, entropy = labelled_loss(fine, labelled)
    with torch.no_grad():
        logits = torch.cat([fake_quant_model(fine)(x) for x, _ in labelled])
    y = torch.cat([y for _, y in labelled])
    assert wrong == pytest.approx(float((logits.argmax(1) != y).double().mean()))
    assert entropy == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), y)))
    with pytest.raises(DataError, match="no images"):
        best_of([fine], [])


@pytest.mark.parametrize("learnable", [False, True])
def test_two_forward_passes_before_one_backward_pass(learnable):
    quantized = ptq(checkpoint_of("basic"), images_for(SPECS["basic"]), calibration="max")
    model = prepare_qat(quantized, learnable_scales=learnable)
    first, second, _ = images_for(SPECS["basic"])
    (model(first).sum() + model(second).sum()).backward()


def test_a_learnt_scale_stays_positive_however_large_the_step():
    quantized = ptq(checkpoint_of("basic"), images_for(SPECS["basic"]), calibration="max")
    model = prepare_qat(quantized, learnable_scales=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(-1.0)
    trained = finish_qat(model, quantized)
    assert all(s > 0 for q in trained.quantization.quantizers for s in q.scale)
    assert torch.isfinite(model(images_for(SPECS["basic"])[0])).all()


@profiles
def test_a_pad_shortcut_that_was_pruned_to_zeros_is_quantized(profile):
    spec = SPECS["pad"]
    nothing = {b.name: b.model_copy(update={"channel_map": (-1,) * len(b.channel_map)}) for b in spec.blocks if b.channel_map}
    assert nothing
    checkpoint = replace(checkpoint_of("pad"), spec=spec.replace_blocks(nothing))
    images = images_for(spec)
    for options in ({"calibration": "max"}, {"calibration": "mse"}, {"calibration": "auto", "selection": images}):
        int8 = ptq(checkpoint, images, profile=profile, **options)
        seen = {}
        fake_quant_model(int8)(images[0], lambda name, value, seen=seen: seen.__setitem__(name, value))
        for name in nothing:
            assert not seen[f"{name}.shortcut"].any()
        assert all(torch.isfinite(value).all() for value in seen.values())
