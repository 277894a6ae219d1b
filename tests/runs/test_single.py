"""`fmn-nb forget` and `fmn-nb evaluate`: a patch without notebooks, and any patch scored as from Python."""

from functools import partial

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sessions import few_drawings

import fmn_nb as fmn
from fmn_nb.cli import main
from fmn_nb.concepts import Concept
from fmn_nb.evaluation import evaluate, evaluator
from fmn_nb.evaluation.quality import Quality
from fmn_nb.files import read_json
from fmn_nb.forgetting import settings_for
from fmn_nb.models import conditions
from fmn_nb.runs.metrics import validate
from fmn_nb.runs.single import PatchRequest

SHORT = {"steps": 2, "reference_count": 2, "reference_steps": 2, "retain_count": 2, "batch_size": 1, "retain_batch": 1}
SINGLE = [word for name, value in SHORT.items() for word in ("-s", f"{name}={value}")]


@pytest.fixture
def command(monkeypatch, tmp_path, emoji):
    """A function that runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fmn_nb.models.load", lambda name, config=None: emoji)
    return lambda *words: CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def few(monkeypatch):
    """`evaluate` draws two images of the forget set and four of the retain set, in four steps, and no distances."""
    monkeypatch.setattr(evaluator, "drawings", few_drawings)
    monkeypatch.setattr(evaluator, "probe_drawings", lambda *_: [])
    monkeypatch.setattr(evaluator.Quality, "of", lambda *_: Quality())
    quick = partial(evaluate, steps=4, batch=6)
    monkeypatch.setattr("fmn_nb.evaluation.evaluate", quick)
    return quick


def test_forget_leaves_a_patch_and_says_how_to_use_it(command, emoji, tmp_path):
    result = command("forget", "frog", "--seed", 3, *SINGLE)
    assert result.exit_code == 0, result.output
    out = "runs/patches/frog-balanced-seed3"
    lines = result.stdout.splitlines()
    patch = fmn.Patch.load(out)
    assert lines[0] == f"patch: {out}" and f"2 steps in {patch.report['seconds']:.1f} s, {patch.nbytes:,}" in lines[1]
    assert f"fmn-nb evaluate {out} --concept frog --kind object" in result.stdout
    assert f'pipe.load_lora_weights("{out}")' in result.stdout and not list(tmp_path.rglob("*checkpoint*"))
    same = fmn.forget(emoji, "frog", seed=3, **SHORT)
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in patch.tensors.items())
    assert patch.info["settings"] == settings_for("balanced", SHORT).to_dict() and patch.info["preset"] == "balanced"


def test_a_refused_request_leaves_no_folder(command, tmp_path):
    result = command("forget", "no such thing", *SINGLE)
    assert result.exit_code != 0 and not list((tmp_path / "runs").rglob("*.lock"))
    assert not any((tmp_path / "runs" / "patches").glob("*"))


def test_a_forgetting_that_was_stopped_goes_on(command, monkeypatch, tmp_path):
    asked = ["frog", *SINGLE, "-s", "steps=3", "-s", "checkpoint_every=1", "-s", "retain_count=0"]
    real = fmn.forgetting.forget

    def strike(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as struck:
        struck.setattr("fmn_nb.forgetting.forget", lambda *given, **options: real(*given, **options, callback=strike))
        stopped = command("forget", *asked, "--out", "p")
    assert stopped.exit_code == 130 and "the same command continues from p/.checkpoint" in stopped.output
    steps = []
    monkeypatch.setattr("fmn_nb.forgetting.forget", lambda *given, **options: real(
        *given, **options, callback=lambda progress: steps.append(progress.step)))
    assert command("forget", *asked, "--out", "p").exit_code == 0 and not (tmp_path / "p" / ".checkpoint").exists()
    assert steps and min(steps) > 1, "not from the beginning"
    assert command("forget", *asked, "--out", "whole").exit_code == 0
    one, whole = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("p", "whole"))
    assert one.keys() == whole.keys() and all(torch.equal(one[name], whole[name]) for name in one)


def test_forget_never_overwrites_what_another_command_made(command, monkeypatch, tmp_path):
    assert command("forget", "frog", *SINGLE, "--out", "p").exit_code == 0
    first = (tmp_path / "p" / "fmn.json").read_text()
    for words in (["cat", *SINGLE], ["frog", *SINGLE, "-s", "steps=1"], ["frog", "--seed", "1", *SINGLE]):
        refused = command("forget", *words, "--out", "p")
        assert refused.exit_code == 2 and "another command's; give another --out, or --again" in refused.output
    assert (tmp_path / "p" / "fmn.json").read_text() == first
    assert command("forget", "frog", *SINGLE, "--out", "p").exit_code == 0, "the same command may"
    assert command("forget", "cat", *SINGLE, "--out", "p", "--again").exit_code == 0
    assert read_json(tmp_path / "p" / "fmn.json")["concepts"][0]["name"] == "cat"


@pytest.mark.parametrize(("words", "says"), [
    (["forget", "kat"], "did you mean 'cat'?"), (["forget", "cat", "--preset", "balance"], "no preset 'balance'"),
    (["forget", "cat", "-s", "steps"], "a setting is given as name=value"),
    (["forget", "cat", "-s", "rate=1"], "no setting 'rate'"), (["forget", "cat", "-s", "steps=x"], "steps"),
    (["forget", "cat", "--out", "file"], "is a file"),
    (["forget", "cat", "--model", "x"], "no model 'x'"),
    (["evaluate", "nowhere", "--concept", "cat"], "there is no nowhere; taken are"),
    (["evaluate", "nowhere", "--concept", "kat"], "did you mean 'cat'?"), (["evaluate", "nowhere"], "--concept"),
])
def test_a_wrong_request_is_one_line_and_leaves_nothing(command, tmp_path, words, says):
    (tmp_path / "file").touch()
    result = command(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert says in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def uce(pipe, concept, guide, strength=0.5):
    """Unified concept editing (arXiv 2308.14761) as its authors' script exports it: the edited to_k and to_v alone.

    W' = (strength W + v e^T) (strength + e e^T)^-1, with e the concept's last token [in] and v = W e_guide [out].
    """
    # [2, tokens, in]
    given = conditions(pipe, [f"a photo of a {concept}", guide]).rows["encoder_hidden_states"].double()
    last = [len(pipe.tokenizer(prompt).input_ids) - 2 for prompt in (f"a photo of a {concept}", guide)]
    erased, wanted = (given[row, max(token, 1)] for row, token in enumerate(last))
    edited = {}
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            old = weight.detach().double()
            right = strength * torch.eye(len(erased), dtype=torch.float64) + torch.outer(erased, erased)
            edited[name] = ((strength * old + torch.outer(old @ wanted, erased)) @ right.inverse()).float().contiguous()
    return edited


def test_an_outsiders_uce_and_a_kohya_lora_score_as_from_python(command, few, emoji, tmp_path):
    edited = uce(emoji, "cat", "")
    save_file(edited, tmp_path / "erased_cat.safetensors")
    patch = fmn.forget(emoji, "cat", **SHORT)
    patch.save(tmp_path / "ours")
    patch.save(tmp_path / "kohya", layout="kohya")
    (tmp_path / "kohya" / "pytorch_lora_weights.safetensors").rename(tmp_path / "theirs.safetensors")
    own = dict(emoji.unet.named_parameters())
    by_hand = fmn.Patch("weights", {name: value - own[name].detach() for name, value in edited.items()})
    from_python = {change: few(emoji, Concept("cat"), patch=change, seed=1, cache=tmp_path / "cache")
                   for change in (by_hand, patch)}
    for what, same in (("erased_cat.safetensors", by_hand), ("theirs.safetensors", patch), ("ours", patch)):
        result = command("evaluate", what, "--concept", "cat", "--seed", 1, "--cache", "cache", "--out", f"{what}-out")
        assert result.exit_code == 0, result.output
        report = from_python[same]
        assert report.table().to_string() in result.stdout, what
        metrics = read_json(tmp_path / f"{what}-out" / "metrics.json")
        validate(metrics)
        expected = report.to_metrics()
        assert {name: metrics[name] for name in ("before", "after")} == {name: expected[name] for name in
                                                                         ("before", "after")}, what
        assert metrics["attention"] == pytest.approx(expected["attention"], abs=1e-5)
        assert metrics["preset"] == ("balanced" if what == "ours" else "none stated")
        assert ("forgetting" in metrics) == (what == "ours") and metrics["cost"]["patch_bytes"] == same.nbytes
        assert (tmp_path / f"{what}-out" / "outcomes.csv").is_file()
    assert load_file(tmp_path / "erased_cat.safetensors").keys() == edited.keys()
    words = ("evaluate", "theirs.safetensors", "--concept", "cat", "--seed", 1, "--cache", "cache", "--out", "ours-out")
    assert "another command's" in command(*words).output, "metrics of two patches never meet"


def test_a_patch_of_another_model_is_told_before_anything_is_drawn(command, emoji, monkeypatch, tmp_path):
    other = fmn.Patch("weights", {"conv_in.bias": torch.zeros(32)},
                      {"base": {"component": "unet", "fingerprint": "0", "name": "another"}})
    other.save(tmp_path / "patch")
    monkeypatch.setattr("fmn_nb.evaluation.evaluate", None)
    result = command("evaluate", "patch", "--concept", "cat")
    assert result.exit_code == 2 and "made for the base model another" in result.output


def test_the_request_that_a_patch_states_is_plain(tmp_path):
    request = PatchRequest.checked(["positions=[words]"], tmp_path, "computer mouse", concept="mouse")
    assert request.stated() == {
        "model": "emoji", "concept": "mouse", "kind": "object", "preset": "balanced", "seed": 0,
        "towards": "computer mouse", "references": str(tmp_path), "settings": {"positions": ["words"]}}
    told = PatchRequest.checked(config=tmp_path, concept="mouse")
    assert told.stated()["config"] == str(tmp_path), "what was asked for alone makes another patch"


def test_two_commands_never_make_a_patch_in_one_folder_at_once(command, monkeypatch):
    real, meanwhile = fmn.forgetting.forget, []

    def forget(*given, **options):
        if not meanwhile:
            meanwhile.append(None)
            meanwhile.append(command("forget", "frog", *SINGLE, "-s", "steps=1"))
        return real(*given, **options)

    monkeypatch.setattr("fmn_nb.forgetting.forget", forget)
    assert command("forget", "frog", *SINGLE).exit_code == 0
    assert meanwhile[1].exit_code == 2 and "another command is making a patch in runs/patches" in meanwhile[1].output
    assert fmn.Patch.load("runs/patches/frog-balanced-seed0").report["steps"] == 2
