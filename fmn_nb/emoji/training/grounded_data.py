"""Scenes with boxes as the gated layers see them: latents, captions, and the tokens of who does what, where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmn_nb.control import ACTIONS
from fmn_nb.control.grounding import ROOM
from fmn_nb.emoji.grounded_scenes import GroundedScene
from fmn_nb.emoji.training.networks import NOISE_SCHEDULE, Latents
from fmn_nb.emoji.world import OBJECTS

TOKENS = ROOM * 3  # subject, object and action of each interaction
WORDS = (*OBJECTS, *ACTIONS)
SHARED_BOX_SHARE = 0.15  # how often subject and object get the box around both, and only the action tells them apart
TIMESTEPS = NOISE_SCHEDULE["num_train_timesteps"]


@dataclass(frozen=True)
class Drawn:
    """A batch for one step: clean latents [batch, 8, 16, 16] and noise like them, timesteps [batch], the captions'
    token ids [batch, 32], and words and boxes as in `GroundedLatents`."""

    clean: Tensor
    noise: Tensor
    times: Tensor
    tokens: Tensor
    words: Tensor
    boxes: Tensor

    @property
    def there(self) -> Tensor:
        """Which tokens there are, [batch, TOKENS]."""
        return self.words >= 0

    def grounding(self, embeddings: Tensor) -> dict[str, Tensor]:
        """What the denoiser takes as `gligen`, with the tokens' embeddings [batch, TOKENS, width]."""
        return {"boxes": self.boxes, "positive_embeddings": embeddings, "masks": self.there.float()}


@dataclass
class GroundedLatents:
    """Scenes as latents with captions, and for each the tokens of its interactions.

    `words` [scenes, TOKENS] are numbers in `WORDS`, -1 where there is no token; `boxes` [scenes, TOKENS, 4] in [0, 1].
    """

    latents: Latents
    words: Tensor
    boxes: Tensor

    def draw(self, batch: int, rng: torch.Generator, even: bool = False) -> Drawn:
        """Random scenes with noise. A timestep's probability is proportional to the timestep, since high noise decides
        what stands where; if `even`, all timesteps are alike, as drawings become sharp in low noise."""
        latents = self.latents
        chosen = torch.randint(len(latents.mean), (batch,), generator=rng)
        which = torch.randint(latents.tokens.shape[1], (batch,), generator=rng)
        mean, std = latents.mean[chosen].float(), latents.std[chosen].float()
        clean = latents.scaling_factor * (mean + std * torch.randn(mean.shape, generator=rng))
        share = torch.rand(batch, generator=rng)
        times = (TIMESTEPS * (share if even else share.sqrt())).long().clamp(max=TIMESTEPS - 1)
        noise = torch.randn(clean.shape, generator=rng)
        words, boxes = self.words[chosen].long(), self.boxes[chosen]
        shared = torch.rand(batch, 1, 1, generator=rng) < SHARED_BOX_SHARE
        boxes = torch.where(shared, shared_boxes(boxes, words >= 0), boxes)
        return Drawn(clean, noise, times, latents.tokens[chosen, which].long(), words, boxes)


def token_table(scenes: Sequence[GroundedScene], seed: int) -> dict[str, Tensor]:
    """`words` and `boxes` of scenes; each interaction gets one of the `ROOM` places at random."""
    rng, number = random.Random(f"places-{seed}"), {word: index for index, word in enumerate(WORDS)}
    words = np.full((len(scenes), TOKENS), -1, dtype=np.int16)
    boxes = np.zeros((len(scenes), TOKENS, 4), dtype=np.float32)
    for row, scene in enumerate(scenes):
        for place, one in zip(rng.sample(range(ROOM), len(scene.interactions)), scene.interactions, strict=True):
            parts = ((one.subject, one.subject_box), (one.object, one.object_box), (one.action, one.between))
            for role, (word, box) in enumerate(parts):
                if word:
                    words[row, 3 * place + role], boxes[row, 3 * place + role] = number[word], box
    return {"words": torch.from_numpy(words), "boxes": torch.from_numpy(boxes)}


def shared_boxes(boxes: Tensor, there: Tensor) -> Tensor:
    """Boxes [batch, TOKENS, 4] with those of each whole interaction replaced by the one around subject and object.

    `there` [batch, TOKENS] says which tokens there are.
    """
    triples = boxes.unflatten(1, (ROOM, 3))  # [batch, ROOM, roles, 4]
    both = torch.cat([triples[:, :, :2, :2].amin(2), triples[:, :, :2, 2:].amax(2)], dim=-1)  # [batch, ROOM, 4]
    whole = there.unflatten(1, (ROOM, 3)).all(2)[..., None, None]
    return torch.where(whole, both[:, :, None], triples).flatten(1, 2)
