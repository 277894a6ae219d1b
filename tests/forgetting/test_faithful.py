"""`preset="paper"` is the published algorithm: the same losses and weights as a straight-line version of it."""

from __future__ import annotations

import pytest
import torch
from published import published_forget_me_not
from snapshots import noise_images
from tiny import tiny_sd

from fmn_nb.concepts.concept import Concept
from fmn_nb.forgetting.finetune import forget
from fmn_nb.models.denoising import seeded


@pytest.mark.parametrize(("lr", "kind"), [(2e-6, "denoiser"), (1e-3, "cross_attention")])
def test_paper_preset_is_the_published_algorithm(lr: float, kind: str) -> None:
    images, seed, steps = noise_images(3), 7, 35
    straight = tiny_sd()
    cat = straight.tokenizer("cat", add_special_tokens=False).input_ids
    # The package draws a fine-tune's forget batches from the stream (seed, 10).
    losses = published_forget_me_not(straight, images, "a photo of cat", cat, seeded(seed, 10), steps, lr,
                                     cross_attention_only=kind == "cross_attention")
    pipe = tiny_sd()
    patch = forget(pipe, Concept("cat"), references=images, preset="paper", seed=seed, learning_rate=lr, train=kind)
    report = patch.info["forgetting"]
    assert report["steps"] == steps and report["stopped_because"] == "all 35 steps done"
    torch.testing.assert_close(torch.tensor(report["losses"]), torch.tensor(losses), rtol=1e-4, atol=0)
    own = dict(tiny_sd().unet.named_parameters())
    with patch.applied(pipe):
        ours = dict(pipe.unet.named_parameters())
        theirs = dict(straight.unet.named_parameters())
        for name, parameter in ours.items():
            assert (parameter - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
        # Not only the weights, their small changes agree too.
        moved = [torch.cat([(found[name] - own[name]).flatten() for name in own]) for found in (ours, theirs)]
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()
    if lr > 1e-4:
        assert losses[-1] < 0.8 * losses[0]


def test_the_comparison_notices_a_difference() -> None:
    """The same test fails when one of the published settings is another one."""
    images, pipe = noise_images(3), tiny_sd()
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    losses = published_forget_me_not(tiny_sd(), images, "a photo of cat", cat, seeded(7, 10), 5, 1e-3)
    for other in ({"weight_decay": 1.0}, {"positions": ("words",)}, {"norm": "mean_square"}, {"clip": 1e-3}):
        found = forget(pipe, Concept("cat"), references=images, preset="paper", seed=7, steps=5,
                       learning_rate=1e-3, **other).info["forgetting"]["losses"]
        assert not torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-4), other
