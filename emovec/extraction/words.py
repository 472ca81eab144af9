"""Does a text name its concept? A check by word families: inflections and derivations, by endings, without a dictionary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NATIVE = _listed(
    "s es d ed ing r er ers est ly ful fully fulness less lessly lessness ness y ily iness ier iest ied ies ish ishly ishness dom ship "
    "some th ty en ens ened ening"
)
_LATIN = _listed(
    "al ally ality ism ist ists ic ics ical ically tic tics tically m ia iac a ate ated ates ating ation ations ion ions ive ively iveness "
    "ant antly ance ances ancy ent ently ence ences ency ous ously ousness osity ety ity ities able ably ability ible ibly ibility ment "
    "ments ify ified ifies ifying or ors ery ry uous uously etic etically y ies ied e ed es ing ce cy t"
)
_ALONE = 5  # letters of a root that is a word of the family by itself, where an ending from Latin was taken off: `cynic`, not `form`
_PREFIXES = ("un", "dis", "over", "non", "in", "im")
_IRREGULAR = (
    ("anger", "angry"),
    ("hunger", "hungry"),
    ("fury", "furious"),
    ("envy", "envious"),
    ("pride", "proud"),
    ("grief", "grieve", "grievous"),
    ("hate", "hatred"),
    ("relief", "relieve"),
    ("belief", "believe"),
    ("shame", "ashamed"),
    ("rage", "enraged", "outraged"),
    ("sleep", "asleep"),
    ("joy", "joyful", "joyous"),
    ("ease", "easy", "uneasy"),
    ("humble", "humility"),
    ("ecstasy", "ecstatic"),
    ("gratitude", "grateful"),
    ("heartbreak", "heartbroken", "heartbreaking"),
    ("fright", "afraid"),
    ("deceive", "deceit", "deceptive"),
    ("terror", "terrify", "terrified"),
    ("horror", "horrify", "horrified"),
    ("weary", "wearisome"),
    ("melancholy", "melancholic", "melancholia"),
    ("hysteria", "hysterical"),
    ("paranoia", "paranoid"),
)
_SMALL = frozenset(_listed("a an and at be by for from i in into it of off on one out over self the to up with without worked"))
_WORD = re.compile("[^\\W\\d_]+(?:['\u2019][^\\W\\d_]+)?")
_AFTER = re.compile("['\u2019].*")


def named(text: str, concept: str, synonyms: Iterable[str] = ()) -> list[str]:
    """The words of ``text`` that belong to the family of ``concept`` or of a synonym, as they stand there, each once.

    Of a concept of several words, such as `at ease`, each word's family counts but for small words. Two of a family may be missed
    (an irregular form), and a stranger may be taken for one (`hospital` for `hospitable`).

    >>> named("Her calmness annoyed him; he was not calm.", "calm")
    ['calmness', 'calm']
    """
    wanted = [part for name in (concept, *synonyms) for part in parts(name)]
    found = (match.group() for match in _WORD.finditer(text))
    return list(dict.fromkeys(word for word in found if any(related(part, word) for part in wanted)))


def parts(name: str) -> list[str]:
    """The words of a concept's name whose families name it."""
    words = [match.group().lower() for match in _WORD.finditer(name)]
    return [word for word in words if word not in _SMALL] or words


def related(word: str, other: str) -> bool:
    """Whether the two are of one family.

    >>> [related("happy", word) for word in ("Happily", "unhappiness", "happen")]
    [True, True, False]
    """
    other = _AFTER.sub("", other.lower())
    patterns = _family(word.lower())
    return any(form in patterns for form in _without_prefix(other))


def _without_prefix(word: str) -> Iterator[str]:
    yield word
    for prefix in _PREFIXES:
        if word.startswith(prefix) and len(word) >= len(prefix) + 4:
            yield word.removeprefix(prefix)


@lru_cache(maxsize=4096)
def _family(word: str) -> frozenset[str]:
    """All forms that the family of ``word`` could have, words or not."""
    bases = {word}
    if word.startswith("un") and len(word) >= 6:
        bases.add(word.removeprefix("un"))
    for base in tuple(bases):
        for group in _IRREGULAR:
            if base in group or any(base in _forms(member) for member in group):
                bases.update(group)
    return frozenset(form for base in bases for form in _forms(base))


@lru_cache(maxsize=4096)
def _forms(word: str) -> frozenset[str]:
    found = {word, *_grown(word, (*_NATIVE, *_LATIN))}
    found.update(word + word[-1] + ending for ending in ("ed", "ing", "er", "est", "y", "en", "ens", "ened", "ening"))
    if len(word) > 3 and word.endswith("y"):
        found.update(word[:-1] + ending for ending in (*_NATIVE, *_LATIN) if ending[0] == "i")
    for ending in _NATIVE:
        root = word.removesuffix(ending)
        if root == word or len(root) < (4 if ending in ("y", "s", "th", "en", "ty") else 3):
            continue
        doubled = root[-1] == root[-2]
        if (ending != "y" or not doubled) and (ending not in ("d", "r", "rs") or root[-1] == "e"):
            found.update({root, root + "e", *_grown(root, _NATIVE)})
            if ending in ("ed", "ing") and doubled:
                found.update({root[:-1], *_grown(root[:-1], _NATIVE)})
            if ending in ("ily", "iness", "ier", "iest", "ied", "ies"):
                found.add(root + "y")
    for ending in _LATIN:
        root = word.removesuffix(ending)
        if root != word and len(root) >= (_ALONE if ending == "al" else 4):
            found.update(root + ending for ending in _LATIN)
            if len(root) >= _ALONE:
                found.update((root, root + "e"))
    return frozenset(found)


def _grown(root: str, endings: Iterable[str]) -> Iterator[str]:
    """``root`` with each of ``endings``; a last e goes before a vowel."""
    for ending in endings:
        if root[-1] == "e" and ending[0] in "aeiouy":
            yield root[:-1] + ending
        if root[-1] == "e" or ending not in ("d", "r", "rs", "a", "e", "m", "t"):
            yield root + ending
