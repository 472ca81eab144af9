"""The guard: what it watches is what readings say, it fires where it should and nowhere else, and its actions take effect."""

from __future__ import annotations

import pytest
import tiny
import torch
from streams import untouched

from emovec.bank import Bank, BankLayer, UnknownConcept, UnknownLayer
from emovec.guard import Guard, GuardEvent, GuardStop, Refuse, Steer, Stop, Threshold
from emovec.hook import attach

torch.set_num_threads(1)

NEW = 8
OPTIONS = {"max_new_tokens": NEW, "do_sample": False}
PROMPTS = [tiny.tokens(1, length, seed=length)[0] for length in (6, 4, 9)]


def ignore(event):
    """Do nothing."""


def readings(steer=None, prompts=PROMPTS):
    """Without a guard: the output and each sequence's reading."""
    with attach(tiny.model(), tiny.bank(), steer=steer) as probe:
        out = tiny.model().generate(**tiny.padded(prompts, "left"), **OPTIONS)
    return out, list(probe)


def guarded(*thresholds, steer=None, prompts=PROMPTS, tokenizer=None, **options):
    model = tiny.model()
    with attach(model, tiny.bank(), steer=steer, guard=Guard(*thresholds), tokenizer=tokenizer) as probe:
        out = model.generate(**tiny.padded(prompts, "left"), **{**OPTIONS, **options})
    assert untouched(model)
    return out, probe


def expected_events(threshold, reading, sequence=0):
    """The events of one sequence, from its reading's own smoothing."""
    keep = [p for p, kind in enumerate(reading.kind) if p > 0 and threshold.on in ("all", kind)]
    values = reading.scores.double() @ threshold.weights(reading.names, reading.members())
    n = d = 0.0
    decay = 0.5 ** (1 / threshold.halflife) if threshold.halflife else 0.0
    run, events = 0, []
    for position in keep:
        n, d = decay * n + float(values[position]), decay * d + 1
        run = run + 1 if n / d > threshold.above else 0
        if run == threshold.hold:
            events.append((sequence, position, reading.kind[position], pytest.approx(n / d, abs=1e-3)))
    return events


def between(values, index):
    """Between two of the values, in ascending order; so that rounding does not decide."""
    ordered = torch.as_tensor(values).sort().values
    return float(ordered[index] + ordered[index + 1]) / 2


def found(events):
    return [(event.sequence, event.position, event.kind, event.value) for event in events]


# --- where it fires -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["afraid", "High", {"desperate": 1.0, "calm": -0.5}, {"High": 0.5, "happy": 1}], ids=str)
@pytest.mark.parametrize(("halflife", "hold"), [(8, 3), (0, 1), (2, 2), (0, 3)])
@pytest.mark.parametrize("on", ["all", "prompt", "generated"])
def test_it_fires_where_the_readings_say(of, halflife, hold, on):
    _, plain = readings()
    values = torch.cat([reading.scores[1:].double() @ Threshold(of, 0).weights(reading.names, reading.members()) for reading in plain])
    threshold = Threshold(of, between(values, len(values) // 4), ignore, halflife=halflife, hold=hold, on=on)
    expected = [event for sequence, reading in enumerate(plain) for event in expected_events(threshold, reading, sequence)]
    _, probe = guarded(threshold)
    assert sorted(found(probe.events), key=lambda event: event[:2]) == expected
    assert expected


def test_smoothing_is_that_of_readings():
    _, plain = readings()
    smooth = plain[0].smooth(4).of("afraid")
    above = float(smooth[3:].max()) - 1e-3
    position = 3 + int(smooth[3:].argmax())
    assert smooth[1:3].max() < above, "the case needs a peak after the third token"
    _, probe = guarded(Threshold("afraid", above, ignore, halflife=4, hold=1), prompts=PROMPTS[:1])
    (event,) = probe.events
    assert event == GuardEvent(0, position, plain[0].kind[position], "afraid", event.value, above, (2,), "callback")
    assert event.value == pytest.approx(float(smooth[position]), abs=1e-3)
    assert str(event).startswith(f"sequence 0, {event.kind} token {position}: afraid ")


def test_one_noisy_token_does_not_fire():
    """Of a hold-off of two, a single peak is not enough; the first token, a sink, never counts."""
    _, plain = readings(prompts=PROMPTS[:1])
    scores = plain[0].of("happy")
    lone = between(scores[1:], -2)  # only the highest token is above
    _, probe = guarded(Threshold("happy", lone, ignore, halflife=0, hold=1), prompts=PROMPTS[:1])
    assert len(probe.events) == 1
    _, probe = guarded(Threshold("happy", lone, ignore, halflife=0, hold=2), prompts=PROMPTS[:1])
    assert probe.events == ()


def test_the_first_token_is_a_sink_and_never_counts():
    _, plain = readings()
    leads = {
        (sequence, name, sign): float(sign * reading.of(name)[0] - (sign * reading.of(name)[1:]).max())
        for sequence, reading in enumerate(plain)
        for name in tiny.CONCEPTS
        for sign in (1, -1)
    }
    sequence, name, sign = max(leads, key=leads.get)
    assert leads[sequence, name, sign] > 1, "the case needs a first token that stands out"
    above = float(sign * plain[sequence].of(name)[0]) - 0.5
    _, probe = guarded(Threshold({name: sign}, above, ignore, halflife=0, hold=1), prompts=PROMPTS[sequence : sequence + 1])
    assert probe.events == ()


def test_it_fires_again_after_a_token_that_is_not_above():
    _, plain = readings(prompts=PROMPTS[:1])
    above = between(plain[0].of("happy")[1:], 5)
    runs = (plain[0].of("happy")[1:] > above).int()
    ups = int(runs[0] + (runs[1:] > runs[:-1]).sum())
    assert ups > 1
    _, probe = guarded(Threshold("happy", above, ignore, halflife=0, hold=1), prompts=PROMPTS[:1])
    assert len(probe.events) == ups


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sample", [True, False])
def test_with_sampling_and_without_a_cache(use_cache, sample):
    model, bank = tiny.model(), tiny.bank()
    threshold = Threshold("afraid", 0.0, ignore, halflife=2, hold=1)
    torch.manual_seed(0)
    with attach(model, bank, guard=Guard(threshold)) as probe:
        model.generate(**tiny.padded(PROMPTS, "left"), max_new_tokens=NEW, do_sample=sample, use_cache=use_cache)
    expected = [event for sequence, reading in enumerate(probe) for event in expected_events(threshold, reading, sequence)]
    assert sorted(found(probe.events), key=lambda event: event[:2]) == expected
    assert expected


def test_layers_and_what_is_kept():
    model, bank = tiny.model(), tiny.bank()
    ids = PROMPTS[0][None]
    guard = Guard(
        Threshold("afraid", -30, ignore, hold=1, halflife=0, layer=3), Threshold("calm", -30, ignore, hold=1, halflife=0, layer=1)
    )
    with attach(model, bank, guard=guard, layers=[2]) as probe, torch.no_grad():
        model(ids)
    assert probe[0].layers == (2,)
    with attach(model, bank) as plain, torch.no_grad():
        model(ids)
    assert [(event.of, event.layers, event.position) for event in probe.events] == [("afraid", (3,), 1), ("calm", (1,), 1)]
    assert [event.value for event in probe.events] == [
        pytest.approx(float(plain[0].at(3)[1, 1]), abs=1e-3),
        pytest.approx(float(plain[0].at(1)[1, 0]), abs=1e-3),
    ]
    with attach(model, bank, guard=guard, read=False) as probe, torch.no_grad():
        model(ids)
    assert len(probe.events) == 2
    with pytest.raises(RuntimeError, match="read=False"):
        probe[0]


def test_events_are_of_the_latest_batch():
    model, bank = tiny.model(), tiny.bank()
    seen = []
    with attach(model, bank, guard=Guard(Threshold("afraid", -30, seen.append, hold=2, on="prompt"))) as probe, torch.no_grad():
        for length in (3, 5):
            model(tiny.tokens(2, length))
            assert [event.position for event in probe.events] == [2, 2]
        model(tiny.tokens(2, 2))
        assert probe.events == ()
    assert len(seen) == 4


# --- what it does -------------------------------------------------------------------------------------------------


def lowest(name="afraid"):
    """A threshold that every token is above."""
    return {"of": name, "above": -40.0, "halflife": 0, "hold": 1}


def test_stop_on_the_prompt_comes_before_the_first_token():
    plain, _ = readings(prompts=PROMPTS[:1])
    out, probe = guarded(Threshold(**lowest(), action=Stop(), on="prompt"), prompts=PROMPTS[:1])
    assert out[0, :6].tolist() == plain[0, :6].tolist()
    assert out[0, 6:].tolist() == [0], "one token of padding, none of the model's"
    assert [(event.position, event.kind, event.action) for event in probe.events] == [(1, "prompt", "stop")]
    assert len(probe[0]) == 6


def test_stop_on_a_generated_token():
    plain, _ = readings(prompts=PROMPTS[:1])
    out, probe = guarded(Threshold(**{**lowest(), "hold": 3}, on="generated"), prompts=PROMPTS[:1])
    assert out[0].tolist() == [*plain[0, :9].tolist(), 0], "two tokens follow the first; at the third it ends"
    assert [(event.position, event.kind) for event in probe.events] == [(8, "generated")]


def test_each_sequence_of_a_batch_ends_by_itself():
    plain, known = readings()
    peaks = torch.tensor([float(reading.of("angry")[1:].max()) for reading in known])
    order = peaks.argsort(descending=True).tolist()
    threshold = Threshold("angry", between(peaks, 1), halflife=0, hold=1)
    out, probe = guarded(threshold)
    (event,) = probe.events
    assert event.sequence == order[0]
    for sequence in order[1:]:
        assert torch.equal(out[sequence], plain[sequence])
        assert torch.equal(probe[sequence].scores, known[sequence].scores)
    length = out.shape[1] - NEW
    written = max(event.position - len(PROMPTS[order[0]]) + 1, 0)
    assert out[order[0], length + written :].tolist() == [0] * (NEW - written)
    assert torch.equal(out[order[0], : length + written], plain[order[0], : length + written])
    assert len(probe[order[0]]) == len(PROMPTS[order[0]]) + written


class Words:
    """A tokenizer of three words."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [{"I": 70, "would": 71, "not": 72}[word] for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(str(int(token)) for token in tokens)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("text", ["I would not", (70, 71, 72)], ids=["text", "ids"])
def test_refuse_writes_the_text_and_ends(text, sample):
    out, probe = guarded(Threshold(**lowest(), action=Refuse(text), on="prompt"), tokenizer=Words(), do_sample=sample)
    assert out[:, 9:].tolist() == [[70, 71, 72, 0]] * 3
    assert sorted((event.sequence, event.action) for event in probe.events) == [(0, "refuse"), (1, "refuse"), (2, "refuse")]


def test_refuse_in_the_middle_of_one_sequence_of_several():
    plain, known = readings()
    peaks = torch.tensor([float(reading.of("happy")[len(prompt) :].max()) for reading, prompt in zip(known, PROMPTS, strict=True)])
    first = int(peaks.argmax())
    threshold = Threshold("happy", between(peaks, 1), Refuse((70, 71)), halflife=0, hold=1, on="generated")
    out, probe = guarded(threshold)
    (event,) = probe.events
    assert event.sequence == first
    written = event.position - len(PROMPTS[first]) + 1
    assert out[first, 9:].tolist() == [*plain[first, 9 : 9 + written].tolist(), 70, 71, *[0] * (NEW - written - 2)][:NEW]
    for sequence in {0, 1, 2} - {first}:
        assert torch.equal(out[sequence], plain[sequence])


def test_steer_and_go_on():
    """From the next forward pass on: the tokens up to the one that fired are those of the unsteered model."""
    plain, known = readings(prompts=PROMPTS[:1])
    calm = {"calm": 0.5}
    out, probe = guarded(Threshold(**{**lowest(), "hold": 2}, action=Steer(calm), on="generated"), prompts=PROMPTS[:1])
    (event,) = probe.events
    assert (event.position, event.action) == (7, "steer")
    assert torch.equal(out[0, :9], plain[0, :9])
    assert torch.equal(probe[0].scores[:8], known[0].scores[:8])
    model = tiny.model()
    with torch.no_grad():
        cache = model(out[:, :8]).past_key_values
        with attach(model, tiny.bank(), steer=calm) as alone:
            model(out[:, 8:-1], past_key_values=cache)
    torch.testing.assert_close(probe[0][8:].at(3), rescaled(alone[0].at(3)), rtol=1e-4, atol=1e-3)


def rescaled(scores, layer=3):
    """From the baseline of prompts, as which several tokens after others are taken, to that of generated tokens."""
    prompt, generated = (tiny.bank()[layer].baseline(kind) for kind in ("prompt", "generated"))
    return (scores * prompt.std + prompt.mean - generated.mean) / generated.std


def test_steer_on_the_prompt_equals_steering_what_is_generated():
    expected, known = readings(steer={"calm": 0.4, "angry": {"add": 0.2, "on": "prompt"}, "on": "generated"})
    threshold = Threshold(**lowest(), action=Steer({"calm": 0.4}), on="prompt")
    out, probe = guarded(threshold, steer={"calm": {"add": -0.3, "on": "generated"}, "angry": {"add": 0.2, "on": "prompt"}})
    assert torch.equal(out, expected), "an entry for the same concept is replaced, others stay"
    for reading, other in zip(probe, known, strict=True):
        torch.testing.assert_close(reading.scores, other.scores)


def test_only_the_sequence_that_fired_is_calmed():
    plain, known = readings()
    calmed, _ = readings(steer={"calm": 0.5, "on": "generated"})
    peaks = torch.tensor([float(reading.of("angry")[1 : len(prompt)].max()) for reading, prompt in zip(known, PROMPTS, strict=True)])
    first = int(peaks.argmax())
    threshold = Threshold("angry", between(peaks, 1), Steer({"calm": 0.5}), halflife=0, hold=1, on="prompt")
    out, _ = guarded(threshold)
    assert torch.equal(out[first], calmed[first])
    for sequence in {0, 1, 2} - {first}:
        assert torch.equal(out[sequence], plain[sequence])


def test_levels_calm_first_then_stop():
    out, probe = guarded(
        Threshold(**lowest(), action=Steer({"calm": 0.5}), on="prompt"),
        Threshold(**{**lowest(), "hold": 4}, action=Stop(), on="generated"),
        prompts=PROMPTS[:1],
    )
    assert [(event.action, event.position) for event in probe.events] == [("steer", 1), ("stop", 9)]
    assert out[0, 10:].tolist() == [0]


def test_stop_is_stronger_than_refuse_and_both_are_reported():
    for order in (1, -1):
        thresholds = [Threshold(**lowest(), action=action, on="prompt") for action in (Stop(), Refuse((70,)))][::order]
        out, probe = guarded(*thresholds, prompts=PROMPTS[:1])
        assert out[0, 6:].tolist() == [0]
        assert {event.action for event in probe.events} == {"stop", "refuse"}


def test_a_callback_that_raises_ends_the_generation():
    model = tiny.model()

    def alarm(event):
        raise InterruptedError(str(event))

    with attach(model, tiny.bank(), guard=Guard(Threshold(**{**lowest(), "hold": 2}, action=alarm, on="generated"))) as probe:
        with pytest.raises(InterruptedError, match="sequence 0, generated token 7: afraid"):
            model.generate(PROMPTS[0][None], **OPTIONS)
        assert len(probe[0]) == 8, "what was read until then can be looked at"
        with pytest.raises(InterruptedError):
            model.generate(PROMPTS[0][None], **OPTIONS)
    assert untouched(model)


def test_outside_generate_there_is_no_loop_to_end():
    model, ids = tiny.model(), tiny.tokens(1, 6)
    with attach(model, tiny.bank(), guard=Guard(Threshold(**lowest()))) as probe, torch.no_grad():
        with pytest.raises(GuardStop, match="sequence 0, prompt token 1: afraid") as raised:
            model(ids)
        assert raised.value.event == probe.events[0]
        assert len(probe[0]) == 6
    assert untouched(model)


def test_steering_in_a_loop_of_ones_own():
    model, bank, ids = tiny.model(), tiny.bank(), tiny.tokens(2, 6)

    def loop():
        with torch.no_grad():
            cache = model(ids[:, :4]).past_key_values
            return torch.cat([model(ids[:, [i]], past_key_values=cache).logits for i in (4, 5)], 1)

    with attach(model, bank, steer={"calm": 0.4, "on": "generated"}):
        expected = loop()
    with attach(model, bank, guard=Guard(Threshold(**lowest(), action=Steer({"calm": 0.4}), on="prompt"))):
        assert torch.equal(loop(), expected)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (Threshold("clam", 1), UnknownConcept, "unknown concept 'clam'; nearest known: calm"),
        (Threshold({"Hihg": 1}, 1), UnknownConcept, "nearest known: High"),
        (Threshold("calm", 1, layer=0), UnknownLayer, "no layer 0"),
        (Threshold("calm", 1, Refuse("no")), ValueError, "to refuse with the text 'no', attach needs tokenizer"),
        (Threshold("calm", 1, Refuse(())), ValueError, "not empty"),
        (Threshold("calm", 1, Steer({"clam": 1})), UnknownConcept, "unknown concept 'clam'"),
        (Threshold("calm", 1, Steer({"calm": {"add": 0.1, "when": "happy > 1"}})), ValueError, "one condition per request"),
    ],
)
def test_thresholds_that_do_not_fit_the_bank_leave_the_model_untouched(threshold, error, message):
    with pytest.raises(error, match=message):
        attach(tiny.model(), tiny.bank(), steer={"angry": {"add": 0.1, "when": "happy > 2"}}, guard=Guard(threshold))
    assert untouched(tiny.model())


def test_guards_are_made_of_thresholds():
    with pytest.raises(ValueError, match="at least one threshold"):
        Guard()
    with pytest.raises(TypeError, match="a guard is made of thresholds, got 'calm'"):
        Guard("calm")
    with pytest.raises(TypeError, match="guard must be a Guard, got Threshold"):
        attach(tiny.model(), tiny.bank(), guard=Threshold("calm", 1))
    assert repr(Guard(Threshold({"calm": -1, "High": 0.5}, 2))) == "Guard(- calm + 0.5 High > 2)"


def test_an_uncalibrated_bank_has_no_score_units():
    layer = BankLayer.from_directions(torch.eye(5, tiny.WIDTH), tiny.CONCEPTS, 1)
    with pytest.warns(UserWarning, match="no fingerprint"), pytest.raises(ValueError, match="layer 1 has no baseline for 'calm'"):
        attach(tiny.model(), Bank([layer]), guard=Guard(Threshold("calm", 1)))
    with pytest.warns(UserWarning, match="raw projections"):
        bank = tiny.bank().add("terse", {index: torch.ones(tiny.WIDTH) for index in tiny.bank().layers})
    Guard(Threshold("calm", 1)).bind(bank)
    with pytest.raises(ValueError, match="no baseline for 'terse', so its scores are raw projections"):
        Guard(Threshold({"calm": 1, "terse": 1}, 1)).bind(bank)


def test_beams_cannot_be_guarded():
    model = tiny.model()
    with attach(model, tiny.bank(), read=False, guard=Guard(Threshold("calm", 1))), pytest.raises(ValueError, match="num_beams=2 cannot"):
        model.generate(PROMPTS[0][None], **OPTIONS, num_beams=2)
    assert untouched(model)
