"""The methods beside Forget-Me-Not: each equals a straight-line version of its paper, and has its paper's property."""

from __future__ import annotations

import time

import numpy as np
import other_methods as straight
import pytest
import torch
from quick import OTHERS, QUICK
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import generate, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.attention import read_columns, text_parts
from fmn_nb.concepts import Concept, NotThereError, world_of
from fmn_nb.forgetting import FACTS, METHODS, PRESETS, forget, forget_several, prompts, settings_for
from fmn_nb.forgetting.data import Task, forget_set
from fmn_nb.forgetting.methods import mace
from fmn_nb.forgetting.methods.uce import kept_columns, paired
from fmn_nb.forgetting.prompts import another_like, forget_prompts, retain_prompts
from fmn_nb.models import (
    Stream,
    UnsupportedPipelineError,
    conditions,
    generate_latents,
    generate_trajectories,
    predict,
    seeded,
)
from fmn_nb.patches import Patch, combine, fuse
from fmn_nb.patches.least_squares import Weighing, text_inputs

PROMPT, EMPTY, ANCHOR = "a photo of a cat", "", "a photo of a dog"
ALONE = {"prompts": [PROMPT], "retain_prompts": OTHERS, "reference_count": 2, "reference_steps": 3}


def weights_with(pipe, patch: Patch) -> dict[str, torch.Tensor]:
    with patch.applied(pipe):
        return {name: parameter.detach().double() for name, parameter in pipe.unet.named_parameters()}


def assert_close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-4) -> None:
    assert float((found - wanted).norm()) <= share * float(wanted.norm())


# ---- every preset ---------------------------------------------------------------------------------------------------


def test_every_method_has_its_facts_and_a_preset() -> None:
    assert FACTS.keys() == METHODS.keys() == {preset.method for preset in PRESETS.values()}
    assert {"paper", "balanced", "robust", "esd-x", "esd-u", "uce", "ca", "mace"} <= PRESETS.keys()
    assert all(facts.linear and facts.source.startswith(("arXiv 2", "this project")) for facts in FACTS.values())
    assert PRESETS["balanced"].retains and not PRESETS["paper"].retains and not PRESETS["ca"].retains
    assert not settings_for("uce", {"preserve_scale": 0.0, "null_space": 0.0}).retains
    assert "ridge" in PRESETS["uce"].to_dict() and "ridge" not in PRESETS["balanced"].to_dict()


@pytest.mark.filterwarnings("ignore:a pooled text embedding")
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "joint"])
def test_every_preset_on_a_u_net(preset: str, make, tmp_path) -> None:
    pipe = make()
    before = snapshot(pipe)
    patch = forget(pipe, ["cat", Concept("noto", kind="style")], preset=preset, **QUICK)
    assert_unchanged(pipe, before)
    report, again = patch.info["forgetting"], Patch.load(patch.save(tmp_path))
    assert patch.info["preset"] == preset and [one["name"] for one in again.info["concepts"]] == ["cat", "noto"]
    steps = {"uce": 0, "mace": 4}.get(preset, 2)
    assert report["steps"] == steps and len(report["losses"]) == max(steps, 2) and report["seconds"] > 0
    still = generate(pipe)
    with again.applied(pipe):
        assert np.abs(generate(pipe) - still).max() > 0


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3])
def test_the_preset_for_joint_attention_trains_what_the_text_says(make, tmp_path) -> None:
    pipe = make()
    still, before = generate(pipe), snapshot(pipe)
    patch = Patch.load(forget(pipe, "cat", preset="joint", **QUICK).save(tmp_path))
    assert_unchanged(pipe, before)
    changed = " ".join(patch.changed())
    assert "context_embedder" in changed and "time_text_embed.text_embedder.linear_1" in changed
    with patch.applied(pipe):
        assert np.abs(generate(pipe) - still).max() > 0


def test_the_preset_for_joint_attention_is_refused_elsewhere_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="joint attention, as in Flux and Stable Diffusion 3") as error:
        forget(pipe, "cat", preset="joint")
    assert "\n" not in str(error.value)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("preset", ["uce", "mace"])
def test_a_closed_form_is_refused_where_there_is_nothing_to_solve_for(preset: str, monkeypatch) -> None:
    monkeypatch.setattr("fmn_nb.forgetting.data.generate_latents", lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(UnsupportedPipelineError, match="solves for to_k and to_v of a U-Net") as error:
        forget(tiny_pixart(), "cat", preset=preset)
    assert "\n" not in str(error.value)


def test_what_a_closed_form_cannot_reach_is_told() -> None:
    with pytest.warns(UserWarning, match="pooled text embedding.*'uce' can't close it"):
        forget(tiny_sdxl(), "cat", preset="uce", retain_prompts=OTHERS)


@pytest.mark.parametrize(("given", "message"), [
    ({"preset": "balanced", "method": "esd"}, "needs a guide"),
    ({"preset": "ca", "guide": ""}, "needs a guide"),
    ({"preset": "uce", "guide": "cat"}, "guide='cat' is the concept"),
    ({"preset": "esd-x", "references": noise_images(1), "masks": noise_images(1)}, "masks"),
    ({"preset": "mace", "rank": 17}, "rank=17 is more than"),
    ({"preset": "esd-x", "time_from": 0.01, "time_to": 0.02, "reference_steps": 2, "reference_count": 1},
     "no step of 2 has a timestep"),
    ({"preset": "uce", "null_space": 1e-9, "tokens": "later", "retain_prompts": OTHERS * 4}, "raise null_space"),
])
def test_what_cannot_be_is_one_line(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        forget(tiny_sd(), "cat", **given)
    assert "\n" not in str(error.value)


def test_references_that_nobody_looks_at_are_told() -> None:
    with pytest.warns(UserWarning, match="'uce' learns from no reference images"):
        forget(tiny_sd(), "cat", preset="uce", references=noise_images(1), retain_prompts=OTHERS)


@pytest.mark.parametrize(("guide", "texts"), [
    ("empty", ["", ""]), ("without", ["a photo", "frog and"]), ("dog", ["a photo of a dog", "frog and dog"])])
def test_what_the_concept_gives_way_to(guide: str, texts: list[str]) -> None:
    prompts = ["a photo of a cat", "frog and cat"]
    task = Task(tiny_sd(), ("cat",), settings_for("uce", {"guide": guide}), prompts=prompts)
    assert task.guides_of(task.concepts[0]) == texts
    corrected = Task(task.pipe, ("cat",), task.settings, prompts=prompts, readings={"cat": "computer cat"})
    assert corrected.guides_of(corrected.concepts[0])[0] == "a photo of a computer cat"


def test_another_of_its_kind(emoji) -> None:
    vocabulary = world_of(emoji).vocabulary
    assert another_like(emoji, Concept("cat")) in set(vocabulary.objects) - {"cat"}
    assert another_like(emoji, Concept("noto", kind="style")) in set(vocabulary.styles) - {"noto"}


def test_concepts_that_go_together_never_stand_in_for_one_another(emoji) -> None:
    """Mapped onto each other, they would be swapped: both gone by their own judge, both still drawn."""
    first = Concept("cat")
    second = Concept(another_like(emoji, first))
    task = Task(emoji, (first, second), settings_for("uce", {}))
    for one, other in ((first, second), (second, first)):
        for told in (task.guides_of(one), task.alone(one).guides_of(one)):
            assert told and not [text for text in told if other.name in text]
    with pytest.raises(ValueError, match="guide='frog' is the concept 'frog' itself"):
        forget(emoji, ["cat", "frog"], preset="uce", guide="frog")
    with pytest.raises(ValueError, match="no other identity is left"):
        another_like(emoji, Concept("Milo", kind="identity"), map(Concept, world_of(emoji).vocabulary.names))


def test_what_a_patched_model_forgot_stands_in_for_nothing(emoji, monkeypatch) -> None:
    first = Concept("cat")
    second, asked = Concept(another_like(emoji, first)), []
    monkeypatch.setattr("fmn_nb.forgetting.data.another_like", lambda pipe, concept, but: asked.append(
        [one.name for one in but]) or another_like(pipe, concept, but))
    with forget(emoji, first, preset="uce").applied(emoji):
        forget(emoji, second, preset="uce")
    assert [] in asked and ["cat"] in asked


def test_patches_for_one_model_never_draw_what_another_of_them_forgets(emoji) -> None:
    first = Concept("cat")
    second, third = Concept(another_like(emoji, first)), Concept("rocket")
    patches = forget_several(emoji, [first, second, third], "apart", preset="uce")
    guides = {patch.info["concepts"][0]["name"]: patch.info["settings"]["guide"] for patch in patches}
    assert guides["cat"] not in ("another", second.name, "rocket")
    alone = forget_several(emoji, [first, third], "apart", preset="uce")
    assert alone[0].info["settings"]["guide"] == "another", "as it is, where it names none of them"


def test_a_model_of_no_world_has_others_of_each_kind() -> None:
    pipe = tiny_sd()
    assert "style" not in another_like(pipe, Concept("Van Gogh", kind="style"))
    assert another_like(pipe, Concept("Van Gogh", kind="style")) in prompts._OTHERS["style"]
    assert another_like(pipe, Concept("Elon Musk", kind="identity")) in prompts._OTHERS["identity"]
    assert {another_like(pipe, Concept(name)) for name in ("dogs", "a dog")}.isdisjoint({"dog", "dogs"})


# ---- uce ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["last", "later"])
@pytest.mark.parametrize(("guide", "instead"), [("empty", EMPTY), ("dog", ANCHOR)])
def test_uce_is_the_published_equation(tokens: str, guide: str, instead: str) -> None:
    pipe, length = tiny_sd(), 16
    place, other = straight.last_token(pipe, PROMPT), straight.last_token(pipe, instead)
    pairs = [(place + k, min(other + k, length - 1)) for k in range(length - place)][: 1 if tokens == "last" else None]
    own, guides = straight.text_of(pipe, PROMPT), straight.text_of(pipe, instead)
    kept = [straight.text_of(pipe, text) for text in (*OTHERS, "")]
    columns = ([row for text in kept for row in text] if tokens == "later" else
               [kept[0][0], *(row[straight.last_token(pipe, text)] for text, row in zip(OTHERS, kept, strict=False))])
    wanted = straight.uce(pipe, [own[p] for p, _ in pairs], [guides[q] for _, q in pairs], columns, 0.3, 2.0, 0.7)
    patch = forget(pipe, "cat", preset="uce", guide=guide, tokens=tokens, ridge=0.3, erase_scale=2.0,
                   preserve_scale=0.7, prompts=[PROMPT], retain_prompts=OTHERS)
    found, before = weights_with(pipe, patch), dict(pipe.unet.named_parameters())
    assert patch.changed() == wanted.keys()
    for name, weight in wanted.items():
        assert_close(found[name], weight)
        assert_close(found[name] - before[name].double(), weight - before[name].double())


def test_the_null_space_leaves_what_is_kept_as_it_was_and_the_weights_alone_do_not() -> None:
    pipe = tiny_sd()
    asked = {"preset": "uce", "tokens": "last", "guide": "without", "prompts": [PROMPT], "retain_prompts": OTHERS}
    (seen,) = text_inputs(pipe)
    said = seen.embeddings(pipe, [*OTHERS, ""])
    kept = kept_columns(pipe, list(zip([*OTHERS, ""], said, strict=True)), every=False)  # [4, in]

    def moved(**given) -> float:
        patch = forget(pipe, "cat", **asked, **given)
        found = dict(patch.differences())
        shares = [(found[f"{name}.weight"].double() @ kept.T).norm() / (weight.double() @ kept.T).norm()
                  for name, weight in seen.weights.items()]
        return float(torch.stack(shares).max())

    loose, weighed, exact = moved(preserve_scale=0.0), moved(preserve_scale=10.0), moved(null_space=1e-6)
    assert exact < 1e-5 < weighed < loose


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_in_joint_attention_uce_solves_for_what_takes_in_the_columns_and_the_pooled_text(make) -> None:
    """Both by the equation as it is printed, which keeps biases: they cancel in W' e + b = W g + b."""
    pipe = make()
    if make is tiny_flux:
        pipe.default_sample_size = 4  # 4096 packed positions would only be slow
    asked = {"guide": "dog", "tokens": "last", "ridge": 0.3, "erase_scale": 2.0, "preserve_scale": 0.7}
    patch = forget(pipe, "cat", preset="uce", prompts=[PROMPT], retain_prompts=OTHERS, **asked)
    found = dict(patch.differences())
    assert set(found) == {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
    task = Task(pipe, ("cat",), settings_for("uce", asked), prompts=[PROMPT])
    for seen in text_inputs(pipe):
        (module, weight), = seen.weights.items()
        said = seen.embeddings(pipe, [PROMPT, ANCHOR, *OTHERS, ""])  # [prompts, columns, in]
        edited, guides, kept = said[0], said[1], said[2:].flatten(0, 1)
        if seen.argument == "encoder_hidden_states":
            columns = dict(zip((PROMPT, ANCHOR), said, strict=False))
            edited, guides = paired(task, "last", columns)
            kept = kept_columns(pipe, list(zip([*OTHERS, ""], said[2:], strict=True)), every=False)
        gram = 2.0 * edited.T @ edited + 0.7 * kept.T @ kept + 0.3 * torch.eye(edited.shape[1]).double()
        w = weight.double()
        wanted = (2.0 * w @ guides.T @ edited + 0.7 * w @ kept.T @ kept + 0.3 * w) @ torch.linalg.inv(gram)
        assert_close(found[f"{module}.weight"].double(), wanted - w)


def test_of_several_tokenizers_each_ones_last_word_is_kept() -> None:
    pipe = tiny_sd3()
    said = text_inputs(pipe)[0].embeddings(pipe, ["a photo of a dog"])
    first, second = text_parts(pipe, said.shape[1])
    words = read_columns(pipe, "a photo of a dog", said.shape[1]).words
    last = [max(column for column in words if column in part) for part in (first, second)]
    kept = kept_columns(pipe, [("a photo of a dog", said[0])], every=False)
    assert torch.equal(kept, said[0][[0, *last]]), "the begin token, CLIP's last word and T5's"


def test_each_text_encoders_columns_are_paired_among_themselves() -> None:
    pipe = tiny_sd3()
    task = Task(pipe, ("cat",), settings_for("uce", {"guide": "dog"}), prompts=[PROMPT])
    seen = next(seen for seen in text_inputs(pipe) if seen.argument == "encoder_hidden_states")
    said = dict(zip((PROMPT, ANCHOR), seen.embeddings(pipe, [PROMPT, ANCHOR]), strict=True))
    length, clip = len(said[PROMPT]), pipe.tokenizer.model_max_length
    cat, dog = (read_columns(pipe, text, length).find(word).columns
                for text, word in ((PROMPT, "cat"), (ANCHOR, "dog")))
    assert len(cat) == len(dog) == 2 and cat[0] < clip <= cat[1], "a column of CLIP and one of T5"
    edited, guides = paired(task, "last", said)
    assert_close(edited, said[PROMPT][list(cat)])
    assert_close(guides, said[ANCHOR][list(dog)])
    edited, _ = paired(task, "later", said)
    assert len(edited) == (clip - cat[0]) + (length - cat[1])


def test_uce_is_a_lora_of_as_many_ranks_as_prompts_that_plain_diffusers_draws_the_same_with(emoji, tmp_path) -> None:
    prompts = Concept("cat").prompts(5)
    patch = forget(emoji, "cat", preset="uce", tokens="last", prompts=prompts)
    assert patch.kind == "lora"
    assert {tensor.shape[0] for name, tensor in patch.tensors.items() if name.endswith("lora_A.weight")} == {5}
    patch.save(tmp_path)
    with patch.applied(emoji):
        ours = draw(emoji)
    before = draw(emoji)
    emoji.load_lora_weights(tmp_path)
    try:
        theirs = draw(emoji)
    finally:
        emoji.unload_lora_weights()
    assert float((ours - before).abs().max()) > 0.1
    assert float((ours - theirs).abs().max()) < 1e-3


def test_uce_takes_less_than_two_seconds(emoji) -> None:
    forget(emoji, "cat", preset="uce")  # imports
    started = time.process_time()
    patch = forget(emoji, "frog", preset="uce")
    assert time.process_time() - started < 2
    assert patch.nbytes < 1_000_000


# ---- esd ------------------------------------------------------------------------------------------------------------


def test_trajectories_are_what_the_denoiser_is_given_on_the_way(tmp_path) -> None:
    pipe, prompts = tiny_sd(), [PROMPT, "a frog"]
    asked = {"seed": 3, "steps": 4, "guidance": 3.0}
    latents, times = generate_trajectories(pipe, prompts, **asked, cache=tmp_path)
    ways = [step for number, prompt in enumerate(prompts) for step in straight.guided_trajectory(
        pipe, prompt, torch.randn(1, 4, 8, 8, generator=seeded(3, number)), 4, 3.0)]
    assert_close(latents.mean, torch.stack([x for x, _ in ways]))
    assert times.tolist() == [float(t) for _, t in ways] and not latents.std.any()
    pipe.unet.forward = None  # what is kept isn't drawn again
    again, kept_times = generate_trajectories(pipe, prompts, **asked, cache=tmp_path)
    assert torch.equal(again.mean, latents.mean) and torch.equal(kept_times, times)


@pytest.mark.parametrize("train", ["cross_attention", "except_cross_attention"])
def test_esd_is_the_published_algorithm_on_stored_trajectories(train: str) -> None:
    frozen, pipe, trained = tiny_sd(), tiny_sd(), tiny_sd()
    inside = train == "cross_attention"
    ways = [step for number in range(2) for step in straight.guided_trajectory(
        pipe, PROMPT, torch.randn(1, 4, 8, 8, generator=seeded(5, number)), 3, 3.0)]
    losses = straight.esd(trained, frozen, PROMPT, ways, seeded(5, Stream.FORGET), lambda n: ("attn2" in n) == inside,
                          steps=6, lr=1e-3, batch=2)
    patch = forget(pipe, "cat", preset="esd-x", seed=5, train=train, steps=6, learning_rate=1e-3, batch_size=2,
                   anchor_guidance=1.0, guide="empty", schedule="constant", retain_weight=0.0, **ALONE)
    assert patch.info["forgetting"]["losses"] == pytest.approx(losses, rel=1e-4)
    own, theirs = dict(frozen.unet.named_parameters()), dict(trained.unet.named_parameters())
    assert all(("attn2" in name) == inside for name in patch.changed())
    for name, weight in weights_with(pipe, patch).items():
        assert_close(weight, theirs[name].detach().double())
    moved = torch.cat([(theirs[name] - own[name]).detach().flatten() for name in patch.changed()])
    found = torch.cat([difference.flatten() for _, difference in sorted(patch.differences())])
    assert found.norm() == pytest.approx(float(moved.norm()), rel=0.02)


def _first(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    latents, times = generate_trajectories(pipe, [PROMPT], seed=0, steps=3, guidance=3.0)
    return latents.mean[1:2], times[1:2]


@pytest.mark.parametrize(("train", "rate"), [("lora", 5e-3), ("except_cross_attention", 1e-3)])
def test_at_its_end_the_concept_s_prediction_is_esd_s_target(train: str, rate: float) -> None:
    pipe = tiny_sd()
    given = conditions(pipe, [PROMPT, EMPTY])
    x, t = (found.expand(2, *found.shape[1:]) for found in _first(pipe))

    @torch.no_grad()
    def said() -> torch.Tensor:
        return predict(pipe.unet, x, t, given, torch.tensor([0, 1]))

    named, empty = said()
    target = empty - 1.0 * (named - empty)
    patch = forget(pipe, "cat", preset="esd-x", train=train, steps=50, learning_rate=rate, batch_size=3,
                   anchor_guidance=1.0, guide="empty", retain_weight=0.0, schedule="constant",
                   **{**ALONE, "reference_count": 1})
    with patch.applied(pipe):
        now = said()[0]
    assert float((now - target).norm()) < 0.35 * float((named - target).norm())
    assert patch.info["forgetting"]["losses"][-1] < 0.1 * patch.info["forgetting"]["losses"][0]


# ---- ca -------------------------------------------------------------------------------------------------------------


def test_ca_is_the_published_algorithm() -> None:
    pipe, trained = tiny_sd(), tiny_sd()
    latents = generate_latents(pipe, [ANCHOR] * 2, seed=4, steps=3, guidance=4.0).mean
    losses = straight.ca(trained, PROMPT, ANCHOR, latents, seeded(4, Stream.FORGET), steps=6, lr=1e-3, batch=2)
    patch = forget(pipe, "cat", preset="ca", seed=4, guide="dog", steps=6, learning_rate=1e-3, batch_size=2, clip=0.0,
                   prior_weight=1.0, train="projections", retain_weight=0.0, schedule="constant", guidance=4.0, **ALONE)
    assert patch.info["forgetting"]["losses"] == pytest.approx(losses, rel=1e-4)
    theirs = dict(trained.unet.named_parameters())
    for name, weight in weights_with(pipe, patch).items():
        assert_close(weight, theirs[name].detach().double())
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in patch.changed())


def test_ca_brings_the_concept_s_prediction_to_its_anchor_s() -> None:
    pipe = tiny_sd()
    given, (x, t) = conditions(pipe, [PROMPT, EMPTY]), _first(pipe)

    @torch.no_grad()
    def distance() -> float:
        named, anchor = predict(pipe.unet, x.expand(2, -1, -1, -1), t.expand(2), given, torch.tensor([0, 1]))
        return float((named - anchor).norm())

    before = distance()
    asked = {"preset": "ca", "guide": "empty", "learning_rate": 3e-3, "batch_size": 4, **ALONE}
    patch = forget(pipe, "cat", prior_weight=0.0, steps=40, **asked)
    with patch.applied(pipe):
        assert distance() < 0.8 * before
    first = patch.info["forgetting"]["loss_first"]
    assert forget(pipe, "cat", prior_weight=1.0, steps=1, **asked).info["forgetting"]["loss_first"] > 10 * first


# ---- mace -----------------------------------------------------------------------------------------------------------


def mace_task(pipe, **settings) -> Task:
    return Task(pipe, ("cat",), settings_for("mace", {"guide": "dog", **settings}), prompts=["a cat and a frog"],
                retain_prompts=["a fish", "a penguin"])


def test_mace_closes_the_other_columns() -> None:
    pipe = tiny_sd()
    found = mace.edit(mace_task(pipe, ridge=0.1, preserve_scale=0.0))
    pairs = straight.mace_columns(pipe, "a cat and a frog", "a dog and a frog", "cat")
    wanted = straight.uce(pipe, *pairs, [], 0.1, 1.0, 0.0)
    for name, weight in weights_with(pipe, Patch(found.kind, found.tensors)).items():
        if name in wanted:
            assert_close(weight, wanted[name])
    assert found.after < 0.2 < found.before == 1.0


def test_mace_s_second_step_is_the_published_norm() -> None:
    pipe, trained = tiny_sd(), tiny_sd()
    task = mace_task(pipe, ridge=0.1, preserve_scale=1.0)
    edit = Patch(*(lambda found: (found.kind, found.tensors))(mace.edit(task)))
    latents = generate_latents(pipe, ["a cat and a frog"] * 2, seed=6, steps=3, guidance=4.0)
    marked = torch.zeros(16, dtype=torch.bool)
    marked[[2, 6]] = True  # "cat", and the end of the text
    edit.apply(trained)
    losses = straight.mace_attention(trained, "a cat and a frog", marked, latents.mean,
                                     (seeded(6, Stream.LORA), seeded(6, Stream.FORGET)), steps=5, lr=1e-2)
    edit.remove(trained)
    patch = forget(pipe, "cat", preset="mace", seed=6, guide="dog", ridge=0.1, preserve_scale=1.0, steps=5, rank=1,
                   learning_rate=1e-2, batch_size=1, clip=1.0, positions=("words", "first_eot"), reference_count=2,
                   reference_steps=3, guidance=4.0, schedule="constant", prompts=["a cat and a frog"],
                   retain_prompts=["a fish", "a penguin"])
    assert patch.info["forgetting"]["losses"] == pytest.approx(losses, rel=1e-4) and len(losses) == 5


def test_mace_s_attention_on_the_concept_falls() -> None:
    patch = forget(tiny_sd(), "cat", preset="mace", steps=25, learning_rate=5e-2, **{**ALONE, "reference_count": 4})
    masses, losses = (patch.info["forgetting"][name] for name in ("masses", "losses"))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and sum(masses[-5:]) < 0.8 * sum(masses[:5])


def test_fusion_is_the_least_squares_optimum() -> None:
    pipe, kept = tiny_sd(), ["a fish", "a penguin"]
    parts = [forget(pipe, name, preset="uce", tokens="later", retain_prompts=kept) for name in ("cat", "frog")]
    prompts, weighing = [["a photo of a cat", "a cat"], ["a photo of a frog"]], Weighing(1.0, 3.0, 0.2)
    patch = fuse(pipe, parts, prompts, kept, weighing)
    (seen,) = text_inputs(pipe)
    own = [seen.embeddings(pipe, texts).flatten(0, 1) for texts in prompts]
    changes = [dict(part.differences()) for part in parts]
    for name, found in patch.differences():
        weight = dict(pipe.unet.named_parameters())[name].detach().double()
        wanted = straight.fused(weight, [change[name] for change in changes], own,
                                seen.embeddings(pipe, kept).flatten(0, 1), 0.2, 3.0)
        assert_close(found.double(), wanted)
    assert [one["name"] for one in patch.info["concepts"]] == ["cat", "frog"] and patch.changed() == parts[0].changed()


def test_fusion_adds_up_what_it_cannot_solve_for() -> None:
    pipe = tiny_sd()
    parts = [forget(pipe, name, preset="balanced", **QUICK) for name in ("cat", "frog")]
    fused, added = (dict(patch.differences()) for patch in (
        fuse(pipe, parts, [["a cat"], ["a frog"]], OTHERS), combine(parts)))
    for name in added:
        solved = name.endswith(("to_k.weight", "to_v.weight"))
        assert torch.allclose(fused[name], added[name], rtol=1e-5, atol=1e-7) != solved, name
    with pytest.raises(ValueError, match="prompts for each of 2 patches"):
        fuse(pipe, parts, [["a cat"]])
    for texts, kept in ((["a cat", "a frog"], ()), ([["a cat"], ["a frog"]], "a dog")):
        with pytest.raises(ValueError, match="lists of prompts, not a text"):
            fuse(pipe, parts, texts, kept)
    for lacking in ([], parts[0]):
        with pytest.raises(ValueError, match="give a list of patches"):
            fuse(pipe, lacking, [])


def test_concepts_forgotten_apart_can_be_fused() -> None:
    pipe, concepts = tiny_sd(), [Concept("cat"), Concept("frog")]
    asked = {"preset": "uce", "retain_prompts": OTHERS}
    apart = forget_several(pipe, concepts, "apart", **asked)
    patch, = forget_several(pipe, concepts, "fused", patches=apart, preset="uce")
    wanted = fuse(pipe, apart, [forget_prompts(pipe, one, "varied") for one in concepts],
                  [*retain_prompts(pipe, concepts, None), ""])
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in patch.tensors.items())
    assert [one["name"] for one in patch.info["concepts"]] == ["cat", "frog"] and patch.info["preset"] == "uce"


def test_a_fused_patch_says_what_all_of_it_cost(tmp_path) -> None:
    concepts, asked = [Concept("cat"), Concept("frog")], {"preset": "mace", "cache": tmp_path, **QUICK}
    patch, = forget_several(tiny_sd(), concepts, "fused", **asked)
    said = patch.info["forgetting"]
    assert said["patch_bytes"] == patch.nbytes and said["steps"] == 2 * QUICK["steps"] == len(said["losses"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_concepts_make_one_patch_and_one_stopped_on_the_way_goes_on(count: int, tmp_path) -> None:
    pipe, names = tiny_sd(), ["cat", "frog", "penguin", "octopus"][:count]
    asked = {"preset": "mace", **QUICK, "retain_prompts": ["a photo of a dog", "a fish"]}
    made = []

    def watch(progress) -> None:
        made.append(progress.make_patch())
        if len(made) == 2 * count and interrupt:
            raise KeyboardInterrupt

    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        forget(pipe, names, callback=watch, checkpoint=tmp_path, **asked)
    interrupt = False
    patch = forget(pipe, names, checkpoint=tmp_path, **asked)
    plain = forget(pipe, names, **asked)
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in patch.tensors.items())
    assert [one["name"] for one in patch.info["concepts"]] == names
    assert patch.info["forgetting"]["steps"] == 2 * count == len(patch.info["forgetting"]["losses"])
    assert all(torch.allclose(made[-1].tensors[name], tensor, atol=1e-6) for name, tensor in patch.tensors.items())


def test_a_world_gives_scenes_with_exact_masks(emoji) -> None:
    settings = settings_for("mace", {"reference_count": 4})
    for concept in (Concept("cat"), Concept("noto", kind="style"), Concept("Milo", kind="identity")):
        task = Task(emoji, (concept,), settings).with_scenes()
        assert len(task.references[concept.name]) == len(task.masks) == 4
        regions = forget_set(task).regions
        assert regions.shape == (4, 16, 16) and 0.1 < float(regions.mean()) < 0.7
    assert Task(tiny_sd(), ("cat",), settings).with_scenes().masks is None


def test_scenes_are_found_by_a_concept_in_other_letters_and_nobody_paints_an_unknown_one(emoji) -> None:
    world, settings = world_of(emoji), settings_for("mace", {"reference_count": 2})
    images = world.masked_scenes(Concept("cat"), 2)[0]
    for concept in (Concept("Cat"), Concept("a cat", phrase="cat")):
        task = Task(emoji, (concept,), settings).with_scenes()
        assert all((np.asarray(found) == image).all()
                   for found, image in zip(task.references[concept.name], images, strict=True))
    unknown = Task(emoji, (Concept("unicorn"),), settings, prompts=["a unicorn"]).with_scenes()
    assert not unknown.references, "the model draws them"
    with pytest.raises(NotThereError, match="no scenes show the style 'cat'"):
        world.masked_scenes(Concept("cat", kind="style"), 2)
