"""What a fine-tune does, as data: every setting with its meaning, and the presets.

All tuned numbers of the package's forgetting are in this file and nowhere else. It needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

#: name of a method -> the module that holds it (see `fmn_nb.forgetting.methods`)
METHODS: dict[str, str] = {name: f"fmn_nb.forgetting.methods.{name}"
                           for name in ("fmn", "redirect", "adversarial", "uce", "esd", "ca", "mace")}


@dataclass(frozen=True)
class Facts:
    """What a method needs and gives, for a table beside its results.

    Attributes:
        trains: it trains weights in steps; otherwise it solves for them.
        images: which images it learns from, "" for none. None of them must be given: the model draws them.
        retain: it can hold prompts for everything else in place; the settings say whether it does
            (`Settings.retains`).
        linear: its patch is added to the weights, so it can be scaled, added to others and given to plain diffusers (as
            a LoRA, or folded in); a network of its own beside the layers could not.
        source: where it was published.
    """

    trains: bool
    images: str
    retain: bool
    linear: bool
    source: str


#: name of a method -> what it asks for and gives
FACTS: dict[str, Facts] = {
    "fmn": Facts(True, "of the concept", True, True, "arXiv 2303.17591"),
    "redirect": Facts(True, "of the concept", True, True, "this project"),
    "adversarial": Facts(True, "of the concept", True, True, "this project"),
    "uce": Facts(False, "", True, True, "arXiv 2308.14761"),
    "esd": Facts(True, "drawn on the way, never finished", True, True, "arXiv 2303.07345"),
    "ca": Facts(True, "of what replaces it", True, True, "arXiv 2303.13516"),
    "mace": Facts(True, "of the concept, with masks", True, True, "arXiv 2403.06135"),
}

MIDDLE_ENDS = 0.7  # of the schedule: above it, `time_density` "middle" is next to 0
Part = Literal["words", "later", "first_eot", "padding", "every_eot"]
Few = Annotated[int, Field(ge=1, le=4096)]  # what goes through the model, or stands in it, at once
Many = Annotated[int, Field(ge=1, le=100_000)]  # images, or steps of one
Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Whole = Annotated[int, Field(ge=0, le=100_000)]
Pixels = Annotated[int, Field(ge=0, le=16_384)]
Number = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_as_tuple = BeforeValidator(lambda given: (given,) if isinstance(given, str)
                            else tuple(given) if isinstance(given, list) else given)


class SettingsError(ValueError):
    """An unknown preset or setting, or a value that a setting can't take."""


class Settings(BaseModel):
    """Every setting of a fine-tune. `PRESETS` holds the complete sets that have a name.

    Types are strict: a text or a bool doesn't pass for a number; a whole number becomes a float.

    The method:
        method: a name in `METHODS`; its objective trains the forget set's prompts.
        guide: what the concept gives way to, for methods with a guide: "empty" (the empty prompt), "without" (its
            prompt without it), "another" (the name of its kind that the text encoder finds most similar, and that isn't
            forgotten, too) or a word of your own; "" for nothing. A reading given to `forget` as `towards` takes
            precedence.

    What is trained:
        train: "denoiser" (all its weights), "cross_attention" (all of its layers that look at the text),
            "except_cross_attention" (all others), "projections" (only the named ones in the layers that look at the
            text), or "lora" (low-rank factors on the named ones).
        projections: names inside such a layer, of "to_q", "to_k", "to_v", "to_out.0", and for the text's own part of
            joint attention "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"; or the whole name of a linear layer
            beside them, such as "context_embedder", where a transformer takes in the text, and
            "time_text_embed.text_embedder.linear_1", where it takes in the pooled text (for the last two kinds).
        rank: the LoRA's rank.

    Re-steering loss:
        positions: which columns count as the concept: "words" (its own), "later" (words after it), "first_eot",
            "padding"; or "every_eot", each end-of-text token as the published code counts them: also the padding if the
            tokenizer pads with it (Stable Diffusion 1.x), otherwise only the first.
            A causal text encoder carries the concept into every later column.
        norm: "published" (one Frobenius norm over everything, Zhang et al., arXiv 2303.17591, as coded),
            "mean_square" (mean of squares in each layer, then the mean over layers), "mass" (the same of each
            pixel's summed attention on the concept's columns, so that their number doesn't matter).
        resteer_weight: factor of this loss, or of whatever objective the method has.
        wording: the prompts' wording: "paper" ("a photo of X"), "plain" (with an article), "varied" (all templates of
            the kind, and for a model of a known world the contexts in which it learned the concept).

    References:
        noise_on: "images" noises reference images, "zeros" has noise alone (an option of the published code),
            "guide" noises images of the guide's prompts, "trajectories" takes the steps on the way from noise to an
            image when the frozen model draws the concept with guidance, each with its timestep; they are made once, and
            every step draws from them.
        reference_count: how many images (or trajectories) to generate per concept if none are given.
        scenes: take scenes with exact masks from the model's world as references, if it has such a world and no
            references are given; attention then counts only where the concept is.
        reference_steps: sampling steps of generated images (references and retain set).
        guidance: the guidance scale of these images.
        height, width: the images' size in pixels, both 0 for the pipeline's default.

    Letting go of the concept in the prediction:
        anchor_weight: factor of the mean squared difference between what is predicted for the concept's prompt and
            what the frozen model predicts for the same prompt without the concept ("a photo" for "a photo of a cat"),
            or with the reading `towards` in its place; on the same noised references. 0 for none.
        anchor_guidance: how far beyond the anchor, away from what the frozen model predicts for the concept, the
            target lies, in units of their difference (negative guidance: Gandikota et al., arXiv 2303.07345). It also
            moves the targets of a correction's pull (`towards_weight`), of the method "esd" and, for what layers
            write, of "redirect". Without any of these it is unused.

    Keeping the rest:
        retain_weight: factor of the retain term: mean squared difference to the frozen model's predictions; 0 for none.
        retain_batch: prompts in each step.
        retain_count: retain images to generate; 0 takes the references' latents under the retain prompts instead.
        similar_share: share of the retain images whose prompts lie densely among those most similar to the concept's
            and thinly among the rest.

    Correction:
        towards_weight: factor of the pull of the concept's prompt to what the frozen model predicts for
            the prompt `towards` given to `forget` (the overshadowed reading), on images of that reading; unused
            without one, 0 for none.

    Closed forms (methods "uce" and "mace", which say what these weigh):
        tokens: which of the concept's columns to edit: the "last" of its own, or that one and all "later" ones.
        erase_scale: weight of an edited embedding.
        preserve_scale: weight of a kept embedding, one of the retain prompts' columns; 0 for none.
        ridge: weight of the change's own square.
        null_space: confine the change to directions in which the kept embeddings' root mean square is smaller than this
            share of that in their largest direction (after SPEED, arXiv 2503.07392); 0 for no confinement.

    For single methods:
        prior_weight: weight of the ordinary training loss on the images of the guide ("ca").
        rounds, round_steps, probe_steps: for "adversarial": rounds of erasing and probing, the steps of each round's
            erasure, and the steps of each textual inversion.

    Optimiser: AdamW (betas 0.9 and 0.999, epsilon 1e-8) with `learning_rate` and `weight_decay`; gradient norm clipped
    at `clip` (0: not clipped), `schedule` of the learning rate with `warmup` steps.

    Running:
        steps, batch_size (images in a step).
        time_from, time_to: the part of the schedule, in [0, 1], that timesteps come from (there are 1000, from 0).
        time_density: "uniform", or "middle": as sigma(.05 (t - 200)) - sigma(.05 (t - 400)) of 1000, where an object
            takes form (Lu et al., arXiv 2403.06135).
        stop_mass: stop when the concept's attention mass, averaged over 5 steps, is below this share of what it
            was in the first step; 0 never stops early.
        precision: "auto" follows the pipeline's dtype; "no", "bf16", "fp16" (on a GPU).
        gradient_checkpointing: trade time for memory.
        offload: where the autoencoder and the text encoders, which run only once, wait while the denoiser trains: ""
            (where they are), "cpu" (to free a GPU) or "disk". A callback finds them back in place.
        checkpoint_every: steps between checkpoints (used if `forget` gets a folder for them).

    Raises:
        SettingsError: each invalid value, and why it is invalid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: str = "fmn"
    guide: str = ""
    train: Literal["lora", "projections", "cross_attention", "except_cross_attention", "denoiser"] = "lora"
    projections: Annotated[tuple[str, ...], _as_tuple] = ("to_q", "to_k", "to_v", "to_out.0")
    rank: Few = 8
    positions: Annotated[tuple[Part, ...], _as_tuple] = ("words", "first_eot", "padding")
    norm: Literal["published", "mean_square", "mass"] = "mean_square"
    resteer_weight: Number = 1.0
    wording: Literal["paper", "plain", "varied"] = "varied"
    noise_on: Literal["images", "zeros", "guide", "trajectories"] = "images"
    scenes: bool = False
    reference_count: Many = 8
    reference_steps: Many = 20
    guidance: Number = 4.0
    height: Pixels = 0
    width: Pixels = 0
    anchor_weight: Number = 0.0
    anchor_guidance: Number = 0.0
    retain_weight: Number = 20.0
    retain_batch: Few = 8
    retain_count: Whole = 24
    similar_share: Share = 0.5
    towards_weight: Number = 10.0
    tokens: Literal["last", "later"] = "last"
    erase_scale: Number = 1.0
    preserve_scale: Number = 0.0
    ridge: Number = 0.5
    null_space: Share = 0.0
    prior_weight: Number = 1.0
    rounds: Whole = 4
    round_steps: Many = 20
    probe_steps: Many = 60
    learning_rate: Number = 1e-3
    weight_decay: Number = 0.01
    clip: Number = 1.0
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "constant"
    warmup: Whole = 0
    steps: Steps = 35
    batch_size: Few = 4
    time_from: Share = 0.0
    time_to: Share = 1.0
    time_density: Literal["uniform", "middle"] = "uniform"
    stop_mass: Share = 0.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    offload: Literal["", "cpu", "disk"] = ""
    checkpoint_every: Steps = 10

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            told = []
            for found in error.errors():  # each as a sentence: the setting's name, what it may be, and what it is
                said, name = found["msg"].removeprefix("Value error, "), ".".join(map(str, found["loc"]))
                told.append(f"{name} {said.removeprefix('Input ')}, not {found['input']!r}" if name else said)
            raise SettingsError("; ".join(told)) from None

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if self.method not in METHODS:
            raise ValueError(f"there is no method '{self.method}'; there are {', '.join(METHODS)}")
        if not self.positions or not self.projections:
            raise ValueError("positions and projections must each name at least one")
        if not self.time_from < self.time_to:
            raise ValueError(f"timesteps need time_from < time_to, not {self.time_from} and {self.time_to}")
        if bool(self.height) != bool(self.width):
            raise ValueError("give both height and width, or neither")
        if self.method == "adversarial" and self.noise_on != "images":
            raise ValueError("method 'adversarial' inverts images of the concept: it needs noise_on='images'")
        if self.method == "ca" and self.noise_on == "trajectories" and self.prior_weight:
            raise ValueError("method 'ca' with a prior_weight needs noise that it knows: noise_on='guide', or "
                             "prior_weight=0")
        if self.method == "mace" and self.null_space:
            raise ValueError("method 'mace' fuses its change by weights, which a null space doesn't survive: set "
                             "preserve_scale instead of null_space")
        if self.time_density == "middle" and (self.time_from > MIDDLE_ENDS or self.noise_on == "trajectories"):
            raise ValueError("time_density='middle' draws timesteps around the middle of the schedule: it needs "
                             f"time_from at most {MIDDLE_ENDS}, and noise that isn't on trajectories, which have "
                             "timesteps of their own")
        if not self.guide and (self.method not in ("fmn", "adversarial") or self.noise_on == "guide"):
            raise ValueError(f"method '{self.method}' with noise_on='{self.noise_on}' needs a guide: 'empty', "
                             "'without', 'another' or a word")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None for the pipeline's default."""
        return (self.height, self.width) if self.height else None

    @property
    def retains(self) -> bool:
        """Whether prompts for everything else are held in place, so that such prompts are needed."""
        solves = self.preserve_scale > 0 or self.null_space > 0
        return (FACTS[self.method].trains and self.retain_weight > 0) or (self.method in ("uce", "mace") and solves)

    @property
    def learns_from_references(self) -> bool:
        """Whether images of the concept are what a fine-tune noises."""
        return FACTS[self.method].trains and self.noise_on == "images"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Settings at their defaults are left out if they came with other methods and the method
        is "fmn", or if they belong to "adversarial" and the method doesn't: earlier files stay comparable."""
        same = {name for name in _OF_OTHERS if self.method == "fmn" and getattr(self, name) == _DEFAULTS[name].default}
        return self.model_dump(mode="json", exclude=same | (set() if self.method == "adversarial" else _OF_ADVERSARIAL))


_DEFAULTS = Settings.model_fields
_OF_OTHERS = ("guide", "tokens", "erase_scale", "preserve_scale", "ridge", "null_space", "prior_weight",
              "time_density", "scenes")
_OF_ADVERSARIAL = {"rounds", "round_steps", "probe_steps"}
_KEYS_AND_VALUES = ("to_k", "to_v")
_NOTHING_ELSE: dict[str, Any] = {"retain_weight": 0.0, "towards_weight": 0.0}  # no term beside the objective
_BALANCED: dict[str, Any] = {
    "positions": ("words",), "norm": "published", "anchor_weight": 2e3, "anchor_guidance": 1.0, "retain_weight": 4e3,
    "retain_batch": 16, "retain_count": 64, "reference_steps": 10, "towards_weight": 4e3, "learning_rate": 2e-2,
    "schedule": "cosine", "steps": 35,
}
_ESD: dict[str, Any] = {
    "method": "esd", "guide": "another", "noise_on": "trajectories", "anchor_guidance": 1.0, **_NOTHING_ELSE,
    "reference_count": 64, "guidance": 3.0, "weight_decay": 0.0, "clip": 0.0, "batch_size": 8, "steps": 100,
}
_ESD_AND_RETAIN: dict[str, Any] = {**_ESD, "reference_count": 32, "retain_weight": 1.0, "retain_batch": 8,
                                   "retain_count": 64}

PRESETS: dict[str, Settings] = {
    # The published algorithm and defaults (SHI-Labs/Forget-Me-Not). Kept on purpose, as they are the method: no
    # retain term, and every end-of-text token counted as the concept, whatever the tokenizer pads with.
    "paper": Settings(
        train="denoiser", positions=("words", "every_eot"), norm="published", wording="paper",
        retain_weight=0.0, towards_weight=0.0, learning_rate=2e-6, batch_size=1, reference_count=10, steps=35,
    ),
    # A combination: attention re-steered away from the concept's own columns, in a small LoRA; the prediction pulled
    # away from the concept (`anchor_weight`), which erases most and ends what leaks through the later columns; and a
    # strong retain term. Found on the emoji model: re-steering the later columns too made no difference there. For a
    # large model start from a learning rate of about 1e-4.
    "balanced": Settings(**_BALANCED),
    # Attention erasure that stands alone: each cross-attention layer learns to write for the concept's prompt what it
    # wrote without the concept, and as far again beyond; no prediction is pulled anywhere but by the retain term. Found
    # on the emoji model (data/results/tuning/resteer.csv), where a norm of attention, or of what the concept's own
    # columns write, erased at best one of "cat" and "twemoji" with the same settings. Keys and values alone do as well;
    # queries and keys alone erase the object and not the style, and so does `anchor_guidance` 0: unnamed, the model
    # draws "twemoji" in 10 of 24 images. For a large model start from a learning rate of about 1e-4.
    "resteer": Settings(
        method="redirect", guide="without", positions=("words",), anchor_guidance=1.0,
        retain_weight=1e3, retain_batch=8, retain_count=64, reference_steps=10, towards_weight=0.0,
        learning_rate=2e-2, schedule="cosine", steps=35,
    ),
    # Forgetting with an adversary in the loop: "balanced" against a pool of what attacks find, and then once more with
    # all of it. The numbers beside the rounds are those of "balanced", with twice its batch for the finds.
    "adversarial": Settings(**{**_BALANCED, "method": "adversarial", "batch_size": 8, "steps": 60}),
    # The methods beside it, each with what is published of it in its own file: the best by mean H of 20 trials of each
    # on one object and one style (data/results/tuning-methods), and of equals the first. For every method the best
    # guide was another name of the kind, also where the paper has the empty prompt.
    "uce": Settings(method="uce", guide="another", projections=_KEYS_AND_VALUES, tokens="later", erase_scale=10.0,
                    preserve_scale=1.0),
    "esd-x": Settings(**_ESD, learning_rate=5e-4),
    "esd-u": Settings(**_ESD, learning_rate=3e-4, train="except_cross_attention"),
    # Forgetting that withstands attacks on the text, found on one object and one style (data/results/tuning-robust):
    # ESD's target in all weights, so that a learned word finds little to draw, and the rest held in place.
    "robust": Settings(**_ESD_AND_RETAIN, train="denoiser", learning_rate=3e-4),
    # Forgetting where text and image attend to each other, as in Flux and Stable Diffusion 3, found on the joint model
    # with one object and one style (data/results/tuning-joint). There, what trains attention's projections alone erases
    # the object and hardly the style. So this trains ESD's target, the rest held in place, into the two layers that
    # take in the text: its columns, and the pooled vector, which passes all attention by.
    "joint": Settings(**_ESD_AND_RETAIN, projections=("context_embedder", "time_text_embed.text_embedder.linear_1"),
                      learning_rate=5e-3),
    "ca": Settings(
        method="ca", guide="another", noise_on="guide", train="projections", projections=_KEYS_AND_VALUES,
        **_NOTHING_ELSE, reference_count=64, reference_steps=10, learning_rate=5e-4, clip=0.0, batch_size=8, steps=100,
    ),
    "mace": Settings(
        method="mace", guide="another", rank=1, projections=_KEYS_AND_VALUES, **_NOTHING_ELSE, scenes=True,
        positions=("words", "first_eot"), preserve_scale=1.0, time_density="middle", learning_rate=3e-3, batch_size=1,
        steps=50,
    ),
}


def settings_for(preset: str | Settings, overrides: Mapping[str, Any]) -> Settings:
    """The preset's settings (or the given ones) with some of them replaced.

    Raises:
        SettingsError: the preset or a setting doesn't exist (the text lists what does), or a value is wrong.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise SettingsError(f"no preset '{preset}'{_hint(preset, PRESETS)}; there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if not isinstance(preset, Settings):
        raise SettingsError(f"preset is a name or Settings, not {preset!r}; there are {', '.join(PRESETS)}")
    for name in overrides:
        if name not in Settings.model_fields:
            hint = _hint(name, [*Settings.model_fields, "preset", "seed", "callback", "checkpoint", "references"])
            raise SettingsError(f"no setting '{name}'{hint}; there are {', '.join(Settings.model_fields)}")
    return Settings(**{**dict(preset), **overrides})


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
