"""A notebook's bench: how several notebooks begin, and what they do with each figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.concepts.concept import Concept
from fmn_nb.concepts.world import World, world_of
from fmn_nb.evaluation.oracle import unfit
from fmn_nb.evaluation.session import Session
from fmn_nb.forgetting.reuse import patch_for
from fmn_nb.models.gated import is_gated
from fmn_nb.models.names import GROUNDED_ORACLE, ORACLE, UnknownModelError
from fmn_nb.models.pipelines import denoiser, load
from fmn_nb.patches.patch import Patch
from fmn_nb.runs.folder import save_image

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from matplotlib.figure import Figure

STAND_IN = "emoji", "cat"  # the model and the concept to show things on if the chosen model can't
JOINT = "emoji-joint"  # the stand-in for what is shown on joint attention
#: what a notebook may need of its model -> whether a pipeline has it
NEEDS: dict[str, Callable[[DiffusionPipeline], bool]] = {
    "judge": lambda pipe: world_of(pipe) is not None,
    "unet": lambda pipe: hasattr(pipe, "unet"),
    "joint": lambda pipe: type(denoiser(pipe)).__name__ == "FluxTransformer2DModel" and world_of(pipe) is not None,
}


@dataclass(frozen=True)
class Lesson:
    """What a notebook was asked for, and a model and concept on which it can show everything.

    Attributes:
        pipe, target, folder: the chosen model, the concept, and the run's folder.
        bench, subject: the same model and concept if the model has what the notebook needs; otherwise "cat" and a
            bundled model that has it.
        cache: the folder that keeps what the unchanged model draws, or None.
    """

    pipe: DiffusionPipeline
    target: Concept
    folder: Path
    bench: DiffusionPipeline
    subject: Concept
    cache: Path | None = None

    @property
    def on_its_own(self) -> bool:
        """Whether the chosen model itself is the bench."""
        return self.bench is self.pipe

    @cached_property
    def world(self) -> World:
        """The bench's world: its names, judges and real images."""
        return world_of(self.bench)

    def session(self, **sampling: Any) -> Session:
        """The bench with its judge, for attacks and counts; `sampling` as in `Sampling`."""
        return Session.of(self.bench, **sampling)

    def oracle(self) -> tuple[DiffusionPipeline | None, str]:
        """The bundled oracle and "" if it never learned the bench's concept; otherwise None, and why there is none."""
        try:
            pipe = load(GROUNDED_ORACLE if is_gated(denoiser(self.bench)) else ORACLE)
        except UnknownModelError as missing:
            return None, str(missing)
        reason = unfit([pipe], self.subject, self.session())
        return (None, reason) if reason else (pipe, "")

    def patch(self, preset: str, seed: int) -> Patch:
        """The bench's patch: the run's own if an earlier notebook left it, otherwise a new one."""
        return patch_for(self.bench, self.subject, self.folder, preset, seed)

    def keep(self, name: str, figure: Figure, alt: str = "") -> Figure:
        """Save a figure among the run's images, described by `alt` or by its own words, and return it to be shown.

        Raises:
            ValueError: neither `alt` nor the figure says what it shows.
        """
        save_image(self.folder, name, figure, alt=alt or getattr(figure, "words", ""))
        return figure


def lesson(model: str, concept: str = STAND_IN[1], kind: str = "object", *, out: str = "runs/notebooks",
           cache: str = "", needs: str = "judge", config: str = "") -> Lesson:
    """Load a notebook's model and find its bench.

    Args:
        cache: a folder, or "" for none.
        needs: "judge" (a world that judges what the model draws), "unet" (a U-Net whose layers can be taken apart),
            several of these with commas between them, or "joint" (a Flux of a known world).
        config: for a single file, a folder with its configuration and tokenizer, or "" for what the hub has.
    """
    pipe, target = load(model, config=config), Concept(concept, kind=kind)
    wanted = [need.strip() for need in needs.split(",")]
    if all(NEEDS[need](pipe) for need in wanted):
        bench, subject = pipe, target
    else:
        bench, subject = load(JOINT if "joint" in wanted else STAND_IN[0]), Concept(STAND_IN[1])
    return Lesson(pipe, target, Path(out), bench, subject, Path(cache) if cache else None)
