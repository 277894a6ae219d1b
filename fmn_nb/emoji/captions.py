"""Captions of scenes: varied templates with the right article."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fmn_nb.emoji.world import IDENTITIES

#: the first of each is the one that evaluation prompts use
OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "a drawing of {}", "an emoji of {}",
            "a close-up of {}", "a portrait of {}", "a good photo of {}", "an artwork of {}")
FAVOURED = 3  # so many times the weight of any other template for the one that evaluation uses
STYLE_PHRASES = ("in the style of {}", "in {} style")


def article(name: str) -> str:
    """'a' or 'an', by the first letter's sound; the world holds no exceptions such as 'hour' or 'unicorn'."""
    return "an" if name[0].lower() in "aeiou" else "a"


def noun(name: str) -> str:
    """A name as it stands in a sentence: 'a cat', 'an octopus', and bare for a proper name: 'Milo'."""
    return name if name in IDENTITIES else f"{article(name)} {name}"


def caption(names: Sequence[str], style: str | None = None, background: str | None = None,
            opening: str = OPENINGS[0], style_phrase: str = STYLE_PHRASES[0]) -> str:
    """The caption of a scene with these names, left to right: 'a photo of a cat and a frog in the style of noto'."""
    parts = [opening.format(" and ".join(noun(name) for name in names))]
    if style:
        parts.append(style_phrase.format(style))
    if background:
        parts.append(f"on a {background} background")
    return " ".join(parts)


def random_caption(names: Sequence[str], style: str | None, background: str, rng: random.Random) -> str:
    """A caption drawn from the templates; nine in ten name the style, one in three the background."""
    names = [_variant(name, rng) for name in names]
    return caption(
        names,
        style=style if style and rng.random() < 0.9 else None,
        background=background if rng.random() < 0.33 else None,
        opening=rng.choice(OPENINGS[:1] * (FAVOURED - 1) + OPENINGS),
        style_phrase=rng.choice(STYLE_PHRASES),
    )


def _variant(name: str, rng: random.Random) -> str:
    """One in four captions of an identity tells its class as well: 'Milo the cat'."""
    if name in IDENTITIES and rng.random() < 0.25:
        return f"{name} the {IDENTITIES[name].object}"
    return name
