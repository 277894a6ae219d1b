"""What a fine-tune does, as data: every setting with its meaning, and the presets.

All tuned numbers of the package's forgetting stand in this file and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

TRAINED = ("lora", "projections", "cross_attention", "denoiser")
NORMS = ("published", "mean_square", "mass")
PARTS = ("words", "later", "first_eot", "padding", "every_eot")
PROMPTS = ("paper", "plain", "varied")
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")
PRECISIONS = ("auto", "no", "bf16", "fp16")
TRACKERS = ("", "tensorboard", "wandb")


class SettingsError(ValueError):
    """An unknown preset or setting, or a value that a setting can't take."""


@dataclass(frozen=True)
class Settings:
    """Every setting of a fine-tune. `PRESETS` holds the complete sets that have a name.

    What is trained:
        train: "denoiser" (all its weights), "cross_attention" (all of its layers that look at the text),
            "projections" (only the named ones in these layers), or "lora" (low-rank factors on the named ones).
        projections: names inside such a layer, of "to_q", "to_k", "to_v", "to_out.0" (for the last two kinds).
        rank: of the LoRA.

    Re-steering loss:
        positions: which columns count as the concept: "words" (its own), "later" (words after it), "first_eot",
            "padding"; or "every_eot", each end-of-text token as the published code counts them: with a
            tokenizer that pads with it (Stable Diffusion 1.x) the padding too, else the first alone.
            A causal text encoder carries the concept into every later column.
        norm: "published" (one Frobenius norm over everything, Zhang et al., arXiv 2303.17591, as coded),
            "mean_square" (mean of squares in each layer, then the mean over layers), "mass" (the same of each
            pixel's summed attention on the concept's columns, so that their number doesn't matter).
        resteer_weight: factor of this loss.
        prompts: "paper" ("a photo of X"), "plain" (with its article), "varied" (all templates of the kind, and
            for the bundled model every style, or for a style every object).

    References:
        noise_on: "images" noises reference images, "zeros" has noise alone (an option of the published code).
        reference_count: how many to generate per concept where none are given.
        reference_steps: sampling steps of generated images (references and retain set).
        guidance: their guidance scale.
        height, width: of the images in pixels, both 0 for the pipeline's default.

    Letting go of the concept in the prediction:
        anchor_weight: factor of the mean squared difference between what is predicted for the concept's prompt and
            what the frozen model predicts for the same prompt without the concept ("a photo" for "a photo of a cat"),
            or with the reading `towards` in its place; on the same noised references. 0 for none.
        anchor_guidance: how far beyond the anchor, away from what the frozen model predicts for the concept, the
            target lies, in units of their difference (negative guidance: Gandikota et al., arXiv 2303.07345). So
            does the target of a correction's pull (`towards_weight`). Without either it is unused.

    Keeping the rest:
        retain_weight: factor of the retain term: mean squared difference to the frozen model; 0 for none.
        retain_on: compare "noise" (predictions) or "attention" (maps of all columns).
        retain_batch: prompts in each step.
        retain_count: retain images to generate; 0 takes the references' latents under other prompts instead.
        similar_share: share of the retain images whose prompts are spread densely over those most like the concept's
            and thinly over the rest; without retain images, of the batch drawn from the most similar quarter.

    Correction:
        towards_weight: factor of the pull of the concept's prompt to what the frozen model predicts for
            the prompt `towards` given to `forget` (the overshadowed reading), on images of that reading; unused
            without one, 0 for none.

    Optimiser: AdamW with `learning_rate`, `beta1`, `beta2`, `epsilon`, `weight_decay`; gradient norm clipped at
    `clip` (0: not clipped), `schedule` of the learning rate with `warmup` steps.

    Result:
        strength: factor of the finished change (see `Patch.scaled`); 1 leaves it as trained.

    Running:
        steps, batch_size (images in a step, on each process), accumulate (batches whose gradients add up).
        time_from, time_to: timesteps are drawn uniformly from this part of the schedule (0 to 1).
        stop_mass: stop when the concept's attention mass, averaged over 5 steps, is below this share of what it
            was in the first step; 0 never stops early.
        precision: "auto" follows the pipeline's dtype; "no", "bf16", "fp16" (on a GPU).
        gradient_checkpointing: trade time for memory.
        offload: where the autoencoder and the text encoders, which run only once, wait while the denoiser trains: ""
            where they are, "cpu" (to free a GPU) or "disk". A callback finds them in their place.
        checkpoint_every: steps between checkpoints (used where `forget` is given a folder for them).
        tracker, tracker_folder: an accelerate tracker ("tensorboard", "wandb", which stays offline) and its folder.
    """

    train: str = "lora"
    projections: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    rank: int = 8
    positions: tuple[str, ...] = ("words", "first_eot", "padding")
    norm: str = "mean_square"
    resteer_weight: float = 1.0
    prompts: str = "varied"
    noise_on: str = "images"
    reference_count: int = 8
    reference_steps: int = 20
    guidance: float = 4.0
    height: int = 0
    width: int = 0
    anchor_weight: float = 0.0
    anchor_guidance: float = 0.0
    retain_weight: float = 20.0
    retain_on: str = "noise"
    retain_batch: int = 8
    retain_count: int = 24
    similar_share: float = 0.5
    towards_weight: float = 10.0
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    strength: float = 1.0
    steps: int = 35
    batch_size: int = 4
    accumulate: int = 1
    time_from: float = 0.0
    time_to: float = 1.0
    stop_mass: float = 0.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    offload: str = ""
    checkpoint_every: int = 10
    tracker: str = ""
    tracker_folder: str = ""

    def __post_init__(self) -> None:
        for name in ("projections", "positions"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        _check_types(self)
        choices = {"train": TRAINED, "norm": NORMS, "prompts": PROMPTS, "noise_on": ("images", "zeros"),
                   "retain_on": ("noise", "attention"), "schedule": SCHEDULES, "precision": PRECISIONS,
                   "tracker": TRACKERS, "offload": ("", "cpu", "disk")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                there = ", ".join(item or "''" for item in allowed)
                raise SettingsError(f"{name} can't be {getattr(self, name)!r}; it is one of {there}")
        unknown = [part for part in self.positions if part not in PARTS]
        if unknown or not self.positions:
            raise SettingsError(f"positions are some of {', '.join(PARTS)}, not {', '.join(self.positions) or 'none'}")
        if not self.projections:
            raise SettingsError("projections are some of to_q, to_k, to_v, to_out.0, not none")
        _check_ranges(self)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None for the pipeline's default."""
        return (self.height, self.width) if self.height else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


_AT_LEAST_ONE = ("rank", "reference_count", "reference_steps", "retain_batch", "steps", "batch_size", "accumulate",
                 "checkpoint_every")


def _check_types(settings: Settings) -> None:
    """Exact types, so that a text or a bool never passes for a number; a whole number becomes a float."""
    for field in fields(settings):
        value, default = getattr(settings, field.name), field.default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
            object.__setattr__(settings, field.name, value)
        if type(value) is not type(default):
            raise SettingsError(f"{field.name} must be a {type(default).__name__}, not {value!r}")
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{field.name} must be texts, not {value!r}")


def _check_ranges(settings: Settings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise SettingsError(f"{field.name} must be a finite number from 0, not {value!r}")
    for name in _AT_LEAST_ONE:
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name} must be at least 1, not {getattr(settings, name)}")
    if not settings.time_from < settings.time_to <= 1:
        window = f"{settings.time_from}, {settings.time_to}"
        raise SettingsError(f"timesteps need 0 <= time_from < time_to <= 1, not {window}")
    if bool(settings.height) != bool(settings.width):
        raise SettingsError("give both height and width, or neither")
    if settings.similar_share > 1 or settings.stop_mass > 1:
        raise SettingsError("similar_share and stop_mass are shares from 0 to 1")
    if settings.beta1 >= 1 or settings.beta2 >= 1:
        raise SettingsError(f"beta1 and beta2 must be below 1, not {settings.beta1} and {settings.beta2}")
    if settings.tracker and not settings.tracker_folder:
        raise SettingsError("a tracker needs tracker_folder, the folder it writes to")


PRESETS: dict[str, Settings] = {
    # The published algorithm and defaults (SHI-Labs/Forget-Me-Not). Kept on purpose, as they are the method: no
    # retain term, and every end-of-text token counted as the concept, whatever the tokenizer pads with.
    "paper": Settings(
        train="denoiser", positions=("words", "every_eot"), norm="published", prompts="paper",
        retain_weight=0.0, towards_weight=0.0, learning_rate=2e-6, batch_size=1, reference_count=10, steps=35,
    ),
    # A small LoRA; attention re-steered away from the concept's own columns; the prediction pulled away from the
    # concept, which ends what leaks through the later columns; and a strong retain term. Found on the emoji model:
    # re-steering the later columns too made no difference there. For a large model start from a learning rate of
    # about 1e-4.
    "balanced": Settings(
        positions=("words",), norm="published", anchor_weight=2e3, anchor_guidance=1.0,
        retain_weight=4e3, retain_batch=16, retain_count=64, reference_steps=10, towards_weight=4e3,
        learning_rate=2e-2, schedule="cosine", steps=35,
    ),
}


def settings_for(preset: str | Settings, overrides: Mapping[str, Any]) -> Settings:
    """The preset's settings (or the given ones) with some of them replaced.

    Raises:
        SettingsError: the preset or a setting doesn't exist (the text lists what does), or a value is wrong.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise SettingsError(f"no preset '{preset}'; there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    known = [field.name for field in fields(Settings)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise SettingsError(f"no setting '{unknown[0]}'; there are {', '.join(known)}")
    return replace(preset, **overrides)
