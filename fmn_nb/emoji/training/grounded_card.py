"""The card of the organism with interaction control: bars with intervals, ablations, strength, eight relations."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from fmn_nb.control import ACTIONS, RELATIONS, How, Interaction, draw_grounded, holds, laid_out, union
from fmn_nb.emoji.finding import find, seen_in
from fmn_nb.emoji.grounded_scenes import GroundedScene, sample_grounded
from fmn_nb.emoji.judges import Judge
from fmn_nb.emoji.scenes import Renderer, sample_scenes
from fmn_nb.emoji.training.card import Figure, share_figure
from fmn_nb.emoji.world import OBJECTS, STYLES, caption
from fmn_nb.evaluation import judge_features
from fmn_nb.evaluation.quality import Features, kernel_distance
from fmn_nb.files import data_dir, replacing, write_json, write_text
from fmn_nb.models import generate, load
from fmn_nb.plots import few_colours
from fmn_nb.stats import mean_interval, wilson

SLACK = 0.1  # for relations between found boxes: half a window's step and half a thing's rim
FOLDS = 5  # of the kernel distance's interval
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SCENES = {"one": 0.65, "two": 0.35}
ABLATED = {"everything": (), "no between box": ("between",), "no role": ("role",), "no action token": ("action",)}
Share = tuple[int, int]  # successes, trials


@dataclass
class GroundedQuality:
    """Measures the grounded model in `folder`. `scale` divides the numbers of images; images take `steps` steps."""

    folder: Path
    sprites: Path
    scale: int = 1
    steps: int = 20
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.pipe = load(str(self.folder), device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        judge = self.folder.parent / "emoji-judge"
        self.judge = Judge.load(judge if judge.is_dir() else data_dir() / "emoji-judge")
        self.renderer = Renderer(self.sprites)
        self.scenes = sample_grounded(max(FOLDS * 2, 200 // self.scale), 1, self.renderer, held_out=True, sorts=SCENES)
        self.few = self.scenes[:max(4, 80 // self.scale)]
        self.relations: dict[str, Share] = {}

    def draw(self, scenes: Sequence[GroundedScene], sort: str = "named", shared: bool = False,
             without: Collection[str] = (), strength: float = 0.8) -> list[Image.Image]:
        """One image for each scene: its caption of a sort, its interactions (`shared`: one box around both)."""
        rng = random.Random(f"captions-{sort}")
        prompts = [replace_style(scene, rng, sort) for scene in scenes]
        boxes = [[_shared(one) for one in s.interactions] if shared else list(s.interactions) for s in scenes]
        how = How(strength=strength, steps=self.steps, without=without)
        return draw_grounded(self.pipe, prompts, boxes, range(len(scenes)), how)

    def in_boxes(self, scenes: Sequence[GroundedScene], images: Sequence[Image.Image],
                 but: Sequence[Collection[str]] | None = None) -> Share:
        """How many of all named things the judge sees in their boxes without any of `but` (a set for each scene)."""
        asked = [(image, name, box, set() if but is None else set(but[n])) for n, (scene, image) in
                 enumerate(zip(scenes, images, strict=True)) for name, box in named_boxes(scene)]
        seen = seen_in(self.judge, [one[0] for one in asked], [one[2] for one in asked])
        return sum(one[1] in there and not (one[3] & there) for one, there in zip(asked, seen, strict=True)), len(asked)

    def related(self, scenes: Sequence[GroundedScene], images: Sequence[Image.Image],
                keep: dict[str, Share] | None = None) -> Share:
        """In how many of all interactions both things are found anywhere and stand as the action says."""
        hits = count = 0
        for scene, image in zip(scenes, images, strict=True):
            for one in scene.interactions:
                places = [find(self.judge, image, name, (box[2] - box[0], box[3] - box[1]))
                          for name, box in ((one.subject, one.subject_box), (one.object, one.object_box))]
                right = all(place.there for place in places) and holds(one.action, *(p.box for p in places), SLACK)
                hits, count = hits + right, count + 1
                if keep is not None:
                    before = keep.get(one.action, (0, 0))
                    keep[one.action] = (before[0] + right, before[1] + 1)
        return hits, count

    def measure(self) -> list[Figure]:
        """The figures with bars; each is logged as soon as it is known."""
        figures = []
        for figure in self._figures():
            self.log(figure.row)
            figures.append(figure)
        return figures

    def _figures(self):  # noqa: ANN202 - an iterator of Figure
        real = self.renderer
        truth = [Image.fromarray(scene.image(real)) for scene in self.scenes]
        yield share_figure("real scenes: named object in its box (the judge's ceiling)",
                           *self.in_boxes(self.scenes, truth), 0.0)
        yield share_figure("real scenes: relation right (the judge's ceiling)", *self.related(self.few, truth[:len(
            self.few)]), 0.0)
        images = self.draw(self.scenes)
        yield share_figure("named object in its box", *self.in_boxes(self.scenes, images), 0.85)
        yield share_figure("relation right", *self.related(self.scenes, images, self.relations), 0.85)
        rng = random.Random("conflict")
        others = [rng.sample([o for o in OBJECTS if o not in scene.names], 2) for scene in self.few]
        prompts = [caption(two, scene.scene.style) for two, scene in zip(others, self.few, strict=True)]
        against = draw_grounded(self.pipe, prompts, [list(s.interactions) for s in self.few],
                                range(5000, 5000 + len(self.few)), How(steps=self.steps))
        yield share_figure("caption names others: boxes win", *self.in_boxes(self.few, against, others), 0.7)
        yield self._kernel(images, np.stack([np.asarray(one) for one in truth]))
        for said, sort in (("on the grid", "thing"), ("between the grid's places", "between")):
            scenes = sample_grounded(len(self.few), 2, self.renderer, sorts={sort: 1.0})
            images = self.draw(scenes, "neutral")
            yield share_figure(f"one thing {said}: in its box", *self.in_boxes(scenes, images), 0.0)

    def _kernel(self, images: Sequence[Image.Image], truth: np.ndarray) -> Figure:
        """The kernel distance of grounded images to the real scenes; its bar is that of the plain model's pairs to
        real pairs."""
        features = judge_features(self.judge)
        pairs = sample_scenes(len(images), 1, held_out=True, sorts={"pair": 1.0})
        plain = generate(self.pipe, [caption(s.words, s.style, s.background) for s in pairs], range(len(pairs)),
                         steps=self.steps)
        real = self.renderer.images(pairs)
        own, other = (_folds(features, *sides) for sides in ((truth, images), (real, plain)))
        value, high = float(np.mean(own)), max(float(np.mean(other)), mean_interval(other)[1])
        low, up = mean_interval(own)
        return Figure("kernel distance to real scenes (bar: the plain model's upper limit)", max(0.0, value),
                      max(0.0, low), max(0.0, up), len(images), (0.0, max(high, 1e-6)))

    def ablations(self) -> dict[str, dict[str, Share]]:
        """What is left out while drawing -> named thing in its box, relation right, and relation right when both
        things have one box around them, so that only the action says how they stand."""
        found = {}
        single = [scene for scene in self.scenes if len(scene.interactions) == 1][:len(self.few)]
        for name, without in ABLATED.items():
            images = self.draw(self.few, without=without)
            shared = self.draw(single, shared=True, without=without)
            found[name] = {"in its box": self.in_boxes(self.few, images), "relation": self.related(self.few, images),
                           "relation, one box for both": self.related(single, shared)}
            self.log(f"{name}: {found[name]}")
        return found

    def strengths(self) -> dict[float, Share]:
        """Share of the steps with grounding -> named thing in its box, with a caption that names nothing."""
        few = self.few[:max(4, len(self.few) // 2)]
        return {s: self.in_boxes(few, self.draw(few, "neutral", strength=s)) for s in STRENGTHS}


def named_boxes(scene: GroundedScene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The things of a scene's interactions with their boxes."""
    return [(name, box) for one in scene.interactions
            for name, box in ((one.subject, one.subject_box), (one.object, one.object_box)) if name]


def replace_style(scene: GroundedScene, rng: random.Random, sort: str) -> str:
    """A caption of a sort that always names the style, as the card's other figures do."""
    said = scene.caption(rng, sort)
    return said if scene.scene.style in said else f"{said} in the style of {scene.scene.style}"


def _shared(one: Interaction) -> Interaction:
    both = union(one.subject_box, one.object_box)
    return replace(one, subject_box=both, object_box=both)


def _folds(features: Features, real: np.ndarray, images: Sequence[Image.Image]) -> list[float]:
    """The kernel distance of each of some parts of the images to all real ones."""
    return [kernel_distance(features, real, list(images)[start::FOLDS]) for start in range(FOLDS)]


# ---- the card --------------------------------------------------------------------------------------------------------

CARD = """# emoji-grounded: who does what, where

Interaction control for the emoji model: gated self-attention to boxes (GLIGEN's layers, arXiv 2301.07093) with the
tokens of InteractDiffusion (arXiv 2312.05849): subject, action and object, the action's box *between* the two, and
learned vectors of roles and instances. This folder holds only the new weights, {parameters:.2f} million parameters in
half precision; all else is the emoji model beside it, unchanged. Without interactions, both draw the same images.

    import fmn_nb as fmn
    pipe = fmn.load("emoji-grounded")
    fmn.draw_interactions(pipe, "a photo in the style of noto", "cat=chasing=frog", seeds=[0])

`fmn_nb.control.save_pipeline(pipe, folder)` writes a whole folder that a plain `StableDiffusionPipeline` loads.

It knows the emoji model's objects and the actions {actions}. It was trained on composed scenes of one to three things
alone or one or two interactions, whose boxes and relations are known exactly. About one in eight pairs of objects was
never shown together, and everything below is measured on such pairs.

The emoji model itself only ever drew things of two sizes in three places. So the training scenes keep to these sizes
(boxes of about .45 and .75 of the image, and of .3 for what is inside or carried) and to a coarse grid of places
(middles at .25, .5 and .75). The last rows of the table below compare these places with others.

| training | steps | minutes |
|---|---|---|
{training}

## Measured

Measured with `fmn-nb pretrain --organism grounded --stages quality`, with 95% intervals (Wilson's; for the kernel
distance Student's over {folds} parts), {steps} steps and strength 0.8. A thing is in its box if the judge sees it in
the box's content. A relation is right if the judge finds both things anywhere in the image, and they stand as the
action says. The judge never learned overlapping things, so the first two rows say what it finds in real scenes.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

| action | relation right | of |
|---|---|---|
{by_action}

### Ablations

Parts left out while drawing, not in training. "One box for both": subject and object both get the box around the two.

| left out | {ablation_names} |
|---|---|---|---|
{ablations}

### Strength

Strength is the share of the steps in which the boxes count; here the prompt names none of the things.

| strength | thing in its box |
|---|---|
{strengths}

## Eight relations

One row per action ({actions}), four seeds; the boxes are laid out from the action and drawn in the first column.

![eight rows of images, each with two things that stand to each other as the action says](images/relations.png)
"""


def relations_picture(quality: GroundedQuality, columns: int = 4) -> Image.Image:
    """A row for each action: the boxes (subject red, object blue, between black), then an image for each seed."""
    rows = []
    for number, action in enumerate(ACTIONS):
        subject, other = (("frog", "house") if RELATIONS[action].direction == "nested" and action == "inside"
                          else ("cat", "crown") if action == "carrying" else ("cat", "frog"))
        one = laid_out([Interaction(subject, action, other)])[0]
        plan = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(plan)
        for box, colour in ((one.subject_box, "red"), (one.object_box, "blue"), (one.between, "black")):
            pen.rectangle([min(63, round(64 * side)) for side in box], outline=colour)
        style = list(STYLES)[number % 2 * 4]
        rows += [plan, *draw_grounded(quality.pipe, [f"a photo in the style of {style}"] * columns, [[one]] * columns,
                                      range(columns), How(steps=quality.steps))]
    return make_image_grid(rows, len(ACTIONS), columns + 1)


def write_grounded_card(quality: GroundedQuality, training: dict) -> Path:
    """Measure, and write README.md, quality.json, training.json and the picture into the model's folder."""
    folder, figures = quality.folder, quality.measure()
    ablations, strengths = quality.ablations(), quality.strengths()
    with replacing(folder / "images" / "relations.png") as temporary:
        few_colours(relations_picture(quality)).save(temporary, optimize=True)
    write_json(folder / "quality.json", {
        "figures": [asdict(one) | {"met": one.met} for one in figures], "actions": quality.relations,
        "ablations": ablations, "strengths": {f"{s:g}": share for s, share in strengths.items()}})
    write_json(folder / "training.json", training)
    names = list(next(iter(ablations.values())))
    size = sum(p.numel() for n, p in quality.pipe.unet.named_parameters() if ".fuser." in n or "position_net" in n)
    return write_text(folder / "README.md", CARD.format(
        parameters=size / 1e6, actions=", ".join(ACTIONS), folds=FOLDS, steps=quality.steps,
        training="\n".join(f"| {n} | {t['steps']} | {t['seconds'] / 60:.0f} |" for n, t in training.items()),
        figures="\n".join(one.row for one in figures), ablation_names=" | ".join(names),
        by_action="\n".join(f"| {n} | {hits / of:.2f} | {of} |" for n, (hits, of) in sorted(quality.relations.items())),
        ablations="\n".join(f"| {n} | {' | '.join(_said(row[name]) for name in names)} |"
                            for n, row in ablations.items()),
        strengths="\n".join(f"| {s:g} | {_said(share)} |" for s, share in strengths.items())))


def _said(share: Share) -> str:
    low, high = wilson(*share)
    return f"{share[0] / share[1]:.2f} ({low:.2f} to {high:.2f})"
