"""Scenes with boxes, the training of gated layers, finding things again, the card."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import fmn_nb as fmn
from fmn_nb.concepts import untaught_of
from fmn_nb.control import ACTIONS, Grounding, holds, union
from fmn_nb.control.grounding import ROOM, phrase_embeddings
from fmn_nb.emoji.finding import STRIDE, cut_out, find, seen_in
from fmn_nb.emoji.grounded_scenes import BETWEEN, CAPTIONS, MIDDLES, is_held_out, sample_grounded
from fmn_nb.emoji.training.gated_start import GatedStart, owners, start_loss, written_for
from fmn_nb.emoji.training.grounded import GroundedDenoiser
from fmn_nb.emoji.training.grounded_data import WORDS, GroundedLatents, shared_boxes, token_table
from fmn_nb.emoji.training.networks import prepare_latents
from fmn_nb.emoji.training.recipe import Plan, Training, pretrain
from fmn_nb.emoji.training.request import Request
from fmn_nb.files import read_json
from fmn_nb.models import generate, image_change
from fmn_nb.models.gated import BESIDE, is_gated, is_gated_name, with_gates

ALL = {"thing": 0.15, "things": 0.15, "one": 0.45, "two": 0.25}


@pytest.fixture(scope="module")
def scenes(world):
    return sample_grounded(250, 3, world.renderer, sorts=ALL)


def test_scenes_show_their_relations_exactly(scenes, world):
    actions = [one.action for scene in scenes for one in scene.interactions if one.action]
    assert set(actions) == set(ACTIONS) and {len(scene.interactions) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        masks = dict(zip(scene.scene.labels, world.renderer.masks(scene.scene), strict=True))
        for one in scene.interactions:
            assert not one.action or holds(one.action, one.subject_box, one.object_box)
            for name, box in ((one.subject, one.subject_box), (one.object, one.object_box)):
                if name:  # the box is that of the outline; a whisker covers no half pixel
                    rows, columns = np.nonzero(masks[name])
                    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                    assert np.allclose(found, [64 * side for side in box], atol=3), (name, found, box)


def test_the_same_seed_gives_the_same_scenes_and_another_others(scenes, world):
    assert sample_grounded(20, 3, world.renderer, sorts=ALL) == scenes[:20]
    assert sample_grounded(20, 4, world.renderer, sorts=ALL) != scenes[:20]


def test_pairs_that_are_held_out_are_never_trained_on(scenes, world):
    held_out = sample_grounded(40, 3, world.renderer, held_out=True, sorts={"one": 0.7, "two": 0.3})
    assert all(is_held_out(scene.names) for scene in held_out)
    assert not any(is_held_out(scene.names) for scene in scenes)
    left = sample_grounded(40, 3, world.renderer, without=["cat", "noto"])
    assert not any("cat" in s.scene.labels or s.scene.style == "noto" for s in left)


def middles(world, sort, count=60):
    """The middles of the things in `count` scenes of a sort."""
    return [(item.x + item.size / 2, item.y + item.size / 2)
            for scene in sample_grounded(count, 5, world.renderer, sorts={sort: 1.0}) for item in scene.scene.items]


def near(middle, places):
    return all(min(abs(at - place) for place in places) <= 2 for at in middle)


def test_things_stand_on_a_grid_or_anywhere_between_and_a_sort_of_scenes_half_way(world):
    free = middles(world, "thing")
    shares = [sum(near([at], MIDDLES) for at in along) / len(free) for along in zip(*free, strict=True)]
    assert all(0.5 < share < 0.9 for share in shares), shares  # half on purpose, and some by chance
    assert all(MIDDLES[0] - 2 <= at <= MIDDLES[-1] + 2 for middle in free for at in middle)
    assert all(near(middle, BETWEEN) for middle in middles(world, "between"))
    assert all(near(middle, MIDDLES) for middle in middles(world, "things")), "several things keep to the grid"


def test_captions_name_the_things_or_others_or_none(scenes):
    rng, scene = random.Random(0), next(s for s in scenes if len(s.names) == 2)
    said = {sort: [scene.caption(rng, sort) for _ in range(20)] for sort in CAPTIONS}
    assert all(name in text for text in said["named"] for name in scene.names)
    assert not any(name in text for sort in ("neutral", "conflicting", "empty") for text in said[sort]
                   for name in scene.names)
    assert set(said["empty"]) == {""} and all(text.startswith("a photo") for text in said["neutral"])


def test_a_small_thing_in_front_has_a_rim_of_background(scenes, world):
    scene = next(s for s in scenes if s.interactions[0].action == "inside")
    with_rim, without = scene.image(world.renderer), world.renderer.image(scene.scene)
    changed, background = (with_rim != without).any(-1), without[-1, -1].astype(float)
    far = [np.abs(image[changed] - background).mean() for image in (with_rim, without)]
    assert changed.sum() > 20 and far[0] < 0.7 * far[1], "a soft rim in the background's colour"


def test_tokens_stand_in_places_of_their_own(scenes):
    table = token_table(scenes, seed=0)
    row = next(i for i, s in enumerate(scenes) if len(s.interactions) == 2)
    there = (table["words"][row] >= 0).view(ROOM, 3)
    assert there.all(1).sum() == 2 and {WORDS[w] for w in table["words"][row].tolist() if w >= 0} == {
        word for one in scenes[row].interactions for word in (one.subject, one.action, one.object)}
    used = torch.stack([(table["words"][i] >= 0).view(ROOM, 3).any(1) for i in range(len(scenes))])
    assert used.any(0).all(), "every place is trained"
    shared = shared_boxes(table["boxes"], table["words"] >= 0)
    one = scenes[row].interactions[0]
    both = torch.tensor(union(one.subject_box, one.object_box))
    assert any(torch.allclose(shared[row, 3 * place + role], both, atol=1e-4) for place in range(ROOM)
               for role in (0,)) and torch.equal(shared[row, 0::3], shared[row, 1::3])


def test_the_judge_sees_what_a_box_shows_and_finds_it_again(scenes, judge, world):
    plain = [s for s in scenes if len(s.names) == 2 and s.interactions[0].action in ("above", "left of")][:8]
    images = [Image.fromarray(scene.image(world.renderer)) for scene in plain]
    ones = [scene.interactions[0] for scene in plain]
    seen = seen_in(judge, images, [one.subject_box for one in ones])
    assert sum(one.subject in there and one.object not in there for one, there in zip(ones, seen, strict=True)) >= 7
    sizes = [(one.object_box[2] - one.object_box[0], one.object_box[3] - one.object_box[1]) for one in ones]
    places = [find(judge, image, one.object, size) for image, one, size in zip(images, ones, sizes, strict=True)]
    off = [float(np.abs(np.subtract(place.box, one.object_box)).max()) for place, one in zip(places, ones, strict=True)]
    assert all(place.there for place in places) and sum(one <= 0.1 for one in off) >= 6, off
    assert max(off) <= 2 * STRIDE / 64, "two steps between windows: the judge is as sure of the next ones"
    one, image, size = ones[0], images[0], sizes[0]
    absent = next(name for name in ("umbrella", "rocket") if name not in plain[0].names)
    assert not find(judge, image, absent, size).there
    assert cut_out(image, one.subject_box).size == (64, 64)


def test_a_position_belongs_to_the_smallest_thing_around_it():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.25, 0.25, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]]])
    owned = owners(boxes, torch.tensor([[True, True, False]]), 16)  # the third is an action
    assert owned.shape == (1, 16, 3) and owned.sum(-1).max() == 1
    assert owned[0, :, 0].view(4, 4).tolist() == [[True, True, False, False], [True, False, False, False],
                                                  [True, True, False, False], [True, True, False, False]]
    assert owned[0, :, 1].nonzero().flatten().tolist() == [5] and not owned[0, :, 2].any()


def test_the_start_teaches_where_to_look_and_what_to_write_while_gates_are_shut(emoji, world):
    scenes = sample_grounded(12, 0, world.renderer, sorts={"one": 1.0})
    images = np.stack([scene.image(world.renderer) for scene in scenes])
    latents = prepare_latents(emoji.vae, emoji.tokenizer, scenes, images, 0)
    data = GroundedLatents(latents, **token_table(scenes, 0))
    model, rng = GroundedDenoiser(with_gates(emoji.unet), Grounding(128)), torch.Generator().manual_seed(0)
    written = written_for(emoji, latents.scaling_factor * latents.mean[:2].float(), ["cat", "frog"], rng)
    assert all(torch.allclose(rows.sum(0), torch.zeros(()), atol=1e-5) and rows.abs().max() > 0.01
               for rows in written.values())
    start, embeddings = GatedStart(model.unet, model.grounding), phrase_embeddings(emoji, WORDS)
    loss = start_loss(model.unet, start, emoji.text_encoder, data, embeddings, written, batch=4)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    optimiser, found = torch.optim.Adam(start.parameters(), 2e-3), []
    for step in range(12):
        losses = loss(step, torch.Generator().manual_seed(step % 2))
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        found.append([float(losses["look"]), float(losses["write"])])
    assert found[10][0] < 0.9 * found[0][0] and found[10][1] < 0.5 * found[0][1]
    changed = {name for name, tensor in model.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(is_gated_name(name) for name in changed)
    assert model.gates() == {"alpha_attn": 0.0, "alpha_dense": 0.0}
    assert not [hook for part in model.unet.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_only_the_new_weights_learn_and_gates_open_first(emoji):
    torch.manual_seed(0)
    model = GroundedDenoiser(with_gates(emoji.unet), Grounding(128))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(is_gated_name(name.removeprefix("unet.")) or name.startswith("grounding.") for name in learns)
    assert sum(p.numel() for n, p in model.named_parameters() if n in learns) == 1_836_084 + 6 * 128
    assert model.gates() == {"alpha_attn": 0.0, "alpha_dense": 0.0}


def test_some_weights_learn_faster(tmp_path):
    module = torch.nn.ParameterDict({"slow": torch.nn.Parameter(torch.zeros(2)), "fast": torch.nn.Parameter(
        torch.zeros(2))})
    training = Training("two", module, lambda step, rng: {"loss": (module["slow"] + module["fast"] - 9).square().sum()},
                        Plan(4, 1e-3, warmup=1), tmp_path / "two.safetensors", lambda line: None, {"fast": 10.0})
    training._train_step()
    assert module["fast"][0].item() == pytest.approx(10 * module["slow"][0].item()) and module["slow"][0] > 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder that the smoke training left, without a card."""
    out = tmp_path_factory.mktemp("grounded")
    return pretrain(Request(out, organism="grounded", smoke=True, stages=["grounded"]), lambda line: None)


def test_the_smoke_training_leaves_a_small_folder_that_draws(smoke, emoji):
    folder = smoke / "emoji-grounded"
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 6e6
    pipe = fmn.load(folder, device="cpu")
    assert image_change(generate(emoji, ["a cat"], [0], steps=2), generate(pipe, ["a cat"], [0], steps=2)) == 0
    assert len(fmn.draw_interactions(pipe, "", "cat=above=frog", [0, 1], steps=2)) == 2


def test_a_finished_training_is_not_repeated_and_nothing_else_goes_on_from_it(smoke, tmp_path):
    lines = []
    pretrain(Request(smoke, organism="grounded", smoke=True, stages=["grounded"]), lines.append)
    assert "resumed at step 4 of 4" in " ".join(lines)
    with pytest.raises(ValueError, match="were trained with seed 0, this training has seed 1"):
        pretrain(Request(smoke, organism="grounded", smoke=True, seed=1), lambda line: None)
    with pytest.raises(ValueError, match="always starts from the emoji model"):
        pretrain(Request(tmp_path, organism="grounded", smoke=True, start_from=fmn.bundled()["emoji"]), print)
    with pytest.raises(FileNotFoundError, match="run the stage grounded first"):
        pretrain(Request(tmp_path, organism="grounded", smoke=True, stages=["quality"]), print)


def test_an_oracle_gets_layers_of_its_own_and_only_beside_the_names_it_never_learned(tmp_path):
    oracle, lines = fmn.load("emoji-oracle", device="cpu"), []
    words = list(untaught_of(oracle))
    out = pretrain(Request(tmp_path / "out", organism="grounded", smoke=True, stages=["grounded"], without=words),
                   lines.append)
    folder = out / "emoji-oracle-grounded"
    assert read_json(folder / BESIDE)["base"] == "emoji-oracle"
    pipe = fmn.load(folder, device="cpu")
    assert untaught_of(pipe) == untaught_of(oracle) and is_gated(pipe.unet)
    assert image_change(generate(oracle, ["a frog"], [0], steps=2), generate(pipe, ["a frog"], [0], steps=2)) == 0
    with pytest.raises(ValueError, match="never learned cat, .*leave out the same names"):
        pretrain(Request(tmp_path / "other", organism="grounded", smoke=True, stages=["grounded"], without=["frog"]),
                 lines.append)


def test_the_card_holds_every_figure_and_says_what_is_not_met(smoke):
    pretrain(Request(smoke, organism="grounded", smoke=True, stages=["quality"]), lambda line: None)
    folder = smoke / "emoji-grounded"
    figures = json.loads((folder / "quality.json").read_text())["figures"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {one['name']} | {one['value']:.3f} |" in card for one in figures) and "**not met**" in card
    assert all(action in card for action in ACTIONS) and "| no action token |" in card
    with Image.open(folder / "images" / "relations.png") as picture:
        assert picture.size == (5 * 64, len(ACTIONS) * 64)
