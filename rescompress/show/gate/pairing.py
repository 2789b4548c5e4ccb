"""Two models on the same samples: what may be paired, and how often each sample counts."""

from __future__ import annotations

from collections.abc import Sequence

from rescompress.core.errors import BadInput
from rescompress.core.outcomes import Outcomes
from rescompress.show.gate.tango import Paired


def pair(candidate: Outcomes, baseline: Outcomes, names: tuple[str, str]) -> Paired:
    """Return the counts of disagreement; a sample that copies an earlier one counts once.

    Args:
        candidate: Of one model.
        baseline: Of the other.
        names: What an error calls the two.

    Raises:
        BadInput: The outcomes are not of the same samples and classes in the same order.
    """
    where = f"{names[0]} and {names[1]}"
    remedy = "evaluate both on the same data, then compare"
    if candidate.n != baseline.n:
        raise BadInput(
            f"were evaluated on {candidate.n} and {baseline.n} samples, which cannot be paired", where=where, remedy=remedy
        )
    if candidate.classes is not None and baseline.classes is not None and candidate.classes != baseline.classes:
        raise BadInput(f"have other classes: {_difference(candidate.classes, baseline.classes)}", where=where, remedy=remedy)
    older = [name for name, known in zip(names, (candidate, baseline), strict=True) if known.scheme is None]
    if len(older) == 2 or (older and candidate.samples_sha256 != baseline.samples_sha256):
        raise BadInput(
            "outcomes of an older version, which knew files by name and size alone: they may be of other pictures",
            where=" and ".join(older),
            remedy="record the outcomes again: repeat the run, or save the baseline again from a repeated one",
        )
    if candidate.samples_sha256 != baseline.samples_sha256:
        raise BadInput(
            f"were evaluated on {candidate.n} samples each, but not on the same in the same order, or with other labels",
            where=where,
            remedy=remedy,
        )
    c, b = candidate.mask, baseline.mask
    once = _first_of_each(candidate, where) & _first_of_each(baseline, where)
    return Paired(once.bit_count(), (b & ~c & once).bit_count(), (c & ~b & once).bit_count())


def _first_of_each(outcomes: Outcomes, where: str) -> int:
    """Return the bits of all samples but copies of others: a sample that is asked again is no further evidence.

    Raises:
        BadInput: There are no such samples.
    """
    every: int = ((1 << outcomes.n) - 1) << (-outcomes.n % 8)
    if not outcomes.copies:
        return every
    bits = bytearray(every.to_bytes((outcomes.n + 7) // 8, "big"))
    for i in outcomes.copies:
        if not 0 < i < outcomes.n:
            raise BadInput("the outcomes are damaged", where=where, remedy="restore the file, or run the pipeline again")
        bits[i // 8] &= ~(0x80 >> i % 8) & 0xFF
    return int.from_bytes(bits, "big")


def _difference(a: Sequence[str], b: Sequence[str]) -> str:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} of them"
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"class {i} is '{a[i]}' and '{b[i]}'"
