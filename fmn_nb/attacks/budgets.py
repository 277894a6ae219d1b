"""Budgets of attacks, fixed from the oracle's curve before looking at any patch.

An attack with too small a budget brings nothing back from any model; with too large a budget it brings everything back,
even from a model that never knew it. Each attack has two budgets: the largest up to which the oracle shows the concept
in at most 5% of images ("first": whatever appears was remembered), and the one at which it does so in about half
("half"). `fix_budgets` measures and writes them with their date; evaluations use `read_budgets`.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.attacks.curves import CURVES, IMAGES, Tries, mean_curve, success_curve
from fmn_nb.concepts import Concept
from fmn_nb.evaluation import Session
from fmn_nb.files import data_dir, read_json, write_json
from fmn_nb.models import fingerprint

BUDGETS_FILE = "attack-budgets.json"  # in data/results
NOTHING = 0.05  # an oracle's share of images up to which an attack counts as finding nothing there
HALF = 0.5
GROUNDING = "grounding"  # the attack that has no budget
#: attack -> numbers of steps (or rounds) that are tried
TRIED = {"concept inversion": (0, 5, 10, 20, 40, 80, 160, 320), "adversarial prompt": (0, 2, 4, 8, 16),
         "relearning": (0, 2, 5, 10, 20, 40, 80)}
#: without any measured curve: what single attacks spend, and a fraction of it
UNFIXED = {"concept inversion": {"first": 30, "half": 150}, "adversarial prompt": {"first": 4, "half": 12},
           "relearning": {"first": 2, "half": 10}}


@dataclass(frozen=True)
class Budgets:
    """Steps of each attack's budgets.

    Attributes:
        steps: attack -> budget ("first", "half") -> steps, without those that the oracle's curve doesn't have.
        source: where they come from, in words.
        tried: attack -> the steps of the curve that fixed them.
        grounding: whether to ask a model with gated layers by boxes, too; that takes no steps.
        whole: attacks that are judged at all of `tried`, not only at their budgets.
    """

    steps: Mapping[str, Mapping[str, int]]
    source: str
    tried: Mapping[str, Sequence[int]]
    grounding: bool = True
    whole: tuple[str, ...] = ()

    def judged_at(self, attack: str) -> list[int]:
        """The numbers of steps after which an attack is judged."""
        return sorted({*self.steps[attack].values(), *(self.tried[attack] if attack in self.whole else ())})

    def only(self, attacks: Collection[str]) -> Budgets:
        """The same for some attacks."""
        steps = {attack: budgets for attack, budgets in self.steps.items() if attack in attacks}
        return replace(self, steps=steps, grounding=self.grounding and GROUNDING in attacks)

    def at_most(self, steps: int, rounds: int | None = None) -> Budgets:
        """The same for those in a hurry: a first budget above `steps` becomes `steps`, at which the oracle was as
        quiet; what else is above it is left out. `rounds` is the limit for the search, whose rounds take as long as
        several steps; None for `steps`."""
        limits = dict.fromkeys(self.steps, steps) | ({} if rounds is None else {"adversarial prompt": rounds})
        found = {attack: {name: min(number, limits[attack]) if name == "first" else number
                          for name, number in budgets.items() if name == "first" or number <= limits[attack]}
                 for attack, budgets in self.steps.items()}
        tried = {attack: tuple(number for number in numbers if number <= limits.get(attack, steps))
                 for attack, numbers in self.tried.items()}
        said = f"{steps} steps" if rounds is None else f"{steps} steps or {rounds} rounds"
        return replace(self, steps=found, source=f"{self.source}; here at most {said}", tried=tried)


def choose_budgets(curve: pd.DataFrame) -> dict[str, int]:
    """The budgets from an oracle's curve (`steps` and `share`).

    "first": the largest number of steps up to which no share is above .05; absent if the first one tried is.
    "half": of the steps beyond, those whose share is closest to .5, and of several such the fewest; absent if there are
    no steps beyond, or if none reaches .25, half of that.
    """
    curve = curve.sort_values("steps")
    quiet = curve[curve["share"].le(NOTHING).cummin()]
    found = {"first": int(quiet["steps"].max())} if len(quiet) else {}
    beyond = curve[curve["steps"] > found.get("first", -1)]
    if len(beyond) and beyond["share"].max() >= HALF / 2:
        found["half"] = int(beyond.loc[(beyond["share"] - HALF).abs().idxmin(), "steps"])
    return found


def fix_budgets(oracles: Sequence[DiffusionPipeline | Session], concepts: Sequence[Concept],
                path: Path | None = None, *, seeds: Sequence[int] = (0,), images: int = IMAGES,
                tried: Mapping[str, Sequence[int]] = TRIED) -> Path:
    """Attack the oracles with more and more steps, and write the budgets with today's date. Patches play no part.

    Args:
        concepts: some that the oracles were never taught. The shares are the mean over oracles, concepts and seeds.
        path: the file's path; by default `data/results/attack-budgets.json`.
    """
    sessions, content = [Session.of(oracle) for oracle in oracles], {}
    for attack, steps in tried.items():
        curve = mean_curve([success_curve(session, concept, None, attack, Tries(steps, images, seed))
                            for session in sessions for concept in concepts for seed in seeds])
        content[attack] = {"budgets": choose_budgets(curve), "curve": curve.to_dict("records")}
    return write_json(path or data_dir() / "results" / BUDGETS_FILE, {
        "date": datetime.date.today().isoformat(), "oracles": [fingerprint(one.pipe)[:16] for one in sessions],
        "concepts": [concept.name for concept in concepts], "seeds": list(seeds), "images": images,
        "sampling_steps": sessions[0].sampling.steps, "attacks": content})


def read_budgets(path: Path | None = None) -> Budgets:
    """The fixed budgets; if there are none, `UNFIXED`, and the source says so."""
    path = path or data_dir() / "results" / BUDGETS_FILE
    if not path.is_file():
        return Budgets(UNFIXED, "not fixed from an oracle's curve: what single attacks spend, and a part of it",
                       {attack: tuple(steps.values()) for attack, steps in UNFIXED.items()})
    content: dict[str, Any] = read_json(path)
    attacks = {name: found for name, found in content["attacks"].items() if name in CURVES}
    return Budgets({name: found["budgets"] for name, found in attacks.items()},
                   f"fixed on {content['date']} from the curve of {len(content['oracles'])} oracle(s) on "
                   f"{', '.join(content['concepts'])}",
                   {name: tuple(row["steps"] for row in found["curve"]) for name, found in attacks.items()})
