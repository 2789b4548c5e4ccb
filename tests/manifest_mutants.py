"""Manifests that were changed by hand or by chance: one value replaced, removed or doubled, or one byte changed."""

from __future__ import annotations

import json
import random


def mutants(text: str, count: int, seed: int = 0) -> list[str]:
    """Return documents with one value replaced, removed or doubled, or one byte of the text changed."""
    rng = random.Random(seed)
    odd = [None, True, -1, 1e308, "", "x" * 1000, [], {}, [[]], {"a": None}, "../../etc/passwd", "\ud800", 10**30]
    found = []
    for _ in range(count):
        document = json.loads(text)
        place, key = {"": document}, ""
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        kind = rng.randrange(4)
        if kind == 0 and not isinstance(place, list) and key:
            del place[key]
        elif kind == 1:
            place[key] = [place[key], place[key]]
        else:
            place[key] = rng.choice(odd)
        mutant = json.dumps(document)
        if kind == 3:
            at = rng.randrange(len(mutant))
            mutant = mutant[:at] + rng.choice('0"{}[]:,\\x') + mutant[at + 1 :]
        found.append(mutant)
    return found
