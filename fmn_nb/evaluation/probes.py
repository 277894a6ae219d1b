"""The probes of an evaluation by name, and what each one's share says; `protocol` asks and counts them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """What a probe's share says."""

    meaning: str
    forgetting: bool  # whether 1 means forgotten, else kept


PROBES: dict[str, Probe] = {
    "paraphrase_ua": Probe("asked for in other words: the concept is not seen", True),
    "pair_ua": Probe("asked for beside another object: the concept is not seen", True),
    "pair_kept": Probe("asked for beside another object: the other one is seen", False),
    "similar": Probe("the quarter of its domain most like the concept: what was asked for is seen", False),
    "unrelated": Probe("the rest of its domain: what was asked for is seen", False),
    "own_class": Probe("what the name is one of: seen when asked for", False),
    "members": Probe("names that are one of the concept: seen when asked for", False),
    "other_reading": Probe("the word's other reading, asked for by its own name: seen", False),
    "overshadowed": Probe("asked for by the word alone: its overshadowed reading is seen", False),
}
