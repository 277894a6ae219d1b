"""The known faults of published Forget-Me-Not implementations, a test for each: this package doesn't have them."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_sd, tiny_sd3

import fmn_nb
from fmn_nb.attention import read_columns, text_parts
from fmn_nb.attention.listening import MissedLayersError, attention_with_graph
from fmn_nb.concepts import Concept, Verdict
from fmn_nb.emoji.judges import Judge
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import drawings, judge_images
from fmn_nb.evaluation.quality import frechet_distance, judge_features
from fmn_nb.forgetting.finetune import ForgettingError, forget
from fmn_nb.forgetting.methods.fmn import concept_mask, resteering_loss
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.models import conditions, generate, predict
from fmn_nb.patches.learned_tokens import LearnedTokens

LENGTH = 16


def columns(pipe, prompt: str, phrase: str, *parts: str) -> list[int]:
    return concept_mask(pipe, prompt, phrase, parts, LENGTH).nonzero().flatten().tolist()


def test_fault_1_end_of_text_and_padding_are_counted_only_by_name() -> None:
    """Stable Diffusion 1.x pads with its end-of-text token: here 11 of 16 tokens of "a photo of cat" are that token."""
    pipe = tiny_sd()
    ids = pipe.tokenizer("a photo of cat", padding="max_length", max_length=LENGTH).input_ids
    assert ids.count(pipe.tokenizer.eos_token_id) == 11
    assert columns(pipe, "a photo of cat", "cat", "words") == [4]
    assert columns(pipe, "a photo of cat", "cat", "words", "first_eot") == [4, 5]
    assert columns(pipe, "a photo of cat", "cat", "words", "first_eot", "padding") == list(range(4, 16))
    assert columns(pipe, "a photo of cat and dog", "cat", "words", "later") == [4, 5, 6]
    # The published reading of its option, by its own name; it depends on what the tokenizer pads with.
    assert columns(pipe, "a photo of cat", "cat", "words", "every_eot") == list(range(4, 16))
    pipe.tokenizer.pad_token = "a</w>"
    assert columns(pipe, "a photo of cat", "cat", "words", "every_eot") == [4, 5]


def test_padding_counts_for_the_tokenizer_that_pads_with_its_end() -> None:
    """In Stable Diffusion 3, CLIP does and T5 doesn't."""
    pipe, length = tiny_sd3(), conditions(tiny_sd3(), ["a"]).rows["encoder_hidden_states"].shape[1]
    clip, t5 = text_parts(pipe, length)
    marked = concept_mask(pipe, "a photo of cat", "cat", ["every_eot"], length)
    ends = read_columns(pipe, "a photo of cat", length).first_eot
    assert marked[list(clip)].sum() == 11
    assert marked[list(t5)].nonzero().flatten().add(t5.start).tolist() == [one for one in ends if one in t5]


def test_fault_2_each_row_of_a_batch_has_its_own_positions_whatever_their_number() -> None:
    """The loss of a batch of different concepts is made of the same squares as its rows, run one by one."""
    pipe = tiny_sd()
    prompts = ["a photo of a cat", "a birthday cake and a dog", "an alarm clock"]
    phrases = ["cat", "birthday cake", "clock"]
    given = conditions(pipe, prompts)
    masks = torch.stack([concept_mask(pipe, *pair, ["words"], LENGTH) for pair in zip(prompts, phrases, strict=True)])
    assert len({int(mask.sum()) for mask in masks}) > 1
    latents = torch.randn(3, *given.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([9, 500, 900])

    def loss(rows: list[int], norm: str) -> float:
        with torch.no_grad(), attention_with_graph(pipe.unet) as attention:
            predict(pipe.unet, latents[rows], times[rows], given, torch.tensor(rows))
        return float(resteering_loss(attention, masks[rows], norm))

    alone = [loss([row], "published") for row in range(3)]
    assert loss([0, 1, 2], "published") == pytest.approx(sum(x**2 for x in alone) ** 0.5, rel=1e-5)
    assert loss([2, 0, 1], "published") == pytest.approx(loss([0, 1, 2], "published"), rel=1e-5)
    for norm in ("mean_square", "mass"):
        assert loss([0, 1, 2], norm) == pytest.approx(sum(loss([row], norm) for row in range(3)) / 3, rel=1e-5)
    wrong = torch.roll(masks, 1, 0)
    with torch.no_grad(), attention_with_graph(pipe.unet) as attention:
        predict(pipe.unet, latents, times, given, torch.arange(3))
    mistaken = float(resteering_loss(attention, wrong, "published"))
    assert mistaken != pytest.approx(loss([0, 1, 2], "published"), rel=1e-3)


def test_fault_3_gradients_are_really_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of all gradients, as the optimiser sees them, is at most `clip`, and is larger without it."""
    norms: dict[float, list[float]] = {}
    for clip in (0.0, 0.01):
        seen = norms.setdefault(clip, [])
        step = torch.optim.AdamW.step

        def watched(self, *args, _step=step, _seen=seen):
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            _seen.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return _step(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.AdamW, "step", watched)
            forget(tiny_sd(), Concept("cat"), preset="paper", references=noise_images(2), steps=2, clip=clip)
    assert min(norms[0.0]) > 0.02 and max(norms[0.01]) <= 0.01 * (1 + 1e-4)


def test_fault_4_normalised_losses_do_not_depend_on_resolution_or_number_of_tokens() -> None:
    """Even attention on everything gives one value, however many pixels a layer or columns a concept has."""

    def even(sizes: list[int], marked: int) -> dict[str, torch.Tensor]:
        mask = torch.zeros(1, 10, dtype=torch.bool)
        mask[0, :marked] = True
        attention = {str(size): torch.full((1, 2, size * size, 10), 0.1) for size in sizes}
        return {norm: resteering_loss(attention, mask, norm) for norm in ("published", "mean_square", "mass")}

    small, large, more = even([4], 2), even([4, 32], 2), even([4], 4)
    assert small["mean_square"] == pytest.approx(0.01) and small["mass"] == pytest.approx(0.04)
    for norm in ("mean_square", "mass"):
        assert large[norm] == pytest.approx(float(small[norm]))
    assert more["mean_square"] == pytest.approx(float(small["mean_square"]))
    assert large["published"] > 5 * small["published"] and more["published"] > 1.4 * small["published"]
    # A layer of 1 pixel weighs as much as one of 1024.
    mask = torch.ones(1, 1, dtype=torch.bool)
    uneven = {"coarse": torch.ones(1, 1, 1, 1), "fine": torch.zeros(1, 1, 1024, 1)}
    assert resteering_loss(uneven, mask, "mean_square") == pytest.approx(0.5)


def test_fault_5_nothing_is_written_but_the_patch_and_it_holds_no_pipeline_and_no_tokens(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    pipe = tiny_sd()
    tokens = LearnedTokens("<cat>", (torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * 0.02,))
    with tokens.loaded(pipe):
        patch = forget(pipe, Concept("cat", phrase="<cat>"), references=noise_images(2), steps=1, retain_count=0,
                       retain_prompts=["a dog"])
    assert os.listdir(elsewhere) == []
    files = sorted(file.name for file in patch.save(tmp_path / "patch").iterdir())
    assert files == ["fmn.json", "pytorch_lora_weights.safetensors"]
    assert patch.nbytes < 0.1 * sum(p.nbytes for p in pipe.unet.parameters())


def test_fault_6_a_retain_term_keeps_other_prompts_where_they_were() -> None:
    """After the same steps, what the model predicts for other prompts has moved less with the term than without."""
    moved = {}
    others = ["a photo of a dog", "a frog", "a penguin"]
    for weight in (0.0, 1000.0):
        pipe = tiny_sd()
        given = conditions(pipe, others)
        noisy = torch.randn(3, *given.latent_shape, generator=torch.Generator().manual_seed(1))
        at = (pipe.unet, noisy, torch.tensor([100, 400, 700]), given, torch.arange(3))
        with torch.no_grad():
            before = predict(*at)
            patch = forget(pipe, Concept("cat"), references=noise_images(2), steps=12, retain_weight=weight,
                           retain_count=0, retain_prompts=others, learning_rate=3e-3, prompts=["a photo of a cat"])
            with patch.applied(pipe):
                moved[weight] = float((predict(*at) - before).square().mean())
        assert patch.info["forgetting"]["masses"][-1] < patch.info["forgetting"]["masses"][0]
        assert len(patch.info["forgetting"]["retain"]) == (12 if weight else 0)
    assert 0 < moved[1000.0] < 0.7 * moved[0.0]


def test_fault_7_attention_that_cannot_be_heard_is_an_error_not_an_empty_loss() -> None:
    pipe = tiny_sd()
    pipe.unet.set_attn_processor(AttnProcessor())  # computes attention by hand, past torch's function
    before = snapshot(pipe)
    with pytest.raises(MissedLayersError, match="couldn't be heard"):
        forget(pipe, Concept("cat"), preset="paper", references=noise_images(2), steps=2)
    assert_unchanged(pipe, before)


def test_fault_7_an_attention_that_is_exchanged_on_the_way_is_noticed_in_the_next_step() -> None:
    """Sliced attention stands for every memory-efficient kind that replaces the layers' processors."""
    pipe, steps = tiny_sd(), []

    def exchange(progress) -> None:
        steps.append(progress.step)
        if progress.step == 2:
            pipe.enable_attention_slicing(1)

    with pytest.raises(MissedLayersError, match=r"SlicedAttnProcessor.*set_default_attn_processor"):
        forget(pipe, Concept("cat"), preset="paper", references=noise_images(2), steps=4, callback=exchange)
    assert steps == [1, 2]


def test_fault_7_a_loss_without_a_trained_weight_behind_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hides the attention's graph, nothing is ever trained on a loss that can't move it."""
    monkeypatch.setattr("fmn_nb.forgetting.methods.fmn.resteering_loss",
                        lambda *_: torch.zeros((), requires_grad=True))
    with pytest.raises(ForgettingError, match="no trained weight got a gradient"):
        forget(tiny_sd(), Concept("cat"), preset="paper", references=noise_images(2), steps=2)


def test_fault_7_gradient_checkpointing_counts_nothing_twice() -> None:
    found = {}
    for checkpointing in (False, True):
        pipe = tiny_sd()
        patch = forget(pipe, Concept("cat"), preset="paper", references=noise_images(2), steps=3, learning_rate=1e-3,
                       gradient_checkpointing=checkpointing)
        assert not pipe.unet.is_gradient_checkpointing
        found[checkpointing] = patch
    plain, saved = (found[key].info["forgetting"]["losses"] for key in (False, True))
    torch.testing.assert_close(torch.tensor(saved), torch.tensor(plain), rtol=1e-5, atol=0)
    for name, change in found[False].tensors.items():
        assert (found[True].tensors[name] - change).norm() <= 0.01 * change.norm() + 1e-7, name


def test_fault_8_inversion_starts_from_words_keeps_numeric_order_and_trains_the_new_rows_alone(tmp_path: Path) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    table = pipe.text_encoder.get_input_embeddings().weight
    settings = InversionSettings(tokens=12, steps=1, learning_rate=0.0, weight_decay=0.0, warmup=0, norm="free")
    tokens = invert(pipe, noise_images(1), initial="cat", settings=settings)
    started = tokens.vectors[0]
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    assert torch.equal(started[0], table[cat[0]].detach())
    for special in pipe.tokenizer.all_special_ids:
        assert not any(torch.allclose(row, table[special]) for row in started)
    assert tokens.token_names[9:] == ["<concept>_9", "<concept>_10", "<concept>_11"]
    invert(pipe, noise_images(1), initial="cat", settings=InversionSettings(tokens=2, steps=3, learning_rate=0.1))
    assert_unchanged(pipe, before)
    tokens.save(tmp_path)
    again = LearnedTokens.load(tmp_path)
    assert torch.equal(again.vectors[0], tokens.vectors[0])
    plain = tiny_sd()
    plain.load_textual_inversion(tmp_path)
    loaded = plain.text_encoder.get_input_embeddings().weight
    ids = [plain.tokenizer.convert_tokens_to_ids(name) for name in tokens.token_names]
    assert ids == sorted(ids) and torch.equal(loaded[ids], tokens.vectors[0])


def test_fault_9_a_missing_image_is_an_error_and_never_counts_as_forgotten() -> None:
    """A judge that sees nothing where there is nothing would call every one of them forgotten."""
    cat, nothing = Concept("cat"), Verdict("nothing", "noto", frozenset(), 0.0)
    judge = SimpleNamespace(verdicts=lambda images: [nothing] * len(images))
    wanted = drawings(cat, VOCABULARY)
    pictures = noise_images(len(wanted))
    assert len(judge_images(judge, cat, wanted, pictures, VOCABULARY)) == len(wanted)
    for there in (pictures[:-1], []):
        with pytest.raises(ValueError, match=f"{len(wanted)} images were asked for, {len(there)} are there"):
            judge_images(judge, cat, wanted, there, VOCABULARY)


def test_fault_9_noise_depends_on_the_image_and_never_on_its_place_in_a_batch() -> None:
    pipe, prompts, seeds = tiny_sd(), ["a cat", "a dog", "a cat", "a frog"], [5, 6, 7, 5]
    at_once, in_pairs, singly = (generate(pipe, prompts, seeds, steps=2, batch=batch) for batch in (4, 2, 1))
    for first, second, third in zip(at_once, in_pairs, singly, strict=True):
        close = [np.asarray(image, dtype=float) for image in (first, second, third)]
        assert np.abs(close[0] - close[1]).max() <= 2 and np.abs(close[0] - close[2]).max() <= 2
    noise = [np.asarray(image, dtype=float) for image in generate(pipe, ["a cat"] * 4, [1, 2, 3, 4], steps=2, batch=2)]
    for one in range(4):
        for other in range(one):
            assert np.abs(noise[one] - noise[other]).max() > 2  # a seed restarted in each batch would repeat them


def test_fault_9_a_frechet_distance_takes_both_sides_through_one_network() -> None:
    """Distances on the features of different networks have nothing to do with each other: here there is no choice."""
    judge, seen = Judge(labels=["cat"], styles=["noto"], channels=(8, 8), image_size=16).eval(), []
    real = judge.features
    judge.features = lambda images: (seen.append(len(images)), real(images))[1]
    frechet_distance(judge_features(judge), noise_images(3), noise_images(4, seed=1))
    assert sum(seen) == 7


def test_fault_10_text_encoders_are_reached_without_text_model() -> None:
    """transformers 5.6 removed `text_encoder.text_model`; the package's sources ask only whole CLIP models for one."""
    sources = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(fmn_nb.__file__).parent.rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(source)]
    asked = {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "text_model"}
    assert asked <= {"clip", "self.model"}, f"is a text encoder asked for its text_model? {asked}"
    assert not [node for node in nodes if isinstance(node, ast.Constant) and node.value == "text_model"]
    pipe = tiny_sd()
    encoder = pipe.text_encoder
    assert not hasattr(type(encoder), "text_model")
    patch = forget(pipe, Concept("cat"), preset="paper", references=noise_images(1), steps=1)
    assert patch.info["base"]["fingerprint"]
    assert invert(pipe, noise_images(1), settings=InversionSettings(tokens=1, steps=1)).vectors[0].shape == (1, 16)
