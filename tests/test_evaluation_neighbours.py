"""Similarity is measured, by whatever CLIP there is, and shown beside what was lost."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from fmn_nb.concepts import Concept
from fmn_nb.evaluation_neighbours import similar_names, similarities
from fmn_nb.paths import data_dir
from fmn_nb.plots_evaluation import attention_figure, similarity_figure, tradeoff_figure
from fmn_nb.worlds import EmojiWorld, NotThereError


class Eye:
    """Instead of a CLIP: the mean colour of an image's middle, where the object is."""

    def images(self, images):
        middle = torch.tensor(np.stack(images)[:, 20:44, 20:44].mean(axis=(1, 2)), dtype=torch.float32)
        return torch.nn.functional.normalize(middle, dim=-1)


@pytest.fixture
def world():
    world = EmojiWorld(data_dir())
    world.scorer = Eye()
    return world


@pytest.mark.parametrize(("concept", "count"), [(Concept("cat"), 23), (Concept("noto", kind="style"), 5),
                                                (Concept("Milo", kind="identity"), 3), (Concept("mouse"), 24)])
def test_every_other_name_of_the_domain_has_a_cosine(world, concept, count):
    likeness = similarities(world, concept)
    assert len(likeness) == count and concept.name not in likeness.index
    assert likeness.is_monotonic_decreasing and likeness.between(-1.0001, 1.0001).all()
    assert len(similar_names(likeness)) == -(-count // 4)


def test_what_looks_alike_is_similar(world):
    likeness = similarities(world, Concept("strawberry"))
    assert likeness["mushroom"] > likeness["frog"], "red against green"


def test_without_a_clip_the_reason_says_how_to_get_one(tmp_path):
    with pytest.raises(NotThereError, match="fmn-nb pretrain --stages clip"):
        similarities(EmojiWorld(tmp_path), Concept("cat"))


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
    assert panels[0].get_yticklabels()[0].get_text() == "down.0.a.0.b.0"
    points = pd.DataFrame({"name": ["cat", "dog"], "group": ["paper", "balanced"], "ua": [0.1, 0.9], "kept": [1, 0.8]})
    figure = tradeoff_figure(points)
    assert isinstance(figure, Figure) and [t.get_text() for t in figure.axes[0].texts] == ["cat", "dog"]
    assert not tradeoff_figure(points.assign(group=points["name"])).axes[0].texts, "the legend has them"
