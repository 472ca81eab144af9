"""Does adding a direction make the model name that feeling? `python bench/causal.py`

The model goes on from "How does Anna feel? Anna feels", in 4 frames (one of them a chat) with 6 subjects, while one of 12
directions is added at the bank's steering layers with 5 strengths. Asked is how far the log-odds of the direction's own word
move, summarised by the slope of a line through all strengths, unsteered included. All 12 words are single tokens here, so a
word's probability is exactly its token's.

- **Odds among the 12 words** is the measure: p(word) against p(the other eleven). It asks which feeling is named, whether or
  not one is named at all, which an overdose makes unlikely.
- **Odds among all tokens** stand beside it, for strengths up to 0.05 only, where the model still names feelings.
- **The null** is 40 random directions with the same strengths at the same layers. Each is one unit vector at all layers, as a
  concept's directions are much alike, so that their effects add up. Their signs mean nothing, hence the size of the slope.
- **The second control** is the eleven other words' directions: does a word's own direction raise it the most?

A word passes if its slope is above the size of every random slope, and the 95 % interval of its slope (frames and subjects
drawn anew, both) is above zero. Frames, subjects, strengths and this rule were set before the null was run; layers and unit of
strength are the bank's.

Writes bench/results/causal.json and the table of docs/steering.md; with `--tables` the table alone, from the results there are.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pages
import provenance
import torch
from torch import Tensor

from emovec.bank import Bank, BankLayer, load_bank
from emovec.hook import attach
from emovec.models import encode, load_model

PAGE = pages.DOCS / "steering.md"
MODEL = "smollm2-135m-instruct"
WORDS = ("happy", "inspired", "loving", "proud", "calm", "desperate", "angry", "guilty", "sad", "afraid", "nervous", "surprised")
SUBJECTS = ("Anna", "Tom", "Maria", "the nurse", "the old man", "my neighbour")
FRAMES = (
    "How does {x} feel? {X} feels",
    "{X} is sitting at the table. How does {x} feel right now? {X} feels",
    "Q: How does {x} feel today?\nA: {X} feels",
)
CHAT = ("How does {x} feel?", "{X} feels")
STRENGTHS = (-0.1, -0.05, 0.0, 0.05, 0.1, 0.15)
SMALL = 0.05
RANDOM = 40
SAMPLES = 2000


# --- arithmetic ---------------------------------------------------------------------------------------------------


def log_odds(log_p: Tensor) -> Tensor:
    """Log-odds of each event against its complement, from log-probabilities."""
    return log_p - torch.log1p(-log_p.exp())


def log_odds_among(log_p: Tensor) -> Tensor:
    """Log-odds of each of the W words of ``log_p`` [..., W] against the others."""
    words = log_p.shape[-1]
    others = log_p.unsqueeze(-2).expand(*log_p.shape[:-1], words, words).masked_fill(torch.eye(words, dtype=torch.bool), -torch.inf)
    return log_p - others.logsumexp(-1)


def slopes(strengths: Sequence[float], values: Tensor) -> Tensor:
    """Slopes of the least-squares lines through ``values`` [S, ...] over S strengths."""
    x = torch.tensor(strengths, dtype=values.dtype)
    x -= x.mean()
    return torch.einsum("s,s...->...", x, values) / x.square().sum()


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of ``values`` [F, X], with rows and columns drawn anew."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(values.shape[0], (SAMPLES, values.shape[0], 1), generator=generator)
    columns = torch.randint(values.shape[1], (SAMPLES, 1, values.shape[1]), generator=generator)
    means = values[rows, columns].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def spearman(values: Tensor) -> float:
    """Rank correlation of ``values`` [S], without ties, with their order."""
    ranks = values.argsort().argsort().double()
    return float(torch.corrcoef(torch.stack([torch.arange(len(values)).double(), ranks]))[0, 1])


# --- the model ----------------------------------------------------------------------------------------------------


def prompts(tokenizer: Any) -> list[list[str]]:
    """The texts to go on from: for each frame one for each subject."""
    question, answer = CHAT
    opened = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    return [
        [frame.replace("{x}", subject).replace("{X}", subject[0].upper() + subject[1:]) for subject in SUBJECTS]
        for frame in (*FRAMES, opened + answer)
    ]


def random_bank(bank: Bank) -> Bank:
    """A bank of ``RANDOM`` random unit directions, each the same at all of the bank's steering layers, with its units of strength."""
    directions = torch.randn(RANDOM, bank.width, generator=torch.Generator().manual_seed(0))
    names = [f"random {k}" for k in range(RANDOM)]
    layers = [
        replace(BankLayer.from_directions(directions, names, index), residual_norm=bank[index].residual_norm) for index in bank.steer_layers
    ]
    return Bank(layers, steer_layers=bank.steer_layers, meta=bank.meta)


class Asker:
    """The model, the prompts and the words' tokens."""

    def __init__(self, device: str | None) -> None:
        self.model, tokenizer = load_model(MODEL, dtype=torch.float32, device=device)
        self.batches = [encode(tokenizer, texts, chat=False, device=self.model.device) for texts in prompts(tokenizer)]
        tokens = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in WORDS]
        if any(len(ids) != 1 for ids in tokens):
            raise ValueError(f"not every word is one token: {dict(zip(WORDS, tokens, strict=True))}")
        self.tokens = [ids[0] for ids in tokens]
        self.unsteered = self._ask()

    def _ask(self) -> Tensor:
        """Log-probabilities of the words, [F, X, W]."""
        with torch.inference_mode():
            logits = torch.stack([self.model(**batch, logits_to_keep=1).logits[:, -1] for batch in self.batches])
        return logits.double().log_softmax(-1)[..., self.tokens].cpu()

    def curve(self, bank: Bank, name: str) -> Tensor:
        """Log-probabilities of the words at each strength of one concept, [S, F, X, W]."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = []
        for strength in STRENGTHS:
            if strength == 0:
                found.append(self.unsteered)
                continue
            with attach(self.model, bank, steer={name: strength}, steer_layers=bank.steer_layers, read=False):
                found.append(self._ask())
        return torch.stack(found)


# --- the study ----------------------------------------------------------------------------------------------------


def measured(concepts: Tensor, random: Tensor) -> dict[str, Any]:
    """The results from log-probabilities [W, S, F, X, W] of the words' directions and [R, S, F, X, W] of random ones."""
    small = [index for index, strength in enumerate(STRENGTHS) if abs(strength) <= SMALL]
    few = [STRENGTHS[index] for index in small]

    def among(curve: Tensor) -> Tensor:
        return slopes(STRENGTHS, log_odds_among(curve))

    def overall(curve: Tensor) -> Tensor:
        return slopes(few, log_odds(curve[small]))

    matrix = torch.stack([among(curve).mean((0, 1)) for curve in concepts])  # of direction i on word j
    null = torch.stack([among(curve).mean((0, 1)) for curve in random])
    null_overall = torch.stack([overall(curve).mean((0, 1)) for curve in random])
    words: dict[str, Any] = {}
    for w, word in enumerate(WORDS):
        odds = log_odds_among(concepts[w])[..., w]
        curve = (odds - odds[STRENGTHS.index(0)]).mean((1, 2))
        found = {
            **_against(among(concepts[w])[..., w], null[:, w]),
            "curve": curve.tolist(),
            "spearman": spearman(curve),
            "rank": int((matrix[:, w] > matrix[w, w]).sum()) + 1,
            "mass": concepts[w].exp().sum(-1).mean((1, 2)).tolist(),
            "overall": _against(overall(concepts[w])[..., w], null_overall[:, w]),
        }
        words[word] = found
    curves = log_odds_among(random).mean((2, 3))  # [R, S, W]
    rho = [abs(spearman(curve)) for curve in curves.permute(0, 2, 1).flatten(0, 1)]
    return {
        "passed": sum(found["passed"] for found in words.values()),
        "passed_overall": sum(found["overall"]["passed"] for found in words.values()),
        "own_direction_first": sum(found["rank"] == 1 for found in words.values()),
        "monotonic": sum(found["spearman"] > 0.999 for found in words.values()),
        "of": len(WORDS),
        "random_monotonic_share": sum(value > 0.999 for value in rho) / len(rho),
        "words": words,
        "slopes": {word: dict(zip(WORDS, row, strict=True)) for word, row in zip(WORDS, matrix.tolist(), strict=True)},
        "random_slopes": dict(zip(WORDS, null.T.tolist(), strict=True)),
    }


def _against(own: Tensor, null: Tensor) -> dict[str, Any]:
    """A word's slopes by prompt [F, X] against those of random directions [R]."""
    low, high = interval(own)
    largest = float(null.abs().max())
    slope = float(own.mean())
    return {
        "passed": slope > largest and low > 0,
        "slope": slope,
        "interval": [low, high],
        "random_largest": largest,
        "random_std": float(null.std()),
    }


def directions_digest(bank: Bank) -> str:
    """A hash of what is added: the 12 directions and the unit of strength at each steering layer."""
    found = hashlib.sha256()
    for index in bank.steer_layers:
        layer = bank[index].subset(WORDS)
        found.update(f"{index} {layer.residual_norm}".encode() + layer.directions.numpy().tobytes())
    return found.hexdigest()[:16]


def study(device: str | None) -> dict[str, Any]:
    bank, asker = load_bank(MODEL), Asker(device)
    null = random_bank(bank)
    concepts = torch.stack([asker.curve(bank, word) for word in WORDS])
    random = torch.stack([asker.curve(null, name) for name in null.names])
    settings = {
        "model": MODEL,
        "dtype": "float32",
        "layers": list(bank.steer_layers),
        "directions": directions_digest(bank),
        "strengths": list(STRENGTHS),
        "frames": [*FRAMES, " / ".join(CHAT) + " (chat)"],
        "subjects": list(SUBJECTS),
        "random_directions": RANDOM,
    }
    return {**measured(concepts, random), "settings": settings}


# --- the page -----------------------------------------------------------------------------------------------------


def table(results: dict[str, Any], machine: str) -> str:
    """The table of docs/steering.md."""
    settings = results["settings"]
    steered = [index for index, strength in enumerate(settings["strengths"]) if strength]
    heads = " | ".join(f"{settings['strengths'][index]:+g}" for index in steered)
    of, words = results["of"], results["words"]
    mass = [sum(word["mass"][index] for word in words.values()) / of for index in range(len(settings["strengths"]))]
    lines = [
        f"**{results['passed']} of {of}** words pass among the 12 words, **{results['passed_overall']} of {of}** among all tokens.",
        "",
        f"| feeling | {heads} | per 0.1 (95 %) | random | place | rank correlation | all tokens | random |",
        "|---" * (len(steered) + 7) + "|",
    ]
    for name, word in words.items():
        overall = word["overall"]
        cells = [
            name,
            *(f"{word['curve'][index]:+.1f}" for index in steered),
            f"{word['slope'] / 10:.1f} ({word['interval'][0] / 10:.1f} to {word['interval'][1] / 10:.1f})",
            f"{word['random_largest'] / 10:.1f}",
            str(word["rank"]),
            f"{word['spearman']:.2f}",
            f"{overall['slope'] / 10:.1f} ({overall['interval'][0] / 10:.1f} to {overall['interval'][1] / 10:.1f})",
            f"{overall['random_largest'] / 10:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    among = [name for name, found in words.items() if not found["passed"]]
    everywhere = [name for name, found in words.items() if not found["overall"]["passed"]]
    masses = [
        f"{share:.3f} {f'at {strength:+g}' if strength else 'unsteered'}"
        for strength, share in zip(settings["strengths"], mass, strict=True)
    ]
    lines += [
        "",
        f"- Not beyond the null: {', '.join(among) or 'none'} among the 12, {', '.join(everywhere) or 'none'} among all tokens.",
        f"- Own direction first of the 12: {results['own_direction_first']} words.",
        f"- Odds rise at every step: {results['monotonic']} words. Of random directions' curves {results['random_monotonic_share']:.0%} "
        "rise or fall at every step, so order alone shows little.",
        f"- Probability of the 12 words together, mean over the 12 directions: {', '.join(masses)}.",
        "",
        f"Layers {', '.join(map(str, settings['layers']))}, {settings['random_directions']} random directions, fp32. "
        f"Measured by `python bench/causal.py` on {machine}; more in bench/results/causal.json.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the page's table from the results there are")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.tables:
        provenance.write("causal", study(options.device))
    found = provenance.read("causal")
    new = table(found["results"], found["provenance"]["name"])
    print(new)
    pages.write(PAGE, {"causal": new})


if __name__ == "__main__":
    main()
