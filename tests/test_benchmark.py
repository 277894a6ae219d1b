"""The results table: what is done, what is skipped, that resuming changes nothing, and that figures are right."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from fmn_nb import benchmark
from fmn_nb.attacks import InversionBudget
from fmn_nb.benchmark import Bench, BenchmarkError, run_benchmark
from fmn_nb.benchmark_base import BaseVerdicts, outcomes_of
from fmn_nb.benchmark_plan import plan, read_overrides
from fmn_nb.benchmark_table import COSTS, summary, table_of
from fmn_nb.cli import main
from fmn_nb.concepts import Concept
from fmn_nb.emoji.judge import Verdict
from fmn_nb.files import read_json
from fmn_nb.forgetting_settings import PRESETS, SettingsError, settings_for
from fmn_nb.models import bundled
from fmn_nb.plots_benchmark import forgetting_against_keeping
from fmn_nb.protocol import Drawing, drawings

needs_emoji = pytest.mark.skipif("emoji" not in bundled(), reason="the emoji model isn't in data/: fmn-nb pretrain")
SHORT = {"steps": 1, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "batch_size": 1, "retain_batch": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """The emoji model with two sampling steps: the figures mean nothing, the plumbing is the same."""
    return Bench.of("emoji", tmp_path_factory.mktemp("results"), steps=2)


def short_plan(*concepts: str, presets=("balanced",), **options):
    overrides = {"balanced": SHORT, "paper": {**SHORT, "retain_count": 0}}
    return plan(concepts, presets, overrides={name: overrides[name] for name in presets}, **options)


@pytest.fixture
def few(monkeypatch):
    """A job draws two images of the forget set and four of the retain set."""
    def some(concept, seed=0, size="quick"):
        wanted = drawings(concept, seed, size)
        retain = [d for d in wanted if d.role == "retain"]
        return wanted[:2] + retain[:2] + retain[-2:]

    monkeypatch.setattr(benchmark, "drawings", some)


def test_all_concepts_of_the_world_are_planned_and_words_corrected() -> None:
    jobs = plan()
    assert len(jobs) == 2 * (24 + 6 + 4 + 3) and len({job.name for job in jobs}) == len(jobs)
    words = {job.concept.name: job.towards for job in jobs if job.group == "word"}
    assert words == {"mouse": "computer mouse", "bow": "archery bow", "bat": "cricket bat"}
    assert [job.preset for job in jobs[:2]] == ["balanced", "paper"] and jobs[0].concept == jobs[1].concept
    assert jobs[0].settings == PRESETS["balanced"] and jobs[1].settings == PRESETS["paper"]
    assert len(plan(["styles", "cat", "noto"], seeds=[0, 1])) == 2 * 7 * 2, "a name in a group counts once"


@pytest.mark.parametrize(("wrong", "text"), [
    ({"concepts": ["unicorn"]}, "no 'unicorn'; groups: objects, styles"), ({"size": "huge"}, "quick or full"),
    ({"presets": ["best"]}, "no preset 'best'"), ({"seeds": [-1]}, "whole numbers"), ({"seeds": []}, "whole numbers"),
    ({"presets": ["paper"], "overrides": {"balanced": {}}}, "isn't asked for"),
    ({"overrides": {"paper": {"rate": 1}}}, "no setting 'rate'"),
])
def test_wrong_requests_tell_what_there_is(wrong, text) -> None:
    with pytest.raises(ValueError, match=text):
        plan(**wrong)


def test_settings_come_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("paper: {learning_rate: 1e-4, positions: [words]}\nbalanced: {steps: 9}\n")
    found = read_overrides(file, ["paper.steps=50", "paper.learning_rate=2e-4"], ["paper"])
    assert found == {"paper": {"learning_rate": 2e-4, "positions": ("words",), "steps": 50}}
    (job,) = plan(["cat"], ["paper"], overrides=found)
    assert (job.settings.learning_rate, job.settings.steps, job.settings.norm) == (2e-4, 50, "published")
    for text in ("paper=1", "steps=3", "paper.steps"):
        with pytest.raises(SettingsError, match="preset.name=value"):
            read_overrides(None, [text])
    for content in ("paper: 3", "- paper", "paper: ["):
        file.write_text(content)
        with pytest.raises(SettingsError, match="settings.yaml"):
            read_overrides(file)
    for content in ("papre: {}", "words: {preset: papre}"):
        file.write_text(content)
        with pytest.raises(SettingsError, match="no preset 'papre'"):
            read_overrides(file)


def test_a_settings_file_can_define_variants_of_presets(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("paper-words: {preset: paper, positions: [words]}\npaper: {steps: 3}\n")
    everything = read_overrides(file, ["paper-words.steps=9"], presets=["all"])
    assert list(everything) == ["paper-words", "paper"] and everything["paper-words"]["steps"] == 9
    assert list(read_overrides(file, presets=["paper"])) == ["paper"]
    jobs = plan(["cat"], ["paper-words", "paper"], overrides=read_overrides(file, presets=["all"]))
    assert [job.name for job in jobs] == ["cat-paper-words-seed0", "cat-paper-seed0"]
    assert jobs[0].settings == settings_for("paper", {"positions": ("words",)}) and jobs[1].settings.steps == 3
    few = {"paper": {"steps": 3, "seeds": [1]}}
    jobs = plan(["cat"], ["balanced", "paper"], seeds=[0, 1], overrides=few)
    assert [job.name for job in jobs] == ["cat-balanced-seed0", "cat-balanced-seed1", "cat-paper-seed1"]
    assert jobs[-1].settings == settings_for("paper", {"steps": 3})
    with pytest.raises(ValueError, match="nothing to do"):
        plan(["cat"], ["paper"], overrides=few)
    with pytest.raises(SettingsError, match="are a list"):
        plan(["cat"], ["paper"], overrides={"paper": {"seeds": 1}})
    for name in ("../words", "all", "balanced"):
        file.write_text(f"{name}: {{preset: paper}}")
        with pytest.raises(SettingsError, match="no name for a variant"):
            read_overrides(file)


def test_recorded_verdicts_give_the_rows_of_a_judge() -> None:
    cat = Concept("cat")
    wanted = [Drawing("a photo of a cat", 1, "forget", "cat", None, "object"),
              Drawing("a photo of a dog", 2, "retain", "dog", "noto", "object")]
    found = [Verdict("dog", "noto", frozenset({"dog"}), 0.9), Verdict("dog", "noto", frozenset({"dog"}), 0.8)]
    rows = outcomes_of(found, cat, wanted)
    assert rows["right"].tolist() == [True, True] and rows["right_style"].tolist() == [False, True]
    with pytest.raises(ValueError, match="2 verdicts for 1 images|1 images"):
        outcomes_of(found, cat, wanted[:1])


class Counting:
    """A judge that calls everything a dog and counts the images it is shown."""

    def __init__(self) -> None:
        self.shown = 0

    def verdicts(self, images):
        self.shown += len(images)
        return [Verdict("dog", "noto", frozenset({"dog", "cat"}), 0.75)] * len(images)


@needs_emoji
def test_the_base_models_images_are_drawn_once(bench: Bench, tmp_path: Path) -> None:
    judge, wanted = Counting(), drawings(Concept("cat"))[:3]
    base = BaseVerdicts(tmp_path / "base.json", {"model": "a"})
    first = base.of(bench.pipe, judge, [*wanted[:2], wanted[0]], steps=1)
    assert judge.shown == 2 and len(base) == 2
    again = BaseVerdicts(tmp_path / "base.json", {"model": "a"})
    assert again.of(bench.pipe, judge, wanted, steps=1)[:2] == first[:2] and judge.shown == 3
    other = BaseVerdicts(tmp_path / "base.json", {"model": "b"})
    assert len(other) == 0, "another model's verdicts don't count"


@needs_emoji
def test_a_killed_benchmark_goes_on_and_ends_in_the_same_table(bench: Bench, few, tmp_path: Path) -> None:
    jobs = short_plan("cat", "mouse", presets=("balanced", "paper"))
    whole = Bench(bench.pipe, bench.judge, tmp_path / "whole", "emoji", steps=2, shared=bench.shared)
    halves = Bench(bench.pipe, bench.judge, tmp_path / "halves", "emoji", steps=2, shared=bench.shared)
    lines: list[str] = []
    run_benchmark(whole, jobs, command="fmn-nb benchmark", log=lines.append)
    run_benchmark(halves, jobs, command="fmn-nb benchmark", limit=1, log=lines.append)
    assert len(pd.read_csv(halves.out / "results.csv")) == 1
    assert read_json(halves.out / "results.json")["missing"] == [job.name for job in jobs[1:]]
    run_benchmark(halves, jobs, command="fmn-nb benchmark", log=lines.append)
    assert "4 jobs, 1 done before, 3 to do now" in lines
    tables = [pd.read_csv(one.out / "results.csv").drop(columns=list(COSTS)) for one in (whole, halves)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["overshadowed_after"].notna().tolist() == [False, False, True, True]
    stamps = {file: file.stat().st_mtime_ns for file in (whole.out / "runs").iterdir()}
    run_benchmark(whole, jobs, command="fmn-nb benchmark", log=lines.append)
    assert stamps == {file: file.stat().st_mtime_ns for file in (whole.out / "runs").iterdir()}, "nothing is done twice"
    made = read_json(whole.out / "results.json")
    assert made["command"] == "fmn-nb benchmark" and made["versions"]["torch"] and "missing" not in made
    assert made["settings"]["balanced"]["steps"] == 1 and made["fingerprint"] == bench.shared["fingerprint"]
    assert (whole.out / "forgetting-against-keeping.png").read_bytes()[:4] == b"\x89PNG"


@needs_emoji
def test_other_settings_or_another_model_are_other_jobs(bench: Bench, few, tmp_path: Path) -> None:
    here = Bench(bench.pipe, bench.judge, tmp_path, "emoji", steps=2, shared=bench.shared)
    (job,) = short_plan("cat")
    run_benchmark(here, [job], command="", log=str)
    assert here.stored(job) is not None
    (more,) = plan(["cat"], ["balanced"], overrides={"balanced": {**SHORT, "steps": 2}})
    assert more.name == job.name and here.stored(more) is None
    other = Bench(bench.pipe, bench.judge, tmp_path, "emoji", steps=2, shared={**bench.shared, "fingerprint": "0"})
    assert other.stored(job) is None


@needs_emoji
def test_a_failing_job_is_named_and_tried_again(bench: Bench, few, tmp_path: Path, monkeypatch) -> None:
    here = Bench(bench.pipe, bench.judge, tmp_path, "emoji", steps=2, shared=bench.shared)
    jobs, forget = short_plan("cat", "dog"), benchmark.forget

    def failing(pipe, concept, **options):
        if concept.name == "cat":
            raise RuntimeError("the loss became nan")
        return forget(pipe, concept, **options)

    monkeypatch.setattr(benchmark, "forget", failing)
    with pytest.raises(BenchmarkError, match="cat-balanced-seed0: the loss became nan"):
        run_benchmark(here, jobs, command="", log=str)
    assert pd.read_csv(tmp_path / "results.csv")["concept"].tolist() == ["dog"]
    assert read_json(tmp_path / "results.json")["failed"]
    monkeypatch.setattr(benchmark, "forget", forget)
    run_benchmark(here, jobs, command="", log=str)
    assert pd.read_csv(tmp_path / "results.csv")["concept"].tolist() == ["cat", "dog"]
    assert "failed" not in read_json(tmp_path / "results.json")
    with pytest.raises(BenchmarkError, match="no job is done"):
        run_benchmark(here, short_plan("frog"), command="", limit=0, log=str)


def result_of(ua: float, ira: float, cra: float, h: float) -> dict:
    shares = {"ua": ua, "ira": ira, "cra": cra, "h": h}
    after = {**shares, "ceiling": 0.8, "images": 10, "ci95": {name: [0.0, 1.0] for name in shares}}
    return {"before": {**after, "ua": 0.0}, "after": after, "forgetting": {"steps": 3, "seconds": 1.5}}


def test_the_table_and_its_means_by_hand() -> None:
    jobs = plan(["cat", "dog", "noto"], ["paper"])
    found = dict(zip(jobs, [result_of(1, 0.5, 0.7, 0.4), result_of(0, 1, 0.9, 0), result_of(0.5, 0, 1, 0)],
                     strict=True))
    table = table_of(found)
    assert table["h_of_ceiling"].tolist() == [0.5, 0, 0] and table["kind"].tolist() == ["object", "object", "style"]
    everything, objects, styles = summary(table)
    assert (everything["concepts"], everything["ua"], everything["ira"]) == (3, 0.5, 0.5)
    assert objects["cra"] == pytest.approx(0.8) and objects["cra_ci95"] == pytest.approx([0.7, 0.9])
    assert styles["ua"] == 0.5 and "ua_ci95" not in styles, "one concept has no spread over concepts"
    assert objects["lowest"] == {"concept": "dog", "h_of_ceiling": 0}


@needs_emoji
def test_only_jobs_of_the_first_seed_end_in_an_attack(bench: Bench, few, tmp_path: Path) -> None:
    jobs = short_plan("cat", presets=("balanced",), seeds=(3, 4))
    attacked = Bench(bench.pipe, bench.judge, tmp_path, "emoji", steps=2, shared=bench.shared, attack_seed=3,
                     attack=InversionBudget(tokens=1, steps=1, images=2, references=2))
    run_benchmark(attacked, jobs, command="fmn-nb benchmark", log=lambda line: None)
    assert pd.read_csv(tmp_path / "results.csv")["attack_images"].fillna(0).tolist() == [2, 0]
    assert all(attacked.stored(job) for job in jobs), "both are done"


def test_the_figure_shows_every_concept_and_says_so_in_words() -> None:
    jobs = plan(["cat", "dog"], ["balanced", "paper"])
    table = table_of({job: result_of(1 if job.preset == "balanced" else 0, 0.5, 0.7, 0.4) for job in jobs})
    figure = forgetting_against_keeping(table)
    (axes,) = figure.axes
    assert [len(points.get_offsets()) for points in axes.collections] == [2, 2]
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"balanced", "paper"}
    assert "balanced: 2 concepts, UA 1.00 on average, kept 0.60" in figure.words
    with pytest.raises(ValueError, match="no rows"):
        forgetting_against_keeping(table[:0])
    many = pd.concat([table.assign(preset=f"variant-{number}") for number in range(7)])
    figure = forgetting_against_keeping(many)
    (axes,) = figure.axes
    assert sum(text.get_text().startswith("variant-") for text in axes.get_legend().get_texts()) == 7
    looks = {(tuple(dots.get_facecolor()[0]), len(dots.get_paths()[0].vertices)) for dots in axes.collections}
    assert len(looks) == 7


def test_the_command_reads_its_options_before_anything_heavy(tmp_path: Path) -> None:
    run = CliRunner().invoke
    for options, text in ((["--concepts", "unicorn"], "no 'unicorn'"), (["--presets", "best"], "no preset 'best'"),
                          (["-s", "steps=3"], "preset.name=value"), (["--seeds", "x"], "invalid literal")):
        result = run(main, ["benchmark", "--out", str(tmp_path), *options])
        assert result.exit_code == 2 and text in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_results_are_plain_json(tmp_path: Path) -> None:
    (job,) = plan(["birthday cake"], ["balanced"])
    assert job.name == "birthday-cake-balanced-seed0"
    assert json.loads(json.dumps(job.made_from())) == job.made_from(), "what is stored equals what is compared"
