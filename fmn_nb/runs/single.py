"""One patch and one score, without notebooks: what `fmn-nb forget` and `fmn-nb evaluate` do.

Results of one command never replace another's: each file says what was asked for, and a folder whose file says
something else is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from fmn_nb.files import parse_yaml, read_json, versions, write_json
from fmn_nb.forgetting.settings import SettingsError, settings_for
from fmn_nb.runs.folder import RunFolder, alone_in
from fmn_nb.runs.metrics import plain, validate
from fmn_nb.runs.plan import Plan, RequestError, check_settings
from fmn_nb.runs.stopping import telling

if TYPE_CHECKING:
    from fmn_nb.evaluation import Report
    from fmn_nb.patches import Patch

PATCHES = Path("runs/patches")
CHECKPOINT = ".checkpoint"  # in a patch's folder while it is made
NOT_STATED = "none stated"  # the preset of a patch that others made


def single_setting(text: str) -> tuple[str, Any]:
    """("learning_rate", 0.001) of "learning_rate=1e-3", whose value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise SettingsError(f"a setting is given as name=value, not '{text}'")
    return name.strip(), parse_yaml(value, f"'{text}'")


@dataclass(frozen=True)
class PatchRequest:
    """What `fmn-nb forget` is asked for, checked; `settings` are those that replace the preset's.

    Raises:
        ValueError: one that `check_settings` or `settings_for` raises, before any heavy work.
    """

    concept: str
    kind: str | None = None
    model: str = "emoji"
    preset: str = "balanced"
    seed: int = 0
    towards: str | None = None
    references: str | None = None
    settings: Mapping[str, Any] | None = None
    config: str | None = None  # of a single file: the folder with its configuration and tokenizer

    @classmethod
    def checked(cls, texts: Sequence[str] = (), references: Path | None = None, towards: str | None = None,
                config: Path | None = None, **request: Any) -> PatchRequest:
        """The request of a command line; `texts` are single settings, "name=value"."""
        settings = dict(single_setting(text) for text in texts)
        request = check_settings(request, config)
        settings_for(request["preset"], settings)
        places = {name: None if place is None else str(place.expanduser().resolve())
                  for name, place in (("references", references), ("config", config))}
        return cls(**request, towards=towards, settings=settings, **places)

    def stated(self) -> dict[str, Any]:
        """The request as `fmn.json` states it."""
        said = {name: value for name, value in vars(self).items() if name != "config" or value is not None}
        return json.loads(json.dumps(said))

    @property
    def folder(self) -> Path:
        """Where the patch goes by default."""
        return PATCHES / Plan(self.stated(), {}, Path()).name


def make_patch(request: PatchRequest, out: Path, again: bool = False) -> Patch:
    """Forget, and save the patch to `out`; killed and started again, it continues from its last checkpoint. One command
    at a time works in a folder.

    Args:
        again: replace whatever patch is there.

    Raises:
        RequestError: another command's patch is there, or another command is making one.
    """
    from fmn_nb.patches.files import INFO_FILE, TENSOR_FILES

    _check_folder(out)
    busy = RequestError(f"another command is making a patch in {out}; wait for it, or give another --out")
    with alone_in(out, busy):
        _check_free(out, (INFO_FILE, *TENSOR_FILES.values()), request.stated(), again)
        if again:
            shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
        patch = _forgotten(request, out / CHECKPOINT)
        patch.save(out)
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    return patch


def _forgotten(request: PatchRequest, checkpoint: Path) -> Patch:
    """The patch, which says what was asked for."""
    from fmn_nb.concepts import Concept
    from fmn_nb.forgetting import forget, suited
    from fmn_nb.models import load

    pipe = load(request.model, config=request.config)
    pipe.set_progress_bar_config(disable=True)
    said = f"the same command continues from {checkpoint}"
    with telling(lambda: said if any(checkpoint.rglob("checkpoint-*.safetensors")) else ""):
        patch = forget(pipe, Concept(request.concept, kind=request.kind), preset=request.preset, seed=request.seed,
                       references=request.references, towards=request.towards, checkpoint=checkpoint,
                       **{**suited(pipe, request.preset), **(request.settings or {})})
    return replace(patch, info={**patch.info, "request": request.stated()})


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; give a folder")


def _check_free(out: Path, files: Sequence[str], request: Any, again: bool) -> None:
    """Raise a RequestError if one of `files` is in `out` and the first doesn't say that it was for `request`."""
    _check_folder(out)
    there = [name for name in files if (out / name).exists()]
    if not there or again:
        return
    try:
        said = read_json(out / files[0])
        same = isinstance(said, dict) and said.get("request") == request
    except (OSError, ValueError):
        same = False
    if not same:
        raise RequestError(f"{out / there[0]} is another command's; give another --out, or --again to replace it")


def told(patch: Patch, request: PatchRequest, out: Path) -> str:
    """Where a patch is, its facts, and how to use it."""
    facts = patch.report
    model = "" if request.model == "emoji" else f" --model {quote(request.model)}"
    model += "" if request.config is None else f" --config {quote(request.config)}"
    plain_diffusers = (f'pipe.load_lora_weights("{out}")   # in plain diffusers' if patch.kind == "lora" else
                       f'fmn.Patch.load("{out}").low_rank(16).save(FOLDER)   # a LoRA for plain diffusers')
    return "\n".join([
        f"patch: {out}",
        f"{patch.kind}, {facts['steps']} steps in {facts['seconds']:.1f} s, {patch.nbytes:,} bytes "
        f"({facts['stopped_because']})",
        "use it:",
        f"  fmn-nb evaluate {quote(str(out))} --concept {quote(request.concept)} --kind {request.kind}{model}",
        f'  with fmn.Patch.load("{out}").applied(pipe): ...',
        f"  {plain_diffusers}",
    ])


def score(what: Path, request: Mapping[str, Any], out: Path | None = None, again: bool = False,
          config: Path | None = None, **options: Any) -> Report:
    """Measure whatever is in `what` (see `read_patch`) and, with `out`, leave metrics.json and the judge's verdicts.

    Args:
        request: model, concept, kind and seed.
        config: of a single file, as the model or in `what`: the folder with its configuration and tokenizer.
        options: of `evaluate`.

    Raises:
        RequestError: another command's metrics are in `out`.
        ValueError: the request is wrong, or `what` isn't recognised.
    """
    settings = check_settings(request, config)
    given = {name: str(value) for name, value in {**options, "config": config}.items() if value is not None}
    asked = {"what": str(what.expanduser().resolve()), **settings, **given}
    if out is not None:
        _check_free(out, (RunFolder.METRICS,), asked, again)

    from tqdm import tqdm

    from fmn_nb.concepts import Concept
    from fmn_nb.evaluation import evaluate
    from fmn_nb.models import load
    from fmn_nb.patches import read_patch

    pipe = load(settings["model"], config=config)
    pipe.set_progress_bar_config(disable=True)
    patch = read_patch(what, pipe, config)
    with patch.applied(pipe):  # a patch that doesn't fit is refused before anything is drawn
        pass
    concept = Concept(settings["concept"], kind=settings["kind"])
    with tqdm(desc="drawing", unit="image", leave=False, disable=None) as bar:  # None: unless it is a terminal

        def drawn(count: int, of: int) -> None:
            bar.total, bar.n = of, count
            bar.refresh()

        report = evaluate(pipe, concept, patch=patch, seed=settings["seed"], progress=drawn, **options)
    if out is not None:
        made = patch.report if {"steps", "seconds", "stopped_because"} <= patch.report.keys() else None
        metrics = {"schema": 1, "model": settings["model"], "concept": {"name": concept.name, "kind": concept.kind},
                   "preset": patch.info.get("preset") or NOT_STATED, "seed": settings["seed"], "versions": versions(),
                   **({"forgetting": made} if made else
                      {"skipped": {"forgetting": "the patch doesn't say how it was made"}}),
                   **report.to_metrics(), "request": asked}
        metrics = plain(metrics, RunFolder.METRICS)
        validate(metrics)
        write_json(out / RunFolder.METRICS, metrics)
        if len(report.outcomes):
            report.save(out)
    return report


def shown(report: Report) -> str:
    """A report as text: its table, its probes, and what could not be measured."""
    parts = [report.table().to_string()]
    if len(probes := report.probes()):
        parts.append(probes.drop(columns="meaning").to_string())
    parts += [f"not measured, {when} {name}: {why}" for (when, name), why in report.skipped().items()]
    return "\n\n".join(parts)
