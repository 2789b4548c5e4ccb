"""Groups, plans, application and allocation, against oracles in float64 over every kind of network."""

import json

import numpy as np
import pytest
import torch
from engines import prune, prune_by_plan
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.checkpoints.base import Checkpoint
from compress.prune import Budget, PruningPlan, apply, choose, find_groups, measure, method_names, prunable, pruned_network
from compress.prune.allocate import Allocator, _knapsack, allowed_widths, nearest_width
from compress.prune.apply import channels_kept
from compress.prune.cost import MACS, PARAMS
from compress.prune.gradients import sampled_gradients
from compress.prune.groups import Sizes, droppable, stages
from compress.prune.method import Context, Curves, ErrorCurve, curve_of
from compress.prune.recalibrate import recalibrate
from compress.resnet import build_model, tensors_of
from compress.zoo import names
from compress.zoo import spec as spec_of
from edge_targets.catalog import load_target
from edge_targets.latency import cost_function
from rescompress.core.errors import BadInput, BudgetError, DataError
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.recipe import network_of
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

PIXELS = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)


def cifar_spec(blocks=2, widths=(8, 12, 16), side=8):
    stages, stream = [], widths[0]
    for s, w in enumerate(widths):
        stage = []
        for i in range(blocks):
            stride = 2 if s and not i else 1
            before = (w - stream) // 2
            pad = tuple(c - before if before <= c < before + stream else -1 for c in range(w)) if stride == 2 else None
            shortcut = "pad" if pad else "identity"
            name = f"layer{s + 1}.{i}"
            stage.append(Block(name=name, kind="basic", widths=(w, w), stride=stride, shortcut=shortcut, channel_map=pad))
            stream = w
        stages.append(tuple(stage))
    stem = Stem(convs=(StemConv(width=widths[0], kernel=3, stride=1),), max_pool=False)
    return ModelSpec(
        arch="cifar",
        input_shape=(3, side, side),
        stem=stem,
        stages=tuple(stages),
        head=Head(num_classes=5),
        preprocessing=PIXELS,
    )


def imagenet_spec(kind, *, groups=1, deep=False, pool=False, batch_norm=True, head=None, blocks=2, side=16):
    out = 1 if kind == "basic" else 2
    convs = (4, 6, 8) if deep else (8,)
    stem = Stem(
        convs=tuple(StemConv(width=w, kernel=3, stride=1 if i else 2) for i, w in enumerate(convs)),
        batch_norm=batch_norm,
        conv_bias=not batch_norm,
    )
    stages, stream = [], convs[-1]
    for s, w in enumerate((8, 12)):
        stage = []
        for i in range(blocks):
            stride = 2 if s and not i else 1
            inner = (w,) if kind == "basic" else (w, 2 * w)
            stage.append(
                Block(
                    name=f"layer{s + 1}.{i}",
                    kind=kind,
                    widths=(*inner, w * out),
                    stride=stride,
                    stride_at=0 if kind == "basic" else 1,
                    groups=groups,
                    shortcut="projection" if stride == 2 or stream != w * out else "identity",
                    shortcut_pool=pool,
                    batch_norm=batch_norm,
                    conv_bias=not batch_norm,
                )
            )
            stream = w * out
        stages.append(tuple(stage))
    return ModelSpec(
        arch=kind,
        input_shape=(3, side, side),
        stem=stem,
        stages=tuple(stages),
        head=Head(num_classes=5) if head is None else head,
        preprocessing=PIXELS,
    )


SPECS = {
    "cifar-pad": cifar_spec(),
    "basic-projection": imagenet_spec("basic"),
    "bottleneck": imagenet_spec("bottleneck"),
    "resnext": imagenet_spec("bottleneck", groups=4),
    "resnet-d": imagenet_spec("bottleneck", deep=True, pool=True),
    "no-batch-norm": imagenet_spec("basic", batch_norm=False),
    "deep-head": imagenet_spec("basic", head=Head(num_classes=3, hidden=(7,))),
    "max-and-average": imagenet_spec("basic", head=Head(num_classes=3, hidden=(7,), pool="max_avg")),
    "backbone": imagenet_spec("bottleneck").replace(head=None),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def random_checkpoint(spec, seed=0, dtype=torch.float64):
    """A network with every BatchNorm tensor random: fresh ones hide slicing bugs."""
    torch.manual_seed(seed)
    model = build_model(spec).to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.5)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return Checkpoint(spec, tensors_of(model))


def random_plan(spec, seed, *, drop=True):
    rng = np.random.default_rng(seed)
    keep = {}
    for g in prunable(find_groups(walk(spec)), "all"):
        if rng.random() < 0.8:
            keep[g.name] = tuple(sorted(rng.choice(g.size, size=rng.integers(1, g.size + 1), replace=False).tolist()))
    dropped = []
    for name in droppable(spec):
        stage = next(s for s in stages(spec) if name in [b.name for b in s])
        if drop and rng.random() < 0.4 and any(b.name not in [*dropped, name] for b in stage):
            dropped.append(name)
    return PruningPlan(
        arch=spec.arch, spec_digest=spec.digest, method="by hand", scope="all", keep=keep, dropped_blocks=tuple(dropped)
    )


def masked(checkpoint, plan):
    """The dense network as a function, with the removed channels forced to zero and dropped blocks bypassed."""
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    keep = channels_kept(checkpoint.spec, plan)
    by_name = {layer.name: layer for layer in model.layers}
    seen = {}

    def observe(name, value):
        layer = by_name[name]
        if layer.block in plan.dropped_blocks and name.endswith(".relu"):
            seen[name] = seen[by_name[f"{layer.block}.conv1"].inputs[0]]
            return seen[name]
        if layer.op in ("batch_norm", "conv", "channel_select") and len(keep[name]) < value.shape[1]:
            mask = torch.zeros(value.shape[1], dtype=value.dtype)
            mask[keep[name]] = 1
            value = value * mask[:, None, None]
        seen[name] = value
        return value

    def run(x):
        out = model(x, observe)
        return out if checkpoint.spec.num_classes else out[:, keep[model.layers[-1].name]]

    return run


@every_spec
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_pruned_network_equals_the_masked_dense_one(spec, seed):
    checkpoint = random_checkpoint(spec, seed)
    plan = random_plan(spec, seed)
    x = torch.randn(2, *spec.input_shape, dtype=torch.float64)
    pruned = apply(checkpoint, plan)
    small = build_model(pruned.spec, pruned.state_dict)(x)
    assert torch.allclose(small, masked(checkpoint, plan)(x), rtol=1e-9, atol=1e-10)


@every_spec
def test_keeping_everything_changes_nothing(spec):
    checkpoint = random_checkpoint(spec)
    plan = PruningPlan(arch="x", spec_digest=spec.digest, method="none", keep={})
    pruned = apply(checkpoint, plan)
    assert pruned.spec == network_of(spec)
    assert pruned.state_dict.keys() == checkpoint.state_dict.keys()
    assert all(torch.equal(pruned.state_dict[k], v) for k, v in checkpoint.state_dict.items())


@every_spec
def test_groups_partition_every_slot_once(spec):
    layers = walk(spec)
    groups = find_groups(layers)
    tensors = [t for g in groups for t in g.channels]
    assert sorted(tensors) == sorted(layer.name for layer in layers)
    for layer in layers:
        makers = [g for g in groups if layer.name in g.producers]
        readers = [g for g in groups if layer.name in g.consumers]
        assert len(makers) == (layer.op == "conv")
        assert len(readers) == (layer.op in ("conv", "linear"))
    for g in groups:
        assert all(g.size * c == next(x.out_shape[0] for x in layers if x.name == t) for t, c in g.channels.items())


@every_spec
def test_inner_groups_stay_in_their_block(spec):
    layers = {layer.name: layer for layer in walk(spec)}
    inner = prunable(find_groups(list(layers.values())), "inner")
    per_block = {"basic": 1, "bottleneck": 1 if spec.blocks[0].groups > 1 else 2}[spec.blocks[0].kind]
    assert len(inner) == per_block * len(spec.blocks) + len(spec.stem.convs) - 1
    for g in inner:
        assert len({layers[t].block for t in (*g.channels, *g.consumers)}) == 1


@every_spec
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_cost_of_resized_layers_is_that_of_the_pruned_network(spec, seed):
    plan = random_plan(spec, seed, drop=False)
    sizes = Sizes(spec)
    units = {name: len(keep) for name, keep in plan.keep.items()}
    resized = [sizes.resized(layer, units) for layer in sizes.layers]
    after = pruned_network(spec, plan)
    assert [(x.in_shapes, x.out_shape, x.weight_shape) for x in resized] == [
        (x.in_shapes, x.out_shape, x.weight_shape) for x in walk(after)
    ]
    assert MACS(resized) == total_macs(walk(after))
    segments = sizes.segments()
    assert [layer for s in segments for layer in s] == sizes.layers
    assert PARAMS(walk(after)) == sum(p.numel() for p in build_model(after).parameters())


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(SPECS)))
@settings(max_examples=20, deadline=None)
def test_plan_survives_json(seed, name):
    plan = random_plan(SPECS[name], seed)
    assert PruningPlan.model_validate(json.loads(plan.model_dump_json())) == plan


def test_inputs_are_not_mutated():
    checkpoint = random_checkpoint(SPECS["bottleneck"], dtype=torch.float32)
    before = {k: v.clone() for k, v in checkpoint.state_dict.items()}
    x = torch.randn(16, *checkpoint.spec.input_shape)
    kept = x.clone()
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.5), align=1, calibration_x=x)
    for value in result.checkpoint.state_dict.values():
        value.zero_()
    assert torch.equal(x, kept)
    assert all(torch.equal(checkpoint.state_dict[k], v) for k, v in before.items())


@every_spec
@pytest.mark.parametrize("method", method_names())
def test_every_method_meets_its_budget(spec, method):
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x = torch.randn(24, *spec.input_shape)
    if method == "bn_scale" and not spec.stem.batch_norm:
        with pytest.raises(BadInput, match="there is none behind"):
            prune(checkpoint, method=method, budget=Budget(kind="macs", value=0.6), calibration_x=x)
        return
    costs = {"macs": total_macs, "params": total_params}
    for kind, cost in list(costs.items())[: 2 if method == "magnitude" else 1]:  # what is spent is no matter of the method
        result = prune(checkpoint, method=method, budget=Budget(kind=kind, value=0.6), align=2, calibration_x=x)
        after = cost(walk(result.checkpoint.spec))
        assert after <= 0.6 * cost(walk(spec))
        assert result.cost_after == after
        y = build_model(result.checkpoint.spec, result.checkpoint.state_dict)(x)
        assert torch.isfinite(y).all()


def is_kept_and_well_used(fraction, scope, drop):
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    result = prune(
        checkpoint, method="magnitude", budget=Budget(kind="macs", value=fraction), scope=scope, align=1, drop_blocks=drop
    )
    assert result.macs_after <= fraction * result.macs_before
    assert result.macs_after >= (fraction - 0.06) * result.macs_before


@pytest.mark.parametrize(("fraction", "scope", "drop"), [(0.35, "all", True), (0.62, "inner", True), (0.97, "all", False)])
def test_budget_is_never_exceeded_and_well_used(fraction, scope, drop):
    is_kept_and_well_used(fraction, scope, drop)


@pytest.mark.slow
@given(fraction=st.floats(0.35, 1.0), scope=st.sampled_from(["inner", "all"]), drop=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_budget_is_never_exceeded_and_well_used(fraction, scope, drop):
    is_kept_and_well_used(fraction, scope, drop)


def test_impossible_budget_names_the_smallest_reachable():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    with pytest.raises(BudgetError) as caught:
        prune(checkpoint, method="magnitude", budget=Budget(kind="macs", value=0.01), align=1)
    smallest = float(str(caught.value.remedy).split("smallest reachable is ")[1].split(" ")[0])
    result = prune(checkpoint, method="magnitude", budget=Budget(kind="macs", value=smallest + 1e-3), align=1)
    assert result.macs_after / result.macs_before == pytest.approx(smallest, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "value"), [("macs", 0.0), ("macs", 1.5), ("ratio", 1.0), ("ratio", -0.1), ("macs", float("nan"))]
)
def test_senseless_budgets_are_refused(kind, value):
    with pytest.raises(BudgetError):
        Budget(kind=kind, value=value)


def test_ratio_of_resnet50_keeps_aligned_widths():
    spec = imagenet_spec("bottleneck")
    wide = spec.replace_blocks({b.name: b.model_copy(update={"widths": (64, 64, b.widths[-1])}) for b in spec.blocks})
    result = prune(random_checkpoint(wide, dtype=torch.float32), method="magnitude", budget=Budget(kind="ratio", value=0.3))
    assert set(result.widths.values()) == {48}
    assert result.ratio == 0.25


def test_ties_keep_more():
    assert nearest_width((8, 16, 24), 12) == 16
    assert nearest_width((8, 16, 24), 11.9) == 8


@pytest.mark.parametrize(
    ("size", "align", "strict", "used"),
    [(64, 8, False, 8), (16, 8, False, 4), (16, 8, True, 8), (64, 32, False, 16), (3, 8, False, 1)],
)
def test_alignment_leaves_a_choice(size, align, strict, used):
    spec = cifar_spec(widths=(size, size, size))
    group = prunable(find_groups(walk(spec)), "inner")[0]
    widths, reached = allowed_widths(group, align, strict=strict)
    assert reached == used
    assert widths[-1] == size
    assert all(w % used == 0 for w in widths[:-1])


def test_a_multiple_that_leaves_nothing_to_do_is_told():
    checkpoint = random_checkpoint(cifar_spec(widths=(16, 32, 64)), dtype=torch.float32)
    half = {"method": "magnitude", "budget": Budget(kind="ratio", value=0.5), "strict_align": True}
    with pytest.raises(BadInput, match="multiple of 64"):
        prune(checkpoint, **half, align=64)
    result = prune(checkpoint, **half, align=32)
    assert any(n.startswith("4 groups stay as they are") for n in result.notes)
    assert {w for name, w in result.widths.items() if name.startswith("layer3")} == {32}


def test_channels_of_dropped_blocks_are_gone():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    plan = PruningPlan(
        arch="x",
        spec_digest=checkpoint.spec.digest,
        method="by hand",
        keep={"layer2.1.conv1": (0,)},
        dropped_blocks=("layer1.1",),
    )
    widths = plan.widths(checkpoint.spec)
    assert (widths["layer1.1.conv1"], widths["layer2.1.conv1"], widths["layer3.1.conv1"]) == ((8, 0), (12, 1), (16, 16))
    cut = {layer.name: layer.out_shape[0] for layer in walk(apply(checkpoint, plan).spec)}
    assert {name: after for name, (_, after) in widths.items() if after} == {name: cut[name] for name in widths if name in cut}


def test_notes_say_what_was_done():
    x = torch.randn(64, 3, 16, 16)
    half = {"method": "magnitude", "budget": Budget(kind="ratio", value=0.5), "align": 1, "calibration_x": x}
    plain = prune(random_checkpoint(SPECS["no-batch-norm"], dtype=torch.float32), **half).notes
    assert any("no BatchNorm" in n for n in plain)
    assert not any("was measured" in n for n in plain)
    told = prune(random_checkpoint(SPECS["bottleneck"], dtype=torch.float32), **half, drop_blocks=True).notes
    assert any("no block is dropped" in n for n in told)
    assert any("BatchNorm was measured" in n for n in told)


def test_small_groups_are_noted():
    result = prune(
        random_checkpoint(cifar_spec(widths=(16, 32, 64)), dtype=torch.float32),
        method="magnitude",
        budget=Budget(kind="ratio", value=0.3),
    )
    assert any("1 to 2, 5 to 4" in n or "to 4" in n for n in result.notes)


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(0.1, 1.0),
)
@settings(max_examples=100, deadline=None)
def test_knapsack_against_brute_force(items, fraction):
    import itertools

    options = [(np.array([e for e, _ in item]), np.array([c for _, c in item])) for item in items]
    limit = fraction * sum(max(c for _, c in item) for item in items)
    best = min(
        (
            sum(o[0][i] for o, i in zip(options, pick, strict=True))
            for pick in itertools.product(*[range(len(o[0])) for o in options])
            if sum(o[1][i] for o, i in zip(options, pick, strict=True)) <= limit * 0.995
        ),
        default=None,
    )
    chosen = _knapsack(options, limit)
    if chosen is None:
        assert best is None
        return
    assert sum(o[1][i] for o, i in zip(options, chosen, strict=True)) <= limit * (1 + 1e-9)
    if best is not None:
        assert sum(o[0][i] for o, i in zip(options, chosen, strict=True)) <= best + 1e-9


def grouped(dense, pruned):
    left = network_of(pruned).by_name
    convs = [layer for layer in walk(dense) if layer.op == "conv" and layer.name in left]
    return [(layer.operation.groups, left[layer.name].operation.groups) for layer in convs]


def test_blocks_and_stem_change_in_one_step_and_no_stage_is_left_empty():
    spec = cifar_spec(widths=(8,))
    thin = {b.name: b.model_copy(update={"widths": (8, 6)}) for b in spec.blocks}
    stem = Stem(convs=(StemConv(width=6, kernel=3, stride=1),), max_pool=False)
    assert spec.replace_blocks(thin, stem=stem).blocks[-1].widths[-1] == 6
    with pytest.raises(ValidationError):
        spec.replace_blocks(thin)
    several = cifar_spec()
    with pytest.raises(ValidationError):
        several.replace_blocks({b.name: None for b in several.stages[-1]})


def test_a_plan_that_cannot_be_told_in_units_of_the_dense_network_is_refused():
    spec = SPECS["resnext"]
    first = PruningPlan(arch="x", spec_digest=spec.digest, method="by hand", keep={"layer1.0.conv1": (2,)})
    second = PruningPlan(
        arch="x", spec_digest=pruned_network(spec, first).digest, method="by hand", keep={"layer1.0.conv1": (0, 1)}
    )
    with pytest.raises(BadInput, match="one convolution group"):
        second.after(first, spec)


def test_a_plan_that_names_channels_the_dense_network_does_not_is_refused():
    spec = imagenet_spec("bottleneck", groups=2)
    first = PruningPlan(arch="x", spec_digest=spec.digest, method="by hand", keep={"layer1.0.conv1": (1,)})
    left = pruned_network(spec, first)
    second = PruningPlan(arch="x", spec_digest=left.digest, method="by hand", keep={"layer1.0.conv2": (0, 1)})
    second.check(left)
    with pytest.raises(BadInput, match=r"layer1.0.conv2"):
        second.after(first, spec)


@pytest.mark.parametrize("kind", ["ratio", "macs"])
def test_a_grouped_convolution_with_one_group_left_stays_so_in_later_steps(kind):
    spec = imagenet_spec("bottleneck", groups=2)
    whole = random_checkpoint(spec, dtype=torch.float32)
    first = prune(whole, method="magnitude", budget=Budget(kind="ratio", value=0.5), align=1, scope="all")
    assert all(x.operation.groups == 1 for x in walk(first.checkpoint.spec) if x.op == "conv")
    budget = Budget(kind=kind, value=0.7 if kind == "ratio" else 0.3)
    second = prune(first.checkpoint, method="random", budget=budget, align=1, scope="all", reference=spec)
    assert total_macs(walk(second.checkpoint.spec)) < total_macs(walk(first.checkpoint.spec))
    assert pruned_network(spec, second.plan.after(first.plan, spec)) == second.checkpoint.spec


@every_spec
@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_two_plans_are_one(spec, seed):
    checkpoint = random_checkpoint(spec, seed)
    first = random_plan(spec, seed)
    once = apply(checkpoint, first)
    second = random_plan(once.spec, seed + 1)
    assume(all(before == 1 or after > 1 for before, after in grouped(spec, once.spec)))
    twice = apply(once, second)
    both = apply(checkpoint, second.after(first, spec))
    assert both.spec == twice.spec
    assert both.state_dict.keys() == twice.state_dict.keys()
    assert all(torch.equal(v, twice.state_dict[k]) for k, v in both.state_dict.items())


@pytest.mark.parametrize("budget", [Budget(kind="macs", value=0.5), Budget(kind="ratio", value=0.5)])
def test_a_budget_may_be_a_fraction_of_an_earlier_network(budget):
    spec = SPECS["bottleneck"]
    whole = random_checkpoint(spec, dtype=torch.float32)
    some = prune(
        whole, method="magnitude", budget=budget.model_copy(update={"value": 0.75 if budget.kind == "macs" else 0.3}), align=1
    )
    rest = prune(some.checkpoint, method="magnitude", budget=budget, align=1, reference=spec)
    once = prune(whole, method="magnitude", budget=budget, align=1)
    assert rest.macs_before == total_macs(walk(spec))
    if budget.kind == "ratio":
        assert rest.widths == once.widths
    else:
        assert 0.44 * rest.macs_before <= rest.macs_after <= 0.5 * rest.macs_before


@pytest.mark.parametrize("align", [8, 32])
def test_later_steps_are_aligned_as_the_first(align):
    spec = spec_of("resnet18_cifar")
    whole = random_checkpoint(spec, dtype=torch.float32)
    allowed = {g.name: {k * c for k in allowed_widths(g, align, strict=False)[0] for c in g.channels.values()}
               for g in Sizes(spec).groups.values()}  # fmt: skip
    checkpoint, plan = whole, None
    for fraction in (0.7, 0.5, 0.3):
        budget = Budget(kind="macs", value=fraction)
        step = prune(checkpoint, method="magnitude", budget=budget, align=align, reference=spec)
        checkpoint, plan = step.checkpoint, step.plan if plan is None else step.plan.after(plan, spec)
        for name, (_, left) in plan.widths(spec).items():
            assert left in allowed[name], name


def test_later_steps_prune_streams_of_which_a_block_has_gone():
    spec = spec_of("resnet20", input_shape=(3, 8, 8))
    whole = random_checkpoint(spec, dtype=torch.float32)
    gone = ("layer1.1", "layer2.1", "layer3.2")
    first = PruningPlan(arch="x", spec_digest=spec.digest, method="by hand", keep={}, dropped_blocks=gone)
    rest = apply(whole, first)
    budget = Budget(kind="ratio", value=0.5)
    second = prune(rest, method="magnitude", budget=budget, align=1, scope="all", reference=spec)
    streams = {g.name for g in Sizes(spec).groups.values() if g.kind == "stream"}
    assert streams
    assert all(second.widths[name] == Sizes(spec).groups[name].size // 2 for name in streams)


@pytest.mark.parametrize("budget", [Budget(kind="ratio", value=0.5), Budget(kind="macs", value=0.6)])
def test_a_later_step_may_find_nothing_left_to_do(budget):
    """16 channels in steps of 8: where the first step has reached 8, the last one has met its budget."""
    spec = spec_of("resnet20", input_shape=(3, 8, 8))
    narrow = spec.model_copy(update={"stages": spec.stages[:1]})
    whole = random_checkpoint(narrow, dtype=torch.float32)
    first = prune(whole, method="magnitude", budget=Budget(kind="ratio", value=0.5), align=8, strict_align=True)
    assert set(first.widths.values()) == {8}
    options = {"method": "magnitude", "align": 8, "strict_align": True}
    last = prune(first.checkpoint, budget=budget, reference=narrow, **options)
    assert last.checkpoint.spec == first.checkpoint.spec
    with pytest.raises(BudgetError):
        prune(first.checkpoint, budget=Budget(kind="macs", value=0.1), reference=narrow, **options)
    with pytest.raises(BadInput, match="no group can have fewer"):
        prune(first.checkpoint, budget=budget, **options)


def test_recalibration_weighs_all_images_alike():
    """66 images were 64 and 2, and the statistics of the two weighed as much as those of the 64."""
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    x = torch.randn(66, 3, 8, 8)
    x[64:] += 5
    means = (recalibrate(checkpoint, x, size).state_dict["bn1.running_mean"] for size in (64, 66))
    assert torch.allclose(*means, atol=1e-5)


def test_following_a_plan_tells_what_searching_tells():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    images = torch.randn(4, 3, 8, 8)
    found = prune(checkpoint, budget=Budget(kind="macs", value=0.6), align=1, calibration_x=images)
    told = []
    prune_by_plan(checkpoint, found.plan, calibration_x=images, note=told.append)
    assert any("only 4 calibration images" in note for note in told)
    assert any("only 4 calibration images" in note for note in found.notes)
    plain = prune(checkpoint, method="magnitude", budget=Budget(kind="macs", value=0.6), align=1, calibration_x=images)
    assert any("only 4 calibration images" in note for note in plain.notes), "BatchNorm is measured on them"


def test_batch_norm_is_measured_again_where_asked():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    x = torch.randn(32, 3, 8, 8)
    budget = Budget(kind="macs", value=0.6)

    def means(**options):
        result = prune(checkpoint, method="magnitude", budget=budget, align=1, calibration_x=x, **options)
        return torch.cat([v for k, v in result.checkpoint.state_dict.items() if k.endswith("running_mean")])

    assert torch.equal(means(), means(recalibrate=True))
    assert not torch.equal(means(), means(recalibrate=False))
    plain = prune(checkpoint, method="magnitude", budget=budget, align=1)
    assert all(torch.equal(v, apply(checkpoint, plain.plan).state_dict[k]) for k, v in plain.checkpoint.state_dict.items())
    with pytest.raises(BadInput, match="without images"):
        prune(checkpoint, method="magnitude", budget=budget, align=1, recalibrate=True)


def test_without_repair_the_chosen_channels_are_cut_and_nothing_is_refitted():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    options = {"calibration_x": torch.randn(32, 3, 8, 8), "seed": 1}
    budget = Budget(kind="macs", value=0.6)
    repaired = prune(checkpoint, budget=budget, align=1, **options)
    cut = prune(checkpoint, budget=budget, align=1, repair=False, **options)
    assert cut.plan == repaired.plan
    assert any("nothing was repaired" in note for note in cut.notes)
    wanted, measured = (
        apply(checkpoint, cut.plan).state_dict,
        recalibrate(apply(checkpoint, cut.plan), options["calibration_x"]),
    )
    for result in (cut.checkpoint, prune_by_plan(checkpoint, cut.plan, repair=False, **options)):
        for key, value in result.state_dict.items():
            assert torch.equal(value, measured.state_dict[key]), key
            assert "running" in key or "tracked" in key or torch.equal(value, wanted[key]), key
    weights = [k for k in wanted if k.endswith("conv2.weight")]
    assert not all(torch.equal(repaired.checkpoint.state_dict[k], wanted[k]) for k in weights)
    assert not all(torch.equal(measured.state_dict[k], v) for k, v in wanted.items() if "running" in k)


def test_plan_for_another_network_is_refused():
    plan = random_plan(SPECS["cifar-pad"], 0)
    with pytest.raises(BadInput, match="another network"):
        apply(random_checkpoint(SPECS["bottleneck"]), plan)


@pytest.mark.parametrize(
    "change",
    [
        {"keep": {"nothing": (0,)}},
        {"keep": {"layer1.0.conv1": ()}},
        {"keep": {"layer1.0.conv1": (1, 0)}},
        {"keep": {"layer1.0.conv1": (0, 99)}},
        {"dropped_blocks": ("layer2.0",)},
        {"dropped_blocks": ("layer1.0", "layer1.1")},
    ],
)
def test_broken_plans_are_refused(change):
    spec = SPECS["cifar-pad"]
    plan = PruningPlan(arch="x", spec_digest=spec.digest, method="none", keep={}).model_copy(update=change)
    with pytest.raises(BadInput):
        apply(random_checkpoint(spec), plan)


def test_methods_that_need_data_say_so():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    budget = Budget(kind="macs", value=0.5)
    with pytest.raises(BadInput, match="needs images"):
        prune(checkpoint, budget=budget)
    with pytest.raises(DataError, match="NaN"):
        prune(checkpoint, budget=budget, calibration_x=torch.full((4, 3, 8, 8), float("nan")))
    with pytest.raises(DataError, match="shape"):
        prune(checkpoint, budget=budget, calibration_x=torch.zeros(4, 3, 9, 9))
    with pytest.raises(BadInput, match="did you mean"):
        prune(checkpoint, method="magnitud", budget=budget)
    with pytest.raises(BadInput, match="target"):
        prune(checkpoint, method="magnitude", budget=Budget(kind="latency", value=0.5))


def test_nan_weights_are_reported():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    checkpoint.state_dict["layer2.0.conv1.weight"][0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        prune(checkpoint, budget=Budget(kind="macs", value=0.5), align=1, calibration_x=torch.randn(8, 3, 8, 8))


@pytest.mark.parametrize("method", ["magnitude", "fpgm"])
def test_nan_weights_are_reported_without_images(method):
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    checkpoint.state_dict["layer2.0.conv1.weight"][0] = float("nan")
    with pytest.raises(DataError, match=r"layer2.0.conv1.weight holds NaN"):
        prune(checkpoint, method=method, budget=Budget(kind="macs", value=0.5), align=1)


def test_batch_norm_of_one_value_per_channel_is_left_alone():
    spec = imagenet_spec("basic", side=4)
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    found = recalibrate(checkpoint, torch.randn(1, 3, 4, 4)).state_dict
    assert not torch.equal(found["bn1.running_mean"], checkpoint.state_dict["bn1.running_mean"])
    assert torch.equal(found["layer2.0.bn1.running_mean"], checkpoint.state_dict["layer2.0.bn1.running_mean"])


def test_single_image_warns_and_works():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.5), align=1, calibration_x=torch.randn(1, 3, 8, 8))
    assert any("only 1 calibration" in n for n in result.notes)


def test_error_curves_are_checked():
    with pytest.raises(ValueError, match="never falls"):
        ErrorCurve((0, 1, 2), (0.0, 2.0, 1.0))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            ErrorCurve((0, 1, 2), (0.0, 1.0, wrong))
    with pytest.raises(ValueError, match="orders each unit once"):
        ErrorCurve((0, 0), (0.0, 1.0))
    assert Curves({"a": ErrorCurve((1, 0), (0.0, 1.0))}).groups["a"].keep(1) == (0,)


def resnet50_on_a_jetson(scope, *, price=0.0):
    """A ResNet-50, made-up curves of its groups (every block has the price to drop), a target, and its predicted latency."""
    spec, target = spec_of("resnet50"), load_target("jetson-orin-nano-8gb")
    groups = prunable(find_groups(walk(spec)), scope)
    weights = np.random.default_rng(0).uniform(0.5, 2, len(groups))

    def curve(size, weight):
        return ErrorCurve(tuple(range(size)), tuple(weight * (k / size) ** 2 for k in range(size)))

    curves = {g.name: curve(g.size, w) for g, w in zip(groups, weights, strict=True)}
    cost = cost_function(target.device, precision=target.check_precision())
    return spec, Curves(curves, dict.fromkeys(droppable(spec), price) if price else {}), target, cost


def test_a_latency_budget_is_met_closely_and_buys_more_than_macs():
    spec, curves, target, cost = resnet50_on_a_jetson("inner")

    def latency(choice):
        return cost(walk(pruned_network(spec, choice.plan))) / cost(walk(spec))

    by_latency = choose(spec, curves, budget=Budget(kind="latency", value=0.8), align=target.align(), cost=cost)
    assert 0.784 <= latency(by_latency) <= 0.8
    by_macs = [
        choose(spec, curves, budget=Budget(kind="macs", value=v), align=target.align()) for v in np.linspace(0.3, 0.9, 7)
    ]
    as_quick = [c for c in by_macs if latency(c) <= latency(by_latency)]
    assert as_quick
    assert by_latency.error < min(c.error for c in as_quick)


def slim(name):
    """A network of the zoo with an eighth of the channels, for small images."""
    spec = spec_of(name, input_shape=(3, 32, 32), num_classes=5)
    if any(b.channel_map for b in spec.blocks) or max(b.widths[-1] for b in spec.blocks) <= 64:
        return spec
    convs = tuple(c.model_copy(update={"width": max(2, c.width // 8)}) for c in spec.stem.convs)
    thin = {
        b.name: b.model_copy(update={"widths": tuple(w // 8 for w in b.widths), "groups": max(1, b.groups // 8)})
        for b in spec.blocks
    }
    return spec.replace_blocks(thin, stem=spec.stem.model_copy(update={"convs": convs}))


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_architecture_of_the_zoo_prunes_as_if_masked(name):
    spec = slim(name)
    checkpoint = random_checkpoint(spec)
    x = torch.randn(2, *spec.input_shape, dtype=torch.float64)
    for seed in range(3):
        plan = random_plan(spec, seed)
        pruned = apply(checkpoint, plan)
        small = build_model(pruned.spec, pruned.state_dict)(x)
        assert torch.allclose(small, masked(checkpoint, plan)(x), rtol=1e-8, atol=1e-8 * float(small.detach().abs().max()))
        assert total_params(walk(pruned.spec)) == sum(
            v.numel() for k, v in pruned.state_dict.items() if k.rpartition(".")[2] in ("weight", "bias")
        )
    kept = PruningPlan(arch=spec.arch, spec_digest=spec.digest, method="none", keep={})
    assert torch.equal(build_model(spec, apply(checkpoint, kept).state_dict)(x), build_model(spec, checkpoint.state_dict)(x))


def test_a_latency_budget_over_streams_and_blocks_is_used_up():
    spec, curves, target, cost = resnet50_on_a_jetson("all", price=0.5)
    budget = Budget(kind="latency", value=0.6)
    choice = choose(spec, curves, budget=budget, scope="all", align=target.align(), cost=cost, drop=droppable(spec))
    assert 0.988 * 0.6 <= choice.cost_after / choice.cost_before <= 0.6
    assert choice.plan.dropped_blocks


def test_scores_are_taken_away_smallest_first():
    curve = curve_of(torch.tensor([3.0, 1.0, 2.0]))
    assert curve.order == (1, 2, 0)
    assert curve.error == pytest.approx((0.0, 1 / 6, 1 / 2))


def ranked(method, checkpoint, group="layer2.0.conv1", **options):
    curves = measure(checkpoint, method=method, calibration_x=options.pop("calibration_x", None), **options)
    return curves.groups[group]


@pytest.mark.parametrize("method", ["magnitude", "bn_scale", "taylor"])
def test_a_channel_that_is_nothing_goes_first(method):
    """Zero scale, zero shift: whatever the weights are, nothing arrives behind it."""
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    for part in ("weight", "bias"):
        checkpoint.state_dict[f"layer2.0.bn1.{part}"][3] = 0
    checkpoint.state_dict["layer2.0.conv2.weight"][:, 3] *= 1e-3  # `magnitude` looks at what reads it, too
    found = ranked(method, checkpoint, calibration_x=torch.randn(8, 3, 8, 8))
    assert found.error[found.order.index(3) + 1] < 1e-6  # it may share the first place
    assert found.order.index(3) < 3


def test_bn_scale_looks_at_the_scale_alone():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    checkpoint.state_dict["layer2.0.bn1.weight"][3] = 0
    checkpoint.state_dict["layer2.0.bn1.bias"][3] = 100
    assert ranked("bn_scale", checkpoint).order[0] == 3


def test_taylor_looks_at_the_gradient_not_at_the_activation():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    checkpoint.state_dict["layer2.0.bn1.bias"][3] = 100
    checkpoint.state_dict["layer2.0.conv2.weight"][:, 3] = 0
    found = ranked("taylor", checkpoint, calibration_x=torch.randn(8, 3, 8, 8))
    assert found.error[found.order.index(3) + 1] < 1e-12
    assert found.error[-1] > 1e-6


def test_magnitude_weighs_makers_and_readers_alike():
    """Weights in front of a BatchNorm of large scale say no more than those behind it."""
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    before = ranked("magnitude", checkpoint)
    for part in ("weight", "bias"):
        checkpoint.state_dict[f"layer2.0.bn1.{part}"] *= 100
    assert ranked("magnitude", checkpoint).error == pytest.approx(before.error)


def test_fpgm_takes_the_filter_nearest_to_all_others():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    filters = checkpoint.state_dict["layer2.0.conv1.weight"]
    for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        checkpoint.state_dict[f"layer2.0.bn1.{part}"].fill_(value)
    distance = [sum(float((a - b).norm()) for b in filters) for a in filters]
    assert list(ranked("fpgm", checkpoint).order) == sorted(range(len(filters)), key=distance.__getitem__)


@pytest.mark.parametrize("method", ["random", "taylor"])
def test_a_seed_makes_a_difference(method):
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    images = torch.randn(4, 3, 8, 8)
    curves = [ranked(method, checkpoint, calibration_x=images, seed=seed) for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_a_plan_knows_its_seed():
    checkpoint = random_checkpoint(SPECS["cifar-pad"], dtype=torch.float32)
    options = {"budget": Budget(kind="macs", value=0.5), "align": 1, "calibration_x": torch.randn(80, 3, 8, 8), "seed": 3}
    result = prune(checkpoint, **options)
    assert result.plan.seed == 3
    followed = prune_by_plan(checkpoint, result.plan, calibration_x=options["calibration_x"], seed=3)
    assert all(torch.equal(v, followed.state_dict[k]) for k, v in result.checkpoint.state_dict.items())


def test_sampled_gradients_have_the_fisher_matrix():
    """Of softmax regression: diag(p) - p p^T per image; with labels of the largest output it would be (p - e)(p - e)^T."""
    spec = SPECS["cifar-pad"]
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    checkpoint.state_dict["fc.weight"] *= 0.05
    model = build_model(spec, checkpoint.state_dict).requires_grad_(False)
    x = torch.randn(1, 3, 8, 8).expand(4000, -1, -1, -1)
    p = model(x[:1]).softmax(1)[0]
    found = [seen["fc"][1] for seen in sampled_gradients(Context(checkpoint, []), model, x, ["fc"])]
    g = torch.cat(found)
    assert torch.allclose(g.T @ g / len(g), p.diag() - p.outer(p), atol=0.03)


def test_asked_for_blocks_go_under_a_budget_of_macs():
    spec = spec_of("resnet20", input_shape=(3, 8, 8))
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    for name in ("layer2.1", "layer3.2"):
        for part in ("weight", "bias"):
            checkpoint.state_dict[f"{name}.bn2.{part}"] *= 1e-4
    options = {"budget": Budget(kind="macs", value=0.5), "align": 1, "calibration_x": torch.randn(16, 3, 8, 8)}
    assert {"layer2.1", "layer3.2"} <= set(prune(checkpoint, drop_blocks=True, **options).plan.dropped_blocks)
    assert not prune(checkpoint, **options).plan.dropped_blocks


def test_the_block_that_matters_most_of_a_stage_stays():
    spec = spec_of("resnet20", input_shape=(3, 8, 8))
    sizes = Sizes(spec)
    prices = {"layer1.0": 1.0, "layer1.1": 7.0, "layer1.2": 3.0}
    flat = {name: ErrorCurve(tuple(range(g.size)), (0.0,) * g.size) for name, g in sizes.groups.items()}
    widths = {name: allowed_widths(g, 1, strict=False)[0] for name, g in sizes.groups.items() if g.kind == "inner"}
    allocator = Allocator(sizes, Curves(flat, prices), widths, total_macs, drop=list(prices), keep_one_of=[list(prices)])
    assert set(allocator.smallest().dropped) == {"layer1.0", "layer1.2"}


def test_the_error_of_a_choice_is_that_of_its_curves():
    spec = SPECS["cifar-pad"]
    curves = measure(random_checkpoint(spec, dtype=torch.float32), method="magnitude", scope="all")
    found = choose(spec, curves, budget=Budget(kind="macs", value=0.4), scope="all", align=1)
    groups = Sizes(spec).groups
    assert found.error == pytest.approx(sum(c.at(len(found.plan.kept(groups[name]))) for name, c in curves.groups.items()))
