"""Fits the latency model to published figures, and says how far off it is: ``python -m edge_targets.fit``.

`edge_targets.published` says which figures count, and how much. The fit minimises the log error (soft L1: one odd figure
pulls little) plus a prior on every constant. What is physically one thing is one constant: tensor cores reach one share of
their peak whatever the precision, and so do CUDA cores; each architecture and each precision of it may deviate a little, so
that one with few figures borrows from the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_targets.device import PRECISIONS, Precision
from edge_targets.latency import BYTES, CONSTANTS, Constants, Model, runs_winograd, work_of
from edge_targets.likeness import Profile, alike, profile_of
from edge_targets.published import KINDS, Group, load_groups
from rescompress.core.artifact import write_text
from rescompress.core.errors import ToolMissing

CLOCK_EXPONENT = 1.25
"""Chosen by cross-validation among 1, 1.25 and 1.4: lower-power modes slow the CPU and the memory too."""

COVERAGE = 0.88
"""Share of the errors that a band should hold."""

ARCHITECTURES = ("ampere", "volta", "maxwell", "pascal")
WITHOUT_INT8 = ("maxwell", "pascal")
TENSOR_CORES: dict[str, tuple[Precision, ...]] = {"ampere": PRECISIONS, "volta": ("fp16", "int8")}
"""What an architecture computes on tensor cores; the rest runs on CUDA cores."""

WINOGRAD: dict[str, tuple[Precision, ...]] = {a: ("fp32", "fp16") for a in ("volta", "maxwell", "pascal")}
"""What an architecture has Winograd kernels for. On Ampere the direct kernels of the tensor cores win."""

Floats = NDArray[np.float64]

_NOISE = 0.1
"""Log error that a published figure of weight 1 is trusted to."""


def _priors() -> dict[str, tuple[float, float]]:
    """Return the expected logarithm of every parameter and how far it may reasonably be from that."""
    found = {
        "overhead": (math.log(10.0), 0.7),  # us per kernel at 1 GHz
        "bandwidth": (math.log(0.7), 0.3),
        "tensor": (math.log(0.5), 0.5),  # share of the peak
        "cuda": (math.log(0.5), 0.5),
        "winograd": (math.log(0.5), 0.4),
        "grouped": (math.log(2.0), 0.5),
        "cached": (math.log(0.4), 0.3),
        "depth": (math.log(2.0), 1.0),  # ns per term of a sum, at 1 GHz
        "mlperf": (-0.1, 0.05),
    }
    found |= {f"call {k.name}": (math.log(k.call_ms), 0.7) for k in KINDS if k.call_ms}
    for a in ARCHITECTURES:
        found |= {f"overhead {a}": (0.0, 0.2), f"bandwidth {a}": (0.0, 0.2)}
        found |= {f"{unit} {a}": (0.0, 0.3) for unit in ("tensor", "cuda")}
        found |= {f"{p} {a}": (0.0, 0.08) for p in PRECISIONS}
    return found


_PRIORS = _priors()
NAMES = tuple(_PRIORS)
_AT = {name: i for i, name in enumerate(NAMES)}
_PRIOR = np.array([p for p, _ in _PRIORS.values()])
_WIDTH = np.array([w for _, w in _PRIORS.values()])


def _unit(architecture: str, precision: str) -> str:
    return "tensor" if precision in TENSOR_CORES.get(architecture, ()) else "cuda"


@dataclass(frozen=True)
class _Table:
    """All groups as arrays. A latency is a sum of terms, and each term a product of powers of parameters.

    Attributes:
        work: Logarithm of each term of each group (`_work`) where every parameter is 1; -inf where a group lacks it.
        powers: Per group, term and parameter, the power of the parameter in the term.
        log_ms: Of the published latency.
        weight: Of the group.
    """

    work: Floats
    powers: Floats
    log_ms: Floats
    weight: Floats


def _work(group: Group) -> dict[tuple[str, ...], float]:
    """Return what the kernels do together, each in ms at its full rate, by the parameters that it is multiplied by.

    A parameter after a minus is one that it is divided by.
    """
    device, precision, a = group.hardware, group.precision, group.architecture
    assert device.bandwidth_gb_s is not None
    assert device.max_emc_mhz is not None
    assert device.l2_mb is not None
    dense, winograd, grouped, depth = 0, 0, 0, 0
    memory, kept = 0.0, 0.0
    for kernel in group.kernels:
        work = work_of(
            kernel, batch=group.batch, align=device.align[precision], element_bytes=BYTES[precision], pad_kernels=False
        )
        if kernel.groups > 1:
            grouped += work.macs
        elif runs_winograd(kernel) and precision in WINOGRAD.get(a, ()):
            winograd += work.macs
        else:
            dense += work.macs
        depth += work.reduce
        activations = work.bytes - work.weight_bytes
        spilt = activations**2 / (activations + device.l2_mb.value * 2**20)
        memory += work.weight_bytes + spilt
        kept += activations - spilt
    peak = group.sm_count * group.gpu_mhz * 1e3 * device.macs_per_clock(precision)
    bandwidth = device.bandwidth_gb_s.value * group.emc_mhz / device.max_emc_mhz.value * 1e6
    unit = _unit(a, precision)
    share, traffic = (f"-{unit}", f"-{unit} {a}", f"-{precision} {a}"), ("-bandwidth", f"-bandwidth {a}")
    terms: dict[tuple[str, ...], float] = {
        ("overhead", f"overhead {a}"): len(group.kernels) * 1e-3 * (1000.0 / group.gpu_mhz) ** CLOCK_EXPONENT,
        share: dense / peak,
        ("winograd", *share): winograd / peak,
        ("grouped", *share): grouped / peak,
        ("depth",): depth * 1e-6 * 1000.0 / group.gpu_mhz * BYTES[precision] / 2,
        traffic: memory / bandwidth,
        ("cached", *traffic): kept / bandwidth,
    }
    if group.kind.name == "mlperf":
        terms = {("mlperf", *names): ms for names, ms in terms.items()}
    return terms | {(f"call {group.kind.name}",): 1.0 if group.kind.call_ms else 0.0}


def _table(groups: Sequence[Group]) -> _Table:
    terms = [_work(g) for g in groups]
    work = np.array([list(t.values()) for t in terms])
    powers = np.zeros((*work.shape, len(NAMES)))
    for g, names_of in enumerate(terms):
        for i, (names, ms) in enumerate(names_of.items()):
            for name in names if ms else ():
                powers[g, i, _AT[name.removeprefix("-")]] = -1.0 if name.startswith("-") else 1.0
    with np.errstate(divide="ignore"):
        return _Table(
            work=np.log(work),
            powers=powers,
            log_ms=np.log([g.latency_ms for g in groups]),
            weight=np.array([g.weight for g in groups]),
        )


def _terms(x: Floats, t: _Table) -> Floats:
    found: Floats = np.exp(t.work + t.powers @ x)
    return found


def _log_latency(x: Floats, t: _Table) -> Floats:
    """Return the logarithm of what each group's figure would be, measured as it was."""
    found: Floats = np.log(_terms(x, t).sum(axis=1))
    return found


def _fit(t: _Table, weight: Floats, start: Floats | None = None) -> Floats:
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as e:
        raise ToolMissing("fitting needs scipy, which is not installed", remedy="pip install 'rescompress[fit]'") from e
    trust = np.sqrt(weight) / _NOISE
    prior_slope = np.diag(1 / _WIDTH)

    def residuals(x: Floats) -> Floats:
        return np.concatenate([trust * (_log_latency(x, t) - t.log_ms), (x - _PRIOR) / _WIDTH])

    def slopes(x: Floats) -> Floats:
        terms = _terms(x, t)
        share = terms / terms.sum(axis=1, keepdims=True)
        return np.concatenate([trust[:, None] * np.einsum("gi,gip->gp", share, t.powers), prior_slope])

    found: Floats = least_squares(
        residuals, _PRIOR if start is None else start, jac=slopes, loss="soft_l1", f_scale=1.5, xtol=1e-8, ftol=1e-8
    ).x
    return found


def fit(groups: Sequence[Group]) -> Floats:
    """Return the parameters that fit `groups` best: the logarithms of what `NAMES` calls.

    Raises:
        ToolMissing: scipy is not installed.
    """
    t = _table(groups)
    return _fit(t, t.weight)


def log_errors(groups: Sequence[Group], x: Floats) -> Floats:
    """Return log(predicted / published) per group."""
    t = _table(groups)
    return _log_latency(x, t) - t.log_ms


def held_out(groups: Sequence[Group], key: Callable[[Group], Hashable], start: Floats | None = None) -> Floats:
    """Return log(predicted / published) per group, each predicted by a fit that saw no group of equal `key`."""
    t = _table(groups)
    start = _fit(t, t.weight) if start is None else start
    errors = np.zeros(len(groups))
    keys = [key(g) for g in groups]
    for k in dict.fromkeys(keys):
        out = np.array([other == k for other in keys])
        x = _fit(t, np.where(out, 0.0, t.weight), start)
        errors[out] = (_log_latency(x, t) - t.log_ms)[out]
    return errors


def held_out_either(groups: Sequence[Group], start: Floats | None = None) -> Floats:
    """Return log(predicted / published) per group, each predicted by a fit that saw neither its device nor its network."""
    t = _table(groups)
    start = _fit(t, t.weight) if start is None else start
    errors = np.zeros(len(groups))
    for device, network in dict.fromkeys((g.device, g.network) for g in groups):
        out = np.array([g.device == device or g.network == network for g in groups])
        own = np.array([(g.device, g.network) == (device, network) for g in groups])
        x = _fit(t, np.where(out, 0.0, t.weight), start)
        errors[own] = (_log_latency(x, t) - t.log_ms)[own]
    return errors


def by_group(group: Group) -> Hashable:
    """Key that holds out one configuration, however often it was measured."""
    return (group.device, group.network, group.input_size, group.precision, group.batch, group.power_mode)


def by_device(group: Group) -> Hashable:
    """Key that holds out one device."""
    return group.device


def by_network(group: Group) -> Hashable:
    """Key that holds out one network."""
    return group.network


def by_board_and_network(group: Group) -> Hashable:
    """Key that holds out all figures of one network on one device: what a user's network on a known board is to the fit."""
    return (group.device, group.network)


def band_of(pool: Floats) -> float:
    """Return the half-width in log space that holds the share `COVERAGE` of absolute errors like `pool`."""
    return float(np.quantile(np.abs(pool), COVERAGE, method="higher"))


def reduced(groups: Sequence[Group]) -> NDArray[np.bool_]:
    """Return which groups are in FP16 or INT8."""
    return np.array([g.precision != "fp32" for g in groups])


ENOUGH = 1.0
"""Weight of the figures that make a network known: one of the GPU's own clock in a documented state, or several lesser ones."""


def known_networks(groups: Sequence[Group]) -> dict[str, tuple[Profile, ...]]:
    """Return, per architecture, the networks that `groups` hold enough figures of, or of others like them."""
    found: dict[str, tuple[Profile, ...]] = {}
    for a in ARCHITECTURES:
        profiles = [(profile_of(g.kernels), g.weight) for g in groups if g.architecture == a]
        enough = [p for p, _ in profiles if sum(weight for other, weight in profiles if alike(p, other)) >= ENOUGH]
        found[a] = tuple(Profile(*(round(value, 3) for value in p)) for p in dict.fromkeys(enough))
    return found


def known_without(groups: Sequence[Group], key: Callable[[Group], Hashable]) -> NDArray[np.bool_]:
    """Return which groups are of a network that is known from the groups of other `key` alone."""
    known = []
    for g in groups:
        networks = known_networks([other for other in groups if key(other) != key(g)])
        known.append(any(alike(profile_of(g.kernels), p) for p in networks[g.architecture]))
    return np.array(known)


def bands(groups: Sequence[Group], errors: Floats) -> dict[str, dict[str, float]]:
    """Return the band per architecture and precision: from all held-out errors of that precision class.

    What was held out decides what the band is of: of a new network on a known board, or of a new board. float32 has a class
    of its own (fewer and older figures); float16 and INT8 share one.
    """
    low = reduced(groups)
    widths = {"fp32": band_of(errors[~low]), "fp16": band_of(errors[low]), "int8": band_of(errors[low])}
    return {a: {p: round(widths[p], 3) for p in _precisions(a)} for a in ARCHITECTURES}


def unlike_bands(
    groups: Sequence[Group], errors: Floats, unlike: NDArray[np.bool_], at_least: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the bands of networks that nothing like is known of.

    Tensor cores of Ampere have a pool of their own: nearly all of its figures are of one network, and without it the
    errors are twice those of the older GPUs.

    Args:
        groups: The configurations.
        errors: With the network held out.
        unlike: Which of them had no network like theirs left in the fit.
        at_least: The bands of known networks: less known is never narrower.
    """
    low, ampere = reduced(groups), np.array([g.architecture == "ampere" for g in groups])
    found: dict[str, dict[str, float]] = {}
    for a in ARCHITECTURES:
        own = unlike & (ampere == (a == "ampere"))
        # float32 is too little for a pool of each
        widths = {
            "fp32": band_of(errors[unlike & ~low]),
            "fp16": band_of(errors[own & low]),
            "int8": band_of(errors[own & low]),
        }
        found[a] = {p: max(round(widths[p], 3), at_least[a][p]) for p in _precisions(a)}
    return found


def _precisions(architecture: str) -> tuple[Precision, ...]:
    return tuple(p for p in PRECISIONS if p != "int8" or architecture not in WITHOUT_INT8)


def unlike_coverage(groups: Sequence[Group], network: Floats, pair: Floats) -> dict[str, float]:
    """Return the share of FP16 and INT8 groups inside bands that were made, chosen and fitted without their network.

    Args:
        groups: The configurations.
        network: Log errors with the network held out everywhere.
        pair: With the network held out on its board.
    """
    low = reduced(groups)
    known = known_without(groups, by_network)
    inside = np.zeros(len(groups), dtype=bool)
    for i, g in enumerate(groups):
        if low[i]:
            rest = np.array([other.network != g.network for other in groups])
            narrow = bands([o for o, r in zip(groups, rest, strict=True) if r], pair[rest])
            wide = unlike_bands(groups, network, ~known & rest, narrow)
            inside[i] = abs(network[i]) <= (narrow if known[i] else wide)[g.architecture][g.precision]
    ampere = np.array([g.architecture == "ampere" for g in groups])
    chosen = {"all": low, "Orin": low & ampere, "other boards": low & ~ampere}
    return {name: float(np.mean(inside[mask])) for name, mask in chosen.items()}


def coverage(groups: Sequence[Group], errors: Floats, key: Callable[[Group], Hashable]) -> tuple[float, float]:
    """Return the share of FP16 and INT8 groups inside a band made without any of equal `key`, and its median half-width."""
    low = [i for i, inside in enumerate(reduced(groups)) if inside]
    inside, halves = [], []
    for i in low:
        width = band_of(errors[[j for j in low if key(groups[j]) != key(groups[i])]])
        inside.append(abs(errors[i]) <= width)
        halves.append(math.expm1(width))
    return float(np.mean(inside)), float(np.median(halves))


def model_of(
    x: Floats,
    widths: dict[str, dict[str, float]],
    *,
    devices: Sequence[str],
    unseen_device: dict[str, dict[str, float]],
    networks: Mapping[str, Sequence[Profile]],
    unlike: dict[str, dict[str, float]],
    unlike_unseen: dict[str, dict[str, float]],
) -> Model:
    """Return the fitted model with its bands.

    Args:
        x: The parameters.
        widths: Bands of the boards that the fit has figures of.
        devices: These boards, as the catalogue names them.
        unseen_device: Bands of any other board.
        networks: The networks that `widths` and `unseen_device` are of, per architecture.
        unlike: Bands of other networks, on these boards.
        unlike_unseen: Bands of other networks on other boards.
    """

    def value(*names: str, digits: int = 4) -> float:
        return round(math.exp(sum(x[_AT[n]] for n in names)), digits)

    architectures = {
        a: Constants(
            overhead_us=value("overhead", f"overhead {a}", digits=3),
            bandwidth=value("bandwidth", f"bandwidth {a}"),
            compute={p: value(_unit(a, p), f"{_unit(a, p)} {a}", f"{p} {a}") for p in _precisions(a)},
            winograd={p: value("winograd") for p in WINOGRAD.get(a, ())},
        )
        for a in ARCHITECTURES
    }
    common = {"depth_ns": value("depth"), "grouped": value("grouped"), "cached": value("cached")}
    # gates compare predictions of one version: the bands of boards and networks that were never measured stay out of it
    document = json.dumps([{n: vars(c) for n, c in architectures.items()}, common, widths, CLOCK_EXPONENT], sort_keys=True)
    return Model(
        version="published-" + hashlib.sha256(document.encode()).hexdigest()[:8],
        clock_exponent=CLOCK_EXPONENT,
        **common,
        architectures=architectures,
        bands=widths,
        devices=tuple(devices),
        unseen_device_bands=unseen_device,
        networks=networks,
        unlike_bands=unlike,
        unlike_unseen_bands=unlike_unseen,
    )


@dataclass(frozen=True)
class Report:
    """How far off the model is.

    Attributes:
        groups: The configurations.
        fit_errors: Relative error of the fit to all of them.
        group_errors: Relative error with the group held out.
        device_errors: With its device held out.
        network_errors: With its network held out.
        pair_errors: With its network held out on its device only: what bands of known boards are made from.
        coverage: Share of FP16 and INT8 groups inside such a band made without them.
        half_width: Its median half-width, relative.
        unlike_coverage: Share inside bands made, chosen and fitted without the network, on all boards and by kind of board.
        mlperf_factor: Of MLPerf entries.
        call_ms: What a call takes beside the GPU, per kind of measurement.
        fitted: The model.
    """

    groups: Sequence[Group]
    fit_errors: Floats
    group_errors: Floats
    device_errors: Floats
    network_errors: Floats
    pair_errors: Floats
    coverage: float
    half_width: float
    unlike_coverage: dict[str, float]
    mlperf_factor: float
    call_ms: dict[str, float]
    fitted: Model


def report() -> Report:
    """Return the fit to all groups and the errors of its cross-validation."""
    groups = load_groups()
    x = fit(groups)
    keys = (by_group, by_device, by_network, by_board_and_network)
    errors, device_errors, network_errors, pair_errors = (held_out(groups, key, x) for key in keys)
    share, half = coverage(groups, pair_errors, by_board_and_network)
    both_errors = held_out_either(groups, x)
    widths, unseen = bands(groups, pair_errors), bands(groups, device_errors)
    unlike = unlike_bands(groups, network_errors, ~known_without(groups, by_network), widths)
    return Report(
        groups=groups,
        fit_errors=np.expm1(log_errors(groups, x)),
        group_errors=np.expm1(errors),
        device_errors=np.expm1(device_errors),
        network_errors=np.expm1(network_errors),
        pair_errors=np.expm1(pair_errors),
        coverage=share,
        half_width=half,
        unlike_coverage=unlike_coverage(groups, network_errors, pair_errors),
        mlperf_factor=float(np.exp(x[_AT["mlperf"]])),
        call_ms={n.removeprefix("call "): float(np.exp(x[i])) for n, i in _AT.items() if n.startswith("call ")},
        fitted=model_of(
            x,
            widths,
            devices=sorted({g.device for g in groups}),
            unseen_device=unseen,
            networks=known_networks(groups),
            unlike=unlike,
            unlike_unseen={
                a: {p: max(w, unseen[a][p], unlike[a][p]) for p, w in found.items()}
                for a, found in bands(groups, both_errors).items()
            },
        ),
    )


def table(found: Report) -> str:
    """Return the report as text."""
    head = f"{'configuration':84s} {'ms':>8s} {'fit':>6s} {'group':>6s} {'device':>6s} {'network':>7s} {'pair':>6s}"
    lines = [f"{head}   (relative error; held out: group, device, network, network on the device)"]
    held = {
        "group": found.group_errors,
        "device": found.device_errors,
        "network": found.network_errors,
        "pair": found.pair_errors,
    }
    for g, *errors in zip(found.groups, found.fit_errors, *held.values(), strict=True):
        lines.append(f"{g.name:84s} {g.latency_ms:8.3f} " + " ".join(f"{e:+6.0%}" for e in errors))
    low = reduced(found.groups)
    for title, relative in held.items():
        for name, chosen in (
            ("FP16 and INT8", low),
            ("Orin, FP16 and INT8", low & np.array([g.architecture == "ampere" for g in found.groups])),
            ("all", np.ones(len(low), dtype=bool)),
        ):
            size = np.abs(relative[chosen])
            lines.append(
                f"{title} held out, {name} ({len(size)}): median {np.median(size):.1%}, "
                f"85 % below {np.quantile(size, 0.85):.1%}, worst {size.max():.1%}"
            )
    lines.append(f"bands made without a network on a board: hold {found.coverage:.0%} of it, half-width {found.half_width:.0%}")
    held_in = ", ".join(f"{name} {share:.0%}" for name, share in found.unlike_coverage.items())
    lines.append(f"bands chosen and made without a network on any board hold: {held_in}")
    for title, widths in (
        ("a board with published figures", found.fitted.bands),
        ("any other board", found.fitted.unseen_device_bands),
        ("a board with published figures, unlike network", found.fitted.unlike_bands),
        ("any other board, unlike network", found.fitted.unlike_unseen_bands),
    ):
        for a in ("ampere", "volta"):
            halves = ", ".join(f"{p} {math.expm1(width):.0%}" for p, width in widths[a].items())
            lines.append(f"band of {title}, {a}: up to {halves} above the prediction")
    lines.append(f"MLPerf entries: {found.mlperf_factor:.2f} of what the model says for a plain file")
    lines.append("a call beside the GPU: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.call_ms.items()))
    return "\n".join(lines)


def document_of(fitted: Model) -> dict[str, Any]:
    """Return the model as it is stored."""
    architectures = {n: vars(c) for n, c in fitted.architectures.items()}
    return {"made_by": "python -m edge_targets.fit", **vars(fitted), "architectures": architectures}


def main() -> None:
    """Print the report and write the constants."""
    try:
        found = report()
    except ToolMissing as e:
        sys.exit(str(e))
    sys.stdout.write(table(found) + "\n")
    write_text(CONSTANTS, json.dumps(document_of(found.fitted), indent=1) + "\n")


if __name__ == "__main__":
    main()
