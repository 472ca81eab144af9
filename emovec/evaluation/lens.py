"""Which tokens a direction speaks for: its product with the unembedding, through the final norm.

A first-order view: it leaves out all blocks above the layer. The test asks whether a concept's own word is raised more by its own
direction than by other concepts' directions; that a direction raises emotion words in general would not show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emovec.evaluation.material import Material
from emovec.evaluation.reading import all_ranks
from emovec.evaluation.words import chance, said
from emovec.models import decoder_path, unwrapped
from emovec.report.markup import Html, section, tag
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, hit_estimate

TOKENS = 8
TOPS = (1, 5)
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


def result(material: Material) -> dict[str, Any]:
    """Top and bottom tokens of each concept, and whether its own word is among those that are its own."""
    bank, tokenizer = material.bank, material.tokenizer
    layer = bank.read_layer
    logits = spoken(material.model, bank[layer].directions)
    if logits is None:
        return {"skipped": "the model has no final norm or no unembedding that can be told"}
    concepts = {}
    for row, name in enumerate(bank.names):
        order = logits[row].argsort(descending=True)
        top, bottom = order[:TOKENS].tolist(), order.flip(0)[:TOKENS].tolist()
        concepts[name] = {"top": [tokenizer.decode([token]) for token in top], "bottom": [tokenizer.decode([token]) for token in bottom]}
    single = {row: ids[0] for row, name in enumerate(bank.names) if len(ids := _ids(tokenizer, f" {name}")) == 1}
    found: dict[str, Any] = {"layer": layer, "of": len(bank.names), "vocabulary": logits.shape[1], "concepts": concepts, "words": []}
    if len(single) >= 5:
        rows = torch.tensor(list(single))
        ranks = all_ranks(logits[:, list(single.values())].T)  # [words, directions]: of all directions for each word
        found["words"] = [bank.names[row] for row in single]
        found["ranks"] = ranks.gather(1, rows[:, None])[:, 0].tolist()
        found["top"] = {str(top): _hits(material, ranks, rows, top) for top in TOPS}
    return found


def spoken(model: nn.Module, directions: Tensor) -> Tensor | None:
    """What unit ``directions`` [K, d] add to the logits [K, V] of a stream that points their way; None: the model's head cannot be told."""
    decoder = decoder_path(unwrapped(model))[0][-1]
    norm = next((getattr(decoder, name) for name in _NORMS if isinstance(getattr(decoder, name, None), nn.Module)), None)
    head: Any = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    if norm is None or head is None:
        return None
    weight = head.weight
    place = next(iter(norm.parameters()), weight)
    with torch.inference_mode():
        rows = directions.to(place)
        normed = norm(rows * rows.shape[1] ** 0.5) - norm(torch.zeros_like(rows))
        logits: Tensor = (normed.float().to(weight.device) @ weight.float().T).cpu()
    return logits


def _ids(tokenizer: Any, word: str) -> list[int]:
    found: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    return found


def _hits(material: Material, ranks: Tensor, rows: Tensor, top: int) -> dict[str, Any]:
    hits = ranks.gather(1, rows[:, None])[:, 0] <= top
    groups = (torch.arange(len(rows)),)
    estimate = hit_estimate(hits, groups, material.options.samples, material.generator(f"lens.{top}"))
    generator = material.generator(f"lens.null.{top}")
    null = []
    for _ in range(material.options.permutations):
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        null.append((ranks.gather(1, shuffled[:, None]) <= top).double().mean())
    return estimate | {"null": against(estimate["value"], torch.stack(null)), "chance": top / ranks.shape[1]}


def parts(result: dict[str, Any]) -> list[Html]:
    """The test, and each concept's tokens."""
    if "skipped" in result:
        return [text(result["skipped"], title="Which tokens directions speak for")]
    found = [
        text(
            f"Each direction of layer {result['layer']} through the final norm and the unembedding: the tokens of "
            f"{result['vocabulary']:,} that it raises most, and least. "
            "What later layers do with it is left out. The test: of all directions, is a concept's own among those that raise its word "
            "most? "
            "The null shuffles words among concepts.",
            title="Which tokens directions speak for",
        )
    ]
    if result["words"]:
        rows = [
            [
                f"among the first {top} of {result['of']}",
                said(part),
                f"{part['chance']:.3f}",
                f"{part['null']['high']:.3f}",
                chance(part["null"]["p"]),
                part["n"],
            ]
            for top, part in result["top"].items()
        ]
        found.append(table(["own direction", "share of words (95 %)", "chance", "null, 97.5 %", "p", "words of one token"], rows))
    else:
        found.append(text("Too few of the concepts' words are single tokens for the test."))
    lines = [[name, _tokens(part["top"]), _tokens(part["bottom"])] for name, part in result["concepts"].items()]
    whole = table(["concept", "raised most", "lowered most"], lines)
    found.append(section(None, tag("details", tag("summary", f"Tokens of all {len(lines)} directions"), whole)))
    return found


def _tokens(tokens: list[str]) -> str:
    return " · ".join(token.strip() or repr(token) for token in tokens)
