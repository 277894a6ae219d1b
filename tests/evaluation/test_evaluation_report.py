"""Figures beside the accuracies, each against one computed by hand: collateral, similarity, attention, cost."""

import numpy as np
import pandas as pd
import pytest
import torch
from judges import outcomes
from matplotlib.figure import Figure
from tiny import tiny_sd

from fmn_nb.concepts import Concept, NotThereError
from fmn_nb.emoji import EmojiWorld
from fmn_nb.evaluation import Drawing, Measures, Report, Sampling, measure, with_ceiling
from fmn_nb.evaluation.clip import similar_names, similarities
from fmn_nb.evaluation.evaluator import attention_by_layer, cost_of
from fmn_nb.files import data_dir
from fmn_nb.models import Cost
from fmn_nb.patches import Patch
from fmn_nb.plots import attention_figure, similarity_figure, tradeoff_figure

CAT = Concept("cat")
WANTED = [Drawing("a cat", 0, "forget", "cat", "noto", "object"),
          *(Drawing(f"a {label}", seed, "retain", label, style, "object") for seed, (label, style) in enumerate(
              [("dog", "noto"), ("dog", "fluent"), ("frog", "noto"), ("frog", "fluent"), ("fish", "fluent")]))]


def judged(*seen):
    """Of the drawings above, in their order: what a judge saw, "label style"."""
    return outcomes(CAT, lambda drawing: tuple(seen[WANTED.index(drawing)].split()), WANTED)


BEFORE = judged("cat noto", "dog noto", "dog fluent", "frog noto", "frog noto", "fish fluent")
AFTER = judged("dog noto", "dog noto", "frog noto", "fish noto", "fish fluent", "fish fluent")


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
                                           for i, p in enumerate(prompts)], Sampling(steps=1))
    # The first four different prompts; positions up to the end of "cat", counted from the start token, are 3, 6, 3, 6.
    later = (13 + 10 + 13 + 10) / 4 / 16
    assert len(found) > 1 and found["words"].tolist() == pytest.approx([1 / 16] * len(found), abs=1e-4)
    assert found["later"].tolist() == pytest.approx([later] * len(found), abs=1e-4)


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


def test_an_emoji_world_without_a_judge_or_a_clip_says_how_to_build_one(tmp_path):
    with pytest.raises(NotThereError, match="build it with: fmn-nb pretrain --stages judge"):
        EmojiWorld(tmp_path).judge_for(CAT)
    with pytest.raises(NotThereError, match="fmn-nb pretrain --stages clip"):
        similarities(EmojiWorld(tmp_path), CAT)


class Eye:
    """Instead of a CLIP: the mean colour of an image's middle, where the object is."""

    def images(self, images):
        middle = torch.tensor(np.stack(images)[:, 20:44, 20:44].mean(axis=(1, 2)), dtype=torch.float32)
        return torch.nn.functional.normalize(middle, dim=-1)


@pytest.fixture
def coloured():
    """The emoji world with the eye for its CLIP."""
    world = EmojiWorld(data_dir())
    world.scorer = Eye()
    return world


@pytest.mark.parametrize(("concept", "count"), [(Concept("cat"), 23), (Concept("noto", kind="style"), 5),
                                                (Concept("Milo", kind="identity"), 3), (Concept("mouse"), 24)])
def test_every_other_name_of_the_domain_has_a_cosine(coloured, concept, count):
    likeness = similarities(coloured, concept)
    assert len(likeness) == count and concept.name not in likeness.index
    assert likeness.is_monotonic_decreasing and likeness.between(-1.0001, 1.0001).all()
    assert len(similar_names(likeness)) == -(-count // 4)


def test_what_looks_alike_is_similar(coloured):
    likeness = similarities(coloured, Concept("strawberry"))
    assert likeness["mushroom"] > likeness["frog"], "red against green"


def test_figures_show_their_points():
    table = pd.DataFrame({"before": [1.0, 0.9, 1.0], "after": [0.2, 0.9, 1.0], "change": [-0.8, 0.0, 0.0],
                          "similarity": [0.9, 0.1, None]}, index=["dog", "frog", "noto"])
    axes = similarity_figure(table, "cat").axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[0.9, -0.8], [0.1, 0.0]]
    assert [text.get_text() for text in axes.texts] == ["dog"], "what lost nothing needs no name"
    with pytest.raises(ValueError, match="no name has a similarity"):
        similarity_figure(table.assign(similarity=np.nan), "cat")
    layers = pd.DataFrame({"words_before": [0.3], "later_before": [0.6], "words_after": [0.1], "later_after": [0.5]},
                          index=["down_blocks.0.attentions.0.transformer_blocks.0.attn2"])
    panels = attention_figure(layers).axes
    assert [panel.get_title() for panel in panels] == ["on its words", "on later positions"]
    assert panels[0].get_yticklabels()[0].get_text() == "down 0.0"
    points = pd.DataFrame({"name": ["cat", "dog"], "group": ["paper", "balanced"], "ua": [0.1, 0.9], "kept": [1, 0.8]})
    figure = tradeoff_figure(points)
    assert isinstance(figure, Figure) and [t.get_text() for t in figure.axes[0].texts] == ["cat", "dog"]
    assert not tradeoff_figure(points.assign(group=points["name"])).axes[0].texts, "the legend has them"
