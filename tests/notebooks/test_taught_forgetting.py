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
    """The class and the functions that the notebook's own cells define, apart from everything else there."""
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    wanted = [node for tree in trees for node in tree.body
              if getattr(node, "name", "") in ("Controller", "taught_loss")]
    names = {"torch": torch}
    exec(compile(ast.Module(wanted, []), "notebook 03", "exec"), names)
    return SimpleNamespace(Controller=names["Controller"], loss=names["taught_loss"])


def run(processor=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A U-Net's prediction for two prompts, and what the recorder hears; with `processor` in its layers, nothing."""
    pipe = tiny_sd()
    given = conditions(pipe, PROMPTS)
    noisy = torch.randn(2, *given.latent_shape, generator=torch.Generator().manual_seed(0))
    at = pipe.unet, noisy, torch.tensor([300, 700]), given, torch.arange(2)
    with torch.no_grad():
        if processor is None:
            with attention_with_graph(pipe.unet) as attention:
                return predict(*at), attention
        pipe.unet.set_attn_processor({name: processor if "attn2" in name else own
                                      for name, own in pipe.unet.attn_processors.items()})
        return predict(*at), {}


def test_the_controller_computes_what_its_layers_compute_and_keeps_what_the_recorder_hears(taught) -> None:
    controller, (output, heard) = taught.Controller(), run()
    torch.testing.assert_close(run(controller)[0], output, atol=1e-5, rtol=1e-5)
    assert len(controller.kept) == len(heard) > 3
    for kept, ours in zip(controller.kept, heard.values(), strict=True):
        torch.testing.assert_close(kept, ours.flatten(0, 1), atol=1e-5, rtol=1e-5)  # images first, then their heads


def test_the_loss_is_the_packages_and_the_published_one(taught, cells) -> None:
    controller, theirs = taught.Controller(), published.Controller()
    run(controller)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, [4, 5, 9]] = True
    theirs.positions = mask
    for kept in controller.kept:
        theirs(kept)
    loss, heard = taught.loss(controller.kept, [4, 5, 9]), run()[1]
    assert loss == pytest.approx(float(resteering_loss(heard, mask, "published")), rel=1e-5)
    assert loss == pytest.approx(float(theirs.loss()), rel=1e-5)
    assert taught.loss(controller.kept, [4, 5]) != pytest.approx(float(loss), rel=1e-3)
    # and the solution of the exercise on means is the package's other norm
    (solution,) = [found for cell in cells if (found := re.search(r"^mean_square = (torch.*)$", cell.source, re.M))]
    names = {"torch": torch, "kept": controller.kept, "columns": [4, 5, 9]}
    assert eval(solution[1], names) == pytest.approx(float(resteering_loss(heard, mask, "mean_square")), rel=1e-5)
