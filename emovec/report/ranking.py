"""Which concepts of a reading are worth showing."""

from __future__ import annotations

from collections import Counter

from emovec.monitor import Reading


def strongest(reading: Reading, count: int = 8, per_family: int = 2) -> list[str]:
    """The concepts with the highest mean score in the prompt or in what was generated, the highest first.

    At most ``per_family`` of each family are taken, so that they are not all synonyms.
    """
    best: dict[str, float] = {}
    for kind in dict.fromkeys(reading.kind):
        for name, value in reading.top(len(reading.names), kind=kind):
            best[name] = max(value, best.get(name, value))
    family_of = {name: family for family, members in reading.members().items() for name in members}
    taken: Counter[str] = Counter()
    chosen: list[str] = []
    for name in sorted(best, key=best.__getitem__, reverse=True):
        family = family_of.get(name, name)
        if taken[family] < per_family:
            chosen.append(name)
            taken[family] += 1
    return chosen[:count]
