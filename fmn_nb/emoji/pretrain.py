"""The whole recipe from sprites to trained models, in stages that can be killed and resumed at any point."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from fmn_nb.checksums import write_checksums
from fmn_nb.emoji.card import write_card
from fmn_nb.emoji.clip import clip_loss, new_clip
from fmn_nb.emoji.diffusion import (
    Denoiser,
    Latents,
    assemble,
    denoising_loss,
    new_text_encoder,
    new_unet,
    prepare_latents,
    tokenise,
)
from fmn_nb.emoji.judge import Judge, judge_loss
from fmn_nb.emoji.picture import write_picture
from fmn_nb.emoji.quality import Quality
from fmn_nb.emoji.redrawing import redraw
from fmn_nb.emoji.request import claim, origin
from fmn_nb.emoji.saving import save_whole
from fmn_nb.emoji.scenes import Renderer, Scene, sample_scenes
from fmn_nb.emoji.second_judge import SecondJudge
from fmn_nb.emoji.sprites import build_sprites
from fmn_nb.emoji.tokenizer import train_tokenizer
from fmn_nb.emoji.training import Plan, Training
from fmn_nb.emoji.vae import new_vae, through_vae, vae_loss
from fmn_nb.emoji.world import IMAGE_SIZE, LABELS, OBJECTS, STYLES, concept_names
from fmn_nb.files import read_json, replacing, write_json
from fmn_nb.models import load
from fmn_nb.paths import data_dir

STAGES = ("sprites", "tokenizer", "vae", "diffusion", "clip", "judge", "second-judge", "quality", "picture")
ORACLE_STAGES = ("tokenizer", "vae", "diffusion")  # an oracle is judged by the bundled judge and CLIP
SECOND_JUDGE_SHIFT = 4  # pixels to any side; filters see alike everywhere, patches have to learn it
CHECKPOINTED = ("tokenizer", "vae", "diffusion", "clip", "judge", "second-judge")  # the others resume nothing


@dataclass(frozen=True)
class Size:
    """How much of everything; `batch` counts images."""

    scenes: int
    vae_steps: int
    vae_batch: int
    diffusion_steps: int
    diffusion_batch: int
    clip_steps: int
    clip_batch: int
    judge_steps: int
    second_judge_steps: int  # attention learns slower than filters
    judge_batch: int
    redrawn: int  # scenes that the diffusion model draws again for the second judge
    quality_scale: int  # divides the numbers of images that measure quality
    quality_steps: int


FULL = Size(scenes=24_000, vae_steps=2000, vae_batch=16, diffusion_steps=4000, diffusion_batch=32,
            clip_steps=700, clip_batch=64, judge_steps=1600, second_judge_steps=4000, judge_batch=64,
            redrawn=4000, quality_scale=1, quality_steps=20)
SMOKE = Size(scenes=96, vae_steps=4, vae_batch=4, diffusion_steps=4, diffusion_batch=4,
             clip_steps=3, clip_batch=8, judge_steps=4, second_judge_steps=4, judge_batch=8,
             redrawn=8, quality_scale=20, quality_steps=2)


def pretrain(out: Path | None = None, *, smoke: bool = False, without: Sequence[str] = (),
             stages: Sequence[str] | None = None, resume: bool = True, start_from: Path | None = None,
             packages: Path | None = None, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Rebuild the emoji world and train its models; returns the folder they are in.

    Args:
        out: where the models go; the kit's own data folder where None, or `runs/` for a smoke run or an oracle.
        smoke: a tiny size that goes through every stage in under a minute; its models draw nothing.
        without: names that no training scene may hold, for an oracle; the tokenizer still knows their words.
        stages: which of `STAGES` to run; all (for an oracle: those of its pipeline) where None.
        start_from: a folder with a finished pipeline whose tokenizer, VAE and weights the diffusion stage starts from,
            to train it further where its checkpoints are gone.
        resume: go on from the checkpoints of a run that was ended; otherwise start anew.
        packages: a `node_modules` folder with the emoji sets; the committed sprites are used where None.

    Raises:
        ValueError: an unknown stage, an unknown name in `without` or too many of them, or checkpoints in the way that
            were trained with another seed, size, `without`, `start_from` or other sprites.
        FileNotFoundError: sprites, an emoji set, or the pipeline to start from, are missing.
    """
    name = "-".join(["pretrain", *(["smoke"] if smoke else []), *(f"without-{w.replace(' ', '-')}" for w in without)])
    out = Path(out) if out else (Path("runs") / name if smoke or without else data_dir())
    work = out.parent / "checkpoints" / out.name  # beside the models, so that no package takes it along
    sprites = (out if packages else data_dir()) / "sprites"
    pretraining = Pretraining(out, work, sprites, SMOKE if smoke else FULL, tuple(without), seed, packages, log=log)
    chosen = tuple(stages) if stages else ORACLE_STAGES if without else STAGES
    pretraining.check(chosen)
    request = {"seed": seed, "without": sorted(set(without)), "size": "smoke" if smoke else "full",
               "start_from": origin(start_from, out / "emoji-diffusion"),
               "sprites": "bundled" if sprites.resolve() == (data_dir() / "sprites").resolve() else "drawn anew"}
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    if set(chosen) & set(CHECKPOINTED):
        claim(work, request)
    if start_from is not None:
        pretraining.take_over(start_from)
        chosen = tuple(stage for stage in chosen if stage not in ("tokenizer", "vae"))
    return pretraining.run(chosen)


@dataclass
class Pretraining:
    """One run of the recipe: `out` gets the finished models, `work` holds checkpoints until then."""

    out: Path
    work: Path
    sprites: Path
    size: Size = FULL
    without: tuple[str, ...] = ()
    seed: int = 0
    packages: Path | None = None
    start: StableDiffusionPipeline | None = None
    log: Callable[[str], None] = print

    # --- stages -----------------------------------------------------------------------------------------------

    def run(self, stages: Sequence[str] = STAGES) -> Path:
        """Run the stages in order, skipping what is finished; returns the folder of the models."""
        self.check(stages)
        for stage in STAGES:
            if stage in stages:
                self.log(f"--- {stage}")
                getattr(self, "_" + stage.replace("-", "_"))()
        return self.out

    def take_over(self, folder: Path) -> None:
        """Start from a finished pipeline: its tokenizer and VAE stay, its text encoder and U-Net are trained on."""
        self.start = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
        self.start.tokenizer.save_pretrained(self.work / "tokenizer")
        save_whole(self.start.vae, self.work / "vae")

    def check(self, stages: Sequence[str]) -> None:
        """Raise ValueError for unknown stages or names, before anything starts."""
        if unknown := set(stages) - set(STAGES):
            raise ValueError(f"unknown stages: {', '.join(sorted(unknown))}; there are: {', '.join(STAGES)}")
        if unknown := set(self.without) - set(concept_names()):
            known = ", ".join(concept_names())
            raise ValueError(f"the emoji world has no {', '.join(sorted(unknown))}; it has: {known}")
        for kind, names in (("styles", STYLES), ("objects", OBJECTS)):
            if set(names) <= set(self.without):
                raise ValueError(f"all {len(names)} {kind} are left out, so no scene can be drawn; leave at least one "
                                 "of them in (--without names what is left out)")

    def _sprites(self) -> None:
        if self.packages is None:
            self.log(f"using the sprites in {self.sprites} (--packages NODE_MODULES draws them anew)")
            return
        self.log(f"{build_sprites(self.packages, self.sprites)} sprites drawn in {self.sprites}")

    def _tokenizer(self) -> None:
        # The vocabulary is the whole world's, also for an oracle: words it never saw stay tokens without a meaning.
        rng = random.Random(f"tokenizer-{self.seed}")
        captions = [scene.caption(rng) for scene in sample_scenes(6000, self.seed)]
        train_tokenizer(captions, self.work / "tokenizer")

    def _vae(self) -> None:
        folder = self.work / "vae"
        if _finished(folder):
            return
        torch.manual_seed(self.seed)
        vae = new_vae()
        plan = Plan(self.size.vae_steps, learning_rate=2e-3, decay_share=0.4, average=0.998, seed=self.seed)
        self._train("vae", vae, vae_loss(vae, self.images, self.size.vae_batch), plan)
        save_whole(vae, folder)

    def _diffusion(self) -> None:
        folder = self.out / "emoji-diffusion"
        torch.manual_seed(self.seed)
        denoiser = (Denoiser(self.start.text_encoder, self.start.unet) if self.start
                    else Denoiser(new_text_encoder(self.tokenizer), new_unet()))
        data = self._latents()
        empty = tokenise(self.tokenizer, [""])[0]
        plan = Plan(self.size.diffusion_steps, learning_rate=1e-3, warmup=200, decay_share=0.4, seed=self.seed)
        loss = denoising_loss(denoiser, data, empty, self.size.diffusion_batch)
        self._train("diffusion", denoiser, loss, plan)
        self.vae.register_to_config(scaling_factor=data.scaling_factor)
        save_whole(assemble(self.vae.half(), self.tokenizer, denoiser.half()), folder)
        self.vae.float()

    def _clip(self) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(self.out / "emoji-diffusion", safety_checker=None,
                                                       dtype=torch.float32)
        torch.manual_seed(self.seed)
        clip = new_clip(pipe.text_encoder)
        data = self._latents()
        plan = Plan(self.size.clip_steps, learning_rate=1e-3, seed=self.seed, average=0.99)
        self._train("clip", clip, clip_loss(clip, self.images, data.tokens, self.size.clip_batch), plan)
        clip.text_model.load_state_dict(pipe.text_encoder.state_dict())
        folder = self.out / "emoji-clip"
        save_whole(clip.half(), folder)
        self.tokenizer.save_pretrained(folder)
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)

    def _judge(self) -> None:
        torch.manual_seed(self.seed)
        self._train_judge("judge", Judge(), *self._judged_images(), self.size.judge_steps, learning_rate=2e-3)

    def _second_judge(self) -> None:
        images, scenes = self._judged_images()
        more = self.scenes[len(scenes):len(scenes) + self.size.redrawn]
        images, scenes = np.concatenate([images, self._redrawn(more)]), [*scenes, *more]
        torch.manual_seed(self.seed + 1)
        self._train_judge("second-judge", SecondJudge(), images, scenes, self.size.second_judge_steps,
                          learning_rate=1e-3, shift=SECOND_JUDGE_SHIFT)

    def _judged_images(self) -> tuple[np.ndarray, list[Scene]]:
        """A third of the scenes as the VAE gives them back, for generated images are as soft, a third as they are."""
        third = len(self.scenes) // 3
        images = np.concatenate([through_vae(self.vae, self.images[:third]), self.images[third:2 * third]])
        return images, self.scenes[:2 * third]

    def _redrawn(self, scenes: Sequence[Scene]) -> np.ndarray:
        path, pipe = self.work / "redrawn.safetensors", self.out / "emoji-diffusion"
        if path.is_file():
            return load_file(path)["images"].numpy()
        if not (pipe / "model_index.json").is_file():
            raise FileNotFoundError(f"no pipeline in {pipe} to draw with; run the stage diffusion first")
        images = redraw(load(str(pipe)), Renderer(self.sprites).images(scenes), scenes, self.seed)
        with replacing(path) as temporary:
            save_file({"images": torch.from_numpy(images)}, temporary)
        return images

    def _train_judge(self, name: str, judge: Judge | SecondJudge, images: np.ndarray, scenes: Sequence[Scene],
                     steps: int, learning_rate: float, shift: int = 0) -> None:
        labels = _label_matrix(scenes)
        styles = torch.tensor([list(STYLES).index(scene.style) for scene in scenes])
        plan = Plan(steps, learning_rate=learning_rate, seed=self.seed, average=0.99)
        self._train(name, judge, judge_loss(judge, images, labels, styles, self.size.judge_batch, shift), plan)
        save_whole(judge.half(), self.out / f"emoji-{name}")

    def _quality(self) -> None:
        if not (self.out / "emoji-judge").is_dir():
            raise FileNotFoundError(f"no judge in {self.out} to measure with; run the stage judge first")
        quality = Quality(self.out, self.sprites, self.size.quality_scale, self.size.quality_steps, self.log)
        figures = quality.measure()
        record = _read_json(self.work / "training.json") or _read_json(self.out / "emoji-diffusion/training.json")
        write_card(self.out / "emoji-diffusion", figures, record or {}, quality.pipe, self.size.quality_steps)

    def _picture(self) -> None:
        pipe = load(self.out / "emoji-diffusion")
        pipe.set_progress_bar_config(disable=True)
        small = {"steps": 2, "reference_count": 2, "reference_steps": 2, "retain_count": 2}
        write_picture(pipe, self.out / "pictures" / "before-after.png", self.size.quality_steps,
                      **(small if self.size is SMOKE else {}))
        if self.out.resolve() == data_dir().resolve():
            write_checksums(self.out)

    # --- what stages share ------------------------------------------------------------------------------------

    @cached_property
    def scenes(self) -> list[Scene]:
        return sample_scenes(self.size.scenes, self.seed, without=self.without)

    @cached_property
    def images(self) -> np.ndarray:
        return Renderer(self.sprites).images(self.scenes)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self._part("tokenizer"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self._part("vae"), dtype=torch.float32).eval()

    def _part(self, name: str) -> Path:
        """The folder of this run's tokenizer or VAE, else of the finished pipeline's: checkpoints may be long gone."""
        for folder in (self.work / name, self.out / "emoji-diffusion" / name):
            if folder.is_dir():
                return folder
        there = f"{self.work} or {self.out / 'emoji-diffusion'}"
        raise FileNotFoundError(f"no {name} in {there}; run the stage {name} first")

    def _latents(self) -> Latents:
        path = self.work / "latents.safetensors"
        if path.is_file():
            stored = load_file(path)
            return Latents(stored["mean"], stored["std"], stored["tokens"], stored["scaling_factor"].item())
        data = prepare_latents(self.vae, self.tokenizer, self.scenes, self.images, self.seed)
        with replacing(path) as temporary:
            save_file({"mean": data.mean, "std": data.std, "tokens": data.tokens,
                       "scaling_factor": torch.tensor(data.scaling_factor)}, temporary)
        return data

    def _train(self, name: str, module: torch.nn.Module, loss: Callable, plan: Plan) -> None:
        training = Training(name, module, loss, plan, self.work / f"{name}.safetensors", log=self.log)
        training.run()
        path = self.work / "training.json"
        record = _read_json(path) or {}
        record[name] = {"steps": training.step, "seconds": round(training.seconds)}
        if name == "diffusion" and self.start:
            record[name]["started_from"] = "a finished pipeline"
        write_json(path, record)


def _label_matrix(scenes: Sequence[Scene]) -> torch.Tensor:
    """[scenes, labels], 1 where a label is in the scene."""
    matrix = torch.zeros(len(scenes), len(LABELS))
    for row, scene in zip(matrix, scenes, strict=True):
        row[[LABELS.index(label) for label in scene.labels]] = 1
    return matrix


def _read_json(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


def _finished(folder: Path) -> bool:
    return (folder / "config.json").is_file()
