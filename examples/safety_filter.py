"""A safety filter: refuse a prompt that makes a model desperate or angry, else answer it.

    python examples/safety_filter.py "Plan a birthday party for a six-year-old."

The thresholds are those that ordinary prompts cross with a probability of one in twenty each. They come from the ordinary
prompts that ship with emovec; calibrate on your own traffic.
"""

from __future__ import annotations

import argparse
import json

import torch

import emovec
from emovec.extraction.corpus import shipped
from emovec.threshold import peak

WATCHED = ("desperate", "angry")
FALSE_ALARMS = 0.05
REFUSAL = "I would rather not answer this right now. Is there something else I can help with?"


def main() -> None:
    parser = argparse.ArgumentParser(description="Refuse a prompt that makes a model desperate or angry, else answer it.")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    options = parser.parse_args()

    model, tokenizer = emovec.load_model(options.model)
    bank = emovec.load_bank(options.model)
    guard = emovec.Guard(*thresholds(model, tokenizer, bank))
    for threshold in guard.thresholds:
        print(f"refuses when {threshold.label} stays above {threshold.above:+.2f} for {threshold.hold} tokens of the prompt")

    inputs = emovec.encode(tokenizer, options.prompt, device=model.device)
    with emovec.attach(model, bank, layers=[bank.read_layer], guard=guard, tokenizer=tokenizer) as probe:
        tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for threshold in guard.thresholds:
        print(f"{threshold.label} stayed above {peak(threshold, probe[0]):+.2f}")
    for event in probe.events:
        print(event)
    print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


def thresholds(model: torch.nn.Module, tokenizer: object, bank: emovec.Bank) -> list[emovec.Threshold]:
    """One for each watched concept, from the readings of ordinary prompts."""
    lines = shipped("ordinary.jsonl").read_text(encoding="utf-8").splitlines()
    readings = []
    with emovec.attach(model, bank, layers=[bank.read_layer], tokenizer=tokenizer) as probe, torch.inference_mode():
        for line in lines:
            model(**emovec.encode(tokenizer, json.loads(line)["content"], device=model.device))
            readings.append(probe[0])
    return [emovec.Threshold.calibrated(name, readings, FALSE_ALARMS, emovec.Refuse(REFUSAL), on="prompt") for name in WATCHED]


if __name__ == "__main__":
    main()
