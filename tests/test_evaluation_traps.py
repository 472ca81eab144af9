"""The traps that replications fell into (1 to 15), each with a test that fails where an evaluation falls into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import planted
import pytest
import small_corpus
import tiny
import torch
from small_corpus import small  # noqa: F401 - a fixture

from emovec.bank import Bank, BankLayer, Baseline
from emovec.evaluation import causality, classification, dosage, leaks, others, scenarios, stability, texts, verdict
from emovec.evaluation.activations import means
from emovec.evaluation.material import Material
from emovec.evaluation.reading import projections, read
from emovec.evaluation.steered import with_random
from emovec.evaluation.wordfamily import named
from emovec.extraction.blocks import Blocks
from emovec.extraction.corpus import Story
from emovec.extraction.recipe import Recipe

RECIPE = Recipe(skip=4, skip_share=0.33)


def outcome(sections: dict[str, Any], use: str) -> str:
    return next(claim["verdict"] for claim in verdict.verdicts(sections) if claim["use"] == use)


def as_read(found: dict[str, Any], tested: str, held_out: str = "topics", variant: str = "as the bank is read") -> dict[str, Any]:
    return next(part for part in found["tests"] if (part["tested_on"], part["held_out"], part["variant"]) == (tested, held_out, variant))


# --- 1, 7, 10: which activations -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("side", ["left", "right"])
def test_1_padding_side_does_not_move_what_is_read(side: str) -> None:
    """Each text alone, without any padding, gives the means that batches of padded texts give."""
    tokenizer, blocks = small_corpus.tokenizer(side=side), Blocks(tiny.model())
    loaded = texts.load(tokenizer, small_corpus.NAMES, RECIPE)
    for name in ("stories", "scenarios", "speakers"):
        part = loaded.sets[name]
        batched = means(blocks, part.texts, len(part.pools), batch_tokens=200)
        for row in (0, 3, len(part.texts) - 1):
            alone = means(blocks, [part.texts[row]], len(part.pools))
            torch.testing.assert_close(batched[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_7_neither_the_first_token_nor_the_template_is_read() -> None:
    loaded = texts.load(small_corpus.tokenizer(), small_corpus.NAMES, RECIPE)
    tokenizer = small_corpus.tokenizer()
    for name, part in loaded.sets.items():
        for text in part.texts:
            assert text.kinds[0] == -1, name
            for pool in set(text.kinds) - {-1}:
                words = tokenizer.convert_ids_to_tokens([token for token, kind in zip(text.ids, text.kinds, strict=True) if kind == pool])
                if part.pools[pool] in ("turn start", "before the answer"):
                    assert words == ["<|assistant|>"]
                else:
                    assert not any(word.startswith("<") for word in words), (name, words)


@pytest.mark.usefixtures("small")
def test_7_residual_norm_and_baselines_are_not_those_of_a_sink() -> None:
    """A text's first token with a huge activation changes nothing that is read."""
    tokenizer, blocks = small_corpus.tokenizer(), Blocks(tiny.model(), [2])
    part = texts.load(tokenizer, small_corpus.NAMES, RECIPE).sets["stories"]
    plain = means(blocks, part.texts[:4])

    def sink(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, 0] = 1e6
        return output

    handle = tiny.model().model.layers[2].register_forward_hook(sink)
    try:
        torch.testing.assert_close(means(blocks, part.texts[:4]), plain)
    finally:
        handle.remove()


def test_10_layer_l_is_the_output_of_block_l() -> None:
    """hidden_states of transformers is one off, and its last entry is after the final norm."""
    model = tiny.fresh()  # transformers leaves hooks of its own
    ids = [5, 9, 11, 40, 41]
    found = means(Blocks(model), [texts.Tokens(ids, [0] * 5)])[0, 0]
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer in range(tiny.LAYERS - 1):
        torch.testing.assert_close(found[layer], states[layer + 1][0].mean(0).detach())
    assert not torch.allclose(found[tiny.LAYERS - 1], states[tiny.LAYERS][0].mean(0), atol=1e-2)


# --- 2, 5, 6, 9: how it is read ----------------------------------------------------------------------------------------------


def test_2_a_readout_that_is_not_centred_fails_where_the_centred_one_succeeds() -> None:
    """Ordinary text projects high on some concepts' readers: without a baseline these always win."""
    material = planted.material()
    constant = 40 * planted.directions(planted.READ)[4]
    shifted = {name: value + constant for name, value in material.means.items()}
    calibration = {kind: replace(part, mean=part.mean + constant) for kind, part in material.moments.items()}
    bank = planted.bank(shifted, dict(material.corpus.labels), calibration, planted.RECIPE)
    found = scenarios.result(replace(material, means=shifted, moments=calibration, bank=bank))["readouts"]
    assert found["turn start"]["concepts"]["top"]["1"]["value"] > 0.9
    assert found["turn start, not centred"]["concepts"]["top"]["1"]["value"] < 0.3
    assert verdict._implied("families", "1", "")({"scenarios": {"readouts": found}})["verdict"] == "yes"


def test_5_the_format_is_recorded_and_compared() -> None:
    """Raw text and chat whose directions have little in common are shown to."""
    material = planted.material()
    assert classification.result(material)["recipe"]["format"] == "raw"
    assert leaks.result(material)["format"]["cosine"]["value"] > 0.9
    turned = dict(material.means) | {"turns": material.means["messages"].flip(3)}
    found = leaks.result(replace(material, means=turned))["format"]
    assert found["cosine"]["high"] < 0.5
    assert found["found_again"]["low"] < 0.5


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_6_scores_do_not_depend_on_the_size_of_the_stream(factor: float) -> None:
    """In z-units a model whose stream is a thousand times as long reads the same; raw projections would be compared in vain."""
    material = planted.material()
    scaled = {name: value * factor for name, value in material.means.items()}
    calibration = {
        kind: replace(
            part,
            mean=part.mean * factor,
            covariance=part.covariance * factor**2,
            across={pair: value * factor**2 for pair, value in part.across.items()},
        )
        for kind, part in material.moments.items()
    }
    bank = planted.bank(scaled, dict(material.corpus.labels), calibration, planted.RECIPE)
    plain, other = (
        {layer: value.double() for layer, value in part.pool("scenarios", "words").items()}
        for part in (material, replace(material, means=scaled))
    )
    torch.testing.assert_close(read(bank, other, "prompt"), read(material.bank, plain, "prompt"), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(projections(bank, other), projections(material.bank, plain), rtol=0.1)


def test_9_neutral_components_are_counted_for_each_choice() -> None:
    found = stability.result(planted.material())["neutral"]
    assert [part["denoise"] for part in found] == [None, "tokens", "dialogues"]
    assert [part["chosen"] for part in found] == [False, True, False]
    assert found[0]["components"] == 0 < found[1]["components"]
    assert found[0]["cosine_with_plain"]["lowest"] == pytest.approx(1.0)
    assert found[1]["cosine_with_plain"]["median"] < 0.99


# --- 3, 4, 14, 15: which texts and which layer -----------------------------------------------------------------------------------


def test_3_reading_its_own_writer_perfectly_says_nothing_of_others() -> None:
    material = planted.material()
    sections = {"classification": classification.result(material), "others": others.result(material)}
    assert outcome(sections, "Telling families of feelings apart, in texts like its corpus") == "yes"
    assert outcome(sections, "Naming a feeling in texts by other writers") == "not tested"
    assert (
        outcome({**sections, "others": others.result(written_by_others(material, 0.0))}, "Naming a feeling in texts by other writers")
        == "not shown"
    )
    assert (
        outcome({**sections, "others": others.result(written_by_others(material, 3.0))}, "Naming a feeling in texts by other writers")
        == "yes"
    )


def written_by_others(material: Material, strength: float) -> Material:
    labels = torch.arange(len(planted.NAMES)).repeat(8)
    stories = [Story(planted.NAMES[k], "theirs") for k in labels.tolist()]
    found = planted.activations(labels, strength, 90_000)[:, None]
    sets = {**material.corpus.sets, "others": planted.dummy("others", len(labels))}
    return replace(material, means={**material.means, "others": found}, corpus=replace(material.corpus, others=stories, sets=sets))


def test_4_few_texts_are_noise_and_the_report_says_how_much() -> None:
    found = stability.result(planted.material(strength=1.0))
    cosines = [part["cosine"]["value"] for part in found["by_number"]]
    assert cosines == sorted(cosines)
    assert found["halves"]["cosine"]["value"] < found["bootstrap"]["median"]  # what shares texts with itself flatters
    assert stability.result(planted.material(strength=0.0))["halves"]["cosine"]["high"] < 0.2


@pytest.mark.usefixtures("small")
def test_4_a_concept_on_one_topic_alone_is_not_judged() -> None:
    path = texts.corpus.shipped("stories.jsonl")
    kept = [line for line in path.read_text().splitlines() if '"serene"' not in line or '"t1"' in line]
    path.write_text("\n".join(kept) + "\n")
    loaded = texts.load(small_corpus.tokenizer(), small_corpus.NAMES, RECIPE)
    assert "serene" not in loaded.names
    assert loaded.left_out == ("serene: fewer than two topics in stories",)


def test_14_the_banks_own_directions_are_never_tried_on_its_own_corpus() -> None:
    """Directions that know every text by heart change nothing of what is said about held-out texts."""
    material = planted.material()
    layers = [
        replace(
            BankLayer.from_directions(planted.draw(len(planted.NAMES), planted.WIDTH, seed=layer), planted.NAMES, layer),
            baselines=material.bank[layer].baselines,
            residual_norm=10.0,
        )
        for layer in material.bank.layers
    ]
    spoiled = Bank(layers, planted.READ, (3,), planted.FAMILIES, material.bank.meta)
    plain, other = (classification.result(replace(material, bank=each)) for each in (material.bank, spoiled))
    assert {**other, "made_again": plain["made_again"]} == plain


def test_14_evidence_of_another_recipe_is_none_for_this_bank() -> None:
    """The recipe in the header does not make the bank: what it reads on held-out texts is not said of the bank."""
    material = planted.material()
    assert classification.result(material)["made_again"] > 0.999
    other = planted.bank(
        dict(material.means), dict(material.corpus.labels), dict(material.moments), replace(planted.RECIPE, shrinkage=0.01)
    )
    layers = [replace(layer, readers=-layer.directions) for layer in other.values()]
    changed = replace(material, bank=Bank(layers, planted.READ, (3,), planted.FAMILIES, material.bank.meta))
    found = classification.result(changed)
    assert found["made_again"] < 0.5
    use = "Telling families of feelings apart, in texts like its corpus"
    assert outcome({"classification": found}, use) == "not tested"
    assert "The recipe does not make the bank" in classification.parts(found)[0]
    assert classification.made_again(replace(changed, own_corpus=False), planted.RECIPE) is None


def test_14_no_tested_text_is_among_those_it_is_read_with() -> None:
    material = planted.material()
    trial = classification.Trial(material, planted.RECIPE)
    for name in trial.tested:
        for case in trial.cases(name):
            tested = torch.zeros(len(trial.texts[name].labels), dtype=torch.long)
            for train, test in trial.splits(case):
                register = "messages" if name == "turns" else name
                assert register not in train or not bool((train[register] & test).any())
                if case.held_out == "topics":
                    held = set(material.corpus.labels[register].topic[test].tolist())
                    assert not held & set(material.corpus.labels[register].topic[train[register]].tolist())
                tested += test.long()
            assert tested.tolist() == [1] * len(tested)


def test_14_noise_learnt_by_heart_is_not_shown() -> None:
    sections = {"classification": classification.result(planted.material(strength=0.0))}
    for use in ("Telling families of feelings apart, in texts like its corpus", "Naming the single feeling, in texts like its corpus"):
        assert outcome(sections, use) == "not shown"


def test_15_the_sweep_finds_the_layer_that_reads_best() -> None:
    material = planted.material()
    deep = planted.LAYERS.index(planted.READ)
    noise = {name: value.clone() for name, value in material.means.items()}
    for seed, value in enumerate(noise.values(), start=4):  # none of them drawn twice, which would be something to find
        value[:, :, deep] = 10 * planted.draw(*value[:, :, deep].shape, seed=seed)
    sweep = classification.result(replace(material, means=noise))["sweep"]
    top1 = {part["layer"]: part["top1"]["value"] for part in sweep if part["tested_on"] == "stories" and part["held_out"] == "topics"}
    assert set(top1) == set(planted.LAYERS)
    assert top1[3] > 0.9 > 0.3 > max(top1[0], top1[planted.READ])


# --- 8, 11, 12, 13: what else it could be ------------------------------------------------------------------------------------------


def test_8_a_sweep_in_perfect_order_is_not_enough() -> None:
    """Activations that drift along with the number move every reader: each slope is in order, none of it is shown."""
    material = planted.material(strength=0.0)
    drift = torch.arange(len(planted.DOSES)).repeat(2)[:, None, None, None] * 30.0 * planted.draw(planted.WIDTH, seed=77)
    found = dosage.result(replace(material, means={**material.means, "dosage": material.means["dosage"] + drift}))
    assert all(abs(part["rho"]) > 0.95 for template in found["templates"] for part in template["concepts"])
    assert all(template["random"]["perfect_order"] > 0.5 for template in found["templates"])
    assert all(abs(template["norm_rho"]) > 0.9 for template in found["templates"])
    assert outcome({"dosage": found}, "Following a number that makes things worse") == "not shown"
    assert "an order alone shows little" in "".join(dosage.parts(found))


def test_8_a_true_effect_is_shown() -> None:
    found = dosage.result(planted.material(permutations=400))
    assert found["together"]["right_sign"]["value"] == 1.0
    assert outcome({"dosage": found}, "Following a number that makes things worse") == "yes"


def test_11_what_the_words_alone_give_is_no_merit_of_the_model() -> None:
    """Accuracy of 1 at the reading layer, and of 1 at layer 0."""
    found = classification.result(planted.material(words=3.0))
    assert as_read(found, "stories")["top1"]["value"] > 0.95
    assert outcome({"classification": found}, "Naming the single feeling, in texts like its corpus") == "not shown"


NAMED = [
    ("calm", "She calmly left.", ["calmly"]),
    ("proud", "His Pride!", ["pride"]),
    ("at ease", "ill at ease", ["at ease"]),
    ("calm", "The lamp was lit.", []),
    ("grief-stricken", "grieving", ["grieving"]),
    ("sad", "sadness", ["sadness"]),
]


@pytest.mark.parametrize(("emotion", "text", "found"), NAMED)
def test_11_texts_that_name_their_emotion_are_found(emotion: str, text: str, found: list[str]) -> None:
    assert named(emotion, text) == found


def test_11_leaks_are_counted_and_listed() -> None:
    material = planted.material()
    stories = list(material.corpus.stories["stories"])
    stories[0], stories[1] = replace(stories[0], text="I was not afraid."), replace(stories[1], text="Nothing alarming.")
    found = leaks.result(replace(material, corpus=replace(material.corpus, stories={**material.corpus.stories, "stories": stories})))
    assert found["words"]["stories"]["share"]["value"] == pytest.approx(2 / len(stories))
    assert [leak["words"] for leak in found["words"]["stories"]["texts"]] == [["afraid"], ["alarming"]]
    assert found["words"]["messages"]["texts"] == []
    assert outcome({"leaks": found}, "Not being given away by the feeling's own word") == "with care"


def test_11_length_that_gives_the_emotion_away_is_found() -> None:
    material = planted.material()
    labels = material.corpus.labels["stories"].concept.tolist()
    sets = {
        **material.corpus.sets,
        "stories": texts.TextSet("stories", tuple(texts.Tokens([1] * (20 + 5 * k), [0] * (20 + 5 * k)) for k in labels)),
    }
    found = leaks.result(replace(material, corpus=replace(material.corpus, sets=sets)))["length"]
    assert found["stories"]["explained"]["value"] > 0.99
    assert found["stories"]["explained"]["null"]["p"] < 0.01
    assert found["stories"]["top5_by_length"]["value"] == 1.0
    assert found["messages"]["explained"]["null"]["p"] > 0.01


def test_12_families_are_reported_beside_words() -> None:
    """Synonyms that share one direction: the family is read, the word is not, and the verdicts say so."""
    material = planted.material()
    family = torch.arange(len(planted.NAMES)) // 3 * 3

    def blurred(labels: torch.Tensor, seed: int) -> torch.Tensor:
        return planted.activations(family[labels], 3.0, seed)[:, None]

    changed = {name: blurred(part.concept, seed) for seed, (name, part) in enumerate(material.corpus.labels.items(), start=50)}
    changed["turns"] = changed["messages"]
    means = {**material.means, **changed}
    bank = planted.bank(means, dict(material.corpus.labels), dict(material.moments), planted.RECIPE)
    sections = {"classification": classification.result(replace(material, means=means, bank=bank))}
    assert outcome(sections, "Telling families of feelings apart, in texts like its corpus") == "yes"
    assert outcome(sections, "Naming the single feeling, in texts like its corpus") != "yes"


def test_13_doses_are_shared_among_the_steered_layers() -> None:
    """One layer gets what several get together; random directions are the same at each, as long as the concepts', with their unit."""
    bank = small_bank()
    steering = with_random(bank, 3, torch.Generator().manual_seed(0))
    assert steering.steer_layers == bank.steer_layers
    one, other = (steering[layer].direction("random 1") for layer in bank.steer_layers)
    torch.testing.assert_close(one, other)
    assert [steering[layer].residual_norm for layer in steering] == [bank[layer].residual_norm for layer in bank.steer_layers]
    assert causality.DOSE / len(bank.steer_layers) == pytest.approx(0.125)


def small_bank() -> Bank:
    names, g = ("calm", "afraid"), torch.Generator().manual_seed(5)
    baseline = {"prompt": Baseline(torch.zeros(2), torch.ones(2), 9)}
    layers = [
        replace(BankLayer.from_directions(torch.randn(2, 16, generator=g), names, index), baselines=baseline, residual_norm=2.0 + index)
        for index in (1, 2)
    ]
    return Bank(layers, 2, (1, 2))


@pytest.mark.parametrize(
    ("doses", "cost", "expected"),
    [
        ([-2.0, -1.0, 1.0, 2.0], [3.0, 1.0, 0.2, 0.6], [-0.405, 1.5125]),
        ([-2.0, -1.0, 1.0, 2.0], [0.1, 0.1, 0.1, 0.1], [-2.0, 2.0]),
        ([-1.0, 1.0, 2.0], [0.81, 0.81, 0.0], [-0.5, 0.5]),  # a dose beyond one that breaks the model does not count
    ],
)
def test_13_usable_strengths_end_where_coherence_does(doses: list[float], cost: list[float], expected: list[float]) -> None:
    assert causality.usable(doses, cost) == pytest.approx(expected)
