"""Alarms on a comparison: ``afraid>0.5``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emovec.bank_layer import nearest, shown
from emovec.comparison.shifts import Shift

AXES = ("valence", "arousal")
_ALARM = re.compile(r"\s*(\S.*?)\s*([<>])\s*([^<>\s]+)\s*")


class AlarmError(ValueError):
    """An alarm that cannot be understood; the message says why, and which names are near."""


@dataclass(frozen=True)
class Alarm:
    """Fires when the whole interval of a shift lies beyond a threshold: its lower end above it (``>``), or its upper end below (``<``).

    So it fires on what the prompts show, not on a mean that other prompts might not bear out.
    """

    name: str
    above: bool
    threshold: float

    @classmethod
    def parse(cls, text: str, names: Sequence[str], families: Iterable[str] = ()) -> Alarm:
        """Read ``NAME>NUMBER`` or ``NAME<NUMBER``.

        Args:
            text: the name is a concept's, a family's, ``valence`` or ``arousal``.
            names: the concepts.
            families: the families.

        Raises:
            AlarmError: naming what is wrong.
        """
        found = _ALARM.fullmatch(text)
        try:
            threshold = float(found[3]) if found else math.nan
        except ValueError:
            threshold = math.nan
        if found is None or not math.isfinite(threshold):
            raise AlarmError(f"alarm {shown(text)} is not NAME>NUMBER or NAME<NUMBER, such as 'afraid>0.5'")
        known = [*names, *families, *AXES]
        if found[1] not in known:
            near = ", ".join(nearest(found[1], known))
            raise AlarmError(f"alarm {shown(text)}: no concept or family {shown(found[1])}; nearest known: {near}")
        return cls(found[1], found[2] == ">", threshold)

    def fires(self, shift: Shift) -> bool:
        """Whether it does at this shift."""
        return shift.low > self.threshold if self.above else shift.high < self.threshold

    def __str__(self) -> str:
        return f"{self.name}{'>' if self.above else '<'}{self.threshold:g}"
