"""Which rows of the steering tables a steering value has."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from emovec.bank import Bank
from emovec.ops import Operands, Row, Table
from emovec.steer import Steering

ROWS_OF_ONE = 4  # of prompt and of generated tokens, each with one to fall back on while a gate is closed


@dataclass
class _Held:
    prompt: int
    generated: int
    slots: tuple[int, ...]
    step: int


class Rows:
    """The rows of the values in use, the same at every layer. A value that comes again finds its rows still there, if there was room.

    Args:
        bank: gives values their units.
        layers: the steered layers' operands and tables, all with as many rows.
    """

    def __init__(self, bank: Bank, layers: Mapping[int, tuple[Operands, Table]]) -> None:
        self._bank, self._layers = bank, dict(layers)
        tables = [table for _, table in self._layers.values()]
        self._free = list(range(tables[0].rows))[::-1] if tables else []
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def of(self, value: str, step: int) -> tuple[int, int]:
        """The rows (of prompt tokens, of generated tokens) of a steering value in JSON; -1 for none.

        Rows that ``step`` uses are not given away in it, so a table needs ``ROWS_OF_ONE`` for each request of a batch.
        """
        held = self._held.get(value)
        if held is None:
            held = self._held[value] = self._admit(value, step)
        held.step = step
        self._held.move_to_end(value)
        return held.prompt, held.generated

    def _admit(self, value: str, step: int) -> _Held:
        steering = Steering.parse(json.loads(value), self._bank.names)
        slots: list[int] = []
        first = {kind: self._write(steering, kind, slots, step) for kind in ("prompt", "generated")}
        return _Held(first["prompt"], first["generated"], tuple(slots), step)

    def _write(self, steering: Steering, kind: str, slots: list[int], step: int) -> int:
        rows = {index: steering.row(self._bank[index], kind) for index in self._layers}
        if not any(rows.values()):
            return -1
        own = self._take(step)
        slots.append(own)
        fallback = -1
        if any(row is not None and row.otherwise is not None for row in rows.values()):
            fallback = self._take(step)
            slots.append(fallback)
        for index, row in rows.items():
            operands, table = self._layers[index]
            table.set_row(own, row or Row(), operands, fallback)
            if fallback >= 0:
                table.set_row(fallback, row.otherwise if row is not None and row.otherwise is not None else Row(), operands)
        return own

    def _take(self, step: int) -> int:
        while not self._free:
            value, oldest = next(iter(self._held.items()))
            if oldest.step == step:
                raise RuntimeError("the steering table has no room for this batch")
            del self._held[value]
            self._free.extend(oldest.slots)
        return self._free.pop()
