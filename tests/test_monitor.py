"""A reading's reductions against loops, its smoothing against the stated recursion, its text against the tokenizer."""

import pickle

import pytest
import torch
from banks import run_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emovec.bank import UnknownConcept
from emovec.monitor import Reading

NAMES = ["calm", "afraid", "desperate", "happy", "on edge"]
FAMILIES = {"Low": ["calm", "happy"], "High": ["afraid", "desperate", "on edge", "not read here"], "Elsewhere": ["brooding"]}

relaxed = settings(deadline=None, max_examples=60)


@st.composite
def readings(draw):
    count = draw(st.integers(1, 30))
    prompt = draw(st.integers(0, count))
    scores = torch.randn(count, len(NAMES), generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * 3
    start = draw(st.sampled_from([0, 0, 7]))
    kinds = ["prompt"] * prompt + ["generated"] * (count - prompt)
    return Reading({4: scores.flip(0), 9: scores}, NAMES, kinds, families=FAMILIES, positions=range(start, start + count))


def rows_of(reading, kind):
    """The rows a reduction is over: those of one kind without the first token of the sequence, if others are there."""
    rows = [i for i in range(len(reading)) if kind is None or reading.kind[i] == kind]
    return [i for i in rows if reading.positions[i] != 0] or rows


def naive(series, rows, reduce):
    values = [float(series[i]) for i in rows]
    return {"mean": sum(values) / len(values), "max": max(values), "last": values[-1]}[reduce]


@relaxed
@given(readings(), st.sampled_from(["mean", "max", "last"]), st.sampled_from([None, "prompt", "generated"]), st.integers(1, 7))
def test_top_and_families_agree_with_loops(reading, reduce, kind, k):
    rows = rows_of(reading, kind)
    if not rows:
        for method in (reading.top, reading.families):
            with pytest.raises(ValueError, match=rf"no '{kind}' tokens"):
                method(reduce=reduce, kind=kind)
        return
    expected = {name: naive(reading.scores[:, column], rows, reduce) for column, name in enumerate(NAMES)}
    top = reading.top(k, reduce, kind)
    assert [name for name, _ in top] == sorted(NAMES, key=expected.get, reverse=True)[:k]
    for name, value in top:
        assert value == pytest.approx(expected[name], abs=1e-5)

    families = reading.families(reduce, kind)
    assert list(families) == ["Low", "High"]
    for family, value in families.items():
        members = [NAMES.index(name) for name in FAMILIES[family] if name in NAMES]
        series = [sum(float(reading.scores[i, m]) for m in members) / len(members) for i in range(len(reading))]
        assert value == pytest.approx(naive(series, rows, reduce), abs=1e-5)
    mean = reading.mean(kind)
    for column in range(len(NAMES)):
        assert float(mean[column]) == pytest.approx(naive(reading.scores[:, column], rows, "mean"), abs=1e-5)


@relaxed
@given(readings(), st.floats(0.05, 200))
def test_smooth_follows_its_recursion(reading, halflife):
    smooth = reading.smooth(halflife)
    decay = 0.5 ** (1 / halflife)
    for layer in reading.layers:
        n = d = 0.0
        for i, position in enumerate(reading.positions):
            score = reading.at(layer)[i].double()
            if position == 0:
                torch.testing.assert_close(smooth.at(layer)[i], reading.at(layer)[i])
                continue
            n, d = decay * n + score, decay * d + 1
            torch.testing.assert_close(smooth.at(layer)[i].double(), n / d, atol=1e-5, rtol=1e-4)
    assert smooth.kind == reading.kind
    assert smooth.positions == reading.positions


def test_smooth_is_pandas_ewm_and_looks_back_only():
    scores = torch.randn(20, len(NAMES))
    reading = Reading({0: scores}, NAMES, ["generated"] * 20, positions=range(5, 25))
    expected = torch.tensor(reading.to_pandas().ewm(halflife=3).mean().to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(reading.smooth(3).scores, expected, atol=1e-5, rtol=1e-4)
    spoiled = scores.clone()
    spoiled[12:] = float("nan")
    before = Reading({0: spoiled}, NAMES, ["generated"] * 20, positions=range(5, 25)).smooth(3).scores[:12]
    torch.testing.assert_close(before, reading.smooth(3).scores[:12], atol=0, rtol=0)
    torch.testing.assert_close(reading.smooth(1e300).scores[-1], scores.mean(0))
    torch.testing.assert_close(reading.smooth(1e-6).scores, scores)


@pytest.mark.parametrize("halflife", [0, -1, float("nan"), float("inf")])
def test_smooth_refuses_a_bad_halflife(halflife):
    with pytest.raises(ValueError, match="halflife must be positive"):
        a_reading().smooth(halflife)


def a_reading(count=6, **kwargs):
    kinds = ["prompt"] * 4 + ["generated"] * (count - 4)
    return Reading({2: torch.arange(count * len(NAMES)).view(count, -1) / 10}, NAMES, kinds, families=FAMILIES, **kwargs)


def test_series_and_layers():
    scores = {3: torch.zeros(2, 5), 1: torch.ones(2, 5)}
    reading = Reading(scores, NAMES, ["prompt"] * 2, read_layer=1)
    assert reading.layers == (1, 3)
    assert reading.layer == 1
    assert reading.scores is scores[1]
    assert reading.at(3) is scores[3]
    torch.testing.assert_close(a_reading().of("on edge"), torch.arange(4, 30, 5) / 10)
    torch.testing.assert_close(a_reading().family_scores()["Low"], a_reading().scores[:, [0, 3]].mean(-1))
    assert a_reading().members() == {"Low": ("calm", "happy"), "High": ("afraid", "desperate", "on edge")}
    with pytest.raises(ValueError, match="layer 2 was not read; the layers of this reading are 1, 3"):
        reading.at(2)
    with pytest.raises(ValueError, match="layer 7 was not read"):
        Reading(scores, NAMES, ["prompt"] * 2, read_layer=7)


def test_unknown_concept_lists_the_nearest():
    with pytest.raises(UnknownConcept, match="desperate"):
        a_reading().of("desparate")


def test_first_token_is_left_out_of_reductions_but_kept_in_scores():
    scores = torch.tensor([[900.0] * 5, [1, 2, 3, 4, 5]])
    reading = Reading({0: scores}, NAMES, ["prompt"] * 2)
    assert reading.scores[0, 0] == 900
    assert reading.mean().tolist() == [1, 2, 3, 4, 5]
    assert reading.top(1, reduce="max") == [("on edge", 5.0)]
    assert reading[0].top(1)[0][1] == 900  # it was asked for
    assert reading.smooth(8).scores[1].tolist() == [1, 2, 3, 4, 5]


def test_slices():
    reading = a_reading(tokens=torch.arange(10, 16))
    part = reading[1:5]
    assert len(part) == 4
    assert part.tokens.tolist() == [11, 12, 13, 14]
    assert part.kind == ("prompt",) * 3 + ("generated",)
    assert part.positions == range(1, 5)
    assert part.pieces == ("<11>", "<12>", "<13>", "<14>")
    assert part[::2].positions == range(1, 5, 2)
    assert reading[-1].top(1) == [("on edge", pytest.approx(2.9))]
    assert [token.pieces[0] for token in reading] == [f"<{i}>" for i in range(10, 16)]
    assert len(reading[3:3]) == 0
    assert "0 tokens" in repr(reading[3:3])
    assert len(reading[3:3].smooth()) == 0
    with pytest.raises(ValueError, match="no tokens"):
        reading[3:3].mean()
    with pytest.raises(IndexError, match="token 6 of 6"):
        reading[6]
    with pytest.raises(TypeError, match="'calm'"):
        reading["calm"]
    with pytest.raises(ValueError, match="step of -1"):
        reading[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, "at least one layer"),
        ({"scores": {0: torch.zeros(3, 5)}}, r"want scores \[2, 5\], layer 0 has \[3, 5\]"),
        ({"scores": {0: torch.zeros(2, 4)}}, r"layer 0 has \[2, 4\]"),
        ({"kinds": ["prompt"]}, r"1 kinds and 5 names"),
        ({"tokens": torch.zeros(3)}, r"tokens must be \[2\], got \[3\]"),
        ({"positions": range(3)}, "3 positions for 2 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Reading(**{"scores": {0: torch.zeros(2, 5)}, "names": NAMES, "kinds": ["prompt"] * 2} | change)


def test_bad_arguments():
    with pytest.raises(ValueError, match="reduce must be one of mean, max, last, got 'median'"):
        a_reading().top(reduce="median")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        a_reading().top(0)


def test_pandas():
    frame = a_reading(tokens=torch.arange(6)).to_pandas()
    assert list(frame.columns) == NAMES
    assert frame.xs("generated", level="kind")["calm"].tolist() == pytest.approx([2.0, 2.5])
    assert frame.index.get_level_values("token")[2] == "<2>"
    with pytest.raises(ValueError, match="layer 5 was not read"):
        a_reading().to_pandas(5)


def test_repr_says_what_is_there():
    text = repr(a_reading())
    for part in ("6 tokens (4 prompt, 2 generated)", "5 concepts", "layer 2", "z-scores", "on edge +1.9"):
        assert part in text
    assert "raw projections" in repr(a_reading(calibrated=False))


def byte_tokenizer():
    """Byte-level, without merges: every character outside ASCII spans several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = byte_tokenizer()


def read_text(tokenizer, text):
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    return Reading({0: torch.zeros(len(tokens), 5)}, NAMES, ["prompt"] * len(tokens), tokens, tokenizer=tokenizer)


@relaxed
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_byte_level_pieces_are_the_text(text):
    reading = read_text(BYTES, text)
    assert reading.text == text
    assert [piece for piece in reading.pieces if piece] == list(text)
    assert reading[1:].pieces == reading.pieces[1:]


def test_a_character_belongs_to_the_token_that_completes_it():
    assert read_text(BYTES, "a🙂é").pieces == ("a", "", "", "", "🙂", "", "é")
    tokens = torch.tensor(BYTES("a🙂")["input_ids"][:-1])  # cut inside a character
    assert Reading({0: torch.zeros(4, 5)}, NAMES, ["prompt"] * 4, tokens, tokenizer=BYTES).text == "a\ufffd"


def test_sentencepiece_spaces_are_kept():
    vocabulary = {"▁so": 0, "▁calm": 1, "er": 2}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    reading = Reading({0: torch.zeros(3, 5)}, NAMES, ["prompt"] * 3, torch.tensor([0, 1, 2]), tokenizer=tokenizer)
    assert reading.pieces == ("so", " calm", "er")
    assert reading[1:].pieces == (" calm", "er")


def test_pieces_without_ids_are_positions_and_a_reading_can_be_pickled():
    reading = pickle.loads(pickle.dumps(a_reading()[2:]))
    assert reading.pieces == ("[2]", "[3]", "[4]", "[5]")
    assert reading.top(1) == a_reading()[2:].top(1)


def test_the_docs_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples("monitor.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "picture.svg"]


def test_scores_of_layers_together_without_the_layers_own():
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 1.0]])
    reading = Reading({}, ["calm", "afraid"], ["prompt"] * 3, read_layer=18, together=((12, 18), values))
    assert torch.equal(reading.scores, values)
    assert (reading.layers, reading.read_layers, reading.where) == ((), (12, 18), "layers 12, 18 together")
    assert reading.top(1) == [("calm", 3.0)]
    assert torch.equal(reading[1:].scores, values[1:])
    assert len(reading.smooth(2)) == 3
    assert "together" in repr(reading)
    with pytest.raises(ValueError, match="layer 18 was not read; the layers of this reading are none by themselves"):
        reading.at(18)
    with pytest.raises(ValueError, match="at least one layer"):
        Reading({}, ["calm"], [])
