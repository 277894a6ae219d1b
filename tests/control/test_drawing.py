"""Gated layers beside a model: bits that stay, tokens, strength, recording, forgetting inside a box, folders."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionPipeline
from gated import gated
from quick import quick
from tiny import tiny_flux

import fmn_nb as fmn
from fmn_nb.attention.qkv import probabilities, split_heads
from fmn_nb.concepts import vocabulary_of, world_of
from fmn_nb.control import (
    ROOM,
    How,
    InteractionError,
    draw_grounded,
    forget_inside,
    grounding_of,
    laid_out,
    parse_interactions,
    phrase_embeddings,
    record_boxes,
    save_pipeline,
    tokens_of,
    with_grounding,
)
from fmn_nb.control.drawing import GUIDANCE
from fmn_nb.emoji.training.grounded import GroundedDenoiser, save_grounded
from fmn_nb.emoji.world import OBJECTS
from fmn_nb.models import fingerprint, generate, image_change

CHASE = parse_interactions("cat=chasing=frog")
PROMPT = "a photo in the style of noto"


@pytest.fixture(scope="module")
def pipe(emoji):
    return gated(emoji)


def draw(pipe, interactions=CHASE, strength=0.8, seeds=(0,), **options):
    return fmn.draw_interactions(pipe, PROMPT, interactions, seeds, strength, **{"steps": 3} | options)


def test_without_interactions_the_images_are_the_plain_models_to_the_last_bit(emoji, pipe):
    two = ([PROMPT, "a photo of a cat"], [0, 1])
    for prompts, seeds in (two, ([PROMPT], [0])):  # a batch's size decides a convolution's last bits on some processors
        plain, with_layers = (generate(one, prompts, seeds, steps=3, guidance=GUIDANCE) for one in (emoji, pipe))
        assert image_change(plain, with_layers) == 0
    assert image_change(plain, draw(pipe, strength=0)) == 0


def test_new_gates_are_shut_and_change_nothing(emoji):
    plain = generate(emoji, [PROMPT], [0], steps=3, guidance=GUIDANCE)
    assert image_change(plain, draw(gated(emoji, gate=0.0))) == 0


def test_boxes_words_roles_and_strength_change_the_image(pipe):
    base = draw(pipe)
    assert image_change(base, draw(pipe)) == 0, "the same again"
    assert image_change(base, draw(pipe, "cat=chasing=frog")) == 0, "the text form"
    others = [draw(pipe, "frog=chasing=cat"), draw(pipe, "cat=above=frog"), draw(pipe, "dog=chasing=frog"),
              draw(pipe, strength=0.4), draw(pipe, strength=1), draw(pipe, strength=0),
              draw(pipe, [fmn.Interaction("cat", "chasing", "frog", subject_box=(0, 0, 0.3, 0.3))])]
    assert all(image_change(base, other) > 0 for other in others)


def test_images_are_drawn_alike_alone_and_together(pipe):
    together = draw(pipe, seeds=[4, 5, 6])
    assert image_change(together[1:2], draw(pipe, seeds=[5])) < 2 / 255


def test_strength_is_the_share_of_steps_that_hear_boxes(pipe):
    calls = []
    handle = pipe.unet.position_net.register_forward_hook(lambda *_: calls.append(1))
    try:
        for strength, heard in ((0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)):
            calls.clear()
            fmn.draw_interactions(pipe, PROMPT, CHASE, [0], strength, steps=4)
            assert len(calls) == heard
    finally:
        handle.remove()


def test_tokens_hold_words_boxes_and_masks(pipe):
    given = laid_out(parse_interactions("cat=chasing=frog; house"))
    tokens = tokens_of(pipe, [given])
    assert tokens.masks.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0]] and tokens.boxes.shape == (1, 3 * ROOM, 4)
    assert np.allclose(tokens.boxes[0, :4], [given[0].subject_box, given[0].object_box, given[0].between,
                                             given[1].subject_box])
    own, frog = grounding_of(pipe), phrase_embeddings(pipe, ["frog"])[0]
    assert torch.allclose(tokens.embeddings[0, 1], frog + own.role[1] + own.instance[0], atol=1e-5)
    guided = tokens.arguments(guided=True)["gligen"]
    assert guided["boxes"].shape[0] == 2 and not guided["masks"][0].any() and guided["masks"][1].any()


def test_a_callers_callback_and_attention_arguments_leave_strength_as_it_is(pipe):
    seen, how = [], How(strength=0.5, steps=4)

    def watched(own, step, time, kept):
        seen.append(step)
        return kept

    given = ([PROMPT], [CHASE], [0], how)
    half = draw_grounded(pipe, *given)
    assert image_change(half, draw_grounded(pipe, *given, callback_on_step_end=watched)) == 0 and seen == [0, 1, 2, 3]
    assert image_change(half, draw_grounded(pipe, *given, cross_attention_kwargs={"scale": 1.0})) == 0


def test_ablations_leave_one_thing_away(pipe):
    whole, role, between, action = (tokens_of(pipe, [CHASE], without) for without in (
        (), ("role",), ("between",), ("action",)))
    assert torch.allclose(whole.embeddings[0, 0] - role.embeddings[0, 0], grounding_of(pipe).role[0], atol=1e-5)
    assert torch.equal(whole.boxes[0, :2], between.boxes[0, :2]) and between.boxes[0, 2].tolist() == [0, 0, 1, 1]
    assert action.masks[0, :3].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="no ablation style; choose from between, role, action"):
        tokens_of(pipe, [CHASE], ["style"])


def test_the_words_of_the_world_are_told_apart(pipe):
    vectors = phrase_embeddings(pipe, [*OBJECTS, "above", "below", "chasing", "carrying"])
    distances = torch.cdist(vectors, vectors) + 99 * torch.eye(len(vectors))
    assert distances.min() > 0.5, "a word alone, without a caption around it, is at 0.002 from the next"


@pytest.mark.parametrize(("interactions", "says"), [
    ("unicorn=chasing=frog", "doesn't know 'unicorn'; it knows cat, dog"), ("cat=eating=frog", "the action 'eating'"),
    ("cat; dog; frog; fish", "4 interactions, but there is room for 3"), ([], "no interaction to draw"),
    (["cat"], "give interactions, not"), ("noto", "doesn't know 'noto'"),
])
def test_what_cannot_be_drawn_is_one_clear_line(pipe, interactions, says):
    with pytest.raises(InteractionError, match=says) as error:
        draw(pipe, interactions)
    assert "\n" not in str(error.value)


def test_bad_numbers_and_plain_models_are_refused(emoji, pipe):
    for strength in (-0.1, 1.5, float("nan"), "1"):
        with pytest.raises(ValueError, match="strength must be a"):
            draw(pipe, strength=strength)
    with pytest.raises(InteractionError, match="no gated layers.*emoji-grounded"):
        draw(emoji)
    with pytest.raises(ValueError, match="2 prompts, 1 lists of interactions, 2 seeds"):
        draw_grounded(pipe, ["a", "b"], [CHASE], [0, 1])


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The new weights alone; the emoji model that they need is the bundled one."""
    at = tmp_path_factory.mktemp("models") / "emoji-grounded"
    return save_grounded(GroundedDenoiser(pipe.unet, pipe.grounding), at, "emoji-diffusion")


def test_a_folder_holds_only_what_is_new_and_loads_beside_the_emoji_model(emoji, pipe, folder):
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 6e6
    loaded = fmn.load(folder, device="cpu")
    assert world_of(loaded) is world_of(emoji) and vocabulary_of(folder).world == "emoji"
    assert image_change(generate(emoji, [PROMPT], [0], steps=3), generate(loaded, [PROMPT], [0], steps=3)) == 0
    assert image_change(draw(pipe), draw(loaded)) < 0.02, "half precision"


def test_a_whole_folder_loads_in_a_plain_pipeline(pipe, tmp_path, recwarn, capfd):
    save_pipeline(pipe, tmp_path / "whole")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    assert image_change(generate(pipe, [PROMPT], [0], steps=3), generate(plain, [PROMPT], [0], steps=3)) == 0
    assert image_change(draw(pipe), draw(plain)) == 0, "the vectors are found in its folder"
    assert "not used" not in "".join([*(str(one.message) for one in recwarn), *capfd.readouterr()])
    (tmp_path / "whole" / "grounding.safetensors").unlink()
    with pytest.raises(InteractionError, match="holds no grounding.safetensors"):
        grounding_of(plain)


def test_gated_layers_without_their_pipeline_say_what_is_missing(folder, tmp_path, monkeypatch):
    alone = shutil.copytree(folder, tmp_path / "emoji-grounded")
    monkeypatch.setattr("fmn_nb.files.data_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match="needs the pipeline emoji-diffusion beside it"):
        fmn.load(alone, device="cpu")


def test_gated_layers_beside_other_weights_than_their_own_are_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "emoji-grounded")
    line = other / "grounding.json"
    line.write_text(line.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(ValueError, match="trained beside another emoji-diffusion .* train them again: fmn-nb pretrain"):
        fmn.load(other, device="cpu")


# ---- patches, oracles, recording -------------------------------------------------------------------------------------


def test_gates_make_no_other_base_model(emoji, pipe):
    assert fingerprint(emoji) == fingerprint(pipe)


def test_the_head_of_one_model_sits_on_another(emoji, pipe):
    other = with_grounding(emoji, pipe)
    assert image_change(draw(other), draw(pipe)) == 0 and not hasattr(emoji, "grounding")
    with pytest.raises(InteractionError, match="no gated layers"):
        with_grounding(pipe, emoji)


def test_the_recorder_hears_what_pixels_see_of_boxes(pipe):
    quiet = draw(pipe, "cat=chasing=frog; house")
    with record_boxes(pipe) as heard:
        loud = draw(pipe, "cat=chasing=frog; house")
    assert image_change(quiet, loud) == 0, "nothing is changed"
    assert len(heard.layers) == 10 and set(heard.steps.values()) == {2}, "two of three steps hear boxes"
    assert heard.map("object").shape == (16, 16) and heard.map(layers="mid*").shape == (4, 4)
    total = sum(heard.sums[heard.layers[0]][0]) / 2
    assert 0 < total.min() and total.max() < 1, "the rest goes to pixels"
    scores = heard.scores(parse_interactions("cat=chasing=frog; house"))
    assert scores["word"].tolist() == ["cat", "frog", "chasing", "house"] and scores["inside"].between(0, 1).all()
    assert heard.by_layer()["gate"].round(3).unique().tolist() == [0.38], "tanh 0.4"
    with pytest.raises(ValueError, match="no 'colour' of instance 0 in image 0: roles are subject"):
        heard.map("colour")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_recorder_refuses_a_second_drawing(pipe, steps):
    """Its images would be added to the first ones."""
    hooks = len(pipe.unet._forward_pre_hooks)
    with pytest.raises(InteractionError, match="one drawing"), record_boxes(pipe):
        draw(pipe, steps=steps, strength=1.0)
        draw(pipe, steps=steps, strength=1.0)
    assert len(pipe.unet._forward_pre_hooks) == hooks
    draw(pipe)


def test_recorded_shares_are_those_of_the_equations(pipe):
    """One layer by hand: the pixels' share of the tokens, from its own weights and inputs."""
    name = "mid_block.attentions.0.transformer_blocks.0.fuser"
    layer, given = pipe.unet.get_submodule(name), []
    handle = layer.attn.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    try:
        with record_boxes(pipe) as heard:
            draw(pipe, strength=0.34)
    finally:
        handle.remove()
    x = given[0][1:]  # the row with grounding: [1, 16 pixels + 9 tokens, 128]
    query, key = (split_heads(to(x), layer.attn.heads) for to in (layer.attn.to_q, layer.attn.to_k))
    shares = probabilities(query, key)[0, :, :16, 16:].mean(0)  # [pixels, tokens]
    found = heard.sums[f"{name}.attn"][0].flatten(1).T
    assert torch.allclose(found, shares.detach(), atol=1e-5)


def test_forgetting_inside_a_box_leaves_the_rest(emoji):
    patch = quick(emoji, "cat", learning_rate=0.1)  # too fast, so that two steps change the image
    prompts, box, seen = ["a photo of a cat and a frog"] * 2, (0.0, 0.0, 0.5, 1.0), []
    handle = emoji.unet.register_forward_pre_hook(lambda _m, args, _k: seen.append(args[0].clone()), with_kwargs=True)
    try:
        base, inside = forget_inside(emoji, patch, prompts, [box] * 2, [0, 1], steps=3)
    finally:
        handle.remove()
    assert image_change(base, generate(emoji, prompts, [0, 1], steps=3)) == 0
    change = np.stack([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean(-1)
                       for a, b in zip(base, inside, strict=True)])  # [images, height, width]
    assert change[:, :, :32].mean() > 2 and not change[:, :, 32:].any()
    assert torch.equal(seen[-4][..., 8:], seen[-1][..., 8:]), "the third step of both, outside the box"
    assert not torch.equal(seen[-4][..., :8], seen[-1][..., :8])
    with pytest.raises(InteractionError, match="turned inside out"):
        forget_inside(emoji, patch, ["a"], [(0.5, 0, 0.1, 1)], [0])
    with pytest.raises(ValueError, match="1 prompts, 2 boxes"):
        forget_inside(emoji, patch, ["a"], [box, box], [0])


def test_forgetting_inside_a_box_of_packed_latents():
    flux = tiny_flux()
    patch = fmn.forget(flux, "cat", preset="balanced", steps=2, learning_rate=1.0, reference_count=2, reference_steps=1,
                       retain_weight=0.0, batch_size=1, train="cross_attention")
    base, inside = forget_inside(flux, patch, ["a photo of a cat"], [(0.0, 0.0, 0.5, 1.0)], [0], steps=2)
    change = np.abs(np.asarray(base[0], float) - np.asarray(inside[0], float)).mean(-1)
    half = change.shape[1] // 2
    assert change[:, :half].any() and not change[:, half:].any()


def test_how_takes_other_words_for_a_name(pipe):
    said = draw_grounded(pipe, [PROMPT], [CHASE], [0], How(steps=3, said={"cat": "the cat"}))
    assert image_change(said, draw(pipe)) > 0


def test_boxes_count_in_a_share_of_the_steps_whatever_the_sampler(emoji):
    pipe, seen = gated(emoji), []
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    handle = pipe.unet.register_forward_pre_hook(
        lambda _m, args, given: seen.append("gligen" in (given["cross_attention_kwargs"] or {})), with_kwargs=True)
    try:
        fmn.draw_interactions(pipe, PROMPT, CHASE, (0,), 1.0, steps=3)
        assert len(seen) == 5 and all(seen), "Heun takes each step but the last twice"
        seen.clear()
        fmn.draw_interactions(pipe, PROMPT, CHASE, (0,), 0.4, steps=3)
        assert seen == [True, True, False, False, False]
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="batch"):
        draw_grounded(pipe, [PROMPT], [CHASE], [0], How(batch=0))
