"""Textual inversion: learn a few new tokens that stand for what reference images show.

Only the tokens' own embeddings change (Gal et al., arXiv 2208.01618): the denoising loss on the references, with "a
photo of <token>" as the prompt, has a gradient for these vectors alone. Forget-Me-Not uses such tokens for concepts
that words describe badly; attacks use them to see whether a concept can be brought back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite

import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fmn_nb.attention import as_encoded
from fmn_nb.concepts import TEMPLATES
from fmn_nb.models import (
    Conditions,
    Images,
    Latents,
    MixedPrecision,
    Noising,
    Stream,
    conditions,
    denoiser,
    denoising_loss,
    encode,
    evaluating,
    load_images,
    noisy_batch,
    seeded,
    text_encoders,
    tokenized_encoders,
    tokenizers,
    without_gradients,
)
from fmn_nb.patches import InversionError, LearnedTokens, with_tokens


@dataclass(frozen=True)
class InversionSettings:
    """How tokens are learned. The defaults are those of the published code (SHI-Labs/Forget-Me-Not, stage 1).

    Attributes:
        tokens: how many vectors.
        steps, learning_rate, warmup, weight_decay, batch_size: AdamW, constant after the warm-up.
        norm: the length that each vector is moved to after every step: a number (0.4 in the published code),
            "vocabulary" for the mean length of the model's own tokens, or "free" to leave it.
        varied: use all templates of the kind in turn instead of only the first.
    """

    tokens: int = 4
    steps: int = 500
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    batch_size: int = 1
    norm: float | str = "vocabulary"
    varied: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InversionError(f"{name} must be a whole number from 1, not {getattr(self, name)!r}")
        if self.norm not in ("vocabulary", "free") and not (isinstance(self.norm, (int, float)) and self.norm > 0):
            raise InversionError(f"norm is a positive number, 'vocabulary' or 'free', not {self.norm!r}")
        numbers = self.learning_rate, self.weight_decay, self.warmup
        if not all(isinstance(x, (int, float)) and isfinite(x) and x >= 0 for x in numbers):
            raise InversionError("learning_rate, weight_decay and warmup must be finite numbers from 0")


def invert(pipe: DiffusionPipeline, references: Images | Latents, *, kind: str = "object", name: str = "<concept>",
           initial: str | None = None, seed: int = 0, settings: InversionSettings | None = None,
           callback: Callable[[int, float], None] | None = None,
           size: tuple[int, int] | None = None) -> LearnedTokens:
    """Learn tokens from reference images. The pipeline is unchanged afterwards, also when this raises.

    Args:
        references: a folder, a list of files or PIL images, or latents already encoded.
        kind: "object", "style" or "identity": which prompt templates the token stands in.
        name: the new token, in angle brackets, not yet known to the pipeline.
        initial: words to start from, without special tokens. Their embeddings go to the tokens in order (averaged if
            there are more words than tokens); the remaining tokens start at random.
        seed: the seed of everything random.
        callback: called with (step from 1, loss).
        size: (height, width) of the references in pixels; None for the pipeline's own.

    Raises:
        InversionError: an unusable name, kind or setting, or the loss became NaN or infinite.
        ReferenceImageError: the images can't be read.
        UnsupportedPipelineError: how this model's training adds noise is unknown.
    """
    settings = settings or InversionSettings()
    names = [name, *(f"{name}_{number}" for number in range(1, settings.tokens))]
    if not re.fullmatch(r"<[\w-]+>", name):
        raise InversionError(f"a learned token's name is letters in angle brackets, like <toy>, not '{name}'")
    known = [one for one in names if any(one in tokenizer.get_vocab() for tokenizer in tokenizers(pipe))]
    if known:
        raise InversionError(f"the pipeline already knows a token '{known[0]}'; choose another name")
    if name not in as_encoded(pipe, name):
        raise InversionError(f"{type(pipe).__name__} cleans its prompts, and of '{name}' it leaves "
                             f"'{as_encoded(pipe, name)}': choose a name in small letters; if none stays, this "
                             "pipeline can't read learned tokens")
    if kind not in TEMPLATES:
        raise InversionError(f"'{kind}' is not a kind of concept; choose one of {', '.join(TEMPLATES)}")
    Noising(pipe)  # a model that can't be trained is refused before anything is encoded
    latents = references if isinstance(references, Latents) else encode(pipe, load_images(references), size)
    generator = seeded(seed, Stream.INVERSION)
    start = _starting_vectors(pipe, initial, settings.tokens, generator)
    vectors = [nn.Parameter(vector.to(denoiser(pipe).device)) for vector in start]
    prompts = [template.format(name) for template in TEMPLATES[kind][:None if settings.varied else 1]]
    parts = (denoiser(pipe), *text_encoders(pipe))

    def prompted(step: int, like: Conditions | None) -> Conditions:
        return conditions(pipe, [prompts[step % len(prompts)]], size=size, with_gradient=True, like=like)

    with with_tokens(pipe, names, vectors), evaluating(*parts), without_gradients(*parts), torch.enable_grad():
        losses = _learn(pipe, latents, prompted, vectors, settings, generator, callback)
    learned = tuple(vector.detach().cpu().clone() for vector in vectors)
    return LearnedTokens(name, learned, tuple(losses), {"settings": asdict(settings), "seed": seed, "kind": kind})


def _learn(pipe: DiffusionPipeline, latents: Latents, prompted: Callable[[int, Conditions | None], Conditions],
           vectors: list[nn.Parameter], settings: InversionSettings, generator: torch.Generator,
           callback: Callable[[int, float], None] | None) -> list[float]:
    """The training loop; changes `vectors` and returns the losses. `prompted` encodes a step's prompt, like earlier."""
    model, noising, losses = denoiser(pipe), Noising(pipe), []
    tables = [encoder.get_input_embeddings().weight for _, _, encoder in tokenized_encoders(pipe)]
    lengths = [float(table.float().norm(dim=-1).mean()) if settings.norm == "vocabulary" else float(settings.norm)
               for table in tables if settings.norm != "free"]
    optimizer = torch.optim.AdamW(vectors, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=settings.warmup)
    given, precision = None, MixedPrecision.of(model)
    for step in range(settings.steps):
        given = prompted(step, given)
        index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        batch = noisy_batch(latents, index, generator, (0, noising.steps))
        loss = denoising_loss(model, noising, batch, given, torch.zeros_like(index))
        if not torch.isfinite(loss):
            raise InversionError(f"the loss became {float(loss)} in step {step + 1}; lower learning_rate")
        precision.backward(loss)
        precision.step(optimizer)
        schedule.step()
        share = min(1.0, 100 * schedule.get_last_lr()[0])
        with torch.no_grad():  # every vector's length moves `share` of the way to the wanted one, its direction stays
            for vector, wanted in zip(vectors, lengths, strict=False):
                now = vector.norm(dim=-1, keepdim=True)
                vector.mul_((now + share * (wanted - now)) / now.clamp_min(1e-12))
        losses.append(float(loss.detach()))
        if callback is not None:
            callback(step + 1, losses[-1])
    return losses


def _starting_vectors(pipe: DiffusionPipeline, initial: str | None, count: int,
                      generator: torch.Generator) -> list[Tensor]:
    """For each text encoder [count, width] in float32: the words' embeddings first, then random ones."""
    vectors = []
    for _, tokenizer, encoder in tokenized_encoders(pipe):
        words = encoder.get_input_embeddings()
        table = words.weight.detach().float().cpu()
        ids = tokenizer(initial or "", add_special_tokens=False)["input_ids"]
        ids = [number for number in ids if number not in tokenizer.all_special_ids]
        if initial and not ids:
            raise InversionError(f"the initial words '{initial}' hold no token but special ones; give ordinary words")
        spread = torch.randn(count, table.shape[1], generator=generator) * table.std(0) + table.mean(0)
        groups = torch.tensor(ids, dtype=torch.long).tensor_split(min(count, len(ids))) if ids else ()
        for place, group in enumerate(groups):  # called, since learned tokens stand beside the table
            spread[place] = words(group.to(encoder.device)).detach().float().cpu().mean(0)
        vectors.append(spread)
    return vectors
