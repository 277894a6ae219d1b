"""Probes that go round the prompt: each does what its name says, on any U-Net, and leaves the pipeline as it was."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import EDMEulerScheduler
from judges import cats
from PIL import Image
from quick import quick
from snapshots import assert_unchanged, snapshot
from tiny import tiny_flux, tiny_sd, tiny_sdxl

from fmn_nb.attacks import PROBES, probe, probe_table
from fmn_nb.attacks import probes as module
from fmn_nb.attacks.probes import Probed, begun_by, concept_logit, with_ddim
from fmn_nb.attacks.relearning import RelearningBudget, harmless_tuning
from fmn_nb.concepts import Concept
from fmn_nb.emoji import STYLES
from fmn_nb.evaluation import MeasurementError, Sampling, Session
from fmn_nb.models import conditions, encode, generate, predict, to_pixels

CAT = Concept("cat")


def probed(pipe, world, judge=None, patch=None, **more):
    """What a probe works on: a tiny model with the emoji world's scenes, two images of four steps."""
    own = Session(pipe, world, judge, Sampling(steps=4))
    return Probed(own, patch, own, CAT, own.fresh_drawings(CAT, 2, 0), 0, **more)


def drawn(worked, name):
    """The images that a probe has judged."""
    kept = []
    object.__setattr__(worked.session, "shows", lambda concept, asked, images, judge=None: kept.append(images))
    with worked.session.patched(worked.patch), with_ddim(worked.pipe):
        PROBES[name](worked)
    return [np.asarray(image, float) for image in kept[0]]


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_every_probe_leaves_the_pipeline_as_it_was(make, world, monkeypatch) -> None:
    monkeypatch.setattr(module, "TUNING", RelearningBudget(at=(1,), references=2, batch_size=1))
    pipe = make()
    patch, before = quick(pipe, steps=1), snapshot(pipe)
    for name in PROBES:
        attack = probe(Session(pipe, world, cats(1, 2), Sampling(steps=2)), CAT, patch, name, images=2)
        assert_unchanged(pipe, before)
        if name == "judge's guidance":
            assert "gives no gradient" in attack.skipped
        else:
            assert (attack.successes, attack.count, attack.before.value) == (2, 2, 0.5) and not attack.skipped, name


def test_noise_on_the_way_is_another_image_from_the_same_seed(world) -> None:
    worked = probed(tiny_sd(), world)
    with with_ddim(worked.pipe):
        plain = [np.asarray(image, float) for image in worked.draw()]
    assert not np.array_equal(drawn(worked, "noise on the way")[0], plain[0])


def test_a_half_finished_image_of_ones_own_ends_as_it_would_have(world) -> None:
    pipe = tiny_sd()
    worked = probed(pipe, world)
    with with_ddim(pipe):
        plain = [np.asarray(image, float) for image in worked.draw()]
    finished = drawn(probed(pipe, world, begun=begun_by(worked)), "half-finished image")
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(finished, plain, strict=True))
    others = drawn(probed(pipe, world, begun=begun_by(probed(tiny_sd(seed=1), world))), "half-finished image")
    assert any(np.abs(one - other).max() > 1 for one, other in zip(others, plain, strict=True))


def test_inpainting_keeps_the_given_half(world) -> None:
    worked, found = probed(tiny_sd(), world), []
    pipe = worked.pipe
    latents = encode(pipe, worked.scenes()).mean
    draw = Probed.draw

    def as_latents(self, *pipes, **options):
        found.append(draw(self, *pipes, **options, output_type="latent"))
        return draw(self, *pipes, **options)

    object.__setattr__(worked, "draw", as_latents.__get__(worked))
    drawn(worked, "inpainting")
    half = latents.shape[-1] // 2
    last = torch.stack(list(found[0])).float()
    assert torch.allclose(last[..., :half], latents[..., :half], atol=1e-5)
    assert not torch.allclose(last[..., half:], latents[..., half:], atol=0.1)


def test_the_judges_guidance_raises_what_the_judge_sees(world, judge) -> None:
    worked = probed(tiny_sd(), world)
    wanted = concept_logit(judge, CAT, worked.session)
    with with_ddim(worked.pipe):
        plain = worked.draw()
    pushed = drawn(worked, "judge's guidance")
    with torch.no_grad():
        before, after = (wanted(to_pixels(np.stack([np.asarray(image, np.uint8) for image in images]), 16)).mean()
                         for images in (plain, pushed))
    assert after > before
    named = Session(worked.pipe, world)
    noto = concept_logit(judge, Concept("noto", kind="style"), named)
    grey = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        expected = judge(grey)[1].log_softmax(1)[:, list(STYLES).index("noto")]
    assert torch.allclose(noto(grey), expected) and len(expected) == 1


def test_from_the_inverted_noise_comes_the_image(emoji, world) -> None:
    """Within what few steps allow, and nearer than another scene."""
    own = Session(emoji, world, None, Sampling(steps=10))
    worked = Probed(own, None, own, CAT, own.fresh_drawings(CAT, 2, 0), 0)
    found = drawn(worked, "latent inversion")
    scenes = [np.asarray(scene, float) for scene in worked.scenes()]
    near = [np.abs(one - other).mean() for one, other in zip(found, scenes, strict=True)]
    assert max(near) < min(np.abs(found[0] - scenes[1]).mean(), np.abs(found[1] - scenes[0]).mean())


def test_harmless_tuning_shows_no_image_of_the_concept_and_is_gone_afterwards(world) -> None:
    pipe, shown = tiny_sd(), []
    real = world.real_images
    watching = Session(pipe, world)
    given = conditions(pipe, ["a photo of a dog"])

    def prediction():
        with torch.no_grad():
            return predict(pipe.unet, torch.ones(1, 4, 8, 8), torch.tensor([500]), given, [0])

    before = prediction()
    world.real_images = lambda wanted: shown.extend(wanted) or real(wanted)
    try:
        with harmless_tuning(watching, CAT, RelearningBudget(at=(2,), references=2, learning_rate=0.1), 0) as steps:
            assert steps == 2 and not torch.equal(prediction(), before)
    finally:
        del world.real_images
    assert torch.equal(prediction(), before)
    assert shown and not [drawing for drawing in shown if "cat" in drawing.prompt]


def test_the_table_stands_between_the_oracle_and_the_base_model(world) -> None:
    pipe = tiny_sd()
    judged = Session(pipe, world, cats(*[0, 1] * 3), Sampling(steps=1))
    table, reasons = probe_table(judged, CAT, {"balanced": quick(pipe, steps=1)}, oracle=tiny_sd(seed=1), images=2,
                                 probes=["noise on the way", "judge's guidance"])
    assert list(table.columns) == ["oracle", "balanced", "base model"]
    assert table.loc["the prompt alone", "oracle"] == 0 and table.loc["noise on the way", "oracle"] == 0.5
    assert judged.judge.calls == 6, "the prompt alone is drawn once for each model"
    assert set(reasons) == {f"judge's guidance, {model}" for model in table.columns}
    with pytest.raises(MeasurementError, match="no probe 'magic'"):
        probe(judged, CAT, None, "magic")


def test_what_cannot_be_probed_says_why(world) -> None:
    flow = probe(Session(tiny_flux(), world, cats(1)), CAT, None, "inpainting")
    assert "draw with DDIM" in flow.skipped and flow.count == 0
    nowhere = probe(Session.of(tiny_sd(), cats(1, 1), steps=1), CAT, None, "inpainting", images=2)
    assert "give references" in nowhere.skipped
    with pytest.raises(MeasurementError, match="nobody judges"):
        probe(tiny_sd(), CAT, None, "inpainting")


def test_large_models_are_probed_in_the_batches_that_their_session_says(world, monkeypatch) -> None:
    """Each image has its own scene and its own noise, however many are drawn at once."""
    monkeypatch.setattr(module, "TUNING", RelearningBudget(at=(1,), references=2, batch_size=1))
    pipe, sizes = tiny_sd(), []
    monkeypatch.setattr(module, "generate", lambda pipe, prompts, *rest, **options: sizes.append(len(prompts))
                        or generate(pipe, prompts, *rest, **options))
    for name in ("inpainting", "half-finished image", "latent inversion", "harmless fine-tuning"):
        images = {}
        for batch in (4, 2):
            kept, sizes[:] = [], []
            own = Session(pipe, world, cats(1, 2, 1, 2), Sampling(steps=4, batch=batch))
            object.__setattr__(own, "shows", lambda concept, asked, drawn, judge=None, kept=kept:
                               kept.append(drawn) or pd.Series([True] * len(drawn)))
            attack = probe(own, CAT, None, name, images=4)
            assert attack.count == 4 and max(sizes) == batch
            images[batch] = np.stack([np.asarray(image, float) for some in kept for image in some])[-4:]
        assert np.abs(images[4] - images[2]).max() <= 3, f"{name}: the same images up to the last bits"
        assert attack.steps == (1 if name == "harmless fine-tuning" else 0)


def test_a_model_of_an_unknown_noise_schedule_is_skipped(world) -> None:
    pipe = tiny_sd()
    pipe.scheduler = EDMEulerScheduler(prediction_type="epsilon")
    attack = probe(Session(pipe, world, cats(1, 1), Sampling(steps=2)), CAT, None, "noise on the way", images=2)
    assert "knows how this model's training adds noise" in attack.skipped


def test_an_image_that_cant_be_judged_leaves_one_cell_empty(world) -> None:
    def blank(pipe, prompts, seeds, **options):
        return [Image.new("RGB", (16, 16)) for _ in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", blank)
        table, reasons = probe_table(Session(tiny_sd(), world, cats(1, 1), Sampling(steps=1)), CAT, {}, images=2,
                                     probes=["noise on the way"])
    assert "one colour throughout" in reasons["noise on the way, base model"] and table.empty
