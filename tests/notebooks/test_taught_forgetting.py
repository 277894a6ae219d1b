"""What notebook 03 teaches by hand is what the package computes: its controller, its loss, and its exercise."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import nbformat
import published
import pytest
import torch
from tiny import tiny_sd

from fmn_nb.attention.listening import attention_with_graph
from fmn_nb.files import notebooks_dir
from fmn_nb.forgetting.methods.fmn import resteering_loss
from fmn_nb.models.denoising import conditions, predict

PROMPTS = ["a photo of a cat", "a dog and a cat"]


@pytest.fixture(scope="module")
def cells() -> list:
    return nbformat.read(notebooks_dir() / "03_forget_me_not.ipynb", as_version=4).cells


@pytest.fixture(scope="module")
def taught(cells) -> SimpleNamespace:
    """The classes and the functions that the notebook's own cells define, apart from everything else there."""
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    wanted = [node for tree in trees for node in tree.body
              if getattr(node, "name", "") in ("Processor", "AttnController", "PerImage", "taught_loss", "graph")]
    names = {"torch": torch}
    exec(compile(ast.Module(wanted, []), "notebook 03", "exec"), names)
    return SimpleNamespace(**names)


def run(processor=None, listener=None, images=2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A U-Net's prediction for one or two prompts, and what the recorder hears; with `processor`, nothing is heard."""
    pipe = tiny_sd()
    given = conditions(pipe, PROMPTS[:images])
    noisy = torch.randn(2, *given.latent_shape, generator=torch.Generator().manual_seed(0))[:images]
    at = pipe.unet, noisy, torch.tensor([300, 700])[:images], given, torch.arange(images)
    if processor is None:
        with torch.no_grad(), attention_with_graph(pipe.unet) as attention:
            return predict(*at), attention
    pipe.unet.set_attn_processor({name: processor(listener, name) if "attn2" in name else own
                                  for name, own in pipe.unet.attn_processors.items()})
    return predict(*at), {}


@pytest.fixture
def masks() -> torch.Tensor:
    """Other columns for each image, and as many."""
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [4, 5, 9]] = masks[1, [2, 6, 7]] = True
    return masks


def test_the_processor_computes_what_its_layers_compute_and_tells_what_the_recorder_hears(taught) -> None:
    told, (output, heard) = {}, run()
    torch.testing.assert_close(run(taught.Processor, lambda A, name: told.update({name: A}))[0], output, atol=1e-5,
                               rtol=1e-5)
    assert len(told) == len(heard) > 3
    for (name, A), ours in zip(told.items(), heard.values(), strict=True):
        assert "attn2" in name
        torch.testing.assert_close(A, ours.flatten(0, 1), atol=1e-5, rtol=1e-5)  # images first, then their heads


def test_the_loss_is_the_packages_and_the_published_one(taught, cells, masks) -> None:
    kept, theirs, heard = [], published.Controller(), run()[1]
    run(taught.Processor, lambda A, name: kept.append(A.detach()))
    same = masks[:1].repeat(2, 1)
    theirs.positions = same
    for A in kept:
        theirs(A)
    loss = taught.taught_loss(kept, [4, 5, 9])
    assert float(loss) == pytest.approx(float(resteering_loss(heard, same, "published")), rel=1e-5)
    assert float(loss) == pytest.approx(float(theirs.loss()), rel=1e-5)
    assert float(taught.taught_loss(kept, [4, 5])) != pytest.approx(float(loss), rel=1e-3)
    # and the solution of the exercise on means is the package's other norm
    (solution,) = [found for cell in cells if (found := re.search(r"^mean_square = (torch.*)$", cell.source, re.M))]
    names = {"torch": torch, "kept": kept, "columns": [4, 5, 9]}
    expected = float(resteering_loss(heard, same, "mean_square"))
    assert float(eval(solution[1], names)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("images", [1, 2])
def test_the_published_controller_is_right_for_one_image_and_wrong_for_two(taught, masks, images) -> None:
    losses = {}
    for name in ("AttnController", "PerImage"):
        controller = getattr(taught, name)()
        controller.set_concept_positions(masks[:images])
        run(taught.Processor, controller, images)
        losses[name] = float(controller.loss().detach())
        assert len(controller.logs) == len(controller.attn_probs) == len(set(controller.logs))
    expected = float(resteering_loss(run(images=images)[1], masks[:images], "published"))
    assert losses["PerImage"] == pytest.approx(expected, rel=1e-4)
    assert (losses["AttnController"] == pytest.approx(expected, rel=1e-4)) == (images == 1)


def test_a_controller_that_is_never_zeroed_keeps_the_last_steps_graph(taught, masks) -> None:
    controller, sizes = taught.AttnController(), []
    for _ in range(2):
        controller.set_concept_positions(masks[:1])
        run(taught.Processor, controller, 1)
        sizes.append(len(taught.graph(controller.loss())))
    assert sizes[1] > 1.8 * sizes[0]
    controller.zero_attn_probs()
    controller.set_concept_positions(masks[:1])
    run(taught.Processor, controller, 1)
    assert len(taught.graph(controller.loss())) == sizes[0]
