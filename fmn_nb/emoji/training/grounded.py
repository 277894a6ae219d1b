"""The organism with interaction control: gated layers learn, beside the frozen emoji model, who stands where.

Only the position net, the gated layers ("fusers") and the vectors of roles and instances are trained; the text encoder,
the VAE and every weight of the emoji model stay, so without interactions the model draws what it always drew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from fmn_nb.concepts import untaught_of
from fmn_nb.control import Grounding
from fmn_nb.control.grounding import phrase_embeddings
from fmn_nb.emoji.grounded_scenes import sample_grounded
from fmn_nb.emoji.organism import untaught_by
from fmn_nb.emoji.scenes import Renderer
from fmn_nb.emoji.training import networks
from fmn_nb.emoji.training.gated_start import IMAGES, GatedStart, start_loss, written_for
from fmn_nb.emoji.training.grounded_card import GroundedQuality, write_grounded_card
from fmn_nb.emoji.training.grounded_data import WORDS, GroundedLatents, token_table
from fmn_nb.emoji.training.networks import NOISE_SCHEDULE, Latents, Loss, Losses, min_snr_weights
from fmn_nb.emoji.training.recipe import Plan, Pretraining, generator
from fmn_nb.emoji.training.request import ORGANISMS
from fmn_nb.emoji.world import OBJECTS
from fmn_nb.files import data_dir, read_json, replacing_folder, write_json, write_tensors
from fmn_nb.models import load
from fmn_nb.models.gated import BESIDE, GROUNDING, base_digest, gated_tensors, is_gated_name, with_gates

GATE_SPEED = 20.0  # times the learning rate: a gate is one number, and while it is shut nothing behind it learns


class GroundedDenoiser(nn.Module):
    """What the loss depends on: a frozen U-Net with gated layers, and the vectors of roles and instances."""

    def __init__(self, unet: UNet2DConditionModel, grounding: Grounding) -> None:
        super().__init__()
        self.unet, self.grounding = unet, grounding
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(is_gated_name(name))

    def gates(self) -> dict[str, float]:
        """How far the gates are open, |tanh alpha|, as a mean over layers: for attention and the layer behind it."""
        named = dict(self.unet.named_parameters())
        return {kind: float(torch.stack([p.detach().tanh().abs() for n, p in named.items() if n.endswith(kind)]).mean())
                for kind in ("alpha_attn", "alpha_dense")}


def grounded_loss(model: GroundedDenoiser, text_encoder: CLIPTextModel, data: GroundedLatents, embeddings: Tensor,
                  batch: int, even_from: int) -> Loss:
    """The loss of one step: squared error of the noise with min-SNR-5 weights, as the emoji model's own.

    `embeddings` [words, width] are the encoded `WORDS`. From step `even_from` on, all timesteps are drawn alike
    (`GroundedLatents.draw`).
    """
    scheduler, weights = DDPMScheduler(**NOISE_SCHEDULE), min_snr_weights()

    def loss(step: int, rng: torch.Generator) -> Losses:
        drawn = data.draw(batch, rng, even=step >= even_from)
        with torch.no_grad():
            text = text_encoder(drawn.tokens).last_hidden_state
        tokens = drawn.grounding(model.grounding(embeddings[drawn.words.clamp(min=0)]))
        noisy = scheduler.add_noise(drawn.clean, drawn.noise, drawn.times).float()
        predicted = model.unet(noisy, drawn.times, text, cross_attention_kwargs={"gligen": tokens}).sample
        errors = (predicted - drawn.noise).square().mean(dim=(1, 2, 3))
        return {"loss": (weights[drawn.times] * errors).mean(), "error": errors.mean().detach(),
                **{f"gate {name.removeprefix('alpha_')}": torch.tensor(value) for name, value in model.gates().items()}}

    return loss


def save_grounded(model: GroundedDenoiser, folder: Path, base: str) -> Path:
    """Save only the new weights, in half precision, with a line that says which pipeline beside them, with which
    weights, they belong to."""
    tensors = gated_tensors(model.unet) | dict(model.grounding.state_dict())
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / GROUNDING, {n: t.detach().half().contiguous() for n, t in tensors.items()}, {})
        write_json(temporary / BESIDE, {"base": base, "weights": base_digest(model.unet.state_dict())})
    return folder


class GroundedPretraining(Pretraining):
    """The stages of the organism with interaction control.

    The emoji model that it starts from is the one in `out`, or the bundled one; with names left out, the oracle there
    that never learned them, so that a box's floor can be measured.
    """

    def _start_from(self, folder: Path) -> None:
        raise ValueError("interaction control always starts from the emoji model beside it: put that into --out and "
                         "leave out --start-from")

    def _grounded(self) -> None:
        pipe = self._base()
        torch.manual_seed(self.seed)
        unet = with_gates(pipe.unet)
        model = GroundedDenoiser(unet, Grounding(unet.config.cross_attention_dim, self.seed))
        data = self._scenes_with_boxes(pipe)
        plan = Plan(self.size.grounded_steps, learning_rate=2e-3, decay_share=0.5, seed=self.seed)
        embeddings, size = phrase_embeddings(pipe, WORDS), self.size
        self._start(pipe, model, data, embeddings)
        loss = grounded_loss(model, pipe.text_encoder, data, embeddings, size.grounded_batch, size.grounded_steps // 2)
        self._train("grounded", model, loss, plan, {".alpha_attn": GATE_SPEED, ".alpha_dense": GATE_SPEED})
        save_grounded(model, self.out / self.request.model, self._beside)

    def _start(self, pipe: StableDiffusionPipeline, model: GroundedDenoiser, data: GroundedLatents,
               embeddings: Tensor) -> None:
        """Teach the shut gated layers where to look and what to write (`gated_start`)."""
        start, latents = GatedStart(model.unet, model.grounding), data.latents
        clean = latents.scaling_factor * latents.mean[:IMAGES].float()
        written = written_for(pipe, clean, list(OBJECTS), generator(self.seed, "written"))
        plan = Plan(self.size.gated_start_steps, learning_rate=2e-3, warmup=20, decay_share=0.5, average=0.98,
                    seed=self.seed)
        self._train("gated-start", start, start_loss(model.unet, start, pipe.text_encoder, data, embeddings, written,
                                                     self.size.gated_start_batch), plan)

    def _quality(self) -> None:
        folder = self.out / self.request.model
        if not (folder / BESIDE).is_file():
            raise FileNotFoundError(f"no gated layers in {folder}; run the stage grounded first")
        quality = GroundedQuality(folder, self.sprites, self.size.quality_scale, self.size.quality_steps, self.log,
                                  self.request.without)
        records = (self.work / "training.json", folder / "training.json")
        write_grounded_card(quality, next((read_json(path) for path in records if path.is_file()), {}))

    def _base(self) -> StableDiffusionPipeline:
        """The finished emoji model or oracle, in float32 and frozen."""
        places = [folder / self._beside for folder in (self.out, data_dir())]
        place = next((place for place in places if (place / "model_index.json").is_file()), None)
        if place is None:
            without = f' --without "{",".join(self.request.without)}"' if self.request.without else ""
            raise FileNotFoundError(f"no {self._beside} in {' or '.join(str(place.parent) for place in places)}; train "
                                    f"it first: fmn-nb pretrain{without}")
        pipe = load(place, device="cpu", dtype="float32")
        if set(known := untaught_of(pipe)) != set(untaught_by(self.request.without)):
            raise ValueError(f"the oracle in {place} never learned {', '.join(known) or 'nothing'}: leave out the same "
                             "names (--without)")
        for part in (pipe.text_encoder, pipe.vae):
            part.requires_grad_(False).eval()
        return pipe

    @property
    def _beside(self) -> str:
        """The folder of the model that the gated layers stand beside."""
        emoji = ORGANISMS["emoji"]
        return emoji.oracle if self.request.without else emoji.folder

    def _scenes_with_boxes(self, pipe: StableDiffusionPipeline) -> GroundedLatents:
        """The encoded training scenes; kept, since encoding takes minutes."""

        def encoded() -> dict[str, Tensor]:
            renderer = Renderer(self.sprites)
            scenes = sample_grounded(self.size.grounded_scenes, self.seed, renderer, without=self.request.without)
            images = np.stack([scene.image(renderer) for scene in scenes])
            self.log(f"{len(scenes)} scenes painted")
            latents = networks.prepare_latents(pipe.vae, pipe.tokenizer, scenes, images, self.seed)
            return vars(latents) | token_table(scenes, self.seed)

        kept = self._kept("scenes", encoded)
        words, boxes = kept.pop("words"), kept.pop("boxes")
        kept["scaling_factor"] = torch.tensor(pipe.vae.config.scaling_factor, dtype=torch.float64)
        return GroundedLatents(Latents(**kept), words, boxes)
