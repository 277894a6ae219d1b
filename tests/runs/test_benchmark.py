"""The results table: what is done, what is skipped, that resuming changes nothing, and that figures are right."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from click.testing import CliRunner
from sessions import few_drawings

from fmn_nb.attacks.attack import InversionBudget
from fmn_nb.attacks.floor import ATTACKS
from fmn_nb.cli import main
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation.oracle import Distance, OracleReport
from fmn_nb.evaluation.session import Sampling
from fmn_nb.files import read_json, write_json
from fmn_nb.forgetting.settings import PRESETS, SettingsError, settings_for
from fmn_nb.plots.style import LOOKS
from fmn_nb.plots.tradeoff import cost_of_presets, forgetting_against_keeping
from fmn_nb.runs import executors, measure
from fmn_nb.runs.benchmark import (
    BenchmarkError,
    kept_rows,
    plan_jobs,
    read_overrides,
    run_benchmark,
    schedule,
    tuned_on,
)
from fmn_nb.runs.earlier import DISTANCES_FILE, EXCESS_FILE
from fmn_nb.runs.means import COSTS, distance_summary, excess_summary, summary
from fmn_nb.runs.measure import CACHE, Bench
from fmn_nb.runs.stopping import Stopped
from fmn_nb.runs.tables import groups_of, table_of
from fmn_nb.stats import mean_difference_interval

SHORT = {"steps": 1, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "batch_size": 1, "retain_batch": 1}


@pytest.fixture
def bench(tmp_path) -> Bench:
    """The emoji model with two sampling steps: the figures mean nothing, the plumbing is the same."""
    return Bench("emoji", tmp_path / "work", Sampling(steps=2, batch=6))


def short_plan(*concepts: str, presets=("balanced",), **options):
    overrides = {"balanced": SHORT, "paper": {**SHORT, "retain_count": 0}}
    return plan_jobs(VOCABULARY, concepts, presets, overrides={name: overrides[name] for name in presets}, **options)


def run(bench, jobs, **options):
    """The results' folder."""
    made = {"command": "fmn-nb benchmark"}
    return run_benchmark(bench, jobs, bench.work.parent / "out", made=made, **{"log": str, **options}).parent


@pytest.fixture
def few(monkeypatch):
    """A job draws two images of the forget set and four of the retain set."""
    monkeypatch.setattr(measure, "drawings", few_drawings)


def test_all_concepts_of_the_world_are_planned_and_words_corrected() -> None:
    jobs = plan_jobs(VOCABULARY)
    assert len(jobs) == 2 * (24 + 6 + 4 + 3) and len({job.name for job in jobs}) == len(jobs)
    words = {job.concept.name: job.towards for job in jobs if job.group == "word"}
    assert words == {"mouse": "computer mouse", "bow": "archery bow", "bat": "cricket bat"}
    assert [job.preset for job in jobs[:2]] == ["balanced", "paper"] and jobs[0].concept == jobs[1].concept
    assert jobs[0].settings == PRESETS["balanced"] and jobs[1].settings == PRESETS["paper"]
    assert len(plan_jobs(VOCABULARY, ["styles", "cat", "noto"], seeds=[0, 1])) == 2 * 7 * 2  # noto counts once


@pytest.mark.parametrize(("wrong", "text"), [
    ({"concepts": ["unicorn"]}, "no 'unicorn'; groups: objects, styles"), ({"size": "huge"}, "quick or full"),
    ({"presets": ["best"]}, "no preset 'best'"), ({"presets": []}, "no preset is asked for"),
    ({"seeds": [-1]}, "whole number"), ({"seeds": []}, "nothing to do"),
    ({"presets": ["paper"], "overrides": {"balanced": {}}}, "isn't asked for"),
    ({"overrides": {"paper": {"rate": 1}}}, "no setting 'rate'"),
])
def test_wrong_requests_tell_what_there_is(wrong, text) -> None:
    with pytest.raises(ValueError, match=text):
        plan_jobs(VOCABULARY, **wrong)


def test_settings_come_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("paper: {learning_rate: 1e-4, positions: [words]}\nbalanced: {steps: 9}\ntuned_on: [cat]\n")
    assert tuned_on(file, VOCABULARY) == ["cat"] and tuned_on(None) == []
    (tmp_path / "wrong.yaml").write_text("tuned_on: [Cat]")
    with pytest.raises(SettingsError, match="tuned_on 'Cat', which the emoji world doesn't have .did you mean 'cat'"):
        tuned_on(tmp_path / "wrong.yaml", VOCABULARY)
    found = read_overrides(file, ["paper.steps=50", "paper.learning_rate=2e-4"], ["paper"])
    assert found == {"paper": {"learning_rate": 2e-4, "positions": ["words"], "steps": 50}}
    (job,) = plan_jobs(VOCABULARY, ["cat"], ["paper"], overrides=found)
    assert (job.settings.learning_rate, job.settings.steps, job.settings.norm) == (2e-4, 50, "published")
    alias = tmp_path / "alias.yaml"
    alias.write_text("paper: &same {steps: 3}\nbalanced: *same\n")
    assert read_overrides(alias, ["paper.steps=50"]) == {"paper": {"steps": 50}, "balanced": {"steps": 3}}
    for text in ("paper=1", "steps=3", "paper.steps"):
        with pytest.raises(SettingsError, match="name=value"):
            read_overrides(None, [text])
    for content in ("paper: 3", "- paper", "paper: [", "tuned_on: cat"):
        file.write_text(content)
        with pytest.raises(ValueError, match="settings.yaml"):
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
    jobs = plan_jobs(VOCABULARY, ["cat"], ["paper-words", "paper"], overrides=read_overrides(file, presets=["all"]))
    assert [job.name for job in jobs] == ["cat-paper-words-seed0", "cat-paper-seed0"]
    assert jobs[0].settings == settings_for("paper", {"positions": ("words",)}) and jobs[1].settings.steps == 3
    few = {"paper": {"steps": 3, "seeds": [1]}}
    jobs = plan_jobs(VOCABULARY, ["cat"], ["balanced", "paper"], seeds=[0, 1], overrides=few)
    assert [job.name for job in jobs] == ["cat-balanced-seed0", "cat-balanced-seed1", "cat-paper-seed1"]
    assert jobs[-1].settings == settings_for("paper", {"steps": 3})
    with pytest.raises(ValueError, match="nothing to do"):
        plan_jobs(VOCABULARY, ["cat"], ["paper"], overrides=few)
    with pytest.raises(SettingsError, match="are a list"):
        plan_jobs(VOCABULARY, ["cat"], ["paper"], overrides={"paper": {"seeds": 1}})
    for name in ("../words", "all", "balanced"):
        file.write_text(f"{name}: {{preset: paper}}")
        with pytest.raises(SettingsError, match="name a variant"):
            read_overrides(file)


def test_a_killed_benchmark_goes_on_and_ends_in_the_same_table(bench: Bench, few, tmp_path: Path) -> None:
    jobs, lines = short_plan("cat", "mouse", presets=("balanced", "paper")), []
    other = replace(bench, work=tmp_path / "halves" / "work")
    whole = run(bench, jobs)
    halves = run(other, jobs, limit=1)
    assert len(pd.read_csv(halves / "results.csv")) == 1
    assert read_json(halves / "results.json")["missing"] == [job.name for job in jobs[1:]]
    run(other, jobs, log=lines.append)
    assert "4 jobs, 1 done before, 3 to do now" in lines[0] and "balanced: 1 to do, " in lines[0]
    assert "paper: 2 to do, not timed yet" in lines[0]
    tables = [pd.read_csv(one / "results.csv").drop(columns=[*COSTS, "job_seconds"]) for one in (whole, halves)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["overshadowed_after"].notna().tolist() == [False, False, True, True]
    stamps = {file: file.stat().st_mtime_ns for file in bench.work.glob("*.json")}
    run(bench, jobs)
    assert stamps == {file: file.stat().st_mtime_ns for file in bench.work.glob("*.json")}, "nothing is done twice"
    made = read_json(whole / "results.json")
    assert made["command"] == "fmn-nb benchmark" and made["versions"]["torch"] and "missing" not in made
    assert made["settings"]["balanced"]["steps"] == 1 and made["fingerprint"] == bench.shared["fingerprint"]
    assert sorted(path.name for path in whole.iterdir()) == [
        "cost.png", "forgetting-against-keeping.png", "results.csv", "results.json"]


def test_what_the_base_model_draws_is_drawn_once(bench: Bench, few) -> None:
    def drawn(ending):
        return {file: file.stat().st_mtime_ns for file in (bench.work / CACHE).rglob(f"*.{ending}")}

    run(bench, short_plan("cat"))
    images = drawn("png")
    assert len(images) == 6 and not drawn("safetensors"), "the first seed's jobs draw all themselves: the cost is whole"
    balanced, paper = short_plan("cat", presets=("balanced", "paper"), seeds=[0, 1])[2:]
    (other,) = plan_jobs(VOCABULARY, ["cat"], ["more"], [0, 1], overrides={
        "more": {"preset": "balanced", **SHORT, "learning_rate": 1e-3}})[1:]
    assert not (balanced.draws or paper.draws or other.draws)
    run(bench, [balanced])
    latents = drawn("safetensors")
    run(bench, [other])
    assert len(latents) == 2 and latents == drawn("safetensors"), "references and retain images"
    images |= drawn("png")
    run(bench, short_plan("cat", presets=("paper",)))
    assert images == drawn("png"), "other presets are judged beside the same images"


def test_other_settings_or_another_model_are_other_jobs(bench: Bench, few) -> None:
    (job,) = short_plan("cat")
    run(bench, [job])
    assert bench.stored(job) is not None
    (more,) = plan_jobs(VOCABULARY, ["cat"], ["balanced"], overrides={"balanced": {**SHORT, "steps": 2}})
    assert more.name == job.name and bench.stored(more) is None
    other = replace(bench)
    vars(other)["shared"] = {**bench.shared, "fingerprint": "0"}
    assert other.stored(job) is None


def test_a_table_grows_without_its_work_folder(bench: Bench, few, tmp_path: Path) -> None:
    jobs, lines = short_plan("cat", "frog", presets=("balanced", "paper")), []
    whole = run(replace(bench, work=tmp_path / "whole" / "work"), jobs)
    out = run(bench, [job for job in jobs if job.preset == "balanced"])
    shutil.rmtree(bench.work)
    run(bench, jobs, log=lines.append)
    assert "4 jobs, 2 done before, 2 to do now" in lines[0] and len(list(bench.work.glob("*.json"))) == 2
    timed = [*COSTS, "job_seconds"]
    tables = [pd.read_csv(one / "results.csv").drop(columns=timed) for one in (whole, out)]
    pd.testing.assert_frame_equal(*tables)
    shutil.rmtree(bench.work)
    assert len(kept_rows(bench, jobs, out)) == 4
    others = plan_jobs(VOCABULARY, ["cat"], ["balanced"], overrides={"balanced": {**SHORT, "steps": 2}})
    assert not kept_rows(bench, others, out), "other settings"
    assert not kept_rows(replace(bench, sampling=Sampling(steps=3, batch=6)), jobs, out), "drawn in another way"
    attacked = replace(bench, attack=InversionBudget(tokens=1, steps=1, images=2, references=2))
    assert not kept_rows(attacked, jobs, out), "to be attacked"
    twice = short_plan("cat", presets=("balanced",), seeds=(0, 1))
    run(attacked, twice)
    shutil.rmtree(bench.work)
    assert set(kept_rows(attacked, twice, out)) == set(twice), "as attacked as it was: its first seed"
    other = replace(attacked, attack_seeds=(1,))
    assert set(kept_rows(other, twice, out)) == {twice[0]}, "the other seed wasn't attacked"
    (out / "results.json").write_text("{")
    assert not kept_rows(bench, jobs, out)


def test_a_failing_job_is_named_and_tried_again(bench: Bench, few, tmp_path: Path, monkeypatch) -> None:
    jobs, forget = short_plan("cat", "dog"), measure.forget

    def failing(pipe, concept, **options):
        if concept.name == "cat":
            raise RuntimeError("the loss became nan")
        return forget(pipe, concept, **options)

    monkeypatch.setattr(measure, "forget", failing)
    with pytest.raises(BenchmarkError, match="cat-balanced-seed0: the loss became nan"):
        run(bench, jobs)
    out = tmp_path / "out"
    assert pd.read_csv(out / "results.csv")["concept"].tolist() == ["dog"] and read_json(out / "results.json")["failed"]
    monkeypatch.setattr(measure, "forget", forget)
    run(bench, jobs)
    assert pd.read_csv(out / "results.csv")["concept"].tolist() == ["cat", "dog"]
    assert "failed" not in read_json(out / "results.json")
    with pytest.raises(BenchmarkError, match="no job is done"):
        run(bench, short_plan("frog"), limit=0)


def test_a_stopped_benchmark_says_how_many_jobs_are_done(bench: Bench, few, monkeypatch) -> None:
    jobs, attempt = short_plan("cat", "frog"), Bench.attempt

    def struck(self, job):
        if job.concept.name == "frog":
            raise KeyboardInterrupt
        return attempt(self, job)

    monkeypatch.setattr(Bench, "attempt", struck)
    with pytest.raises(Stopped, match="^1 of 2 jobs finished; the same command continues$"):
        run(bench, jobs)


def result_of(ua: float, ira: float, cra: float, h: float) -> dict:
    shares = {"ua": ua, "ira": ira, "cra": cra, "h": h}
    after = {**shares, "ceiling": 0.8, "images": 10, "ci95": {name: [0.0, 1.0] for name in shares}}
    return {"before": {**after, "ua": 0.0}, "after": after, "forgetting": {"steps": 3, "seconds": 1.5}}


def test_the_table_and_its_means_by_hand() -> None:
    jobs = plan_jobs(VOCABULARY, ["cat", "dog", "noto"], ["paper"])
    found = dict(zip(jobs, [result_of(1, 0.5, 0.7, 0.4), result_of(0, 1, 0.9, 0), result_of(0.5, 0, 1, 0)],
                     strict=True))
    table = table_of(found)
    assert table["h_of_ceiling"].tolist() == [0.5, 0, 0] and table["kind"].tolist() == ["object", "object", "style"]
    everything, objects, styles = summary(table)
    assert (everything["concepts"], everything["ua"], everything["ira"]) == (3, 0.5, 0.5)
    assert objects["cra"] == pytest.approx(0.8) and objects["cra_ci95"] == [0, 1], "two concepts say little"
    assert styles["ua"] == 0.5 and "ua_ci95" not in styles, "one concept has no spread over concepts"
    assert objects["lowest"] == {"concept": "dog", "h_of_ceiling": 0}


def test_a_table_of_many_methods_says_what_each_needs_and_how_they_differ() -> None:
    jobs = plan_jobs(VOCABULARY, ["cat", "dog", "frog", "noto"], ["paper", "balanced"], seeds=[0, 1])
    found = {job: result_of(*((1, 0.5, 0.7, 0.6) if job.preset == "paper" else (0.8, 1, 0.9, 0.9 - 0.1 * job.seed)))
             for job in jobs if (job.preset, job.seed) != ("paper", 1)}
    for job, result in found.items():
        seconds = 10.0 if job.draws else 1.0
        result |= {"draws": job.draws, "facts": {"needs_images": True, "linear_patch": True}, "seconds": 2 * seconds}
        result["forgetting"] |= {"seconds": seconds, "patch_bytes": 8}
    found[jobs[4]] |= result_of(0, 0, 0, 0)  # frog, paper
    table = table_of(found, ["cat"])
    assert table["tuned_on"].sum() == 3 and table["needs_images"].all() and table["drew_all"].sum() == 8
    rows = {(row["preset"], row["kind"]): row for row in summary(table)}
    paper, balanced = rows["paper", "all"], rows["balanced", "all"]
    assert paper["concepts"] == balanced["concepts"] == 3, "what settings were tuned on is in no mean"
    assert balanced["seconds"] == 10.0 and "against" not in rows["paper", "object"]
    pairs = paper["against"]["balanced"]
    assert (pairs["concepts"], pairs["pairs"]) == (3, 3), "paired by concept and seed"
    assert pairs["h"] == pytest.approx((0.6 - 0.9) * 2 / 3 - 0.9 / 3) and pairs["ira"] == pytest.approx(-2 / 3)
    assert pairs["h_ci95"] == pytest.approx([-1, 0.360531]), "Student's, of -.3, -.3 and -.9"
    assert balanced["against"]["paper"]["h"] == -pairs["h"]
    assert not summary(table[table["concept"].isin(["cat", "dog"])])[0]["against"], "too few concepts for a difference"
    figure = cost_of_presets(list(rows.values()))
    assert "balanced: H 0.85, 10 seconds of forgetting, 8 bytes of the patch" in figure.words
    assert [len(axes.containers) for axes in figure.axes] == [2, 2]
    everything = summary(table_of(found, [job.concept.name for job in jobs]))
    assert everything[0]["concepts"] == 4, "there are no others"


def test_several_jobs_at_a_time_go_through_the_sweeps_executor(bench: Bench, few, monkeypatch) -> None:
    def executed(todo, attempt, workers):
        assert workers == 2
        for job, do in pickle.loads(pickle.dumps([(job, attempt) for job in todo])):
            yield job, "its worker died" if job.concept.name == "dog" else do(job)

    monkeypatch.setattr(executors, "executed", executed)
    with pytest.raises(BenchmarkError, match="dog-balanced-seed0: its worker died"):
        run(bench, short_plan("cat", "dog"), workers=2)
    assert pd.read_csv(bench.work.parent / "out" / "results.csv")["concept"].tolist() == ["cat"]


@pytest.mark.slow
def test_jobs_can_be_done_by_several_workers_and_give_the_same(bench: Bench, tmp_path: Path) -> None:
    jobs, lines = short_plan("cat", "dog"), []
    short = Bench("emoji", bench.work, Sampling(steps=1, batch=48))
    run(short, jobs, workers=2, log=lines.append)
    alone = replace(short, work=tmp_path / "alone" / "work")
    tables = [pd.read_csv(one / "results.csv").drop(columns=[*COSTS, "job_seconds"])
              for one in (tmp_path / "out", run(alone, jobs))]
    pd.testing.assert_frame_equal(*tables)
    assert sorted(line[:5] for line in lines[1:]) == ["[1/2]", "[2/2]"]
    assert schedule(short, jobs) == ["2 jobs, 2 done before, 0 to do now"]


def test_only_jobs_of_the_attack_seeds_end_in_an_attack(bench: Bench, few) -> None:
    jobs = short_plan("cat", presets=("balanced",), seeds=(3, 4))
    attacked = replace(bench, attack_seeds=(3,), attack=InversionBudget(tokens=1, steps=1, images=2, references=2))
    table = pd.read_csv(run(attacked, jobs) / "results.csv")
    assert table["attack_images"].fillna(0).tolist() == [2, 0]
    assert all(attacked.stored(job) for job in jobs), "both are done"
    shutil.rmtree(bench.work)
    pd.testing.assert_frame_equal(pd.read_csv(run(attacked, jobs) / "results.csv"), table)
    assert not list(bench.work.glob("*.json")), "the table keeps the attack"
    both = replace(attacked, attack_seeds=(3, 4))
    assert pd.read_csv(run(both, jobs) / "results.csv")["attack_images"].tolist() == [2, 2]


def test_jobs_on_what_an_oracle_never_learned_end_beside_it(bench: Bench, few, oracle_folder, monkeypatch) -> None:
    rows = {("relearning", "first"): {"steps": 2, "success": 0.75, "floor": 0.25, "unchanged": 1.0, "excess": 0.5,
                                      "low": 0.1, "high": 0.9, "residual": 2 / 3, "withstood": False, "images": 4,
                                      "floor_images": 4}}
    attacks = pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(list(rows), names=["attack", "budget"]))
    revive = pd.DataFrame({"forgetting model": [2.0], "oracle": [float("nan")]}, index=["relearning"])
    asked = []

    def compared(session, concept, patch, oracles, seed, size, chosen):
        asked.append((concept.name, seed, len(oracles), session.sampling.cache))
        assert chosen == ATTACKS
        return OracleReport(attacks, revive, {"kernel": Distance(0.3, 0.5)}, budgets="fixed")

    monkeypatch.setattr(measure, "compared", compared)
    beside = replace(bench, oracles=(str(oracle_folder),))
    jobs = short_plan("cat", "dog", presets=("balanced",), seeds=(0, 1))
    out = run(beside, jobs)
    assert asked == [("cat", 0, 1, bench.work / CACHE)], "the dog was taught, and one seed has to do"
    (row,) = pd.read_csv(out / EXCESS_FILE).to_dict("records")
    assert (row["concept"], row["attack"], row["excess"], row["steps_to_revive"]) == ("cat", "relearning", 0.5, 2)
    (apart,) = pd.read_csv(out / DISTANCES_FILE).to_dict("records")
    assert (apart["concept"], apart["distance"], apart["scaled"]) == ("cat", "kernel", 0.6)
    said = read_json(out / "results.json")["oracle"]
    assert said["summary"][0]["excess"] == 0.5 and said["budgets"] and len(said["oracles"]) == 1
    assert said["summary"][0]["median_steps"] == 2 and said["distances"][0]["scaled"] == 0.6
    assert beside.stored(jobs[0]) and not bench.oracles and bench.stored(jobs[0]), "done, with it and without"
    assert replace(beside, beside=("relearning",)).stored(jobs[0]) is None, "other attacks"
    with monkeypatch.context() as later:
        later.setattr(measure, "read_budgets", lambda: SimpleNamespace(source="others"))
        assert replace(beside).stored(jobs[0]) is None and replace(beside).stored(jobs[1]), "other budgets"
    tables = "results.csv", EXCESS_FILE, DISTANCES_FILE
    before, made = [pd.read_csv(out / name) for name in tables], read_json(out / "results.json")
    shutil.rmtree(bench.work)
    assert run(beside, jobs) == out and not list(bench.work.glob("*.json")), "a table keeps its attacks as well"
    for name, table in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(pd.read_csv(out / name), table)
    assert read_json(out / "results.json") == made
    run(bench, short_plan("cat", presets=("paper",)))
    assert pd.read_csv(out / "results.csv")["preset"].tolist() == ["balanced"] * 4 + ["paper"], "the others stay"
    for name, table in zip(tables[1:], before[1:], strict=True):
        pd.testing.assert_frame_equal(pd.read_csv(out / name), table)
    with pytest.raises(BenchmarkError, match="cat-balanced-seed0 in .*results.csv has another oracle"):
        run(replace(beside, beside=("relearning",)), short_plan("cat", presets=("paper",)))
    (out / DISTANCES_FILE).unlink()
    assert set(kept_rows(beside, jobs, out)) == set(jobs), "of a table before it had distances"
    lines = []
    run(bench, plan_jobs(VOCABULARY, ["cat"], ["balanced"], overrides={"balanced": {**SHORT, "steps": 2}}),
        log=lines.append)
    assert "rows of other settings go from" in lines[0] and lines[0].endswith("results.csv: balanced")
    assert pd.read_csv(out / "results.csv")["preset"].tolist() == ["paper", "balanced"]
    assert not (out / EXCESS_FILE).exists(), "of other settings"
    run(replace(bench, sampling=Sampling(steps=3, batch=6)), short_plan("cat"), log=lines.append)
    assert "is of another model, judge or size, or made in another way" in lines[-4] + lines[-3]
    run(beside, jobs)
    assert jobs[0] not in kept_rows(replace(beside, beside=("relearning",)), jobs, out), "other attacks"


def test_excess_is_averaged_over_concepts_that_no_tuning_saw() -> None:
    rows = [{"concept": name, "preset": "uce", "attack": "relearning", "budget": "first", "steps": 2, "success": s,
             "floor": 0.1, "unchanged": 1.0, "excess": s - 0.1, "images": 10, "floor_images": 10,
             "steps_to_revive": revived, "whole_curve": name != "bird", "tuned_on": name == "cat"}
            for name, s, revived in (("cat", 1.0, 1), ("dog", 0.3, float("nan")), ("frog", 0.5, 2))]
    (mean,) = excess_summary(pd.DataFrame(rows))
    assert mean["concepts"] == 2 and mean["excess"] == pytest.approx(0.3)
    assert mean["excess_ci95"] == [round(x, 6) for x in mean_difference_interval([[(3, 10)], [(5, 10)]],
                                                                                 [[(1, 10)], [(1, 10)]])]
    assert (mean["curves"], mean["revived"], "median_steps" in mean) == (2, 1, False), "half lie beyond the curve"
    more = [{**rows[1], "concept": name, "steps_to_revive": steps} for name, steps in zip(
        ("car", "hat", "bird"), (8, 4, 1), strict=True)]
    more[2]["whole_curve"] = False
    (mean,) = excess_summary(pd.DataFrame([*rows, *more]))
    assert (mean["curves"], mean["revived"], mean["median_steps"]) == (4, 3, 6), "of 2, 4, 8 and one beyond"
    assert "curves" not in excess_summary(pd.DataFrame(rows).drop(columns="whole_curve"))[0]
    away = pd.DataFrame([{"concept": name, "preset": "uce", "distance": "kernel", "scaled": value,
                          "tuned_on": name == "cat"} for name, value in (("cat", 9.0), ("dog", 0.2), ("frog", 0.4))])
    (mean,) = distance_summary(away)
    assert mean["concepts"] == 2 and mean["scaled"] == 0.3 and mean["scaled_ci95"] == [-0.97062, 1.57062], "Student's"


def test_more_variants_than_looks_share_those_of_their_methods() -> None:
    few = {f"esd-{rate}": settings_for("esd-x", {"learning_rate": rate * 1e-4}) for rate in range(1, LOOKS + 1)}
    assert groups_of(few) is None
    assert set(groups_of({**few, "uce": PRESETS["uce"]}).values()) == {"esd", "uce"}
    apart = groups_of({**few, "uce": PRESETS["uce"], "esd-u": PRESETS["esd-u"]})
    assert (apart["esd-1"], apart["esd-u"], apart["uce"]) == ("esd, lora", "esd, except_cross_attention", "uce")
    table = pd.DataFrame([{"preset": name, "concept": "cat", "ua": 0.5, "ira": 1.0, "cra": 1.0, "base_ira": 1.0,
                           "base_cra": 1.0} for name in apart])
    costs = [{"preset": name, "kind": "all", "h": 0.5, "seconds": 1.0, "patch_bytes": 10.0} for name in apart]
    for figure in (forgetting_against_keeping(table, apart), cost_of_presets(costs, apart)):
        names = {text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()}
        assert names >= set(apart.values()) and not names & set(few)


def test_the_figure_shows_every_concept_and_says_so_in_words() -> None:
    jobs = plan_jobs(VOCABULARY, ["cat", "dog"], ["balanced", "paper"])
    table = table_of({job: result_of(1 if job.preset == "balanced" else 0, 0.5, 0.7, 0.4) for job in jobs})
    figure = forgetting_against_keeping(table)
    (axes,) = figure.axes
    assert [len(dots.get_xdata()) for dots in axes.lines[2:]] == [2, 2]
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"balanced", "paper"}
    assert "balanced: 2 concepts, UA 1.00 on average, kept 0.60" in figure.words
    with pytest.raises(ValueError, match="no rows"):
        forgetting_against_keeping(table[:0])
    many = pd.concat([table.assign(preset=f"variant-{number}") for number in range(7)])
    figure = forgetting_against_keeping(many)
    (axes,) = figure.axes
    assert sum(text.get_text().startswith("variant-") for text in axes.get_legend().get_texts()) == 7
    looks = {(dots.get_color(), dots.get_marker()) for dots in axes.lines[2:]}
    assert len(looks) == 7


def test_the_command_reads_its_options_before_anything_heavy(tmp_path: Path) -> None:
    for options, text in ((["--concepts", "unicorn"], "no 'unicorn'"), (["--presets", "best"], "no preset 'best'"),
                          (["--model", "no/world"], "belongs to no known world"),
                          (["-s", "steps=3"], "preset.name=value"),
                          (["--seeds", "x"], "--seeds takes whole numbers, such as 0,1, not 'x'"),
                          (["--attack-seeds", "0,2"], "no job has the attack seed 2; the seeds are 0")):
        result = CliRunner().invoke(main, ["benchmark", "--out", str(tmp_path), *options])
        assert result.exit_code == 2 and text in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_is_to_be_done_and_does_nothing(tmp_path: Path) -> None:
    words = ["--plan", "--concepts", "styles", "--presets", "balanced", "--seeds", "0,1", "--work", str(tmp_path / "w")]
    result = CliRunner().invoke(main, ["benchmark", "--out", str(tmp_path), *words])
    assert result.output == "balanced: 12 to do, not timed yet\n12 jobs, 0 done before, 12 to do now\n"
    assert not list(tmp_path.iterdir())


class Stub(Bench):
    """A bench whose jobs take no time."""

    @property
    def session(self) -> SimpleNamespace:
        return SimpleNamespace(vocabulary=VOCABULARY)

    @cached_property
    def shared(self) -> dict:
        return {"fingerprint": "f", "judge": "j", "sampling_steps": 2, "guidance": 1.0, "batch": 6}

    def attempt(self, job) -> None:
        facts = {"needs_images": True, "needs_retain_words": True, "linear_patch": True, "patch": "lora"}
        made = {"made_from": self.made_from(job), "group": job.group, "draws": job.draws, "facts": facts,
                "seconds": 1.0, **result_of(0.9, 0.8, 0.8, 0.83)}
        made["forgetting"] |= {"patch_bytes": 1000}
        if self.attacks(job):
            made["attack"] = {"budget": asdict(self.attack), "success": 0.5, "low": 0.0, "high": 1.0, "count": 12}
        write_json(self.file_of(job), made)


@pytest.fixture
def stubbed(tmp_path):
    """A function that does jobs of a `Stub` and returns the concepts in the table, each with its attack's success."""
    def done(*concepts: str, attack: int = 0, out: str = "out", **options) -> dict:
        bench = Stub("emoji", tmp_path / "work", attack=InversionBudget(steps=attack, images=12) if attack else None)
        run_benchmark(bench, plan_jobs(VOCABULARY, concepts, ["balanced"]), tmp_path / out, made={"command": "x"},
                      **options)
        table = pd.read_csv(tmp_path / out / "results.csv").set_index("concept")
        return table["attack_success"].to_dict() if "attack_success" in table else dict.fromkeys(table.index)

    return done


def test_rows_that_lack_an_attack_stay_until_it_is_made(stubbed, tmp_path) -> None:
    assert stubbed("cat", "frog", "dog").keys() == {"cat", "frog", "dog"}
    found = stubbed("cat", "frog", "dog", attack=50, limit=1)
    assert found.keys() == {"cat", "frog", "dog"} and sum(value == 0.5 for value in found.values()) == 1
    assert len(read_json(tmp_path / "out" / "results.json")["missing"]) == 2
    assert set(stubbed("cat", "frog", "dog", attack=50).values()) == {0.5}


def test_one_table_never_mixes_budgets(stubbed) -> None:
    stubbed("cat", "frog", attack=300)
    stubbed("cat", attack=50, out="other")
    for out in ("third", "out"):
        with pytest.raises(BenchmarkError, match="has the attack .*one table can't hold both; ask for one of them"):
            stubbed("cat", "frog", out=out)
    assert set(stubbed("cat", "frog", attack=50, out="third").values()) == {0.5}


def test_budgets_that_would_be_mixed_are_refused_before_any_work(tmp_path) -> None:
    jobs, work = plan_jobs(VOCABULARY, ["cat"], ["balanced"], [0, 1]), tmp_path / "work"
    run_benchmark(Stub("emoji", work, attack=InversionBudget(steps=300, images=12), attack_seeds=(0, 1)), jobs,
                  tmp_path / "out", made={"command": "x"})
    before = sorted(work.iterdir())
    with pytest.raises(BenchmarkError, match="one table can't hold both; .*for the same --attack-seeds"):
        run_benchmark(Stub("emoji", work, attack=InversionBudget(steps=50, images=12), attack_seeds=(0,)), jobs,
                      tmp_path / "new", made={"command": "x"})
    assert sorted(work.iterdir()) == before and not (tmp_path / "new").exists()
