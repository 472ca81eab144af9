"""Does the shipped bank read what other people wrote? `python bench/others.py`

Its stories and messages have one writer. Here are texts by thousands of others: tweets, sentences of product reviews, of film reviews
and of newspaper editorials, each with the mean valence that some twenty raters gave it. They are the ground truth of VADER (Hutto and
Gilbert 2014) and come with the source of its Python package. A text is read as a user's message: the mean of its words' scores, and of
all concepts' scores the mean weighted by the concepts' own valence. Beside its rank correlation with the raters' stands that of the
words alone: directions made by the same recipe from the mean of a text's token embeddings, which no layer has touched.

Valence is the one thing that the raters were asked. Of the 171 words themselves nothing is said.

Writes bench/results/others.json and the table of docs/extraction.md; with `--tables` the table alone.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pages
import provenance
import torch
from torch import Tensor

from emovec.bank import load_bank
from emovec.bank_layer import KINDS
from emovec.evaluation.activations import means
from emovec.evaluation.labelled import Moments, Texts, recipe_of, remade
from emovec.evaluation.texts import ratings
from emovec.extraction import corpus
from emovec.extraction.blocks import Blocks
from emovec.extraction.tokens import PROMPT, Tokens, dialogue_tokens, prompt_tokens, story_tokens
from emovec.models import load_model
from emovec.stats import multiplicities, permutation_p, quantiles, ranks, spearman

PAGE = pages.DOCS / "extraction.md"
MODEL = "smollm2-135m-instruct"
PACKAGE = "vaderSentiment==3.3.2"
SETS = {
    "tweets": "tweets",
    "product reviews": "amazonReviewSnippets",
    "film reviews": "movieReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
COUNT = 800  # of each
WORDS = 4  # at least
SAMPLES = 1000
Rated = list[tuple[float, str]]


# --- texts ----------------------------------------------------------------------------------------------------------------


def fetched() -> dict[str, Rated]:
    """Some texts of each set with their mean rating, -4 to 4; the package's source is downloaded and not kept."""
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as source:
            inner = next(member for member in source if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=source.extractfile(inner)) as data:
                files = {Path(member.name).name: member for member in data}
                return {name: rated(data.extractfile(files[f"{file}_GroundTruth.txt"])) for name, file in SETS.items()}


def rated(file: Any) -> Rated:
    """Of the lines `id, rating, text` those with words enough, ``COUNT`` of them drawn with a seed."""
    rows = [line.rstrip("\r\n").split("\t") for line in file.read().decode("utf-8", "replace").splitlines()]
    found = [(float(row[1]), row[2].strip()) for row in rows if len(row) >= 3 and len(row[2].split()) >= WORDS]
    random.Random(0).shuffle(found)
    return found[:COUNT]


# --- the words alone --------------------------------------------------------------------------------------------------------


def of_words(table: Tensor, texts: Sequence[Tokens]) -> dict[int, Tensor]:
    """The mean embeddings [N, d] of the texts' used tokens, as if they were a layer 0."""
    rows = [table[torch.tensor([token for token, kind in zip(text.ids, text.kinds, strict=True) if kind == PROMPT])] for text in texts]
    return {0: torch.stack([row.mean(0) for row in rows])}


def words_alone(bank: Any, tokenizer: Any, table: Tensor) -> Any:
    """A bank of embeddings, made of the shipped corpus by the recipe of ``bank``."""
    recipe, names = recipe_of(bank), corpus.emotions()
    assert recipe is not None
    stories = [story for file in ("stories.jsonl", "messages.jsonl") for story in corpus.stories(corpus.shipped(file))()]
    cut = [story_tokens(tokenizer, story.text, skip=recipe.skip, share=recipe.skip_share) for story in stories]
    labels = torch.tensor([names.index(story.emotion) for story in stories])
    texts = Texts(of_words(table, cut)[0][:, None], labels, torch.zeros_like(labels), (0,))
    prompts = [prompt_tokens(tokenizer, said).only(PROMPT) for said in corpus.prompts(corpus.shipped("ordinary.jsonl"))()]
    dialogues = [dialogue_tokens(tokenizer, said) for said in corpus.dialogues(corpus.shipped("neutral.jsonl"))()]
    ordinary, neutral = moments(table, prompts, (PROMPT,)), moments(table, dialogues, range(len(KINDS)))
    return remade(texts, names, (0,), recipe, {**dict.fromkeys(KINDS, ordinary), "neutral_tokens": neutral})


def moments(table: Tensor, texts: Sequence[Tokens], kinds: Sequence[int]) -> Moments:
    used = [token for text in texts for token, kind in zip(text.ids, text.kinds, strict=True) if kind in kinds]
    rows = table[torch.tensor(used)].double()
    return Moments(rows.mean(0)[None], torch.cov(rows.T)[None], len(rows), (0,))


# --- figures --------------------------------------------------------------------------------------------------------------


def agreement(scores: Tensor, names: Sequence[str], truth: Tensor, seed: int) -> dict[str, Any]:
    """The rank correlation of valence as read with ``truth`` [N], its bootstrap interval over texts and p against shuffled ones."""
    known = ratings()
    valence = torch.tensor([known[name][0] for name in names], dtype=torch.float64)
    read = scores.double() @ (valence - valence.mean())
    generator = torch.Generator().manual_seed(seed)
    value = float(spearman(read, truth))
    shuffled = torch.stack([spearman(read, truth[torch.randperm(len(truth), generator=generator)]) for _ in range(SAMPLES)])
    low, high = quantiles(_weighted(ranks(read), ranks(truth), multiplicities(torch.arange(len(truth)), SAMPLES, generator)))
    return {"r": round(value, 4), "low": round(low, 4), "high": round(high, 4), "p": round(permutation_p(value, shuffled), 5)}


def _weighted(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Pearson's r [B] of ``a`` and ``b`` [N] where texts are counted ``weights`` [B, N] times."""
    share = weights / weights.sum(1, keepdim=True)
    a, b = a - (share @ a)[:, None], b - (share @ b)[:, None]
    found: Tensor = (share * a * b).sum(1) / ((share * a * a).sum(1) * (share * b * b).sum(1)).sqrt()
    return found


def measured() -> dict[str, Any]:
    bank = load_bank(MODEL)
    model, tokenizer = load_model(MODEL, dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight.detach().float()
    plain, blocks = words_alone(bank, tokenizer, table), Blocks(model, bank.read_layers)
    found = {}
    for number, (name, texts) in enumerate(fetched().items()):
        truth = torch.tensor([rating for rating, _ in texts], dtype=torch.float64)
        cut = [story_tokens(tokenizer, text, skip=0, chat=True) for _, text in texts]
        activations = dict(zip(blocks.layers, means(blocks, cut)[:, 0].unbind(1), strict=True))
        found[name] = {
            "texts": len(texts),
            "tokens": sum(len(text.ids) for text in cut),
            "bank": agreement(bank.score(activations, "prompt"), bank.names, truth, number),
            "words": agreement(plain.score(of_words(table, cut), "prompt"), plain.names, truth, number),
        }
        print(name, found[name], flush=True)
    return {"model": MODEL, "source": PACKAGE, "read_layers": list(bank.read_layers), "sets": found}


def tables(results: dict[str, Any], machine: str) -> dict[str, str]:
    def said(part: dict[str, Any]) -> str:
        return f"{part['r']:.2f} ({part['low']:.2f} to {part['high']:.2f})"

    lines = ["| texts | n | the bank | words alone |", "|---|---|---|---|"]
    lines += [f"| {name} | {part['texts']} | {said(part['bank'])} | {said(part['words'])} |" for name, part in results["sets"].items()]
    lines += [
        "",
        f"Rank correlations with 95 % intervals. Measured by `python bench/others.py` on {machine}; more in bench/results/others.json.",
    ]
    return {"others": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the page's table from the results there are")
    torch.set_num_threads(1)
    if not parser.parse_args().tables:
        provenance.write("others", measured())
    found = provenance.read("others")
    pages.write(PAGE, tables(found["results"], found["provenance"]["name"]))


if __name__ == "__main__":
    main()
