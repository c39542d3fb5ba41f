"""English inflection for the recipe's phrases: verb forms, plurals and articles.

The rules cover regular words; the tables below hold the irregular ones among the words that `classes/*.csv` use.
"""

from __future__ import annotations

import re

__all__ = ["base_form", "gerund", "plural", "with_article"]

_BASE = {"is": "be", "are": "be", "has": "have", "have": "have", "does": "do", "goes": "go"}
_PLURALS = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "man": "men",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "sheep": "sheep",
    "swine": "swine",
    "wolf": "wolves",
    "woman": "women",
    "calf": "calves",
    "hoof": "hooves",
}
# Verbs of two syllables that double their last consonant, and what looks like one syllable but must not double.
_DOUBLED = {"hiccup": False, "unzip": True, "rev": True, "hum": True, "quiz": True}
_AN = re.compile(r"(?:[aeio]|u(?!ni|ku|s[ei]|r[io])|x-|x\b|slr\b|r&b|hour|8-bit)", re.IGNORECASE)


def base_form(verb: str) -> str:
    """Base form of a verb in the present tense: "barks" and "bark" give "bark"."""
    if verb in _BASE:
        return _BASE[verb]
    if verb.endswith("ss") or not verb.endswith("s"):
        return verb
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    if re.search(r"(?:ss|sh|ch|x|zz|o)es$", verb):
        return verb[:-2]
    return verb[:-1]


def _doubles(base: str) -> bool:
    if base in _DOUBLED:
        return _DOUBLED[base]
    last = base.rsplit("-", 1)[-1]
    return re.fullmatch(r"[^aeiou]*(?:qu)?[aeiou][bdglmnprtv]", last) is not None


def gerund(base: str) -> str:
    """The -ing form."""
    if base == "be":
        return "being"
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and not re.search(r"(?:ee|oe|ye)$", base):
        return base[:-1] + "ing"
    if _doubles(base):
        return base + base[-1] + "ing"
    return base + "ing"


def plural(noun: str) -> str:
    """Plural of a noun phrase that ends in its noun: "small dog" gives "small dogs"."""
    *before, noun = noun.split(" ")
    if noun in _PLURALS:
        ending = _PLURALS[noun]
    elif re.search(r"(?:s|sh|ch|x|z)$", noun):
        ending = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        ending = noun[:-1] + "ies"
    else:
        ending = noun + "s"
    return " ".join([*before, ending])


def with_article(noun: str) -> str:
    """A noun phrase with "a" or "an"."""
    return ("an " if _AN.match(noun) else "a ") + noun
