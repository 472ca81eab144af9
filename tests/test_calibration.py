"""Calibration: bounds that ordinary conversations cross as often as was asked for, and a bank for another model."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from banks import run_examples
from test_cli import emovec, run
from test_readout import a_bank

from emovec.bank import Bank, BankError, UnknownConcept, fingerprint, load_bank
from emovec.calibration import Alarms, alarms_in, bounds, recalibrated, threshold_of, usable_in, with_guard, with_usable
from emovec.guard import Guard, Threshold, calibrate_threshold
from emovec.hook import attach
from emovec.monitor import Reading

torch.set_num_threads(1)

NAMES = ("calm", "afraid", "angry")


def ordinary(count: int, tokens: int = 40, seed: int = 0, names: tuple[str, ...] = NAMES) -> list[Reading]:
    """Conversations whose scores wander, each concept with a spread of its own."""
    g = torch.Generator().manual_seed(seed)
    readings = []
    for _ in range(count):
        steps = torch.randn(tokens, len(names), generator=g) * torch.arange(1, len(names) + 1)
        kinds = ["prompt"] * (tokens // 2) + ["generated"] * (tokens - tokens // 2)
        readings.append(Reading({2: steps}, names, kinds))
    return readings


def events_in(reading: Reading, threshold: Threshold) -> int:
    """Alarms counted one token after the other."""
    from emovec.threshold import Course, counts

    course, values = Course(threshold), (reading.scores.double() @ threshold.weights(reading.names, {})).tolist()
    fired = 0
    for kind, position, value in zip(reading.kind, reading.positions, values, strict=True):
        if counts(threshold, kind, position):
            fired += course.fires(course.smooth(value))
    return fired


# --- bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alarms", [Alarms(), Alarms(0.1, halflife=0, hold=1), Alarms(0.2, on="generated", hold=2)])
def test_bounds_for_a_conversation_are_those_of_a_threshold(alarms: Alarms) -> None:
    readings = ordinary(40)
    found = bounds(readings, alarms)
    for name, above in zip(NAMES, found.tolist(), strict=True):
        assert above == pytest.approx(calibrate_threshold(alarms.threshold(name, 0.0), readings, alarms.rate))


def test_alarms_are_those_of_a_guard() -> None:
    readings = ordinary(30, seed=1)
    above = torch.tensor([0.4, 0.8, 1.0], dtype=torch.float64)
    for alarms in (Alarms(), Alarms(5, "1000 tokens"), Alarms(5, "1000 tokens", halflife=0, hold=1, on="generated")):
        counted = alarms_in(readings, above, alarms)
        events = [
            [events_in(reading, alarms.threshold(name, level)) for reading in readings]
            for name, level in zip(NAMES, above.tolist(), strict=True)
        ]
        per_conversation = alarms.per == "conversation"
        assert counted["alarms"] == [sum(min(each, 1) if per_conversation else each for each in column) for column in events]
        assert counted["units"] == (30 if per_conversation else pytest.approx(30 * (20 if alarms.on == "generated" else 39) / 1000))


def test_bounds_per_thousand_tokens_are_the_lowest_with_no_more_alarms() -> None:
    readings, alarms = ordinary(25, seed=2), Alarms(6, "1000 tokens", halflife=2, hold=2)
    found = bounds(readings, alarms)
    allowed = int(6 * 25 * 39 / 1000)
    for k, name in enumerate(NAMES):
        count = {
            shift: sum(events_in(reading, alarms.threshold(name, float(found[k]) + shift)) for reading in readings)
            for shift in (0.0, -1e-6)
        }
        assert count[0.0] <= allowed < count[-1e-6]
        for above in torch.linspace(float(found[k]), float(found[k]) + 3, 7, dtype=torch.float64).tolist():
            assert sum(events_in(reading, alarms.threshold(name, above)) for reading in readings) <= allowed


@pytest.mark.parametrize("alarms", [Alarms(0.1), Alarms(4, "1000 tokens")])
def test_new_conversations_give_as_many_alarms_as_asked_for(alarms: Alarms) -> None:
    rates = []
    for seed in range(12):
        above = bounds(ordinary(60, seed=seed), alarms)
        found = alarms_in(ordinary(60, seed=1000 + seed), above, alarms)
        rates.append(torch.tensor(found["alarms"]) / found["units"])
    mean = float(torch.stack(rates).mean())
    assert 0.5 * alarms.rate < mean < 1.4 * alarms.rate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alarms(0.0), "rate must be above 0 and below 1, got 0.0"),
        (lambda: Alarms(1.5), "rate must be above 0 and below 1, got 1.5"),
        (lambda: Alarms(True), "rate must be above 0"),
        (lambda: Alarms(math.nan), "rate must be above 0"),
        (lambda: Alarms(1.0, "hour"), "per must be one of 'conversation', '1000 tokens', got 'hour'"),
        (lambda: Alarms(hold=0), "hold must be at least 1"),
        (lambda: Alarms(on="never"), "on must be one of"),
        (lambda: bounds(ordinary(18), Alarms(0.05)), "needs at least 19 ordinary conversations, got 18"),
        (lambda: bounds(ordinary(5), Alarms(1.0, "1000 tokens")), "need at least 1000 tokens, got 195"),
        (lambda: bounds(ordinary(40, tokens=2), Alarms()), "tell nothing"),
        (lambda: bounds([Reading({0: torch.zeros(9, 3)}, NAMES, ["prompt"] * 9, calibrated=False)], Alarms(0.5)), "raw projections"),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- in a bank ------------------------------------------------------------------------------------------------------------


def readings_of(bank: Bank, count: int) -> list[Reading]:
    readings = []
    for seed in range(count):
        with attach(tiny.model(), bank) as probe:
            tiny.model().generate(**tiny.padded([tiny.tokens(1, 8, seed=seed)[0]], "left"), max_new_tokens=4, do_sample=False)
        readings.append(probe[0])
    return readings


def test_a_bank_keeps_its_bounds(tmp_path: object) -> None:
    bank = with_guard(a_bank(), readings_of(a_bank(), 40), Alarms(0.1, hold=1))
    bank.save(tmp_path / "bank.safetensors")  # type: ignore[operator]
    loaded = load_bank(tmp_path / "bank.safetensors")  # type: ignore[operator]
    assert loaded == bank
    guard = bank.meta["guard"]
    assert guard["measured"]["units"] == 20
    assert set(guard["above"]) == set(guard["measured"]["alarms"]) == set(bank.names)
    threshold = threshold_of(loaded, "afraid")
    assert (threshold.above, threshold.hold, threshold.calibrated_at) == (guard["above"]["afraid"], 1, (1, 2, 3))
    Guard(threshold).bind(loaded)
    with pytest.raises(ValueError, match="its bound comes from readings at 1, 2, 3, the bank is read at 2"):
        Guard(threshold).bind(Bank(bank.values(), bank.read_layer, families=bank.families))
    with pytest.raises(UnknownConcept, match="afraid"):
        threshold_of(loaded, "affraid")
    with pytest.raises(BankError, match="no calibrated bound for 'afraid'"):
        threshold_of(a_bank(), "afraid")
    with pytest.raises(BankError, match="the readings are of layer 2, the bank is read at 1, 2, 3"):
        with_guard(a_bank(), readings_of(tiny.bank(), 2), Alarms(0.1))


def test_recalibrated_for_another_model() -> None:
    """A fine-tune's own baselines, and its fingerprint; bounds in the old unit are gone."""
    from plain_extraction import Corpus, tokenizer

    bank = with_guard(a_bank(), readings_of(a_bank(), 40), Alarms(0.1, hold=1))
    tuned = tiny.fresh()
    with torch.no_grad():
        for weight in tuned.model.layers[0].parameters():
            weight.mul_(1.3)
    with pytest.raises(BankError, match="weights"):
        bank.check(tuned)
    corpus = Corpus(seed=3)
    made = recalibrated(tuned, tokenizer(), bank, corpus.ordinary, corpus.neutral, model_name="tuned")
    made.check(tuned)
    with pytest.raises(BankError, match="the bank was made for tuned"):
        made.check(tiny.model())
    assert made.meta["fingerprint"] == fingerprint(tuned)
    assert made.meta["directions_from"]["model"] == "tiny"
    assert "guard" not in made.meta
    assert made.readout is not None
    assert made.readout != bank.readout
    for index in bank.layers:
        assert torch.equal(made[index].directions, bank[index].directions)
        assert made[index].baselines != bank[index].baselines
    with attach(tuned, made) as probe, torch.no_grad():
        tuned(tiny.tokens(1, 9))
    assert probe[0].calibrated
    with pytest.raises(BankError, match=r"the bank is 64 wide, the model 32"):
        recalibrated(tiny.fresh(hidden_size=32, num_attention_heads=2, head_dim=16), tokenizer(), bank, corpus.ordinary, corpus.neutral)


# --- usable strengths ------------------------------------------------------------------------------------------------------


def test_steering_beyond_the_usable_strengths_is_warned_about() -> None:
    bank = with_usable(tiny.bank(), {"calm": [-0.1, 0.2], "afraid": (0.0, 0.05)})
    assert bank.usable == {"calm": (-0.1, 0.2), "afraid": (0.0, 0.05)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steer, layers in (({"calm": 0.2, "angry": 1.5}, None), ({"calm": {"at_most": 1.0}}, None), ({"calm": 0.5}, [1])):
            with attach(tiny.model(), bank, steer=steer, steer_layers=layers):  # the ranges are of the bank's own layers
                pass
    for steer in ({"calm": 0.21}, [None, {"calm": -0.2}], {"calm": {"add": 0.5, "when": "angry > 1"}}):
        warned = pytest.warns(UserWarning, match=r"calm: strength .* is outside of -0.1 to 0.2")
        with warned, attach(tiny.model(), bank, steer=steer):
            pass
    with pytest.raises(UnknownConcept, match="affraid"):
        with_usable(bank, {"affraid": [0, 1]})


@pytest.mark.parametrize("report", [{}, {"sections": {}}, {"sections": {"causality": {"usable": {"calm": 1}}}}, [], None])
def test_a_report_without_usable_strengths(report: object) -> None:
    with pytest.raises(ValueError, match="no usable strengths"):
        usable_in(report)


def test_usable_strengths_of_a_report() -> None:
    assert usable_in({"sections": {"causality": {"usable": {"calm": [-0.1, 0.2]}}}}) == {"calm": [-0.1, 0.2]}
    with pytest.raises(ValueError, match="usable strengths of 'calm'"):
        usable_in({"sections": {"causality": {"usable": {"calm": [0.3, 0.2]}}}})


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(tmp_path: object) -> None:
    prompts = tmp_path / "ordinary.jsonl"  # type: ignore[operator]
    prompts.write_text("".join(json.dumps({"content": f"What is {n} plus {n}?"}) + "\n" for n in range(8)), encoding="utf-8")
    target = tmp_path / "bank.safetensors"  # type: ignore[operator]
    options = ["--ordinary", str(prompts), "--rate", "0.25", "--new-tokens", "6", "--guard-only", "--json"]
    guard = json.loads(emovec("calibrate", "smollm2-135m-instruct", "smollm2-135m-instruct", "--out", str(target), *options).stdout)
    assert guard["measured"]["units"] == 4
    bank = load_bank(target)
    assert bank.meta["guard"] == guard
    shipped = load_bank("smollm2-135m-instruct")
    assert all(bank[layer] == shipped[layer] for layer in shipped.layers)
    with pytest.raises(ValueError, match="rate must be above 0 and below 1, got 7"):
        run("calibrate", "smollm2-135m-instruct", "smollm2-135m-instruct", "--out", str(target), "--rate", "7")


@pytest.mark.slow
def test_the_examples_of_the_page_run() -> None:
    run_examples("calibration.md")


def test_the_table_of_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "bench")
    import guard
    import pages
    import provenance

    found = provenance.read("guard")
    text = guard.PAGE.read_text(encoding="utf-8")
    assert pages.written(text, {"guard": guard.table(found["results"], found["provenance"]["name"])}) == text
    bank = load_bank(guard.MODEL)
    assert {row["target"]: row["above"] for row in found["results"]["targets"]} == {
        row["target"]: bank.meta["guard"]["above"][row["target"]] for row in found["results"]["targets"]
    }
