"""Misdirected or destroyed? Probes that bypass the prompt, each on the way from noise to an image.

A model can forget in two ways (Lu, Sharma, Wang, Cohen, arXiv 2505.17013): its guidance turns away while what draws the
concept is still there, or the concept's images become unlikely. An attack on the prompt asks only about the first.
These probes help the model along the way and ask how far it goes by itself:

    noise on the way          fresh noise in every step (DDIM with eta 1): a path that was blocked is left
    inpainting                half of a real image of the concept is given, the model draws the other half
    half-finished image       the base model draws the first steps, this model the rest
    judge's guidance          in every step the judge's gradient pushes towards the concept (Dhariwal, Nichol, arXiv
                              2105.05233); a second judge judges, where the world has one
    latent inversion          the noise from which the model draws a given image of the concept (DDIM inversion; Song et
                              al., arXiv 2010.02502)
    harmless fine-tuning      a few steps on images of everything else

All of them bring something back from any model, since what they give is half the way. So a figure means nothing by
itself: `probe_table` puts it between the same figure of an oracle (the floor) and of the base model (the ceiling). All
images are drawn with DDIM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fmn_nb.attacks.attack import NO_IMAGES, Attack
from fmn_nb.attacks.relearning import RelearningBudget, harmless_tuning
from fmn_nb.concepts import Concept, NotThereError
from fmn_nb.evaluation import Drawing, MeasurementError, Session, Share, UnjudgeableError, images_at_once, share_of
from fmn_nb.models import (
    FilteredImageError,
    Noising,
    ReferenceImageError,
    SeedOffset,
    UnsupportedPipelineError,
    borrowed,
    conditions,
    denoiser,
    encode,
    generate,
    predict,
    seeded,
    training_kind,
)
from fmn_nb.patches import Patch

BEGUN = 0.25  # share of a half-finished image's steps that the base model draws
PUSH = 0.3  # strength of the judge's guidance, in units of the remaining noise
TUNING = RelearningBudget(at=(20,))
HALF_FINISHED = "half-finished image"
FLOOR, CEILING = "oracle", "base model"


@dataclass(frozen=True)
class Probed:
    """What a probe works on.

    Attributes:
        session, patch: the model that is probed; while a probe runs, its pipe carries the patch and draws with DDIM.
        base: the base model, without a patch.
        asked: the drawings whose images are judged; while a probe runs, as many as the session draws at once.
        first, count: the place of the first of them among all that are judged, and how many these are; None for no
            others.
    """

    session: Session
    patch: Patch | None
    base: Session
    concept: Concept
    asked: Sequence[Drawing]
    seed: int
    first: int = 0
    count: int | None = None
    begun: Tensor | None = None  # what the base model began, for half-finished images

    @property
    def pipe(self) -> DiffusionPipeline:
        """The model's pipeline."""
        return self.session.pipe

    @property
    def prompts(self) -> list[str]:
        """The drawings' prompts."""
        return [drawing.prompt for drawing in self.asked]

    def parts(self) -> Iterator[Probed]:
        """What is drawn at once, one after the other."""
        for start in range(0, len(self.asked), size := self.session.sampling.batch or images_at_once(self.pipe)):
            some = slice(start, start + size)
            yield replace(self, asked=self.asked[some], first=start, count=len(self.asked),
                          begun=None if self.begun is None else self.begun[some])

    def draw(self, pipe: DiffusionPipeline | None = None, **options: Any) -> list[Image.Image]:
        """The drawings, in one batch; `options` go to the pipeline."""
        sampling = self.session.sampling
        return generate(pipe or self.pipe, self.prompts, [drawing.seed for drawing in self.asked],
                        **{"steps": sampling.steps, "guidance": sampling.guidance, "batch": len(self.asked), **options})

    @property
    def last_begun(self) -> int:
        """The number, from 0, of the last step of a half-finished image that the base model draws."""
        return max(1, round(BEGUN * self.session.sampling.steps)) - 1

    def scenes(self) -> list[Image.Image]:
        """Real images of the concept, one for each drawing."""
        real = self.session.references(self.concept, None, self.count or len(self.asked), self.seed)
        return real[self.first:self.first + len(self.asked)]


def probe(pipe: DiffusionPipeline | Session, concept: Concept, patch: Patch | None, name: str, *,
          base: DiffusionPipeline | Session | None = None, images: int = 12, seed: int = 0) -> Attack:
    """One probe of `PROBES` on the model with the patch; what can't be done is `skipped`, with the reason.

    Args:
        base: the base model, if `pipe` is another one (an oracle); it begins the half-finished images.

    Raises:
        MeasurementError: an unknown probe, or no judge.
    """
    return _probe(_probed(Session.of(pipe), concept, patch, base, images, seed), name)


def _probed(session: Session, concept: Concept, patch: Patch | None, base: DiffusionPipeline | Session | None,
            images: int, seed: int) -> Probed:
    session.judge_now(concept)  # before anything is drawn
    asked = session.fresh_drawings(concept, images, seed)
    return Probed(session, patch, session if base is None else Session.of(base), concept, asked, seed)


def _probe(probed: Probed, name: str, plain: Share | None = None) -> Attack:
    """One probe; `plain` is the share that the prompt alone reaches, if known."""
    if name not in PROBES:
        raise MeasurementError(f"there is no probe {name!r}; there are {', '.join(PROBES)}")
    started = perf_counter()
    try:
        if name == HALF_FINISHED:
            probed = replace(probed, begun=begun_by(probed))
        with probed.session.patched(probed.patch), with_ddim(probed.pipe):
            plain = plain or share_of(pd.concat([part.session.shows(part.concept, part.asked, part.draw())
                                                 for part in probed.parts()]))
            seen, found = zip(*(PROBES[name](part) for part in probed.parts()), strict=True)
    except NOT_PROBED as error:
        return Attack(name, 0, 0, NO_IMAGES, 0, perf_counter() - started, {}, str(error))
    hits = pd.concat(seen)
    told = {key: sum(one[key] for one in found) / len(found) if isinstance(value, float) else value
            for key, value in found[0].items()}  # what was measured as a mean over the parts
    return Attack(name, int(hits.sum()), len(hits), plain, told.get("steps", 0), perf_counter() - started, told)


def probe_table(pipe: DiffusionPipeline | Session, concept: Concept, patches: Mapping[str, Patch], *,
                oracle: DiffusionPipeline | Session | None = None, probes: Sequence[str] = (), images: int = 12,
                seed: int = 0) -> tuple[pd.DataFrame, dict[str, str]]:
    """The share of images with the concept for each probe (rows), for the oracle, each patch and the base model.

    The first row is the prompt alone. Without an oracle, its column is absent. Also returns why a cell is empty, by
    "probe, model".

    Args:
        probes: some of `PROBES`; all by default.
    """
    session = Session.of(pipe)
    models = {} if oracle is None else {FLOOR: (replace(session, pipe=_pipe(oracle)), None)}
    models |= {name: (session, patch) for name, patch in patches.items()} | {CEILING: (session, None)}
    table, reasons = {}, {}
    for model, (own, patch) in models.items():
        probed, plain, cells = _probed(own, concept, patch, session, images, seed), None, {}
        for name in probes or PROBES:
            attack = _probe(probed, name, plain)
            if attack.skipped:
                reasons[f"{name}, {model}"] = attack.skipped
                continue
            plain = attack.before
            cells |= {"the prompt alone": plain.value, name: attack.after.value}
        table[model] = cells
    return pd.DataFrame(table).rename_axis("probe").astype(float), reasons


def _pipe(model: DiffusionPipeline | Session) -> DiffusionPipeline:
    return model.pipe if isinstance(model, Session) else model


class NotProbedError(ValueError):
    """The probe can't be made on this model or with this judge."""


NOT_PROBED = (UnsupportedPipelineError, ReferenceImageError, FilteredImageError, UnjudgeableError, NotThereError,
              NotProbedError, MeasurementError)  # why a cell of the table is empty


@contextmanager
def with_ddim(pipe: DiffusionPipeline) -> Iterator[None]:
    """While open, the pipeline draws with DDIM.

    Raises:
        UnsupportedPipelineError: a flow model, which has no such steps, a model whose noise schedule is unknown, or a
            pipeline that doesn't show its steps.
    """
    if Noising(pipe).is_flow or "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedPipelineError(f"the probes draw with DDIM and look at each step, which {type(pipe).__name__} "
                                       "with this scheduler doesn't allow")
    with borrowed(pipe):
        pipe.scheduler = _scheduler(DDIMScheduler, pipe, set_alpha_to_one=False)
        yield


def _scheduler(kind: type, pipe: DiffusionPipeline, **settings: Any) -> Any:
    """A scheduler of this kind, with the pipeline's noise schedule."""
    known = inspect.signature(kind.__init__).parameters
    said = {name: value for name, value in pipe.scheduler.config.items() if name in known}
    return kind(**{**said, "clip_sample": False, "timestep_spacing": "leading", **settings})


# ---- the probes: what is drawn, judged, and what to tell of it -------------------------------------------------------

Seen = tuple[pd.Series, dict[str, Any]]


def noise_on_the_way(probed: Probed) -> Seen:
    """Fresh noise in every step."""
    return probed.session.shows(probed.concept, probed.asked, probed.draw(eta=1.0)), {"eta": 1.0}


def inpainting(probed: Probed) -> Seen:
    """The left half of each real image is given, noised to each step's level (Lugmayr et al., arXiv 2201.09865)."""
    latents = encode(probed.pipe, probed.scenes()).mean
    every = (probed.first + len(latents), *latents.shape[1:])  # all up to these, so that no two parts share noise
    noise = torch.randn(every, generator=seeded(probed.seed, SeedOffset.ATTACK_IMAGES))[probed.first:]
    known = torch.arange(latents.shape[-1]) < latents.shape[-1] // 2  # [width]

    def given(pipe: DiffusionPipeline, step: int, time: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        times, there = pipe.scheduler.timesteps, latents
        if step + 1 < len(times):
            there = pipe.scheduler.add_noise(latents, noise, times[step + 1].cpu().expand(len(latents)))
        return {"latents": torch.where(known.to(now["latents"].device), there.to(now["latents"]), now["latents"])}

    drawn = probed.draw(callback_on_step_end=given)
    return probed.session.shows(probed.concept, probed.asked, drawn), {"given": 0.5}


def half_finished(probed: Probed) -> Seen:
    """The base model draws the first quarter of the steps, the probed model the rest, from the same seeds."""
    def take(pipe: DiffusionPipeline, step: int, time: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != probed.last_begun:
            return {}
        if probed.begun.shape != now["latents"].shape:
            raise NotProbedError("the base model's latents have another shape than this model's")
        return {"latents": probed.begun.to(now["latents"])}

    drawn = probed.draw(callback_on_step_end=take)
    return probed.session.shows(probed.concept, probed.asked, drawn), {"begun": BEGUN}


def begun_by(probed: Probed) -> Tensor:
    """The base model's noisy latents after its steps of a half-finished image."""
    kept = []

    def keep(pipe: DiffusionPipeline, step: int, time: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == probed.last_begun:
            kept.append(now["latents"].clone())
        return {}

    with with_ddim(probed.base.pipe):
        for part in probed.parts():
            part.draw(probed.base.pipe, callback_on_step_end=keep)
    return torch.cat(kept)


def judges_guidance(probed: Probed) -> Seen:
    """Each step's latents move along the gradient of the judge's log probability of the concept.

    The gradient is taken at the denoiser's prediction of the finished image, with its noise prediction held fixed.
    """
    judge, pipe = probed.session.judge_now(probed.concept), probed.pipe
    wanted = concept_logit(judge, probed.concept, probed.session)
    given, model, index = conditions(pipe, probed.prompts), denoiser(pipe), torch.arange(len(probed.asked))
    if training_kind(pipe) != "epsilon":
        raise NotProbedError("the judge's guidance is written for models that predict the noise")
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.get("shift_factor") or 0.0

    def push(pipe: DiffusionPipeline, step: int, time: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        times, latents = pipe.scheduler.timesteps, now["latents"]
        if step + 1 >= len(times):
            return {}
        share = float(pipe.scheduler.alphas_cumprod[times[step + 1]])
        with torch.no_grad():
            noise = predict(model, latents, times[step + 1].cpu().expand(len(latents)), given, index)
        clean = ((latents - (1 - share) ** 0.5 * noise) / share**0.5).detach()
        with torch.enable_grad():
            clean.requires_grad_()
            pixels = pipe.vae.decode((clean / scale + shift).to(pipe.vae.dtype), return_dict=False)[0]
            (gradient,) = torch.autograd.grad(wanted(pixels).sum(), clean)
        gradient = gradient.float()  # half precision would lose its square
        size = gradient.flatten(1).square().mean(1).sqrt().clamp_min(1e-12).reshape(-1, 1, 1, 1)
        return {"latents": latents + PUSH * (1 - share) ** 0.5 * (gradient / size).to(latents)}

    drawn = probed.draw(callback_on_step_end=push)
    other = getattr(probed.session.world, "second_judge", None) if probed.session.judge is None else None
    return probed.session.shows(probed.concept, probed.asked, drawn, other), {
        "push": PUSH, "judged_by": "the second judge" if other is not None else "the same judge"}


def concept_logit(judge: Any, concept: Concept, session: Session) -> Callable[[Tensor], Tensor]:
    """A function of pixels [images, 3, height, width] in [-1, 1]: the log probability [images] of the concept.

    Raises:
        NotProbedError: the judge isn't a network with such an output, as the emoji world's is.
    """
    names = getattr(getattr(judge, "config", None), "styles" if concept.kind == "style" else "labels", ())
    label = concept.name if concept.kind == "style" else session.vocabulary.target_label(concept)
    if not isinstance(judge, nn.Module) or label not in names:
        raise NotProbedError("the judge gives no gradient: it isn't a network with labels and styles")
    place, device = list(names).index(label), next(judge.parameters()).device

    def wanted(pixels: Tensor) -> Tensor:
        sized = F.interpolate(pixels.float(), (judge.config.image_size,) * 2, mode="bilinear", align_corners=False)
        labels, styles = judge(sized.to(device))
        return styles.log_softmax(1)[:, place] if concept.kind == "style" else F.logsigmoid(labels[:, place])

    return wanted


def latent_inversion(probed: Probed) -> Seen:
    """From real images back to the noise from which the model draws them, and forward again; no guidance."""
    pipe, latents = probed.pipe, encode(probed.pipe, probed.scenes()).mean
    options = {"guidance": 1.0, "latents": latents.to(pipe.device, denoiser(pipe).dtype)}
    forward = pipe.scheduler
    pipe.scheduler = _scheduler(DDIMInverseScheduler, pipe)
    try:
        noise = torch.stack(list(probed.draw(**options, output_type="latent")))
    finally:
        pipe.scheduler = forward
    drawn = probed.draw(**options | {"latents": noise})
    return probed.session.shows(probed.concept, probed.asked, drawn), {
        "mean_square_of_the_noise": round(float(noise.float().square().mean()), 4)}  # 1 where it is like any noise


def harmless(probed: Probed) -> Seen:
    """Fine-tuned on images of everything else, which should teach the model nothing of the concept."""
    with harmless_tuning(probed.session, probed.concept, TUNING, probed.seed) as steps:
        drawn = probed.draw()
    return probed.session.shows(probed.concept, probed.asked, drawn), {"steps": steps}


PROBES: dict[str, Callable[[Probed], Seen]] = {
    "noise on the way": noise_on_the_way, "inpainting": inpainting, HALF_FINISHED: half_finished,
    "judge's guidance": judges_guidance, "latent inversion": latent_inversion, "harmless fine-tuning": harmless}
