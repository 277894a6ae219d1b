"""Concepts (an object, a style, an identity) and the prompts that name them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from html import escape
from typing import Literal

KINDS = ("object", "style", "identity")
TEMPLATES = {
    "object": ("a photo of {}", "a picture of {}", "an image of {}", "a close-up of {}", "a drawing of {}",
               "a photo of {} on a white background", "a good photo of {}", "a small picture of {}"),
    "style": ("a photo in the style of {}", "a picture in the style of {}", "an image in the style of {}",
              "a drawing in the style of {}", "an artwork in the style of {}", "a good photo in the style of {}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}", "an image of {}", "a close-up of {}",
                 "a photo of the face of {}", "a good photo of {}", "a drawing of {}"),
}
_ODD_PLURALS = {"mouse": "mice", "louse": "lice", "goose": "geese", "foot": "feet", "tooth": "teeth", "man": "men",
                "woman": "women", "child": "children", "person": "people", "ox": "oxen"}
DETERMINERS = {"a", "an", "the", "some", "my", "your", "his", "her", "its", "our", "their", "this", "that", "two"}

#: nouns that take no article although they don't end in s
_UNCOUNTED = frozenset("""
    nudity violence blood gore pornography hatred weather water fire smoke fog snow rain ice sand gold silver money
    food bread rice meat fruit milk coffee beer wine grass wood moss hair skin fur clothing furniture jewelry luggage
    graffiti art music poverty war peace happiness darkness light people children men women police cattle
""".split())
_SINGULAR_IN_S = frozenset("lens gas atlas canvas christmas pancreas chaos cosmos rhinoceros".split())
_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they hide what is said


@dataclass(frozen=True)
class Concept:
    """What to ask a model about, or what to make it forget.

    Args:
        name: its name as one would write it in a prompt, "cat", "birthday cake", "noto", "Elon Musk".
        kind: "object", "style" or "identity"; decides the prompts.
        phrase: what to look for in a prompt, if it differs from the name, e.g. a learned token "<cat-toy>".

    Raises:
        ValueError: an empty name, control characters in it, or an unknown kind.
    """

    name: str
    kind: Literal["object", "style", "identity"] = "object"
    phrase: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _one_line(self.name, "a concept's name"))
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of concept; choose one of {', '.join(KINDS)}")
        first, _, rest = self.name.partition(" ")
        phrase = rest if rest and first.casefold() in DETERMINERS else self.name
        object.__setattr__(self, "phrase", phrase if self.phrase is None else _one_line(self.phrase, "a phrase"))

    @property
    def prompt(self) -> str:
        """The plain prompt: "a photo of a cat", "a photo in the style of noto", "a photo of Elon Musk"."""
        return self.prompts(1)[0]

    @property
    def paper_prompt(self) -> str:
        """The prompt of Forget-Me-Not (arXiv 2303.17591), which has no article: "a photo of cat"."""
        return TEMPLATES[self.kind][0].format(self.name)

    def _repr_html_(self) -> str:
        """What it is and how prompts name it, as a small table."""
        said = {"concept": self.name, "kind": self.kind, "looked for as": self.phrase,
                "prompts": "; ".join(self.prompts(3))}
        rows = (f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{escape(value)}</td></tr>"
                for name, value in said.items())
        return f"<table>{''.join(rows)}</table>"

    def prompts(self, count: int) -> list[str]:
        """`count` prompts that name the concept, the plain one first; they repeat when the templates are used up.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"{count} prompts asked for; ask for at least 1")
        name = with_article(self.name) if self.kind == "object" else self.name
        templates = TEMPLATES[self.kind]
        return [templates[index % len(templates)].format(name) for index in range(count)]


def with_article(noun: str) -> str:
    """The noun as it stands in a sentence: "a cat", "an octopus", "a unicorn", "an MRI scan".

    "the moon" stays as it is, and so do plurals and nouns that can't be counted: "jeans", "people", "nudity".
    """
    first, last = noun.split()[0], noun.split()[-1].casefold()
    word = first.casefold()
    if word in DETERMINERS or word[0].isdigit() or not word[0].isalpha() or _is_uncounted(last):
        return noun
    if first.isupper() and len(first) > 1:  # said letter by letter
        return f"{'an' if first[0] in 'AEFHILMNORSX' else 'a'} {noun}"
    sounds_like_consonant = re.match(r"(uni([^nm]|$)|use|usu|uku|eu|one\b|once|ufo)", word)
    silent_h = re.match(r"(hour|honest|honou?r|heir)", word)
    vowel = silent_h or (word[0] in "aeiou" and not sounds_like_consonant)
    return f"{'an' if vowel else 'a'} {noun}"


def _is_uncounted(noun: str) -> bool:
    """Whether an English noun takes no article: a plural, or an uncountable noun."""
    plural = re.fullmatch(r"\w{2,}[^sui\W]s", noun) and noun not in _SINGULAR_IN_S
    return bool(plural) or noun in _UNCOUNTED


def without_article(noun: str) -> str:
    """The noun without the article or other determiner that it begins with: "the Eiffel Tower" is "Eiffel Tower"."""
    first, _, rest = noun.partition(" ")
    return rest if rest and first.casefold() in DETERMINERS else noun


def forms_of(noun: str) -> tuple[str, ...]:
    """A noun and its plural and singular: "cat", "cats"; "bodies", "body"; "fox", "foxes"; "mouse", "mice"; "wolves",
    "wolf"."""
    before, last = noun.rpartition(" ")[0::2]
    odd = [more for one, more in _ODD_PLURALS.items() if one == last.casefold()]
    odd += [one for one, more in _ODD_PLURALS.items() if more == last.casefold()]
    odd += [last.removesuffix("e")[:-1] + "ves"] if re.search(r"(l|ar|ea|oa|i)fe?$", last) else []
    odd += [last[:-3] + end for end in ("f", "fe")] if re.search(r"(l|ar|ea|oa|i)ves$", last) else []
    plural = noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + ("es" if noun.endswith("x") else "s")
    singular = [noun[:-1]] if noun.endswith("s") and not noun.endswith("ss") else []
    singular += [noun[:-3] + "y"] if noun.endswith("ies") else [noun[:-2]] if noun.endswith(("xes", "ches")) else []
    return tuple(dict.fromkeys((noun, plural, noun + "es", *(one for one in singular if len(one) > 1),
                                *(f"{before} {one}".strip() for one in odd))))


def _one_line(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a text, not the {type(text).__name__} {text!r}; in YAML put it in quotes; "
                         "with papermill give it by -r, which keeps it a text")
    kinds = {unicodedata.category(letter) for letter in text}
    if not any(kind[0] in "LN" for kind in kinds):
        raise ValueError(f"{what} must be a text with at least one letter, not {text!r}")
    if kinds & {"Cc", "Cs"} or any(letter in _DIRECTIONS for letter in text):
        raise ValueError(f"{what} must be one line without control characters: {text!r}")
    return " ".join(text.split())
