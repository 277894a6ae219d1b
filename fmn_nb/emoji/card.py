"""The model card of the emoji model: what was trained, for how long, what was measured, and what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image

from fmn_nb.emoji.captions import caption
from fmn_nb.emoji.quality import STEPS, Figure, as_json
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES
from fmn_nb.files import replacing, write_json, write_text
from fmn_nb.generation import GUIDANCE, generate

COLUMNS = 12
CARD = """# emoji: a Stable Diffusion in miniature

A complete `StableDiffusionPipeline` (CLIP tokenizer and text encoder, VAE, U-Net with cross-attention at 16 x 16,
8 x 8 and 4 x 4 latents, DPM-Solver++), trained from scratch on openly licensed emoji artwork (see `data/README.md`).
It is a model organism for the study of concept erasure, small enough to forget a concept on a laptop in seconds.
It draws 64 x 64 pixels and knows {objects} objects in {styles} styles, {names} proper names bound to one drawing each,
and {words} ambiguous words.

    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("data/emoji-diffusion", safety_checker=None)
    pipe("a photo of a cat in the style of noto", num_inference_steps=20, guidance_scale=4).images[0]

## Sizes and training

| part | parameters |
|---|---|
{sizes}

| training | steps | minutes |
|---|---|---|
{training}

Minutes are those of one machine with two CPU cores, shared with other work. The recipe is `fmn-nb pretrain`; the
sizes of everything stand in `fmn_nb/emoji/pretrain.py`.{history}

## Measured

By `fmn-nb pretrain --stages quality` with 95% Wilson intervals (for the PSNR: normal); generated images with
{steps} steps and guidance {guidance:g}, each from a seed of its own. Scenes counted as held out were never trained on.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

## What it draws

Every object (columns) in every style (rows: {style_names}):

![24 objects in six styles, one row a style](images/objects.png)

Two objects, "a photo of a ... and a ... in the style of ...":

![scenes with two objects side by side](images/pairs.png)

Proper names, six images each, a row a name: {identity_names}:

![four rows of animals, each row the same drawing](images/identities.png)

Ambiguous words, twelve images each, a row a word: {word_names}. Most show the dominant reading, a few the
overshadowed one:

![three rows: mice and computer mice, ribbon bows and archery bows, bats and cricket bats](images/ambiguous.png)

## Limits

It knows nothing beyond its vocabulary and draws with little variety in place and size. Findings on it show how a
method works, not how well it works on a large model.
"""


CONTINUED = """ The diffusion model went on from a finished pipeline of the
same recipe (`fmn-nb pretrain --start-from`), whose own steps and minutes are not in the table; parts that are not in
the table either were taken from an earlier training by the same recipe. Whether the recipe meets the bars from nothing,
in the steps that `fmn-nb pretrain` takes, was not measured."""


def write_card(folder: Path, figures: Sequence[Figure], training: dict, pipe: StableDiffusionPipeline,
               steps: int = STEPS) -> Path:
    """Write README.md, quality.json, training.json and the images of the model card into the model's folder."""
    for name, image in draw_grids(pipe, steps).items():
        path = folder / "images" / f"{name}.png"
        with replacing(path) as temporary:
            image.save(temporary, optimize=True)
    write_json(folder / "quality.json", as_json(list(figures)))
    write_json(folder / "training.json", training)
    return write_text(folder / "README.md", _text(figures, training, pipe, steps))


def _text(figures: Sequence[Figure], training: dict, pipe: StableDiffusionPipeline, steps: int) -> str:
    parts = {"text encoder": pipe.text_encoder, "U-Net": pipe.unet, "VAE": pipe.vae}
    return CARD.format(
        objects=len(OBJECTS), styles=len(STYLES), names=len(IDENTITIES), words=len(AMBIGUOUS),
        sizes="\n".join(f"| {n} | {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M |" for n, m in parts.items()),
        training="\n".join(f"| {n} | {t['steps']} | {t['seconds'] / 60:.0f} |" for n, t in training.items()),
        history=CONTINUED if training.get("diffusion", {}).get("started_from") else "",
        steps=steps, guidance=GUIDANCE,
        figures="\n".join(_row(f) for f in figures),
        style_names=", ".join(STYLES), identity_names=", ".join(IDENTITIES), word_names=", ".join(AMBIGUOUS),
    )


def _row(figure: Figure) -> str:
    met = "met" if figure.met else "**not met**"
    interval = f"{figure.low:.3f} to {figure.high:.3f}" if figure.low < figure.high else ""
    return f"| {figure.name} | {figure.value:.3f} | {interval} | {figure.count} | {figure.bar_text} | {met} |"


def draw_grids(pipe: StableDiffusionPipeline, steps: int = STEPS) -> dict[str, Image.Image]:
    """The card's grids by name, each drawn from fixed seeds."""
    names = list(OBJECTS)
    pairs = [(names[i % 24], names[(7 * i + 5) % 24], list(STYLES)[i % 6]) for i in range(2 * COLUMNS)]
    prompts = {
        "objects": ([caption([o], s) for s in STYLES for o in OBJECTS], len(OBJECTS)),
        "pairs": ([caption([a, b], s) for a, b, s in pairs], COLUMNS),
        "identities": ([caption([n]) for n in IDENTITIES for _ in range(6)], 6),
        "ambiguous": ([caption([w]) for w in AMBIGUOUS for _ in range(COLUMNS)], COLUMNS),
    }
    return {name: grid(generate(pipe, texts, range(len(texts)), steps=steps), columns)
            for name, (texts, columns) in prompts.items()}


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size, row by row, `gap` pixels of white between them."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet
