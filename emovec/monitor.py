"""A reading: the scores of one sequence, token by token, with the names to ask it by.

Pure data. It does not know where the scores came from; a probe makes it, and so can anyone else.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from emovec import extras
from emovec.bank import unknown

Reduce = Literal["mean", "max", "last"]


class Reading:
    """Scores of T tokens against K concepts at one or more layers.

    Scores are z-scores against ordinary text, or raw projections where the bank is not calibrated. They stay on their
    device until a method has to return plain numbers.

    The first token of a sequence is an attention sink: its stream has a norm of its own, many times that of any other
    token, and its scores mean nothing. It is kept in ``scores``, but wherever tokens are put together (``mean``, ``top``,
    ``families``, ``smooth``) it is left out, unless it is the only token there is.

    Args:
        scores: layer -> [T, K], any float dtype.
        names: the K concepts.
        kinds: for each token "prompt" or "generated" (any other word is allowed).
        tokens: [T] token ids.
        read_layer: the layer that ``scores`` and all methods read; default: the last of the layers.
        together: several layers, and the scores [T, K] that come from all of them: then these are what ``scores`` and all methods read;
            ``scores`` may then be empty, if the layers' own are not known.
        tokenizer: turns token ids into text; anything with transformers' ``decode``.
        families: family -> its concepts; those that are not among ``names`` are ignored.
        calibrated: whether the scores are z-scores.
        positions: the tokens' places in their sequence, counted from 0; default: all of it.

    Raises:
        ValueError: shapes or lengths that do not fit together, or a ``read_layer`` that is not in ``scores``.

    >>> reading = Reading({18: torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 1.0]])}, ["calm", "afraid"], ["prompt"] * 3)
    >>> reading.top(1)
    [('afraid', 2.0)]
    """

    def __init__(
        self,
        scores: Mapping[int, Tensor],
        names: Sequence[str],
        kinds: Sequence[str],
        tokens: Tensor | None = None,
        read_layer: int | None = None,
        tokenizer: Any = None,
        families: Mapping[str, Sequence[str]] | None = None,
        *,
        together: tuple[tuple[int, ...], Tensor] | None = None,
        calibrated: bool = True,
        positions: range | None = None,
    ) -> None:
        if not scores and (together is None or read_layer is None):
            raise ValueError("a reading has at least one layer")
        self._scores = dict(sorted(scores.items()))
        self.layers: tuple[int, ...] = tuple(self._scores)
        self.names: tuple[str, ...] = tuple(names)
        self.kind: tuple[str, ...] = tuple(kinds)
        self.tokens = tokens
        self.layer: int = self.layers[-1] if read_layer is None else read_layer
        self._together = together
        self.tokenizer = tokenizer
        self.calibrated = calibrated
        self.positions = range(len(self.kind)) if positions is None else positions
        self._families = {family: tuple(members) for family, members in (families or {}).items()}
        self._pieces: tuple[str, ...] | None = None
        if scores:
            self.at(self.layer)
        shape = (len(self.kind), len(self.names))
        every = {f"layer {layer}": values for layer, values in self._scores.items()}
        if together is not None:
            every[self.where] = together[1]
        for where, values in every.items():
            if tuple(values.shape) != shape:
                raise ValueError(f"{shape[0]} kinds and {shape[1]} names want scores {list(shape)}, {where} has {list(values.shape)}")
        if tokens is not None and tuple(tokens.shape) != shape[:1]:
            raise ValueError(f"tokens must be [{shape[0]}], got {list(tokens.shape)}")
        if len(self.positions) != shape[0]:
            raise ValueError(f"{len(self.positions)} positions for {shape[0]} tokens")

    # --- scores -------------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:
        """[T, K] at the layer to read at, or from the layers that are read together."""
        return self._scores[self.layer] if self._together is None else self._together[1]

    @property
    def where(self) -> str:
        """The layer or layers that ``scores`` come from, in words."""
        return f"layer {self.layer}" if self._together is None else f"layers {', '.join(map(str, self.read_layers))} together"

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layer or layers that ``scores`` come from."""
        return (self.layer,) if self._together is None else self._together[0]

    @property
    def unit(self) -> str:
        """What the scores are measured in, in words."""
        return "z-score against ordinary text" if self.calibrated else "projection, uncalibrated"

    def at(self, layer: int) -> Tensor:
        """[T, K] at ``layer``."""
        if layer not in self._scores:
            known = ", ".join(map(str, self.layers)) or "none by themselves"
            raise ValueError(f"layer {layer} was not read; the layers of this reading are {known}")
        return self._scores[layer]

    def of(self, name: str) -> Tensor:
        """[T]: one concept over the tokens."""
        return self.scores[:, self._index(name)]

    def mean(self, kind: str | None = None) -> Tensor:
        """[K]: the mean over the tokens, or over those of one kind."""
        return self._reduce(self.scores, "mean", kind)

    def top(self, k: int = 5, reduce: Reduce = "mean", kind: str | None = None) -> list[tuple[str, float]]:
        """The ``k`` concepts with the highest scores, best first.

        Args:
            k: how many; all there are if there are fewer.
            reduce: over the tokens, their mean, the highest, or the last one's.
            kind: only tokens of this kind.

        Raises:
            ValueError: an unknown ``reduce``, ``k`` below 1, or no tokens of that kind.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = self._reduce(self.scores, reduce, kind).topk(min(k, len(self.names)))
        return [(self.names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def families(self, reduce: Reduce = "mean", kind: str | None = None) -> dict[str, float]:
        """For each family the mean score of its members, then reduced over the tokens as in :meth:`top`."""
        series = self.family_scores()
        return {family: float(self._reduce(values, reduce, kind)) for family, values in series.items()}

    def family_scores(self) -> dict[str, Tensor]:
        """For each family [T]: the mean score of its members at every token."""
        index = {name: row for row, name in enumerate(self.names)}
        rows = {family: [index[name] for name in members if name in index] for family, members in self._families.items()}
        return {family: self.scores[:, members].mean(-1) for family, members in rows.items() if members}

    def members(self) -> dict[str, tuple[str, ...]]:
        """The families and those of their concepts that are read here."""
        known = {family: tuple(name for name in members if name in self.names) for family, members in self._families.items()}
        return {family: members for family, members in known.items() if members}

    def smooth(self, halflife: float = 8) -> Reading:
        """A reading whose tokens are exponentially weighted means of the scores up to them, at every layer.

        With ``decay = 0.5 ** (1 / halflife)``: ``n_t = decay * n_(t-1) + score_t``, ``d_t = decay * d_(t-1) + 1``, both from
        zero, and the smoothed score is ``n_t / d_t`` (pandas: ``ewm(halflife=halflife).mean()``). It looks back only, so it is
        what a monitor sees while text is being written. The first token of a sequence stays as it is and enters no other.

        Args:
            halflife: after this many tokens a score counts half; positive.
        """
        if not (0 < halflife < math.inf):
            raise ValueError(f"halflife must be positive and finite, got {halflife}")
        lead = int(len(self) > 0 and self.positions[0] == 0)
        return self._with(lambda values: torch.cat([values[:lead].float(), _ewm(values[lead:], halflife)]))

    # --- tokens -------------------------------------------------------------------------------------------------------

    @property
    def pieces(self) -> tuple[str, ...]:
        """The text of each token; together they are the text.

        A character that spans several tokens belongs to the one that completes it; those before it are empty.
        Without a tokenizer a token is shown as ``<id>``, without token ids as ``[position]``.
        """
        if self._pieces is None:
            if self.tokens is None:
                self._pieces = tuple(f"[{position}]" for position in self.positions)
            elif self.tokenizer is None:
                self._pieces = tuple(f"<{token}>" for token in self.tokens.tolist())
            else:
                self._pieces = tuple(_pieces(self.tokenizer, self.tokens.tolist()))
        return self._pieces

    @property
    def text(self) -> str:
        """The pieces put together."""
        return "".join(self.pieces)

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, key: int | slice) -> Reading:
        """The reading of some of the tokens; of one token for an integer."""
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise IndexError(f"token {key} of {len(self)}")
            key = slice(key % len(self), key % len(self) + 1)
        if not isinstance(key, slice):
            raise TypeError(f"a reading is indexed by an integer or a slice of tokens, got {key!r}; for a concept, use reading.of(name)")
        rows = range(len(self))[key]
        if rows.step < 0:
            raise ValueError(f"a reading keeps its tokens in order; got a step of {rows.step}")
        part = self._with(lambda values: values[key], key)
        if self.tokens is not None and self.tokenizer is not None:
            part._pieces = self.pieces[key]
        return part

    # --- elsewhere ----------------------------------------------------------------------------------------------------

    def to_pandas(self, layer: int | None = None) -> Any:
        """A ``pandas.DataFrame`` with a row for each token (index: position, kind, token) and a column for each concept.

        Args:
            layer: default: what ``scores`` come from.

        Raises:
            ModuleNotFoundError: pandas is not installed; it comes with ``emovec[report]``.
        """
        pandas = extras.require("pandas", extra="report")
        index = pandas.MultiIndex.from_arrays([list(self.positions), self.kind, self.pieces], names=["position", "kind", "token"])
        scores = self.scores if layer is None else self.at(layer)
        return pandas.DataFrame(scores.float().cpu().numpy(), index=index, columns=list(self.names))

    def heatmap(self, path: str | os.PathLike[str], concepts: Sequence[str] | None = None, *, title: str = "Emotion concepts") -> Path:
        """Write one HTML page: the text coloured by a concept that can be chosen, the strongest concepts, and their course.

        The page is one file that asks nothing of the network.

        Args:
            path: where to write it.
            concepts: those to offer first; default: the strongest.
            title: the page's heading.

        Returns:
            ``path``.
        """
        from emovec.report.overview import lede, sections
        from emovec.report.page import write

        return write(path, title, sections(self, concepts), lede=lede(self))

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.kind.count(kind)} {kind}" for kind in dict.fromkeys(self.kind))
        strongest = ", ".join(f"{name} {value:+.2f}" for name, value in self.top(3)) if len(self) else "none"
        unit = "z-scores" if self.calibrated else "raw projections"
        return f"Reading({len(self)} tokens ({counts}), {len(self.names)} concepts, {self.where}, {unit}; strongest: {strongest})"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise unknown(name, self.names)
        return self.names.index(name)

    def _reduce(self, values: Tensor, reduce: Reduce, kind: str | None) -> Tensor:
        """Reduce ``values`` [T, ...] over the tokens of one kind, in fp32."""
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
        rows = [row for row, known in enumerate(self.kind) if kind is None or known == kind]
        if not rows:
            known = ", ".join(dict.fromkeys(self.kind)) or "no tokens at all"
            raise ValueError(f"the reading has no {'' if kind is None else f'{kind!r} '}tokens; it has {known}")
        if len(rows) > 1 and self.positions[rows[0]] == 0:
            rows = rows[1:]
        if reduce == "last":
            return values[rows[-1]].float()
        chosen = values[torch.tensor(rows, device=values.device)].float()
        return chosen.mean(0) if reduce == "mean" else chosen.amax(0)

    def _with(self, change: Callable[[Tensor], Tensor], key: slice = slice(None)) -> Reading:
        """The same reading with ``change`` done to all scores, of the tokens in ``key``."""
        tokens = None if self.tokens is None else self.tokens[key]
        reading = Reading(
            {layer: change(values) for layer, values in self._scores.items()},
            self.names,
            self.kind[key],
            tokens,
            self.layer,
            self.tokenizer,
            self._families,
            together=None if self._together is None else (self._together[0], change(self._together[1])),
            calibrated=self.calibrated,
            positions=self.positions[key],
        )
        reading._pieces = None if self._pieces is None else self._pieces[key]
        return reading


def _ewm(values: Tensor, halflife: float) -> Tensor:
    """The exponentially weighted means of ``values`` [T, K], in fp32, as :meth:`Reading.smooth` states them."""
    decay = 0.5 ** (1 / halflife)
    totals = pad(values.float(), (0, 1), value=1.0)  # the last column sums the weights
    for before, row in itertools.pairwise(totals.unbind()):
        row.add_(before, alpha=decay)
    return totals[:, :-1] / totals[:, -1:]


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text that each token adds, so that the pieces together are the text.

    A token is decoded behind its neighbours: alone, a byte-level tokenizer turns part of a character into U+FFFD, and a
    SentencePiece one drops the leading space.
    """

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(tokens[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    context, done = 0, 0
    for stop in range(1, len(tokens) + 1):
        before, now = text(context, done), text(context, stop)
        unfinished = now.endswith("\ufffd") and stop < len(tokens)
        pieces.append("" if unfinished else now[len(before) :])
        if not unfinished:
            context, done = done, stop
    return pieces
