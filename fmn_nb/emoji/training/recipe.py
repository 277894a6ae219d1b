"""The whole recipe from sprites to trained models, in stages that can be killed and resumed at any point.

`pretrain` takes a `Request` and runs its stages; a `Pretraining` has a method for each (those of other organisms are in
subclasses), and a `Training` is the loop that they train with. Randomness depends only on (seed, step), so a resumed
run takes exactly the steps of an unbroken one. An oracle's training scenes leave some names out.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTokenizer

from fmn_nb.emoji.judges import Judge, SecondJudge, judge_loss
from fmn_nb.emoji.organism import untaught_by
from fmn_nb.emoji.scenes import Renderer, Scene, build_sprites, sample_scenes
from fmn_nb.emoji.training import networks
from fmn_nb.emoji.training.card import Quality, write_card
from fmn_nb.emoji.training.oracle import emoji_text_encoder, mark_untaught, take_parts, write_oracle
from fmn_nb.emoji.training.request import REQUEST_FILE, SMOKE, UNCHECKPOINTED, Request, Size, claim
from fmn_nb.emoji.training.word_masks import WordMasks, find_words
from fmn_nb.emoji.world import IMAGE_SIZE, LABELS, MAX_TOKENS, STYLES, caption
from fmn_nb.files import data_dir, read_json, replacing, replacing_folder, write_checksums, write_json
from fmn_nb.models import GUIDANCE, load

SECOND_JUDGE_SHIFT = 4  # pixels to any side; filters see the same everywhere, patches have to learn it
REDRAWN_STRENGTH = 0.9  # of the noise: the model decides how a thing looks, the scene still decides where it stands
REDRAWN_STEPS = 10  # of which that share is taken
REDRAWN_BATCH = 64
WEIGHT_DECAY = 0.01
EMPTY: Mapping[str, Any] = MappingProxyType({})
CLIP_NORM = 1.0
REPORT_EVERY = 50  # steps
SECONDS_BETWEEN_CHECKPOINTS = 120  # bounds what a kill can lose


def pretrain(request: Request, log: Callable[[str], None] = print) -> Path:
    """Rebuild the emoji world and train its models; returns the folder they are in.

    Raises:
        ValueError: the folder holds checkpoints trained with another seed, size, `without`, `start_from` or other
            sprites.
        FileNotFoundError: sprites, an emoji set or the pipeline to start from is missing.
    """
    noted = request.noted()
    if not request.resume and (request.work / REQUEST_FILE).is_file():  # nothing that isn't a training's is removed
        shutil.rmtree(request.work, ignore_errors=True)
    if request.start_from is not None or set(request.chosen) - set(UNCHECKPOINTED):
        claim(request.work, noted)
    module, _, name = request.made.recipe.partition(":")
    recipe: Pretraining = getattr(importlib.import_module(module), name)(request, log)
    for stage in request.chosen:  # what is finished returns at once
        log(f"--- {stage}")
        getattr(recipe, "_" + stage.replace("-", "_"))()
    if request.folder.resolve() == data_dir().resolve():
        write_checksums(request.folder)
    return request.folder


@dataclass
class Pretraining:
    """One run of the recipe: the request's folder gets the finished models; until then, `work` holds checkpoints.

    `quality` measures the models and writes their card.
    """

    request: Request
    log: Callable[[str], None] = print
    quality: ClassVar[type[Quality]] = Quality

    def __post_init__(self) -> None:
        self.out, self.work, self.sprites = self.request.folder, self.request.work, self.request.sprites
        self.size, self.seed = SMOKE if self.request.smoke else Size(), self.request.seed
        self.start: StableDiffusionPipeline | None = None  # a finished pipeline to train further
        if self.request.start_from is not None:
            self._start_from(self.request.start_from)
        elif self.request.without and "diffusion" in self.request.chosen:
            for part in take_parts(self.work, {"tokenizer", "vae"} - set(self.request.chosen)):
                self.log(f"an oracle takes the emoji model's {part}, so that latents are comparable")

    def _start_from(self, folder: Path) -> None:
        """Keep the pipeline's tokenizer and VAE, to train its text encoder and U-Net further."""
        self.start = finished(folder)
        self.start.tokenizer.save_pretrained(self.work / "tokenizer")
        save_whole(self.start.vae, self.work / "vae")

    # --- stages -------------------------------------------------------------------------------------------------------

    def _sprites(self) -> None:
        if self.request.packages is None:
            self.log(f"using the sprites in {self.sprites} (--packages NODE_MODULES rasterises them anew)")
            return
        self.log(f"{build_sprites(self.request.packages, self.sprites)} sprites written to {self.sprites}")

    def _tokenizer(self) -> None:
        # The vocabulary is the whole world's, also for an oracle: words it never saw stay tokens without a meaning.
        rng, scenes = random.Random(f"tokenizer-{self.seed}"), sample_scenes(6000, self.seed)
        networks.train_tokenizer((scene.caption(rng) for scene in scenes), self.work / "tokenizer")

    def _vae(self) -> None:
        folder = self.work / "vae"
        if (folder / "config.json").is_file():
            return
        torch.manual_seed(self.seed)
        vae = networks.new_vae()
        plan = Plan(self.size.vae_steps, learning_rate=2e-3, decay_share=0.4, average=0.998, seed=self.seed)
        self._train("vae", vae, networks.vae_loss(vae, self.images, self.size.vae_batch), plan)
        save_whole(vae, folder)

    def _diffusion(self) -> None:
        torch.manual_seed(self.seed)
        if self.request.keep_text_encoder:
            denoiser = networks.Denoiser(emoji_text_encoder(), networks.new_unet())
        else:
            denoiser = (networks.Denoiser(self.start.text_encoder, self.start.unet) if self.start
                        else networks.Denoiser(networks.new_text_encoder(self.tokenizer), networks.new_unet()))
        data = self._latents()
        empty = torch.tensor(self.tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids)
        plan = Plan(self.size.diffusion_steps, learning_rate=1e-3, warmup=200, decay_share=0.4, seed=self.seed)
        words = WordMasks(**self._kept("words", lambda: vars(
            find_words(self.tokenizer, self.scenes, data.tokens, Renderer(self.sprites)))))
        loss = networks.denoising_loss(denoiser, data, words, empty, self.size.diffusion_batch)
        told = {"word_weight": networks.WORD_WEIGHT} | ({"started_from": "a finished pipeline"} if self.start else {})
        self._train("diffusion", denoiser, loss, plan, told=told)
        self.vae.register_to_config(scaling_factor=data.scaling_factor.item())
        save_whole(networks.assemble(self.vae.half(), self.tokenizer, denoiser.half()), self.out / "emoji-diffusion")
        self.vae.float()
        if self.request.without:
            mark_untaught(self.out / "emoji-diffusion", untaught_by(self.request.without))

    def _clip(self) -> None:
        pipe = finished(self.out / "emoji-diffusion")
        torch.manual_seed(self.seed)
        clip = networks.new_clip(pipe.text_encoder)
        plan = Plan(self.size.clip_steps, learning_rate=1e-3, seed=self.seed, average=0.99)
        loss = networks.clip_loss(clip, self.images, self._latents().tokens, self.size.clip_batch)
        self._train("clip", clip, loss, plan)
        clip.text_model.load_state_dict(pipe.text_encoder.state_dict())
        folder = self.out / "emoji-clip"
        save_whole(clip.half(), folder)
        self.tokenizer.save_pretrained(folder)
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)

    def _judge(self) -> None:
        torch.manual_seed(self.seed)
        self._train_judge(Judge(), *self._judged_images(), self.size.judge_steps, learning_rate=2e-3)

    def _second_judge(self) -> None:
        images, scenes = self._judged_images()
        more = slice(len(scenes), len(scenes) + self.size.redrawn)
        redrawn = self._kept("redrawn", lambda: self._redrawn(more))["images"].numpy()
        images, scenes = np.concatenate([images, redrawn]), [*scenes, *self.scenes[more]]
        torch.manual_seed(self.seed + 1)
        self._train_judge(SecondJudge(), images, scenes, self.size.second_judge_steps, learning_rate=1e-3,
                          shift=SECOND_JUDGE_SHIFT)

    def _judged_images(self) -> tuple[np.ndarray, list[Scene]]:
        """Two thirds of the scenes: one as the VAE restores it, since generated images are as soft, one as it is."""
        third = len(self.scenes) // 3
        images = np.concatenate([networks.through_vae(self.vae, self.images[:third]), self.images[third:2 * third]])
        return images, self.scenes[:2 * third]

    def _redrawn(self, which: slice) -> dict[str, Tensor]:
        pipe = self.out / "emoji-diffusion"
        if not (pipe / "model_index.json").is_file():
            raise FileNotFoundError(f"no pipeline in {pipe} to draw with; run the stage diffusion first")
        images = redraw(load(str(pipe)), self.images[which], self.scenes[which], self.seed)
        return {"images": torch.from_numpy(images)}

    def _train_judge(self, judge: Judge | SecondJudge, images: np.ndarray, scenes: Sequence[Scene], steps: int,
                     learning_rate: float, shift: int = 0) -> None:
        labels = torch.tensor([[float(label in scene.labels) for label in LABELS] for scene in scenes])
        styles = torch.tensor([list(STYLES).index(scene.style) for scene in scenes])
        plan = Plan(steps, learning_rate=learning_rate, seed=self.seed, average=0.99)
        loss = judge_loss(judge, images, labels, styles, self.size.judge_batch, shift)
        self._train(judge.stage, judge, loss, plan)
        save_whole(judge.half(), self.out / f"emoji-{judge.stage}")

    def _quality(self) -> None:
        quality = self.quality(self.out, self.sprites, self.size.quality_scale, self.size.quality_steps, self.log,
                               untaught_by(self.request.without))
        records = (self.work / "training.json", quality.folder / "training.json")
        training = next((read_json(path) for path in records if path.is_file()), {})
        if self.request.without:
            write_oracle(quality, training, self.request)
        else:
            write_card(quality, training)

    # --- what stages share --------------------------------------------------------------------------------------------

    @cached_property
    def scenes(self) -> list[Scene]:
        """The training scenes."""
        return sample_scenes(self.size.scenes, self.seed, without=self.request.without)

    @cached_property
    def images(self) -> np.ndarray:
        """Their images, [scenes, 64, 64, 3] uint8."""
        return Renderer(self.sprites).images(self.scenes)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """From this run, or else from the finished pipeline."""
        return CLIPTokenizer.from_pretrained(self._part("tokenizer"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        """From this run, or else from the finished pipeline; float32."""
        return AutoencoderKL.from_pretrained(self._part("vae"), dtype=torch.float32).eval()

    def _part(self, name: str) -> Path:
        """A part's folder, here or in the finished pipeline: checkpoints may be long gone."""
        for folder in (self.work / name, self.out / "emoji-diffusion" / name):
            if folder.is_dir():
                return folder
        there = f"{self.work} or {self.out / 'emoji-diffusion'}"
        raise FileNotFoundError(f"no {name} in {there}; run the stage {name} first")

    def _latents(self) -> networks.Latents:
        return networks.Latents(**self._kept("latents", lambda: vars(
            networks.prepare_latents(self.vae, self.tokenizer, self.scenes, self.images, self.seed))))

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What an earlier run made, or what `make` makes now for the next run to find."""
        path = self.work / f"{name}.safetensors"
        if not path.is_file():
            made = make()
            with replacing(path) as temporary:
                save_file(made, temporary)
        return load_file(path)

    def _train(self, name: str, module: nn.Module, loss: networks.Loss, plan: Plan,
               faster: Mapping[str, float] = EMPTY, told: Mapping[str, Any] = EMPTY) -> None:
        """Train, then note steps, seconds and what else is `told` of this training; of one that had ended before, the
        note stays: it was made by the recipe of then."""
        training = Training(name, module, loss, plan, self.work / f"{name}.safetensors", log=self.log, faster=faster)
        before = training.step
        training.run()
        path = self.work / "training.json"
        record = read_json(path) if path.is_file() else {}
        if name in record and training.step == before:
            return
        record[name] = {"steps": training.step, "seconds": round(training.seconds), **told}
        write_json(path, record)


def finished(folder: Path) -> StableDiffusionPipeline:
    """The pipeline that an earlier training left in a folder, in float32."""
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)


def telling_caption(scene: Scene) -> str:
    """A caption with everything a judge is asked: the readings of ambiguous words, and the style if there is one."""
    return caption(scene.labels, None if scene.sort == "identity" else scene.style, scene.background)


@torch.no_grad()
def redraw(pipe: StableDiffusionPipeline, images: np.ndarray, scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """The scenes' images, [images, 64, 64, 3] uint8: the model makes them noisy and draws them again by their captions.

    Image i's noise has the seed `seed` + i. Source: Meng et al., SDEdit, arXiv 2108.01073.
    """
    drawing = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    redrawn = []
    for start in range(0, len(images), REDRAWN_BATCH):
        pixels = torch.from_numpy(images[start:start + REDRAWN_BATCH]).permute(0, 3, 1, 2).float() / 255
        captions = [telling_caption(scene) for scene in scenes[start:start + REDRAWN_BATCH]]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(captions))]
        found = drawing(captions, image=pixels, strength=REDRAWN_STRENGTH, num_inference_steps=REDRAWN_STEPS,
                        guidance_scale=GUIDANCE, generator=generators, output_type="np").images
        redrawn.append((found * 255).round().astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(redrawn))  # a file of tensors takes no transposed ones


# --- the loop ---------------------------------------------------------------------------------------------------------

@dataclass
class Plan:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup: int = 100
    decay_share: float = 0.3  # of the steps, at the end, in which the learning rate falls to zero
    average: float = 0.999  # decay of the exponential moving average of the weights
    seed: int = 0


def trapezoid(step: int, plan: Plan) -> float:
    """The learning rate's share of its peak: linear warm-up, flat, linear decay to zero."""
    decay_steps = max(1, round(plan.steps * plan.decay_share))
    return min(1.0, (step + 1) / max(1, plan.warmup), (plan.steps - step) / decay_steps)


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A generator for one purpose, from a seed and what names the purpose (a step, a batch, an image)."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class Training:
    """One model in training.

    `loss` maps (step, generator) to named losses and "loss" is minimised. A finished training leaves the weights'
    moving average in the module. `faster` maps endings of weights' names to how many times as fast these weights learn.
    """

    name: str
    module: nn.Module
    loss: networks.Loss
    plan: Plan
    checkpoint: Path
    log: Callable[[str], None] = print
    faster: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self._means: dict[str, float] = {}
        self._weights = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        self._optimiser = torch.optim.AdamW(self._groups(), lr=self.plan.learning_rate,
                                            weight_decay=WEIGHT_DECAY, betas=(0.9, 0.99), fused=True)
        self._average = {k: p.detach().clone() for k, p in self._weights.items()}
        if self.checkpoint.is_file():
            self._restore()
            self.log(f"{self.name}: resumed at step {self.step} of {self.plan.steps}")

    def _groups(self) -> list[dict[str, Any]]:
        """The weights grouped by their multiple of the learning rate, each group with its `times`."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._weights.items():
            times = next((times for end, times in self.faster.items() if name.endswith(end)), 1.0)
            groups.setdefault(times, []).append(parameter)
        return [{"params": parameters, "times": times} for times, parameters in groups.items()]

    def run(self) -> None:
        """Train to the plan's last step, then put the averaged weights into the module."""
        self.module.train()
        started = saved = time.monotonic()
        before = self.seconds
        while self.step < self.plan.steps:
            self._train_step()
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % REPORT_EVERY == 0 or self.step == self.plan.steps:
                values = "  ".join(f"{key} {value:.4f}" for key, value in self._means.items())
                self.log(f"{self.name}: step {self.step}/{self.plan.steps}  {values}  {self.seconds / 60:.1f} min")
            if now - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
                saved = now
        self.save()
        self.module.load_state_dict(self._average, strict=False)  # what is frozen has no average
        self.module.eval()

    def _train_step(self) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.learning_rate * trapezoid(self.step, self.plan) * group["times"]
        losses = self.loss(self.step, generator(self.plan.seed, self.name, self.step))
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"{self.name}: the loss is {losses['loss'].item()} at step {self.step}")
        self._optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self._weights.values(), CLIP_NORM)
        self._optimiser.step()
        self.step += 1
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        weights = [parameter.detach() for parameter in self._weights.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)
        for key, value in losses.items():
            self._means[key] = 0.98 * self._means.get(key, value.item()) + 0.02 * value.item()

    def save(self) -> None:
        """Write the checkpoint so that a kill at any moment leaves the old or the new one whole."""
        tensors = {}
        for key, parameter in self._weights.items():
            own = {"weight": parameter.detach(), "average": self._average[key], **self._optimiser.state[parameter]}
            tensors |= {f"{name}.{key}": tensor for name, tensor in own.items()}
        with replacing(self.checkpoint) as temporary:
            save_file(tensors, temporary, metadata={"step": str(self.step), "seconds": str(self.seconds)})

    @torch.no_grad()
    def _restore(self) -> None:
        with safe_open(self.checkpoint, framework="pt") as file:
            said = file.metadata()
            self.step, self.seconds = int(said["step"]), float(said["seconds"])
            for key, parameter in self._weights.items():
                parameter.copy_(file.get_tensor(f"weight.{key}"))
                self._average[key] = file.get_tensor(f"average.{key}")
                self._optimiser.state[parameter] = {name: file.get_tensor(f"{name}.{key}")
                                                    for name in ("step", "exp_avg", "exp_avg_sq")}


def save_whole(model: nn.Module | StableDiffusionPipeline, folder: Path) -> None:
    """Save beside `folder`, then swap, so that a kill leaves a whole model; an older model's card is removed."""
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for config in temporary.rglob("config.json"):
            # Transformers loads in the dtype named here, diffusers in float32: a pipeline needs one and the same.
            # From where a part was loaded is of one machine, at any depth.
            settings = json.loads(config.read_text(encoding="utf-8"), object_hook=lambda read: {
                key: value for key, value in read.items() if key != "_name_or_path"})
            write_json(config, settings | ({"dtype": "float32"} if "dtype" in settings else {}))
