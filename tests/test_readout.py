"""Layers read together: the score is the mean of their z-scores in units of ordinary text, wherever it is asked for."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import plain_extraction as plain
import pytest
import tiny
import torch
from banks import NAMES, make_bank, make_layer
from test_extraction import LAYERS, MODEL, bank_of
from test_guard import expected_events, found, ignore

from emovec.bank import Bank, BankError, Baseline, Readout, load_bank
from emovec.guard import Guard, Threshold
from emovec.hook import attach
from emovec.monitor import Reading
from emovec.recording import Rescale
from emovec.threshold import peak

torch.set_num_threads(1)


def a_readout(layers: tuple[int, ...], concepts: int, kinds: tuple[str, ...] = ("prompt", "generated"), seed: int = 1) -> Readout:
    g = torch.Generator().manual_seed(seed)
    return Readout(
        layers, {kind: Baseline(torch.randn(concepts, generator=g), 0.5 + torch.rand(concepts, generator=g), 50) for kind in kinds}
    )


def a_bank() -> Bank:
    """The tiny model's, read at three layers together."""
    bank = tiny.bank()
    readout = a_readout((1, 2, 3), len(bank.names))
    return Bank(bank.values(), bank.read_layer, bank.steer_layers, bank.families, bank.meta, readout=readout)


def by_hand(bank: Bank, reading: Reading) -> torch.Tensor:
    """The scores from the single layers' z-scores."""
    assert bank.readout is not None
    mean = torch.stack([reading.at(layer).double() for layer in bank.readout.layers]).mean(0)
    rows = [
        (row - bank.readout.baselines[kind].mean) / bank.readout.baselines[kind].std for row, kind in zip(mean, reading.kind, strict=True)
    ]
    return torch.stack(rows)


def a_reading(bank: Bank, **options: object) -> tuple[torch.Tensor, Reading]:
    inputs = tiny.padded([tiny.tokens(1, 7, seed=3)[0]], "left")
    with attach(tiny.model(), bank, **options) as probe:  # type: ignore[arg-type]
        out = tiny.model().generate(**inputs, max_new_tokens=5, do_sample=False)
    return out, probe[0]


# --- reading ------------------------------------------------------------------------------------------------------------


def test_a_probe_reads_the_layers_together() -> None:
    bank = a_bank()
    _, reading = a_reading(bank)
    assert reading.read_layers == (1, 2, 3)
    assert reading.where == "layers 1, 2, 3 together"
    assert set(reading.kind) == {"prompt", "generated"}
    assert torch.allclose(reading.scores.double(), by_hand(bank, reading), atol=1e-5)
    assert not torch.allclose(reading.scores, reading.at(bank.read_layer), atol=0.1)
    part = reading[2:9]
    assert torch.equal(part.scores, reading.scores[2:9])
    assert torch.equal(part.at(1), reading.at(1)[2:9])
    alone = Reading({0: reading.scores}, reading.names, reading.kind, positions=reading.positions)
    assert torch.equal(reading.smooth(4).scores, alone.smooth(4).scores)
    assert reading.top(3) == alone.top(3)
    assert reading.smooth(4).where == reading.where


def test_without_one_of_the_layers_the_layer_to_read_at_is_read() -> None:
    bank = a_bank()
    _, reading = a_reading(bank, layers=[1, 2])
    assert reading.where == "layer 2"
    assert torch.equal(reading.scores, reading.at(2))


@pytest.mark.parametrize("kind", ["prompt", "generated"])
def test_a_bank_scores_streams_as_a_probe_does(kind: str) -> None:
    bank = a_bank()
    streams: dict[int, torch.Tensor] = {}
    hooks = [
        tiny.model().model.layers[layer].register_forward_hook(lambda _, __, out, layer=layer: streams.__setitem__(layer, out[0]))
        for layer in bank.layers
    ]
    inputs = tiny.padded([tiny.tokens(1, 9, seed=5)[0]], "left")
    with attach(tiny.model(), bank) as probe, torch.no_grad():
        tiny.model()(**inputs)
    for hook in hooks:
        hook.remove()
    streams = {layer: stream.reshape(-1, tiny.WIDTH) for layer, stream in streams.items()}
    scores = bank.score(streams, kind)
    if kind == "prompt":
        assert torch.allclose(scores, probe[0].scores.double(), atol=1e-4)
    else:
        assert bank.readout is not None
        rescaled = {layer: Rescale.of(bank[layer])(probe[0].at(layer)) for layer in bank.layers}  # type: ignore[misc]
        assert torch.allclose(scores, bank.readout.combine(rescaled, kind).double(), atol=1e-4)
    assert torch.allclose(bank.score({layer: stream.mean(0) for layer, stream in streams.items()}, kind), scores.mean(0))


def test_the_guard_watches_what_readings_say() -> None:
    bank = a_bank()
    out, reading = a_reading(bank)
    for of in ("afraid", "High", {"desperate": 1.0, "calm": -0.5}):
        weights = Threshold(of, 0).weights(reading.names, reading.members())
        values = (reading.scores[1:].double() @ weights).sort().values
        threshold = Threshold(of, float(values[4] + values[5]) / 2, ignore, halflife=0, hold=1)
        again, probe_events = None, None
        with attach(tiny.model(), bank, guard=Guard(threshold)) as probe:
            again = tiny.model().generate(**tiny.padded([tiny.tokens(1, 7, seed=3)[0]], "left"), max_new_tokens=5, do_sample=False)
            probe_events = probe.events
        assert torch.equal(again, out)
        assert found(probe_events) == expected_events(threshold, reading)
        assert probe_events
        assert {event.layers for event in probe_events} == {(1, 2, 3)}
        assert "at layers 1, 2, 3" in str(probe_events[0])
        assert peak(threshold, reading) == pytest.approx(float(values[-1]), abs=1e-4)


# --- the bank -----------------------------------------------------------------------------------------------------------


def calibrated_bank() -> Bank:
    bank = make_bank(layers=(1, 2, 4))
    return Bank(bank.values(), 2, [2], bank.families, bank.meta, readout=a_readout((1, 2), len(NAMES)))


def test_round_trip(tmp_path: object) -> None:
    bank = calibrated_bank()
    path = tmp_path / "bank.safetensors"  # type: ignore[operator]
    bank.save(path)
    assert load_bank(path) == bank
    assert load_bank(path).read_layers == (1, 2)
    assert Bank(bank.values(), 2, [2], bank.families, bank.meta) != bank
    assert "read at 1, 2, steer at 2" in repr(bank)


def test_banks_made_from_one() -> None:
    bank = calibrated_bank()
    assert bank.readout is not None
    part = bank.subset(names=["calm", "afraid"])
    assert part.readout == bank.readout.subset([bank.resolve("calm"), bank.resolve("afraid")])
    assert bank.subset(layers=[1, 2]).readout == bank.readout
    assert bank.subset(layers=[1, 4]).readout is None
    assert bank.subset(layers=[1, 4]).read_layers == (1,)

    new = {layer: torch.randn(bank.width) for layer in bank.layers}
    base = {layer: {"prompt": Baseline(torch.zeros(1), torch.ones(1), 9)} for layer in bank.layers}
    more = bank.add("sarcastic", new, baselines=base, readout={"prompt": Baseline(torch.tensor([0.2]), torch.tensor([0.6]), 9)})
    assert more.readout is not None
    assert more.readout.concepts == len(NAMES) + 1
    assert float(more.readout.baseline("generated")[1][-1]) == pytest.approx(0.6)  # there is none for generated tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = bank.add("sarcastic", new)
    assert bare.readout is not None
    assert [float(part[-1]) for part in bare.readout.baseline()] == [0.0, 1.0]
    assert bank.merge(Bank([make_layer(7)])).readout == bank.readout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a_readout((2,), 7), r"two or more layers, each once and in order, got \[2\]"),
        (lambda: a_readout((2, 1), 7), r"two or more layers, each once and in order, got \[2, 1\]"),
        (lambda: Readout((1, 2), {}), "needs a baseline"),
        (lambda: a_readout((1, 2), 7, ("middle",)), "unknown kind of position 'middle'"),
        (lambda: Bank(make_bank().values(), 2, readout=a_readout((1, 3), 7)), "no layer 3"),
        (
            lambda: Bank(make_bank().values(), 4, readout=a_readout((1, 2), 7)),
            r"the layer to read at, 4, is not among those of the readout, \[1, 2\]",
        ),
        (lambda: Bank(make_bank().values(), 2, readout=a_readout((1, 2), 6)), "baselines of 6 concepts, the bank has 7"),
        (
            lambda: Bank([replace(make_layer(i), baselines={}) for i in (1, 2)], 2, readout=a_readout((1, 2), 7)),
            "layer 1 is not calibrated",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(BankError, match=message):
        make()  # type: ignore[operator]


# --- making one -----------------------------------------------------------------------------------------------------------


def test_extraction_calibrates_the_layers_together() -> None:
    """Against the deviation of the mean z-score over the very tokens, layer by layer and kind by kind."""
    corpus = plain.Corpus(seed=4)
    bank = bank_of(corpus, read_layer=LAYERS)
    expected = plain.bank(MODEL, corpus, skip=8)
    assert bank.readout is not None
    assert bank.readout.layers == tuple(LAYERS)
    assert bank.read_layer == LAYERS[1]
    for kind, baseline in bank.readout.baselines.items():
        z = []
        for layer in LAYERS:
            rows = expected[layer]["projections"][kind]
            z.append((rows - rows.mean(0)) / rows.std(0, ddof=1))
        mean = np.mean(z, axis=0)
        assert baseline.count == len(mean)
        assert torch.equal(baseline.mean, torch.zeros_like(baseline.mean))
        assert torch.allclose(baseline.std.double(), torch.as_tensor(mean.std(0, ddof=1)), rtol=1e-4)


def test_layers_to_read_together_must_be_extracted() -> None:
    with pytest.raises(BankError, match=r"layer 9 is not among those extracted"):
        bank_of(plain.Corpus(seed=4), read_layer=[0, 9])
