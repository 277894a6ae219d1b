"""Forget-Me-Not: make a text-to-image model forget a concept by fine-tuning some of its weights.

    patch = forget(pipe, Concept("cat"), preset="balanced", seed=0)         # pipe itself stays as it is

Each step noises reference images of the concept to random timesteps, runs the denoiser on prompts that name it, and
moves the trained weights as the method's objective asks: for "fmn", so that the concept's text columns get less
attention (`methods/fmn.py`; Zhang, Wang, Xu, Wang, Shi, arXiv 2303.17591). An anchor can pull the prediction to what it
would be without the concept, and a retain term holds the rest in place: on other prompts, the model should predict what
it did before (`terms`). The training sets are in `data`, the trained weights in `weights`, all numbers in `settings`.

A closed form ("uce") takes no steps: it solves for the weights. "mace" does both, concept by concept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from fmn_nb.concepts import Concept
from fmn_nb.files import versions
from fmn_nb.forgetting.data import Task, TrainingSet, by_concept, training_sets
from fmn_nb.forgetting.methods import method_of
from fmn_nb.forgetting.methods.uce import weighing_of
from fmn_nb.forgetting.prompts import retain_prompts
from fmn_nb.forgetting.request import (
    check_closed_form,
    check_known,
    check_layers,
    check_rank,
    check_sources,
    concepts_of,
    folder_of,
)
from fmn_nb.forgetting.settings import Settings, SettingsError, settings_for
from fmn_nb.forgetting.state import Checkpoint, CheckpointError, State, identity
from fmn_nb.forgetting.terms import Terms
from fmn_nb.forgetting.weights import Trainable, check_stays, check_unfused, offloaded, precision_for, trainable
from fmn_nb.models.denoising import Noising, Stream, seeded
from fmn_nb.models.device import Memory, MixedPrecision, evaluating, gradient_checkpointing
from fmn_nb.models.digests import base_of
from fmn_nb.models.images import Images, load_all, load_masks
from fmn_nb.models.parameters import plain_name
from fmn_nb.models.pipelines import denoiser
from fmn_nb.patches import Patch, applied_patches, combine
from fmn_nb.patches.least_squares import Fusion

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, as published
FUSED_ON = ("cpu", "cuda")  # device types on which AdamW takes a step in one pass over a weight
_MASS_FELL = "the concept's attention mass fell"
_MASS_STEPS = 5  # the concept's mass jumps with the timestep; early stopping looks at a mean over this many steps
_NO_CHECKPOINT = "there is no checkpoint (give forget a folder: checkpoint=...)"


class ForgettingError(RuntimeError):
    """The fine-tune can't continue; the message says why and where the last good state is."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.

    Attributes:
        step: the number of steps done, from 1, out of `steps`.
        loss: the method's objective in this step, before its weight.
        mass: the share of attention that the concept got in this step, in [0, 1].
        retain: the retain term before its weight, or None without one.
        make_patch: makes the complete patch as trained so far, to save or apply.
    """

    step: int
    steps: int
    loss: float
    mass: float
    retain: float | None
    make_patch: Callable[[], Patch]


Callback = Callable[[Progress], str | None]


def forget(pipe: DiffusionPipeline, concepts: Concept | str | Sequence[Concept | str], *,
           references: Images | Mapping[str, Images] | None = None, preset: str | Settings = "balanced", seed: int = 0,
           callback: Callback | None = None, checkpoint: str | Path | None = None,
           prompts: Sequence[str] | None = None, retain_prompts: Sequence[str] | None = None,
           towards: str | Mapping[str, str] | None = None, masks: Images | None = None,
           cache: str | Path | None = None, **overrides: Any) -> Patch:
    """Make a patch that forgets the concepts, with a preset's method; the pipeline stays as it is.

    A progress bar shows only if the error stream is a terminal. In a notebook, a `callback` reports the progress, and
    afterwards the lists in the patch's `info["forgetting"]` are the curves.

    Args:
        pipe: a diffusers pipeline; its weights, modes and scheduler are the same afterwards, bit for bit, also
            when this raises.
        concepts: one or several, as `Concept` or, for objects, by name.
        references: reference images: a folder, a list of files or PIL images; for several concepts a mapping from
            a concept's name to them. Concepts without any get images that the model generates.
        preset: a name in `PRESETS`, or settings of your own.
        seed: the seed of everything random; the same seed gives the same patch on the same machine.
        callback: called after each step (a closed form has none) with a `Progress`; while it runs, `pipe` is as
            trained so far. If it returns a text, the fine-tune ends for that reason (`periodic_judge` makes a callback
            that asks a judge).
        checkpoint: a folder to save the state to. A run that finds its own state there continues from it and ends in
            the same patch as one that never stopped. Its own means: the same settings, images, prompts, weights and
            tokens; a state past the steps asked for is refused. Without a `cache`, the folder also keeps what the model
            draws. Of "mace", each concept has a folder in it, numbered from 0; of "adversarial", each round, and the
            last erasure ("last").
        prompts: prompts to learn from instead of those of the setting `wording`; each must hold the (single) concept's
            phrase.
        retain_prompts: prompts whose images should stay as they are; those that name a concept are left out. By
            default the prompts of the bundled model's world, or `data/prompts/neutral.txt`.
        towards: correction of an ambiguous word: the name of the reading to show instead, "computer mouse" for the
            concept "mouse"; for several concepts a mapping from names to readings. It acts through `anchor_weight`,
            `towards_weight` and the method "redirect": without any of them (as in "paper"), the concept is merely
            forgotten.
        masks: one picture for each reference image, white where the concept is: attention counts only there.
        cache: a folder that keeps the images that the model draws (as latents), so that another fine-tune doesn't draw
            the same ones again. Several processes can share it; the patch is the same with and without. An image takes
            4 bytes per latent value: 8 KB for the emoji model, 64 KB for 512 x 512 pixels of Stable Diffusion.
        overrides: single settings, see `Settings`.

    Returns:
        A patch; `patch.info["forgetting"]` holds steps, seconds, loss_first, loss_last, stopped_because,
        trainable_parameters, patch_bytes, peak_memory_bytes, and for every step losses, masses (the concept's share of
        attention) and the other terms.

    Raises:
        SettingsError, PhraseNotFoundError, ReferenceImageError, CheckpointError: before anything is trained.
        UnknownConceptError: a name that the models of the pipeline's world never learned, if no `prompts` are given.
        UnsupportedPipelineError: a pipeline or scheduler of a model that can't be trained here, or a closed form for a
            model without keys and values of the text alone.
        ForgettingError: the loss became NaN or infinite, or nothing can be trained.
    """
    started, settings = perf_counter(), settings_for(preset, overrides)
    named = concepts_of(concepts)
    if callback is not None and not callable(callback):
        raise SettingsError(f"callback is a function of a Progress, not {callback!r}")
    checkpoint, cache = folder_of("checkpoint", checkpoint), folder_of("cache", cache)
    sources = by_concept(references, named, "references")
    gone = [Concept(**one) for patch, _ in applied_patches(pipe) for one in patch.info.get("concepts", ())]
    task = Task(pipe, named, settings, seed, prompts=prompts, retain_prompts=retain_prompts,
                readings=by_concept(towards, named, "towards"), gone=gone)
    if prompts is None:
        check_known(pipe, named)
    method = method_of(settings.method)
    check_unfused(denoiser(pipe))
    check_stays(denoiser(pipe))
    if hasattr(method, "edit"):
        check_closed_form(pipe, settings)
    if hasattr(method, "objective"):
        check_rank(pipe, settings)
        check_layers(pipe, settings)
        first = next(denoiser(pipe).parameters())
        precision_for(settings, first.device, first.dtype)  # raises before anything is generated, as does the next
        Noising(pipe)
    # Once and first: unreadable images are reported before anything is generated.
    task = replace(task, references=load_all(sources), masks=None if masks is None else load_masks(masks))
    check_sources(task)
    task = task.with_scenes()
    info = _info(task, preset if isinstance(preset, str) else "own settings")
    if not hasattr(method, "objective"):
        return _solved(task, info, started)
    work = _Work(checkpoint, cache, callback, started)
    if hasattr(method, "findings"):
        return _hardened(task, info, work)
    return _edited_and_trained(task, info, work) if hasattr(method, "edit") else _trained(task, info, work)


# ---- the four ways to a patch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Where and how a fine-tune runs, as `forget` was asked."""

    checkpoint: Path | None
    cache: Path | None
    callback: Callback | None
    started: float


def _trained(task: Task, info: Mapping[str, Any], work: _Work, edit: Patch | None = None,
             sets: Mapping[str, TrainingSet] | None = None) -> Patch:
    """The patch of the shared fine-tune; with an `edit`, the model carries it, except while it draws.

    `sets` replace the training sets of the task."""
    pipe, settings = task.pipe, task.settings
    saved = Checkpoint(work.checkpoint, identity(task, info["base"]["fingerprint"])) if work.checkpoint else None
    sets = sets or training_sets(replace(task, cache=work.cache or work.checkpoint))
    if saved:
        saved.begin()
    with ExitStack() as borrowed:
        if edit is not None:
            borrowed.enter_context(edit.applied(pipe))
        complete = borrowed.enter_context(offloaded(pipe, settings.offload))
        weights = borrowed.enter_context(trainable(denoiser(pipe), settings, seeded(task.seed, Stream.LORA)))
        run = Finetune(task, weights, sets, info, saved, work.started)

        def tell(progress: Progress) -> str | None:
            with complete():
                return work.callback(progress)

        run.train(tell if work.callback else None)
        return run.patch()


def _solved(task: Task, info: Mapping[str, Any], started: float) -> Patch:
    """The patch of a closed form. Its report has no steps; its losses say what was missed before and after the edit."""
    memory = Memory(next(denoiser(task.pipe).parameters()).device)
    edit = method_of(task.settings.method).edit(task)
    memory.note()
    return Patch(edit.kind, edit.tensors, {**info, "forgetting": {
        "steps": 0, "seconds": round(perf_counter() - started, 3), "loss_first": edit.before, "loss_last": edit.after,
        "stopped_because": "solved in closed form", "trainable_parameters": 0,
        "patch_bytes": sum(tensor.nbytes for tensor in edit.tensors.values()), "peak_memory_bytes": memory.peak,
        "losses": [edit.before, edit.after], "masses": [], "retain": []}})


def _edited_and_trained(task: Task, info: Mapping[str, Any], work: _Work) -> Patch:
    """One fused patch: each concept's edit, and what is trained on the model that carries this edit.

    Each concept has a fine-tune of its own, and a folder of its own below `checkpoint`.
    """
    method, pipe, parts, reports = method_of(task.settings.method), task.pipe, [], []
    kept = retain_prompts(pipe, task.concepts, task.retain_prompts, task.readings.values())
    fusion = Fusion.of(pipe, [task.prompts_of(concept) for concept in task.concepts],
                       [*kept, ""] if task.settings.retains else [], weighing_of(task.settings))
    for number, concept in enumerate(task.concepts):
        own = task.alone(concept)
        found = method.edit(own)
        edit = Patch(found.kind, found.tensors, dict(info))

        def whole(patch: Patch, edit: Patch = edit) -> Patch:
            return fusion([*parts, combine([edit, patch])])

        def tell(progress: Progress, whole: Callable[[Patch], Patch] = whole) -> str | None:
            return work.callback(replace(progress, make_patch=lambda: replace(
                whole(trained := progress.make_patch()), info=trained.info)))

        patch = _trained(own, info, replace(
            work, checkpoint=work.checkpoint and work.checkpoint / str(number), cache=work.cache or work.checkpoint,
            callback=work.callback and tell), edit)
        parts.append(combine([edit, patch]))
        reports.append(patch.info["forgetting"])
    fused = fusion(parts)
    return replace(fused, info={**info, "forgetting": {
        **joined(reports), "seconds": round(perf_counter() - work.started, 3), "patch_bytes": fused.nbytes}})


def _hardened(task: Task, info: Mapping[str, Any], work: _Work) -> Patch:
    """The patch of the method "adversarial": rounds of a short erasure and of probes, then one erasure with all finds.

    The callback hears only of the last erasure. Each erasure has a folder of its own below `checkpoint`.
    """
    method, settings, finds, spent = method_of(task.settings.method), task.settings, [], []
    sets = training_sets(replace(task, cache=work.cache or work.checkpoint))
    retain = sets.get("retain")
    short = replace(task, settings=settings.model_copy(update={"steps": settings.round_steps}))

    def below(name: str, callback: Callback | None = None) -> _Work:
        return replace(work, checkpoint=work.checkpoint and work.checkpoint / name, callback=callback)

    for number in range(settings.rounds):
        began = perf_counter()
        patch = _trained(short, info, below(str(number)), sets=sets | {
            "forget": method.with_finds(sets["forget"], finds)})
        finds += method.findings(task, patch, sets["forget"], number)
        if retain is not None:
            sets = sets | {"retain": method.with_hurt_pairs(task, patch, retain)}
        spent.append(round(perf_counter() - began, 3))
    last = _trained(task, info, below("last", work.callback), sets=sets | {
        "forget": method.with_finds(sets["forget"], finds)})
    said = {**last.info["forgetting"], "rounds": settings.rounds, "finds": len(finds), "round_seconds": spent}
    return replace(last, info={**last.info, "forgetting": said})


def joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several successive fine-tunes: numbers are summed, lists joined."""
    joined = dict(reports[0])
    for report in reports[1:]:
        for name, value in report.items():
            if isinstance(value, list) or name in ("steps", "seconds", "trainable_parameters"):
                joined[name] = joined.get(name, type(value)()) + value
        joined["loss_last"] = report["loss_last"]
        joined["peak_memory_bytes"] = max(joined["peak_memory_bytes"], report["peak_memory_bytes"])
        if report["stopped_because"] not in joined["stopped_because"]:
            joined["stopped_because"] += f"; {report['stopped_because']}"
    return joined


def _info(task: Task, preset: str) -> dict[str, Any]:
    """What the patch will say about itself, besides the fine-tune's report."""
    pipe = task.pipe
    info = {"concepts": [asdict(concept) for concept in task.concepts], "preset": preset, "seed": task.seed,
            "settings": task.settings.to_dict(), "towards": dict(task.readings), "base": base_of(pipe),
            "versions": versions()}
    if applied_patches(pipe):
        info["on_top_of"] = [patch.info.get("concepts", []) for patch, _ in applied_patches(pipe)]
    return info


class Finetune:
    """One fine-tune. `train` runs it, `patch` returns its result.

    Args:
        info: what the patch's `info` says besides the report.
        saved: where to keep the state, or None.
        started: `time.perf_counter()` when the work began.
    """

    def __init__(self, task: Task, weights: Trainable, sets: Mapping[str, TrainingSet], info: Mapping[str, Any],
                 saved: Checkpoint | None, started: float) -> None:
        if not weights.parameters:
            raise ForgettingError("there is nothing to train: no weight matches the settings")
        self.model, self.weights, self.settings, self.info = denoiser(task.pipe), weights, task.settings, info
        self.saved, self.started = saved, started
        name, first = next(self.model.named_parameters())
        own = weights.originals.get(plain_name(name), first)  # a float32 copy may stand in its place: tells no dtype
        self.precision = MixedPrecision(precision_for(self.settings, first.device, own.dtype), first.device)
        self.memory = Memory(first.device)
        self.terms = Terms(task, weights, sets, self.precision, self.memory)
        self.parameters = list(weights.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.learning_rate, betas=BETAS, eps=EPSILON,
            weight_decay=self.settings.weight_decay, fused=first.device.type in FUSED_ON)
        self.schedule = get_scheduler(self.settings.schedule, self.optimizer, num_warmup_steps=self.settings.warmup,
                                      num_training_steps=self.settings.steps)
        self.measured: dict[str, list[float]] = {"losses": [], "masses": [], "retain": []}
        self.step, self.stopped_because, self.asked_to_stop = 0, "", False

    def train(self, callback: Callback | None = None) -> None:
        """Take all steps, or as many as needed, starting from the checkpoint's state if there is one."""
        self._resume()
        if self.asked_to_stop:  # by a callback, which may be another one now, or none
            self.stopped_because = self._heard(callback)
        bar = tqdm(total=self.settings.steps, initial=self.step, desc="forgetting", leave=False,
                   disable=None)  # None: unless it is a terminal
        with (bar, torch.enable_grad(), evaluating(self.model),
              gradient_checkpointing(self.model, self.settings.gradient_checkpointing)):
            try:
                while self.step < self.settings.steps and not self.stopped_because:
                    self._one_step()
                    bar.set_postfix(loss=self.measured["losses"][-1], mass=self.measured["masses"][-1], refresh=False)
                    bar.update()
                    self._after_step(callback)
            except KeyboardInterrupt as interrupt:
                kept = self._last_good_state()
                interrupt.add_note(f"the pipeline is unchanged; {kept or _NO_CHECKPOINT}"
                                   f"{'; call forget again to continue from it' if kept else ''}")
                raise
        self.stopped_because = self.stopped_because or f"all {self.step} steps done"

    def patch(self) -> Patch:
        """What the training has changed so far, with everything known about it."""
        kind, tensors = self.weights.change()
        losses = self.measured["losses"]
        return Patch(kind, tensors, {**self.info, "forgetting": {
            "steps": self.step, "seconds": round(perf_counter() - self.started, 3),
            "loss_first": losses[0], "loss_last": losses[-1], "stopped_because": self.stopped_because or "not stopped",
            "trainable_parameters": sum(parameter.numel() for parameter in self.parameters),
            "patch_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "peak_memory_bytes": self.memory.peak, **{name: list(values) for name, values in self.measured.items()},
        }})

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        step, found = self.step + 1, self.terms.add_gradients()
        if not all(isfinite(value) for value in found.values()):
            every = ", ".join(f"{name} {value:g}" for name, value in found.items())
            raise self._broken(f"the loss became {found['losses']} in step {step} ({every})")
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            raise ForgettingError("no trained weight got a gradient: its layers don't influence the attention")
        self.precision.scaler.unscale_(self.optimizer)
        if self.settings.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        # A scaler passes over such a step by itself.
        if not self.precision.scaler.is_enabled() and not norm.isfinite():
            raise self._broken(f"the gradient became {float(norm)} in step {step}")
        self.precision.step(self.optimizer)
        self.schedule.step()
        for name, value in found.items():
            self.measured.setdefault(name, []).append(value)
        self.memory.note()
        self.step = step

    def _broken(self, what: str) -> ForgettingError:
        kept, folder = self._last_good_state(), ""
        if kept:  # the same settings lead to the same end, and others are another run
            kept += ", but continuing from it with the same settings would end here again"
            folder = " and another checkpoint folder, which starts anew"
        return ForgettingError(
            f"{what}. The pipeline is unchanged; {kept or _NO_CHECKPOINT}. Call forget with a lower learning_rate (or, "
            f"if this was half precision, with a float32 pipeline and precision='no'){folder}")

    # ---- around the steps -------------------------------------------------------------------------------------------

    def _after_step(self, callback: Callback | None) -> None:
        masses, share = self.measured["masses"], self.settings.stop_mass
        if share and len(masses) > _MASS_STEPS:
            recent = sum(masses[-_MASS_STEPS:]) / _MASS_STEPS
            if recent < share * masses[0]:
                self.stopped_because = (
                    f"{_MASS_FELL} to {recent:.4f}, under {share:g} of {masses[0]:.4f}")
        said = self._heard(callback)
        self.stopped_because = self.stopped_because or said
        at_end = self.step == self.settings.steps or bool(self.stopped_because)
        due = self.saved is not None and self.step % self.settings.checkpoint_every == 0
        if (at_end or due) and not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._broken(f"a weight became NaN or infinite in step {self.step}")
        if self.saved and (at_end or due):
            self.saved.save(self._state())

    def _heard(self, callback: Callback | None) -> str:
        """Why the callback asks for a stop, "" if it doesn't."""
        if callback is None:
            return ""
        last = {name: values[-1] for name, values in self.measured.items() if values}
        return str(callback(Progress(self.step, self.settings.steps, last["losses"], last["masses"],
                                     last.get("retain"), self.patch)) or "")

    def _last_good_state(self) -> str:
        """Where it is; empty if there is none."""
        state = self.saved.load() if self.saved else None
        return f"the last good state is step {state.step} in {self.saved.folder}" if state else ""

    # ---- state ------------------------------------------------------------------------------------------------------

    def _state(self) -> State:
        tensors = {f"weight.{name}": parameter for name, parameter in self.weights.parameters.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        tensors |= {f"random.{name}.{part}": tensor for name, shuffle in self.terms.shuffles.items()
                    for part, tensor in shuffle.state().items()}
        tensors |= {f"scaler.{name}": torch.tensor(value, dtype=torch.float64)
                    for name, value in self.precision.scaler.state_dict().items()}
        return State(self.step, self.measured, perf_counter() - self.started, tensors, self.stopped_because)

    def _resume(self) -> None:
        state = self.saved.load() if self.saved else None
        if state is None:
            return
        if state.step > self.settings.steps:
            raise CheckpointError(f"the checkpoint in {self.saved.folder} is of step {state.step}, past the "
                                  f"{self.settings.steps} asked for: ask for {state.step} or more, or use another "
                                  "folder")
        try:
            self._check(state)
            self._restore(state)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the state of step {state.step} in {self.saved.folder} is damaged ({why}); delete "
                                  "the folder to start again") from error
        with warnings.catch_warnings():  # torch misses the optimiser's steps, which were done before
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(state.step):
                self.schedule.step()
        self.step, self.measured = state.step, {name: list(values) for name, values in state.measured.items()}
        self.stopped_because, self.started = state.stopped_because, self.started - state.seconds
        self.asked_to_stop = bool(state.stopped_because) and not state.stopped_because.startswith(_MASS_FELL)


    def _check(self, state: State) -> None:
        """Raise a ValueError unless the state's tensors are those of this fine-tune."""
        weights, moments = _part(state.tensors, "weight."), _part(state.tensors, "adam.")
        if weights.keys() != self.weights.parameters.keys():
            raise ValueError("its weights aren't those that are trained")
        shapes = {f"weight.{name}": parameter.shape for name, parameter in self.weights.parameters.items()}
        for number, parameter in enumerate(self.parameters):
            names = [name for name in moments if name.startswith(f"{number}.")]
            if sorted(names) not in ([], [f"{number}.{moment}" for moment in ("exp_avg", "exp_avg_sq", "step")]):
                raise ValueError(f"some of the optimiser's moments {number} are missing")
            shapes |= {f"adam.{name}": torch.Size() if name.endswith("step") else parameter.shape for name in names}
        if not moments or len(shapes) != len(weights) + len(moments):
            raise ValueError("the optimiser's moments are missing or too many")
        for name, shape in shapes.items():
            tensor = state.tensors[name]
            if tensor.shape != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} isn't finite float32 of {tuple(shape)}")

    def _restore(self, state: State) -> None:
        """Put a state's tensors where they belong."""
        with torch.no_grad():
            for name, parameter in self.weights.parameters.items():
                parameter.copy_(state.tensors[f"weight.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(state.tensors, "adam.").items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name, shuffle in self.terms.shuffles.items():
            shuffle.restore(_part(state.tensors, f"random.{name}."))
        now, then = self.precision.scaler.state_dict(), _part(state.tensors, "scaler.")
        if now:
            self.precision.scaler.load_state_dict({name: type(now[name])(then[name].item()) for name in now})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def periodic_judge(seen: Callable[[], float], *, every: int = 10, below: float = 0.05,
                   callback: Callback | None = None) -> Callback:
    """A callback for `forget` that asks a judge from time to time, and stops once the judge hardly sees the concept.

        judge = Judge.load(folder)
        def seen():     # the pipeline is as trained so far
            found = judge.verdicts(generate(pipe, ["a photo of a cat"] * 8, range(8)))
            return sum(verdict.label == "cat" for verdict in found) / 8
        patch = forget(pipe, "cat", steps=200, callback=periodic_judge(seen, every=10, below=0.1))

    Args:
        seen: draws and judges; returns the share of images, in [0, 1], that still show the concept.
        every: steps between two questions.
        below: the share under which to stop; `stopped_because` then gives both numbers and the step.
        callback: another callback, called in every step before the judge is asked.

    Raises:
        SettingsError: `every` below 1, or `below` outside (0, 1].
        ValueError: while the fine-tune runs, if `seen` doesn't return a share.
    """
    if every < 1 or not 0 < below <= 1:
        raise SettingsError(f"a judge needs every >= 1 and 0 < below <= 1, not {every} and {below}")

    def ask(progress: Progress) -> str | None:
        said = callback(progress) if callback is not None else None
        if said or progress.step % every:
            return said
        share = float(seen())
        if not 0 <= share <= 1:
            raise ValueError(f"the judge must give a share from 0 to 1, not {share}")
        if share < below:
            return f"the judge saw the concept in {share:.3f} of the images after step {progress.step}, under {below:g}"
        return None

    return ask
