"""A slider for a patch's scale: move it and see what one prompt and one seed give. A static figure stands beside it."""

from __future__ import annotations

import ipywidgets
from diffusers import DiffusionPipeline

from fmn_nb.generation import GUIDANCE, STEPS, generate
from fmn_nb.patches import Patch
from fmn_nb.plots_evaluation import image_grid
from fmn_nb.plots_figure import as_png


class PatchScale(ipywidgets.VBox):
    """Images of some prompts under a patch at the scale that a slider says: 0 the base model, 1 the patch as trained.

    Nothing is drawn before the slider is first moved, and each scale only once. The pipeline carries the patch only
    while it draws.

    Args:
        pipe: the base model.
        patch: what to apply.
        prompts: one image each; image n has the seed `seed` + n.
        most: the slider's end; beyond 1 the patch is stronger than it was trained.

    Attributes:
        scale: the slider.
        picture: the images as PNG.
    """

    def __init__(self, pipe: DiffusionPipeline, patch: Patch, prompts: list[str], seed: int = 0, *,
                 most: float = 1.5, step: float = 0.25, steps: int = STEPS, guidance: float = GUIDANCE) -> None:
        self.pipe, self.patch, self.prompts, self.seed = pipe, patch, list(prompts), seed
        self.options = {"steps": steps, "guidance": guidance}
        self._drawn: dict[float, bytes] = {}
        self.scale = ipywidgets.FloatSlider(1.0, min=0.0, max=most, step=step, description="scale",
                                            continuous_update=False)
        self.picture = ipywidgets.Image(format="png")
        self.scale.observe(lambda change: self.show(change["new"]), "value")
        super().__init__([self.scale, self.picture])

    def show(self, scale: float) -> None:
        """Draw the prompts at a scale, or show them again."""
        if scale not in self._drawn:
            seeds = range(self.seed, self.seed + len(self.prompts))
            with self.patch.applied(self.pipe, scale=scale):
                images = generate(self.pipe, self.prompts, seeds, **self.options)
            self._drawn[scale] = as_png(image_grid(images, columns=len(images), titles=self.prompts))
        self.picture.value = self._drawn[scale]
