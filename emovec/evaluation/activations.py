"""One pass over the texts: of each the mean activations in its pools, of ordinary text the moments of its tokens. Kept in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emovec.bank_file import replacing
from emovec.bank_layer import BankError
from emovec.evaluation.labelled import Moments
from emovec.evaluation.texts import TextSet, chunks
from emovec.extraction.blocks import Blocks
from emovec.extraction.progress import Progress
from emovec.extraction.sums import NeutralMoments, story_means, widened
from emovec.extraction.tokens import UNUSED, WINDOW, Batch, Tokens, batches

_MOMENTS = {  # what the tokens of a pool of a set are moments of
    "prompt": ("ordinary", (0,), False),
    "turn_start": ("ordinary", (1,), False),
    "generated": ("neutral", (1,), False),
    "neutral_tokens": ("neutral", (0, 1), False),
    "neutral_dialogues": ("neutral", (0, 1), True),
}


MOMENTS_OF = ("ordinary", "neutral")
"""Sets of which the tokens' moments are kept, and not each text's means."""


def means(
    blocks: Blocks, texts: Iterable[Tokens], pools: int = 1, *, batch_tokens: int = 2048, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """The mean activations [N, P, L, d] in fp32 of each text's tokens by pool; NaN where a text has none in a pool."""
    numbered = (replace(text, label=number) for number, text in enumerate(texts))
    rows: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor] = []
    current: list[Batch] = []
    with blocks.shown_to(lambda layer, hidden: seen.append(pool_means(hidden, current[0], pools).float().cpu())):
        for batch in batches(numbered, batch_tokens):
            current[:] = [batch.to(blocks.device)]
            blocks.run(batch)
            rows.append((batch.labels, torch.stack(seen, 2)))
            seen.clear()
            advance(batch.tokens)
    order, found = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return found[order.argsort()]


def pool_means(hidden: Tensor, batch: Batch, pools: int) -> Tensor:
    """The means [B, P, d] in fp64 of ``hidden`` [B, T, d] over the tokens of each pool."""
    kinds, rows = batch.to(hidden.device).kinds, widened(hidden)
    used = kinds[:, None] == torch.arange(pools, device=kinds.device)[:, None]
    return (used.to(rows) @ rows).double() / used.sum(2, keepdim=True)


class Activations:
    """The texts of an evaluation by their activations, computed or read back from ``directory``.

    Args:
        blocks: the model at the layers of interest.
        width: d.
        directory: for the files; a file belongs to one model, dtype, set of layers and chunk of texts, by its name.
        belongs_to: what identifies the model's side.
        batch_tokens: tokens in a batch.
    """

    def __init__(self, blocks: Blocks, width: int, directory: Path, belongs_to: Mapping[str, Any], batch_tokens: int) -> None:
        self.blocks, self.width, self.directory, self.batch_tokens = blocks, width, directory, batch_tokens
        self._belongs_to = {**belongs_to, "layers": list(blocks.layers), "batch_tokens": batch_tokens}

    def means(self, part: TextSet, progress: Progress) -> Tensor:
        """[N, P, L, d] of one set; a chunk of it is the most that a kill can cost."""
        found = []
        for number, texts in enumerate(chunks(part.texts, WINDOW)):
            tokens = sum(len(text.ids) for text in texts)

            def compute(texts: Sequence[Tokens] = texts) -> dict[str, Tensor]:
                return {"means": means(self.blocks, texts, len(part.pools), batch_tokens=self.batch_tokens, advance=progress.advance)}

            found.append(
                self._kept(f"means-{part.name}-{number}", TextSet(part.name, tuple(texts), part.pools).digest, compute, tokens, progress)[
                    "means"
                ]
            )
        whole = torch.cat(found)
        there = torch.tensor([[pool in set(text.kinds) for pool in range(len(part.pools))] for text in part.texts])
        if not bool(whole[there].isfinite().all()):
            raise BankError(f"activations of {part.name} are not finite; try bfloat16 or float32")
        return whole

    def moments(
        self, sets: Mapping[str, TextSet], about: Mapping[int, Tensor], together: tuple[int, ...], progress: Progress
    ) -> dict[str, Moments]:
        """The moments of ordinary and neutral tokens.

        Args:
            sets: the texts.
            about: layer -> [d], near the tokens' mean.
            together: layers whose covariance with one another is wanted too, ascending.
            progress: told of the tokens done.
        """
        digest = hashlib.sha256("".join(sets[name].digest for name in MOMENTS_OF).encode()).hexdigest()
        tokens = sum(sets[name].tokens for name in MOMENTS_OF)
        found = self._kept("moments", f"{digest} {together}", lambda: self._moments(sets, about, together, progress), tokens, progress)
        return {
            name: Moments(
                found[f"{name}.mean"],
                found[f"{name}.covariance"],
                int(found[f"{name}.count"]),
                self.blocks.layers,
                {pair: found[f"{name}.across.{pair[0]}.{pair[1]}"] for pair in combinations(together, 2)},
            )
            for name in _MOMENTS
        }

    def _moments(
        self, sets: Mapping[str, TextSet], about: Mapping[int, Tensor], together: tuple[int, ...], progress: Progress
    ) -> dict[str, Tensor]:
        about = {layer: mean.to(self.blocks.device) for layer, mean in about.items()}
        sums = {name: _Moments(self.width, self.blocks.layers, about, whole, together) for name, (_, _, whole) in _MOMENTS.items()}
        for source in MOMENTS_OF:
            mine = [name for name, (of, _, _) in _MOMENTS.items() if of == source]

            def see(layer: int, hidden: Tensor, mine: Sequence[str] = mine) -> None:
                for name in mine:
                    sums[name].see(layer, hidden)

            with self.blocks.shown_to(see):
                for batch in batches(sets[source].texts, self.batch_tokens):
                    for name in mine:
                        sums[name].take(_only(batch, _MOMENTS[name][1]))
                    self.blocks.run(batch)
                    progress.advance(batch.tokens)
        found = {}
        for name, part in sums.items():
            count = part.at("count").cpu()
            found[f"{name}.count"] = count
            found[f"{name}.mean"] = torch.stack(
                [(about[layer] + part.at(f"sum.{layer}") / float(count)).cpu() for layer in self.blocks.layers]
            )
            found[f"{name}.covariance"] = torch.stack([part.covariance(layer).cpu() for layer in self.blocks.layers])
            found |= {f"{name}.across.{one}.{other}": part.across(one, other).cpu() for one, other in combinations(together, 2)}
        return found

    def _kept(self, name: str, digest: str, compute: Callable[[], dict[str, Tensor]], tokens: int, progress: Progress) -> dict[str, Tensor]:
        belongs_to = json.dumps({**self._belongs_to, "texts": digest}, sort_keys=True)
        path = self.directory / f"{name}-{hashlib.sha256(belongs_to.encode()).hexdigest()[:16]}.safetensors"
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - the file is not a dict
            except (SafetensorError, OSError):
                path.unlink()
            else:
                progress.resume(tokens)
                return found
        found = compute()
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.torch.save({key: value.contiguous() for key, value in found.items()}))
        return found


class _Moments(NeutralMoments):
    """With the scatter between layers that are read together."""

    def __init__(
        self, width: int, layers: tuple[int, ...], about: Mapping[int, Tensor], dialogues: bool, together: tuple[int, ...]
    ) -> None:
        super().__init__(width, layers, about, dialogues=dialogues)
        self._shapes |= {f"across.{one}.{other}": (width, width) for one, other in combinations(together, 2)}
        self._together = together
        self._seen: dict[int, Tensor] = {}

    def see(self, layer: int, hidden: Tensor) -> None:
        super().see(layer, hidden)
        if layer not in self._together:
            return
        assert self._batch is not None
        batch = self._batch.to(hidden.device)
        rows = story_means(hidden, batch) if self._dialogues else widened(hidden[batch.kinds != UNUSED])
        self._seen[layer] = rows - self._about[layer].to(rows)
        for one in self._together[: self._together.index(layer)]:
            self.at(f"across.{one}.{layer}", hidden.device).add_(self._seen[one].to(rows).T @ self._seen[layer])

    def across(self, one: int, other: int) -> Tensor:
        """The covariance [d, d] between two layers."""
        count, first, second = float(self.at("count")), self.at(f"sum.{one}"), self.at(f"sum.{other}")
        return (self.at(f"across.{one}.{other}") - first[:, None] * second.to(first) / count) / max(count - 1, 1)


def _only(batch: Batch, pools: Sequence[int]) -> Batch:
    chosen = torch.isin(batch.kinds, torch.tensor(pools))
    return Batch(batch.ids, batch.mask, batch.kinds.where(chosen, torch.tensor(UNUSED)), batch.labels)
