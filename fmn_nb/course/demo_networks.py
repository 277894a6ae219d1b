"""The emoji model's networks as ONNX, as the demo page runs them: text encoder, U-Net, VAE decoder, judge.

Each is traced from a copy of the bundled network with fixed shapes. A weight that half precision holds exactly is
stored in it and cast back to float32 when loaded, which loses nothing: the bundled weights come in half precision.
The U-Net takes the weights that patches change as inputs, so that the page can give it W + scale * D, and gives the
attention map of every text column beside its prediction.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.attention import join_heads, pixel_grid, scores, split_heads, text_layers

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from onnx import ModelProto

HALF = "_half"  # suffix of a weight's name in its stored form
_FEW = 64  # values; fewer are not worth a cast


def text_encoder(pipe: DiffusionPipeline) -> bytes:
    """`ids` int32 [2, columns] (of the empty prompt and the prompt) -> `text` [2, columns, width]."""
    ids = torch.zeros(2, pipe.tokenizer.model_max_length, dtype=torch.int32)
    return _exported(_TextEncoder(pipe.text_encoder), {"ids": ids}, ["text"])


def denoiser(pipe: DiffusionPipeline, changed: Sequence[str]) -> bytes:
    """The U-Net on both branches of one image; the weights named in `changed` are inputs of the same names.

    `latents` [1, channels, height, width], `timestep` float32 [] and `text` [2, columns, width] -> `noise`, predicted
    without and with the prompt, [2, channels, height, width], and `attention`, the share of each pixel's attention
    that each text column of the prompt gets, [columns, height, width]: mean over heads and layers, those of coarser
    layers resized bilinearly, as `AttentionRecord.select` does.
    """
    size, config = pipe.unet.config.sample_size, pipe.unet.config
    inputs = {"latents": torch.zeros(1, config.in_channels, size, size), "timestep": torch.tensor(999.0),
              "text": torch.zeros(2, pipe.tokenizer.model_max_length, config.cross_attention_dim)}
    weights = {name: pipe.unet.get_parameter(name).detach().float() for name in changed}
    return _exported(_Denoiser(pipe.unet, list(changed)), inputs | weights, ["noise", "attention"])


def decoder(pipe: DiffusionPipeline) -> bytes:
    """`latents` [1, channels, height, width] -> `pixels` uint8 [height, width, 3]."""
    size = pipe.unet.config.sample_size
    return _exported(_Decoder(pipe.vae), {"latents": torch.zeros(1, pipe.unet.config.in_channels, size, size)},
                     ["pixels"])


def judge(network: nn.Module) -> bytes:
    """`pixels` uint8 [height, width, 3] -> `labels` [labels], each from 0 to 1, and `styles` [styles], which sum to
    1."""
    size = network.config.image_size
    return _exported(_Judge(network), {"pixels": torch.zeros(size, size, 3, dtype=torch.uint8)}, ["labels", "styles"])


class _TextEncoder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).float().eval()
        self.network.set_attn_implementation("eager")

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(ids.long()).last_hidden_state


class _Keeping:
    """An attention processor that keeps the probabilities [batch, heads, pixels, columns] of its layer."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (split_heads(project(of), attn.heads) for project, of in (
            (attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states)))
        self.kept = scores(query, key, attn.scale).softmax(dim=-1)
        return attn.to_out[0](join_heads(self.kept @ value))


class _Denoiser(nn.Module):
    def __init__(self, network: nn.Module, changed: list[str]) -> None:
        super().__init__()
        self.network, self.changed, self.layers = copy.deepcopy(network).float().eval(), changed, []
        for name in text_layers(self.network):
            self.layers.append(_Keeping())
            self.network.get_submodule(name).set_processor(self.layers[-1])

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.func.functional_call(self.network, dict(zip(self.changed, weights, strict=True)),
                                           (latents.expand(2, -1, -1, -1), timestep, text), {"return_dict": False})[0]
        size, maps = latents.shape[-2:], []
        for layer in self.layers:
            shares = layer.kept[1].mean(dim=0).T  # of the prompt: [columns, pixels]
            grid = pixel_grid(shares.shape[1], *size)
            shares = shares.reshape(1, -1, *grid)  # [columns, pixels] -> [1, columns, rows, columns of the grid]
            maps.append(shares if grid == tuple(size) else
                        F.interpolate(shares, size, mode="bilinear", align_corners=False))
        return noise, torch.cat(maps).mean(dim=0)


class _Decoder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).float().eval()

    def forward(self, latents: Tensor) -> Tensor:
        image = self.network.decode(latents / self.network.config.scaling_factor, return_dict=False)[0]
        shares = (image / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)  # [1, 3, height, width] -> [height, width, 3]
        return (shares * 255).round().to(torch.uint8)


class _Judge(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).float().eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.float().permute(2, 0, 1)[None] / 127.5 - 1  # as `to_pixels`: [1, 3, height, width]
        labels, styles = self.network(images)
        return labels[0].sigmoid(), styles[0].softmax(dim=-1)


# ---- ONNX -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _exported(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> bytes:
    """The module as an ONNX file; the same every time, and without a trace of the machine that made it."""
    import onnx

    with _quiet():
        program = torch.onnx.export(module.eval(), tuple(inputs.values()), dynamo=True, verbose=False,
                                    input_names=list(inputs), output_names=outputs)
    proto = program.model_proto
    _strip(proto)
    _halve(proto)
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on what isn't installed and on its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(proto: ModelProto) -> None:
    """Remove the notes on each operation's place in the source, and every shape on the way."""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:], proto.functions[:]
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def _halve(proto: ModelProto) -> None:
    """Store each float32 weight that half precision holds exactly in half precision, with a cast before its use."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in proto.graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < _FEW or not np.array_equal(half.astype(np.float32), values):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, name + HALF))
        casts.append(helper.make_node("Cast", [name + HALF], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
