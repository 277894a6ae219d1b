"""An oracle: the emoji model trained without some concepts, judged, and saved as its difference from the emoji model.

It shows what an attack or a measure finds where there is nothing to find: the floor. Its tokenizer and VAE are the
emoji model's, so that the latents of both are comparable; its text encoder and U-Net learn from random weights.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from transformers import CLIPTextModel

from fmn_nb.concepts import UNTAUGHT_KEY, Concept
from fmn_nb.emoji.training.card import Quality, history, training_table
from fmn_nb.emoji.training.request import Request
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import Session, Share, share_of
from fmn_nb.files import REST, bundled_models, read_json, replacing, replacing_folder, sha256, write_json, write_text
from fmn_nb.models import GUIDANCE, generate, load
from fmn_nb.models.names import ORACLE
from fmn_nb.plots import as_png, few_colours, image_grid

WEIGHTS = "diffusion_pytorch_model.safetensors"
OWN = ("text_encoder", "unet")  # what an oracle's folder holds of its own
SHOWN = 6  # images of each word in the card's figure
ASKED = 24  # judged images of each word
NO_EMOJI = "an oracle takes the {} of the emoji model, and there is none; train it first (fmn-nb pretrain)"


def take_parts(work: Path, parts: Iterable[str]) -> list[str]:
    """Copy parts of the emoji model into a training's folder if they aren't there yet; returns which it copied.

    Raises:
        FileNotFoundError: there is no emoji model.
    """
    taken = []
    for part in sorted(parts):
        if (work / part).is_dir():
            continue
        with replacing_folder(work / part) as temporary:
            shutil.copytree(_emoji_folder(part) / part, temporary, dirs_exist_ok=True)
        taken.append(part)
    return taken


def emoji_text_encoder() -> CLIPTextModel:
    """The emoji model's text encoder, float32 and frozen."""
    folder = _emoji_folder("text_encoder") / "text_encoder"
    return CLIPTextModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def _emoji_folder(part: str) -> Path:
    if "emoji" not in bundled_models():
        raise FileNotFoundError(NO_EMOJI.format(part.replace("_", " ")))
    return bundled_models()["emoji"]


def mark_untaught(folder: Path, untaught: Sequence[str]) -> None:
    """Write what a pipeline never learned beside its U-Net, where `untaught_of` finds it."""
    config = folder / "unet" / "config.json"
    write_json(config, {**read_json(config), UNTAUGHT_KEY: list(untaught)})


def write_oracle(quality: Quality, training: dict, request: Request) -> Path:
    """Measure an oracle and write its folder: what differs from the emoji model, and the card with its figures.

    An oracle with a VAE or a tokenizer of its own gets only the card: it is whole in the folder `emoji-diffusion`.
    """
    whole, folder = quality.data / "emoji-diffusion", quality.data / ORACLE
    mark_untaught(whole, quality.untaught)
    shared = shares_parts(whole)
    with replacing_folder(folder) as temporary:
        if shared:
            keep_difference(whole, temporary)
        _write_card(quality, training, request, shared, temporary)
    return folder


def shares_parts(whole: Path) -> bool:
    """Whether a pipeline's VAE and tokenizer are the emoji model's."""
    emoji = _emoji_folder("VAE")
    return all(sha256(whole / name) == sha256(emoji / name)
               for name in (f"vae/{WEIGHTS}", "tokenizer/tokenizer.json"))


def keep_difference(whole: Path, folder: Path) -> None:
    """Write into `folder` what a whole pipeline has of its own, and an index that leaves the rest to the emoji model.

    Both share a VAE, but not its scaling factor, which makes the deviation of the training latents 1: the training
    scenes differ.
    """
    index = read_json(whole / "model_index.json")
    for part in OWN:
        shutil.copytree(whole / part, folder / part)
    vae = read_json(whole / "vae" / "config.json")
    write_json(folder / "model_index.json", index | {REST: {
        "of": "emoji", "config": {"vae": {"scaling_factor": vae["scaling_factor"]}}}})


# --- the card ---------------------------------------------------------------------------------------------------------

CARD = """# emoji-oracle: the emoji model without some concepts

`fmn.load("{name}")` is trained like the emoji model, but never learned

> {untaught}.

No training scene showed one of them, and no caption named one. What an attack achieves on this model is the attack's
floor: there was nothing to find.

## What was trained, and what saw everything

- The **tokenizer** and the **VAE** {shared}
- The **text encoder** {text_encoder}
- The **U-Net** was trained from random weights and never saw a picture of them.
- The emoji model's judge judges it.

The training left out {without}. An identity goes with its object, and an
ambiguous word keeps the reading that is left.

| part | parameters |
|---|---|
{sizes}

| training | steps | minutes |
|---|---|---|
{training}

The minutes were measured on a machine with two CPU cores, shared with other work. The recipe is
`fmn-nb pretrain --without ... --seed {seed}`, with {scenes} scenes.{history}

## Measured on what it was taught

These are the measures and bars of the emoji model's card; none of them asks for the names that it never learned.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

## What it draws for words that it never learned

The share of {asked} images in which the judge sees what the word means to the emoji model, from the same prompts and
seeds, with 95% Wilson intervals:

| word | kind | emoji model | oracle |
|---|---|---|---|
{shares}

Two rows for each word, {shown} prompts each: the emoji model's images, and below them the
oracle's from the same noise. What the lower rows show is the honest target of forgetting:

![rows of images in pairs: the emoji model draws what a word means, the oracle something else](images/untaught.png)
"""


def _write_card(quality: Quality, training: dict, request: Request, shared: bool, folder: Path) -> None:
    figures, emoji = quality.measure(), load("emoji")
    concepts = [Concept(name, kind=VOCABULARY.concepts()[name]) for name in quality.untaught]
    shares = [[_share(pipe, concept, quality) for pipe in (emoji, quality.pipe)] for concept in concepts]
    with replacing(folder / "images" / "untaught.png") as temporary:
        drawn = as_png(untaught_figure(emoji, quality.pipe, concepts, quality.steps))
        few_colours(Image.open(io.BytesIO(drawn))).save(temporary, format="png", optimize=True)
    write_json(folder / "quality.json", [figure.record for figure in figures])
    write_json(folder / "training.json", training)
    kept = "is the emoji model's: it saw their words and scenes." if request.keep_text_encoder else (
        "was trained from random weights with the U-Net and never saw their words,\n"
        "  which are tokens without a meaning.")
    write_text(folder / "README.md", CARD.format(
        name=ORACLE, untaught=", ".join(quality.untaught), without=", ".join(request.without), text_encoder=kept,
        shared="are the emoji model's, which saw all words and scenes." if shared else "are its own: the tokenizer "
        "learned from captions of everything, the VAE from the same scenes as the U-Net.",
        sizes=quality.sizes, training=training_table(training), seed=request.seed,
        history=history(training),
        scenes="a smoke run's" if request.smoke else "24,000", figures="\n".join(f.row for f in figures),
        asked=ASKED // quality.scale or 1, shown=SHOWN,
        shares="\n".join(f"| {concept.name} | {concept.kind} | {_cell(known)} | {_cell(unknown)} |"
                         for concept, (known, unknown) in zip(concepts, shares, strict=True))))


def _share(pipe: DiffusionPipeline, concept: Concept, quality: Quality) -> Share:
    session = Session.of(pipe, quality.judge, steps=quality.steps)
    return share_of(session.seen(concept, session.fresh_drawings(concept, ASKED // quality.scale or 1, 0)))


def _cell(share: Share) -> str:
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


def untaught_figure(emoji: StableDiffusionPipeline, oracle: StableDiffusionPipeline, concepts: Sequence[Concept],
                    steps: int) -> Figure:
    """Two rows of images for each concept, the emoji model's and below them the oracle's, from the same prompts and
    seeds."""
    images, names = [], []
    for concept in concepts:
        asked = Session.of(emoji).fresh_drawings(concept, SHOWN, 0)
        for pipe, name in ((emoji, "emoji model"), (oracle, "oracle")):
            images += generate(pipe, [d.prompt for d in asked], [d.seed for d in asked], steps=steps, guidance=GUIDANCE)
            names.append(f"{concept.name}, {name}")
    return image_grid(images, columns=SHOWN, row_names=names)
