"""The one training step of everything that trains: which random numbers it takes, and what it compares."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from judges import cats
from sessions import session
from snapshots import noise_images
from tiny import tiny_flux, tiny_sd, tiny_sd3

from fmn_nb import attacks
from fmn_nb.concepts import Concept
from fmn_nb.forgetting import forget
from fmn_nb.inversion import invert
from fmn_nb.models import (
    Latents,
    Noising,
    Stream,
    UnsupportedPipelineError,
    conditions,
    denoiser,
    denoising_loss,
    fingerprint,
    noisy_batch,
    predict,
    seeded,
)


def test_a_batch_takes_spread_noise_and_timesteps_in_this_order() -> None:
    mean, std = torch.randn(3, 4, 8, 8), torch.rand(3, 4, 8, 8)
    index, shape, generator = torch.tensor([2, 0]), (2, 4, 8, 8), seeded(5, Stream.FORGET)
    batch = noisy_batch(Latents(mean, std), index, seeded(5, 10), (100, 200))
    assert torch.equal(batch.latents, mean[index] + std[index] * torch.randn(shape, generator=generator))
    assert torch.equal(batch.noise, torch.randn(shape, generator=generator))
    assert torch.equal(batch.timesteps, torch.randint(100, 200, (2,), generator=generator))
    assert len(set(Stream)) == len(Stream.__members__), "no two uses share a stream"


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux])
@torch.no_grad()
def test_the_loss_is_the_distance_to_what_was_to_be_predicted(make) -> None:
    pipe = make()
    size = (16, 16) if make is tiny_flux else None
    model, noising, given = denoiser(pipe), Noising(pipe), conditions(pipe, ["a cat", "a dog"], size=size)
    latents = Latents.exact(torch.randn(3, *given.latent_shape, generator=seeded(0)))
    batch = noisy_batch(latents, torch.tensor([0, 1, 2]), seeded(1), (0, noising.steps))
    prompts = torch.tensor([1, 0, 1])
    noisy = noising.noisy(batch.latents, batch.noise, batch.timesteps)
    wanted = batch.noise - batch.latents if noising.is_flow else batch.noise
    by_hand = (predict(model, noisy, batch.timesteps, given, prompts) - wanted).square().flatten(1).mean(1)
    torch.testing.assert_close(denoising_loss(model, noising, batch, given, prompts, per_row=True), by_hand)
    torch.testing.assert_close(denoising_loss(model, noising, batch, given, prompts), by_hand.mean())


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


@pytest.mark.parametrize("kind, settings", [
    (UniPCMultistepScheduler, FLOW), (DPMSolverMultistepScheduler, FLOW),
    (DPMSolverMultistepScheduler, dict(use_flow_sigmas=True)), (FlowMatchHeunDiscreteScheduler, {}),
])
def test_a_flow_model_is_one_under_any_sampler(kind, settings) -> None:
    pipe, right = tiny_sd3(), Noising(tiny_sd3())
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    x, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([500, 3])
    now = Noising(pipe)
    assert torch.equal(now.target(x, noise, times), right.target(x, noise, times))
    assert torch.equal(now.noisy(x, noise, times), right.noisy(x, noise, times))
    assert fingerprint(pipe) == fingerprint(tiny_sd3())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_model_is_noised_by_its_betas_under_any_sampler(kind) -> None:
    pipe, swapped = tiny_sd(), tiny_sd()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    swapped.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    x, noise, times = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([500])
    one, other = Noising(pipe), Noising(swapped)
    assert one.kind == kind and torch.equal(one.target(x, noise, times), other.target(x, noise, times))
    assert torch.equal(one.noisy(x, noise, times), other.noisy(x, noise, times))
    assert fingerprint(pipe) == fingerprint(swapped)


@pytest.mark.parametrize("sampler", [
    LCMScheduler(), HeunDiscreteScheduler(beta_schedule="scaled_linear"), CogVideoXDDIMScheduler(snr_shift_scale=4.0)])
def test_betas_that_are_a_samplers_own_default_count(sampler) -> None:
    pipe, x, times = tiny_sd(), torch.ones(1, 4, 8, 8), torch.tensor([500])
    pipe.scheduler = sampler
    expected = sampler.alphas_cumprod[500] ** 0.5 * x
    assert torch.allclose(Noising(pipe).noisy(x, torch.zeros_like(x), times), expected.float())


def test_a_sampler_that_needs_several_steps_can_be_asked() -> None:
    pipe = tiny_sd()
    plain = conditions(pipe, ["a cat", "a dog"])
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    given = conditions(pipe, ["a cat", "a dog"])
    assert given.time_scale == plain.time_scale and torch.equal(
        given.rows["encoder_hidden_states"], plain.rows["encoder_hidden_states"])


@pytest.mark.parametrize("make, kind, settings", [
    (tiny_sd, EDMDPMSolverMultistepScheduler, {}),  # has no betas
    (tiny_sd, UniPCMultistepScheduler, dict(prediction_type="trigflow")),  # a training that nobody here knows
    (tiny_sd3, UniPCMultistepScheduler, {}),  # a flow model, and a sampler that was told nothing of it
])
def test_another_training_is_refused_by_its_schedulers_name(make, kind, settings, monkeypatch) -> None:
    pipe = make()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    for work in ("fmn_nb.inversion.encode", "fmn_nb.attacks.relearning.encode", "fmn_nb.evaluation.session.generate",
                 "fmn_nb.forgetting.finetune.training_sets"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("drawn or encoded before the refusal"))
    judge, cat, images = cats(1), Concept("cat"), noise_images(8)
    for asked in (lambda: forget(pipe, "cat", preset="paper", steps=1), lambda: invert(pipe, images),
                  lambda: attacks.concept_inversion(session(pipe, judge), cat, None, references=images),
                  lambda: attacks.relearn(session(pipe, judge), cat, None, references=images),
                  lambda: attacks.adversarial_prompt(session(pipe, judge), cat, None, references=images)):
        with pytest.raises(UnsupportedPipelineError, match=kind.__name__):
            asked()
