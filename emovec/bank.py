"""A bank: the directions of one model at one or more layers, with all that is needed to read and steer with them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emovec import bank_file
from emovec.bank_layer import KINDS, BankError, BankLayer, Baseline, UnknownConcept, nearest, shown, unknown
from emovec.fingerprint import differences, fingerprint, is_fingerprint, template_hash
from emovec.readout import Readout

__all__ = [
    "KINDS",
    "Bank",
    "BankError",
    "BankLayer",
    "Baseline",
    "Readout",
    "UnknownConcept",
    "UnknownLayer",
    "fingerprint",
    "load_bank",
    "shipped_banks",
    "template_hash",
    "unknown",
]

_SHIPPED = Path(__file__).parent / "data" / "banks"


class UnknownLayer(BankError, KeyError):  # noqa: N818
    """A layer that is not in the bank; the message lists those that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Bank(Mapping[int, BankLayer]):
    """Layers of one model by the index of their decoder block: ``bank[18]`` is a :class:`BankLayer`. Immutable.

    Every layer holds the same concepts in the same order.

    Args:
        layers: the layers, in any order.
        read_layer: the layer to read at; default: the one two thirds up the list.
        steer_layers: the layers to steer at; default: the layer to read at.
        readout: the layers to read at together, if scores come from more than ``read_layer``, which is one of them.
        families: family -> its concepts.
        meta: what is known of the bank's making, as JSON: ``model``, ``fingerprint`` (see :func:`fingerprint`),
            ``chat_template`` (see :func:`template_hash`), ``corpus``, ``recipe``, ... None of it is required.

    Raises:
        BankError: no layers, or layers that do not fit together.
    """

    def __init__(
        self,
        layers: Iterable[BankLayer],
        read_layer: int | None = None,
        steer_layers: Sequence[int] | None = None,
        families: Mapping[str, Sequence[str]] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        readout: Readout | None = None,
    ) -> None:
        ordered = sorted(layers, key=lambda layer: layer.index)
        if not ordered:
            raise BankError("a bank has at least one layer")
        self._layers = {layer.index: layer for layer in ordered}
        self.layers: tuple[int, ...] = tuple(self._layers)
        self.names: tuple[str, ...] = ordered[0].names
        self.width: int = ordered[0].width
        if len(self._layers) != len(ordered):
            raise BankError(f"two layers have the same index in {[layer.index for layer in ordered]}")
        for layer in ordered:
            if layer.names != self.names:
                raise BankError(f"layers {ordered[0].index} and {layer.index} do not hold the same concepts in the same order")
            if layer.width != self.width:
                raise BankError(f"layer {ordered[0].index} is {self.width} wide, layer {layer.index} is {layer.width}")
        self.read_layer: int = self.layers[len(self.layers) * 2 // 3] if read_layer is None else read_layer
        self.steer_layers: tuple[int, ...] = (self.read_layer,) if steer_layers is None else tuple(steer_layers)
        self.families: dict[str, tuple[str, ...]] = {family: tuple(members) for family, members in (families or {}).items()}
        self.meta: dict[str, Any] = bank_file.as_json(meta or {})
        if not is_fingerprint(self.meta.get("fingerprint", {})):
            raise BankError("meta['fingerprint'] is not what emovec.fingerprint gives")
        for index in (self.read_layer, *self.steer_layers):
            self[index]
        self.readout = readout
        if readout is not None:
            self._check_readout(readout)
        for family, members in self.families.items():
            for name in members:
                if name not in self.names:
                    raise BankError(f"family {shown(family)}: {unknown(name, self.names)}")

    def _check_readout(self, readout: Readout) -> None:
        for index in readout.layers:
            if not self[index].baselines:
                raise BankError(f"layer {index} is not calibrated: without z-scores it cannot be read together with others")
        if self.read_layer not in readout.layers:
            raise BankError(f"the layer to read at, {self.read_layer}, is not among those of the readout, {list(readout.layers)}")
        if readout.concepts != len(self.names):
            raise BankError(f"the readout has baselines of {readout.concepts} concepts, the bank has {len(self.names)}")

    # --- a mapping of layers --------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> BankLayer:
        try:
            return self._layers[index]
        except (KeyError, TypeError):
            raise UnknownLayer(f"the bank has no layer {shown(index)}; it has {', '.join(map(str, self.layers))}") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bank):
            return NotImplemented
        return self._header() == other._header() and self._layers == other._layers and self.readout == other.readout

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        model = self.meta.get("model")
        of = "" if model is None else f" of {model}"
        return (
            f"Bank({len(self.names)} concepts{of}, d={self.width}, layers {', '.join(map(str, self.layers))}; "
            f"read at {', '.join(map(str, self.read_layers))}, steer at {', '.join(map(str, self.steer_layers))})"
        )

    def resolve(self, name: str) -> int:
        """The row of concept ``name``, the same in every layer.

        Raises:
            UnknownConcept: listing the nearest names.
        """
        return self._layers[self.read_layer].resolve(name)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layers that a score comes from: those of the readout, or the one to read at."""
        return (self.read_layer,) if self.readout is None else self.readout.layers

    @property
    def usable(self) -> dict[str, tuple[float, float]]:
        """Concept -> the lowest and the highest strength at which this model could still write, as far as the bank says."""
        said = self.meta.get("usable")
        return {} if not isinstance(said, dict) else {name: (float(low), float(high)) for name, (low, high) in said.items()}

    def score(self, streams: Mapping[int, Tensor], kind: str = "prompt") -> Tensor:
        """The scores [..., K] of residual streams, in fp64: what a probe reads from them, but for its rounding.

        Args:
            streams: layer -> [..., d] in any float dtype, for each of ``read_layers``; of single tokens, or of means over tokens.
            kind: of position, whose baseline counts.
        """
        scores = {}
        for index in self.read_layers:
            layer = self[index]
            readers = layer.directions if layer.readers is None else layer.readers
            stream = streams[index].double()
            scores[index] = stream @ readers.to(stream).T
            if layer.baselines:
                baseline = layer.baseline(kind)
                scores[index] = (scores[index] - baseline.mean.nan_to_num(0.0).to(stream)) / baseline.std.nan_to_num(1.0).to(stream)
        return scores[self.read_layer] if self.readout is None else self.readout.combine(scores, kind)

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to ``path`` as one safetensors file, all or nothing. The same bank gives the same bytes."""
        bank_file.write(path, list(self.values()), self._header(), self.readout)

    def _header(self) -> dict[str, Any]:
        return {
            "read_layer": self.read_layer,
            "steer_layers": list(self.steer_layers),
            "families": {family: list(members) for family, members in self.families.items()},
            "meta": self.meta,
        }

    # --- the model it belongs to ----------------------------------------------------------------------------------

    def check(self, model: torch.nn.Module, tokenizer: Any = None, *, force: bool = False) -> None:
        """Refuse a model that the bank was not made for.

        Args:
            model: compared by width, number of layers, type and a sample of its weights, whatever its dtype and device.
            tokenizer: if given, a chat template other than the bank's is warned about.
            force: warn instead of refusing.

        Raises:
            BankError: saying what differs.
        """
        expected = {"d": self.width, **self.meta.get("fingerprint", {})}
        found = fingerprint(model, like=expected)
        different = differences(expected, found)
        if found["layers"] is not None and self.layers[-1] >= found["layers"]:
            different.append(f"layer {self.layers[-1]} does not exist in a model of {found['layers']} layers")
        if different:
            message = f"the bank was made for {self.meta.get('model') or 'another model'}; " + "; ".join(different)
            if not force:
                raise BankError(f"{message}; force=True uses it all the same")
            warnings.warn(message, stacklevel=2)
        elif not found["weights"]:
            why = "the model's weights cannot be read" if expected.get("weights") else "the bank carries no fingerprint"
            warnings.warn(f"{why}, so only the model's shape was compared with the bank's", stacklevel=2)
        template = None if tokenizer is None else template_hash(tokenizer)
        if template is not None and self.meta.get("chat_template") not in (None, template):
            warnings.warn("the tokenizer's chat template is not the one the bank was calibrated with", stacklevel=2)

    # --- other banks from this one --------------------------------------------------------------------------------

    def subset(self, names: Sequence[str] | None = None, layers: Iterable[int] | None = None) -> Bank:
        """The bank with these concepts, in this order, and these layers only.

        If the layer to read at is left out, the nearest that stays takes its place; if no layer to steer at stays, it is that too.
        If one of several that are read together is left out, it is the only layer to read at.
        """
        kept = [self[index] for index in (self.layers if layers is None else layers)]
        if not kept:
            raise BankError("a bank has at least one layer")
        if names is not None:
            kept = [layer.subset(names) for layer in kept]
        indices = [layer.index for layer in kept]
        read_layer = min(indices, key=lambda index: abs(index - self.read_layer))
        steer_layers = [index for index in self.steer_layers if index in indices] or [read_layer]
        readout = self.readout if self.readout is not None and set(self.readout.layers) <= set(indices) else None
        if readout is not None and names is not None:
            readout = readout.subset([self.resolve(name) for name in names])
        wanted = set(self.names if names is None else names)
        families = {family: [name for name in members if name in wanted] for family, members in self.families.items()}
        families = {family: members for family, members in families.items() if members}
        return Bank(kept, read_layer, steer_layers, families, self.meta, readout=readout)

    def add(
        self,
        name: str,
        directions: Mapping[int, Tensor],
        *,
        readers: Mapping[int, Tensor] | None = None,
        baselines: Mapping[int, Mapping[str, Baseline]] | None = None,
        readout: Mapping[str, Baseline] | None = None,
        family: str | None = None,
    ) -> Bank:
        """The bank with one more concept.

        Args:
            name: the concept.
            directions: layer -> [d] of any length but zero, for every layer of the bank; made unit.
            readers: layer -> [d] to read with; default: the directions, made unit.
            baselines: layer -> kind of position -> Baseline of [1], projections on the readers. Without one the concept
                can be added and ablated; its scores are raw projections, and bounds and gates on it are refused.
            readout: kind of position -> Baseline of [1] of the mean z-score, where the bank is read at several layers.
            family: a family to put the concept into, new or known.
        """
        if set(directions) != set(self.layers):
            raise BankError(f"{name}: directions are needed at layers {list(self.layers)}, got {sorted(directions)}; see Bank.subset")
        added = []
        for index, direction in directions.items():
            layer = BankLayer.from_directions(direction.reshape(1, -1), [name], index)
            reader = None if readers is None or index not in readers else readers[index].detach().to("cpu", torch.float32).reshape(1, -1)
            added.append(replace(layer, readers=reader, baselines=(baselines or {}).get(index, {})))
        families = {} if family is None else {family: [name]}
        together = Readout(self.readout.layers, readout) if self.readout is not None and readout else None
        return self._joined(Bank(added, self.read_layer, families=families, readout=together), self.meta)

    def merge(self, other: Bank) -> Bank:
        """The union with another bank of the same model: other concepts at the same layers, or the same concepts at other layers.

        What exists once in a bank (the layers to read and steer at, residual norms, how it was made) is taken from this one;
        ``meta["merged"]`` keeps the other's.
        """
        different = differences(self.meta.get("fingerprint", {}), other.meta.get("fingerprint", {}))
        if different:
            raise BankError("banks of different models cannot be merged: " + "; ".join(different))
        return self._joined(other, {**self.meta, "merged": [*self.meta.get("merged", []), other.meta]})

    def _joined(self, other: Bank, meta: Mapping[str, Any]) -> Bank:
        if self.width != other.width:
            raise BankError(f"the bank is {self.width} wide, what joins it is {other.width}")
        if self.names == other.names and not set(self.layers) & set(other.layers):
            layers, readout = [*self.values(), *other.values()], self.readout
        elif self.layers == other.layers and not set(self.names) & set(other.names):
            layers = [self[index].join(other[index]) for index in self.layers]
            readout = None if self.readout is None else self.readout.join(other.readout, len(other.names))
        else:
            names, shared = sorted(set(self.names) & set(other.names)), sorted(set(self.layers) & set(other.layers))
            raise BankError(
                "banks merge when they hold other concepts at the same layers, or the same concepts at other layers; "
                f"these share {len(names)} of {len(self.names)} and {len(other.names)} concepts {shown(names[:3])} and the layers {shared} "
                f"of {list(self.layers)} and {list(other.layers)}"
            )
        known, lacking = ({name for layer in part if layer.baselines for name in layer.uncalibrated} for part in (self.values(), layers))
        if lacking - known:
            why = "have no baseline in a bank that has: their scores are raw projections, and bounds and conditions on them are refused"
            warnings.warn(f"concepts {', '.join(sorted(lacking - known))} {why}", stacklevel=3)
        families = {family: [*members, *other.families.get(family, ())] for family, members in self.families.items()}
        families |= {family: list(members) for family, members in other.families.items() if family not in families}
        families = {family: list(dict.fromkeys(members)) for family, members in families.items()}
        return Bank(layers, self.read_layer, self.steer_layers, families, meta, readout=readout)


def shipped_banks() -> list[str]:
    """The names of the banks that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def load_bank(name_or_path: str | os.PathLike[str]) -> Bank:
    """Load a bank: a name from :func:`shipped_banks`, or the path of a file.

    Raises:
        BankError: naming the file and what is wrong with it.
    """
    shipped = shipped_banks()
    path = _SHIPPED / f"{name_or_path}.safetensors" if str(name_or_path) in shipped else Path(name_or_path)
    if not path.is_file():
        near = ", ".join(nearest(name_or_path, shipped)) or "none"
        raise BankError(f"{path}: no such file, and no bank of that name is shipped; nearest shipped: {near}")
    layers, header, readout = bank_file.read(path)
    try:
        return Bank(layers, header["read_layer"], header["steer_layers"], header["families"], header["meta"], readout=readout)
    except (BankError, TypeError) as error:
        raise BankError(f"{path}: {error}") from None
