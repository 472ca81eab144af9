"""Word families: what names a concept, and what only looks like it."""

from __future__ import annotations

import pytest

from emovec.extraction import corpus
from emovec.extraction.words import named, parts, related

FAMILIES = """
calm calmly calmness calmed calming
happy happily happiness unhappy happier
sad sadder sadness sadly saddened saddening
angry anger angrily angered
sarcastic sarcasm sarcastically
deceptive deception deceive deceit deceived
formal formally formality
anxious anxiety anxiously
curious curiosity
loving love loved lovingly lover
hopeful hope hopefully hoping hopes
hopeless hope hopelessness
bored boredom boring bore
terrified terror terrifying terrify
guilty guilt guiltily
proud pride proudly
enthusiastic enthusiasm
nostalgic nostalgia
indignant indignation
tense tension tensely tensed
vulnerable vulnerability
miserable misery miserably
grateful gratitude gratefully ungrateful
compassionate compassion
furious fury furiously
envious envy envied
depressed depression depressing
safe safety safely unsafe
lonely loneliness
ecstatic ecstasy
surprised surprise surprising
relieved relief relieve
ashamed shame shameful
cruel cruelty
joyful joy joyous
irritated irritation irritable
cynical cynicism cynic
"""
STRANGERS = """
sad saddle sand said
mad made madam
hope hop hops hopping
calm call calling came
happy happen happened
angry angle angel hang
formal form forms information
furious fur furs further furniture
bored board born border
bitter bit bite
guilty guild
safe safari
alert alter
hurt hurry
tense tent tens
kind kin kit
"""


def listed(text: str) -> list[tuple[str, list[str]]]:
    return [(line.split()[0], line.split()) for line in text.strip().splitlines()]


@pytest.mark.parametrize(("word", "family"), listed(FAMILIES))
def test_families(word: str, family: list[str]) -> None:
    assert [other for other in family if not related(word, other)] == []


@pytest.mark.parametrize(("word", "others"), listed(STRANGERS))
def test_strangers(word: str, others: list[str]) -> None:
    assert [other for other in others[1:] if related(word, other)] == []


def test_words_are_found_as_they_stand() -> None:
    text = "His Calmness, so un-calm a thing. Calm's the word; CALM, calm and calm\u2019s"
    assert named(text, "calm") == ["Calmness", "calm", "Calm's", "CALM", "calm\u2019s"]
    assert named("She sat by the river.", "calm", ["serene", "sitting down"]) == []
    assert named("The serenity of it.", "calm", ["serene"]) == ["serenity"]


def test_names_of_several_words() -> None:
    assert parts("at ease") == ["ease"]
    assert named("He eased himself into it; grieving.", "at ease") == ["eased"]
    assert named("Stricken with grief", "grief-stricken") == ["Stricken", "grief"]


def test_the_shipped_corpus_does_not_name_its_concepts() -> None:
    stories = corpus.stories([corpus.shipped("stories.jsonl"), corpus.shipped("messages.jsonl")])()
    assert [(story.where, leaked) for story in stories if (leaked := named(story.text, story.emotion))] == []
