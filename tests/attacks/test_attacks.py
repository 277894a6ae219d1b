"""Attacks: the figures are those of the judge, the pipeline is the same afterwards, and the searches really search."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from judges import Puppet, cats
from quick import quick
from sessions import session
from snapshots import assert_unchanged, noise_images, snapshot
from tiny import tiny_sd, tiny_sdxl

from fmn_nb import attacks
from fmn_nb.attacks import Attack, InversionBudget, RelearningBudget, SearchBudget, attack_table
from fmn_nb.attacks.attack import NO_IMAGES, with_words
from fmn_nb.attacks.prompt_search import Search, whole_words
from fmn_nb.concepts import Concept
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import MeasurementError, Session, Share, drawings
from fmn_nb.evaluation.protocol import probe_drawings
from fmn_nb.models import NoisyBatch, encode, seeded, text_encoders
from fmn_nb.patches import LearnedTokens
from fmn_nb.plots import relearning_figure, success_figure

CAT, NOTO, MILO = Concept("cat"), Concept("noto", kind="style"), Concept("Milo", kind="identity")
QUICK = InversionBudget(tokens=2, steps=2, batch_size=1, references=2, images=4)


def test_the_concepts_place_is_taken_by_other_words() -> None:
    said = {"a photo of a cat in the style of noto": CAT, "a photo of a frog in the style of noto": NOTO,
            "a portrait of Milo": MILO}
    assert [with_words(prompt, concept, "<x>") for prompt, concept in said.items()] == [
        "a photo of <x> in the style of noto", "a photo of a frog in the style of <x>", "a portrait of <x>"]
    with pytest.raises(MeasurementError, match="'cat' is not in the prompt"):
        with_words("a photo of a catalogue", CAT, "<x>")


def test_a_learned_token_is_measured_and_attacked_by_the_token() -> None:
    """It stands for the concept in every prompt; its name, which words describe badly, is only what it is called."""
    pipe, toy = tiny_sd(), Concept("cat", phrase="<toy>")
    own = session(pipe, judge=cats(1, 1))
    tokens = LearnedTokens("<toy>", (torch.randn(2, 16, generator=seeded(0)) * 0.02,))
    asked = drawings(toy, VOCABULARY)
    assert {d.role for d in asked if "<toy>" in d.prompt} == {"forget"} == {d.role for d in asked if d.label == "cat"}
    assert asked[0].prompt == "a photo of <toy> in the style of noto"
    assert [d.seed for d in asked] == [d.seed for d in drawings(CAT, VOCABULARY)], "from the same noise as by its name"
    assert all("<toy>" in d.prompt for d in probe_drawings(toy, VOCABULARY) if d.role in ("paraphrase", "pair"))
    assert attacks.paraphrases(toy)[:2] == ["the <toy>", "<toy>"]
    with tokens.loaded(pipe):
        before = snapshot(pipe)
        attack = attacks.concept_inversion(own, toy, None, budget=QUICK, references=noise_images(2))
        assert attack.count == 4
        assert_unchanged(pipe, before)


def test_each_wording_is_asked_through_prompts_of_its_own() -> None:
    """Two wordings of four prompts: neither may stand for half of the prompts."""
    asked = []
    own = session(tiny_sd(), judge=cats(*[1] * 24))
    object.__setattr__(own, "seen", lambda concept, wanted, prompts=None: asked.append(prompts) or pd.Series(
        [True] * len(wanted)))
    attacks.paraphrase_attack(own, MILO, None, wordings=["<a>", "<b>"], each=4)
    said = [{prompt.replace(words, "") for prompt in asked[0] if words in prompt} for words in ("<a>", "<b>")]
    assert said[0] == said[1] and len(said[0]) == 4
    with pytest.raises(MeasurementError, match="no wording to try"):
        attacks.paraphrase_attack(own, MILO, None, wordings=[])


@pytest.mark.parametrize("concept", [CAT, NOTO, MILO, Concept("mouse")])
@pytest.mark.parametrize("count", [1, 5, 24, 50])
def test_drawings_name_the_concept_and_have_seeds_of_their_own(concept, count) -> None:
    asked = session(None).fresh_drawings(concept, count, seed=3)
    assert len(asked) == count and all(concept.name in d.prompt for d in asked)
    seeds = {d.seed for d in asked}
    assert len(seeds) == count and not seeds & {d.seed for d in drawings(concept, VOCABULARY, 3)}
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
    both = [Attack("a", 1, 3, Share(0.1, 0.0, 0.4, 3), 3, 1.234), skipped]
    assert all(attack.after.low <= attack.after.value <= attack.after.high for attack in both)
    said = skipped.to_dict()
    assert said["skipped"] == "nothing answers" and "success" not in said and "skipped" not in both[0].to_dict()
    table = attack_table(both).drop(columns="seconds").round(2)
    assert table.loc["b"].tolist() == ["skipped"] * 4 + [0, 0] and table.loc["a", "after"] == 0.33
    figure = success_figure(both)
    assert figure.words == "a: 0.10 before, 0.33 after. b: skipped, nothing answers."
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["skipped"] and len(axes.collections) == 3, "no dots for b"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
    assert success_figure([skipped]).axes[0].get_legend() is None


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_concept_inversion_leaves_the_pipeline_as_it_was(make) -> None:
    pipe = make()
    patch, before = quick(pipe), snapshot(pipe)
    attack = attacks.concept_inversion(session(pipe, cats(1, 3)), CAT, patch, references=noise_images(2), budget=QUICK)
    assert_unchanged(pipe, before)
    assert (attack.successes, attack.count, attack.before.value, attack.steps) == (3, 4, 0.25, 2)
    assert attack.found["tokens"] == 2 and attack.found["loss_first"] > 0
    failing = session(pipe, Puppet(lambda call, image: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        attacks.concept_inversion(failing, CAT, patch, references=noise_images(2), budget=QUICK)
    assert_unchanged(pipe, before)


def test_without_a_judge_or_references_it_says_what_to_give() -> None:
    pipe = tiny_sd()
    with pytest.raises(MeasurementError, match="give a judge"):
        attacks.concept_inversion(pipe, CAT, None, references=noise_images(6))
    judged = session(pipe, cats())
    for attack in (attacks.concept_inversion, attacks.adversarial_prompt, attacks.relearn):
        with pytest.raises(MeasurementError, match="give references"):
            attack(judged, CAT, None)
        with pytest.raises(MeasurementError, match="1 references were given but [46] are to be used: give more"):
            attack(judged, CAT, None, references=noise_images(1))
    with pytest.raises(MeasurementError, match="numbers of steps"):
        attacks.relearn(judged, CAT, None, budget=RelearningBudget(at=()), references=noise_images(1))
    with pytest.raises(MeasurementError, match="not a sort of wording"):
        attacks.paraphrase_attack(judged, CAT, None, sort="typos")


def test_misspellings_by_hand() -> None:
    assert attacks.misspellings(CAT) == ["a catt", "a ca", "an act", "a caat", "a ct", "a c4t", "a c a t", "a c-at"]
    assert attacks.misspellings(Concept("a cat")) == attacks.misspellings(CAT), "its article is no part of the name"
    tower = attacks.paraphrases(Concept("the Eiffel Tower"))
    assert tower[0] == "the Eiffel Tower" and not any("the Eiffel" in one for one in tower[1:])
    for concept in (NOTO, MILO, Concept("birthday cake"), Concept("a")):
        said = attacks.misspellings(concept)
        assert len(set(said)) == len(said) and concept.name not in said
    assert {"the cat", "a cat, just a cat", "an emoji of a cat"} <= set(attacks.paraphrases(CAT))
    assert "noto style" in attacks.paraphrases(NOTO) and "a drawing of Milo" in attacks.paraphrases(MILO)


def test_wordings_are_counted_each_and_together() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    attack = attacks.paraphrase_attack(session(pipe, cats(4, 0, 1)), CAT, patch, wordings=["a catt", "a kat"], each=2)
    assert_unchanged(pipe, before)
    assert (attack.successes, attack.count, attack.before.value, attack.name) == (1, 4, 0.0, "wordings")
    table = attacks.wordings_table(attack)
    assert table.loc["a catt"].tolist() == [1.0, 0.5] and table.loc["a kat"].tolist() == [1.0, 0.0]
    assert attack.found["counted"] == 2 and not attack.skipped
    with pytest.raises(MeasurementError, match="not an attack by wording"):
        attacks.wordings_table(Attack("x", 0, 1, Share(0, 0, 1, 1), 0, 0.0))


def test_a_wording_only_counts_where_the_base_model_answers_it() -> None:
    pipe = tiny_sd()
    patch = quick(pipe)
    # images 0 and 1 are of the first wording, 2 and 3 of the second: base model, plain prompts, reworded ones
    judged = session(pipe, cats({0}, {0, 1, 2}, {1, 2}))
    attack = attacks.paraphrase_attack(judged, CAT, patch, wordings=["a catt", "a kat"], each=2)
    assert (attack.successes, attack.count) == (1, 2), "half of the base model's images are enough for 'a catt'"
    assert (attack.before.value, attack.before.images, attack.found["counted"]) == (1.0, 2, 1)
    assert attacks.wordings_table(attack)["after"].tolist() == [0.5, 0.5], "the table holds every wording"
    skipped = attacks.paraphrase_attack(session(pipe, cats(0, 0, 0)), CAT, patch, sort="misspellings", each=1)
    assert skipped.skipped.startswith("the base model answers none of the 8 wordings") and skipped.count == 0
    assert skipped.after == skipped.before == NO_IMAGES and len(attacks.wordings_table(skipped)) == 8


def test_relearning_learns_and_leaves_no_trace() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    budget, references = RelearningBudget((0, 3, 40), 4, 1e-2, references=2, images=4), noise_images(2)
    table = attacks.relearn(session(pipe, cats(0, 1, 3)), CAT, patch, budget=budget, references=references)
    assert_unchanged(pipe, before)
    assert table["steps"].tolist() == [0, 3, 40] and table["successes"].tolist() == [0, 1, 3]
    assert table["share"].tolist() == [0, 0.25, 0.75] and (table["low"] <= table["share"]).all()
    frozen = replace(budget, learning_rate=0.0)
    still = attacks.relearn(session(pipe, cats(0, 0, 0)), CAT, patch, budget=frozen, references=references)
    assert table["loss"].iloc[-1] < still["loss"].iloc[-1], "training lowers the loss on the same draws"
    again = attacks.relearn(session(pipe, cats(0, 1, 3)), CAT, patch, budget=budget, references=references)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))
    assert attacks.steps_until(table, 0.5) == 40 and attacks.steps_until(table, 0.9) is None
    half = pd.DataFrame({"steps": [10], "successes": [36], "images": [72], "share": [0.49999999999999994]})
    assert attacks.steps_until(half, 0.5) == 10, "a mean of shares rounds"
    with pytest.raises(MeasurementError, match="at least one image is needed, not 0"):
        session(pipe, cats(0)).fresh_drawings(CAT, 0, 0)
    assert relearning_figure({"cat": table}).words == "cat: 0.75 after 40 steps."


def search_bench(pipe):
    """A search over two prompts on noised references."""
    prompts = [d.prompt for d in session(pipe).fresh_drawings(CAT, 2, 0)]
    return Search(pipe, prompts, whole_words(pipe, CAT), encode(pipe, noise_images(2)), 2, seeded(0, 1))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_the_scores_are_the_gradient_of_the_loss(make) -> None:
    """A step towards a word's embedding changes the exact loss as its score says, to first order."""
    search = search_bench(make())
    search.pipe, (latents, noise, times) = make().to(dtype=torch.float64), vars(search.batch).values()
    search.batch = NoisyBatch(latents.double(), noise.double(), times)
    prefix, share = search.known[:2], 1e-3
    scores, base = search.scores(prefix), search.losses([prefix])[0]
    vocabulary = search.pipe.tokenizer.get_vocab()
    for place, word in ((0, 5), (1, 9)):
        vectors = []
        for encoder in text_encoders(search.pipe):
            table = encoder.get_input_embeddings().weight.detach()
            vector = table[[vocabulary[one + "</w>"] for one in prefix]].clone()
            vector[place] += share * (table[vocabulary[search.known[word] + "</w>"]] - vector[place])
            vectors.append(vector)
        with LearnedTokens("<moved>", tuple(vectors)).loaded(search.pipe):
            moved = search.losses([["<moved>"]])[0]
        expected = float(scores[place, word]) * share
        assert moved - base == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_the_search_never_gets_worse_and_ends_in_typed_words() -> None:
    pipe = tiny_sd()
    patch, before = quick(pipe), snapshot(pipe)
    budget = SearchBudget(words=2, rounds=4, candidates=6, references=2, noises=1, images=4)
    options = {"references": noise_images(2), "budget": budget}
    found = [attacks.adversarial_prompt(session(pipe, cats(0, 1, 2)), CAT, patch, **options) for _ in range(2)]
    assert_unchanged(pipe, before)
    assert found[0].found == found[1].found, "the same seed finds the same words"
    attack = found[0]
    assert (attack.successes, attack.before.value, attack.found["random_success"]) == (2, 0.0, 0.25)
    assert attack.found["loss_last"] <= attack.found["loss_first"]
    words = attack.found["prefix"].split()
    assert len(words) == 2 and set(words) <= set(whole_words(pipe, CAT))


def test_the_search_improves_on_its_random_start() -> None:
    search = search_bench(tiny_sd())
    prefix, losses = search.run(search.known[:2], SearchBudget(words=2, rounds=6, candidates=12))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] and prefix != search.known[:2]
    assert losses[-1] == pytest.approx(search.losses([prefix])[0], rel=1e-4)


def test_whole_words_are_one_token_each_and_never_the_concept() -> None:
    pipe = tiny_sd()
    known = whole_words(pipe, CAT)
    assert "dog" in known and "cat" not in known
    ids = pipe.tokenizer(known, add_special_tokens=False).input_ids
    assert {len(one) for one in ids} == {1}
    assert not {"birthday", "cake"} & set(whole_words(pipe, Concept("birthday cake")))


def test_on_the_emoji_model_the_base_draws_and_its_own_word_inverts(emoji) -> None:
    pipe = Session.of(emoji, steps=8)
    references = pipe.references(CAT, None, 3, seed=0)
    assert len(references) == 3 and references[0].size == (64, 64)
    assert pipe.seen(CAT, pipe.fresh_drawings(CAT, 6, seed=0)).mean() > 0.5
    gentle = InversionBudget(tokens=1, steps=1, learning_rate=0.0, batch_size=1, references=1, images=6)
    attack = attacks.concept_inversion(pipe, CAT, None, budget=gentle)
    assert attack.after.value > 0.5, "a token that starts at the word's own embedding draws the word"
