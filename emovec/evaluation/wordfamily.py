"""Whether a text names its emotion: the word itself, or a word made from the same stem."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
# fmt: off
_ENDINGS = (
    "fulness", "iveness", "ousness", "lessness", "ations", "ation", "ments", "ment", "nesses", "ness", "ities", "ity", "ables", "able",
    "ible", "fully", "ously", "ively", "ingly", "edly", "ions", "ion", "ful", "ous", "ive", "ing", "ely", "ily", "ies", "ied", "ant", "ent",
    "ance", "ence", "al", "ic", "ly", "er", "est", "ed", "es", "en", "or", "y", "e", "s",
)
# fmt: on
_KIN = {
    "afraid": ("fear", "fright"),
    "angry": ("anger",),
    "anxious": ("anxiet",),
    "bored": ("boredom", "boring"),
    "ecstatic": ("ecstas",),
    "envious": ("envy", "envie"),
    "furious": ("fury",),
    "grief-stricken": ("grief", "griev"),
    "guilty": ("guilt",),
    "hateful": ("hate", "hatred"),
    "horrified": ("horror", "horrif"),
    "joyful": ("joy",),
    "lazy": ("lazi",),
    "loving": ("love", "lovin"),
    "melancholy": ("melanchol",),
    "miserable": ("misery",),
    "mystified": ("mystif", "myster"),
    "nostalgic": ("nostalgi",),
    "proud": ("pride",),
    "terrified": ("terror", "terrif"),
    "vengeful": ("vengeance", "revenge"),
}
"""Kindred words that share no stem with the concept's."""

_LEAST = 4  # letters of a stem
_MORE = 6  # letters that a kindred word may have beyond the stem


def stem(word: str) -> str:
    """``word`` without its endings, at least four letters of it."""
    word = word.lower()
    for _ in range(2):
        ending = next((ending for ending in _ENDINGS if word.endswith(ending) and len(word) - len(ending) >= _LEAST), "")
        word = word.removesuffix(ending) if ending else word
    return word[:-1] if len(word) > _LEAST and word[-1] == word[-2] else word


def named(emotion: str, text: str) -> list[str]:
    """The words of ``text`` that name ``emotion`` or belong to its family, in their order.

    A concept of several words is named where they occur together. Errs on the side of finding too much.

    >>> named("calm", "She calmly rinsed the cup."), named("proud", "His pride was hurt."), named("at ease", "He felt at ease.")
    (['calmly'], ['pride'], ['at ease'])
    """
    lowered = text.lower()
    if " " in emotion:
        return [match[0] for match in re.finditer(rf"\b{re.escape(emotion.lower())}\b", lowered)]
    stems = [stem(emotion.replace("-", " ").split()[0]), *_KIN.get(emotion, ())]
    return [word for word in _WORD.findall(lowered) if any(word.startswith(part) and len(word) <= len(part) + _MORE for part in stems)]
