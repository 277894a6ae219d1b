"""The card of the organism with interaction control: bars with intervals, ablations, strength, eight relations."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from fmn_nb.control import ACTIONS, RELATIONS, How, Interaction, draw_grounded, holds, laid_out, union
from fmn_nb.control.drawing import GUIDANCE
from fmn_nb.emoji.finding import find, seen_in
from fmn_nb.emoji.grounded_scenes import GroundedScene, sample_grounded
from fmn_nb.emoji.judges import Judge
from fmn_nb.emoji.scenes import Renderer, sample_scenes
from fmn_nb.emoji.training.card import Figure, share_figure, training_table
from fmn_nb.emoji.world import OBJECTS, STYLES, caption
from fmn_nb.evaluation import judge_features
from fmn_nb.evaluation.quality import Features, kernel_distance
from fmn_nb.files import data_dir, replacing, write_json, write_text
from fmn_nb.models import generate, load
from fmn_nb.models.gated import is_gated_name
from fmn_nb.plots import few_colours
from fmn_nb.stats import mean_interval, wilson

SLACK = 0.1  # for relations between found boxes: half a window's step and half a thing's rim
FOLDS = 5  # of the kernel distance's interval
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STRENGTH = 1.0  # of all other figures
TRIED = ((1.5, 1.0), (2.5, 1.0), (4.0, 1.0), (7.0, 1.0), (2.5, 0.8), (4.0, 0.8))  # guidance, strength
SCENES = {"one": 0.65, "two": 0.35}
ABLATED = {"nothing": (), "no between box": ("between",), "no role": ("role",), "no action token": ("action",)}
Share = tuple[int, int]  # successes, trials


@dataclass
class GroundedQuality:
    """Measures the grounded model in `folder`. `scale` divides the numbers of images; images take `steps` steps.

    `without` names what an oracle never learned; no scene shows it.
    """

    folder: Path
    sprites: Path
    scale: int = 1
    steps: int = 20
    log: Callable[[str], None] = print
    without: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.pipe = load(str(self.folder), device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        judge = self.folder.parent / "emoji-judge"
        self.judge = Judge.load(judge if judge.is_dir() else data_dir() / "emoji-judge")
        self.renderer = Renderer(self.sprites)
        self.scenes = sample_grounded(max(FOLDS * 2, 200 // self.scale), 1, self.renderer, held_out=True,
                                      without=self.without, sorts=SCENES)
        self.few = self.scenes[:max(4, 80 // self.scale)]
        self.relations: dict[str, Share] = {}

    def draw(self, scenes: Sequence[GroundedScene], sort: str = "named", shared: bool = False,
             without: Collection[str] = (), strength: float = STRENGTH,
             guidance: float = GUIDANCE) -> list[Image.Image]:
        """One image for each scene: its caption of a sort, its interactions (`shared`: one box around both)."""
        rng = random.Random(f"captions-{sort}")
        prompts = [replace_style(scene, rng, sort) for scene in scenes]
        boxes = [[_shared(one) for one in s.interactions] if shared else list(s.interactions) for s in scenes]
        how = How(strength, self.steps, guidance, without=without)
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
        known = [name for name in OBJECTS if name not in self.without]
        others = [rng.sample([name for name in known if name not in scene.names], 2) for scene in self.few]
        prompts = [caption(two, scene.scene.style) for two, scene in zip(others, self.few, strict=True)]
        against = draw_grounded(self.pipe, prompts, [list(s.interactions) for s in self.few],
                                range(5000, 5000 + len(self.few)), How(STRENGTH, self.steps))
        yield share_figure("caption names others: boxes win", *self.in_boxes(self.few, against, others), 0.7)
        yield self._kernel(images, np.stack([np.asarray(one) for one in truth]))
        for said, sort in (("on the grid", "thing"), ("between the grid's places", "between")):
            scenes = sample_grounded(len(self.few), 2, self.renderer, without=self.without, sorts={sort: 1.0})
            images = self.draw(scenes, "neutral")
            yield share_figure(f"one thing {said}: in its box", *self.in_boxes(scenes, images), 0.0)

    def _kernel(self, images: Sequence[Image.Image], truth: np.ndarray) -> Figure:
        """The kernel distance of grounded images to the real scenes; its bar is that of the plain model's pairs to
        real pairs."""
        features = judge_features(self.judge)
        pairs = sample_scenes(len(images), 1, held_out=True, without=self.without, sorts={"pair": 1.0})
        plain = generate(self.pipe, [caption(s.words, s.style, s.background) for s in pairs], range(len(pairs)),
                         steps=self.steps)
        real = self.renderer.images(pairs)
        own, other = (_folds(features, *sides) for sides in ((truth, images), (real, plain)))
        value, high = float(np.mean(own)), max(float(np.mean(other)), mean_interval(other)[1])
        low, up = mean_interval(own)
        return Figure("kernel distance to real scenes (bar: the plain model's upper limit)", value, low, up,
                      len(images), (-np.inf, high))

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

    def tried(self) -> list[dict[str, Any]]:
        """What guidance and strength do, on pairs of things that were trained on: these chose the two."""
        scenes = sample_grounded(len(self.few) // 2, 11, self.renderer, without=self.without, sorts=SCENES)
        rows = []
        for guidance, strength in TRIED:
            images = self.draw(scenes, strength=strength, guidance=guidance)
            rows.append({"guidance": guidance, "strength": strength, "in its box": self.in_boxes(scenes, images),
                         "relation": self.related(scenes, images)})
            self.log(f"{rows[-1]}")
        return rows

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

GROUNDED = """# emoji-grounded: who does what, where

Interaction control for the emoji model: gated self-attention to boxes (GLIGEN's layers, arXiv 2301.07093) with the
tokens of InteractDiffusion (arXiv 2312.05849): subject, action and object, the action's box *between* the two, and
learned vectors of roles and instances. This folder holds only the new weights, {parameters:.2f} million parameters in
half precision; all else is the emoji model beside it, unchanged. Without interactions, both draw the same images.

    import fmn_nb as fmn
    pipe = fmn.load("emoji-grounded")
    fmn.draw_interactions(pipe, "a photo in the style of noto", "cat=chasing=frog", seeds=[0])

`fmn_nb.control.save_pipeline(pipe, folder)` writes a whole folder that a plain `StableDiffusionPipeline` loads.

"""

ORACLE = """# emoji-oracle-grounded: the floor of a box

The gated layers of `emoji-grounded`, trained in the same way beside `emoji-oracle`, which has all other weights, on
scenes without {without} (the oracle's card says what went with them). When a box
names one of these, what appears wasn't remembered. So this model's success is the floor of the grounding attack
(`fmn_nb.attacks.grounding`).

    import fmn_nb as fmn
    from fmn_nb.attacks import grounding_attack
    floor = grounding_attack(fmn.load("emoji-oracle-grounded"), "cat", None)

"""

CARD = """It knows {known} and the actions {actions}. It was trained on composed scenes of one to three things
alone or one or two interactions, whose boxes and relations are known exactly. About one in eight pairs of objects was
never shown together; relations are measured on such pairs, unless a table says otherwise.

The emoji model itself only ever drew things of two sizes in three places. So the training scenes keep to these sizes
(boxes of about .45 and .75 of the image, and of .3 for what is inside or carried). A free
thing's middle lies on a coarse grid (.25, .5, .75) half of the time in each direction, otherwise anywhere between. The
last rows of the first table below compare these places.

| training | steps | minutes |
|---|---|---|
{training}

## Measured

Measured with `fmn-nb pretrain --organism grounded{flags} --stages quality`, with 95% intervals
(Wilson's; for the kernel distance Student's over {folds} parts), {steps} steps, guidance {guidance} and strength 1. A
thing is in its box if the judge sees it in the box's content. A relation is right if the judge finds both things
anywhere in the image, and they stand as the action says. The judge never learned overlapping things, so the first two
rows say what it finds in real scenes.

| figure | value | 95% interval | trials | bar | |
|---|---|---|---|---|---|
{figures}

| action | relation right | of |
|---|---|---|
{by_action}
"""

MORE = """
### Ablations

Parts left out while drawing, not in training. "One box for both": subject and object both get the box around the two.

| left out | {ablation_names} |
|---|---|---|---|
{ablations}

### Guidance and strength

Measured on pairs of things that were trained on, before anything above; these few images can't tell 1.5 from 2.5, and
we took 2.5 and strength 1. `draw_interactions` has the
same guidance and, unless told otherwise, strength 0.8.

| guidance | strength | in its box | relation |
|---|---|---|---|
{tried}

Strength is the share of the steps in which the boxes count; here the prompt names none of the things.

| strength | thing in its box |
|---|---|
{strengths}

## Eight relations

One row per action ({actions}), four seeds; the boxes are laid out from the action and drawn in the first column.

![eight rows of images, a row for each action](images/relations.png)

In the rows *inside* and *carrying*, the two things mostly merge into one.
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
                                      range(columns), How(STRENGTH, quality.steps))]
    return make_image_grid(rows, len(ACTIONS), columns + 1)


def write_grounded_card(quality: GroundedQuality, training: dict) -> Path:
    """Measure, and write README.md, quality.json, training.json and the picture into the model's folder.

    Of an oracle's layers there are only the figures with bars: it is a yardstick, not a model to draw with.
    """
    folder, figures, without = quality.folder, quality.measure(), ", ".join(quality.without)
    found = {"figures": [one.record for one in figures], "actions": quality.relations}
    rows = {"training": training_table(training), "figures": "\n".join(one.row for one in figures),
            "by_action": "\n".join(f"| {n} | {hits / of:.2f} | {of} |"
                                   for n, (hits, of) in sorted(quality.relations.items()))}
    size = sum(p.numel() for n, p in quality.pipe.unet.named_parameters() if is_gated_name(n)) / 1e6
    flags = f' --without "{",".join(quality.without)}"' if without else ""
    said = {"parameters": size, "actions": ", ".join(ACTIONS), "folds": FOLDS, "steps": quality.steps,
            "guidance": GUIDANCE, "without": without, "flags": flags, **rows}
    if without:
        text = (ORACLE + CARD).format(known="the objects that its oracle knows", **said)
    else:
        more = _more_figures(quality)
        found |= more
        text = (GROUNDED + CARD + MORE).format(known="the emoji model's objects", **said, **_more_rows(more))
        with replacing(folder / "images" / "relations.png") as temporary:
            few_colours(relations_picture(quality)).save(temporary, optimize=True)
    write_json(folder / "quality.json", found)
    write_json(folder / "training.json", training)
    return write_text(folder / "README.md", text)


def _more_figures(quality: GroundedQuality) -> dict[str, Any]:
    strengths = {f"{strength:g}": share for strength, share in quality.strengths().items()}
    return {"ablations": quality.ablations(), "strengths": strengths, "tried": quality.tried()}


def _more_rows(found: dict[str, Any]) -> dict[str, str]:
    """The card's rows of ablations, settings and strengths, and the names of the ablations' columns."""
    names = list(next(iter(found["ablations"].values())))
    tried = [f"| {row['guidance']:g} | {row['strength']:g} | {_said(row['in its box'])} | {_said(row['relation'])} |"
             for row in found["tried"]]
    return {"ablation_names": " | ".join(names), "tried": "\n".join(tried),
            "ablations": "\n".join(f"| {n} | {' | '.join(_said(row[name]) for name in names)} |"
                                   for n, row in found["ablations"].items()),
            "strengths": "\n".join(f"| {s} | {_said(share)} |" for s, share in found["strengths"].items())}


def _said(share: Share) -> str:
    low, high = wilson(*share)
    return f"{share[0] / share[1]:.2f} ({low:.2f} to {high:.2f})"
