"""Figures beside the accuracies, each against one computed by hand: collateral, ceiling, attention, cost."""

import pandas as pd
import pytest
import torch
from tiny import tiny_sd

from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Verdict
from fmn_nb.evaluation_attention import attention_by_layer, attention_totals
from fmn_nb.evaluation_cost import Cost, cost_of
from fmn_nb.evaluation_measures import Measures, judge_images, measure, with_ceiling
from fmn_nb.evaluation_report import Report
from fmn_nb.patches import Patch
from fmn_nb.protocol import Drawing
from fmn_nb.worlds import EmojiWorld, NotThereError

CAT = Concept("cat")
WANTED = [Drawing("a cat", 0, "forget", "cat", "noto", "object"),
          *(Drawing(f"a {label}", seed, "retain", label, style, "object") for seed, (label, style) in enumerate(
              [("dog", "noto"), ("dog", "fluent"), ("frog", "noto"), ("frog", "fluent"), ("fish", "fluent")]))]


def outcomes(*seen):
    """Of the drawings above, in their order: what a judge saw, "label style"."""
    class Script:
        def verdicts(self, images):
            return [Verdict(label, style, frozenset({label}), 1.0) for label, style in map(str.split, seen)]

    return judge_images(Script(), CAT, WANTED, [None] * len(WANTED))


BEFORE = outcomes("cat noto", "dog noto", "dog fluent", "frog noto", "frog noto", "fish fluent")
AFTER = outcomes("dog noto", "dog noto", "frog noto", "fish noto", "fish fluent", "fish fluent")


def report(**parts):
    both = pd.concat([BEFORE.assign(when="before"), AFTER.assign(when="after")], ignore_index=True)
    return Report(CAT, 0, "quick", measure(BEFORE, CAT), measure(AFTER, CAT), outcomes=both, **parts)


def test_collateral_by_hand():
    found = report(similarity=pd.Series({"dog": 0.2, "frog": -0.1})).collateral()
    by_hand = {  # domain, before, after, change, images
        "frog": ("label", 1.0, 0.0, -1.0, 2), "dog": ("label", 1.0, 0.5, -0.5, 2), "fish": ("label", 1.0, 1.0, 0.0, 1),
        "noto": ("style", 1.0, 1.0, 0.0, 2), "fluent": ("style", 2 / 3, 2 / 3, 0.0, 3)}
    assert set(found.index) == set(by_hand) and list(found.index[:2]) == ["frog", "dog"], "the worst loss first"
    for name, row in by_hand.items():
        assert tuple(found.loc[name, ["domain", "before", "after", "change", "images"]]) == pytest.approx(row), name
    assert found.loc["dog", "similarity"] == 0.2 and found.loc[["fish", "noto"], "similarity"].isna().all()


def test_an_imperfect_base_model_sets_a_lower_ceiling():
    base = measure(BEFORE, CAT)
    assert (base.ira, base.cra) == (1, 0.8)
    for found in (base, measure(AFTER, CAT)):
        assert with_ceiling(found, base).ceiling == pytest.approx(3 / (1 + 1 + 1 / 0.8))
    half = Measures(ua=0.0, ira=0.5, cra=0.25, h=0.0)
    assert with_ceiling(half, half).ceiling == pytest.approx(3 / (1 + 2 + 4))
    assert with_ceiling(base, Measures(ira=0.0, cra=1.0)).ceiling == 0


def test_attention_by_hand_where_every_position_gets_the_same():
    pipe = tiny_sd()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("attn2.to_k.weight"):
                parameter.zero_()  # equal scores: each of the 16 positions gets 1/16
    prompts = ["a cat", "a photo of a cat", "a cat", "dog cat", "a photo of a cat and a dog", "cat"]
    found = attention_by_layer(pipe, CAT, [Drawing(p, i, "forget", "cat", None, "object")
                                           for i, p in enumerate(prompts)], steps=1)
    # The first four different prompts; positions up to the end of "cat", counted from the start token, are 3, 6, 3, 6.
    later = (13 + 10 + 13 + 10) / 4 / 16
    assert len(found) > 1 and found["words"].tolist() == pytest.approx([1 / 16] * len(found), abs=1e-4)
    assert found["later"].tolist() == pytest.approx([later] * len(found), abs=1e-4)


def test_attention_totals_are_means_over_layers():
    by_layer = pd.DataFrame({"words": [0.1, 0.3, 0.2], "later": [0.5, 0.5, 0.2]}, index=["one", "two", "three"])
    assert attention_totals(by_layer, "before") == pytest.approx({"mass_before": 0.2, "later_before": 0.4})


def test_costs_by_hand():
    spent = Cost(1.23456, 2000)
    evaluation = {"evaluation_seconds": 1.235, "evaluation_peak_memory_bytes": 2000}
    assert cost_of(None, spent) == evaluation
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.float16)}  # 15 * 4 + 2 * 2 bytes
    patch = Patch("weights", tensors, {"forgetting": {"seconds": 7.5, "steps": 3}})
    assert cost_of(patch, spent) == {"forgetting_seconds": 7.5, "patch_bytes": 64, **evaluation}, "none is made up"
    table = report(cost=cost_of(patch, spent)).costs()
    assert table["value"].to_dict() == cost_of(patch, spent)
    assert table["unit"].tolist() == ["s", "bytes", "s", "bytes"] and report().costs().empty


def test_an_emoji_world_without_a_judge_says_how_to_build_one(tmp_path):
    with pytest.raises(NotThereError, match="build it with: fmn-nb pretrain --stages judge"):
        EmojiWorld(tmp_path).judge_for(CAT)
