"""Learned tokens: new words for a pipeline, known to it only while they are loaded.

Each stands for one vector per text encoder beside the encoder's own table of embeddings, which is never written.
`fmn_nb.inversion` learns them from images; plain diffusers loads what `save` writes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmn_nb.files import replacing
from fmn_nb.models import text_encoders

_SUFFIXES = ("", "_2", "_3", "_4")  # of the files, and of the tokenizers' names in a pipeline


class InversionError(ValueError):
    """Inversion can't be done as asked, or went wrong; also: a file with learned tokens is damaged."""


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
        with with_tokens(pipe, self.token_names, [v.to(pipe.device) for v in self.vectors]):
            yield pipe

    def save(self, folder: str | Path) -> Path:
        """Write `learned_embeds.safetensors`, which plain `pipe.load_textual_inversion(folder)` takes.

        Further text encoders' vectors go to `learned_embeds_2.safetensors` and so on; diffusers loads each with
        its own `weight_name`, `text_encoder` and `tokenizer`. Tokens that were saved to the folder before are replaced.
        """
        files = _files(folder)
        for file, vectors in zip(files, self.vectors, strict=False):
            with replacing(file) as temporary:
                save_file({self.name: vectors.contiguous()}, temporary, {"format": "pt"})
        for file in files[len(self.vectors):]:  # of a pipeline with more text encoders
            file.unlink(missing_ok=True)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> LearnedTokens:
        """Read what `save`, or diffusers' own training script, wrote.

        Raises:
            InversionError: the file is missing, damaged, or doesn't hold one learned token.
        """
        files = _files(folder)
        found = [_read(file) for file in files if file.is_file() or file is files[0]]
        if len({name for name, _ in found}) != 1:
            raise InversionError(f"the files in {folder} hold different tokens: {', '.join(name for name, _ in found)}")
        return cls(found[0][0], tuple(vectors for _, vectors in found))


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
def with_tokens(pipe: DiffusionPipeline, names: Sequence[str], vectors: Sequence[Tensor]) -> Iterator[None]:
    """`pipe` with further tokens; its own tokenizers and embedding tables are put back afterwards."""
    tokenizers = {f"tokenizer{suffix}": getattr(pipe, f"tokenizer{suffix}", None) for suffix in _SUFFIXES}
    there = [(place, tokenizer) for place, tokenizer in tokenizers.items() if tokenizer is not None]
    with ExitStack() as stack:
        for (place, tokenizer), encoder, rows in zip(there, text_encoders(pipe), vectors, strict=True):
            table, extended = encoder.get_input_embeddings(), copy.deepcopy(tokenizer)
            if rows.shape != (len(names), table.embedding_dim):
                raise InversionError(
                    f"tokens of shape {tuple(rows.shape)} don't fit an encoder {table.embedding_dim} wide")
            extended.add_tokens(list(names))
            ids = extended.convert_tokens_to_ids(list(names))
            if ids != list(range(ids[0], ids[0] + len(names))):
                raise InversionError(f"the pipeline already knows some of the tokens {', '.join(names)}; rename them")
            stack.callback(encoder.set_input_embeddings, table)
            stack.callback(setattr, pipe, place, tokenizer)
            encoder.set_input_embeddings(_ExtendedEmbedding(table, ids[0], rows))
            setattr(pipe, place, extended)
        yield


def _files(folder: str | Path) -> list[Path]:
    return [Path(folder) / f"learned_embeds{suffix}.safetensors" for suffix in _SUFFIXES]


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
