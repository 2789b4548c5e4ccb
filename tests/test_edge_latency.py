"""Predicted latency: published errors as promised, and the properties a cost for pruning must have."""

import json
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.zoo import spec
from edge_targets import fit
from edge_targets import kernels as fusion
from edge_targets.catalog import all_targets, load_device
from edge_targets.kernels import Kernel, fuse
from edge_targets.latency import (
    CONSTANTS,
    Overrides,
    as_document,
    cost_function,
    fitted_model,
    is_known,
    kernel_times,
    padded,
    predict,
    predict_kernels,
    price_of,
    rates,
    runs_winograd,
    work_of,
)
from edge_targets.published import load_groups, resnet, tensorflow_resnet, vgg
from rescompress.core.errors import BadInput, TargetError
from rescompress.core.layers import total_macs, walk

JETSONS = [t.device for t in all_targets() if t.device.modes]
ORIN = load_device("jetson-agx-orin-64gb")
RESNET50 = walk(spec("resnet50"))
RESNET20 = walk(spec("resnet20"))


@pytest.fixture(scope="module")
def groups():
    return load_groups()


@pytest.fixture(scope="module")
def fitted(groups):
    return fit.fit(groups)


@pytest.fixture(scope="module")
def published():
    return fit.report()


def of_reduced_precision(published, held):
    return np.abs(getattr(published, held)[fit.reduced(published.groups)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("held", "median", "worst"),
    [("group_errors", 0.10, 0.35), ("network_errors", 0.15, 0.60), ("device_errors", 0.18, 0.45), ("pair_errors", 0.12, 0.35)],
)
def test_held_out_errors_stay_within_what_the_docs_promise(published, held, median, worst):
    errors = of_reduced_precision(published, held)
    assert len(errors) >= 70
    assert np.median(errors) <= median
    assert errors.max() <= worst


@pytest.mark.slow
def test_bands_hold_what_they_did_not_see_and_are_no_wider_than_promised(published):
    assert published.coverage >= 0.85
    assert published.half_width <= 0.25
    for widths in fitted_model().bands.values():
        assert max(np.expm1(list(widths.values()))) <= 0.25


@pytest.mark.slow
def test_bands_hold_networks_that_no_board_has_figures_of(published):
    # everything without the network: the fit, the choice between narrow and wide, and both widths
    assert min(published.unlike_coverage.values()) >= 0.85
    for a, widths in fitted_model().unlike_bands.items():
        for precision, half in widths.items():
            assert half >= fitted_model().bands[a][precision]
            assert fitted_model().unlike_unseen_bands[a][precision] >= max(
                half, fitted_model().unseen_device_bands[a][precision]
            )


def test_the_published_orin_nano_figures_are_predicted():
    # onnxsim, 2026-09: ResNet-50 v1 on an Orin Nano 8 GB in MAXN_SUPER, trtexec of TensorRT 10.3
    kernels = fuse(walk(resnet(50, 224, stride_at=0)))
    board = load_device("jetson-orin-nano-8gb-super")
    figures = {
        (1, "fp32"): 3.596, (1, "fp16"): 1.814, (1, "int8"): 1.190,
        (8, "fp32"): 19.969, (8, "fp16"): 8.816, (8, "int8"): 4.930,
    }  # fmt: skip
    for (batch, precision), measured in figures.items():
        found = predict_kernels(kernels, board, precision=precision, batch=batch, power_mode="MAXN_SUPER")
        assert found.p50_ms == pytest.approx(measured, rel=0.12), (batch, precision)
        assert found.low_ms < measured < found.high_ms


@pytest.mark.slow
def test_the_stored_model_is_what_the_fit_gives(published):
    stored = json.loads(CONSTANTS.read_text())
    again = json.loads(json.dumps(fit.document_of(published.fitted)))
    del stored["version"], again["version"]  # a hash of rounded numbers, which may round otherwise elsewhere
    assert flat(stored) == pytest.approx(flat(again), rel=1e-2)


def flat(value, key=""):
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}").items()}
    return {key: value} if isinstance(value, int | float) else {}


def test_the_stored_constants_are_what_the_fit_gives(fitted):
    stored = fitted_model()
    again = fit.model_of(
        fitted,
        dict(stored.bands),
        devices=stored.devices,
        unseen_device=dict(stored.unseen_device_bands),
        networks=stored.networks,
        unlike=dict(stored.unlike_bands),
        unlike_unseen=dict(stored.unlike_unseen_bands),
    )
    assert flat({n: vars(c) for n, c in again.architectures.items()}) == pytest.approx(
        flat({n: vars(c) for n, c in stored.architectures.items()}), rel=1e-2
    )
    for name in ("depth_ns", "grouped", "cached", "clock_exponent"):
        assert getattr(again, name) == pytest.approx(getattr(stored, name), rel=1e-2)


def test_the_fit_is_deterministic_and_its_slopes_are_right(groups, fitted):
    from scipy.optimize import check_grad

    first = fitted
    assert np.array_equal(first, fit.fit(groups))
    t = fit._table(groups)

    def total_of(x):
        return fit._log_latency(x, t).sum()

    def slope(x):
        terms = fit._terms(x, t)
        return np.einsum("gi,gip->p", terms / terms.sum(axis=1, keepdims=True), t.powers)

    assert check_grad(total_of, slope, first) < 1e-3


def test_the_fit_computes_what_predictions_compute(groups, fitted):
    x = fitted
    with_constants = {g.name: np.log(g.latency_ms) + e for g, e in zip(groups, fit.log_errors(groups, x), strict=True)}
    checked = [g for g in groups if g.kind.name != "mlperf" and not g.kind.call_ms]
    assert len(checked) > 15
    for g in checked:
        clocks = Overrides(g.sm_count, g.gpu_mhz, g.emc_mhz)
        found = predict_kernels(g.kernels, g.hardware, precision=g.precision, batch=g.batch, overrides=clocks)
        assert np.log(found.p50_ms) == pytest.approx(with_constants[g.name], abs=2e-3), g.name


def test_networks_of_the_table_are_the_published_ones():
    # multiply-accumulates in millions, by their papers and by torchvision
    of = {name: sum(k.macs for k in kernels) / 1e6 for name, kernels in (
        ("resnet18", fuse(walk(resnet(18, 224)))),
        ("resnet50", fuse(walk(resnet(50, 224)))),
        ("resnet50 v1", fuse(walk(resnet(50, 224, stride_at=0)))),
        ("resnext50", fuse(walk(resnet(50, 224, groups=32)))),
        ("vgg16", vgg(16, 224)),
        ("slim", tensorflow_resnet(50, 224, v2=False)),
    )}  # fmt: skip
    expected = {"resnet18": 1814, "resnet50": 4089, "resnet50 v1": 3858, "resnext50": 4230, "vgg16": 15470, "slim": 3480}
    assert of == pytest.approx(expected, rel=0.01)
    assert fuse(walk(resnet(50, 224, groups=32))) == fuse(walk(spec("resnext50_32x4d")))


@pytest.mark.slow
def test_holding_out_really_refits(published):
    assert np.median(np.abs(published.fit_errors)) < np.median(np.abs(published.group_errors))


def test_winograd_halves_old_gpus_alone():
    same = Kernel("c", "conv", pixels=784, in_width=128, width=128, taps=9, in_pixels=784)
    others = {
        "stride 2": same._replace(in_pixels=784 * 4),
        "grouped": same._replace(groups=2),
        "1x1": same._replace(taps=1),
        "image": same._replace(first=True),
    }
    assert runs_winograd(same)
    assert not any(runs_winograd(k) for k in others.values())
    for name, precision, faster in (
        ("jetson-tx2", "fp16", True),
        ("jetson-agx-xavier", "int8", False),
        (ORIN.name, "fp16", False),
    ):
        price = rates(load_device(name), precision)
        direct = price._replace(winograd=1.0)
        assert (price_of(same, price, batch=1)[0] < price_of(same, direct, batch=1)[0]) is faster


def test_small_activations_are_cheaper_per_byte_than_large_ones():
    small = Kernel("c", "conv", pixels=196, in_width=256, width=256, in_pixels=196)
    price = rates(ORIN, "fp16")
    weights = small.width * small.in_width * 2 * price.byte_ms

    def per_image(batch):
        return (price_of(small, price, batch=batch)[1] - weights) / batch

    assert per_image(1) < 0.6 * per_image(1000)


def function_calls(function, *args):
    """How many Python functions a call of `function` calls."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_of_the_cost_function_is_a_few_calls_per_layer():
    # a search calls it a million times; benchmarks/latency_cost.py prints the time
    cost = cost_function(ORIN, precision="int8")
    resnet152 = walk(spec("resnet152"))
    cost(resnet152)  # roles are known from here on
    calls = {len(layers): function_calls(cost, layers) for layers in (RESNET50, resnet152)}
    assert all(n <= 6 * layers for layers, n in calls.items()), calls
    assert calls[len(resnet152)] <= 1.05 * calls[len(RESNET50)] * len(resnet152) / len(RESNET50)


def test_the_role_of_a_class_of_operations_is_decided_once(monkeypatch):
    asked, decide = [], fusion._role
    monkeypatch.setattr(fusion, "_roles", {})
    monkeypatch.setattr(fusion, "_role", lambda op: asked.append(type(op)) or decide(op))
    fuse(RESNET50)
    assert sorted(asked, key=str) == sorted({type(layer.operation) for layer in RESNET50}, key=str)


def test_kernels_of_a_resnet18_are_those_of_the_published_engine_log():
    # 20 convolutions, max pool, global pool, linear, and the reformat of the input; Add and ReLU are fused
    kernels = fuse(walk(spec("resnet18")))
    assert [k.kind for k in kernels].count("conv") == 20
    assert len(kernels) == 24
    assert sum(k.skip for k in kernels) == 8
    assert sum(k.macs for k in kernels) == total_macs(walk(spec("resnet18")))
    assert len(fuse(walk(spec("resnet18")), add_fuses=False)) == 32


@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "resnet50", "resnext50_32x4d", "resnet50d"])
def test_macs_of_kernels_are_those_of_the_layers(arch):
    layers = walk(spec(arch))
    assert sum(k.macs for k in fuse(layers)) == total_macs(layers)


def total(device=ORIN, layers=RESNET50, **kwargs):
    return predict(layers, device, **{"precision": "int8", **kwargs}).p50_ms


@given(device=st.sampled_from(JETSONS), batch=st.integers(1, 64), more=st.integers(1, 64), data=st.data())
@settings(max_examples=30, deadline=None)
def test_monotone_in_batch_and_clocks(device, batch, more, data):
    precision = data.draw(st.sampled_from(device.precisions))
    base = total(device, precision=precision, batch=batch)
    assert total(device, precision=precision, batch=batch + more) > base
    mode = device.mode()
    for faster in (
        Overrides(gpu_mhz=mode.gpu_mhz * 1.1),
        Overrides(emc_mhz=mode.emc_mhz * 1.1),
    ):
        assert total(device, precision=precision, batch=batch, overrides=faster) < base
    if mode.sm_count > 1:
        fewer = Overrides(sm_count=mode.sm_count - 1)
        assert total(device, precision=precision, batch=batch, overrides=fewer) > base


conv = st.builds(
    Kernel,
    name=st.just("c"),
    kind=st.just("conv"),
    pixels=st.integers(1, 12544),
    in_width=st.integers(1, 2048),
    width=st.integers(1, 2048),
    taps=st.sampled_from([1, 9]),
    in_pixels=st.integers(1, 12544),
    skip=st.booleans(),
    groups=st.just(1),
    first=st.just(False),
)


@given(device=st.sampled_from(JETSONS), kernel=conv, data=st.data())
@settings(max_examples=200, deadline=None)
def test_widths(device, kernel, data):
    precision = data.draw(st.sampled_from(device.precisions))
    price = rates(device, precision)

    def ms(k):
        return sum(t.ms for t in kernel_times([k], price, batch=1))

    aligned = kernel._replace(in_width=padded(kernel.in_width, price.align), width=padded(kernel.width, price.align))
    assert ms(kernel) >= ms(aligned)
    assert ms(aligned._replace(width=aligned.width + price.align)) > ms(aligned)
    assert ms(aligned._replace(in_width=aligned.in_width + price.align)) > ms(aligned)
    if precision == "fp16" and kernel.in_width % price.align:
        assert ms(kernel) >= ms(aligned) + price.overhead_ms


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_unaligned_block_costs_at_least_the_padded_one(precision):
    dense = spec("resnet18")
    block = dense.block("layer3.1")

    def with_width(n):
        return walk(dense.replace_blocks({block.name: block.model_copy(update={"widths": (n, block.widths[1])})}))

    at = {n: total(layers=with_width(n), precision=precision) for n in (191, 192, 224, 256)}
    assert at[192] <= at[191]
    assert at[192] < at[224] < at[256]
    if precision == "fp16":
        assert at[191] > at[192] + rates(ORIN, "fp16").overhead_ms * 0.99


def test_the_cost_function_is_the_prediction_and_a_sum_over_segments():
    cost = cost_function(ORIN, precision="int8", batch=4)
    assert cost(RESNET50) == pytest.approx(total(batch=4), rel=1e-9)
    segments, current = [], []
    for layer in RESNET50:
        if layer.op in ("input", "conv", "max_pool", "global_pool", "linear") and current:
            segments.append(current)
            current = []
        current.append(layer)
    segments.append(current)
    parts = sum(cost([x for x in s if not (x.op == "add" and s[0].name.endswith("downsample.0"))]) for s in segments)
    assert parts == pytest.approx(cost(RESNET50), rel=0.25)


@pytest.mark.parametrize("told", ["30W", "MODE_30W", "mode_30w"])
def test_a_power_mode_is_found_by_what_nvpmodel_says_of_it(told):
    assert ORIN.mode(told).name == "30W"
    assert total(power_mode=told) == total(power_mode="30W")
    own = ORIN.mode("30W").model_copy(update={"name": "MODE_30W"})
    assert ORIN.model_copy(update={"modes": (own,)}).mode(told) is own


def test_power_modes_change_multiprocessors_as_well_as_clocks():
    fast, slow = total(), total(power_mode="30w")
    by_clock_alone = total(overrides=Overrides(gpu_mhz=612))
    assert fast < by_clock_alone < slow
    assert predict(RESNET50, ORIN, precision="int8", power_mode="30W").sm_count == 8


@pytest.mark.parametrize("device", JETSONS, ids=lambda d: d.name)
def test_every_board_predicts_in_every_precision_it_has(device):
    for precision in device.precisions:
        found = predict(walk(spec("resnet20")), device, precision=precision)
        assert 0 < found.low_ms < found.p50_ms < found.high_ms
        assert found.metric().provenance == "predicted"
        assert sum(k.ms for k in found.kernels) == pytest.approx(found.p50_ms)


def test_a_stand_in_architecture_has_a_wider_band():
    thor = predict(RESNET50, load_device("jetson-thor-t5000"), precision="int8")
    orin = predict(RESNET50, ORIN, precision="int8")
    assert thor.high_ms / thor.p50_ms > 1.3 * orin.high_ms / orin.p50_ms


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(TargetError, match="no latency is predicted"):
        predict(RESNET50, load_device("cpu"), precision="int8")
    with pytest.raises(TargetError, match="does not compute in int8"):
        predict(RESNET50, load_device("jetson-nano"), precision="int8")
    with pytest.raises(TargetError, match="no power mode"):
        total(power_mode="999W")
    with pytest.raises(BadInput):
        total(batch=0)
    with pytest.raises(BadInput):
        Overrides(gpu_mhz=-1.0)


def log_errors_of(relative):
    return np.abs(np.log1p(relative))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("errors", "stored"),
    [("pair_errors", "bands"), ("device_errors", "unseen_device_bands")],
)
def test_a_band_holds_its_share_of_the_errors_it_is_made_for(published, errors, stored):
    document = json.loads(CONSTANTS.read_text())[stored]
    assert document == getattr(published.fitted, stored)
    found = log_errors_of(getattr(published, errors))
    low = np.array([g.precision != "fp32" for g in published.groups])
    for pool, precision in ((found[~low], "fp32"), (found[low], "fp16"), (found[low], "int8")):
        # the narrowest width among the errors themselves that holds the share; stored rounded to three digits
        narrowest = min(w for w in pool if np.mean(pool <= w) >= fit.COVERAGE)
        assert document["ampere"][precision] == pytest.approx(narrowest, abs=6e-4)


@pytest.mark.parametrize("device", JETSONS, ids=lambda d: d.name)
def test_only_boards_and_networks_with_published_figures_get_the_narrow_band(device, groups):
    model = fitted_model()
    named = {g.device for g in groups}
    assert set(model.devices) == named
    architecture = "ampere" if device.architecture == "blackwell" else device.architecture
    for layers, known in ((RESNET50, True), (RESNET20, False)):
        found = predict(layers, device, precision="fp16")
        half = np.log(found.high_ms / found.p50_ms)
        narrow, wide = (
            (model.bands, model.unlike_bands)
            if device.name in named
            else (model.unseen_device_bands, model.unlike_unseen_bands)
        )
        doubled = 2 if device.architecture == "blackwell" else 1
        assert half == pytest.approx(doubled * (narrow if known else wide)[architecture]["fp16"])
        assert ("no published figure of this board" in found.notes[0]) == (device.name not in named)
        assert ("too few published figures" in found.notes[-1]) == (not known)
        assert as_document(found)["notes"] == list(found.notes)


@pytest.mark.parametrize(
    ("network", "on_orin", "on_xavier"),
    [
        ("resnet50", True, True),
        ("resnet101", True, True),
        ("resnet18", False, True),  # on Orin three figures, of boards in no documented state
        ("resnet20", False, False),
        ("resnext50_32x4d", False, False),  # known from the Nano and the TX2
    ],
)
def test_a_network_is_known_by_its_kernels(network, on_orin, on_xavier):
    kernels = fuse(walk(spec(network)))
    assert is_known(kernels, ORIN) == on_orin
    assert is_known(kernels, load_device("jetson-agx-xavier")) == on_xavier


def test_what_makes_a_network_another_one():
    kernels = fuse(walk(spec("resnet50")))
    assert is_known(kernels, ORIN)
    sums = [Kernel(f"m{i}", "move", 3136, 256, 256, in_pixels=3136) for i in range(40)]
    depthwise = [k._replace(groups=k.in_width) if k.taps == 9 else k for k in kernels]
    four_times = fuse(walk(spec("resnet50").replace(input_shape=(3, 448, 448))))
    for other in (kernels + sums, depthwise, four_times, sums, []):
        assert not is_known(other, ORIN)


@pytest.mark.slow
def test_bands_of_boards_without_figures_leave_the_version_alone(published):
    # gates compare predictions of one version: bands of unseen boards change no prediction, and so not the version
    widths = {"ampere": {"fp32": 9.0, "fp16": 9.0, "int8": 9.0}}
    x = fit.fit(published.groups)
    bands = published.fitted.bands
    model = partial(fit.model_of, x, devices=(), networks={}, unlike_unseen=bands)
    versions = {model(bands, unseen_device=w, unlike=v).version for w, v in ((widths, bands), (bands, widths))}
    assert versions == {published.fitted.version}
    assert model(widths, unseen_device=bands, unlike=bands).version not in versions


def test_a_prediction_keeps_its_circumstances_in_metric_and_document():
    found = predict(RESNET50, ORIN, precision="fp16", batch=4, power_mode="30W")
    metric = found.metric()
    assert metric.low < metric.value < metric.high
    assert (metric.batch, metric.precision, metric.power_mode, metric.device) == (4, "fp16", "30W", ORIN.name)
    document = as_document(found)
    assert (document["batch"], document["low_ms"], document["high_ms"]) == (4, metric.low, metric.high)
    for shown, kernel in zip(document["layers"], found.kernels, strict=True):
        assert shown["overhead_ms"] + shown["compute_ms"] + shown["memory_ms"] == pytest.approx(shown["ms"])
        assert (shown["compute_ms"], shown["memory_ms"]) == (kernel.compute_ms, kernel.memory_ms)
    assert any(k["compute_ms"] > 0 for k in document["layers"])


@pytest.mark.parametrize("change", [{"power_mode": "30W"}, {"overrides": Overrides(gpu_mhz=700)}, {"batch": 3}])
def test_the_cost_function_is_the_prediction_in_every_mode(change):
    assert cost_function(ORIN, precision="int8", **change)(RESNET50) == pytest.approx(total(**change), rel=1e-9)
    assert total(**change) != pytest.approx(total())


def test_a_grouped_convolution_is_priced_by_its_groups():
    dense = Kernel("c", "conv", pixels=196, in_width=256, width=256, taps=9, in_pixels=196)
    grouped = dense._replace(groups=32)
    work = {k.groups: work_of(k, batch=1, align=32, element_bytes=1, pad_kernels=False) for k in (dense, grouped)}
    # 8 of 256 channels per group, which is what they are padded to
    assert work[1].macs == 196 * 256 * 9 * 256
    assert work[32].macs == 196 * 256 * 9 * 8
    assert work[1].bytes - work[32].bytes == 256 * 9 * (256 - 8)


def test_a_grouped_multiplication_takes_the_time_of_several_dense_ones():
    grouped = Kernel("c", "conv", pixels=196, in_width=256, width=256, taps=9, groups=32, in_pixels=196)
    price = rates(ORIN, "fp16")._replace(depth_ms=0.0)
    macs = work_of(grouped, batch=1, align=8, element_bytes=2, pad_kernels=False).macs
    assert price_of(grouped, price, batch=1)[0] == pytest.approx(macs * price.mac_ms * fitted_model().grouped)
    assert fitted_model().grouped > 1
