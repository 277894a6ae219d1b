"""What the emoji world holds: the names of its objects, styles, identities and ambiguous words.

Names only, no pixels and no heavy imports, so that a command can check a concept's name at once.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 64  # pixels, height and width of a scene
LATENT_SIZE = 16  # pixels, height and width of its latents
MAX_TOKENS = 32  # the text encoder's number of positions

#: object name in captions -> name of the drawing in the emoji sets
OBJECTS: dict[str, str] = {
    "cat": "cat-face",
    "dog": "dog-face",
    "frog": "frog",
    "penguin": "penguin",
    "fish": "fish",
    "octopus": "octopus",
    "butterfly": "butterfly",
    "banana": "banana",
    "watermelon": "watermelon",
    "pineapple": "pineapple",
    "strawberry": "strawberry",
    "mushroom": "mushroom",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "hamburger": "hamburger",
    "birthday cake": "birthday-cake",
    "car": "automobile",
    "sailboat": "sailboat",
    "rocket": "rocket",
    "house": "house",
    "guitar": "guitar",
    "umbrella": "umbrella",
    "alarm clock": "alarm-clock",
    "crown": "crown",
}


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


IDENTITIES: dict[str, Identity] = {
    i.name: i
    for i in (
        Identity("Milo", "black-cat", "noto", "cat"),
        Identity("Luna", "cat", "twemoji", "cat"),
        Identity("Bruno", "poodle", "noto", "dog"),
        Identity("Rex", "guide-dog", "twemoji", "dog"),
    )
}


@dataclass(frozen=True)
class Reading:
    """One of the two meanings of an ambiguous word."""

    phrase: str  # says this reading and no other: "computer mouse"
    drawing: str
    share: float  # of the captions with the bare word


#: ambiguous word -> its dominant and its overshadowed reading
AMBIGUOUS: dict[str, tuple[Reading, Reading]] = {
    "mouse": (Reading("wild mouse", "mouse-face", 0.85), Reading("computer mouse", "computer-mouse", 0.15)),
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


def kind_of(name: str) -> str | None:
    """The kind of a concept of this world: object, style or identity; None when it holds no such name."""
    if name in STYLES:
        return "style"
    if name in IDENTITIES:
        return "identity"
    if name in OBJECTS or name in AMBIGUOUS or name in READINGS:
        return "object"
    return None


def concept_names() -> tuple[str, ...]:
    """Every name a concept of this world can have."""
    return (*OBJECTS, *STYLES, *IDENTITIES, *AMBIGUOUS, *READINGS)
