"""What the notebooks teach is what the package computes: their own `taught_` functions against fmn_nb, at 1e-5.

The functions are read from the notebooks themselves, so a changed cell is a changed test.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import generate, tiny_sd

from fmn_nb.attention.grounding import ground
from fmn_nb.attention.qkv import attend, join_heads, probabilities, scores, split_heads
from fmn_nb.attention.recorder import record_attention
from fmn_nb.files import notebooks_dir
from fmn_nb.forgetting.methods import Seen, esd
from fmn_nb.forgetting.settings import settings_for
from fmn_nb.patches.least_squares import Wanted, Weighing, solved
from fmn_nb.patches.patch import Patch

CLOSE = 1e-5
SHAPES = [(2, 3, 4, 2), (5, 1, 8, 8), (16, 32, 16, 16), (7, 77, 40, 64)]  # pixels, tokens, d, channels of the values
TAUGHT = {
    "01_qkv_cross_attention": {
        "taught_loop", "taught_map", "taught_attention", "taught_heads", "taught_layer", "taught_removed"},
    "02_concept_attention_maps": {"taught_scores"},
    "08_other_ways_to_forget": {"taught_uce", "taught_esd"},
}


def taught(notebook: str) -> dict[str, Callable]:
    """The functions named `taught_...` that a notebook's cells define, run apart from everything else there."""
    cells = nbformat.read(notebooks_dir() / f"{notebook}.ipynb", as_version=4).cells
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    found = [node for tree in trees for node in tree.body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("taught_")]
    names = {"torch": torch, "math": math, "np": np}
    exec(compile(ast.Module(found, []), notebook, "exec"), names)
    return {node.name: names[node.name] for node in found}


@pytest.fixture(scope="module")
def lesson() -> dict[str, Callable]:
    return taught("01_qkv_cross_attention")


def matrices(pixels: int, tokens: int, d: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(pixels)
    return tuple(3 * torch.randn(rows, columns, generator=noise)
                 for rows, columns in ((pixels, d), (tokens, d), (tokens, channels)))


@pytest.mark.parametrize("notebook", TAUGHT)
def test_every_taught_function_is_tested_here(notebook):
    assert set(taught(notebook)) == TAUGHT[notebook]


@pytest.mark.parametrize("shape", SHAPES)
def test_loop_and_matrix_product_are_the_package_s_attention(lesson, shape):
    Q, K, V = matrices(*shape)
    A, taken = lesson["taught_loop"](Q, K, V)
    for found, expected in ((A, probabilities(Q, K)), (lesson["taught_map"](Q, K), probabilities(Q, K)),
                            (A, scores(Q, K).softmax(-1)), (taken, attend(Q, K, V)),
                            (lesson["taught_attention"](Q, K, V), attend(Q, K, V))):
        torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_the_taught_map_bears_scores_that_would_overflow(lesson):
    Q, K = torch.tensor([[1e3, 0.0]]), torch.tensor([[1e3, 0.0], [-1e3, 0.0]])
    assert lesson["taught_map"](Q, K).tolist() == [[1.0, 0.0]] == probabilities(Q, K).tolist()


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_taught_heads_are_the_package_s_and_torch_s(lesson, heads):
    Q, K, V = matrices(9, 12, 16, 16)
    split = [split_heads(matrix[None], heads) for matrix in (Q, K, V)]
    found = lesson["taught_heads"](Q, K, V, heads)
    torch.testing.assert_close(found, join_heads(attend(*split))[0], atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(found, join_heads(F.scaled_dot_product_attention(*split))[0], atol=CLOSE, rtol=CLOSE)


def test_a_removed_column_is_a_masked_key(lesson):
    Q, K, _ = matrices(6, 10, 8, 8)
    visible = torch.ones(10, dtype=torch.bool)
    visible[[2, 7]] = False
    found = lesson["taught_removed"](probabilities(Q, K), [2, 7])
    torch.testing.assert_close(found, probabilities(Q, K, visible), atol=CLOSE, rtol=CLOSE)
    assert found[:, [2, 7]].abs().max() == 0
    added = torch.zeros(10).masked_fill(~visible, -math.inf)  # as the notebook hands it to diffusers
    torch.testing.assert_close(found, probabilities(Q, K, added), atol=CLOSE, rtol=CLOSE)


def test_the_taught_layer_is_every_cross_attention_layer_of_a_model(lesson):
    """Also its map, which the recorder hears: what the notebook computes is what the package records."""
    pipe, heard = tiny_sd(), {}
    layers = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn2")}

    def keep(module, args, kwargs, output):
        heard[module] = args[0], kwargs["encoder_hidden_states"], output

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in layers.values()]
    with record_attention(pipe, steps=[1]) as attention:
        generate(pipe, "a photo of a cat", steps=2)
    for hook in hooks:
        hook.remove()
    assert len(layers) == len(heard) >= 4
    for name, layer in layers.items():
        x, c, output = heard[layer]
        torch.testing.assert_close(lesson["taught_layer"](layer, x, c), output, atol=CLOSE, rtol=CLOSE)
        Q, K = split_heads(layer.to_q(x), layer.heads), split_heads(layer.to_k(c), layer.heads)
        for row, branch in ((0, "uncond"), (-1, "cond")):
            found = lesson["taught_map"](Q[row], K[row]).detach()
            torch.testing.assert_close(found, attention.values(name, step=1, branch=branch), atol=CLOSE, rtol=CLOSE)


def test_the_taught_scores_are_the_package_s():
    taught_scores = taught("02_concept_attention_maps")["taught_scores"]
    rng = np.random.default_rng(0)
    for _ in range(10):
        values, mask = rng.integers(0, 6, (8, 9)).astype(np.float32) + 0.5, rng.random((8, 9)) > 0.6
        expected = ground(values, mask)
        assert np.allclose(taught_scores(values, mask), (expected.pointing, expected.iou, expected.inside), atol=CLOSE)


def test_the_taught_edit_is_the_package_s_and_makes_its_own_sum_of_squares_smallest():
    random = torch.Generator().manual_seed(0)
    W, E, G, K = (torch.randn(rows, 12, generator=random).double() for rows in (20, 2, 2, 5))
    edited = taught("08_other_ways_to_forget")["taught_uce"](W, E, G, K, ridge=0.3)
    kind, tensors = solved([Wanted({"layer": W}, E, G, K)], Weighing(keep=1.0, ridge=0.3))
    ((_, change),) = Patch(kind, tensors).differences()
    torch.testing.assert_close((edited - W).float(), change, atol=CLOSE, rtol=CLOSE)

    def squares(changed: torch.Tensor) -> float:
        parts = changed @ E.T - W @ G.T, (changed - W) @ K.T, 0.3**0.5 * (changed - W)
        return sum(float(part.square().sum()) for part in parts)

    assert all(squares(edited) < squares(edited + 1e-3 * torch.randn(W.shape, generator=random)) for _ in range(5))


def test_the_taught_loss_is_the_package_s_objective():
    now, named, guide = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = settings_for("esd-x", {"anchor_guidance": 0.7})
    seen = Seen({}, now, None, None, {"concept": named, "guide": guide}.get)
    found = taught("08_other_ways_to_forget")["taught_esd"](now, named, guide, 0.7)
    torch.testing.assert_close(found, esd.objective(seen, settings), atol=CLOSE, rtol=CLOSE)


def test_the_comparison_notices_a_wrong_formula(lesson):
    """Without the scale, or with rows and columns exchanged, it would fail."""
    Q, K, _ = matrices(16, 16, 16, 16)
    for wrong in (lesson["taught_map"](4 * Q, K), lesson["taught_map"](K, Q)):
        assert not torch.allclose(wrong, probabilities(Q, K), atol=CLOSE)
