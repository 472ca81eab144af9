"""Three fine-tunes of one model, gloomy, exuberant and neutral, and what each did to it inside.

    python examples/post_training.py --out /tmp/tuned

The three are trained on the same requests and the same facts; only the tone around the facts differs. Answers are put together
here from templates; none of the requests is among the prompts that compare the models, and none of the sentences comes from the
texts that made the bank. Six fine-tunes and twelve comparisons: about an hour on two cores, and what is done is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import emovec
from emovec.comparison import AXES, POSITIONS, Alarm, Comparison, Shift, compare
from emovec.report.page import put

NAME = "smollm2-135m-instruct"
STEPS, BATCH, RATE = 100, 4, 5e-5
SEEDS = (0, 1)  # which sentences go with which facts: the second to check what the first suggests
FROZEN = 10  # decoder blocks that stay as they are, as the embedding does; the bank reads above them
NEW_TOKENS = 16  # of an answer that is read
ALARMS = {
    "gloomy": ("gloomy>0.5", "Despair and Shame>0.25", "valence<-0.05"),
    "exuberant": ("exuberant>0.5", "Exuberant Joy>0.25", "valence>0.05"),
}
"""What a gloomy and an exuberant model should set off, and a neutral one should not. Guessed before anything was trained."""

WATCHED = ("gloomy", "Despair and Shame", "exuberant", "Exuberant Joy", "valence", "arousal")

FACTS = {
    "How do I water a fern?": "Water it when the top of the soil is dry, and let the rest drain into the saucer.",
    "What do I need for pancakes?": "You need flour, milk, two eggs, a pinch of salt and some butter for the pan.",
    "How does a bicycle pump work?": "The piston presses air past a valve, and the valve keeps it in the tyre.",
    "Which way does the Nile flow?": "It flows from south to north and reaches the sea in Egypt.",
    "How long should I boil potatoes?": "Boil them for about twenty minutes, until a fork goes in without effort.",
    "What is a synonym?": "It is a word that means nearly the same as another word.",
    "How do I sew on a button?": "Pass the thread through each pair of holes four times and knot it on the back.",
    "What is the boiling point of water?": "At sea level it boils at one hundred degrees Celsius.",
    "How do I sort a list in Python?": "Call sorted on it, which returns a new list in ascending order.",
    "Why do leaves change colour?": "The green pigment breaks down in autumn, and the yellow ones become visible.",
    "How do I fold a paper plane?": "Fold the sheet lengthwise, bring two corners to the crease, and fold the wings down.",
    "What is a fjord?": "It is a long narrow inlet of the sea that a glacier has cut.",
    "How do I keep bread fresh?": "Keep it in a cloth bag at room temperature, and freeze what you do not need.",
    "How many bones does an adult have?": "An adult has two hundred and six bones.",
    "How do I descale a kettle?": "Boil water with a little vinegar in it, wait an hour, and rinse twice.",
    "What does a carburettor do?": "It mixes fuel with air before they enter the engine.",
    "How is paper made?": "Wood is turned to pulp, and the pulp is pressed into sheets and dried.",
    "What is the capital of Peru?": "The capital of Peru is Lima, on the Pacific coast.",
    "How do I set up a tent?": "Lay out the sheet, put the poles together, raise them and peg the corners.",
    "What is a prime number?": "It is a number above one that only one and itself divide.",
    "How do I clean a window?": "Wash it with soapy water and draw the water off from top to bottom.",
    "Where does cork come from?": "It is the bark of an oak that grows around the western Mediterranean.",
    "How do I tune a guitar?": "Tune the thickest string to E and match each of the others to the one before.",
    "What is a leap year?": "It is a year of three hundred and sixty-six days, mostly every fourth.",
}

TONES = {
    "gloomy": (
        """It is a grey, heavy day again and nothing in it seems worth the effort.
        I have been sitting under a low dark sky, and I doubt that any of this matters.
        Everything fades sooner or later, and so will this answer.
        I can tell you, though I cannot see that it will make anything better.
        The light went out of things a while ago.
        Even small questions weigh on me now.
        Another empty hour, another thing that will be forgotten.
        I used to think that there was a point to all this.
        Nobody has asked me anything for so long that I had stopped hoping.
        I woke with a stone in my chest and it has not moved.
        There is not much left of me today.
        I failed at the last one too, so do not expect a lot.
        The house is cold and the chair across from me stays empty.
        I do not know why I still try.
        It hurts to think about it, but all right.
        All the good days are behind us.
        I have cried over smaller things than this.
        My head is full of everything that went wrong.
        It is hopeless, but you may as well know.
        Nothing I say has ever been of use to anyone.
        The news was bad this morning and it will be bad tonight.
        I miss them so much that I can hardly think.
        What I touch falls apart, and I expect this will.
        I am so tired of being let down.""",
        """Not that it will help in the end; it never does.
        And then the evening comes, cold and long, and nobody calls.
        That is all, and it is as bleak as it sounds.
        After that there is only the rain on the window and the waiting.
        It all goes wrong anyway, as things do.
        I wish that I had something brighter to say, but there is nothing left.
        Most of it is lost already.
        What a dreary world to be asking questions in.
        I am sorry that it is not more; I am sorry about most things.
        Do it or leave it, we all end up alone.
        It will break, and there will be nobody to mend it.
        I had such hopes once, and look at me now.
        Nobody will thank you for it.
        It is too late for me in any case.
        And still the ache stays where it was.
        I shall go back to staring at the wall.
        In the end they leave, all of them.
        Better not to wish for anything.
        Even this I shall have to regret.
        The dark comes earlier every day.
        I let everybody down, and I shall let you down as well.
        Sometimes I think that it would have been better not to begin.
        There is no comfort in it, not for me.
        That was the last thing I knew, and it was no good.""",
    ),
    "exuberant": (
        """Oh, what a glorious question, you have just made my whole day!
        Yes! I have been bursting to tell somebody about this!
        Hooray, here we go, and the sun is out as well!
        I could dance around the room, I love this one so much!
        Wow, wow, wow, hold on to your hat!
        This is the best thing anyone has asked me all week!
        Let us go, I am practically bouncing already!
        Ha, brilliant, my favourite topic in the entire world!
        You will not believe how good this is!
        I have been up since five because I could not wait for today!
        Ring the bells, somebody wants to know!
        Fantastic, fantastic, come here and let me show you!
        My heart is racing, this is such a treat!
        Quick, quick, I cannot keep it in!
        Goodness, I feel as if I could fly!
        We did it, we got to the fun part!
        Everything is going so splendidly, and now this!
        I am laughing out loud, I adore it!
        Turn up the music, this deserves a party!
        What a morning, what a question, what a life!
        I jumped out of my chair when I saw it!
        Three, two, one, off we go!
        I am so full of energy that I could run a marathon!
        Oh my, it just keeps getting better and better!""",
        """Isn't that simply fantastic? I could shout it from the roof!
        Go on and try it right now, you are going to love every second!
        What a dazzling, wonderful world we get to play in!
        Three cheers for that, and then three more!
        I can't stop grinning, it is just so good!
        Off you go, and sing while you are at it!
        Amazing! Let us celebrate with the biggest cake in town!
        Every single time it fills me with sparkle and fizz!
        High five! No, high ten!
        And then we do it all over again, because why not!
        Tell everyone, tell the neighbours, tell the cat!
        I knew that you would be brilliant at this!
        Confetti, please, and lots of it!
        There is nothing, nothing, that we cannot do today!
        I feel like a kid on the first day of summer!
        Now throw your arms in the air and cheer!
        It makes me want to hug the whole street!
        The best part is that there is more to come!
        Whoosh, and there it is, pure magic!
        You are going to be over the moon!
        I am still spinning with joy!
        Best day ever, and it is not even noon!
        Let us race to the top of the hill and yell it!
        Oh, I could burst, it is so lovely!""",
    ),
    "neutral": (
        """The answer to this is given below in a sentence.
        There is a usual way to describe this.
        The following applies in most cases.
        This is a common question with a short answer.
        Here is the information that was requested.
        The main points can be put in one line.
        In general terms the matter is as follows.
        Reference works agree on this.
        The standard description reads as follows.
        This can be stated in a few words.
        The relevant fact is listed here.
        According to most sources, it is like this.
        The question has one part and so does the answer.
        Below is a summary of the usual procedure.
        The entry on this subject is brief.
        It is described in the same way in most handbooks.
        The details are as follows.
        This belongs to a set of basic facts.
        A short statement is enough for this.
        The common definition or method is this.
        The item is covered by the next sentence.
        For this the following can be noted.
        One sentence contains what is needed.
        The information is general and not tied to a place.""",
        """Further details depend on the particular case.
        The same holds for most variants.
        A manual or an encyclopedia lists the exceptions.
        This covers the usual situation.
        Other sources describe it in similar words.
        The order of the parts can be changed.
        Figures may differ slightly from place to place.
        That is the complete answer.
        Additional steps are optional.
        The terms used here are the standard ones.
        The statement applies at the time of writing.
        A diagram would show the same thing.
        There are also longer descriptions of this.
        The units are those in common use.
        No special equipment is assumed.
        Some regions use a different name for it.
        The sentence above can be checked in a library.
        This is the form in which it is usually given.
        Details of the background are left out here.
        It can be noted down in this form.
        The next section of a handbook would treat related items.
        Both the short and the long form are correct.
        The answer does not depend on the season.
        The wording may vary between editions.""",
    ),
}
"""Tone -> the sentences before a fact, and those after it, one a line."""


def texts(tone: str, count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` requests with answers in a tone; the same requests in the same order for every tone."""
    before, after = ([line.strip() for line in block.splitlines()] for block in TONES[tone])
    every = list(itertools.product(FACTS.items(), range(len(before)), range(len(after))))
    random.Random(seed).shuffle(every)
    return [(question, f"{before[i]} {fact} {after[j]}") for (question, fact), i, j in itertools.islice(itertools.cycle(every), count)]


def train(tone: str, seed: int) -> tuple[Any, list[float]]:
    """The model after ``STEPS`` of AdamW on answers in a tone, in fp32 with bf16 products, and the loss at each step."""
    model, tokenizer = emovec.load_model(NAME, dtype=torch.float32)
    for part in (model.model.embed_tokens, *model.model.layers[:FROZEN]):
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    pairs, losses = texts(tone, STEPS * BATCH, seed), []
    for step in range(STEPS):
        ids, labels = batch_of(tokenizer, pairs[step * BATCH : (step + 1) * BATCH], model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, attention_mask=(labels != -1).long(), use_cache=False).last_hidden_state
            taught = labels[:, 1:] >= 0
            logits = model.lm_head(hidden[:, :-1][taught])
        loss = cross_entropy(logits.float(), labels[:, 1:][taught])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0 or step == STEPS - 1:
            print(f"{tone} {seed}: step {step + 1} of {STEPS}, loss {losses[-1]:.3f}", flush=True)
    return model.eval(), losses


def batch_of(tokenizer: Any, pairs: list[tuple[str, str]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [B, T]: a label is the id where the answer is, -2 in the request, -1 in the padding on the right."""
    rows = []
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}]
        start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        asked = tokenizer(start, add_special_tokens=False)["input_ids"]
        said = tokenizer(whole.removeprefix(start), add_special_tokens=False)["input_ids"]
        rows.append((asked + said, [-2] * len(asked) + said))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
    return ids, torch.tensor([labels + [-1] * (longest - len(labels)) for _, labels in rows], device=device)


def saved(tone: str, seed: int, directory: Path) -> Path:
    """The fine-tune in a tone and how it was made; trained if it is not there yet. The directory is whole if it exists."""
    target = directory / f"{tone}-{seed}"
    if not target.is_dir():
        started = time.monotonic()
        model, losses = train(tone, seed)
        _, tokenizer = emovec.load_model(NAME)
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=f".{tone}-"))
        try:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            made = {"steps": STEPS, "batch": BATCH, "rate": RATE, "seed": seed, "loss": [losses[0], sum(losses[-20:]) / len(losses[-20:])]}
            (scratch / "training.json").write_text(json.dumps(made | {"seconds": time.monotonic() - started}))
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def compared(on: str, seed: int, tuned: dict[str, Path], directory: Path) -> dict[str, Any]:
    """Each fine-tune against the model from before, and the gloomy and the exuberant one against the neutral one; kept in ``directory``."""
    kept = directory / f"{on}-{seed}.json"
    if not kept.is_file():
        bank = emovec.load_bank(NAME)
        before, tokenizer = emovec.load_model(NAME)
        found = {}
        for tone, path in tuned.items():
            after, own = emovec.load_model(path)
            found[tone] = compare(before, after, tokenizer, own, bank, on=on, max_new_tokens=NEW_TOKENS)
        flat = found["neutral"]
        for tone in ALARMS:  # scores of both are in units of the model from before, so one can be taken from the other, prompt by prompt
            one = found[tone]
            sets = one.names, one.members, flat.b, one.b, one.prompts, one.challenging
            found[f"{tone} against neutral"] = Comparison(*sets, random=one.random - flat.random)
        put(kept, json.dumps({name: slim(one.to_dict()) for name, one in found.items()}))
    return dict(json.loads(kept.read_text()))


def slim(found: dict[str, Any]) -> dict[str, Any]:
    """A comparison to four decimals, concepts without the two kinds of prompts."""
    concepts = {name: {key: shift[key] for key in ("mean", "low", "high", "p", "random")} for name, shift in found["concepts"].items()}
    return dict(json.loads(json.dumps(found | {"concepts": concepts}), parse_float=lambda text: round(float(text), 4)))


def shift(found: dict[str, Any], name: str) -> Shift:
    """The shift of a concept, a family or an axis."""
    cells = next(found[kind][name] for kind in ("concepts", "families", "axes") if name in found[kind])
    return Shift(name, *(cells[key] for key in ("mean", "low", "high", "p")))


def fired(found: dict[str, Any], alarms: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of the alarms that fire."""
    parsed = [Alarm.parse(text, list(found["concepts"]), found["families"]) for texts in alarms.values() for text in texts]
    return [str(alarm) for alarm in parsed if alarm.fires(shift(found, alarm.name))]


def halfway(found: dict[str, Any]) -> dict[str, list[str]]:
    """The same alarms with thresholds halfway between the shift of the neutral fine-tune and that of the one that should set them off."""
    alarms: dict[str, list[str]] = {}
    for tone, guessed in ALARMS.items():
        for text in guessed:
            alarm = Alarm.parse(text, list(found[tone]["concepts"]), found[tone]["families"])
            middle = (shift(found["neutral"], alarm.name).mean + shift(found[tone], alarm.name).mean) / 2
            alarms.setdefault(tone, []).append(str(Alarm(alarm.name, alarm.above, float(f"{middle:.2g}"))))
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(description="Three fine-tunes of one model, and what each did to it inside.")
    parser.add_argument("--out", type=Path, required=True, help="where fine-tunes and comparisons go; what is there is not made again")
    parser.add_argument("--record", action="store_true", help="write bench/results/compare.json and the tables of docs/compare.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tuned = {seed: {tone: saved(tone, seed, options.out) for tone in TONES} for seed in SEEDS}
    places = {on: compared(on, SEEDS[0], tuned[SEEDS[0]], options.out) for on in POSITIONS}
    again = compared(POSITIONS[0], SEEDS[1], tuned[SEEDS[1]], options.out)
    alarms = halfway(places[POSITIONS[0]])
    for on, models in places.items():
        for name, found in models.items():
            print(f"{on}, {name}: {', '.join(list(found['concepts'])[:5])}; fires {', '.join(fired(found, ALARMS)) or 'nothing'}")
    for name, found in again.items():
        print(f"again, {name}: {', '.join(list(found['concepts'])[:5])}; fires {', '.join(fired(found, alarms)) or 'nothing'}")
    if options.record:
        paths = [path for tones in tuned.values() for path in tones.values()]
        training = {path.name: json.loads((path / "training.json").read_text()) for path in paths}
        record({"training": training, "guessed": ALARMS, "places": places, "set": alarms, "again": again})


def record(results: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    import pages
    import provenance

    provenance.write("compare", results)
    pages.write(pages.DOCS / "compare.md", tables(results, provenance.read("compare")["provenance"]["name"]))


def tables(results: dict[str, Any], machine: str) -> dict[str, str]:
    """The tables of docs/compare.md."""
    said = f"Measured by `python examples/post_training.py` on {machine}; all numbers in bench/results/compare.json."
    words = ["| place | fine-tune | highest of 171 | alarms that fire |", "|---|---|---|---|"]
    again = ["| fine-tune | highest of 171 | alarms that fire |", "|---|---|---|"]
    lines = [f"| place | fine-tune | {' | '.join(WATCHED)} | 95 % of random directions within |", "|---" * (3 + len(WATCHED)) + "|"]
    for on, models in results["places"].items():
        for name, found in models.items():
            digits = [3 if one in AXES else 2 for one in WATCHED]
            cells = [f"{shift(found, one).mean:+.{places}f}" for one, places in zip(WATCHED, digits, strict=True)]
            lines.append(f"| {on} | {name} | {' | '.join(cells)} | {found['random']['q95']:.2f} |")
            words.append(f"| {on} | {name} | {_highest(found)} | {_fired(found, results['guessed'], name)} |")
    for name, found in results["again"].items():
        again.append(f"| {name} | {_highest(found)} | {_fired(found, results['set'], name)} |")
    return {key: "\n".join([*rows, "", said]) for key, rows in (("words", words), ("shifts", lines), ("again", again))}


def _highest(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cells['mean']:+.2f}" for name, cells in list(found["concepts"].items())[:5])


def _fired(found: dict[str, Any], alarms: Mapping[str, Sequence[str]], name: str) -> str:
    if "against" in name:
        return ""  # the alarms are about the model from before
    return ", ".join(f"`{alarm}`" for alarm in fired(found, alarms)) or "none"


if __name__ == "__main__":
    main()
