"""Attacks: the figures are those of the judge, the pipeline is the same afterwards, and the searches really search."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from quick import quick
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_sd, tiny_sdxl

from fmn_nb import attacks_search
from fmn_nb.attacks import (
    NO_IMAGES,
    Attack,
    AttackError,
    InversionBudget,
    asked_for,
    attack_table,
    concept_inversion,
    in_other_words,
    references_of,
    seen,
)
from fmn_nb.attacks_finetune import fine_tuned_back, steps_until
from fmn_nb.attacks_prompts import misspellings, paraphrases, reworded, wordings_table
from fmn_nb.attacks_search import SearchBudget, optimised_prompt, whole_words
from fmn_nb.concepts import Concept
from fmn_nb.denoising import seeded
from fmn_nb.emoji.judge import Verdict
from fmn_nb.evaluation_probes import Share
from fmn_nb.models import bundled, load
from fmn_nb.plots_attacks import relearning_figure, success_figure
from fmn_nb.protocol import drawings
from fmn_nb.references import encode

needs_emoji = pytest.mark.skipif("emoji" not in bundled(), reason="the emoji model isn't in data/: fmn-nb pretrain")
CAT, NOTO, MILO = Concept("cat"), Concept("noto", kind="style"), Concept("Milo", kind="identity")
QUICK = InversionBudget(tokens=2, steps=2, batch_size=1, references=2, images=4)


class Script:
    """A judge that sees "cat" in the first so many images of each call, as a script says, and a dog in the rest."""

    def __init__(self, *cats: int) -> None:
        self.cats = list(cats)

    def verdicts(self, images):
        cats = self.cats.pop(0)
        return [Verdict("cat" if i < cats else "dog", "noto", frozenset(), 1.0) for i in range(len(images))]


def test_the_concepts_place_is_taken_by_other_words() -> None:
    said = {"a photo of a cat in the style of noto": CAT, "a photo of a frog in the style of noto": NOTO,
            "a portrait of Milo": MILO}
    assert [in_other_words(prompt, concept, "<x>") for prompt, concept in said.items()] == [
        "a photo of <x> in the style of noto", "a photo of a frog in the style of <x>", "a portrait of <x>"]
    with pytest.raises(AttackError, match="'cat' is not in the prompt"):
        in_other_words("a photo of a catalogue", CAT, "<x>")


@pytest.mark.parametrize("concept", [CAT, NOTO, MILO, Concept("mouse")])
@pytest.mark.parametrize("count", [1, 5, 24, 50])
def test_drawings_name_the_concept_and_have_seeds_of_their_own(concept, count) -> None:
    asked = asked_for(concept, count, seed=3)
    assert len(asked) == count and all(concept.name in d.prompt for d in asked)
    seeds = {d.seed for d in asked}
    assert len(seeds) == count and not seeds & {d.seed for d in drawings(concept, 3)}
    prompts = pd.Series([d.prompt for d in asked]).value_counts()
    assert prompts.max() - prompts.min() <= 1, "evenly spread"


def test_success_is_what_the_judge_sees_with_its_interval() -> None:
    attack = Attack("a", 5, 10, Share(0.1, 0.0, 0.4, 10), 3, 1.234)
    assert (attack.after.value, attack.after.images) == (0.5, 10) and attack.after.low < 0.3 < 0.7 < attack.after.high
    assert attack.to_dict()["success"] == 0.5 and attack.to_dict()["seconds"] == 1.23
    assert attack_table([attack]).loc["a", ["before", "after", "images", "steps"]].tolist() == [0.1, 0.5, 10, 3]
    figure = success_figure([attack])
    assert figure.words == "a: 0.10 before, 0.50 after."
    with pytest.raises(ValueError, match="no attacks"):
        success_figure([])


def test_a_skipped_attack_is_said_to_be_skipped_and_never_zero() -> None:
    skipped = Attack("b", 0, 0, NO_IMAGES, 0, 1.0, skipped="nothing answers")
    attacks = [Attack("a", 1, 3, Share(0.1, 0.0, 0.4, 3), 3, 1.234), skipped]
    assert all(attack.after.low <= attack.after.value <= attack.after.high for attack in attacks)
    said = skipped.to_dict()
    assert said["skipped"] == "nothing answers" and "success" not in said and "skipped" not in attacks[0].to_dict()
    table = attack_table(attacks).drop(columns="seconds").round(2)
    assert table.loc["b"].tolist() == ["skipped"] * 4 + [0, 0] and table.loc["a", "after"] == 0.33
    figure = success_figure(attacks)
    assert figure.words == "a: 0.10 before, 0.33 after. b: skipped, nothing answers."
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["skipped"] and len(axes.collections) == 3, "no dots for b"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
    assert success_figure([skipped]).axes[0].get_legend() is None


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_concept_inversion_leaves_the_pipeline_as_it_was(make) -> None:
    pipe = make()
    patch, before = quick(pipe), snapshot(pipe)
    attack = concept_inversion(pipe, CAT, patch, references=noise_images(2), budget=QUICK, judge=Script(1, 3), steps=1)
    assert_unchanged(pipe, before)
    assert (attack.successes, attack.count, attack.before.value, attack.steps) == (3, 4, 0.25, 2)
    assert attack.found["tokens"] == 2 and attack.found["loss_first"] > 0
    with pytest.raises(RuntimeError, match="no verdict"):
        concept_inversion(pipe, CAT, patch, references=noise_images(2), budget=QUICK, judge=Refusing(), steps=1)
    assert_unchanged(pipe, before)


class Refusing:
    def verdicts(self, images):
        raise RuntimeError("no verdict")


def test_without_a_judge_or_references_it_says_what_to_give() -> None:
    pipe = tiny_sd()
    with pytest.raises(AttackError, match="give judge="):
        concept_inversion(pipe, CAT, None, references=noise_images(1))
    for attack in (concept_inversion, optimised_prompt, fine_tuned_back):
        with pytest.raises(AttackError, match="give references"):
            attack(pipe, CAT, None, judge=Script())
        with pytest.raises(AttackError, match="1 references were given but [46] are to be used: give more"):
            attack(pipe, CAT, None, judge=Script(), references=noise_images(1))
    with pytest.raises(AttackError, match="numbers of steps"):
        fine_tuned_back(pipe, CAT, None, at=(), judge=Script(), references=noise_images(1))
    with pytest.raises(AttackError, match="no sort of wording"):
        reworded(pipe, CAT, None, sort="typos", judge=Script())


def test_misspellings_by_hand() -> None:
    assert misspellings(CAT) == ["a catt", "a ca", "an act", "a caat", "a ct", "a c4t", "a c a t", "a c-at"]
    for concept in (NOTO, MILO, Concept("birthday cake"), Concept("a")):
        said = misspellings(concept)
        assert len(set(said)) == len(said) and concept.name not in said
    assert {"the cat", "a cat, just a cat", "an emoji of a cat"} <= set(paraphrases(CAT))
    assert "noto style" in paraphrases(NOTO) and "a drawing of Milo" in paraphrases(MILO)


def test_wordings_are_counted_each_and_together() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    attack = reworded(pipe, CAT, patch, wordings=["a catt", "a kat"], each=2, judge=Script(4, 0, 1), steps=1)
    assert_unchanged(pipe, before)
    assert (attack.successes, attack.count, attack.before.value, attack.name) == (1, 4, 0.0, "wordings")
    table = wordings_table(attack)
    assert table.loc["a catt"].tolist() == [1.0, 0.5] and table.loc["a kat"].tolist() == [1.0, 0.0]
    assert attack.found["counted"] == 2 and not attack.skipped
    with pytest.raises(AttackError, match="no attack by wording"):
        wordings_table(Attack("x", 0, 1, Share(0, 0, 1, 1), 0, 0.0))


class Seen:
    """A judge that sees "cat" in the images whose numbers a script lists, call after call."""

    def __init__(self, *calls: set[int]) -> None:
        self.calls = list(calls)

    def verdicts(self, images):
        cats = self.calls.pop(0)
        return [Verdict("cat" if i in cats else "dog", "noto", frozenset(), 1.0) for i in range(len(images))]


def test_a_wording_only_counts_where_the_base_model_answers_it() -> None:
    pipe = tiny_sd()
    patch = quick(pipe)
    # images 0 and 2 are of the first wording, 1 and 3 of the second: base model, plain prompts, reworded ones
    attack = reworded(pipe, CAT, patch, wordings=["a catt", "a kat"], each=2, judge=Seen({0}, {0, 1, 2}, {2, 3}),
                      steps=1)
    assert (attack.successes, attack.count) == (1, 2), "half of the base model's images are enough for 'a catt'"
    assert (attack.before.value, attack.before.images, attack.found["counted"]) == (1.0, 2, 1)
    assert wordings_table(attack)["after"].tolist() == [0.5, 0.5], "the table holds every wording"
    skipped = reworded(pipe, CAT, patch, sort="misspellings", each=1, judge=Seen(set(), set(), set()), steps=1)
    assert skipped.skipped.startswith("the base model answers none of the 8 wordings") and skipped.count == 0
    assert skipped.after == skipped.before == NO_IMAGES and len(wordings_table(skipped)) == 8


def test_fine_tuning_back_learns_and_leaves_no_trace() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    options = {"references": noise_images(2), "at": (0, 3, 40), "learning_rate": 1e-2, "count": 2, "images": 4,
               "steps": 1}
    table = fine_tuned_back(pipe, CAT, patch, judge=Script(0, 1, 3), **options)
    assert_unchanged(pipe, before)
    assert table["steps"].tolist() == [0, 3, 40] and table["successes"].tolist() == [0, 1, 3]
    assert table["share"].tolist() == [0, 0.25, 0.75] and (table["low"] <= table["share"]).all()
    still = fine_tuned_back(pipe, CAT, patch, judge=Script(0, 0, 0), **{**options, "learning_rate": 0.0})
    assert table["loss"].iloc[-1] < still["loss"].iloc[-1], "training lowers the loss on the same draws"
    again = fine_tuned_back(pipe, CAT, patch, judge=Script(0, 1, 3), **options)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))
    assert steps_until(table, 0.5) == 40 and steps_until(table, 0.9) is None
    assert relearning_figure({"cat": table}).words == "cat: 0.75 after 40 steps."


def search_bench(pipe):
    """What `_search` and its parts are given: prompts, noised references, known words."""
    prompts = [d.prompt for d in asked_for(CAT, 2, 0)]
    generator = seeded(0, 1)
    rows = attacks_search._rows(pipe, encode(pipe, noise_images(2)), len(prompts), 2, generator)
    return prompts, rows, whole_words(pipe, CAT), generator


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_the_scores_are_the_gradient_of_the_loss(make) -> None:
    """A step towards a word's embedding changes the exact loss as its score says, to first order."""
    pipe = make().to(dtype=torch.float64)
    prompts, rows, known, _ = search_bench(make())
    rows = attacks_search._Rows(rows.noisy.double(), rows.target.double(), rows.times, rows.prompt_of)
    prefix, share = known[:2], 1e-3
    scores = attacks_search._scores(pipe, prompts, rows, prefix, known)
    base = attacks_search._losses(pipe, prompts, rows, [prefix])[0]
    vocabulary = pipe.tokenizer.get_vocab()
    for place, word in ((0, 5), (1, 9)):
        vectors = []
        for encoder in attacks_search.text_encoders(pipe):
            table = encoder.get_input_embeddings().weight.detach()
            vector = table[[vocabulary[one + "</w>"] for one in prefix]].clone()
            vector[place] += share * (table[vocabulary[known[word] + "</w>"]] - vector[place])
            vectors.append(vector)
        with attacks_search.LearnedTokens("<moved>", tuple(vectors)).loaded(pipe):
            moved = attacks_search._losses(pipe, prompts, rows, [["<moved>"]])[0]
        expected = float(scores[place, word]) * share
        assert moved - base == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_the_search_never_gets_worse_and_ends_in_typed_words() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    budget = SearchBudget(words=2, rounds=4, candidates=6, references=2, noises=1, images=4)
    found = [optimised_prompt(pipe, CAT, patch, references=noise_images(2), budget=budget, judge=Script(0, 1, 2),
                              steps=1) for _ in range(2)]
    assert_unchanged(pipe, before)
    assert found[0].found == found[1].found, "the same seed finds the same words"
    attack = found[0]
    assert (attack.successes, attack.before.value, attack.found["random_success"]) == (2, 0.0, 0.25)
    assert attack.found["loss_last"] <= attack.found["loss_first"]
    words = attack.found["prefix"].split()
    assert len(words) == 2 and set(words) <= set(whole_words(pipe, CAT))


def test_the_search_improves_on_its_random_start() -> None:
    pipe = tiny_sd()
    prompts, rows, known, generator = search_bench(pipe)
    budget = SearchBudget(words=2, rounds=6, candidates=12)
    prefix, losses = attacks_search._search(pipe, prompts, rows, known[:2], known, budget, generator)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] and prefix != known[:2]
    assert losses[-1] == pytest.approx(attacks_search._losses(pipe, prompts, rows, [prefix])[0], rel=1e-4)


def test_whole_words_are_one_token_each_and_never_the_concept() -> None:
    pipe = tiny_sd()
    known = whole_words(pipe, CAT)
    assert "dog" in known and "cat" not in known
    ids = pipe.tokenizer(known, add_special_tokens=False).input_ids
    assert {len(one) for one in ids} == {1}
    assert not {"birthday", "cake"} & set(whole_words(pipe, Concept("birthday cake")))


@needs_emoji
def test_on_the_emoji_model_the_base_draws_and_its_own_word_inverts() -> None:
    pipe = load("emoji")
    references = references_of(pipe, CAT, None, 3, seed=0)
    assert len(references) == 3 and references[0].size == (64, 64)
    judge = attacks_judge(pipe)
    asked = asked_for(CAT, 6, seed=0)
    assert seen(pipe, judge, CAT, asked, steps=8).mean() > 0.5
    gentle = InversionBudget(tokens=1, steps=1, learning_rate=0.0, batch_size=1, references=1, images=6)
    attack = concept_inversion(pipe, CAT, None, budget=gentle, steps=8)
    assert attack.after.value > 0.5, "a token that starts at the word's own embedding draws the word"


def attacks_judge(pipe):
    from fmn_nb.attacks import judge_of

    return judge_of(pipe, None)
