"""Reconstruction: its numerics against brute force, its promises, and its worth on a small trained network."""

import itertools
from pathlib import Path

import pytest
import torch
from engines import prune, prune_by_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune_core import SPECS, every_spec, random_checkpoint

from compress.checkpoints import load_checkpoint
from compress.data import load_dataset
from compress.prune import Budget, apply, measure
from compress.prune.activations import advance, chunks_of, patches, pixels_at
from compress.prune.apply import channels_kept
from compress.prune.fold import Folded, folded, unfolded
from compress.prune.gradients import sampled_gradients
from compress.prune.method import Context
from compress.prune.recalibrate import recalibrate
from compress.prune.solve import add_gram, damped, mirrored, obs_curve, refit, ridge_for
from compress.resnet import build_model
from rescompress.core.layers import walk

ROOT = Path(__file__).parents[1]


def least_squares_error(h, w, columns):
    """Smallest trace((w - v) h (w - v)^T) over v that is zero outside `columns`."""
    v = torch.zeros_like(w)
    v[:, columns] = torch.linalg.solve(h[columns][:, columns], h[columns] @ w.T).T
    return float(((w - v) @ h @ (w - v).T).trace())


@pytest.mark.parametrize("columns", [1, 9, 64, 65, 200, 520])
def test_half_of_the_products_make_the_whole_second_moment(columns):
    generator = torch.Generator().manual_seed(columns)
    gram, rows = torch.zeros(columns, columns), torch.randn(300, columns, generator=generator)
    add_gram(gram, rows[:100])
    add_gram(gram, rows[100:])
    torch.testing.assert_close(mirrored(gram), rows.double().T @ rows.double(), atol=1e-3, rtol=1e-5)


@given(seed=st.integers(0, 10**6), units=st.integers(2, 6), width=st.sampled_from([1, 4]))
@settings(max_examples=30, deadline=None)
def test_obs_error_is_the_least_squares_error(seed, units, width):
    g = torch.Generator().manual_seed(seed)
    parts = []
    for outputs in (3, 5):
        x = torch.randn(60, units * width, generator=g, dtype=torch.float64)
        parts.append((damped(x.T @ x / 60, 1e-3), torch.randn(outputs, units * width, generator=g, dtype=torch.float64)))
    curve = obs_curve(parts, units)
    for k in range(units):
        columns = [u * width + i for u in curve.keep(units - k) for i in range(width)]
        assert curve.error[k] == pytest.approx(sum(least_squares_error(h, w, columns) for h, w in parts), rel=1e-6, abs=1e-9)
    singles = [
        sum(least_squares_error(h, w, [i for i in range(units * width) if i // width != u]) for h, w in parts)
        for u in range(units)
    ]
    assert curve.error[1] == pytest.approx(min(singles), rel=1e-6)


@given(seed=st.integers(0, 10**6), relu=st.booleans(), few=st.booleans(), skip=st.booleans())
@settings(max_examples=40, deadline=None)
def test_refit_never_makes_it_worse(seed, relu, few, skip):
    g = torch.Generator().manual_seed(seed)
    n = 3 if few else 200
    x = torch.randn(n, 12, generator=g)
    w, b = torch.randn(4, 12, generator=g), torch.randn(4, generator=g)
    target = torch.randn(n, 4, generator=g) * 2
    s = torch.randn(n, 4, generator=g) if skip else None
    fit = refit(x, target, w, b, skip_NO=s, relu=relu)
    out = x @ fit.w_OD.T + fit.b_O + (0 if s is None else s)
    cut = (lambda t: t.clamp_min(0)) if relu else (lambda t: t)
    error = float((cut(out) - cut(target)).square().mean())
    assert error <= fit.before * (1 + 1e-5)
    assert error == pytest.approx(fit.after, rel=1e-3, abs=1e-6)
    alone = x @ fit.w_OD.T + fit.b_O
    assert torch.allclose(fit.mean_O, alone.mean(0), rtol=1e-3, atol=1e-4)
    assert torch.allclose(fit.var_O, alone.var(0, correction=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [12, 48, 96])
def test_what_few_rows_are_fitted_to_holds_for_others(rows):
    """Columns of a spectrum as features have, some of them cut out; about as many rows as columns are worst of all."""
    g = torch.Generator().manual_seed(rows)
    columns, kept = 64, 48
    mix = torch.linalg.qr(torch.randn(columns, columns, generator=g)).Q * torch.arange(1, columns + 1) ** -0.5
    whole = torch.randn(columns, 16, generator=g).T
    found = []
    for ridge in (None, 1e-3):
        g.manual_seed(1)
        x, fresh = (torch.randn(n, columns, generator=g) @ mix.T for n in (rows, 2000))
        fit = refit(x[:, :kept], x @ whole.T, whole[:, :kept], torch.zeros(16), relu=False, ridge=ridge)
        off = fresh[:, :kept] @ fit.w_OD.T + fit.b_O - fresh @ whole.T
        found.append(float(off.square().mean() / (fresh[:, kept:] @ whole[:, kept:].T).square().mean()))
    assert found[0] < 1.0
    assert found[0] < found[1]


def test_the_penalty_is_that_of_many_rows_until_they_are_few():
    assert ridge_for(32_768, 576) == ridge_for(10**6, 64) == ridge_for(512, 64) == 1e-3
    assert ridge_for(2304, 2304) == pytest.approx(64e-3)
    assert ridge_for(108, 4608) > 100


def test_some_images_are_enough_to_begin_with():
    """With an unchanging penalty, 0.46 of the digits are right after a cut on two images, and 0.82 after one on four."""
    checkpoint = load_checkpoint(ROOT / "examples" / "resnet20_digits.safetensors")
    data = load_dataset("builtin:digits", checkpoint.spec)
    few = data.train.take(4, 0).tensor()
    for count, least in ((2, 0.8), (4, 0.95)):
        made = prune(checkpoint, budget=Budget(kind="macs", value=0.5), calibration_x=few[:count]).checkpoint
        with torch.no_grad():
            scores = build_model(made.spec, made.state_dict)(data.val.tensor())
        assert (scores.argmax(1).numpy() == data.val.labels).mean() > least


def test_a_layer_that_is_too_wide_keeps_its_weights_and_that_is_told(monkeypatch):
    spec = SPECS["bottleneck"]
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x = torch.randn(24, *spec.input_shape)
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.6), align=1, calibration_x=x)
    cut = apply(checkpoint, result.plan)
    sizes = {layer.name: layer.weight_shape for layer in walk(cut.spec) if layer.op in ("conv", "linear")}
    columns = {name: int(torch.tensor(shape[1:]).prod()) for name, shape in sizes.items()}
    limit = sorted(columns.values())[-3]
    monkeypatch.setattr("compress.prune.methods.reconstruct._MOST_COLUMNS", limit)
    notes = []
    made = prune_by_plan(checkpoint, result.plan, calibration_x=x, note=notes.append)
    wide = {name for name, count in columns.items() if count > limit}
    assert wide
    assert all(torch.equal(made.state_dict[f"{n}.weight"], cut.state_dict[f"{n}.weight"]) for n in wide)
    told = next(note for note in notes if note.startswith("not refitted"))
    assert set(told.rpartition(": ")[2].split(", ")) == wide
    assert any(not torch.equal(made.state_dict[f"{n}.weight"], cut.state_dict[f"{n}.weight"]) for n in columns.keys() - wide)


def test_refit_finds_the_exact_map_behind_a_relu():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=g)
    true_w, true_b = torch.randn(3, 6, generator=g), torch.randn(3, generator=g)
    start_w = true_w + 0.3 * torch.randn(3, 6, generator=g)
    fit = refit(x, x @ true_w.T + true_b, start_w, torch.zeros(3), relu=True, ridge=1e-6, rounds=30)
    assert fit.after < 0.02 * fit.before


@every_spec
def test_rows_times_weights_are_the_pixels_of_the_layer(spec):
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    model = build_model(spec, checkpoint.state_dict)
    seen = {}
    with torch.no_grad():
        model(torch.randn(3, *spec.input_shape), lambda name, value: seen.update({name: value}))
    for layer in model.layers:
        if layer.op != "conv" or layer.operation.groups > 1:
            continue
        pixels = layer.out_shape[1] * layer.out_shape[2]
        places = torch.stack([torch.randperm(pixels)[: max(1, pixels // 2)] for _ in range(3)])
        weight = checkpoint.state_dict[f"{layer.name}.weight"]
        bias = checkpoint.state_dict.get(f"{layer.name}.bias", torch.zeros(len(weight)))
        made = patches(seen[layer.inputs[0]], layer, places) @ weight.flatten(1).T + bias
        width = layer.out_shape[2]
        wanted = torch.stack([seen[layer.name][i, :, p // width, p % width] for i in range(3) for p in places[i]])
        assert torch.allclose(pixels_at(seen[layer.name], places), wanted)
        assert torch.allclose(made, wanted, rtol=1e-4, atol=1e-4)


@every_spec
def test_a_chunk_in_pieces_is_the_network(spec):
    checkpoint = random_checkpoint(spec)
    model = build_model(spec, checkpoint.state_dict)
    x = torch.randn(3, *spec.input_shape, dtype=torch.float64)
    whole = model(x).detach()
    for chunk in chunks_of(model.network):
        x = advance(model, chunk, x, own=False)
    assert torch.allclose(x, whole, rtol=1e-9, atol=1e-9)


@every_spec
def test_unfolding_keeps_the_output(spec):
    checkpoint = random_checkpoint(spec)
    x = torch.randn(2, *spec.input_shape, dtype=torch.float64)
    before = build_model(spec, checkpoint.state_dict)(x)
    tensors = dict(checkpoint.state_dict)
    for layer in walk(spec):
        if layer.op in ("conv", "linear"):
            f = folded(checkpoint, layer)
            tensors |= unfolded(
                checkpoint, layer, Folded(f.weight_OIKK, f.bias_O, f.output), f.bias_O + 0.3, f.bias_O.abs() + 0.5
            )
    assert torch.allclose(build_model(spec, tensors)(x), before, rtol=1e-9, atol=1e-9)


@every_spec
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_repair_brings_the_outputs_closer(spec, scope):
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x = torch.randn(96, *spec.input_shape)
    budget = Budget(kind="macs", value=0.6)
    repaired = prune(checkpoint, budget=budget, scope=scope, align=1, calibration_x=x)
    plain = prune(checkpoint, method="magnitude", budget=budget, scope=scope, align=1, calibration_x=x)
    fresh = torch.randn(64, *spec.input_shape)
    dense = build_model(spec, checkpoint.state_dict)(fresh)

    def distance(result):
        return float(
            (build_model(result.checkpoint.spec, result.checkpoint.state_dict)(fresh) - dense).detach().square().mean()
        )

    if spec.head is not None:
        assert distance(repaired) < distance(plain)
    assert repaired.macs_after <= 0.6 * repaired.macs_before


@every_spec
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_repair_never_makes_a_block_worse(spec, scope):
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x = torch.randn(24, *spec.input_shape)
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.6), scope=scope, align=1, calibration_x=x)
    cut = apply(checkpoint, result.plan).state_dict
    keep = channels_kept(spec, result.plan)

    def outputs(spec_, tensors):
        seen = {}
        with torch.no_grad():
            build_model(spec_, tensors)(x, lambda name, value: seen.update({name: value}))
        return seen

    dense = outputs(spec, checkpoint.state_dict)
    repaired = outputs(result.checkpoint.spec, result.checkpoint.state_dict)
    for block in result.checkpoint.spec.blocks:
        out = [layer.name for layer in walk(result.checkpoint.spec) if layer.block == block.name][-1]
        unrepaired = {k: cut[k] if k.startswith(f"{block.name}.") else v for k, v in result.checkpoint.state_dict.items()}
        wanted = dense[out][:, keep[out]]
        before = float((outputs(result.checkpoint.spec, unrepaired)[out] - wanted).square().mean())
        assert float((repaired[out] - wanted).square().mean()) <= before * (1 + 1e-4) + 1e-9


def test_running_statistics_are_those_of_the_data():
    checkpoint = random_checkpoint(SPECS["basic-projection"], dtype=torch.float32)
    x = torch.randn(64, *checkpoint.spec.input_shape)
    pruned = prune(checkpoint, budget=Budget(kind="macs", value=0.6), align=1, calibration_x=x).checkpoint
    again = recalibrate(pruned, x, batch_size=64)
    for key, value in pruned.state_dict.items():
        if key.endswith("layer2.1.bn2.running_mean"):
            assert torch.allclose(value, again.state_dict[key], atol=0.1 * float(value.abs().max()))


def test_prune_is_deterministic():
    checkpoint = random_checkpoint(SPECS["bottleneck"], dtype=torch.float32)
    x = torch.randn(16, *checkpoint.spec.input_shape)
    a, b = (prune(checkpoint, budget=Budget(kind="macs", value=0.6), align=1, calibration_x=x, seed=3) for _ in range(2))
    assert a.plan == b.plan
    assert all(torch.equal(v, b.checkpoint.state_dict[k]) for k, v in a.checkpoint.state_dict.items())


def test_gradients_sum_over_images_alone():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    x = torch.randn(6, 3, 8, 8)
    context = Context(checkpoint, [], calibration_NCHW=x)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    seen = list(sampled_gradients(context, model, x, ["layer1.0.bn2", "fc"]))
    value, gradient = seen[0]["fc"]
    assert torch.allclose(gradient.sum(1), torch.zeros(6), atol=1e-5)
    assert value.shape == (6, 5)


def test_channels_that_never_change_go_first():
    spec = SPECS["bottleneck"]
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    checkpoint.state_dict["layer1.1.bn2.bias"].fill_(-1e3)  # behind its ReLU the block's inner channels are zero
    x = torch.randn(64, *spec.input_shape)
    curves = measure(checkpoint, calibration_x=x).groups
    assert curves["layer1.1.conv1"].error[-1] == curves["layer1.1.conv2"].error[-1] == 0.0
    assert all(c.error[-1] > 1e-6 for name, c in curves.items() if not name.startswith("layer1.1"))
    made = prune(checkpoint, budget=Budget(kind="macs", value=0.9), align=1, calibration_x=x)
    assert {name for name, width in made.widths.items() if width < len(curves[name].order)} <= {
        "layer1.1.conv1",
        "layer1.1.conv2",
    }
    dense, small = (build_model(c.spec, c.state_dict) for c in (checkpoint, made.checkpoint))
    assert (dense(x) - small(x)).abs().max() < 1e-3 * dense(x).abs().max()


def test_a_latency_budget_may_drop_blocks():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    x = torch.randn(32, *checkpoint.spec.input_shape)

    def kernels(layers):
        return 1.0 * sum(layer.op in ("conv", "linear") for layer in layers)

    result = prune(checkpoint, budget=Budget(kind="latency", value=0.75), align=1, calibration_x=x, cost=kernels)
    assert result.plan.dropped_blocks
    assert result.cost_after <= 0.75 * result.cost_before
    kept = prune(checkpoint, budget=Budget(kind="macs", value=0.75), align=1, calibration_x=x)
    assert not kept.plan.dropped_blocks


def test_a_constant_in_the_cost_does_no_harm():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)

    def cost(layers):
        return sum(layer.macs for layer in layers) + 1e5 * (len(layers) > 6)

    for fraction in (0.5, 0.8):
        result = prune(checkpoint, method="magnitude", budget=Budget(kind="latency", value=fraction), align=1, cost=cost)
        assert 0.93 * fraction <= result.cost_after / result.cost_before <= fraction


def test_one_width_more_always_costs_more_error():
    checkpoint = random_checkpoint(SPECS["bottleneck"], dtype=torch.float32)
    x = torch.randn(24, *checkpoint.spec.input_shape)
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.6), scope="all", align=1, calibration_x=x)
    for curve in result.curves.groups.values():
        assert all(b >= a for a, b in itertools.pairwise(curve.error))
        assert curve.error[-1] > 0


def test_a_plan_gives_the_same_network_again():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    x = torch.randn(24, 3, 8, 8)
    for method in ("reconstruct", "magnitude"):
        first = prune(checkpoint, method=method, budget=Budget(kind="macs", value=0.5), align=1, calibration_x=x)
        again = prune_by_plan(checkpoint, first.plan, calibration_x=x)
        assert again.spec == first.checkpoint.spec
        assert all(torch.equal(v, again.state_dict[k]) for k, v in first.checkpoint.state_dict.items())
