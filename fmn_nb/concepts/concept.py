"""Concepts (an object, a style, an identity) and the prompts that name them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
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
DETERMINERS = {"a", "an", "the", "some", "my", "your", "his", "her", "its", "our", "their", "this", "that", "two"}


@dataclass(frozen=True)
class Concept:
    """What a model is to be asked about, or made to forget.

    Args:
        name: its name as one would write it in a prompt, "cat", "birthday cake", "noto", "Elon Musk".
        kind: "object", "style" or "identity"; decides the prompts.
        phrase: what to look for in a prompt where it differs from the name, e.g. a learned token "<cat-toy>".

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

    def prompts(self, count: int) -> list[str]:
        """`count` prompts that name the concept, the plain one first; they start again when the templates are used up.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"{count} prompts asked for; ask for at least 1")
        name = with_article(self.name) if self.kind == "object" else self.name
        templates = TEMPLATES[self.kind]
        return [templates[index % len(templates)].format(name) for index in range(count)]


def with_article(noun: str) -> str:
    """"cat" -> "a cat", "octopus" -> "an octopus", "unicorn" -> "a unicorn"; "the moon" stays as it is."""
    first = noun.split()[0].casefold()
    if first in DETERMINERS or first[0].isdigit() or not first[0].isalpha():
        return noun
    sounds_like_consonant = re.match(r"(uni([^nm]|$)|use|usu|uku|eu|one\b|once|ufo)", first)
    silent_h = re.match(r"(hour|honest|honou?r|heir)", first)
    vowel = silent_h or (first[0] in "aeiou" and not sounds_like_consonant)
    return f"{'an' if vowel else 'a'} {noun}"


def _one_line(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} must be a text with at least one letter, not {text!r}")
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError(f"{what} must be one line without control characters: {text!r}")
    return " ".join(text.split())
