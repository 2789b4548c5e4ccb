"""`Outcomes`: which samples a model got right, compact, so that two models can be compared sample by sample."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

from rescompress.core.spec import Frozen


class Outcomes(Frozen):
    """Per-sample correctness over one data split.

    Attributes:
        n: Samples.
        samples_sha256: Identity of the split: what the samples hold, their labels, and their order. Only
            outcomes with equal identity may be paired.
        classes: Name of each class, in order, where known.
        bits: Base64 of the packed bits, first sample in the highest bit of the first byte; 1 is correct.
        scheme: How `samples_sha256` knows samples. ``content``: by what they hold. Older outcomes have no word for it: they
            knew files by name and size, which other pictures may have, too.
        copies: Samples that show a network the same as an earlier one does, which is no further evidence.
    """

    n: int
    samples_sha256: str
    classes: tuple[str, ...] | None = None
    bits: str
    scheme: Literal["content"] | None = None
    copies: tuple[int, ...] = ()

    @classmethod
    def pack(
        cls,
        correct: Sequence[bool],
        samples_sha256: str,
        classes: tuple[str, ...] | None = None,
        copies: Sequence[int] = (),
    ) -> Outcomes:
        """Return the outcomes of `correct`, one entry per sample."""
        n = len(correct)
        number = int("".join("1" if c else "0" for c in correct) or "0", 2) << (-n % 8)
        bits = base64.b64encode(number.to_bytes((n + 7) // 8, "big")).decode()
        return cls(n=n, samples_sha256=samples_sha256, classes=classes, bits=bits, scheme="content", copies=tuple(copies))

    def unpack(self) -> list[bool]:
        """Return one entry per sample."""
        data = base64.b64decode(self.bits)
        return [bool(data[i // 8] >> (7 - i % 8) & 1) for i in range(self.n)]

    @functools.cached_property
    def mask(self) -> int:
        """The packed bits as one number, for comparing two sets of outcomes bit by bit."""
        return int.from_bytes(base64.b64decode(self.bits), "big")

    @property
    def correct(self) -> int:
        """How many samples are right."""
        return self.mask.bit_count()


def samples_digest(parts: Sequence[str]) -> str:
    """Return the identity of a split from one string per sample, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()
