"""The steering language: everything valid round-trips, and everything else is refused by name."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import NAMES, make_layer, run_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from emovec.bank import UnknownConcept
from emovec.steer import KEYS, MAX_JSON, Entry, Steering, SteeringError, load_profiles

torch.set_num_threads(1)

# --- what is accepted ---------------------------------------------------------------------------------------------

strengths = st.floats(-2, 2) | st.integers(-2, 2)
scores = st.floats(-50, 50) | st.integers(-50, 50)
scopes = st.sampled_from(["all", "prompt", "generated"])


@st.composite
def steering_values(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid value over NAMES."""
    condition = f"{draw(st.sampled_from(NAMES))} > {draw(scores)}"
    bounds = st.lists(scores, min_size=2, max_size=2).map(sorted).map(lambda pair: {"at_least": pair[0], "at_most": pair[1]})
    bound = st.one_of(bounds, scores.map(lambda z: {"at_least": z}), scores.map(lambda z: {"at_most": z}))
    action = st.one_of(
        strengths.map(lambda a: {"add": a}),
        scores.map(lambda z: {"set": z}),
        st.just({"ablate": True}),
        bound,
        st.builds(lambda a, b: a | b, strengths.map(lambda a: {"add": a}), bound),
    )
    extra = st.fixed_dictionaries({}, optional={"on": scopes, "when": st.just(condition)})
    entry = st.one_of(strengths, st.just("ablate"), st.builds(lambda a, b: a | b, action, extra))
    value: dict[str, Any] = draw(st.dictionaries(st.sampled_from(NAMES), entry))
    if draw(st.booleans()):
        value["on"] = draw(scopes)
    return value


@given(steering_values())
@settings(deadline=None)
def test_round_trip(value: dict[str, Any]) -> None:
    steering = Steering.parse(value, NAMES)
    assert Steering.parse(steering.to_dict(), NAMES) == steering == Steering.parse(steering, NAMES)
    assert Steering.from_json(json.dumps(value), NAMES) == steering == Steering.from_json(steering.to_json().encode(), NAMES)
    assert hash(steering) == hash(Steering.parse(dict(reversed(value.items())), NAMES))


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ({"calm": 0.05, "angry": -0.02}, {"angry": -0.02, "calm": 0.05}),
        ({"calm": {"add": 1}}, {"calm": 1.0}),
        ({"calm": {"ablate": True}}, {"calm": "ablate"}),
        ({"calm": {"at_least": 1, "at_most": 1}}, {"calm": {"set": 1.0}}),
        ({"calm": {"at_least": 1, "at_most": 1, "add": 0.5}}, {"calm": {"at_least": 1.0, "at_most": 1.0, "add": 0.5}}),
        ({"on": "prompt", "calm": 1, "angry": {"ablate": True, "on": "all"}}, {"angry": "ablate", "calm": {"add": 1.0, "on": "prompt"}}),
        (
            {"hostile": "ablate", "calm": {"add": 0.08, "when": "  grief-stricken>-2e-1 "}},
            {"calm": {"add": 0.08, "when": "grief-stricken > -0.2"}, "hostile": "ablate"},
        ),
        ({"calm": {"add": 0.1, "when": "at ease > .5"}}, {"calm": {"add": 0.1, "when": "at ease > 0.5"}}),
        ({"calm": np.float64(0.5), "angry": Fraction(1, 2)}, {"angry": 0.5, "calm": 0.5}),
        ({}, {}),
        (None, {}),
    ],
)
def test_canonical_form(value: Any, canonical: dict[str, Any]) -> None:
    steering = Steering.parse(value, NAMES)
    assert list(steering.to_dict().items()) == list(canonical.items())
    assert bool(steering) == bool(canonical)


def test_what_does_nothing_is_false() -> None:
    assert not Steering.parse({"calm": 0.0}, NAMES)
    assert Steering.parse({"calm": 0.0}, NAMES).row(make_layer(), "prompt") is None


# --- what is refused ----------------------------------------------------------------------------------------------

HUGE = 10**5000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([("calm", 1)], "must be an object of concepts"),
        ("calm", "must be an object of concepts, got 'calm'"),
        ({"clam": 0.1}, "entry 'clam': unknown concept 'clam'; nearest known: calm, "),
        ({"Calm": 0.1}, "unknown concept 'Calm'; nearest known: calm, "),
        ({7: 0.1}, "entry 7: a concept is named by text"),
        ({"calm": True}, """entry 'calm': expected a number, "ablate" or an object, got True"""),
        ({"calm": None}, "entry 'calm': expected a number"),
        ({"calm": "remove"}, "entry 'calm': expected a number"),
        ({"calm": [0.1]}, "entry 'calm': expected a number"),
        ({"calm": torch.ones(1)}, "entry 'calm': expected a number"),
        ({"calm": math.nan}, "entry 'calm': strength must be from -2 to 2, got nan"),
        ({"calm": math.inf}, "entry 'calm': strength must be from -2 to 2, got inf"),
        ({"calm": 2.01}, "entry 'calm': strength must be from -2 to 2, got 2.01"),
        ({"calm": HUGE}, "entry 'calm': strength must be from -2 to 2, got a huge int"),
        ({"calm": {"add": "0.1"}}, "entry 'calm': add must be a number, got '0.1'"),
        ({"calm": {"add": False}}, "entry 'calm': add must be a number, got False"),
        ({"calm": {"add": -HUGE}}, "entry 'calm': add must be from -2 to 2"),
        ({"calm": {"set": 51}}, "entry 'calm': set must be from -50 to 50, got 51"),
        ({"calm": {"at_most": math.inf}}, "entry 'calm': at_most must be from -50 to 50, got inf"),
        ({"calm": {"at_least": None}}, "entry 'calm': at_least must be a number, got None"),
        ({"calm": {"at_least": 2, "at_most": 1}}, "entry 'calm': at_least 2.0 is above at_most 1.0"),
        ({"calm": {"set": 1, "at_most": 2}}, "entry 'calm': set contradicts at_most"),
        ({"calm": {"set": 1, "add": 1}}, "entry 'calm': set contradicts add"),
        ({"calm": {"ablate": True, "add": 1}}, "entry 'calm': ablate contradicts add"),
        ({"calm": {"ablate": True, "set": 0}}, "entry 'calm': ablate contradicts set"),
        ({"calm": {"ablate": False}}, "entry 'calm': ablate must be true, got False"),
        ({"calm": {"ablate": 1}}, "entry 'calm': ablate must be true, got 1"),
        ({"calm": {}}, "entry 'calm': nothing to do; give one of add, set, at_most, at_least, ablate"),
        ({"calm": {"when": "angry > 1", "on": "prompt"}}, "entry 'calm': nothing to do"),
        ({"calm": {"atmost": 1}}, "entry 'calm': unknown key 'atmost'; nearest known: at_most, "),
        ({"calm": {"add": 1, 3: 1}}, "entry 'calm': unknown key 3; nearest known"),
        ({"calm": {"add": 1, "on": "answer"}}, "entry 'calm': on must be one of all, prompt, generated, got 'answer'"),
        ({"calm": {"add": 1, "on": ["all"]}}, "entry 'calm': on must be one of"),
        ({"calm": 1, "on": 1}, "steering: on must be one of"),
        ({"calm": {"add": 1, "when": 3}}, """entry 'calm': when must read "<concept> > <number>\""""),
        ({"calm": {"add": 1, "when": "angry >= 2"}}, "only '>' is supported), got 'angry >= 2'"),
        ({"calm": {"add": 1, "when": "angry < 2"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > nan"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "> 2"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > "}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > 1e999"}}, "the number in when must be from -50 to 50, got inf"),
        ({"calm": {"add": 1, "when": "angry > 1 and afraid > 2"}}, "unknown concept 'angry > 1 and afraid'"),
        ({"calm": {"add": 1, "when": "angr > 2"}}, "entry 'calm': unknown concept 'angr'; nearest known: angry, "),
        (
            {"calm": {"add": 1, "when": "angry > 2"}, "afraid": {"add": 1, "when": "angry > 3"}},
            "one condition per request, but 'calm' has 'angry > 2.0' and 'afraid' has 'angry > 3.0'",
        ),
    ],
)
def test_refused(value: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=re.escape(message)):
        Steering.parse(value, NAMES)


def test_unknown_concepts_are_both_errors() -> None:
    with pytest.raises(UnknownConcept):
        Steering.parse({"clam": 0.1}, NAMES)


def test_16_rules_and_not_one_more() -> None:
    names = [f"c{k:02}" for k in range(40)]
    value: dict[str, Any] = dict.fromkeys(names[:16], "ablate") | dict.fromkeys(names[20:], 0.1)
    Steering.parse(value, names)
    with pytest.raises(SteeringError, match="17 rules, more than 16: 'c16'"):
        Steering.parse(value | {"c16": {"at_most": 1}}, names)


def test_a_steering_built_by_hand_is_checked_like_any_other() -> None:
    with pytest.raises(SteeringError, match="'calm': strength must be"):
        Steering.parse(Steering((Entry("calm", add=math.nan),)), NAMES)
    with pytest.raises(SteeringError, match="'calm': unknown concept"):
        Steering.parse(Steering.parse({"calm": 1}, NAMES), ["angry"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"calm": NaN}', "'calm': strength must be"),
        ('{"calm": 1e999}', "'calm': strength must be"),
        ('{"calm": ' + "9" * 5000 + "}", "not JSON"),
        ('{"calm": 1, "calm": 2}', "duplicate key 'calm'"),
        ('{"calm": {"add": 1, "add": 2}}', "duplicate key 'add'"),
        ("[" * 50_000, "not JSON"),
        ('{"calm": ' + "[" * 900 + "]" * 900 + "}", "'calm': expected a number"),
        ('{"calm": {"add": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}}", "'calm': add must be a number"),
        (" " * (MAX_JSON + 1), f"longer than {MAX_JSON}"),
        ('{"calm": {"add": 1, "when": "' + "a" * 60_000 + '>"}}', "when must read"),
        ('{"calm": {"add": 1, "when": "angry > ' + "1" * 60_000 + 'x"}}', "when must read"),
        ('{"calm": {"add": 1, "when": "angry' + " " * 60_000 + '"}}', "when must read"),
        ('{"' + "a" * 60_000 + '": 1}', "unknown concept 'aaa"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
def test_untrusted_json(text: str | bytes, message: str) -> None:
    with pytest.raises(SteeringError, match=re.escape(message)) as error:
        Steering.from_json(text, NAMES)
    assert len(str(error.value)) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from([*NAMES, *KEYS]),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*NAMES, *KEYS]) | st.text(), inner),
    )
)
@settings(deadline=None)
def test_whatever_comes_is_parsed_or_refused(value: Any) -> None:
    try:
        steering = Steering.parse(value, NAMES)
    except SteeringError:
        return
    assert Steering.parse(steering.to_dict(), NAMES) == steering


# --- profiles -----------------------------------------------------------------------------------------------------


def test_profiles(tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text('[steady-support-agent]\ncalm = 0.05\n"at ease" = { at_least = 0.5 }\non = "generated"\n\n[nothing]\n')
    profiles = load_profiles(path, NAMES)
    assert profiles == {"steady-support-agent": {"calm": 0.05, "at ease": {"at_least": 0.5}, "on": "generated"}, "nothing": {}}
    assert Steering.parse(profiles["steady-support-agent"], NAMES).entries[1].on == "generated"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calm = ", "not TOML"),
        ("calm = 0.05", "profile 'calm': steering must be an object of concepts, got 0.05"),
        ("[a]\ncalm = nan", "profile 'a': steering entry 'calm': strength"),
        ("[a]\nclam = 0.1", "profile 'a': steering entry 'clam': unknown concept 'clam'; nearest known: calm"),
        ("[a]\ncalm = 1979-05-27", "profile 'a': steering entry 'calm': expected a number"),
    ],
)
def test_bad_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text(text)
    with pytest.raises(SteeringError, match=r"profiles\.toml: " + re.escape(message)):
        load_profiles(path, NAMES)


def test_profiles_without_names_are_still_checked(tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text("[a]\nanything = 0.1")
    assert load_profiles(path) == {"a": {"anything": 0.1}}
    path.write_text("[a]\nanything = 10")
    with pytest.raises(SteeringError, match="profile 'a': steering entry 'anything'"):
        load_profiles(path)


def test_the_docs_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("steering.md")
