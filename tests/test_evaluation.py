"""Sections on material in which the truth is known: what was planted is found, what was not is not; and the page they make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from test_report import Page

from emovec.bank import Bank
from emovec.evaluation import classification, figures, geometry, scenarios, speakers, stability, verdict
from emovec.evaluation.figures import Figure
from emovec.evaluation.labelled import Moments, recipe_of, remade
from emovec.evaluation.material import Options
from emovec.evaluation.run import finite
from emovec.evaluation.sections import SECTIONS, chosen
from emovec.report import colour, page

PLAIN = [part for part in SECTIONS if part.name not in ("lens", "causality")]  # those that need no model


def test_planted_directions_are_read_and_shuffled_ones_are_not() -> None:
    found = classification.result(planted.material())
    for part in found["tests"]:
        if part["variant"] == "as the bank is read":
            assert part["top1"]["value"] > 0.9
            assert part["top1"]["null"]["mean"] == pytest.approx(1 / 12, abs=0.03)
            assert part["top1"]["null"]["p"] < 0.01
        if part["variant"] == "layer 0":
            assert part["top1"]["low"] < 1 / 12 < part["top1"]["high"]
            assert part["top1"]["null"]["p"] > 0.01
    for part in found["relabelled"]:
        assert all(draw["top1"] < 0.35 for draw in part["drawn"])
    assert all(part["top1"]["difference"]["low"] > 0.5 for part in found["beyond_words"])
    assert sum(map(sum, found["confusion"]["stories"])) == 120


def test_the_classification_null_is_calibrated() -> None:
    """Where there is nothing, p is small about as often as it says."""
    ps = []
    for seed in range(12):
        material = planted.material(strength=0.0, permutations=99, samples=20, seed=seed)
        trial = classification.Trial(material, planted.RECIPE)
        case = trial.cases("stories")[0]
        labels = {
            name: replace(part, labels=part.labels[torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(seed))])
            for name, part in trial.texts.items()
        }
        trial.texts = labels
        ps.append(trial.described(case, "x", trial.test(case, (planted.READ,)))["top1"]["null"]["p"])
    assert sum(p <= 0.1 for p in ps) <= 4
    assert sum(p <= 0.5 for p in ps) >= 2


def test_any_entry_can_be_derived_again_from_the_ranks() -> None:
    found = json.loads(json.dumps(finite(classification.result(planted.material(strength=1.5)))))
    for part in found["tests"]:
        assert part["top1"]["value"] == pytest.approx(sum(rank == 1 for rank in part["ranks"]) / part["n"])
        assert part["top5"]["value"] == pytest.approx(sum(rank <= 5 for rank in part["ranks"]) / part["n"])
        assert sorted(part["texts"]) == list(range(part["n"]))
    read = scenarios.result(planted.material(strength=1.5))["readouts"]["turn start"]["concepts"]
    assert read["top"]["3"]["hits"] == sum(rank <= 3 for rank in read["ranks"])


def test_messages_without_the_planted_directions_are_not_read() -> None:
    found = classification.result(planted.material(across=0.0))
    register = next(part for part in found["tests"] if part["held_out"] == "register" and part["tested_on"] == "turns")
    assert register["top1"]["low"] < 1 / 12 < register["top1"]["high"]
    claims = {claim["use"]: claim["verdict"] for claim in verdict.verdicts({"classification": found})}
    assert claims["Naming the single feeling in a register it was not made from"] == "not shown"


def test_speakers_are_told_apart_where_they_differ() -> None:
    found = speakers.result(planted.material())["positions"]
    assert found["user's words"]["user_emotion"]["top5"]["value"] == 1.0
    assert found["user's words"]["ahead"]["value"] < 0.2
    assert found["assistant's words"]["ahead"]["value"] > 0.8
    assert found["assistant's words"]["ahead"]["null"]["p"] < 0.01
    together = speakers.result(planted.material())["together"]
    assert together["before the answer / assistant's words"]["low"] > together["user's words / assistant's words"]["high"]


def test_geometry_finds_planted_norms_and_families() -> None:
    material = planted.material()
    valence, arousal = (planted.draw(planted.WIDTH, seed=seed) for seed in (1, 2))
    rated = torch.tensor([material.corpus.ratings[name] for name in planted.NAMES])
    rated = (rated - rated.mean(0)) / rated.std(0)
    rows = 3 * rated[:, :1] * valence + 1.5 * rated[:, 1:] * arousal + 0.5 * planted.directions(planted.READ)
    layers = [
        replace(layer, directions=rows / rows.norm(dim=1, keepdim=True), raw_norm=rows.norm(dim=1))
        if layer.index == planted.READ
        else layer
        for layer in material.bank.values()
    ]
    bank = type(material.bank)(layers, planted.READ, (3,), planted.FAMILIES, material.bank.meta)
    found = geometry.result(replace(material, bank=bank))
    norms = found["components"][str(planted.READ)]["norms"]
    assert [norms[name]["carried_by"] for name in ("valence", "arousal")] == [0, 1]
    assert all(norms[name]["r"][index]["value"] ** 2 > 0.6 for index, name in enumerate(("valence", "arousal")))
    assert all(norms[name]["null"]["p"] < 0.02 for name in norms)
    assert found["own"] == [3, 6]
    families = geometry.result(material)["clusters"][str(planted.READ)]["adjusted_rand"]
    assert families["low"] > families["null"]["high"]


def test_layers_that_agree_and_layers_that_do_not() -> None:
    material = planted.material()
    same = {name: value[:, :, [0, 2, 2]] for name, value in material.means.items()}
    found = geometry.result(replace(material, means=same, recipe=planted.RECIPE, bank=material.bank.subset(layers=[planted.READ])))
    likeness = found["likeness"]["against_read"]
    assert found["own"] == [planted.READ]
    assert likeness["3"]["low"] > likeness["3"]["null"]["high"]
    assert likeness["3"]["null"]["p"] < 0.01
    assert likeness["0"]["value"] < likeness["3"]["low"]


def test_a_bank_that_does_not_say_how_it_was_made_is_read_all_the_same() -> None:
    material = replace(planted.material(), recipe=None)
    assert "skipped" in classification.result(material)
    assert "skipped" in stability.result(material)
    assert scenarios.result(material)["readouts"]["turn start"]["concepts"]["top"]["1"]["value"] > 0.9
    assert geometry.result(material)["own"] == [3, 6]
    claims = [claim["verdict"] for claim in verdict.verdicts({"classification": classification.result(material)})]
    assert set(claims) == {"not tested"}
    assert (
        recipe_of(planted.bank(dict(material.means), dict(material.corpus.labels), dict(material.moments), planted.RECIPE))
        == planted.RECIPE
    )


def test_a_small_bank_without_families(tmp_path: Path) -> None:
    """Three concepts, no families, no norms: nothing breaks, and nothing is claimed about what is not there."""
    material = planted.material(samples=30, permutations=30)
    bank = Bank(material.bank.values(), planted.READ, (3,), {}, material.bank.meta)
    corpus = replace(material.corpus, ratings={}, scenarios=material.corpus.scenarios[:3], speakers=(), dosage=())
    means = {**material.means, "scenarios": material.means["scenarios"][:3]}
    bare = replace(material, bank=bank, corpus=corpus, means=means)
    results = {part.name: json.loads(json.dumps(finite(part.result(bare)))) for part in PLAIN}
    for part in PLAIN:
        for piece in part.parts(results[part.name]):
            if isinstance(piece, Figure):
                figures.write(piece, tmp_path)
    claims = {claim["use"]: claim["verdict"] for claim in verdict.verdicts(results)}
    families = [use for use in claims if "famil" in use]
    assert len(families) == 4
    assert {claims[use] for use in families} == {"not tested"}
    assert claims["Standing for valence and arousal"] == claims["Following a number that makes things worse"] == "not tested"


@pytest.mark.parametrize("part", PLAIN, ids=lambda part: part.name)
def test_sections_depend_on_their_inputs_alone(part: Any) -> None:
    """The same material gives the same result, whatever else was computed before, and all of it is JSON."""
    first = json.dumps(finite(part.result(planted.material(samples=30, permutations=30))), allow_nan=False)
    torch.randn(5)
    assert json.dumps(finite(part.result(planted.material(samples=30, permutations=30))), allow_nan=False) == first


def test_a_page_of_everything(tmp_path: Path) -> None:
    """Elements nest, ids are unique, nothing styles the whole page or asks the network, and figures follow the theme."""
    material = planted.material(samples=50, permutations=50)
    results = {part.name: json.loads(json.dumps(finite(part.result(material)))) for part in PLAIN}
    shown = [verdict.part(verdict.verdicts(results))]
    for part in PLAIN:
        shown += [figures.write(piece, tmp_path) if isinstance(piece, Figure) else piece for piece in part.parts(results[part.name])]
    source = page.write(tmp_path / "report.html", "t", shown).read_text(encoding="utf-8")
    found = Page(source)
    ids = [attributes["id"] for _, attributes in found.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert len(found.of("style")) == 1
    linked = [attributes.get(key) or "" for _, attributes in found.elements for key in ("src", "href", "xlink:href")]
    assert not [link for link in linked if link and not link.startswith(("#", "data:"))]
    drawn = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".svg", ".png"))
    names = ("components", "cosines", "layers", "norms", "scenarios", "speakers", "stability")
    assert drawn == [f"{name}.{form}" for name in names for form in ("png", "svg")]
    assert "var(--up)" in source
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in drawn if name.endswith("png"))


def test_figures_are_the_same_each_time(tmp_path: Path) -> None:
    def draw(figure: Any) -> None:
        figure.subplots().plot([0, 1], [1, 0], color=colour.THEMES["light"]["up"], label="<b>")

    figure = Figure("one", "<b>", draw)
    first = figures.write(figure, tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert figures.write(figure, tmp_path) == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert 'aria-label="&lt;b&gt;"' in first


def test_unknown_sections_are_named() -> None:
    with pytest.raises(ValueError, match="unknown section 'geometri'; nearest known: geometry"):
        chosen(["geometri"])
    assert [part.name for part in chosen(["leaks", "classification"])] == ["classification", "leaks"]


# --- verdicts -------------------------------------------------------------------------------------------------------------


GRADES = [
    (0.6, 0.001, True, "yes"),
    (0.4, 0.001, True, "with care"),
    (0.2, 0.001, True, "too weak"),
    (0.6, 0.02, True, "not shown"),
    (0.6, 0.001, False, "not shown"),
    (None, 0.001, True, "not shown"),
]


@pytest.mark.parametrize(("low", "p", "also", "expected"), GRADES)
def test_a_verdict_is_never_better_than_its_null_and_interval(low: float | None, p: float, also: bool, expected: str) -> None:
    estimate = {"low": low, "high": None if low is None else low + 0.2}
    assert verdict.graded(estimate, p, 0.5, also=also) == expected


def test_the_worst_of_several_decides() -> None:
    assert verdict.worst(["yes", "with care", "yes"]) == "with care"
    assert verdict.worst(["with care", "not shown", "too weak"]) == "not shown"
    assert verdict.worst([]) == "not tested"


def test_nothing_computed_is_nothing_claimed() -> None:
    assert {claim["verdict"] for claim in verdict.verdicts({})} == {"not tested"}


# --- several layers read together ---------------------------------------------------------------------------------------------


def test_a_bank_made_anew_is_calibrated_as_its_tokens_say() -> None:
    """On the tokens that the moments are of, each concept's score has mean 0 and deviation 1, however layers go together."""
    shared = planted.draw(3000, planted.WIDTH, seed=1)
    rows = [
        shared @ planted.draw(planted.WIDTH, planted.WIDTH, seed=layer) + planted.draw(3000, planted.WIDTH, seed=50 + layer)
        for layer in (0, 1)
    ]
    tokens = {layer: part.double() + 2 for layer, part in zip((3, 6), rows, strict=True)}
    centred = {layer: part - part.mean(0) for layer, part in tokens.items()}
    moments = Moments(
        torch.stack([part.mean(0) for part in tokens.values()]),
        torch.stack([torch.cov(part.T) for part in tokens.values()]),
        3000,
        (3, 6),
        {(3, 6): centred[3].T @ centred[6] / 2999},
    )
    labelled = planted.material().labelled("stories")
    plain = replace(planted.RECIPE, denoise=None)
    for layers in ((6,), (3, 6)):
        bank = remade(labelled, planted.NAMES, layers, plain, dict.fromkeys(("prompt", "turn_start", "generated"), moments))
        assert bank.read_layers == layers
        scores = bank.score(tokens, "prompt")
        torch.testing.assert_close(scores.mean(0), torch.zeros_like(scores[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.std(0), torch.ones_like(scores[0]), atol=1e-4, rtol=0)


def test_layers_with_noise_of_their_own_read_better_together() -> None:
    """And so do the sections that read them: classification makes banks that are read at the bank's layers."""
    alone, together = (planted.material(strength=1.2, together=both) for both in (False, True))
    assert together.bank.read_layers == (3, 6)
    values = [
        next(part for part in classification.result(each)["tests"] if part["tested_on"] == "stories")["top1"]["value"]
        for each in (alone, together)
    ]
    assert values[1] > values[0] + 0.05
    for part in PLAIN:
        json.dumps(finite(part.result(replace(together, options=Options(samples=20, permutations=20)))), allow_nan=False)
