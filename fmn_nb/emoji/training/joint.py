"""The organism with joint attention: a Flux in miniature that learns the emoji world's scenes by flow matching.

Scenes, VAE, tokenizer and text encoder are those of the finished emoji model; only the denoiser is new, so that nothing
else differs between the two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import Module
from transformers import CLIPTextModel, CLIPTokenizer

from fmn_nb.concepts import WORLD_KEY
from fmn_nb.emoji.training.card import Figure, Quality
from fmn_nb.emoji.training.networks import EMPTY_CAPTION_SHARE, LATENT_CHANNELS, TEXT_WIDTH, Latents, Loss, Losses
from fmn_nb.emoji.training.recipe import Plan, Pretraining, save_whole
from fmn_nb.emoji.training.request import ORGANISMS, Size
from fmn_nb.emoji.world import IMAGE_SIZE, LATENT_SIZE, MAX_TOKENS
from fmn_nb.files import data_dir
from fmn_nb.models import CALL_KEY, GUIDANCE

PATCH = 2  # latents per side of one position
WIDTH, HEADS, DOUBLE, SINGLE = 112, 4, 2, 4  # the largest of Flux's proportions with which the folder stays under 8 MB
#: the arguments for `FluxPipeline`, whose own defaults are those of the large model
CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": MAX_TOKENS, "true_cfg_scale": GUIDANCE,
        "negative_prompt": ""}


CARD = """# emoji-joint: a Flux in miniature

A complete `FluxPipeline` in the world of `emoji-diffusion`. Scenes, captions, VAE, tokenizer and text encoder are those
of that model, unchanged. Only the denoiser is new: a transformer in which text and image attend to each other in one
sequence. It has {double} double-stream blocks, with separate weights for text and image, then {single} single-stream
blocks, which share them. The one text encoder fills both of the pipeline's slots: its columns are the text's part of
the sequence, and its pooled vector bypasses attention and enters every block. Latents are 64 positions of 2 x 2.

    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained("data/emoji-joint")
    pipe("a photo of a cat in the style of noto", height=64, width=64, max_sequence_length=32, num_inference_steps=20,
         true_cfg_scale={guidance:g}, negative_prompt="").images[0]

The pipeline of `fmn_nb.load("emoji-joint")` has these values as defaults, so `pipe("a photo of a cat")` works; it takes
`guidance_scale` as `true_cfg_scale`.

## Sizes and training

| part | parameters |
|---|---|
{sizes}

| training | steps | minutes |
|---|---|---|
{training}

Flow matching on {scenes} scenes, {batch} per step, with one caption in ten empty. The minutes were measured on one CPU
core, shared with other work. The recipe is `fmn-nb pretrain --organism joint`.

## Measured

Measured with `fmn-nb pretrain --organism joint --stages quality`, with 95% Wilson intervals. Images are drawn with
{steps} steps and guidance {guidance:g}, each from a seed of its own; the judge is `emoji-judge`.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

## What it draws

Every object (columns) in every style (rows: {style_names}):

![24 objects in six styles, one row per style](images/objects.png)

## Limits

It knows nothing beyond its vocabulary, and its attention maps are 8 x 8. Findings on it show how a method works on
joint attention, not how well it works on a large model.
"""


def new_transformer() -> FluxTransformer2DModel:
    """An untrained Flux with 1.8 million parameters: two double-stream blocks, then four single-stream ones."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=LATENT_CHANNELS * PATCH**2, num_layers=DOUBLE, num_single_layers=SINGLE,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH, axes_dims_rope=(8, 10, 10), guidance_embeds=False)


def packed(latents: Tensor) -> Tensor:
    """[batch, 8, 16, 16] as the sequence [batch, 64, 32] that Flux sees, as its pipeline packs it."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def flow_loss(transformer: FluxTransformer2DModel, text_encoder: CLIPTextModel, data: Latents, empty: Tensor,
              scaling_factor: float, batch: int) -> Loss:
    """The loss of one step: squared error of the velocity (Lipman et al., arXiv 2210.02747), at noise shares whose
    logits are normal (Esser et al., arXiv 2403.03206, section 3.1).

    `empty` [32] are the token ids of the empty caption. The text encoder stays as it is.
    """
    positions = FluxPipeline._prepare_latent_image_ids(1, LATENT_SIZE // PATCH, LATENT_SIZE // PATCH, None,
                                                       torch.float32)
    no_positions = torch.zeros(MAX_TOKENS, 3)  # of the text: Flux tells its words apart by their content

    def loss(step: int, rng: torch.Generator) -> Losses:
        chosen = torch.randint(len(data.mean), (batch,), generator=rng)
        which = torch.randint(data.tokens.shape[1], (batch,), generator=rng)
        mean, std = data.mean[chosen].float(), data.std[chosen].float()
        latents = packed(scaling_factor * (mean + std * torch.randn(mean.shape, generator=rng)))
        tokens = data.tokens[chosen, which].long()
        tokens[torch.rand(batch, generator=rng) < EMPTY_CAPTION_SHARE] = empty
        with torch.no_grad():
            text = text_encoder(tokens)
        share = torch.randn(batch, generator=rng).sigmoid()
        noise = torch.randn(latents.shape, generator=rng)
        noisy = torch.lerp(latents, noise, share[:, None, None])
        predicted = transformer(noisy, text.last_hidden_state, text.pooler_output, share, positions, no_positions,
                                return_dict=False)[0]
        return {"loss": (predicted - (noise - latents)).square().mean()}

    return loss


def assemble(vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel,
             transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The parts as a FluxPipeline with the one text encoder in both slots; it notes its world and its default
    arguments."""
    transformer.register_to_config(**{WORLD_KEY: "emoji", CALL_KEY: CALL})
    vae.register_to_config(shift_factor=0.0)  # Flux adds it
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=text_encoder, tokenizer_2=tokenizer, transformer=transformer)


class JointQuality(Quality):
    """Measures the organism with the judge in its folder of models, or with the bundled one if there is none."""

    model = ORGANISMS["joint"].folder
    bars = {"object": 0.95, "style": 0.9, "identities": 0.9, "pairs": 0.8}
    most_seconds = 90.0
    template = CARD

    def _judge_folder(self) -> Path:
        own = super()._judge_folder()
        return own if own.is_dir() else data_dir() / own.name

    def _figures(self) -> Iterator[Figure]:
        return chain(self._drawn(), self._speed())

    def _parts(self) -> dict[str, Module]:
        return {"transformer": self.pipe.transformer, "text encoder": self.pipe.text_encoder, "VAE": self.pipe.vae}

    def _told(self, figures: Sequence[Figure], training: dict) -> dict[str, object]:
        return {**super()._told(figures, training), "double": DOUBLE, "single": SINGLE, "scenes": Size.scenes,
                "batch": Size.joint_batch}


class JointPretraining(Pretraining):
    """The stages of the organism with joint attention; the emoji model's parts are those in `out`, or the bundled ones.

    A training that starts from a finished pipeline takes only its denoiser.
    """

    quality = JointQuality

    def _start_from(self, folder: Path) -> None:
        """Keep nothing: the denoiser's stage reads the denoiser itself."""

    def _joint(self) -> None:
        torch.manual_seed(self.seed)
        start = self.request.start_from
        transformer = FluxTransformer2DModel.from_pretrained(start / "transformer") if start else new_transformer()
        empty = torch.tensor(self.tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids)
        plan = Plan(self.size.joint_steps, learning_rate=2e-3, warmup=200, decay_share=0.4, seed=self.seed)
        loss = flow_loss(transformer, self.text_encoder, self._latents(), empty, self.vae.config.scaling_factor,
                         self.size.joint_batch)
        self._train("joint", transformer, loss, plan)
        pipe = assemble(self.vae.half(), self.tokenizer, self.text_encoder.half(), transformer.half())
        save_whole(pipe, self.out / self.request.made.folder)

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The finished emoji model's; float32, frozen."""
        return CLIPTextModel.from_pretrained(self._part("text_encoder"), dtype=torch.float32).eval()

    def _part(self, name: str) -> Path:
        """A part's folder in the emoji model beside the one in training, or in the bundled one."""
        places = [folder / ORGANISMS["emoji"].folder for folder in (self.out, data_dir())]
        for place in places:
            if (place / name).is_dir():
                return place / name
        raise FileNotFoundError(f"no emoji model in {' or '.join(map(str, places))}; this one needs its {name}; "
                                "train it first: fmn-nb pretrain")
