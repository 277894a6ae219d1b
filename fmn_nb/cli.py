"""The command `fmn-nb`. Only click is imported here: `fmn-nb --help` answers at once, the rest when it is needed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from fmn_nb import __version__
from fmn_nb.concepts.concept import KINDS


class Folder(click.Path):
    """A folder's path; an empty text, as of an unset variable, is none, though it would mean the current folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(file_okay=False, path_type=Path, **options)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path; a usage error where it is empty."""
        if not str(value).strip():
            self.fail("it is empty; name a folder ('.' is this one)", parameter, context)
        if "://" in str(value):
            self.fail(f"{value} is a URL, where only sweeps leave their results; name a folder", parameter, context)
        return super().convert(value, parameter, context)


class Program(click.Group):
    """The command as a process of its own, which ends at once when it was stopped."""

    def __call__(self, *words: Any, **options: Any) -> Any:
        """What a shell calls."""
        try:
            return super().__call__(*words, **options)
        except SystemExit as end:
            from fmn_nb.runs.stopping import EXIT_CODE, end_at_once

            if end.code == EXIT_CODE:
                end_at_once()
            raise


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fmn-nb")
def main() -> None:
    """Forget-Me-Not Notebooks: run the course in batches, sweep over settings, report, check, pretrain."""
    from fmn_nb.runs.notebook import without_slow_formats

    without_slow_formats()


@main.command()
@click.option("--model", default="emoji", show_default=True, help="Bundled name, hub id or path.")
@click.option("--concept", default="cat", show_default=True, help="What to forget.")
@click.option("--kind", type=click.Choice(KINDS), help="[default: the concept's own]")
@click.option("--preset", default="balanced", show_default=True, help="Named settings of the fine-tune.")
@click.option("--steps", type=int, help="Fine-tuning steps.  [default: the preset's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, machine and number of "
              "threads, same result.")
@click.option("--out", type=Folder(), help="The run's folder.  [default: runs/NAME]")
@click.option("--notebooks", default="01,02,03,04", show_default=True, help="Numbers, names or paths, in order.")
@click.option("-p", "texts", multiple=True, metavar="NAME=VALUE", help="A notebook's further parameter; repeatable.")
def run(texts: tuple[str, ...], steps: int | None, **request: Any) -> None:
    """Execute the course's notebooks on one concept.

    Leaves the executed notebooks, images/, patch/, metrics.json and report.html in the run's folder.
    """
    with plain_errors():
        from fmn_nb.runs.plan import plan_run

        parameters = {} if steps is None else {"steps": steps}
        plan = plan_run(parameters=parameters, texts=_pairs(texts), **request)

        from fmn_nb.runs.runner import execute

        execute(plan, _progress())
        click.echo(_table(plan.out))
        click.echo(f"report: {plan.out / 'report.html'}")


@main.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", help="The sweep's folder, or a URL as s3://bucket/x.  [default: runs/NAME-OF-SPEC]")
@click.option("--workers", type=click.IntRange(1), help="Runs at a time, which share the machine's "
              "threads: another number can change the last digits of a result.  [default: the spec's, else 1]")
@click.option("--scheduler", metavar="ADDRESS", help="An existing Dask scheduler, tcp://host:8786.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier attempt.")
def sweep(spec: Path, **options: Any) -> None:
    """Execute many runs from a YAML file: a grid or a list of parameters. Finished runs are never repeated."""
    with plain_errors():
        from fmn_nb.runs.spec import plan_sweep

        planned = plan_sweep(spec, options.pop("out"))

        from fmn_nb.runs.sweep import Progress, run_sweep

        place, failed = run_sweep(planned, progress=Progress.shown(), **options)
        click.echo(f"results: {place}/results.csv\nreport: {place}/report.html")
        if failed:
            raise click.ClickException(
                f"{len(failed)} of {len(planned.plans)} runs failed; again with --retry-failed:\n"
                + "\n".join(f"  {row['folder']}: {row['error']}" for row in failed)
            )


@main.command()
@click.argument("folder", type=Folder(exists=True))
def report(folder: Path) -> None:
    """Write the self-contained report.html of a run's or a sweep's FOLDER anew."""
    with plain_errors():
        from fmn_nb.runs.report import write_report

        click.echo(write_report(folder))


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The model to check as well.")
def check(model: str) -> None:
    """Say what works here (environment, model, device) and what to do about what doesn't."""
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
@click.option("--out", type=Folder(), help="Folder for the models.  [default: the kit's data/]")
@click.option("--without", metavar="CONCEPT", multiple=True, help="Train a model that never saw it: an oracle.")
@click.option("--stages", metavar="A,B", help="Only these stages of the recipe.  [default: all]")
@click.option("--smoke", is_flag=True, help="The whole recipe in under a minute; the models learn next to nothing.")
@click.option("--resume/--restart", default=True, show_default=True, help="Go on where a killed training stood.")
@click.option("--start-from", type=Folder(exists=True),
              help="A finished pipeline's folder, to train it further.")
@click.option("--packages", type=Folder(exists=True), help="A node_modules "
              "folder with the emoji sets, to rasterise the sprites anew.  [default: the committed sprites]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of scenes and training.")
def pretrain(without: tuple[str, ...], stages: str | None, **options: Any) -> None:
    """Rebuild the emoji world and train its models, resumable at any point."""
    with plain_errors():
        from fmn_nb.emoji.training.request import Request

        chosen = _items(stages or "")
        request = Request(without=without, stages=chosen, **options)

        from fmn_nb.emoji.training.recipe import pretrain as build
        from fmn_nb.runs.stopping import telling

        begun: list[str] = []

        def tell(line: str) -> None:
            begun.extend([line] if line.startswith("--- ") else [])
            click.echo(line)

        def finished() -> str:
            command = "the same command" if request.resume else "the same command without --restart"
            return f"{max(0, len(begun) - 1)} of {len(request.chosen)} stages finished; {command} goes on"

        with telling(finished):
            click.echo(f"models: {build(request, tell)}")


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The emoji model, or another of a known world.")
@click.option("--concepts", metavar="A,B", help="Names or groups: objects, styles, identities, words.  [default: all]")
@click.option("--presets", default="balanced,paper", show_default=True,
              help="Which to compare, variants in the settings file too; 'all': everything in that file.")
@click.option("--seeds", default="0", show_default=True, metavar="A,B", help="One job for each concept, preset, seed.")
@click.option("--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True,
              help="Images of each job.")
@click.option("--out", type=Folder(), help="Folder of table, figure and settings.  [default: the "
              "kit's data/results]")
@click.option("--work", type=Folder(), default="runs/benchmark", show_default=True,
              help="Folder of the jobs' own results, by which the command goes on.")
@click.option("--limit", type=click.IntRange(0), help="Do at most so many jobs, then write the table of what is there.")
@click.option("--settings", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="YAML or JSON, preset: {setting: value}.  [default: settings.yaml in --out, if there]")
@click.option("-s", "single", multiple=True, metavar="PRESET.NAME=VALUE", help="A single setting; repeatable.")
@click.option("--attack", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
              help="Try a concept inversion of so many steps on each patch of the first seed; 0: none.")
@click.option("--note", default="", help="Goes into results.json, such as how the settings were tuned.")
def benchmark(file: Path | None, single: tuple[str, ...], out: Path | None, work: Path, attack: int, note: str,
              **request: Any) -> None:
    """The results table of all concepts: forgotten, kept, cost. Resumable; finished jobs are never repeated."""
    with plain_errors():
        from fmn_nb.concepts.world import vocabulary_of
        from fmn_nb.files import data_dir
        from fmn_nb.models.names import resolve
        from fmn_nb.runs.benchmark import EVERYTHING, SETTINGS_FILE, plan_jobs, read_overrides

        out, model = out or data_dir() / "results", request["model"]
        vocabulary, usual = vocabulary_of(Path(resolve(model))), out / SETTINGS_FILE
        if vocabulary is None:
            raise ValueError(f"'{model}' is of no world that is known here, so that nobody judges its images")
        concepts, presets, seeds = (_items(request[name]) for name in ("concepts", "presets", "seeds"))
        overrides = read_overrides(file or (usual if usual.is_file() else None), single, presets)
        presets = list(overrides) if presets == [EVERYTHING] else presets
        seeds = [int(seed) for seed in seeds]
        jobs = plan_jobs(vocabulary, concepts, presets, seeds, request["size"], overrides)

        from fmn_nb.attacks.attack import InversionBudget
        from fmn_nb.runs.benchmark import run_benchmark
        from fmn_nb.runs.measure import ATTACK_IMAGES, Bench

        budget = InversionBudget(steps=attack, images=ATTACK_IMAGES) if attack else None
        bench = Bench.of(model, work, attack=budget, attack_seed=seeds[0])
        made = {"command": shlex.join(["fmn-nb", *sys.argv[1:]]), **({"note": note} if note else {})}
        table = run_benchmark(bench, jobs, out, made=made, limit=request["limit"], log=click.echo)
        click.echo(f"results: {table}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the errors that tell what to do into one message and exit code 2 (a wrong request) or 1 (a failed run).

    The signals that end a command become one line that says what is finished, and exit code 130.
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


def _items(text: str | None) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


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


def _progress() -> Callable[[str], None]:
    """Notebooks as they start and end: on one growing line of a terminal, on a whole line each in a log."""
    if sys.stderr.isatty():
        return lambda text: click.echo(text, nl=False, err=True)
    started = ""

    def tell(text: str) -> None:
        # A log shows a line only when it ends, and others may write in between.
        nonlocal started
        if text.endswith("\n"):
            click.echo(started + text.strip(), err=True)
        else:
            started = text
            click.echo(started + "...", err=True)

    return tell


def _table(out: Path) -> str:
    """A run's figures, before and after, as a short text table; empty where nothing was measured."""
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
