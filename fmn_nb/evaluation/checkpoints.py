"""The world of any other checkpoint: names from the prompt lists in `data/prompts`, a zero-shot judge, a user's images.

Only the names are bundled. What needs weights or images that weren't given is skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from fmn_nb.concepts import Concept, JudgeLike, NotThereError, Vocabulary, neutral_prompts
from fmn_nb.evaluation.clip import Clip, ClipJudge
from fmn_nb.evaluation.quality import Features, inception_features
from fmn_nb.files import data_dir
from fmn_nb.models import Images, load_images


class PromptListError(ValueError):
    """A prompt list is empty or repeats a line, or a template has no place for a name."""


class CheckpointWorld:
    """What an evaluation of a checkpoint outside the emoji world can use.

    Args:
        clip: a CLIPModel's folder or hub id, or a `Clip`; judges images if no judge is given, and scores them.
        real: real images to measure distances to: a folder, or a list of files and PIL images.
        prompts: a folder with objects.txt, styles.txt, names.txt (one name per line) and identity.txt (templates for a
            proper name, with {} in its place); None for the bundled lists.
    """

    def __init__(self, clip: str | Path | Clip | None = None, real: Images | None = None,
                 prompts: str | Path | None = None) -> None:
        self._clip, self._real = clip, real
        self.vocabulary = read_vocabulary(Path(prompts) if prompts else data_dir() / "prompts")

    @cached_property
    def scorer(self) -> Clip:
        """The user's CLIP; NotThereError if none was named."""
        if self._clip is None:
            raise NotThereError("no CLIPModel was named: give clip=FOLDER")
        return self._clip if isinstance(self._clip, Clip) else Clip.load(self._clip)

    def judge_for(self, concept: Concept) -> JudgeLike:
        """A zero-shot judge of the vocabulary and the concept; NotThereError if no CLIP was named."""
        try:
            return ClipJudge(self.scorer, concept, self.vocabulary)
        except NotThereError as missing:
            raise NotThereError("the bundled judge knows only the emoji world, and this is another model: name a "
                                "CLIPModel (clip=FOLDER) to judge without training, or give a judge") from missing

    @cached_property
    def features(self) -> Features:
        """The features that distances to real images are measured on: Inception's if it is there, or the CLIP's."""
        try:
            return inception_features()
        except NotThereError:
            if self._clip is None:
                raise
            return self.scorer.features

    def real_set(self, concept: Concept) -> list[Image.Image]:
        """The user's real images; NotThereError if none were given."""
        if self._real is None:
            raise NotThereError("no real images to compare with: give real=FOLDER")
        return load_images(self._real)

    def real_images(self, wanted: Sequence[Any]) -> list[Image.Image]:
        """NotThereError: the user's images have no names."""
        raise NotThereError("nobody knows what real images of this model's world show")

    def examples(self, name: str, kind: str) -> list[Image.Image]:
        """NotThereError: the user's images have no names."""
        raise NotThereError(f"there are no real images that are known to show {name}")

    def masked_scenes(self, concept: Concept, count: int) -> tuple[list[Image.Image], ...]:
        """NotThereError: nobody knows where things are in the user's images."""
        raise NotThereError(f"there are no images with masks of {concept.name}")

    def forget_prompts(self, concept: Concept) -> list[str]:
        """The plainest templates of the concept's kind."""
        return concept.prompts(5)

    def retain_prompts(self) -> list[str]:
        """Ordinary prompts for many things."""
        return neutral_prompts()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The names and templates of a folder's prompt lists.

    Raises:
        PromptListError: a list is missing or empty, holds a line twice, or a template lacks its {}.
    """
    lists = {}
    for name in ("objects", "styles", "names", "identity"):
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise PromptListError(f"{path} is missing: a text file with one line for each name or template")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        lists[name] = tuple(line for line in lines if line and not line.startswith("#"))
        if not lists[name] or len(set(lists[name])) != len(lists[name]):
            raise PromptListError(f"{path} is empty or repeats a line")
        wrong = [line for line in lists[name] if name == "identity" and line.count("{}") != 1]
        if wrong:
            raise PromptListError(f"{path}: {wrong[0]!r} must hold {{}} once, in the name's place")
    return Vocabulary(lists["objects"], lists["styles"], lists["names"], lists["identity"])
