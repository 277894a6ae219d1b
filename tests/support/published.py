"""The published Forget-Me-Not algorithm in a straight line, independent of the package, to compare it with.

Written from the paper (Zhang et al., arXiv 2303.17591) and what its authors' code does, with its accidents mended: the
mask is batch-major like the attention rows, and the parameters that are clipped are the ones that are trained. Images
and texts are encoded anew in every step, and the U-Net's weights keep gradients whether they are trained or not; the
`lean` loop is the same algorithm without either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image


class Controller:
    """Collects the attention probabilities of the concept's columns from every cross-attention layer."""

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None  # bool [batch, tokens]
        self.collected: list[torch.Tensor] = []

    def __call__(self, probabilities: torch.Tensor) -> None:  # [batch * heads, pixels, tokens], batch-major
        heads = len(probabilities) // len(self.positions)
        mask = self.positions.repeat_interleave(heads, dim=0)[:, None, :]
        self.collected.append(probabilities.masked_select(mask))

    def loss(self) -> torch.Tensor:
        return torch.cat(self.collected).norm()


class Processor:
    """diffusers' plain attention, which hands its probabilities to the controller."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.controller(probabilities)
        joined = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](joined))


def published_forget_me_not(
    pipe: StableDiffusionPipeline, images: Sequence[Image.Image], prompt: str, phrase_ids: Sequence[int],
    generator: torch.Generator, steps: int = 35, lr: float = 2e-6, cross_attention_only: bool = False,
    end_of_text: bool = True, lean: bool = False,
) -> list[float]:
    """Fine-tune `pipe.unet` in place, batch 1; returns the loss of every step.

    Args:
        phrase_ids: the concept's token ids.
        generator: all random numbers: images in shuffled rounds, posterior noise, noise, timestep, in this order.
        lean: images and text are encoded once, and weights that aren't trained keep no gradients.
    """
    noise_scheduler, controller = DDPMScheduler.from_config(pipe.scheduler.config), Controller()
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Processor(controller))
    parameters = [p for n, p in pipe.unet.named_parameters() if "attn2" in n or not cross_attention_only]
    if lean:
        pipe.unet.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length,
                         return_tensors="pt").input_ids
    marked = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(ids.shape[1]):
        if ids[0, place : place + len(phrase_ids)].tolist() == list(phrase_ids):
            marked[0, place : place + len(phrase_ids)] = True
    if end_of_text:
        marked |= ids == pipe.tokenizer.eos_token_id
    def posterior_of(image: Image.Image) -> Any:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        return pipe.vae.encode(pixels).latent_dist

    once = [posterior_of(image) for image in images] if lean else None
    text = pipe.text_encoder(ids)[0] if lean else None
    order, losses = [], []
    for _ in range(steps):
        order = order or torch.randperm(len(images), generator=generator).tolist()
        number = order.pop(0)
        posterior = once[number] if lean else posterior_of(images[number])
        spread = torch.randn(posterior.mean.shape, generator=generator)
        latents = (posterior.mean + posterior.std * spread) * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(0, noise_scheduler.config.num_train_timesteps, (1,), generator=generator)
        text = text if lean else pipe.text_encoder(ids)[0]
        controller.positions, controller.collected = marked, []
        pipe.unet(noise_scheduler.add_noise(latents, noise, timestep), timestep, text)
        loss = controller.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
