"""What the emoji world holds: the names of its objects, styles, identities and ambiguous words, and its captions.

Names only, no pixels and no heavy imports, so that a command can check a concept's name at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fmn_nb.concepts import Vocabulary, with_article

IMAGE_SIZE = 64  # pixels, height and width of a scene
LATENT_SIZE = 16  # pixels, height and width of its latents
MAX_TOKENS = 32  # the text encoder's number of positions
#: object name in captions -> name of the drawing in the emoji sets; the same name by default
OBJECTS: dict[str, str] = {name: name.replace(" ", "-") for name in (
    "cat", "dog", "frog", "penguin", "fish", "octopus", "butterfly", "banana", "watermelon", "pineapple", "strawberry",
    "mushroom", "cactus", "sunflower", "hamburger", "birthday cake", "car", "sailboat", "rocket", "house", "guitar",
    "umbrella", "alarm clock", "crown",
)} | {"cat": "cat-face", "dog": "dog-face", "car": "automobile"}
#: style name in captions -> npm package that holds the set
STYLES: dict[str, str] = {
    "noto": "@iconify-json/noto",
    "classic": "@iconify-json/noto-v1",
    "twemoji": "@iconify-json/twemoji",
    "emojione": "@iconify-json/emojione",
    "fluent": "@iconify-json/fluent-emoji",
    "contrast": "@iconify-json/fluent-emoji-high-contrast",
}


@dataclass(frozen=True)
class Identity:
    """A proper name bound to one drawing: the miniature of a person's name."""

    name: str
    drawing: str
    style: str
    object: str  # the class it belongs to, one of OBJECTS


IDENTITIES: dict[str, Identity] = {one.name: one for one in (
    Identity("Milo", "black-cat", "noto", "cat"),
    Identity("Luna", "cat", "twemoji", "cat"),
    Identity("Bruno", "poodle", "noto", "dog"),
    Identity("Rex", "guide-dog", "twemoji", "dog"),
)}


@dataclass(frozen=True)
class Reading:
    """One of the two meanings of an ambiguous word."""

    phrase: str  # says this reading and no other: "computer mouse"
    drawing: str
    share: float  # of the captions with the bare word


#: ambiguous word -> its dominant and its overshadowed reading; models draw mice more often than the captions say, so
#: that these say fewer
AMBIGUOUS: dict[str, tuple[Reading, Reading]] = {
    "mouse": (Reading("wild mouse", "mouse-face", 0.75), Reading("computer mouse", "computer-mouse", 0.25)),
    "bow": (Reading("ribbon bow", "ribbon", 0.85), Reading("archery bow", "bow-and-arrow", 0.15)),
    "bat": (Reading("wild bat", "bat", 0.85), Reading("cricket bat", "cricket-game", 0.15)),
}
#: background name in captions -> RGB, 0 to 255
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "blue": (183, 214, 240),
    "green": (193, 228, 190),
    "yellow": (250, 236, 175),
    "pink": (248, 203, 214),
    "purple": (213, 200, 238),
    "gray": (214, 214, 214),
}
READINGS: tuple[str, ...] = tuple(r.phrase for pair in AMBIGUOUS.values() for r in pair)
#: what the judge can see in a scene: objects, then readings of ambiguous words, then identities
LABELS: tuple[str, ...] = (*OBJECTS, *READINGS, *IDENTITIES)

#: the first of each is the one that evaluation prompts use
OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "a drawing of {}", "an emoji of {}",
            "a close-up of {}", "a portrait of {}", "a good photo of {}", "an artwork of {}")
FAVOURED = 3  # how many times the weight of any other template the evaluation's own template has
STYLE_PHRASES = ("in the style of {}", "in {} style")

VOCABULARY = Vocabulary(
    tuple(OBJECTS), tuple(STYLES), tuple(IDENTITIES), OPENINGS, world="emoji",
    classes={name: one.object for name, one in IDENTITIES.items()},
    readings={word: tuple(reading.phrase for reading in pair) for word, pair in AMBIGUOUS.items()},
)


def caption(names: Sequence[str], style: str | None = None, background: str | None = None,
            opening: str = OPENINGS[0], style_phrase: str = STYLE_PHRASES[0]) -> str:
    """The caption of a scene with these names, left to right: 'a photo of a cat and a frog in the style of noto'."""
    things = [name if name in IDENTITIES else with_article(name) for name in names]
    parts = [opening.format(" and ".join(things))]
    if style:
        parts.append(style_phrase.format(style))
    if background:
        parts.append(f"on a {background} background")
    return " ".join(parts)


def random_caption(names: Sequence[str], style: str | None, background: str, rng: random.Random) -> str:
    """A caption from random templates; nine in ten name the style, one in three the background.

    One in four captions of an identity also tells its class: 'Milo the cat'.
    """
    names = [f"{name} the {IDENTITIES[name].object}" if name in IDENTITIES and rng.random() < 0.25 else name
             for name in names]
    return caption(
        names,
        style=style if style and rng.random() < 0.9 else None,
        background=background if rng.random() < 0.33 else None,
        opening=rng.choice(OPENINGS[:1] * (FAVOURED - 1) + OPENINGS),
        style_phrase=rng.choice(STYLE_PHRASES),
    )
