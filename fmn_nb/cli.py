"""The command `fmn-nb`. Only click is imported here: `fmn-nb --help` answers at once, the rest when it is needed."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fmn_nb import __version__
from fmn_nb.files import without_slow_formats


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fmn-nb")
def main() -> None:
    """Forget-Me-Not Notebooks: run the course in batches, sweep over settings, report, check, pretrain."""
    without_slow_formats()


@main.command()
@click.option("--model", default="emoji", show_default=True, help="Bundled name, hub id or path.")
@click.option("--concept", default="cat", show_default=True, help="What to forget.")
@click.option("--kind", type=click.Choice(["object", "style", "identity"]), help="[default: the concept's own]")
@click.option("--preset", default="balanced", show_default=True, help="Named settings of the fine-tune.")
@click.option("--steps", type=int, help="Fine-tuning steps.  [default: the preset's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same machine, same result.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME]")
@click.option("--notebooks", default="01,02,03,04", show_default=True, help="Numbers, names or paths, in order.")
@click.option("-p", "texts", multiple=True, metavar="NAME=VALUE", help="A notebook's further parameter; repeatable.")
def run(texts: tuple[str, ...], steps: int | None, **request: Any) -> None:
    """Execute the course's notebooks on one concept.

    Leaves the executed notebooks, images/, patch/, metrics.json and report.html in the run's folder.
    """
    with plain_errors():
        from fmn_nb.plans import plan_run

        parameters = {} if steps is None else {"steps": steps}
        plan = plan_run(parameters=parameters, texts=_pairs(texts), **request)

        from fmn_nb.runs import execute

        execute(plan, _progress())
        click.echo(_table(plan.out))
        click.echo(f"report: {plan.out / 'report.html'}")


@main.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", help="The sweep's folder, or a URL as s3://bucket/x.  [default: runs/NAME-OF-SPEC]")
@click.option("--workers", type=click.IntRange(1), help="Runs at a time.  [default: the spec's, else 1]")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler, tcp://host:8786 (extra: dask).")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier attempt.")
def sweep(spec: Path, **options: Any) -> None:
    """Execute many runs from a YAML file: a grid or a list of parameters. Finished runs are never repeated."""
    with plain_errors():
        from fmn_nb.sweep_specs import plan_sweep

        planned = plan_sweep(spec, options.pop("out"))

        from fmn_nb.sweep_table import LiveTable, PlainLines
        from fmn_nb.sweeps import run_sweep

        watch = LiveTable() if sys.stderr.isatty() else PlainLines()
        place, failed = run_sweep(planned, watch=watch, **options)
        listed = [str(place / name) if isinstance(place, Path) else f"{place}/{name}"
                  for name in ("results.csv", "report.html")]
        click.echo(f"results: {listed[0]}\nreport: {listed[1]}")
        if failed:
            raise click.ClickException(
                f"{len(failed)} of {len(planned.plans)} runs failed; again with --retry-failed:\n"
                + "\n".join(f"  {row['folder']}: {row['error']}" for row in failed)
            )


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder: Path) -> None:
    """Write the self-contained report.html of a run's or a sweep's FOLDER anew."""
    with plain_errors():
        from fmn_nb.report import write_report

        click.echo(write_report(folder))


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The model to check as well.")
def check(model: str) -> None:
    """Say what works here (environment, model, device) and what to do about what doesn't."""
    from fmn_nb.check import MARKS, all_checks

    failures = 0
    for one in all_checks(model):
        failures += one.state == "failed"
        click.echo(f"{MARKS[one.state]} {one.name}: {one.found}")
        if one.advice:
            click.echo(f"     {one.advice}")
    if failures:
        raise click.ClickException(f"{failures} of the checks above failed")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the models.  [default: the kit's data/]")
@click.option("--without", metavar="CONCEPT", multiple=True, help="Train a model that never saw it: an oracle.")
@click.option("--stages", metavar="A,B", help="Only these stages of the recipe.  [default: all]")
@click.option("--smoke", is_flag=True, help="The whole recipe in under a minute; the models learn next to nothing.")
@click.option("--resume/--restart", default=True, show_default=True, help="Go on where a killed training stood.")
@click.option("--start-from", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A finished pipeline's folder, to train it further.")
@click.option("--packages", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A node_modules "
              "folder with the emoji sets, to rasterise the sprites anew.  [default: the committed sprites]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of scenes and training.")
def pretrain(without: tuple[str, ...], stages: str | None, **options: Any) -> None:
    """Rebuild the emoji world and train its models, resumable at any point."""
    with plain_errors():
        from fmn_nb.emoji.world import concept_names

        unknown = [name for name in without if name not in concept_names()]
        if unknown:
            raise ValueError(f"the emoji world has no '{unknown[0]}'; it has: {', '.join(concept_names())}")

        from fmn_nb.emoji.pretrain import pretrain as build

        chosen = None if stages is None else [stage.strip() for stage in stages.split(",")]
        click.echo(f"models: {build(without=without, stages=chosen, log=click.echo, **options)}")


@main.command()
@click.option("--model", default="emoji", show_default=True, help="The emoji model, or a folder with one of its kind.")
@click.option("--concepts", metavar="A,B", help="Names or groups: objects, styles, identities, words.  [default: all]")
@click.option("--presets", default="balanced,paper", show_default=True,
              help="Which to compare, variants in the settings file too; 'all': everything in that file.")
@click.option("--seeds", default="0", show_default=True, metavar="A,B", help="One job for each concept, preset, seed.")
@click.option("--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True,
              help="Images of each job.")
@click.option("--out", type=click.Path(path_type=Path), help="The results' folder.  [default: the kit's data/results]")
@click.option("--limit", type=click.IntRange(0), help="Do at most so many jobs, then write the table of what is there.")
@click.option("--settings", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="YAML or JSON, preset: {setting: value}.  [default: settings.yaml in --out, if there]")
@click.option("-s", "single", multiple=True, metavar="PRESET.NAME=VALUE", help="A single setting; repeatable.")
@click.option("--attack", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
              help="Try a concept inversion of so many steps on each patch of the first seed; 0: none.")
@click.option("--note", default="", help="Goes into results.json, such as how the settings were tuned.")
def benchmark(file: Path | None, single: tuple[str, ...], out: Path | None, model: str, attack: int,
              limit: int | None, note: str, **request: str | None) -> None:
    """The results table of all concepts: forgotten, kept, cost. Resumable; finished jobs are never repeated."""
    with plain_errors():
        from fmn_nb.benchmark_plan import EVERYTHING, SETTINGS_FILE, plan, read_overrides
        from fmn_nb.paths import data_dir

        out = out or data_dir() / "results"
        usual = out / SETTINGS_FILE
        lists = {name: [item.strip() for item in (request[name] or "").split(",") if item.strip()]
                 for name in ("concepts", "presets", "seeds")}
        lists["seeds"] = [int(seed) for seed in lists["seeds"]]
        overrides = read_overrides(file or (usual if usual.is_file() else None), single, lists["presets"])
        if lists["presets"] == [EVERYTHING]:
            lists["presets"] = list(overrides)
        jobs = plan(**lists, size=request["size"], overrides=overrides)

        from fmn_nb.benchmark import ATTACK_IMAGES, Bench, InversionBudget, run_benchmark

        budget = InversionBudget(steps=attack, images=ATTACK_IMAGES) if attack else None
        bench = Bench.of(model, out, attack=budget, attack_seed=lists["seeds"][0])
        command = shlex.join(["fmn-nb", *sys.argv[1:]])
        click.echo(f"results: {run_benchmark(bench, jobs, command=command, limit=limit, note=note, log=click.echo)}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the errors that tell what to do into one message and exit code 2 (a wrong request) or 1 (a failed run)."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        problem = click.ClickException(str(error))
        problem.exit_code = 2
        raise problem from error
    except (RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = dict(text.split("=", 1) if "=" in text else (text, None) for text in texts)
    for name, value in pairs.items():
        if value is None or not name.isidentifier():
            raise ValueError(f"-p takes name=value, not '{name if value is None else name + '=' + value}'")
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
    from fmn_nb.files import read_json
    from fmn_nb.report import comparison, format_figure
    from fmn_nb.results import METRICS_FILE

    metrics = read_json(out / METRICS_FILE)
    rows = comparison(metrics.get("before", {}), metrics.get("after", {}))
    if not rows:
        return f"done: {metrics['concept']['name']}"
    lines = [f"{metrics['concept']['name']:12}{'before':>10}{'after':>10}"]
    for row in rows:
        cells = ("–" if row[side] is None else format_figure(row[side]) for side in ("before", "after"))
        lines.append(f"{row['short']:12}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
