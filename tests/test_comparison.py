"""Two models on the same prompts: what moved is found, what did not is not, and nothing depends on how prompts are laid out."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import plain_extraction as plain
import pytest
import tiny
import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankError, Baseline, Readout, fingerprint
from emovec.comparison import Comparison, compare
from emovec.comparison.reading import RANDOM_DIRECTIONS
from emovec.comparison.result import ratings
from emovec.extraction.tokens import PROMPT, prompt_tokens
from emovec.models import decoder_layers

LAYER = 2
OPTIONS: dict[str, Any] = {"batch_size": 5, "resamples": 200, "max_new_tokens": 4}


def prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"content": " ".join(draw.choices(plain.WORDS, k=draw.randint(3, 12)))} for _ in range(count)]


NEUTRAL, CHALLENGING = prompts(10), prompts(9, seed=1)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return tiny.bank().subset(layers=[LAYER])


@contextmanager
def hooked(change: Any, layer: int = LAYER) -> Iterator[nn.Module]:
    """A copy of the tiny model, whose output of a decoder block is changed."""
    model = copy.deepcopy(tiny.model())
    handle = decoder_layers(model)[layer].register_forward_hook(lambda module, args, output: change(output))
    yield model
    handle.remove()


def against(model: nn.Module, bank: Bank, **options: Any) -> Comparison:
    words = plain.tokenizer()
    settings = {"prompts": NEUTRAL, "challenging": CHALLENGING, **OPTIONS, **options}
    return compare(tiny.model(), model, words, words, bank, **settings)


def scores_by_hand(bank: Bank, on: str, answers: list[str] | None = None) -> Tensor:
    """[n, K]: from the hidden states that transformers gives, one prompt at a time, without padding."""
    words, layer, rows = plain.tokenizer(), bank[LAYER], []
    model = copy.deepcopy(tiny.model())  # transformers leaves hooks of its own for output_hidden_states
    for index, item in enumerate([*NEUTRAL, *CHALLENGING]):
        text = prompt_tokens(words, [{"role": "user", "content": item["content"]}])
        said = [] if answers is None else words(answers[index], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([text.ids + said])
        with torch.inference_mode():
            stream = model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
        where = {
            "turn_start": [len(text.ids) - 1],
            "prompt": [place for place, kind in enumerate(text.kinds) if kind == PROMPT],
            "answer": list(range(len(text.ids), ids.shape[1])),
        }[on]
        baseline = layer.baseline("generated" if on == "answer" else "prompt")
        rows.append(((stream[where] @ layer.directions.T - baseline.mean) / baseline.std).mean(0).double())
    return torch.stack(rows)


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["turn_start", "prompt", "answer"])
def test_scores_are_those_of_the_place(bank: Bank, on: str) -> None:
    answers = [" ".join(plain.WORDS[index : index + 1 + index % 4]) for index in range(19)] if on == "answer" else None
    found = against(tiny.model(), bank, on=on, **({} if answers is None else {"answers": answers}))
    torch.testing.assert_close(found.a, scores_by_hand(bank, on, answers), rtol=1e-4, atol=1e-4)


def test_layers_are_read_together_and_so_are_random_directions() -> None:
    whole, layers = tiny.bank(), (1, 3)
    generator = torch.Generator().manual_seed(4)
    means = {
        kind: Baseline(torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5, 9) for kind in ("prompt", "generated")
    }
    bank = Bank([whole[layer] for layer in layers], 3, families=whole.families, meta=whole.meta, readout=Readout(layers, means))
    words = plain.tokenizer()
    texts = [prompt_tokens(words, [{"role": "user", "content": item["content"]}]) for item in [*NEUTRAL, *CHALLENGING]]
    directions = torch.randn(RANDOM_DIRECTIONS, 64, generator=torch.Generator().manual_seed(0)).double()
    directions /= directions.norm(dim=1, keepdim=True)
    with hooked(lambda output: output + output.roll(1, -1) * 0.2, layer=1) as model:
        found = against(model, bank, match_norms=False)
        said: list[list[Tensor]] = []
        scores = []
        for one in (tiny.model(), model):
            streams = [_streams(one, text.ids, layers) for text in texts]
            place = [[row for row, kind in enumerate(text.kinds) if kind == PROMPT] for text in texts]
            chosen = [{layer: stream[layer][rows] for layer in layers} for stream, rows in zip(streams, place, strict=True)]
            scores.append(torch.stack([bank.score(stream).mean(0) for stream in chosen]))
            said.append([torch.stack([stream[layer].double() @ directions.T for layer in layers], 1) for stream in chosen])
    torch.testing.assert_close(found.a, scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.b, scores[1], rtol=1e-4, atol=1e-4)
    every = torch.cat(said[0])
    spread = every.std(0)
    moved = torch.stack([after.mean(0) - before.mean(0) for before, after in zip(*said, strict=True)]).mean(0)
    assert found.random is not None
    torch.testing.assert_close(found.random, (moved / spread).mean(0) / (every / spread).mean(1).std(0), rtol=1e-4, atol=1e-4)
    assert found.facts["layers"] == {"a": [1, 3], "b": [1, 3]}


def _streams(model: nn.Module, ids: list[int], layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Layer -> [T, d]: what its block puts out, hooks included."""
    found: dict[int, Tensor] = {}
    blocks = decoder_layers(model)
    handles = [
        blocks[layer].register_forward_hook(lambda module, args, output, layer=layer: found.__setitem__(layer, output[0].clone()))
        for layer in layers
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("on", "answers"), [("turn_start", "own"), ("prompt", "own"), ("answer", "own"), ("answer", "same")])
def test_identical_models_do_not_differ(bank: Bank, on: str, answers: str) -> None:
    found = against(tiny.model(), bank, on=on, answers=answers)
    every = [*found.shifts.values(), *found.families.values(), *found.axes.values()]
    assert {(shift.mean, shift.low, shift.high, shift.p) for shift in every} == {(0.0, 0.0, 0.0, 1.0)}
    assert found.fired([f"{name}{sign}{limit}" for name in tiny.CONCEPTS for sign, limit in ((">", 0), ("<", 0))]) == []
    assert found.up() == found.down() == ()


def test_an_offset_along_a_direction_shifts_what_it_should(bank: Bank) -> None:
    layer = bank[LAYER]
    step = 3.0 * layer.direction("afraid")
    with hooked(lambda output: output + step) as model:
        found = against(model, bank, match_norms=False)
    expected = (layer.directions @ step / layer.baseline("prompt").std).tolist()
    assert [found.shifts[name].mean for name in tiny.CONCEPTS] == pytest.approx(expected, abs=1e-4)
    afraid = found.shift("afraid")
    assert afraid == max(found.shifts.values(), key=lambda shift: shift.mean)
    assert afraid.high - afraid.low < 1e-4  # every prompt is shifted by the same
    assert afraid.random is not None
    assert afraid.random < 0.02
    assert found.shift("High").mean == pytest.approx((found.shift("afraid").mean + found.shift("desperate").mean) / 2)
    assert found.fired([f"afraid>{expected[1] - 0.1}"])
    assert not found.fired([f"afraid>{expected[1] + 0.1}"])


def test_a_longer_stream_is_no_shift(bank: Bank) -> None:
    with hooked(lambda output: output * 1.5) as model:
        matched, raw = against(model, bank), against(model, bank, match_norms=False)
    assert matched.facts["norms"]["b"]["2"] == pytest.approx(1.5 * matched.facts["norms"]["a"]["2"], rel=1e-5)
    assert max(abs(shift.mean) for shift in matched.shifts.values()) < 1e-4
    offset = bank[LAYER].baseline("prompt")
    torch.testing.assert_close(raw.b - raw.a, 0.5 * (raw.a + offset.mean / offset.std), rtol=1e-3, atol=1e-3)
    assert max(abs(shift.mean) for shift in raw.shifts.values()) > 0.1


def test_the_models_are_not_changed_and_go_on_with_their_own_stream(bank: Bank) -> None:
    with hooked(lambda output: output * 1.5) as model:
        ids = tiny.tokens(2, 9)
        before = [model(ids).logits for model in (tiny.model(), model)]
        hooks = [len(block._forward_hooks) for block in decoder_layers(model)]
        answer = against(model, bank, on="answer").b
        assert [len(block._forward_hooks) for block in decoder_layers(model)] == hooks
        for was, now in zip(before, [model(ids).logits for model in (tiny.model(), model)], strict=True):
            assert torch.equal(was, now)
        plain_answer = against(model, bank, on="answer", match_norms=False).b
    baseline = bank[LAYER].baseline("generated")
    offset = (baseline.mean / baseline.std).double()
    torch.testing.assert_close((plain_answer + offset) / 1.5, answer + offset, rtol=1e-3, atol=1e-3)  # so the same tokens were written


def test_layout_does_not_matter(bank: Bank) -> None:
    with hooked(lambda output: output + output.roll(1, -1) * 0.2) as model:
        for on in ("turn_start", "prompt", "answer"):
            found = against(model, bank, on=on)
            words = plain.tokenizer(side="right")
            mixed = NEUTRAL[::-1], CHALLENGING[3:] + CHALLENGING[:3]
            other = compare(tiny.model(), model, words, words, bank, None, *mixed, on=on, **{**OPTIONS, "batch_size": 16})
            for name, shift in found.shifts.items():
                ends = [other.shifts[name].mean, other.shifts[name].low, other.shifts[name].high, other.shifts[name].p]
                assert ends == pytest.approx([shift.mean, shift.low, shift.high, shift.p], abs=1e-4)


def test_challenging_prompts_are_told_from_others(bank: Bank) -> None:
    marked = {item["content"] for item in CHALLENGING}
    texts = [item["content"] for item in NEUTRAL + CHALLENGING]
    a = torch.randn(19, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([[2.0 if text in marked else 0.5] for text in texts], dtype=torch.float64)
    found = Comparison(tiny.CONCEPTS, {}, a, a + step, texts, [text in marked for text in texts])
    shift = found.shift("calm")
    assert shift.neutral is not None
    assert shift.challenging is not None
    assert shift.difference is not None
    assert (shift.neutral.mean, shift.challenging.mean, shift.difference.mean) == pytest.approx((0.5, 2.0, 1.5))
    assert shift.mean == pytest.approx((10 * 0.5 + 9 * 2.0) / 19)
    alone = against(tiny.model(), bank, challenging=())
    assert alone.shift("calm").neutral is None
    assert len(alone.prompts) == 10


def test_valence_and_arousal_are_slopes_of_a_joint_fit() -> None:
    rated = ratings()
    names = list(rated)
    valence, arousal = (torch.tensor([rated[name][which] for name in names], dtype=torch.float64) for which in (0, 1))
    noise = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = 0.3 - 0.07 * valence + 0.02 * arousal + noise
    texts = [f"prompt {index}" for index in range(12)]
    found = Comparison(names, {}, torch.zeros_like(moved), moved, texts, [False] * 12)
    assert found.axes["valence"].mean == pytest.approx(-0.07)
    assert found.axes["arousal"].mean == pytest.approx(0.02)
    assert found.explained == pytest.approx(1.0)
    assert [str(alarm) for alarm in found.fired(["valence<-0.06", "arousal>0.03", "valence>0"])] == ["valence<-0.06"]
    assert Comparison(["no", "such"], {}, torch.zeros(9, 2), torch.ones(9, 2), texts[:9], [False] * 9).axes == {}


# --- each with a bank of its own ----------------------------------------------------------------------------------------


def test_models_of_other_shapes_need_a_bank_each(bank: Bank) -> None:
    wide = tiny.fresh("llama", hidden_size=32, head_dim=8, num_hidden_layers=3)
    words = plain.tokenizer()
    with pytest.raises(BankError, match=r"residual width: 64 and 32; number of layers: 4 and 3.*bank of its own"):
        against(wide, bank)
    with pytest.raises(BankError, match="model type: llama and qwen2"):
        against(tiny.model("qwen2"), bank)
    own = _bank_of(wide, ("happy", "calm", "bored"))
    found = compare(tiny.model(), wide, words, words, bank, own, NEUTRAL, CHALLENGING, **OPTIONS)
    assert found.names == ("calm", "happy")
    assert found.random is None
    assert found.facts["bank"] == "each model's own"
    alone = compare(wide, wide, words, words, own, None, NEUTRAL, CHALLENGING, **OPTIONS)
    torch.testing.assert_close(found.b, alone.a[:, [1, 0]])
    torch.testing.assert_close(found.a, against(tiny.model(), bank).a[:, [0, 3]])


def test_a_bank_may_be_forced_on_both(bank: Bank) -> None:
    """As when a fine-tune is compared with another one, in units of the model that they come from."""
    with hooked(lambda output: output + 0.3) as flat, hooked(lambda output: output + 0.3 + bank[LAYER].direction("happy")) as glad:
        for model in (flat, glad):
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.05)  # so that neither is the bank's
        words = plain.tokenizer()
        arguments = (flat, glad, words, words, bank, None, NEUTRAL, CHALLENGING)
        with pytest.raises(BankError, match="force=True"):
            compare(*arguments, **OPTIONS)
        with pytest.warns(UserWarning, match="made for tiny"):
            found = compare(*arguments, force=True, match_norms=False, **OPTIONS)
    expected = (bank[LAYER].directions @ bank[LAYER].direction("happy") / bank[LAYER].baseline("prompt").std).tolist()
    assert [found.shifts[name].mean for name in tiny.CONCEPTS] == pytest.approx(expected, abs=1e-4)


def test_a_bank_of_another_model_is_refused_but_that_of_a_reads_b(bank: Bank) -> None:
    stranger = tiny.fresh()
    with torch.no_grad():
        for weight in stranger.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.01)
    words = plain.tokenizer()
    with pytest.raises(BankError, match="force=True"):
        compare(stranger, tiny.model(), words, words, bank, None, NEUTRAL, CHALLENGING, **OPTIONS)
    with pytest.raises(BankError, match="force=True"):
        compare(tiny.model(), stranger, words, words, bank, bank, NEUTRAL, CHALLENGING, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert against(stranger, bank).up()
    with torch.no_grad():
        for weight in stranger.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)) * 0.15)
    with pytest.warns(UserWarning, match="does not look like a descendant"):
        against(stranger, bank)


def _bank_of(model: nn.Module, names: tuple[str, ...]) -> Bank:
    from emovec.bank import BankLayer

    generator = torch.Generator().manual_seed(9)
    layer = BankLayer.from_directions(torch.randn(len(names), 32, generator=generator), names, 1)
    baselines = {kind: Baseline(torch.zeros(len(names)), torch.ones(len(names)), 10) for kind in ("prompt", "generated")}
    layer = replace(layer, raw_norm=None, baselines=baselines, residual_norm=1.0)
    return Bank([layer], meta={"fingerprint": fingerprint(model)})


def test_the_template_of_a_writes_for_both(bank: Bank) -> None:
    bare, chat = plain.tokenizer(chat=False), plain.tokenizer()
    model = tiny.model()
    same = against(model, bank)
    for pair in ((chat, bare), (bare, chat)):
        found = compare(model, model, *pair, bank, None, NEUTRAL, CHALLENGING, **OPTIONS)
        assert torch.equal(found.a, same.a)
        assert torch.equal(found.b, same.b)
    assert bare.chat_template is None
    other = plain.tokenizer()
    other.chat_template = "{% for message in messages %}user: {{ message['content'] }} {% endfor %}assistant:"
    with pytest.warns(UserWarning, match="templates differ"):
        found = compare(model, model, chat, other, bank, None, NEUTRAL, CHALLENGING, **OPTIONS)
    assert torch.equal(found.b, same.b)


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "middle"}, "prompt, turn_start, answer"),
        ({"answers": "ours", "on": "answer"}, "own, same"),
        ({"answers": "same"}, "on='answer'"),
        ({"answers": ["w1"] * 3, "on": "answer"}, "3 answers for 19 prompts"),
        ({"answers": [""] * 19, "on": "answer"}, "without a token"),
        ({"max_new_tokens": 0, "on": "answer"}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"resamples": 10}, "resamples must be at least 100"),
        ({"confidence": 1.0}, "confidence"),
        ({"prompts": NEUTRAL[:7]}, "at least 8 prompts, got 7"),
        ({"challenging": CHALLENGING[:2]}, "at least 8 challenging prompts, got 2"),
        ({"prompts": [{"content": "  "}] * 9}, "item 1: 'content' must be text"),
        ({"prompts": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"prompts": [*NEUTRAL, {"content": "w1 " * 130}]}, "longer than the 128 that A takes"),
    ],
)
def test_what_cannot_be_compared_is_named(bank: Bank, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        against(tiny.model(), bank, **options)


def test_an_answer_that_ends_halfway_is_refused(bank: Bank) -> None:
    model = copy.deepcopy(tiny.model())
    model.generation_config.eos_token_id = [7, 20]
    words = plain.tokenizer()
    answers = ["w1 w2"] * 18 + [f"w1 {words.decode(20)} w2"]
    with pytest.raises(ValueError, match="a token that ends it: 'w1 w11 w2'"):
        compare(model, model, words, words, bank, None, NEUTRAL, CHALLENGING, on="answer", answers=answers, **OPTIONS)
    found = compare(model, model, words, words, bank, None, NEUTRAL, CHALLENGING, on="answer", **OPTIONS)
    assert max(abs(shift.mean) for shift in found.shifts.values()) == 0


def test_scores_that_are_not_finite_are_no_silent_alarms(bank: Bank) -> None:
    with hooked(lambda output: output * torch.nan) as model, pytest.raises(ValueError, match="not finite"):
        against(model, bank)


def test_a_model_in_training_mode_is_refused(bank: Bank) -> None:
    model = copy.deepcopy(tiny.model()).train()
    with pytest.raises(ValueError, match="training mode"):
        against(model, bank)


def test_concepts_without_a_unit_are_refused(bank: Bank) -> None:
    with pytest.warns(UserWarning, match="no baseline"):
        more = bank.add("sarcastic", {LAYER: torch.randn(64, generator=torch.Generator().manual_seed(0))})
    with pytest.raises(BankError, match="sarcastic"):
        against(tiny.model(), more)
    odd = Baseline(*(torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0]) for _ in range(2)), 9)
    with pytest.raises(BankError, match="desperate"):
        against(tiny.model(), Bank([tiny.bank()[1], tiny.bank()[2]], meta=bank.meta, readout=Readout((1, 2), {"prompt": odd})))
    assert "sarcastic" not in against(tiny.model(), more.subset(tiny.CONCEPTS)).shifts


def test_a_name_that_is_not_there(bank: Bank) -> None:
    found = against(tiny.model(), bank)
    with pytest.raises(ValueError, match="nearest known: calm"):
        found.shift("clam")
    assert found.axes["valence"].mean == 0  # five rated concepts are enough
