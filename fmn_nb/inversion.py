"""Textual inversion: learn a few new tokens that stand for what reference images show.

Nothing in the model changes but the tokens' own embeddings (Gal et al., arXiv 2208.01618): the denoising loss on the
references, with "a photo of <token>" as the prompt, is followed back to these vectors alone. Forget-Me-Not uses such
tokens where words describe a concept badly; the evaluation uses them to see whether a concept can be brought back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.concepts import TEMPLATES
from fmn_nb.denoising import Noising, conditions, predict, seeded
from fmn_nb.files import replacing
from fmn_nb.models import denoiser, text_encoders, tokenizers
from fmn_nb.references import Images, Latents, encode, load_images

_NAME = re.compile(r"<[\w-]+>")
_MOST_ENCODERS = 4


class InversionError(ValueError):
    """Inversion can't be done as asked, or went wrong; also: a file with learned tokens is damaged."""


@dataclass(frozen=True)
class InversionSettings:
    """How tokens are learned. The defaults are those of the published code (SHI-Labs/Forget-Me-Not, stage 1).

    Attributes:
        tokens: how many vectors.
        steps, learning_rate, warmup, weight_decay, batch_size: AdamW, constant after the warm-up.
        norm: what each vector's length is drawn to after every step: a number (0.4 in the published code), or
            "vocabulary" for the mean length of the model's own tokens, or "free" to leave it.
        varied: use all templates of the kind in turn instead of the first alone.
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
        if not all(isfinite(x) and x >= 0 for x in (self.learning_rate, self.weight_decay, self.warmup)):
            raise InversionError("learning_rate, weight_decay and warmup must be finite numbers from 0")


@dataclass(frozen=True, eq=False)
class LearnedTokens:
    """New tokens: write `name` in a prompt and the pipeline reads all of them.

    Attributes:
        name: such as "<toy>"; with several vectors it stands for "<toy> <toy>_1 <toy>_2", in this numeric order.
        vectors: one tensor [tokens, width] for each text encoder of the pipeline, in their order.
        losses: the denoising loss of every step.
        info: settings, seed and kind.
    """

    name: str
    vectors: tuple[Tensor, ...]
    losses: tuple[float, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def token_names(self) -> list[str]:
        """The single tokens, in order."""
        return [self.name, *(f"{self.name}_{number}" for number in range(1, len(self.vectors[0])))]

    @contextmanager
    def loaded(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Context in which `pipe` knows the tokens; afterwards it is exactly as before."""
        with _with_tokens(pipe, self.token_names, [v.to(pipe.device) for v in self.vectors]):
            yield pipe

    def save(self, folder: str | Path) -> Path:
        """Write `learned_embeds.safetensors`, which plain `pipe.load_textual_inversion(folder)` takes.

        Further text encoders' vectors go to `learned_embeds_2.safetensors` and so on; diffusers loads each with
        its own `weight_name`, `text_encoder` and `tokenizer`. Tokens that were saved to the folder before are replaced.
        """
        for number, vectors in enumerate(self.vectors):
            with replacing(Path(folder) / _file_name(number)) as temporary:
                save_file({self.name: vectors.contiguous()}, temporary, {"format": "pt"})
        for number in range(len(self.vectors), _MOST_ENCODERS):  # of a pipeline with more text encoders
            (Path(folder) / _file_name(number)).unlink(missing_ok=True)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> LearnedTokens:
        """Read what `save`, or diffusers' own training script, wrote.

        Raises:
            InversionError: the file is missing, damaged, or doesn't hold one learned token.
        """
        files = [Path(folder) / _file_name(number) for number in range(_MOST_ENCODERS)]
        found = [_read(file) for file in files if file.is_file() or file is files[0]]
        if len({name for name, _ in found}) != 1:
            raise InversionError(f"the files in {folder} hold different tokens: {', '.join(name for name, _ in found)}")
        return cls(found[0][0], tuple(vectors for _, vectors in found))


def invert(
    pipe: DiffusionPipeline,
    references: Images | Latents,
    *,
    kind: str = "object",
    name: str = "<concept>",
    initial: str | None = None,
    seed: int = 0,
    settings: InversionSettings | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> LearnedTokens:
    """Learn tokens from reference images. The pipeline is unchanged afterwards, also when this raises.

    Args:
        references: a folder, a list of files or PIL images, or latents already encoded.
        kind: "object", "style" or "identity": which prompt templates the token stands in.
        name: the new token, in angle brackets, not yet known to the pipeline.
        initial: words to start from; special tokens are never among them. Their embeddings are shared out over the
            tokens in order (averaged where there are more words than tokens); remaining tokens start at random.
        seed: of everything random.
        callback: called with (step from 1, loss).

    Raises:
        InversionError: an unusable name, kind or setting, or the loss became NaN or infinite.
        ReferenceImageError: the images can't be read.
    """
    settings = settings or InversionSettings()
    names = [name, *(f"{name}_{number}" for number in range(1, settings.tokens))]
    _check_names(pipe, names)
    if kind not in TEMPLATES:
        raise InversionError(f"'{kind}' is no kind of concept; choose one of {', '.join(TEMPLATES)}")
    latents = references if isinstance(references, Latents) else encode(pipe, load_images(references))
    generator = seeded(seed, 20)
    start = _starting_vectors(pipe, initial, settings.tokens, generator)
    vectors = [nn.Parameter(vector.to(denoiser(pipe).device)) for vector in start]
    templates = TEMPLATES[kind] if settings.varied else TEMPLATES[kind][:1]
    with _with_tokens(pipe, names, vectors), _nothing_else_trained(pipe), torch.enable_grad():
        prompts = [template.format(name) for template in templates]
        losses = _learn(pipe, latents, prompts, vectors, settings, generator, callback)
    learned = tuple(vector.detach().cpu().clone() for vector in vectors)
    return LearnedTokens(name, learned, tuple(losses), {"settings": asdict(settings), "seed": seed, "kind": kind})


def _learn(
    pipe: DiffusionPipeline, latents: Latents, prompts: Sequence[str], vectors: list[nn.Parameter],
    settings: InversionSettings, generator: torch.Generator, callback: Callable[[int, float], None] | None,
) -> list[float]:
    """The training loop; changes `vectors` and returns the losses."""
    model, noising, losses = denoiser(pipe), Noising(pipe), []
    lengths = [_target_length(encoder, settings.norm) for encoder in text_encoders(pipe)]
    optimizer = torch.optim.AdamW(vectors, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=settings.warmup)
    given = None
    for step in range(settings.steps):
        given = conditions(pipe, [prompts[step % len(prompts)]], with_gradient=True, like=given)
        index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        shape = (settings.batch_size, *latents.mean.shape[1:])
        clean = latents.sample(index, torch.randn(shape, generator=generator))
        noise = torch.randn(shape, generator=generator)
        times = torch.randint(noising.steps, (settings.batch_size,), generator=generator)
        noisy = noising.noisy(clean, noise, times).to(model.device)
        predicted = predict(model, noisy, times, given, torch.zeros_like(index))
        loss = F.mse_loss(predicted.float(), noising.target(clean, noise, times).to(model.device))
        if not torch.isfinite(loss):
            raise InversionError(f"the loss became {float(loss)} in step {step + 1}; lower learning_rate")
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _draw_to_length(vectors, lengths, min(1.0, 100 * schedule.get_last_lr()[0]))
        losses.append(float(loss.detach()))
        if callback is not None:
            callback(step + 1, losses[-1])
    return losses


@torch.no_grad()
def _draw_to_length(vectors: Sequence[Tensor], lengths: Sequence[float | None], share: float) -> None:
    """Move every vector's length `share` of the way to the wanted one, its direction kept."""
    for vector, wanted in zip(vectors, lengths, strict=True):
        if wanted is not None:
            now = vector.norm(dim=-1, keepdim=True)
            vector.mul_((now + share * (wanted - now)) / now.clamp_min(1e-12))


def _target_length(encoder: nn.Module, norm: float | str) -> float | None:
    if norm == "free":
        return None
    if norm == "vocabulary":
        return float(encoder.get_input_embeddings().weight.float().norm(dim=-1).mean())
    return float(norm)


def _starting_vectors(
    pipe: DiffusionPipeline, initial: str | None, count: int, generator: torch.Generator
) -> list[Tensor]:
    """For each text encoder [count, width] in float32: the words' embeddings first, then random ones."""
    vectors = []
    for tokenizer, encoder in _pairs(pipe):
        table = encoder.get_input_embeddings().weight.detach().float().cpu()
        ids = tokenizer(initial or "", add_special_tokens=False)["input_ids"]
        ids = [number for number in ids if number not in tokenizer.all_special_ids]
        if initial and not ids:
            raise InversionError(f"the initial words '{initial}' hold no token but special ones; give ordinary words")
        spread = torch.randn(count, table.shape[1], generator=generator) * table.std(0) + table.mean(0)
        groups = torch.tensor(ids, dtype=torch.long).tensor_split(min(count, len(ids))) if ids else ()
        for place, group in enumerate(groups):
            spread[place] = table[group].mean(0)
        vectors.append(spread)
    return vectors


class _ExtendedEmbedding(nn.Embedding):
    """An embedding table with further rows that are looked up beside it; the table itself is shared, not copied."""

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight)
        self.weight = table.weight
        self.first, self._beside = first, (table, rows)  # in a tuple: no part of this module, nor of its state

    def forward(self, ids: Tensor) -> Tensor:
        table, rows = self._beside  # the table may be an extended one itself: contexts can be nested
        place = ids - self.first
        new = (place >= 0) & (place < len(rows))
        known = table(ids.masked_fill(new, 0))
        learned = rows.to(known)[place.clamp(0, len(rows) - 1)]
        return torch.where(new[..., None], learned, known)


@contextmanager
def _with_tokens(pipe: DiffusionPipeline, names: Sequence[str], vectors: Sequence[Tensor]) -> Iterator[None]:
    """`pipe` with further tokens; its own tokenizers and embedding tables are put back afterwards."""
    with ExitStack() as stack:
        for (place, tokenizer), encoder, rows in zip(_places(pipe), text_encoders(pipe), vectors, strict=True):
            table, extended = encoder.get_input_embeddings(), copy.deepcopy(tokenizer)
            if rows.shape != (len(names), table.embedding_dim):
                raise InversionError(
                    f"tokens of shape {tuple(rows.shape)} don't fit an encoder {table.embedding_dim} wide")
            extended.add_tokens(list(names))
            ids = extended.convert_tokens_to_ids(list(names))
            if ids != list(range(ids[0], ids[0] + len(names))):
                raise InversionError(f"the pipeline already knows some of the tokens {', '.join(names)}; rename them")
            first = ids[0]
            stack.callback(encoder.set_input_embeddings, table)
            stack.callback(setattr, pipe, place, tokenizer)
            encoder.set_input_embeddings(_ExtendedEmbedding(table, first, rows))
            setattr(pipe, place, extended)
        yield


@contextmanager
def _nothing_else_trained(pipe: DiffusionPipeline) -> Iterator[None]:
    """No parameter of the pipeline requires a gradient, and all run in evaluation mode; both are put back."""
    parts = [denoiser(pipe), *text_encoders(pipe)]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.requires_grad_(False).eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, flag in modes:
            module.training = flag


def _places(pipe: DiffusionPipeline) -> list[tuple[str, Any]]:
    names = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
    return [(name, getattr(pipe, name)) for name in names if getattr(pipe, name, None) is not None]


def _pairs(pipe: DiffusionPipeline) -> Iterator[tuple[Any, nn.Module]]:
    return zip(tokenizers(pipe), text_encoders(pipe), strict=True)


def _check_names(pipe: DiffusionPipeline, names: Sequence[str]) -> None:
    if not _NAME.fullmatch(names[0]):
        raise InversionError(f"a learned token's name is letters in angle brackets, like <toy>, not '{names[0]}'")
    known = [name for name in names if any(name in tokenizer.get_vocab() for tokenizer in tokenizers(pipe))]
    if known:
        raise InversionError(f"the pipeline already knows a token '{known[0]}'; choose another name")


def _file_name(number: int) -> str:
    return f"learned_embeds{f'_{number + 1}' if number else ''}.safetensors"


def _read(file: Path) -> tuple[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            content: Mapping[str, Tensor] = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InversionError(f"{file} can't be read as learned tokens: {error}") from error
    if len(content) != 1:
        raise InversionError(f"{file} holds {len(content)} tensors; learned tokens are one")
    name, vectors = next(iter(content.items()))
    if vectors.ndim == 0 or vectors.numel() == 0:
        raise InversionError(f"{file} holds '{name}' of shape {tuple(vectors.shape)}; learned tokens are vectors")
    return name, vectors.float().reshape(-1, vectors.shape[-1])
