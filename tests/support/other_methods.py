"""UCE, ESD, CA and MACE in straight lines, independent of the package, to compare it with.

Written from the papers' equations (arXiv 2308.14761, 2303.07345, 2303.13516, 2403.06135) for a Stable Diffusion in
miniature with one prompt for each concept. All random numbers come from the generators that are passed in, in the order
in which a step needs them: which row, the latents' spread, noise, timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from published import Processor
from torch import Tensor

Step = tuple[Tensor, Tensor]  # x_t and t


def ids_of(pipe: StableDiffusionPipeline, prompt: str) -> Tensor:
    return pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length,
                          return_tensors="pt").input_ids


@torch.no_grad()
def text_of(pipe: StableDiffusionPipeline, prompt: str) -> Tensor:
    """[columns, width]."""
    return pipe.text_encoder(ids_of(pipe, prompt))[0][0]


def last_token(pipe: StableDiffusionPipeline, prompt: str) -> int:
    """The place of the last token before the end of the text: the number of real tokens minus two."""
    return len(pipe.tokenizer(prompt).input_ids) - 2


def text_projections(pipe: StableDiffusionPipeline) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in pipe.unet.named_parameters():
        if ".attn2.to_k.weight" in name or ".attn2.to_v.weight" in name:
            yield name, parameter.detach().double()


def uce(pipe: StableDiffusionPipeline, edited: Sequence[Tensor], guides: Sequence[Tensor], kept: Sequence[Tensor],
        ridge: float, erase: float, preserve: float) -> dict[str, Tensor]:
    """The edited weights, by the equation as it is printed: W' = numerator denominator^-1, column after column."""
    found = {}
    for name, w in text_projections(pipe):
        width = w.shape[1]
        numerator, denominator = ridge * w, ridge * torch.eye(width).double()
        for e, g in zip(edited, guides, strict=True):
            e, g = e.double()[:, None], g.double()[:, None]
            numerator = numerator + erase * (w @ g) @ e.T
            denominator = denominator + erase * e @ e.T
        for e in kept:
            e = e.double()[:, None]
            numerator = numerator + preserve * (w @ e) @ e.T
            denominator = denominator + preserve * e @ e.T
        found[name] = numerator @ torch.linalg.inv(denominator)
    return found


@torch.no_grad()
def guided_trajectory(pipe: StableDiffusionPipeline, prompt: str, noise: Tensor, steps: int,
                      guidance: float) -> list[Step]:
    """(x_t, t) from noise [1, ...] on, by the pipeline's scheduler and classifier-free guidance."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    with_text, without = text_of(pipe, prompt)[None], text_of(pipe, "")[None]
    x, way = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        way.append((x[0], t))
        plain, asked = pipe.unet(x, t, without).sample, pipe.unet(x, t, with_text).sample
        x = scheduler.step(plain + guidance * (asked - plain), t, x).prev_sample
    return way


def esd(pipe: StableDiffusionPipeline, frozen: StableDiffusionPipeline, prompt: str, ways: Sequence[Step],
        generator: torch.Generator, trained: Callable[[str], bool], steps: int, lr: float, batch: int) -> list[float]:
    """Train `pipe.unet` in place on the target e_0(empty) - 1 (e_0(prompt) - e_0(empty)); the loss of every step."""
    parameters = [p for n, p in pipe.unet.named_parameters() if trained(n)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    named, empty = text_of(pipe, prompt), text_of(pipe, "")
    order, losses = [], []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(ways), generator=generator).tolist()
        rows, order = order[:batch], order[batch:]
        x, t = torch.stack([ways[row][0] for row in rows]), torch.stack([ways[row][1] for row in rows])
        with torch.no_grad():
            away = frozen.unet(x, t, named.expand(batch, -1, -1)).sample
            without = frozen.unet(x, t, empty.expand(batch, -1, -1)).sample
        predicted = pipe.unet(x, t, named.expand(batch, -1, -1)).sample
        loss = (predicted - (without - 1.0 * (away - without))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def noised(pipe: StableDiffusionPipeline, latents: Tensor, rows: Sequence[int],
           generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, noise, t) of rows of exactly known latents."""
    scheduler, shape = DDPMScheduler.from_config(pipe.scheduler.config), (len(rows), *latents.shape[1:])
    torch.randn(shape, generator=generator)  # the latents' spread, which is 0 here
    noise = torch.randn(shape, generator=generator)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
    return scheduler.add_noise(latents[list(rows)], noise, t), noise, t


def ca(pipe: StableDiffusionPipeline, prompt: str, anchor: str, latents: Tensor, generator: torch.Generator, steps: int,
       lr: float, batch: int) -> list[float]:
    """Train keys and values of `pipe.unet` in place: model-based ablation with prior preservation of weight 1."""
    parameters = [p for n, p in pipe.unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    named, instead = text_of(pipe, prompt), text_of(pipe, anchor)
    order, losses = [], []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(latents), generator=generator).tolist()
        rows, order = order[:batch], order[batch:]
        x, noise, t = noised(pipe, latents, rows, generator)
        predicted = pipe.unet(x, t, named.expand(batch, -1, -1)).sample
        own = pipe.unet(x, t, instead.expand(batch, -1, -1)).sample
        loss = (predicted - own.detach()).square().mean() + 1.0 * (own - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def mace_columns(pipe: StableDiffusionPipeline, prompt: str, instead: str,
                 word: str) -> tuple[list[Tensor], list[Tensor]]:
    """Step 1's pairs: all columns but the word's one; the two prompts' columns are counted from their ends of text."""
    ids = ids_of(pipe, prompt)[0].tolist()
    place, = [column for column, one in enumerate(ids) if one == pipe.tokenizer.convert_tokens_to_ids(word + "</w>")]
    own, other = text_of(pipe, prompt), text_of(pipe, instead)
    shorter = last_token(pipe, prompt) - last_token(pipe, instead)
    columns = [column for column in range(len(ids)) if column != place]
    return [own[c] for c in columns], [own[c] if c < place else other[c - shorter] for c in columns]


class Collected:
    """Gathers, layer by layer, the Frobenius norm of the marked columns' probabilities."""

    def __init__(self, marked: Tensor) -> None:
        self.marked, self.norms = marked, []

    def __call__(self, probabilities: Tensor) -> None:  # [heads, pixels, columns] of one image
        self.norms.append(probabilities[..., self.marked].square().sum().sqrt())


def mace_attention(pipe: StableDiffusionPipeline, prompt: str, marked: Tensor, latents: Tensor,
                   generators: tuple[torch.Generator, torch.Generator], steps: int, lr: float) -> list[float]:
    """Step 2 on `pipe.unet`, in place: rank-1 factors on keys and values, batch 1, no masks; the loss of every step."""
    lora, generator = generators
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    layers = dict(pipe.unet.named_modules())
    for name in [f"{one}.{which}" for one in layers if one.endswith("attn2") for which in ("to_k", "to_v")]:
        layer = layers[name]
        down = torch.nn.init.kaiming_uniform_(torch.empty(1, layer.in_features), a=5**0.5, generator=lora)
        factors[name] = down.requires_grad_(), torch.zeros(layer.out_features, 1).requires_grad_()

        def forward(x: Tensor, layer: Any = layer, pair: tuple[Tensor, Tensor] = factors[name]) -> Tensor:
            return x @ layer.weight.T + x @ pair[0].T @ pair[1].T

        layer.forward = forward
    parameters = [one for pair in factors.values() for one in pair]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    t = torch.arange(1000)
    density = torch.sigmoid(0.05 * (t - 200.0)) - torch.sigmoid(0.05 * (t - 400.0))
    text, order, losses = text_of(pipe, prompt)[None], [], []
    for _ in range(steps):
        order = order or torch.randperm(len(latents), generator=generator).tolist()
        row = order.pop(0)
        _, noise, _ = noised(pipe, latents, [row], generator)
        time = torch.multinomial(density, 1, replacement=True, generator=generator)
        x = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents[[row]], noise, time)
        collected = Collected(marked)
        for name, module in layers.items():
            if name.endswith("attn2"):
                module.set_processor(_Once(collected))
        pipe.unet(x, time, text)
        loss = sum(collected.norms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class _Once(Processor):
    """The published controller's processor, with a listener of ours."""


def fused(weights: Tensor, changes: Sequence[Tensor], own: Sequence[Tensor], kept: Tensor, ridge: float,
          keep: float) -> Tensor:
    """Step 3 for one weight [out, in], as an ordinary least-squares problem in the change D: rows e -> D_i e for each
    concept's columns [n, in], rows e' -> 0, and ridge's rows."""
    rows = [*own, keep**0.5 * kept, ridge**0.5 * torch.eye(weights.shape[1]).double()]
    wanted = [e @ d.double().T for e, d in zip(own, changes, strict=True)]
    wanted += [torch.zeros(len(row), len(weights)).double() for row in rows[len(own):]]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T
