"""What the judge says of the base model's drawings, kept in a file: they don't depend on any patch.

Most prompts of a concept's retain set are those of the next concept's, so each is drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from PIL import Image

from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Verdict
from fmn_nb.evaluation_images import draw_images
from fmn_nb.evaluation_measures import JudgeLike, judge_images
from fmn_nb.files import read_json, write_json
from fmn_nb.protocol import Drawing


class BaseVerdicts:
    """Verdicts on the base model's drawings by prompt and seed, in one JSON file that grows.

    Args:
        made_from: what the verdicts depend on beside prompt and seed (model, judge, sampling steps); a file made from
            something else is begun anew.
    """

    def __init__(self, file: Path, made_from: dict[str, Any]) -> None:
        self.file, self.made_from = file, made_from
        self._known: dict[str, list] = {}
        if file.is_file():
            stored = read_json(file)
            if stored.get("made_from") == made_from:
                self._known = stored["verdicts"]

    def __len__(self) -> int:
        return len(self._known)

    def of(self, pipe: DiffusionPipeline, judge: JudgeLike, wanted: Sequence[Drawing], **options: Any) -> list[Verdict]:
        """A verdict on each drawing; `pipe`, without a patch, draws what isn't known yet (`draw_images`, `options`)."""
        missing = [d for d in dict.fromkeys(wanted) if _key(d) not in self._known]
        if missing:
            images = draw_images(pipe, missing, **options)
            for drawing, verdict in zip(missing, judge.verdicts(images), strict=True):
                self._known[_key(drawing)] = _to_json(verdict)
            write_json(self.file, {"made_from": self.made_from, "verdicts": self._known})
        return [_from_json(self._known[_key(drawing)]) for drawing in wanted]


class Answers:
    """A judge that has judged already: it repeats its verdicts in their order."""

    def __init__(self, found: Sequence[Verdict]) -> None:
        self.found = list(found)

    def verdicts(self, images: Sequence[Image.Image] | np.ndarray) -> list[Verdict]:
        """The verdicts; there must be one for each image."""
        if len(images) != len(self.found):
            raise ValueError(f"{len(self.found)} verdicts for {len(images)} images")
        return self.found


def outcomes_of(verdicts: Sequence[Verdict], concept: Concept, wanted: Sequence[Drawing]) -> pd.DataFrame:
    """The rows of `judge_images` for verdicts that are there already."""
    return judge_images(Answers(verdicts), concept, wanted, np.zeros((len(wanted), 1, 1, 3), np.uint8))


def _key(drawing: Drawing) -> str:
    return f"{drawing.seed}|{drawing.prompt}"


def _to_json(verdict: Verdict) -> list:
    return [verdict.label, verdict.style, sorted(verdict.seen), round(verdict.probability, 6)]


def _from_json(stored: list) -> Verdict:
    label, style, seen, probability = stored
    return Verdict(label, style, frozenset(seen), probability)
