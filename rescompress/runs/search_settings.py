"""`SearchConfig`: the ``search:`` section of a run's config, and how a candidate's choices become a config of their own."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rescompress.core.errors import ConfigError
from rescompress.core.spec import Frozen

Rung = Literal["predict", "oneshot", "short", "full", "measure"]
"""How a candidate is judged, from the cheapest answer to the dearest."""

RUNGS: tuple[Rung, ...] = ("predict", "oneshot", "short", "full", "measure")

Cost = Literal["latency", "size", "macs", "params"]

BUDGET = "budget"
PRECISION = "precision"
KINDS = ("macs", "params", "latency", "ratio")


class Range(Frozen):
    """Numbers between two ends.

    Attributes:
        low: Lower end, inclusive.
        high: Upper end, inclusive.
        log: Whether candidates are spread evenly over the logarithm.
        step: Distance of neighbouring values; any value where it is absent.
    """

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    log: bool = False
    step: float | None = Field(None, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        if self.log and self.step is not None:
            raise ValueError("a logarithmic range has no step")
        return self


Dimension = Range | Annotated[tuple[Any, ...], Field(min_length=1)]
"""A range of numbers, or a list of choices (any JSON values)."""


class SearchConfig(Frozen):
    """A search over configs of a run.

    Attributes:
        trials: Candidates to try.
        objectives: Costs to make small, beside the accuracy to make large.
        space: What varies: a dotted key of the config (``prune.scope``), ``budget`` (a range per kind of budget), or
            ``precision`` (``int8``, ``float``), each with a list of choices or ``{low, high, log, step}``. A sensible
            space for the config where it is absent.
        rungs: Answers on the way up; ``full`` is always asked before a network may be on the front.
        eta: One in so many candidates climbs from a rung, beside those that nothing known there beats.
        short: Part of the epochs that the rung ``short`` trains.
        hold_out: Part of the training images that candidates are judged by; the evaluation split is read once, at the end.
        boards: Boards that the rung ``measure`` builds and times on, as ssh knows them; each measures one candidate at a time.
        lease_s: Seconds without a sign of life after which a worker's trial is taken up by another.
        sampler: ``tpe`` learns from what was tried, ``random`` does not.
    """

    trials: int = Field(30, ge=1, le=100_000)
    objectives: tuple[Cost, ...] = Field(("latency", "size"), min_length=1, max_length=3)
    space: dict[str, Any] = Field(default_factory=dict)
    rungs: tuple[Rung, ...] = RUNGS
    eta: int = Field(3, ge=2)
    short: float = Field(0.25, gt=0.0, lt=1.0, allow_inf_nan=False)
    hold_out: float = Field(0.1, gt=0.0, le=0.5, allow_inf_nan=False)
    boards: tuple[str, ...] = ()
    lease_s: float = Field(120.0, gt=0.0, allow_inf_nan=False)
    sampler: Literal["tpe", "random"] = "tpe"

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("an objective stands twice")
        if sorted(set(self.rungs), key=RUNGS.index) != list(self.rungs):
            raise ValueError(f"rungs stand in the order {', '.join(RUNGS)}, each once")
        if len(set(self.boards)) < len(self.boards):
            raise ValueError("a board stands twice")
        if self.boards and "measure" not in self.rungs:
            raise ValueError("boards are for the rung 'measure', which is missing")
        if self.boards and "latency" not in self.objectives:
            raise ValueError("boards measure the latency, which is no objective")
        if "full" not in self.rungs:
            raise ValueError("the rung 'full' is missing: no network could reach the front")
        dimensions(self.space)
        return self


def dimensions(space: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the dimensions of a space by name; a budget of several kinds becomes a choice of the kind and a range each.

    Raises:
        ValueError: A dimension has no choices, or is no range and no list.
    """
    found: dict[str, Dimension] = {}
    for name, value in space.items():
        if name == BUDGET:
            if not isinstance(value, Mapping) or not value or not set(value) <= set(KINDS):
                raise ValueError(f"space.budget holds a range per kind of budget ({', '.join(KINDS)})")
            if len(value) > 1:
                found["budget.kind"] = tuple(value)
            found |= {f"{BUDGET}.{kind}": _dimension(f"{BUDGET}.{kind}", inner) for kind, inner in value.items()}
            for kind in value:
                given = found[f"{BUDGET}.{kind}"]
                numbers = [given.low, given.high] if isinstance(given, Range) else list(given)
                if not all(isinstance(n, int | float) and 0 < n <= 1 for n in numbers):
                    raise ValueError(f"space.budget.{kind}: what remains is a fraction above 0, at most 1")
        else:
            found[name] = _dimension(name, value)
    if PRECISION in found:
        wrong = [v for v in _choices(found[PRECISION]) if v not in ("int8", "float")]
        if wrong or isinstance(found[PRECISION], Range):
            raise ValueError("space.precision chooses among int8 and float")
    return found


def _choices(dimension: Dimension) -> tuple[Any, ...]:
    return () if isinstance(dimension, Range) else dimension


def _dimension(name: str, value: Any) -> Dimension:
    if isinstance(value, Mapping):
        from pydantic import ValidationError

        try:
            return Range.model_validate(dict(value))
        except ValidationError as e:
            first = e.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise ValueError(f"space.{name}{'.' + place if place else ''}: {first['msg'].removeprefix('Value error, ')}") from e
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"space.{name} has no choices")
        if len({json.dumps(v, sort_keys=True) for v in value}) < len(value):
            raise ValueError(f"space.{name} has a choice twice")
        return tuple(value)
    raise ValueError(f"space.{name} is neither a list of choices nor a range with low and high")


def default_space(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the space that is searched where a config names none.

    Args:
        document: The run's config as JSON values.
    """
    space: dict[str, Any] = {
        BUDGET: {"macs": {"low": 0.15, "high": 1.0, "log": True}},
        "prune.scope": ["inner", "all"],
        PRECISION: ["int8", "float"],
    }
    epochs = (document.get("finetune") or {}).get("epochs")
    if epochs:
        space["finetune.epochs"] = [epochs / 2, epochs]
    return space


def anchors(document: Mapping[str, Any], space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return candidates to try first: the config's own recipe over budgets spread through the space.

    They climb every rung, so that a search is never worse than a sweep of these budgets.
    """
    known = dimensions(space)
    kinds = [name.removeprefix(f"{BUDGET}.") for name in known if name.startswith(f"{BUDGET}.") and name != "budget.kind"]
    if not kinds:
        return [_own(document, known)]
    kind = kinds[0]
    given = known[f"{BUDGET}.{kind}"]
    values = [v for v in (1.0, 0.7, 0.5, 0.3, 0.2) if not isinstance(given, Range) or given.low <= v <= given.high]
    if not isinstance(given, Range):
        values = [float(v) for v in given][:5]
    own = _own(document, known)
    chosen = {"budget.kind": kind} if "budget.kind" in known else {}
    return [{**own, **chosen, f"{BUDGET}.{kind}": v} for v in values]


def grid(space: Mapping[str, Any], at_most: int) -> list[dict[str, Any]] | None:
    """Return every candidate of a space that has at most so many, or None where there are more."""
    known = dimensions(space)
    values = {name: _values(dimension, at_most) for name, dimension in known.items()}
    kinds = known.get("budget.kind", ())
    found: list[dict[str, Any]] = []
    for kind in kinds if isinstance(kinds, tuple) and kinds else (None,):
        own = [n for n in known if kind is None or not n.startswith(f"{BUDGET}.") or n == f"{BUDGET}.{kind}"]
        columns = [values[name] for name in own]
        if any(column is None for column in columns) or len(found) + math.prod(len(c or ()) for c in columns) > at_most:
            return None
        chosen = {} if kind is None else {"budget.kind": kind}
        found += [chosen | dict(zip(own, row, strict=True)) for row in itertools.product(*(c or () for c in columns))]
    return found


def _values(dimension: Dimension, at_most: int) -> tuple[Any, ...] | None:
    """Return the values of a dimension, or None where it has more than so many."""
    if not isinstance(dimension, Range):
        return dimension
    if dimension.low == dimension.high:
        return (dimension.low,)
    if dimension.step is None or (steps := (dimension.high - dimension.low) / dimension.step + 1e-9) >= at_most:
        return None
    return tuple(dimension.low + i * dimension.step for i in range(int(steps) + 1))


def planned(document: Mapping[str, Any], space: Mapping[str, Any], trials: int) -> tuple[list[dict[str, Any]], int, int]:
    """Return the candidates to try first, how many of them climb every rung, and how many candidates there are to try.

    A space that holds no more candidates than are asked for is tried whole, each once.

    Raises:
        ValueError: The space holds a single candidate.
    """
    first = anchors(document, space)
    every = grid(space, max(trials, 1))
    if every is None:
        return first[:trials], min(len(first), trials), trials
    if len(every) == 1:
        raise ValueError("the space holds a single candidate: no dimension has a second choice")
    ordered: list[dict[str, Any]] = []
    for anchor in first:
        match = next((c for c in every if c not in ordered and all(_same(c.get(k), v) for k, v in anchor.items())), None)
        if match is not None:
            ordered.append(match)
    return [*ordered, *(c for c in every if c not in ordered)], len(ordered), len(every)


def _own(document: Mapping[str, Any], known: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return the config's own value of every dimension that offers it."""
    found: dict[str, Any] = {}
    for name, dimension in known.items():
        if name.startswith(f"{BUDGET}."):
            continue
        value = _value(document, name) if name != PRECISION else ("int8" if document.get("quantize") else "float")
        if isinstance(dimension, Range):
            if isinstance(value, int | float) and dimension.low <= value <= dimension.high:
                found[name] = value
        elif any(_same(value, choice) for choice in dimension):
            found[name] = next(choice for choice in dimension if _same(value, choice))
    return found


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _value(document: Mapping[str, Any], name: str) -> Any:
    place: Any = document
    for part in name.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def candidate(document: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a candidate as JSON values.

    Args:
        document: The search's config as JSON values.
        choices: Value of each dimension.

    Raises:
        ConfigError: A key of the space leads nowhere.
    """
    made: dict[str, Any] = json.loads(json.dumps({k: v for k, v in document.items() if k != "search"}))
    kind = choices.get("budget.kind")
    for name, value in choices.items():
        if name == PRECISION:
            made["quantize"] = (made.get("quantize") or {"mode": "ptq"}) if value == "int8" else None
        elif name.startswith(f"{BUDGET}."):
            own = name.removeprefix(f"{BUDGET}.")
            if name != "budget.kind" and kind in (None, own):
                prune = {k: v for k, v in (made.get("prune") or {}).items() if k not in KINDS}
                made["prune"] = {**prune, own: value}
        else:
            *folders, leaf = name.split(".")
            place = made
            for folder in folders:
                inner = place.get(folder)
                if inner is None:
                    inner = place[folder] = {}
                if not isinstance(inner, dict):
                    raise ConfigError(f"'{folder}' holds no settings", where=f"search.space.{name}", remedy="name a key of it")
                place = inner
            place[leaf] = value
    return made
