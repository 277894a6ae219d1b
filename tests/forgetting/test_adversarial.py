"""The preset "adversarial": what attacks find joins the forget set, on the same images and with the same anchors."""

from __future__ import annotations

import pytest
import torch
from quick import OTHERS, quick
from snapshots import assert_unchanged, snapshot
from tiny import tiny_flux, tiny_sd, tiny_sdxl

from fmn_nb.concepts import Concept
from fmn_nb.forgetting import CheckpointError, settings_for
from fmn_nb.forgetting.data import Task, forget_set, retain_set
from fmn_nb.forgetting.methods import adversarial
from fmn_nb.patches import Patch
from fmn_nb.patches.least_squares import text_inputs

LARGE = {"height": 32, "width": 32}  # beside the pipelines' own size
FEW = {"preset": "adversarial", "rounds": 2, "round_steps": 2, "probe_steps": 2}
CAT, DOG = Concept("cat"), Concept("dog")


def task_of(pipe, *concepts, **overrides):
    settings = settings_for("adversarial", {"reference_count": 2, "reference_steps": 2, "retain_count": 2,
                                            "probe_steps": 3, **overrides})
    return Task(pipe, concepts or (CAT,), settings, retain_prompts=OTHERS)


@pytest.mark.parametrize(("make", "finds"), [(tiny_sd, 5), (tiny_sdxl, 5)])
def test_each_round_adds_what_was_found(make, finds):
    pipe = make()
    before = snapshot(pipe)
    patch = quick(pipe, **FEW)
    assert_unchanged(pipe, before)
    report = patch.info["forgetting"]
    assert report["finds"] == finds, "two inversions a round, and once the closed form"
    assert report["rounds"] == 2 == len(report["round_seconds"]) and report["steps"] == 2 and patch.kind == "lora"
    assert patch.info["settings"]["probe_steps"] == 2 and "probe_steps" not in settings_for("uce", {}).to_dict()


def test_without_rounds_it_is_the_shared_fine_tune():
    pipe = tiny_sd()
    overrides = {name: value for name, value in settings_for("adversarial", {}).to_dict().items()
                 if name not in ("method", "rounds", "round_steps", "probe_steps", "steps", "reference_count",
                                 "reference_steps", "retain_count")}
    plain, none = quick(pipe, preset="balanced", **overrides), quick(pipe, preset="adversarial", rounds=0)
    assert all(torch.equal(plain.tensors[name], none.tensors[name]) for name in plain.tensors)


def test_finds_come_as_often_as_plain_prompts_with_the_same_images_and_anchors():
    pipe = tiny_sd()
    task = task_of(pipe, CAT, DOG)
    forget = forget_set(task)
    finds = adversarial.findings(task, quick(pipe, steps=1), forget, 0)
    assert len(finds) == 6
    both = adversarial.with_finds(forget, finds)
    plain = both.prompt_of < len(forget.given)
    assert len(both.given) == len(forget.given) + sum(len(find.prompts) for find in finds)
    assert int(plain.sum()) == int((~plain).sum()) == 3 * len(forget.prompt_of), "three finds for each of two concepts"
    assert both.prompt_of[plain].bincount().tolist() == [3 * n for n in forget.prompt_of.bincount().tolist()]
    same = set(zip(forget.latent_of.tolist(), forget.target_of.tolist(), strict=True))
    assert {*zip(both.latent_of[~plain].tolist(), both.target_of[~plain].tolist(), strict=True)} <= same
    assert both.concept.shape[0] == len(both.given) and both.concept[both.prompt_of].any(1).all()
    number, first = 0, len(forget.given)
    for find in finds:  # the find's rows stand where its pairs look for them
        for place in range(len(find.prompts)):
            row = both.given.rows["encoder_hidden_states"][first + place]
            assert torch.equal(row, find.rows["encoder_hidden_states"][place])
            number += 1
        first += len(find.prompts)
    assert number and adversarial.with_finds(forget, []) is forget


def test_the_closed_form_finds_what_keys_and_values_answer_as_before():
    """A change that a kept direction survives: the found embedding brings the old keys and values back."""
    pipe = tiny_sd()
    task = task_of(pipe)
    forget = forget_set(task)
    weights = text_inputs(pipe)[0].weights
    width = next(iter(weights.values())).shape[1]
    turned = torch.eye(width) + 0.5 * torch.roll(torch.eye(width), 1, 0)  # every W' = W turned, so e' = turned^-1 e
    patch = Patch("weights", {f"{name}.weight": w @ turned - w for name, w in weights.items()}, {})
    (find,) = adversarial.closed_form(task, patch, forget, torch.arange(len(forget.concept)))
    said, own = find.rows["encoder_hidden_states"], forget.given.rows["encoder_hidden_states"][:len(forget.concept)]
    marked = find.concept
    missed, missed_before = ((torch.stack([(value @ turned.T)[marked] - own[marked] for value in (some,)])).norm()
                             for some in (said, own))
    assert missed < 0.5 * missed_before
    assert torch.equal(said[~marked], own[~marked]), "columns before the concept know nothing of it"


def test_the_pairs_that_a_patch_hurts_most_come_twice():
    pipe = tiny_sd()
    task = task_of(pipe, retain_count=8)
    forget = forget_set(task)
    retain = retain_set(task, forget)
    hurt = adversarial.with_hurt_pairs(task, quick(pipe, steps=2), retain)
    added = len(hurt.prompt_of) - len(retain.prompt_of)
    assert added == max(1, round(0.25 * len(retain.prompt_of)))
    pairs = set(zip(retain.latent_of.tolist(), retain.prompt_of.tolist(), strict=True))
    assert {*zip(hurt.latent_of[-added:].tolist(), hurt.prompt_of[-added:].tolist(), strict=True)} <= pairs
    unchanged = adversarial.with_hurt_pairs(task, quick(pipe, steps=1, learning_rate=0.0), retain)
    assert len(unchanged.prompt_of) == len(hurt.prompt_of)


def test_it_ends_where_it_would_have_ended_without_a_stop(tmp_path):
    pipe, steps, short = tiny_sd(), [], {**FEW, "rounds": 1, "steps": 3}
    whole = quick(pipe, **short)

    def stop(progress):
        steps.append(progress.step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(pipe, **short, checkpoint=tmp_path, checkpoint_every=1, callback=stop)
    assert {"0", "last"} <= {path.name for path in tmp_path.iterdir()}
    again = quick(pipe, **short, checkpoint=tmp_path, checkpoint_every=1)
    assert all(torch.equal(whole.tensors[name], again.tensors[name]) for name in whole.tensors)
    (tmp_path / "last" / next(path.name for path in (tmp_path / "last").glob("*.safetensors"))).write_bytes(b"")
    with pytest.raises(CheckpointError):
        quick(pipe, **short, checkpoint=tmp_path, checkpoint_every=1)


@pytest.mark.parametrize("make", [tiny_flux, tiny_sdxl])
def test_probes_see_images_of_the_size_that_is_trained(make) -> None:
    """A Flux's positions and SDXL's sizes go with the latents: with others, it fails or learns wrongly."""
    pipe = make()
    assert (patch := quick(pipe, **FEW, **LARGE)).changed()
    seen = []
    real = adversarial.invert
    with pytest.MonkeyPatch.context() as heard:
        heard.setattr(adversarial, "invert", lambda *given, **options: seen.append(options["size"]) or real(
            *given, **options))
        quick(pipe, **FEW, **LARGE)
    assert set(seen) == {(32, 32)} and patch.kind == "lora"
