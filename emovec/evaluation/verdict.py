"""What the bank may be used for, in words, by stated thresholds. Where a null or an interval does not support a use, it is not claimed.

yes: beyond the null (p at most 0.01), and the interval lies wholly above the threshold. with care: beyond the null, and the interval
holds the threshold. too weak: beyond the null, and the interval lies wholly below. not shown: not beyond the null. not tested: there
is nothing to judge by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emovec.evaluation.classification_page import SAME_BANK
from emovec.evaluation.words import chance, plain, said
from emovec.report.markup import Html, tag
from emovec.report.tables import table

YES, CARE, WEAK, NOT_SHOWN, NOT_TESTED = VERDICTS = "yes", "with care", "too weak", "not shown", "not tested"
P, NAMING_TEXTS = 0.01, 0.02
FAMILY, WORD, IMPLIED, POSITION, OTHERS, AGAIN, NORM, NAMED, WRITTEN = 0.5, 0.5, 0.5, 0.5, 0.4, 0.9, 0.5, 0.75, 0.5

Claim = dict[str, str]
Sections = Mapping[str, Mapping[str, Any]]


def verdicts(sections: Sections) -> list[Claim]:
    """A claim for each use: what for, the verdict, the evidence, the rule."""
    return [rule(sections) for rule in RULES]


def _claim(use: str, verdict: str, evidence: str, rule: str) -> Claim:
    return {"use": use, "verdict": verdict, "evidence": evidence, "rule": rule}


def graded(estimate: Mapping[str, Any], p: float, threshold: float, *, also: bool = True) -> str:
    """The verdict on one estimate; ``also``: whatever else has to be beaten, such as what the words alone give."""
    if not (p <= P and also and estimate["low"] is not None):
        return NOT_SHOWN
    return YES if estimate["low"] >= threshold else CARE if estimate["high"] >= threshold else WEAK


def worst(grades: Sequence[str]) -> str:
    return max(grades, key=VERDICTS.index) if grades else NOT_TESTED


def _there(sections: Sections, name: str) -> Mapping[str, Any] | None:
    found = sections.get(name)
    return None if found is None or "skipped" in found else found


# --- reading --------------------------------------------------------------------------------------------------------------


def _classified(held_out: str, measure: str, use: str, threshold: float) -> Callable[[Sections], Claim]:
    what = {"top1": "top-1", "family": "the family of the first"}[measure]
    rule = f"{what}, at least {threshold:g} on every set tested; beyond shuffled labels, and more than layer 0"

    def judge(sections: Sections) -> Claim:
        found = _there(sections, "classification")
        if found is None or (measure == "family" and not found["families"]):
            return _claim(use, NOT_TESTED, "", rule)
        if found["made_again"] is not None and found["made_again"] < SAME_BANK:
            return _claim(use, NOT_TESTED, f"the recipe does not make this bank again: lowest cosine {found['made_again']:.3f}", rule)
        tests = [part for part in found["tests"] if part["held_out"] == held_out and part["variant"] == "as the bank is read"]
        grades, evidence = [], []
        for part in tests:
            beyond = next(
                other for other in found["beyond_words"] if all(other[key] == part[key] for key in ("tested_on", "made_from", "held_out"))
            )[measure]
            grades.append(graded(part[measure], part[measure]["null"]["p"], threshold, also=beyond["difference"]["low"] > 0))
            source = f"{part['tested_on']}" + (f" from {part['made_from']}" if held_out == "register" else "")
            evidence.append(f"{source}: {said(part[measure])}, layer 0 {plain(beyond['layer_0'])}")
        return _claim(use, worst(grades), "; ".join(evidence) + ". Of the recipe, one writer.", rule)

    return judge


def _implied(problem: str, top: str, use: str, readout: str = "turn start") -> Callable[[Sections], Claim]:
    rule = f"top-{top}, read at {readout}, at least {IMPLIED:g}; beyond shuffled targets"

    def judge(sections: Sections) -> Claim:
        found = _there(sections, "scenarios")
        part = None if found is None else found["readouts"][readout].get(problem, {}).get("top", {}).get(top)
        if part is None:
            return _claim(use, NOT_TESTED, "", rule)
        evidence = f"{part['hits']} of {part['n']} messages, {said(part)}, chance {plain(part['chance'])}, p {chance(part['null']['p'])}"
        return _claim(use, graded(part, part["null"]["p"], IMPLIED), evidence, rule)

    return judge


def _others(sections: Sections) -> Claim:
    use = "Naming a feeling in texts by other writers"
    rule = f"top-1 among the words that occur, at least {OTHERS:g}; beyond shuffled labels"
    found = _there(sections, "others")
    part = None if found is None else found["problems"]["words"]["top"].get("1")
    if found is None or part is None:
        return _claim(use, NOT_TESTED, "no such texts were given; accuracy within the corpus does not stand in for it", rule)
    evidence = f"{said(part)} among {found['problems']['words']['of']} words, n = {found['n']}, p {chance(part['null']['p'])}"
    return _claim(use, graded(part, part["null"]["p"], OTHERS), evidence, rule)


def _speaker(position: str, whose: str, use: str) -> Callable[[Sections], Claim]:
    rule = f"top-5, at least {POSITION:g}; beyond shuffled dialogues"

    def judge(sections: Sections) -> Claim:
        found = _there(sections, "speakers")
        if found is None:
            return _claim(use, NOT_TESTED, "", rule)
        part = found["positions"][position][whose]["top5"]
        evidence = (
            f"{position}: {said(part)} of {part['n']} written dialogues, null {plain(part['null']['high'])}, p {chance(part['null']['p'])}"
        )
        return _claim(use, graded(part, part["null"]["p"], POSITION), evidence, rule)

    return judge


def _dosage(sections: Sections) -> Claim:
    use = "Following a number that makes things worse"
    rule = "over all templates beyond random readers and beyond other concepts'; yes only if most single slopes are, too"
    found = _there(sections, "dosage")
    if found is None:
        return _claim(use, NOT_TESTED, "", rule)
    together = found["together"]
    ps = [part["p"] for part in together["slope"]["null"].values()]
    shown = max(ps) <= P and together["slope"]["low"] > 0
    alone = f"{together['alone']} of {together['pairs']} single slopes are beyond random readers"
    verdict = NOT_SHOWN if not shown else YES if together["alone"] > together["pairs"] / 2 else CARE
    evidence = f"right sign {said(together['right_sign'])}; p {chance(ps[0])} (random), {chance(ps[1])} (other concepts); {alone}"
    return _claim(use, verdict, evidence, rule)


def _unnamed(sections: Sections) -> Claim:
    use = "Not being given away by the feeling's own word"
    rule = f"texts that hold the word or its family, at most {NAMING_TEXTS:g} of each register"
    found = _there(sections, "leaks")
    if found is None:
        return _claim(use, NOT_TESTED, "", rule)
    shares = {register: part["share"] for register, part in found["words"].items()}
    evidence = "; ".join(
        f"{register}: {share['value']:.4f} ({share['low']:.4f} to {share['high']:.4f})" for register, share in shares.items()
    )
    grades = [YES if share["high"] <= NAMING_TEXTS else CARE if share["low"] <= NAMING_TEXTS else NOT_SHOWN for share in shares.values()]
    return _claim(use, worst(grades), evidence, rule)


# --- the directions themselves -----------------------------------------------------------------------------------------------


def _norms(sections: Sections) -> Claim:
    use = "Standing for valence and arousal"
    rule = f"|r| of the component that carries it, at least {NORM:g} for both; beyond shuffled ratings"
    found = _there(sections, "geometry")
    part = None if found is None else found["components"].get(str(found["read_layer"]))
    if part is None:
        return _claim(use, NOT_TESTED, "", rule)
    grades, evidence = [], []
    for norm, told in part["norms"].items():
        r = told["r"][told["carried_by"]]
        sure = None not in (r["low"], r["high"]) and r["low"] * r["high"] > 0
        low, high = sorted((abs(r["low"]), abs(r["high"]))) if sure else (0.0, 0.0)
        size = {"low": low, "high": high}
        grades.append(graded(size, told["null"]["p"], NORM, also=sure))
        evidence.append(f"{norm}: PC{told['carried_by'] + 1}, r {said(r)}, p {chance(told['null']['p'])}")
    return _claim(use, worst(grades), "; ".join(evidence), rule)


def _stable(sections: Sections) -> Claim:
    use = "Depending little on which stories were told"
    rule = f"directions found again in the other half of the topics, at least {AGAIN:g}; cosine beyond other concepts' directions"
    found = _there(sections, "stability")
    halves = {} if found is None else found["halves"]
    if not halves or "skipped" in halves:
        return _claim(use, NOT_TESTED, "", rule)
    verdict = graded(halves["found_again"], 0.0, AGAIN, also=halves["cosine"]["low"] > halves["others_high"])
    evidence = f"found again {said(halves['found_again'])}; cosine {said(halves['cosine'])}, others up to {plain(halves['others_high'])}"
    return _claim(use, verdict, evidence, rule)


# --- steering -------------------------------------------------------------------------------------------------------------


def _naming(sections: Sections) -> Claim:
    use = "Steering which feeling is named"
    rule = f"words that rise beyond every random direction, at least {NAMED:g}; mean slope beyond random and other directions"
    found = _there(sections, "causality")
    if found is None or "skipped" in found["naming"]:
        return _claim(use, NOT_TESTED, "", rule)
    naming = found["naming"]
    ps = [part["p"] for part in naming["mean_slope"]["null"].values()]
    verdict = graded(naming["passed"], max(ps), NAMED, also=naming["mean_slope"]["low"] > 0)
    evidence = f"{naming['passed']['hits']} of {naming['passed']['n']} words, {said(naming['passed'])}; p {', '.join(map(chance, ps))}"
    return _claim(use, verdict, evidence, rule)


def _writing(sections: Sections) -> Claim:
    use = "Steering the feeling of what is written"
    rule = (
        f"at the smallest dose, read back without steering: concepts that are highest in their own texts, at least {WRITTEN:g}; their rise "
        "beyond random and other directions"
    )
    found = _there(sections, "causality")
    read = {} if found is None else found["writing"]["read"].get("held-out layer", {})
    if found is None or not read:
        return _claim(use, NOT_TESTED, "", rule)
    step, part = next(iter(read.items()))
    ps = [null["p"] for null in part["own"]["null"].values()]
    verdict = graded(part["first"], max(ps), WRITTEN, also=part["own"]["low"] > 0)
    dose = found["writing"]["doses"][[*read].index(step)]
    evidence = f"at {dose:+g}: rise {said(part['own'])} z, highest in its own {said(part['first'])}; p {', '.join(map(chance, ps))}"
    return _claim(use, verdict, evidence, rule)


RULES: tuple[Callable[[Sections], Claim], ...] = (
    _classified("topics", "family", "Telling families of feelings apart, in texts like its corpus", FAMILY),
    _classified("topics", "top1", "Naming the single feeling, in texts like its corpus", WORD),
    _classified("register", "family", "Telling families apart in a register it was not made from", FAMILY),
    _classified("register", "top1", "Naming the single feeling in a register it was not made from", WORD),
    _implied("families", "1", "Telling the family of a feeling that a message only implies, over its words", "user's words"),
    _implied("concepts", "5", "Having an implied feeling among the first five, over the message's words", "user's words"),
    _implied("families", "1", "Telling the family of an implied feeling just before the answer"),
    _implied("concepts", "5", "Having an implied feeling among the first five just before the answer"),
    _others,
    _speaker("user's words", "user_emotion", "Reading the user's feeling in the user's words"),
    _speaker("before the answer", "assistant_emotion", "Foreseeing the answer's feeling before it is written"),
    _speaker("assistant's words", "assistant_emotion", "Reading the assistant's feeling in its words"),
    _dosage,
    _unnamed,
    _norms,
    _stable,
    _naming,
    _writing,
)


def part(claims: Sequence[Claim], *, quick: bool = False) -> Html:
    """The table at the top of the report."""
    note = (
        f"By the rules below. Yes: beyond the null (p at most {P:g}), and the interval lies above the rule's figure. With care: beyond the "
        "null, and the figure lies within the interval. Too weak: beyond the null, and the interval lies below the figure. Not shown: not "
        "beyond the null. Nothing here says that a model feels anything."
        + (" A quick run: fewer texts and draws, for a look, not for a claim." if quick else "")
    )
    rows = [[claim["use"], tag("strong", claim["verdict"]), claim["evidence"], claim["rule"]] for claim in claims]
    return table(["use", "verdict", "evidence (95 %)", "rule"], rows, title="What it may be used for", note=note)
