"""The command `fmn-nb`. Only click is imported at once, so `fmn-nb --help` answers fast; the rest comes when needed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from fmn_nb import __version__
from fmn_nb.concepts.concept import KINDS


class Folder(click.Path):
    """A folder's path; an empty text, as from an unset variable, is an error and doesn't mean the current folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(file_okay=False, path_type=Path, **options)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path; a usage error if it is empty."""
        if not str(value).strip():
            self.fail("it is empty; name a folder ('.' is this one)", parameter, context)
        if "://" in str(value):
            self.fail(f"{value} is a URL, and only sweeps can write to one; name a folder", parameter, context)
        return super().convert(value, parameter, context)


class Program(click.Group):
    """The command as a process of its own, which ends at once when it is stopped."""

    def __call__(self, *words: Any, **options: Any) -> Any:
        """What a shell calls."""
        try:
            return super().__call__(*words, **options)
        except SystemExit as end:
            from fmn_nb.runs.stopping import EXIT_CODE, end_at_once

            if end.code == EXIT_CODE:
                end_at_once()
            raise


CONFIG = click.option("--config", type=Folder(exists=True), help="For a single .safetensors file: a folder with its "
                      "configuration and tokenizer.  [default: what the hub has]")


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fmn-nb")
def main() -> None:
    """Forget-Me-Not Notebooks: run the course in batches, forget, evaluate, sweep, report, check, pretrain."""
    from fmn_nb.runs.notebook import without_slow_formats

    without_slow_formats()


@main.command()
@click.argument("name", metavar="[CONCEPT]", required=False)
@click.option("--model", default="emoji", show_default=True, help="Bundled name, hub id or path.")
@CONFIG
@click.option("--concept", help="What to forget; the same as CONCEPT.  [default: cat]")
@click.option("--kind", type=click.Choice(KINDS), help="[default: the concept's own]")
@click.option("--preset", default="balanced", show_default=True, help="Named settings of the fine-tune.")
@click.option("--steps", type=int, help="Fine-tuning steps.  [default: the preset's]")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed, machine and number of "
              "threads give the same result.")
@click.option("--out", type=Folder(), help="The run's folder.  [default: runs/NAME]")
@click.option("--notebooks", default="01,02,03,04", show_default=True, help="Numbers, ranges (1-4), names or paths, in "
              "order.")
@click.option("--again", is_flag=True, help="Repeat notebooks that are finished.")
@click.option("-p", "texts", multiple=True, metavar="NAME=VALUE", help="Another parameter of a notebook; repeatable.")
def run(texts: tuple[str, ...], steps: int | None, config: Path | None, name: str | None, again: bool,
        **request: Any) -> None:
    """Execute the course's notebooks on one concept.

    Leaves the executed notebooks, images/, patch/, metrics.json and report.html in the run's folder. If a run stops,
    the same command continues it.
    """
    with plain_errors():
        from fmn_nb.runs.plan import plan_run

        if name and request["concept"]:
            raise ValueError(f"the concept is given twice, as {name} and as --concept {request['concept']}")
        request["concept"] = name or request["concept"] or "cat"
        parameters = {key: value for key, value in (("steps", steps), ("config", config and str(config)))
                      if value is not None}
        plan = plan_run(parameters=parameters, texts=_pairs(texts), **request)

        from fmn_nb.runs.progress import RunProgress
        from fmn_nb.runs.runner import execute, is_finished

        if not again and is_finished(plan):
            click.echo("finished already; --again repeats it", err=True)
        with closing(RunProgress()) as progress:
            execute(plan, progress, again=again)
        click.echo(_table(plan.out))
        click.echo(f"report: {plan.out / 'report.html'}")


@main.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", help="The sweep's folder, or a URL such as s3://bucket/x.  [default: runs/NAME-OF-SPEC]")
@click.option("--workers", type=click.IntRange(1), help="Runs at a time. They share the machine's threads, so "
              "another number can change the last digits of a result.  [default: the spec's, else 1]")
@click.option("--scheduler", metavar="ADDRESS", help="An existing Dask scheduler, tcp://host:8786.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier attempt.")
def sweep(spec: Path, **options: Any) -> None:
    """Execute many runs from a YAML file of parameters.

    The file gives a grid or a list of runs. Finished runs are never repeated.
    """
    with plain_errors():
        from fmn_nb.runs.spec import plan_sweep

        planned = plan_sweep(spec, options.pop("out"))

        from fmn_nb.runs.progress import SweepProgress
        from fmn_nb.runs.sweep import run_sweep

        place, failed = run_sweep(planned, progress=SweepProgress.shown(), **options)
        click.echo(f"results: {place}/results.csv")
        if (planned.folder / "report.html").is_file() or not planned.folder.exists():  # a remote one isn't kept here
            click.echo(f"report: {place}/report.html")
        if failed:
            raise click.ClickException(
                f"{len(failed)} of {len(planned.plans)} runs failed; repeat them with --retry-failed:\n"
                + "\n".join(f"  {row['folder']}: {row['error']}" for row in failed)
            )


@main.command()
@click.argument("concept")
@click.option("--kind", type=click.Choice(KINDS), help="[default: the concept's own]")
@click.option("--model", default="emoji", show_default=True, help="Bundled name, hub id or path.")
@CONFIG
@click.option("--preset", default="balanced", show_default=True, help="A method with its settings.")
@click.option("--references", type=Folder(exists=True), help="Images of the concept.  [default: the model draws them]")
@click.option("--towards", metavar="READING", help="What an ambiguous word should show instead.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("-s", "texts", multiple=True, metavar="NAME=VALUE", help="A single setting; repeatable.")
@click.option("--out", type=Folder(), help="The patch's folder.  [default: runs/patches/NAME]")
@click.option("--again", is_flag=True, help="Replace the patch that another command left there.")
def forget(out: Path | None, again: bool, **request: Any) -> None:
    """Make the model forget CONCEPT: a patch, without notebooks."""
    with plain_errors():
        from fmn_nb.runs.single import PatchRequest, make_patch, told

        checked = PatchRequest.checked(**request)
        out = out or checked.folder
        click.echo(told(make_patch(checked, out, again), checked, out))


@main.command()
@click.argument("what", type=click.Path(path_type=Path))
@click.option("--concept", required=True, help="What WHAT should have forgotten.")
@click.option("--kind", type=click.Choice(KINDS), help="[default: the concept's own]")
@click.option("--model", default="emoji", show_default=True, help="The unchanged model, to compare with.")
@CONFIG
@click.option("--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="Images drawn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the images.")
@click.option("--clip", metavar="FOLDER", help="A CLIPModel, folder or hub id; it judges for a model without a judge.")
@click.option("--real", type=Folder(exists=True), help="Real images to measure distances to.")
@click.option("--prompts", type=Folder(exists=True), help="Prompt lists of your own, made like the kit's data/prompts.")
@click.option("--cache", type=Folder(), help="Folder that keeps drawn images for the next evaluation.")
@click.option("--out", type=Folder(), help="Folder for metrics.json and every image's verdict.  [default: none]")
@click.option("--again", is_flag=True, help="Replace another command's metrics.json there.")
def evaluate(what: Path, concept: str, kind: str | None, model: str, seed: int, **options: Any) -> None:
    """Score what changes a model: what is gone, and what is kept.

    WHAT is a patch's folder, a LoRA (diffusers or kohya), changed weights as UCE and ESD export them, or a whole
    diffusers folder, each as .safetensors.
    """
    with plain_errors():
        from fmn_nb.runs.single import score, shown

        request = {"model": model, "concept": concept, "kind": kind, "seed": seed}
        click.echo(shown(score(what, request, **options)))
        if options["out"]:
            click.echo(f"\nmetrics: {options['out'] / 'metrics.json'}")


@main.command()
@click.argument("folder", type=Folder(exists=True))
def report(folder: Path) -> None:
    """Rewrite the pages of a run or a sweep.

    Writes report.html into FOLDER, and pages of a run's executed notebooks beside it.
    """
    with plain_errors():
        from fmn_nb.runs.report import write_report

        click.echo(write_report(folder, notebooks=True))


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The model to check.")
def check(model: str) -> None:
    """Say what works here, and what to do about what doesn't.

    Checks the environment, the model and the device.
    """
    from fmn_nb.runs.check import MARKS, all_checks

    failures = 0
    for one in all_checks(model):
        failures += one.state == "failed"
        click.echo(f"{MARKS[one.state]} {one.name}: {one.found}")
        if one.advice:
            click.echo(f"     {one.advice}")
    if failures:
        raise click.ClickException(f"{failures} of the checks above failed")


@main.command()
@click.option("--organism", default="emoji", show_default=True, help="Which model to make: emoji, joint (a "
              "transformer with joint attention in the same world), or grounded (interaction control for the emoji "
              "model).")
@click.option("--out", type=Folder(), help="Folder for the models.  [default: the kit's data/]")
@click.option("--without", metavar="A,B", multiple=True, help="Train a model that never saw these: an oracle.")
@click.option("--keep-text-encoder", is_flag=True,
              help="Give the oracle the emoji model's text encoder, which saw the words.")
@click.option("--stages", metavar="A,B", help="Only these stages of the recipe.  [default: all]")
@click.option("--smoke", is_flag=True, help="The whole recipe in under a minute; the models learn next to nothing.")
@click.option("--resume/--restart", default=True, show_default=True, help="Continue a killed training, or start anew.")
@click.option("--start-from", type=Folder(exists=True),
              help="A finished pipeline's folder, to train it further.")
@click.option("--packages", type=Folder(exists=True), help="A node_modules "
              "folder with the emoji sets, to rasterise the sprites anew.  [default: the committed sprites]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of scenes and training.")
def pretrain(without: tuple[str, ...], stages: str | None, **options: Any) -> None:
    """Rebuild the emoji world and train its models.

    A training can be stopped at any point and continued.
    """
    with plain_errors():
        _share_cores()
        from fmn_nb.emoji.training.request import Request

        chosen = _items(stages or "")
        request = Request(without=[name for names in without for name in _items(names)], stages=chosen, **options)

        from fmn_nb.emoji.training.recipe import pretrain as build
        from fmn_nb.runs.stopping import telling

        begun: list[str] = []

        def tell(line: str) -> None:
            begun.extend([line] if line.startswith("--- ") else [])
            click.echo(line)

        def finished() -> str:
            command = "the same command" if request.resume else "the same command without --restart"
            return f"{max(0, len(begun) - 1)} of {len(request.chosen)} stages finished; {command} continues"

        with telling(finished):
            click.echo(f"models: {build(request, tell)}")


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The emoji model, or another of a known world.")
@click.option("--concepts", metavar="A,B", help="Names or groups: objects, styles, identities, words.  [default: all]")
@click.option("--presets", default="balanced,paper", show_default=True,
              help="What to compare: presets, and variants in the settings file; 'all': everything in that file.")
@click.option("--seeds", default="0", show_default=True, metavar="A,B", help="One job for each concept, preset, seed.")
@click.option("--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True,
              help="Images of each job.")
@click.option("--out", type=Folder(), help="Folder for the table, figure and settings.  [default: the "
              "kit's data/results]")
@click.option("--work", type=Folder(), default="runs/benchmark", show_default=True,
              help="Folder for each job's results; from these, the command continues.")
@click.option("--limit", type=click.IntRange(0), help="Do at most this many jobs, then write the table so far.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Jobs at a time. They share the "
              "machine's threads, so another number can change the last digits of a result.")
@click.option("--plan", is_flag=True, help="Say what there is to do and how long it takes, and do nothing.")
@click.option("--settings", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="YAML or JSON, preset: {setting: value}.  [default: settings.yaml in --out, if there]")
@click.option("-s", "single", multiple=True, metavar="PRESET.NAME=VALUE", help="A single setting; repeatable.")
@click.option("--attack", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
              help="Try a concept inversion of this many steps on each patch of an attack seed; 0: none.")
@click.option("--attack-seeds", metavar="A,B", help="The seeds whose patches are attacked.  [default: the first]")
@click.option("--oracle", default="", metavar="A,B", help="Models that were never taught some of the concepts: jobs of "
              "an attack seed on these end in attacks, above the oracles' floor.")
@click.option("--beside", metavar="A,B", help="Which attacks these are: concept inversion, adversarial prompt, "
              "relearning, and of models with boxes grounding.  [default: all]")
@click.option("--note", default="", help="A note for results.json, such as how the settings were tuned.")
def benchmark(file: Path | None, single: tuple[str, ...], out: Path | None, work: Path, attack: int, note: str,
              **request: Any) -> None:
    """Make one table of all concepts: forgotten, kept, cost.

    The same command continues where it stopped; finished jobs are never repeated, nor what a table in --out holds of
    the same model and settings.
    """
    with plain_errors():
        _share_cores()
        from fmn_nb.concepts.world import vocabulary_of
        from fmn_nb.files import data_dir
        from fmn_nb.models.names import resolve
        from fmn_nb.runs.benchmark import EVERYTHING, SETTINGS_FILE, TUNED_ON, plan_jobs, read_overrides, tuned_on

        out, model = out or data_dir() / "results", request["model"]
        vocabulary, usual = vocabulary_of(Path(resolve(model))), out / SETTINGS_FILE
        if vocabulary is None:
            raise ValueError(f"'{model}' belongs to no known world, so there is no judge for its images")
        file = file or (usual if usual.is_file() else None)
        concepts, presets, seeds = (_items(request[name]) for name in ("concepts", "presets", "seeds"))
        overrides, chosen_on = read_overrides(file, single, presets), tuned_on(file, vocabulary)
        presets = list(overrides) if presets == [EVERYTHING] else presets
        seeds, attacked = _whole("--seeds", seeds), _whole("--attack-seeds", _items(request["attack_seeds"]))
        attacked = attacked or seeds[:1]
        if unknown := set(attacked) - set(seeds):
            raise ValueError(f"no job has the attack seed {', '.join(map(str, sorted(unknown)))}; the seeds are "
                             f"{', '.join(map(str, seeds))}")
        jobs = plan_jobs(vocabulary, concepts, presets, seeds, request["size"], overrides)

        from fmn_nb.attacks.attack import InversionBudget
        from fmn_nb.attacks.floor import ATTACKS
        from fmn_nb.runs.benchmark import kept_rows, run_benchmark, schedule
        from fmn_nb.runs.measure import ATTACK_IMAGES, Bench

        budget = InversionBudget(steps=attack, images=ATTACK_IMAGES) if attack else None
        beside = tuple(_items(request["beside"])) or ATTACKS
        if unknown := set(beside) - set(ATTACKS):
            raise ValueError(f"no attack is called {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
        bench = Bench(model, work, attack=budget, attack_seeds=tuple(attacked),
                      oracles=tuple(_items(request["oracle"])), beside=beside)
        workers = request["workers"]
        if request["plan"]:
            click.echo("\n".join(schedule(bench, jobs, workers, request["limit"], kept_rows(bench, jobs, out))))
            return
        made = {"command": shlex.join(["fmn-nb", *sys.argv[1:]]), TUNED_ON: chosen_on,
                **({"note": note} if note else {})}
        table = run_benchmark(bench, jobs, out, made=made, limit=request["limit"], workers=workers, log=click.echo)
        click.echo(f"results: {table}")


@main.group()
def course() -> None:
    """Make what a teacher needs: a site, editions, a demo."""


@course.command()
@click.option("--out", type=Folder(), required=True, help="The site's folder; an earlier site there is replaced.")
@click.option("--run", type=Folder(exists=True), help="A run whose report the site shows.  [default: a bundled one]")
@click.option("--demo", type=Folder(exists=True), help="What 'fmn-nb course demo' made, for the front page.")
@click.option("--repository", metavar="URL", help="Where the course is hosted; adds buttons for Binder and Colab.")
@click.option("--branch", default="main", show_default=True, help="The branch that these buttons open.")
@click.option("--reference/--no-reference", default=True, show_default=True, help="Include the package's reference.")
def site(out: Path, **request: Any) -> None:
    """Build the course's site.

    Takes the notebooks as they are and executes nothing. The site needs no server and no network.
    """
    with plain_errors():
        from fmn_nb.course import SiteRequest, build_site

        click.echo(f"site: {build_site(out, SiteRequest(**request), click.echo)}")


@course.command()
@click.option("--out", type=Folder(), required=True, help="Folder for the editions, one folder each.")
@click.option("--only", metavar="A,B", help="Some of student, solution, autograder, slides.  [default: all]")
@click.option("--notebooks", metavar="NN,NN", help="Numbers of notebooks.  [default: all]")
def editions(out: Path, only: str | None, notebooks: str | None) -> None:
    """Write editions of the notebooks.

    For students, with solutions, for nbgrader, and as slides.
    """
    with plain_errors():
        from fmn_nb.course import write_editions

        write_editions(out, _items(only) or None, _items(notebooks) or None, click.echo)


@course.command()
@click.option("--out", type=Folder(), help="Folder for the translated README and notebooks.")
@click.option("--language", default="zh_CN", show_default=True, help="The language's folder in notebooks/locale.")
@click.option("--update", is_flag=True, help="First bring the PO files up to date with the documents.")
@click.option("--begin", metavar="NN,NN", help="With --update: notebooks to start a PO file for.")
def translate(out: Path | None, language: str, update: bool, begin: str | None) -> None:
    """Write the course in another language.

    Says what share of each document is translated; the rest, and what has changed since, stays in English.
    """
    with plain_errors():
        from fmn_nb.course import translate_course, update_catalogues

        if begin and not update:
            raise ValueError("--begin goes with --update")
        if out is None and not update:
            raise ValueError("nothing to do: give --out for the translated course, or --update for the PO files")
        if update:
            update_catalogues(language, _items(begin), click.echo)
        if out is not None:
            click.echo(f"course: {translate_course(out, language, click.echo)}")


@course.command()
@click.option("--out", type=Folder(), required=True, help="The page's folder; new, empty, or an earlier demo's.")
@click.option("--concept", "concepts", multiple=True, metavar="CONCEPT", help="What to make a patch for; "
              "repeatable.  [default: cat and contrast]")
@click.option("--preset", default="balanced", show_default=True, help="The method of these patches.")
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of these patches.")
@click.option("--patch", "folders", type=Folder(exists=True), multiple=True, help="A finished patch of the "
              "emoji model, instead of making one; repeatable.")
@click.option("--runtime", type=Folder(exists=True), help="The npm package onnxruntime-web.  "
              "[default: node_modules/onnxruntime-web]")
def demo(out: Path, concepts: tuple[str, ...], preset: str, seed: int, folders: tuple[Path, ...],
         runtime: Path | None) -> None:
    """Write a page that draws and forgets in a browser.

    On the page, the emoji model draws, a slider sets a patch's scale, and a word's attention map is shown. The page
    works from its folder, without a server, and contacts no other host. Patches are made as `fmn-nb forget` makes them,
    or taken from runs/patches/ if they are there already.
    """
    with plain_errors():
        from fmn_nb.course.demo import DemoError, check_free, check_tools, demo_patch, find_runtime, write_demo
        from fmn_nb.runs.single import PatchRequest

        if folders and concepts:
            raise DemoError("give either --concept, for patches to make, or --patch, for finished ones")
        check_free(out)
        check_tools()
        found = find_runtime(runtime)
        names = () if folders else concepts or ("cat", "contrast")
        requests = [PatchRequest.checked(concept=name, kind=None, model="emoji", preset=preset, seed=seed)
                    for name in names]
        from fmn_nb.patches import Patch

        patches = [Patch.load(folder) for folder in folders]
        for request in requests:
            click.echo(f"patch: {request.concept}, {request.preset}, seed {request.seed}: {request.folder}")
            patches.append(demo_patch(request))
        click.echo(f"page: {write_demo(out, patches, found, click.echo)}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that tell what to do into one message and exit code 2 (a wrong request) or 1 (a failed run).

    Signals that end a command become one line that says what is finished, and exit code 130.
    """
    from fmn_nb.runs.stopping import EXIT_CODE, signals_stop

    try:
        with signals_stop():
            yield
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may be what has gone
            click.echo(f"stopped: {str(stop) or 'nothing was finished; give the same command again'}", err=True)
        raise click.exceptions.Exit(EXIT_CODE) from None
    except (ValueError, FileNotFoundError) as error:
        problem = click.ClickException(str(error))
        problem.exit_code = 2
        raise problem from error
    except (RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _share_cores() -> None:
    """Let this command's threads make room if others use the cores; called before torch is imported."""
    from fmn_nb.runs.executors import patient_threads

    os.environ.update(patient_threads(os.environ))


def _items(text: str | None) -> list[str]:
    """The items of a comma-separated list."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def _whole(option: str, items: list[str]) -> list[int]:
    wrong = [item for item in items if not item.isdecimal()]
    if wrong:
        raise ValueError(f"{option} takes whole numbers, such as 0,1, not '{wrong[0]}'")
    return [int(item) for item in items]


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or not name.isidentifier():
            raise ValueError(f"-p takes name=value, not '{text}'")
        if name in pairs:
            raise ValueError(f"-p gives '{name}' twice; give it once")
        pairs[name] = value
    return pairs


def _table(out: Path) -> str:
    """A run's figures, before and after, as a short text table; empty if nothing was measured."""
    from fmn_nb.runs.folder import RunFolder
    from fmn_nb.runs.metrics import comparison
    from fmn_nb.runs.report import format_figure

    metrics = RunFolder(out).metrics
    rows = comparison(metrics.get("before", {}), metrics.get("after", {}))
    if not rows:
        return f"done: {metrics['concept']['name']}"
    lines = [f"{metrics['concept']['name']:12}{'before':>10}{'after':>10}"]
    for metric, *values in rows:
        cells = ("–" if value is None else format_figure(value) for value in values)
        lines.append(f"{metric.short:12}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
