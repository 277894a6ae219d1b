"""Learned tokens: new words for a pipeline, known to it only while they are loaded.

Each stands for one vector per text encoder, beside the encoder's own table of embeddings, which is never written.
`fmn_nb.inversion` learns them from images; plain diffusers loads what `save` writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fmn_nb.concepts import written_out
from fmn_nb.files import write_tensors
from fmn_nb.models import digest, tokenized_encoders

_SUFFIXES = ("", "_2", "_3", "_4")  # of the files, one for each text encoder
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_NAMELESS = {"emb_params", "string_to_param", "*"}  # keys of trainers that keep the token's name elsewhere
_BY_ENCODER = (("clip_l", "clip_g", "t5xxl"), ("text_encoders_0", "text_encoders_1"))  # one file, a key an encoder


class InversionError(ValueError):
    """Inversion can't be done as asked or went wrong, or a file with learned tokens is damaged."""


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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name.split() != [self.name]:
            raise InversionError(f"a token's name is a text without blanks, like <toy>, not {self.name!r}")
        if not self.vectors or len({len(vectors) for vectors in self.vectors}) != 1:
            raise InversionError(f"the learned token '{self.name}' needs vectors, as many for each text encoder")
        if not all(torch.isfinite(vectors).all() for vectors in self.vectors):
            raise InversionError(f"the learned token '{self.name}' holds NaN or infinite values; learn it anew")

    @property
    def token_names(self) -> list[str]:
        """The single tokens, in order."""
        return [self.name, *(f"{self.name}_{number}" for number in range(1, len(self.vectors[0])))]

    @contextmanager
    def loaded(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Context in which `pipe` knows the tokens; afterwards it is exactly as before."""
        with with_tokens(pipe, self.token_names, [v.to(pipe.device) for v in self.vectors]):
            yield pipe

    def save(self, folder: str | Path) -> Path:
        """Write `learned_embeds.safetensors`, which plain `pipe.load_textual_inversion(folder)` takes.

        Vectors of other text encoders go to `learned_embeds_2.safetensors` and so on; diffusers loads each with its own
        `weight_name`, `text_encoder` and `tokenizer`. Tokens saved to the folder earlier are replaced.
        """
        files = _files(folder)
        for file, vectors in zip(files, self.vectors, strict=False):
            write_tensors(file, {self.name: vectors.contiguous()}, {"format": "pt", "sha256": digest([vectors])})
        for file in files[len(self.vectors):]:  # of a pipeline with more text encoders
            file.unlink(missing_ok=True)
        return Path(folder)

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> LearnedTokens:
        """Read what `save`, diffusers' training scripts or other trainers wrote.

        Args:
            path: a folder with `learned_embeds.safetensors` (or with a single .safetensors file), or a file.
            name: the token's name. Needed if the file has none: A1111's `emb_params`, SDXL's `clip_l` and `clip_g`.

        Raises:
            InversionError: the file is missing, pickled, damaged, without a name, or doesn't hold one learned token.
        """
        found = [_read(file) for file in _found(Path(path))]
        names = {said for said, _ in found} if name is None else {name}
        if len(names) != 1:
            raise InversionError(f"the files in {path} hold different tokens: {', '.join(said for said, _ in found)}")
        if names & {None}:
            raise InversionError(f"{path} doesn't say what its token is called; choose a name: "
                                 'LearnedTokens.load(path, name="<toy>")')
        return cls(names.pop(), tuple(vectors for _, parts in found for vectors in parts))


class _ExtendedEmbedding(nn.Embedding):
    """An embedding table with additional rows beside it; the table itself is shared, not copied."""

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


class _WritesOut:
    """Mixed into a tokenizer's class: a learned token of several vectors is read as all of them, also in pipelines that
    don't write it out themselves (Stable Diffusion 3's)."""

    def __call__(self, text: str | list[str] | None = None, *args: Any, **named: Any) -> Any:
        if isinstance(text, list):
            text = [written_out(self, one) if isinstance(one, str) else one for one in text]
        return super().__call__(written_out(self, text) if isinstance(text, str) else text, *args, **named)


@contextmanager
def with_tokens(pipe: DiffusionPipeline, names: Sequence[str], vectors: Sequence[Tensor]) -> Iterator[None]:
    """`pipe` with additional tokens; its own tokenizers and embedding tables are restored afterwards.

    Raises:
        InversionError: a name is known already, or the vectors don't fit the text encoders.
    """
    there = tokenized_encoders(pipe)
    if len(there) != len(vectors):
        raise InversionError(f"tokens for {len(vectors)} text encoders don't fit this {type(pipe).__name__}, which has "
                             f"{len(there)}")
    with ExitStack() as stack:
        for (place, tokenizer, encoder), rows in zip(there, vectors, strict=True):
            table, extended = encoder.get_input_embeddings(), copy.deepcopy(tokenizer)
            if len(names) > 1 and not isinstance(extended, _WritesOut):
                own = type(extended)
                extended.__class__ = type(own.__name__, (_WritesOut, own), {"__module__": own.__module__})
            if rows.shape != (len(names), table.embedding_dim):
                raise InversionError(
                    f"tokens of shape {tuple(rows.shape)} don't fit an encoder {table.embedding_dim} wide")
            first, read = len(extended), _reading(extended)
            known = {read(name) for name in extended.get_added_vocab()}
            extended.add_tokens(list(names))
            ids = extended.convert_tokens_to_ids(list(names))
            if ids != list(range(first, first + len(names))) or known & {*map(read, names)}:
                raise InversionError(f"the pipeline already knows some of the tokens {', '.join(names)}; rename them, "
                                     "for example with dataclasses.replace(tokens, name='<mine>')")
            for parent, name, module in _lookups(encoder, table):
                stack.callback(setattr, parent, name, module)
            stack.callback(setattr, pipe, place, tokenizer)
            encoder.set_input_embeddings(_ExtendedEmbedding(table, ids[0], rows))
            setattr(pipe, place, extended)
        yield


def _reading(tokenizer: Any) -> Callable[[str], str]:
    """A name as the tokenizer tells it from others: CLIP's reads capitals as small letters."""
    return str.lower if tokenizer.tokenize("A") == tokenizer.tokenize("a") else str


def _lookups(encoder: nn.Module, table: nn.Embedding) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, its attribute, module) of each module that looks up the table: T5 has two, which share the weight."""
    return [(parent, name, module) for parent in encoder.modules() for name, module in parent.named_children()
            if isinstance(module, nn.Embedding) and module.weight is table.weight]


def token_files(folder: str | Path) -> list[Path]:
    """The files with learned tokens that are in a folder."""
    return [file for file in _files(folder) if file.is_file()]


def token_file(folder: str | Path) -> Path:
    """Where `LearnedTokens.save` puts the first text encoder's vectors."""
    return _files(folder)[0]


def _files(folder: str | Path) -> list[Path]:
    return [Path(folder) / f"learned_embeds{suffix}.safetensors" for suffix in _SUFFIXES]


def _found(path: Path) -> list[Path]:
    """The files to read: a folder's own, its only one under another name, or the file itself."""
    path = path.expanduser()
    if path.suffix.lower() in _PICKLED and not path.is_dir():
        raise InversionError(f"{path} is pickled, which could run code, so it is not read; get it as "
                             ".safetensors, or convert it where you trust it: "
                             "save_file({name: tensor}, ...) of torch.load(..., weights_only=True)")
    if not path.is_dir():
        return token_files(path.parent) if path == token_file(path.parent) and path.is_file() else [path]
    first = token_file(path)
    if first.is_file():
        return token_files(path)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise InversionError(f"{path} holds no {first.name} and {len(others)} other files; give one of them: "
                             f"{', '.join(file.name for file in others[:5])}")
    pickled = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _PICKLED]
    return _found(pickled[0]) if pickled else [first]


def _read(file: Path) -> tuple[str | None, list[Tensor]]:
    """The token's name, or None if the file has none, and its vectors for each text encoder in the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            said = tensors.metadata() or {}
            content: Mapping[str, Tensor] = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise InversionError(f"{file} can't be read as learned tokens: {error}") from error
    for keys in _BY_ENCODER:
        if len(content) > 1 and set(content) <= set(keys):
            return None, [_vectors(file, key, content[key]) for key in keys if key in content]
    if len(content) != 1:
        raise InversionError(f"{file} holds {len(content)} tensors; learned tokens are one")
    name, vectors = next(iter(content.items()))
    if "sha256" in said and digest([vectors]) != said["sha256"]:
        raise InversionError(f"{file} is damaged or was changed: its sum is not the one it was saved with")
    return None if name in (*_NAMELESS, *_BY_ENCODER[0], *_BY_ENCODER[1]) else name, [_vectors(file, name, vectors)]


def _vectors(file: Path, name: str, vectors: Tensor) -> Tensor:
    if not vectors.is_floating_point() or vectors.ndim == 0 or vectors.numel() == 0:
        raise InversionError(f"{file} holds '{name}' of shape {tuple(vectors.shape)} and type {vectors.dtype}; learned "
                             "tokens are vectors of floating numbers")
    return vectors.float().reshape(-1, vectors.shape[-1])
