"""What to train, and which checkpoints belong to it: the request of `pretrain`, checked before any heavy work.

A folder of checkpoints notes what they were trained with, so that no other request continues from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmn_nb.emoji.world import OBJECTS, STYLES, VOCABULARY
from fmn_nb.files import data_dir, read_json, write_json
from fmn_nb.models.names import GROUNDED_ORACLE, ORACLE

REQUEST_FILE = "request.json"
UNCHECKPOINTED = ("sprites", "quality")  # stages that resume nothing


@dataclass(frozen=True)
class Organism:
    """A model that `pretrain` can make.

    Attributes:
        folder: its pipeline's name in the folder of models.
        recipe: "module:class" of the `Pretraining` that has a method for each stage.
        stages: the steps of making it, in order.
        oracle_stages: those of an oracle, which the bundled judge and CLIP judge.
        oracle: an oracle's folder in the output folder.
    """

    folder: str
    recipe: str
    stages: tuple[str, ...]
    oracle_stages: tuple[str, ...]
    oracle: str


DEFAULT_ORGANISM = "emoji"
ORGANISMS: dict[str, Organism] = {
    DEFAULT_ORGANISM: Organism(
        "emoji-diffusion", "fmn_nb.emoji.training.recipe:Pretraining",
        ("sprites", "tokenizer", "vae", "diffusion", "clip", "judge", "second-judge", "quality"),
        ("diffusion", "quality"), ORACLE),  # an oracle has the emoji model's tokenizer and VAE
    "joint": Organism("emoji-joint", "fmn_nb.emoji.training.joint:JointPretraining", ("joint", "quality"), ("joint",),
                      "emoji-joint"),
    "grounded": Organism("emoji-grounded", "fmn_nb.emoji.training.grounded:GroundedPretraining",
                         ("grounded", "quality"), ("grounded", "quality"), GROUNDED_ORACLE),
}


@dataclass(frozen=True)
class Size:
    """How much of everything; `batch` counts images."""

    scenes: int = 24_000
    vae_steps: int = 2000
    vae_batch: int = 16
    diffusion_steps: int = 9000
    diffusion_batch: int = 32
    clip_steps: int = 700
    clip_batch: int = 64
    judge_steps: int = 1600
    second_judge_steps: int = 4000  # attention learns slower than filters
    judge_batch: int = 64
    joint_steps: int = 14_000
    joint_batch: int = 32
    grounded_scenes: int = 16_000
    gated_start_steps: int = 1500  # after 250, layers beside an oracle hardly knew yet what to write
    gated_start_batch: int = 16
    grounded_steps: int = 6000
    grounded_batch: int = 32
    redrawn: int = 4000  # scenes that the diffusion model draws again for the second judge
    quality_scale: int = 1  # divides the numbers of images that measure quality
    quality_steps: int = 20


SMOKE = Size(scenes=96, vae_steps=4, vae_batch=4, diffusion_steps=4, diffusion_batch=4,
             clip_steps=3, clip_batch=8, judge_steps=4, second_judge_steps=4, judge_batch=8,
             joint_steps=4, joint_batch=4, grounded_scenes=48, gated_start_steps=2,
             gated_start_batch=4, grounded_steps=4, grounded_batch=4,
             redrawn=8, quality_scale=20, quality_steps=2)


@dataclass(frozen=True)
class Request:
    """What to train, and where.

    Attributes:
        organism: which of `ORGANISMS` to make.
        out: where the models go; the kit's own data folder where None, or `runs/` for a smoke run or an oracle.
        smoke: a tiny size that goes through every stage in under a minute; its models draw nothing.
        without: names that no training scene may hold, for an oracle. It takes the emoji model's tokenizer and VAE,
            which saw everything, so that latents are comparable, unless `stages` names those that train its own.
        keep_text_encoder: train only the oracle's U-Net, under the emoji model's text encoder, which saw every word.
        stages: which of the organism's stages to run; if empty, all (for an oracle: those of its pipeline).
        resume: continue from the checkpoints of an interrupted run; otherwise start anew.
        start_from: a folder with a finished pipeline whose tokenizer, VAE and weights the denoiser's stage starts
            from, to train it further when its checkpoints are gone.
        packages: a `node_modules` folder with the emoji sets; None for the committed sprites.

    Raises:
        ValueError: an unknown organism or stage, an unknown name in `without`, or too many of them; a kept text
            encoder without an oracle; an oracle in the emoji model's place.
    """

    out: Path | None = None
    organism: str = DEFAULT_ORGANISM
    smoke: bool = False
    without: Sequence[str] = ()
    keep_text_encoder: bool = False
    stages: Sequence[str] = ()
    resume: bool = True
    start_from: Path | None = None
    packages: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.organism not in ORGANISMS:
            raise ValueError(f"no organism is called {self.organism!r}; choose one of {', '.join(ORGANISMS)}")
        if unknown := set(self.stages) - set(self.made.stages):
            raise ValueError(f"unknown stages: {', '.join(sorted(unknown))}; choose from {', '.join(self.made.stages)}")
        if unknown := set(self.without) - set(VOCABULARY.concepts()):
            known = ", ".join(VOCABULARY.concepts())
            raise ValueError(f"the emoji world has no {', '.join(map(repr, sorted(unknown)))}; it has: {known}")
        if self.keep_text_encoder and (not self.without or self.start_from or self.organism != DEFAULT_ORGANISM):
            raise ValueError("only an oracle of the emoji model, trained from scratch, keeps its text encoder: name "
                             "what it never learns (--without), and leave out --start-from")
        if self.without and self.out is not None and self.out.resolve() == data_dir().resolve():
            raise ValueError(f"an oracle would take the emoji model's place in {self.out}: give another --out, and "
                             f"copy its folder {self.model} to {data_dir()} when it is trained")
        for kind, names in (("styles", STYLES), ("objects", OBJECTS)):
            if set(names) <= set(self.without):
                raise ValueError(f"all {len(names)} {kind} are left out, so no scene is left; leave at least one "
                                 "of them in (--without names what is left out)")

    @property
    def made(self) -> Organism:
        """The organism to make."""
        return ORGANISMS[self.organism]

    @property
    def model(self) -> str:
        """The folder of the organism among the models."""
        return self.made.oracle if self.without else self.made.folder

    @property
    def folder(self) -> Path:
        """Where the models go."""
        if self.out is not None:
            return Path(self.out)
        if not self.smoke and not self.without:
            return data_dir()
        left_out = "".join(f"-without-{name.replace(' ', '-')}" for name in self.without)
        return Path("runs") / f"pretrain{self._other}{'-smoke' if self.smoke else ''}{left_out}"

    @property
    def work(self) -> Path:
        """Where checkpoints are: beside the models, so that no package takes them along."""
        folder = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()  # '.' names no folder
        return folder.parent / "checkpoints" / f"{folder.name}{self._other}"

    @property
    def _other(self) -> str:
        """The suffix of the folders of every organism but the first."""
        return "" if self.organism == DEFAULT_ORGANISM else f"-{self.organism}"

    @property
    def sprites(self) -> Path:
        """Where the sprites are, or where newly rasterised ones go."""
        return (self.folder if self.packages else data_dir()) / "sprites"

    @property
    def chosen(self) -> list[str]:
        """The stages to run, in order."""
        chosen = self.stages or (self.made.oracle_stages if self.without else self.made.stages)
        taken_over = ("tokenizer", "vae") if self.start_from else ()
        return [stage for stage in self.made.stages if stage in chosen and stage not in taken_over]

    def noted(self) -> dict[str, Any]:
        """What checkpoints must have been trained with for this request to continue from them."""
        other = {} if self.organism == DEFAULT_ORGANISM else {"organism": self.organism}
        other |= {"text_encoder": "the emoji model's"} if self.keep_text_encoder else {}
        return {**other, "seed": self.seed, "without": sorted(set(self.without)),
                "size": "smoke" if self.smoke else "full",
                "start_from": origin(self.start_from, self.folder / self.made.folder),
                "sprites": "bundled" if self.sprites.resolve() == (data_dir() / "sprites").resolve() else "drawn anew"}


def claim(work: Path, noted: Mapping[str, Any]) -> None:
    """Note in the folder `work` what is trained there (`Request.noted`); noting the same again changes nothing.

    Raises:
        ValueError: the folder holds checkpoints of another request, or checkpoints without a note.
    """
    path, differing = work / REQUEST_FILE, list(noted)
    if path.is_file():
        before = read_json(path)
        differing = [name for name in {**before, **noted} if before.get(name) != noted.get(name)]
        theirs = f"were trained with {_listed(before, differing)}"
    elif any(work.glob("*.safetensors")):
        raise ValueError(f"the checkpoints in {work} don't say what they were trained with, so nothing continues from "
                         "them and nothing removes them: delete the folder, or give another --out")
    else:
        write_json(path, dict(noted))
        return
    if differing:
        raise ValueError(f"the checkpoints in {work} {theirs}, this training has {_listed(noted, differing)}; "
                         "give another --out, or train anew with --restart")


def origin(start_from: Path | None, own: Path) -> str | None:
    """What a training starts from, in words that stay the same when folders move; None if it starts from scratch.

    `own` is the folder that the training itself replaces: its content says nothing, since it changes on the way.

    Raises:
        FileNotFoundError: `start_from` holds no pipeline.
    """
    if start_from is None:
        return None
    if not (start_from / "model_index.json").is_file():
        raise FileNotFoundError(f"{start_from} holds no model_index.json; start from a finished pipeline's folder")
    if start_from.resolve() == own.resolve():
        return "the pipeline in its own folder"
    digest = hashlib.sha256()
    for file in sorted([*start_from.rglob("*.safetensors"), *start_from.glob("tokenizer/tokenizer.json")]):
        digest.update(file.relative_to(start_from).as_posix().encode())
        digest.update(file.read_bytes())
    return f"the pipeline {digest.hexdigest()[:16]}"


def _listed(noted: Mapping[str, Any], names: Sequence[str]) -> str:
    said = {name: ", ".join(value) if isinstance(value, list) else value for name, value in noted.items()}
    return ", ".join(f"{name} {'nothing' if said.get(name) in (None, '') else said[name]}" for name in names)
