"""A start for gated layers: where to look, and what to write for a word.

Trained from random weights they learned roughly where things stand, but not what they are: exchanging all words for
others left the loss as it was. Nine tokens among up to 256 pixels get little of a pixel's attention, and the
frozen model answers only to what it knows. So each layer first learns, with its gate shut, two things that are known:

- *look*: a position inside a thing's box attends to its token, and one outside of all boxes to none;
- *write*: for a thing's token, what the block's cross-attention writes for its name, beyond the mean over names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from fmn_nb.control import Grounding
from fmn_nb.control.grounding import ROLES
from fmn_nb.emoji.training.grounded_data import GroundedLatents
from fmn_nb.emoji.training.networks import NOISE_SCHEDULE, Loss, Losses
from fmn_nb.emoji.world import caption

GAIN = 2.0  # of what is to be written, since gates are never wide open
IMAGES = 16  # noisy scenes on which cross-attention is heard
FROM, TO = 0.4, 0.9  # of the schedule: where things take form
SMALLEST = 1e-6  # share of attention: keeps a logarithm finite
Written = dict[str, Tensor]  # block -> [words, channels]


class GatedStart(nn.Module):
    """The parts of a gated U-Net that learn at the start: the position net, the vectors of roles and instances, and
    each gated layer's attention."""

    def __init__(self, unet: UNet2DConditionModel, grounding: Grounding) -> None:
        super().__init__()
        self.position_net, self.grounding = unet.position_net, grounding
        self.fusers = {name: block.fuser for name, block in unet.named_modules() if hasattr(block, "fuser")}
        self.attention = nn.ModuleList(part for fuser in self.fusers.values()
                                       for part in (fuser.linear, fuser.norm1, fuser.attn))


@torch.no_grad()
def written_for(pipe: StableDiffusionPipeline, latents: Tensor, words: list[str], rng: torch.Generator) -> Written:
    """What each block's cross-attention writes for "a photo of a WORD" as a mean over images and pixels, less the mean
    over words; heard while the model predicts the noise of these clean latents [images, 8, 16, 16]."""
    scheduler, heard = DDPMScheduler(**NOISE_SCHEDULE), {}
    steps = scheduler.config.num_train_timesteps
    times = torch.linspace(FROM * steps, TO * steps, len(latents)).long()
    noisy = scheduler.add_noise(latents, torch.randn(latents.shape, generator=rng), times).float()

    def hear(name: str) -> Callable[..., None]:
        return lambda _layer, _args, output: heard.setdefault(name, []).append(output.mean((0, 1)))

    with ExitStack() as hooks:
        for name, block in pipe.unet.named_modules():
            if hasattr(block, "attn2"):
                hooks.callback(block.attn2.register_forward_hook(hear(name)).remove)
        for word in words:
            ids = pipe.tokenizer(caption([word]), padding="max_length", return_tensors="pt").input_ids
            text = pipe.text_encoder(ids).last_hidden_state
            pipe.unet(noisy, times, text.expand(len(noisy), -1, -1))
    return {name: torch.stack(rows) - torch.stack(rows).mean(0) for name, rows in heard.items()}


def owners(boxes: Tensor, things: Tensor, positions: int) -> Tensor:
    """Which token each of an image's positions belongs to, [batch, positions, tokens] of bool: the thing with the
    smallest box around the position's middle, or none.

    Args:
        boxes: [batch, tokens, 4] in [0, 1].
        things: [batch, tokens], which tokens are things (and not actions, or nothing).
        positions: of a square grid.
    """
    side = round(positions**0.5)
    middles = (torch.arange(side) + 0.5) / side
    x, y = middles.repeat(side)[None, :, None], middles.repeat_interleave(side)[None, :, None]
    x0, y0, x1, y1 = boxes[:, None].unbind(-1)  # [batch, 1, tokens]
    reach = 0.3 / side  # coarse grids have few middles inside a box
    inside = (x > x0 - reach) & (x < x1 + reach) & (y > y0 - reach) & (y < y1 + reach) & things[:, None]
    area = torch.where(inside, (x1 - x0) * (y1 - y0), torch.inf)
    return F.one_hot(area.argmin(-1), boxes.shape[1]).bool() & inside


def look_and_write(fuser: GatedSelfAttentionDense, pixels: Tensor, tokens: Tensor, there: Tensor, owned: Tensor,
                   wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How far a gated layer is from looking where it should (cross-entropy) and from writing what it should (squared
    error, as a share of what it should write).

    Args:
        pixels: [batch, positions, channels], what the layer is given. tokens: [batch, tokens, width].
        there: [batch, tokens]. owned: as from `owners`. wanted: [batch, tokens, channels].
    """
    attention, positions = fuser.attn, pixels.shape[1]
    both = fuser.norm1(torch.cat([pixels, fuser.linear(tokens)], dim=1))
    query, key = (project(part).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # [batch, heads, n, d]
                  for project, part in ((attention.to_q, both[:, :positions]), (attention.to_k, both)))
    shares = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)[..., positions:].mean(1)
    mine, others = (shares * owned).sum(-1), 1 - (shares * there[:, None]).sum(-1)  # [batch, positions]
    look = -torch.where(owned.any(-1), mine, others).clamp(min=SMALLEST).log().mean()
    said = attention.to_out[0](attention.to_v(both[:, positions:]))
    write = (said - wanted)[there].square().sum(-1).mean() / wanted[there].square().sum(-1).mean().clamp(min=SMALLEST)
    return look, write


def start_loss(unet: UNet2DConditionModel, start: GatedStart, text_encoder: CLIPTextModel, data: GroundedLatents,
               embeddings: Tensor, written: Written, batch: int) -> Loss:
    """The loss of one step: *look* and *write*, as means over layers, on what the frozen model gives the layers."""
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def loss(step: int, rng: torch.Generator) -> Losses:
        drawn, given = data.draw(batch, rng), {}
        with torch.no_grad(), ExitStack() as hooks:
            for name, fuser in start.fusers.items():
                hooks.callback(fuser.register_forward_pre_hook(
                    lambda _fuser, args, name=name: given.__setitem__(name, args[0])).remove)
            text = text_encoder(drawn.tokens).last_hidden_state
            noisy = scheduler.add_noise(drawn.clean, drawn.noise, drawn.times).float()
            unet(noisy, drawn.times, text, cross_attention_kwargs={"gligen": drawn.grounding(
                torch.zeros(*drawn.words.shape, embeddings.shape[1]))})
        there, words = drawn.there, drawn.words.clamp(min=0)
        things = there.clone()
        things[:, ROLES.index("action")::len(ROLES)] = False
        tokens = start.position_net(drawn.boxes, there.float(), start.grounding(embeddings[words]))
        found = []
        for name, fuser in start.fusers.items():
            known = written[name.removesuffix(".fuser")]
            wanted = GAIN * F.pad(known, (0, 0, 0, len(embeddings) - len(known)))[words] * things[..., None]
            owned = owners(drawn.boxes, things, given[name].shape[1])
            found.append(torch.stack(look_and_write(fuser, given[name], tokens, there, owned, wanted)))
        look, write = torch.stack(found).mean(0)
        return {"loss": look + write, "look": look.detach(), "write": write.detach()}

    return loss
