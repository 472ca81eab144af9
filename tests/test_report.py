"""Pages hold what they are given, escape what is hostile, ask nothing of the network, and stay legible."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emovec.bank import UnknownConcept
from emovec.monitor import Reading
from emovec.report import colour, page
from emovec.report.charts import bars, lines
from emovec.report.heatmap import heatmap
from emovec.report.markup import Html, number, short, tag
from emovec.report.picture import heatmap_svg
from emovec.report.prose import samples, text
from emovec.report.ranking import strongest
from emovec.report.tables import bounds, figures, matrix, odds_table, table, times

NAMES = ["calm", "serene", "content", "afraid", "desperate", "</script><script>alert(1)</script>"]
FAMILIES = {"Peace": NAMES[:3], 'Fear "& co" <b>': NAMES[3:5]}
HOSTILE = ["<|im_start|>", "<script>", "alert('x')", "</script>", "<!--", "]]>", '" onclick="x', "&amp;", "\u2028", "\x00", "\n\n", ""]
VOID = {"br", "input", "meta"}


class Words:
    """A tokenizer whose tokens are given."""

    def __init__(self, words):
        self.words = words

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids)


def a_reading(words=tuple(HOSTILE), prompt=4, scale=2.0):
    scores = torch.randn(len(words), len(NAMES), generator=torch.Generator().manual_seed(1)) * scale
    kinds = ["prompt"] * prompt + ["generated"] * (len(words) - prompt)
    return Reading({3: scores}, NAMES, kinds, torch.arange(len(words)), tokenizer=Words(words), families=FAMILIES)


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a browser would see."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.shown, self.data = [], [], "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open
        assert self.open.pop() == name

    def handle_data(self, found):
        if self.open and self.open[-1] == "script":
            self.data.append(found)
        elif not self.open or self.open[-1] != "style":
            self.shown += found

    def of(self, name):
        return [attributes for found, attributes in self.elements if found == name]


def everything(reading):
    hostile = "<img src=x onerror=alert(1)>"
    return [
        heatmap(reading, title=hostile, note=hostile),
        lines(reading, thresholds={"calm": 2.0}, events={5: hostile}, title=hostile),
        bars({hostile: reading.top(3), "other": reading.families()}, title=hostile, unit=hostile),
        matrix({hostile: reading.families(), "b": {"only here": 1.0}}, title=hostile),
        odds_table({hostile: {hostile: 2.5, "sad": 0.1}}, title=hostile),
        table([hostile, "n"], [[hostile, 1.5], ["x", -2.0]], title=hostile),
        figures([(hostile, hostile, hostile), ("1 %", "of all")], title=hostile),
        bounds([(hostile, 3.0, 1.0, -math.inf, 1.0)], title=hostile),
        text(hostile, title=hostile, code=hostile),
        samples([(hostile, hostile)], prompt=hostile, title=hostile),
    ]


def test_nothing_hostile_becomes_markup_and_nothing_is_fetched():
    source = page.document("<title>", everything(a_reading()), lede="<lede>")
    found = Page(source)
    scripts = found.of("script")
    assert [script.get("type") for script in scripts] == ["application/json"] * 2 + [None]  # two of data and our own
    assert not found.of("img")
    for name, attributes in found.elements:
        assert not any(key.startswith("on") or key in ("src", "srcset", "action") for key in attributes), (name, attributes)
    assert all(link["href"].startswith("#") for link in found.of("a"))
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$|// -.*", "", source, flags=re.MULTILINE), re.IGNORECASE)
    assert "default-src 'none'" in found.of("meta")[1]["content"]
    assert "\x00" not in source
    assert "<img src=x onerror=alert(1)>" in found.shown


def test_page_has_anchors_for_its_headings():
    found = Page(page.document("t", [text("a", title="A"), text("b"), text("c", title="C"), text("d", title="D & E")]))
    assert [link["href"] for link in found.of("a")] == ["#s0", "#s2", "#s3"]
    assert [section["id"] for section in found.of("section")] == ["s0", "s1", "s2", "s3"]
    assert "D & E" in found.shown


def payload(source):
    found = json.loads(Page(source).data[0])
    levels = np.frombuffer(base64.b64decode(found["scores"]), "<i2").astype(np.float64).reshape(-1, len(found["names"]))
    return found, np.where(levels == -32768, np.nan, levels * found["quantum"])


def test_heatmap_carries_text_and_scores():
    reading = a_reading()
    reading.scores[7, 2], reading.scores[8, 1] = math.nan, math.inf
    reading.scores[0] = 900.0
    found, scores = payload(heatmap(reading))
    assert found["names"] == NAMES
    assert found["pieces"] == HOSTILE
    expected = torch.where(reading.scores.isfinite(), reading.scores, torch.nan).numpy()
    np.testing.assert_allclose(scores, expected, atol=found["quantum"] / 2 + 1e-6)
    assert found["quantum"] <= 900 / 32000 + 1e-9
    assert 3 <= found["limit"] <= 10  # the first token does not count

    spans = [attributes for attributes in Page(heatmap(reading, ["afraid"])).of("span") if "data-i" in attributes]
    limit = payload(heatmap(reading, ["afraid"]))[0]["limit"]
    assert [span["data-i"] for span in spans] == [str(i) for i in range(len(HOSTILE))]
    for span, value in zip(spans, reading.of("afraid").tolist(), strict=True):
        assert span["class"].split()[0] == colour.name(colour.step(value, limit))


def test_prompt_and_generated_are_apart_and_marks_are_marked():
    words = ["<s>", "a", "b", "<s>", "c"]
    tokenizer = Words(words)
    tokenizer.added_tokens_decoder = {0: type("Token", (), {"special": True}), 1: type("Token", (), {"special": False})}
    tokens, kinds = torch.tensor([0, 1, 2, 0, 4]), ["prompt"] * 2 + ["generated"] * 2 + ["prompt"]
    found = Page(heatmap(Reading({0: torch.zeros(5, 6)}, NAMES, kinds, tokens, tokenizer=tokenizer)))
    assert [block["data-kind"] for block in found.of("div") if "data-kind" in block] == ["prompt", "generated", "prompt"]
    assert [span["class"] for span in found.of("span") if "data-i" in span] == ["z mark sink", "z", "z", "z mark", "z"]


def test_every_concept_can_be_chosen():
    found = Page(heatmap(a_reading(), ["desperate", "calm"]))
    assert [button["data-name"] for button in found.of("button")] == ["desperate", "calm"]
    assert [button["aria-pressed"] for button in found.of("button")] == ["true", "false"]
    assert sorted(option["value"] for option in found.of("option")) == sorted(NAMES)
    assert [group["label"] for group in found.of("optgroup")] == [*FAMILIES, "Others"]


def test_strongest_are_not_all_of_one_family():
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 0, 0, 0, 9, 0]])
    reading = Reading({0: scores}, NAMES, ["prompt", "generated"], families=FAMILIES, positions=range(3, 5))
    assert strongest(reading) == ["desperate", "calm", "serene", "afraid", NAMES[5]]
    assert strongest(reading, 2, per_family=1) == ["desperate", "calm"]


def test_reading_writes_its_page(tmp_path):
    reading = a_reading()
    path = reading.heatmap(tmp_path / "page.html", title="A <b> title")
    found = Page(path.read_text(encoding="utf-8"))
    assert "A <b> title" in found.shown
    assert "4 prompt and 8 generated tokens, read against 6 concepts at layer 3." in found.shown
    assert list(tmp_path.iterdir()) == [path]
    without = Reading({0: torch.zeros(1, 2)}, ["a", "b"], ["prompt"], calibrated=False)
    assert "projection, uncalibrated" in Page(without.heatmap(tmp_path / "raw.html").read_text(encoding="utf-8")).shown


def test_what_is_wrong_leaves_no_file(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("before")
    with pytest.raises(UnknownConcept, match="serene"):
        a_reading().heatmap(target, ["seren"])
    with pytest.raises(UnknownConcept):
        heatmap_svg(a_reading(), ["seren"], target)
    with pytest.raises(ValueError, match="no tokens"):
        a_reading()[:0].heatmap(target, ["calm"])
    with pytest.raises(TypeError, match="plain text"):
        page.write(target, "t", ["plain text"])
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (lambda: table(["a", "b"], [[1]]), "2 columns, but a row of 1"),
        (lambda: odds_table({"bias": {"sad": 0.0}}), "'bias', 'sad' has 0.0"),
        (lambda: odds_table({"bias": {"sad": math.nan}}), "has nan"),
        (lambda: heatmap(a_reading(), limit=0), "limit must be positive"),
        (lambda: lines(a_reading(), events={99: "fired"}), "position 99"),
        (lambda: lines(a_reading(), ["calm"], thresholds={"afraid": 1.0}), "'afraid'"),
        (lambda: heatmap_svg(a_reading(), [], "never.svg"), "0 concepts"),
        (lambda: heatmap_svg(a_reading(), ["calm"], "never.svg", theme="blue"), "'blue'"),
    ],
)
def test_bad_arguments_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        section()


def test_bars_start_at_zero_on_one_scale():
    found = Page(bars({"a": [("x", -1.0)], "b": {"y": 3.0}}))
    styles = [attributes["style"] for attributes in found.of("i")]
    assert styles == ["left:0.00%;width:25.00%", "left:25.00%;width:75.00%"]
    assert "\u22121.00" in found.shown
    assert [attributes["style"] for attributes in Page(bars([("nothing", 0.0), ("none", math.nan)])).of("i")] == [
        "left:0.00%;width:0.00%"
    ] * 2
    assert "+2.00" in Page(bars({"calm": 2.0})).shown


def test_lines_draw_each_token_once_and_leave_the_first_out():
    reading = a_reading(["w"] * 40, prompt=10)
    reading.scores[0] = 500.0
    found = Page(lines(reading, ["calm", "afraid"], halflife=3))
    charts = [attributes["data-values"].split(",") for attributes in found.of("figure")]
    assert charts[0][0] == ""
    np.testing.assert_allclose([float(value) for value in charts[1][1:]], reading.of("afraid")[1:], atol=0.0051)
    assert [len(attributes["points"].split()) for attributes in found.of("polyline")] == [39, 39]
    assert sum(attributes["d"].count("M") for attributes in found.of("path")) == 2 * 39


@given(st.floats(allow_nan=False, width=32), st.floats(0.01, 1e6))
def test_step_is_the_nearest_of_seventeen(value, limit):
    grid = [limit * index / colour.STEPS for index in range(-colour.STEPS, colour.STEPS + 1)]
    step = colour.step(value, limit)
    clipped = min(max(value, -limit), limit)
    assert abs(grid[step + colour.STEPS] - clipped) <= min(abs(level - clipped) for level in grid) + 1e-6 * limit
    assert colour.step(-value, limit) == -step


@pytest.mark.parametrize("theme", list(colour.THEMES))
def test_text_is_legible_on_every_colour(theme):
    base, scale = colour.THEMES[theme], colour.scale(theme)
    for index, shade in scale.items():
        assert colour.contrast(base["ink"], shade) >= 4.5, (index, shade)
    for ground in ("paper", "card", "ground"):
        assert colour.contrast(base["muted"], base[ground]) >= 4.5
    for mark in ("up", "down"):
        assert colour.contrast(base[mark], base["card"]) >= 3
    for side in (1, -1):
        distance = [colour.contrast(base["card"], scale[side * index]) for index in range(colour.STEPS + 1)]
        assert all(near < far for near, far in pairwise(distance))
    assert colour.contrast("#000000", "#ffffff") == pytest.approx(21)


@settings(deadline=None)
@given(st.floats(1e-6, 1e6))
def test_round_limits(size):
    limit = colour.round_up(size)
    assert size * (1 - 1e-6) <= limit <= 2.0 * size
    assert re.fullmatch(r"(1|1\.5|[234568])e[+-]\d+", f"{limit:.1e}".replace(".0e", "e"))


def test_numbers():
    assert [number(value) for value in (0.0, -0.001, 1.234, -12.34, 1234.5)] == ["0.00", "0.00", "+1.23", "\u221212.3", "+1,234"]
    assert [number(math.nan), number(2.0, sign=False)] == ["n/a", "2.00"]
    assert [short(value) for value in (4.0, -1.5, 0.0, 20.0, 300.0, -0.015)] == ["+4", "\u22121.5", "0", "+20", "+300", "\u22120.015"]
    assert [times(value) for value in (2.5, 0.4, 1.0, 0.999, 500.0)] == [
        "\u00d72.50",
        "\u00f72.50",
        "\u00d71.00",
        "\u00d71.00",
        "\u00d7500",
    ]


def test_tag_escapes_what_is_not_markup():
    assert (
        tag("p", "<b>", Html("<i></i>"), title='"', data_x=1, hidden=True, class_=None)
        == '<p title="&quot;" data-x="1" hidden>&lt;b&gt;<i></i></p>'
    )


@pytest.mark.parametrize("theme", ["auto", "light", "dark"])
def test_picture_is_svg_with_a_cell_for_each_score(tmp_path, theme):
    words = HOSTILE * 6
    path = heatmap_svg(a_reading(words), ["calm", NAMES[5]], tmp_path / "picture.svg", title="<&>", theme=theme)
    root = ElementTree.parse(path).getroot()
    rects = [element.get("class") for element in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(rects) == 1 + 2 * len(words) + (2 * colour.STEPS + 1)
    assert rects.count("sink") == 2
    words_shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words_shown[0] == "<&>"
    assert words_shown.count(NAMES[5]) == words_shown.count("calm") >= 2
    assert ("prefers-color-scheme" in path.read_text()) == (theme == "auto")
