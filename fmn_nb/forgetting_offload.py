"""The parts of a pipeline that a fine-tune needs only at its beginning wait elsewhere meanwhile.

Autoencoder and text encoders run once; then only the denoiser works. A Stable Diffusion 3 with its T5 has more weights
in its text encoders than in what is trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmn_nb.models import denoiser, text_encoders


class Absent:
    """Parts whose weights are away. `present` is a context in which they are back for a moment."""

    def __init__(self, tensors: list[Tensor], file: Path | None) -> None:
        self.tensors, self.file = tensors, file
        self.devices = [tensor.device for tensor in tensors]

    @contextmanager
    def present(self) -> Iterator[None]:
        """The parts in their place."""
        self.back()
        try:
            yield
        finally:
            self.away(again=True)

    def away(self, again: bool = False) -> None:
        """Take the weights out of memory (to the file), or off their device."""
        if self.file is not None and not again:
            named = {str(number): tensor.detach().cpu().contiguous() for number, tensor in enumerate(self.tensors)}
            save_file(named, self.file)
        for tensor in self.tensors:
            tensor.data = tensor.new_empty(0) if self.file is not None else tensor.data.to("cpu")

    def back(self) -> None:
        """Put the weights where they were, bit for bit."""
        found = load_file(self.file) if self.file is not None else {}
        for number, (tensor, device) in enumerate(zip(self.tensors, self.devices, strict=True)):
            tensor.data = found.get(str(number), tensor.data).to(device)


@contextmanager
def offloaded(pipe: DiffusionPipeline, where: str) -> Iterator[Absent]:
    """Context in which all parts but the denoiser wait in the memory of the "cpu" or on the "disk"; "" leaves them.

    Their tensors are the same objects with the same bits afterwards, also after an exception.
    """
    parts = [part for part in (getattr(pipe, "vae", None), *text_encoders(pipe)) if isinstance(part, nn.Module)]
    model = {id(tensor) for tensor in (*denoiser(pipe).parameters(), *denoiser(pipe).buffers())}
    tensors = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers()) if id(t) not in model}
    with tempfile.TemporaryDirectory(prefix="fmn-") if where == "disk" else nullcontext() as folder:
        absent = Absent(list(tensors.values()) if where else [], Path(folder, "parts.safetensors") if folder else None)
        absent.away()
        try:
            yield absent
        finally:
            absent.back()
