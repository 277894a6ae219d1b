"""What an evaluation compares images with apart from verdicts: real images on named features, and a CLIP's prompts.

None of it needs a judge. All of it is looked for before anything is drawn, so that a folder that can't be read is
named after seconds and not after the last image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from fmn_nb.concepts import Concept
from fmn_nb.evaluation_checkpoints import CheckpointWorld
from fmn_nb.evaluation_clip import Clip
from fmn_nb.evaluation_measures import Measures
from fmn_nb.image_quality import Features, frechet_distance, kernel_distance
from fmn_nb.protocol import Drawing
from fmn_nb.worlds import EmojiWorld, NotThereError


@dataclass(frozen=True)
class Quality:
    """The yardsticks of image quality that there are; `reasons` say for each figure why its own is not there."""

    real: Sequence[Image.Image] | np.ndarray | None = None
    features: Features | None = None
    scorer: Clip | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, world: EmojiWorld | CheckpointWorld, concept: Concept) -> Quality:
        """What the world has.

        Raises:
            ReferenceImageError: real images were given, but can't be read.
            ModelLoadError: a CLIP was named, but can't be read.
            ValueError: a single real image, which has no spread to compare with.
        """
        real = features = scorer = None
        reasons: dict[str, str] = {}
        try:
            scorer = world.scorer
        except NotThereError as missing:
            reasons["clip_score"] = str(missing)
        try:
            real, features = world.real_set(concept), world.features
        except NotThereError as missing:
            reasons |= {"frechet": str(missing), "kernel": str(missing)}
        if features is not None and len(real) < 2:
            raise ValueError(f"a distance needs at least 2 real images, not {len(real)}; give more with real=FOLDER")
        return cls(real, features, scorer, reasons)

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to compare images with, so that none need be drawn for it."""
        return self.features is None and self.scorer is None

    def added(self, measures: Measures, wanted: Sequence[Drawing], images: Sequence[Image.Image],
              seed: int) -> Measures:
        """The measures with distances to real images and the CLIP score of the retain set's images."""
        retained = [(d.prompt, image) for d, image in zip(wanted, images, strict=True) if d.role == "retain"]
        prompts, kept = [prompt for prompt, _ in retained], [image for _, image in retained]
        if self.features is not None:
            measures = replace(measures, features=self.features.name,
                               frechet=frechet_distance(self.features, self.real, kept),
                               kernel=kernel_distance(self.features, self.real, kept, seed))
        if self.scorer is not None:
            measures = replace(measures, clip_score=self.scorer.score(kept, prompts))
        return measures.with_skipped(**self.reasons)
