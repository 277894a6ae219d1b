"""`fmn-nb check` looks into the kernel and into a model's files, and says what to do about what is wrong there."""

import re
import shutil
from pathlib import Path

import pytest
from diffusers import EDMEulerScheduler
from kernels import is_kernel
from tiny import tiny_sd

from fmn_nb.files import bundled_models
from fmn_nb.runs import check as check
from fmn_nb.runs.kernel import ask_kernel


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model's folder, to be spoilt."""
    return Path(shutil.copytree(bundled_models()["emoji"], tmp_path / "model"))


def test_the_kernel_is_started_and_says_which_package_it_imports():
    found = check.kernel()
    assert found.state == "ok" and str(Path(check.fmn_nb.__file__).parent) in found.found


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("/elsewhere/fmn_nb/__init__.py", "notebooks import /elsewhere"),
        (RuntimeError("Kernel died before replying"), "doesn't answer: RuntimeError: Kernel died"),
        (TimeoutError("60 seconds"), "doesn't answer: TimeoutError"),
    ],
)
def test_a_kernel_that_fails_or_imports_another_package_is_told(monkeypatch, answer, says):
    def ask(code: str) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(check, "ask_kernel", ask)
    found = check.kernel()
    assert found.state == "failed" and says in found.found and found.advice


def test_an_error_in_the_kernel_is_handed_back_and_the_kernel_ended():
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'no_such'"):
        ask_kernel("import no_such")


def test_a_kernel_that_takes_too_long_is_ended():
    import psutil

    with pytest.raises((TimeoutError, RuntimeError)):  # the second where it is not even up by then
        ask_kernel("import time; time.sleep(100)", patience=2)
    children = psutil.Process().children(recursive=True)
    assert not [one for one in children if is_kernel(one)]


def _replace(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


SPOILT = {
    "no index": (lambda at: (at / "model_index.json").write_text("{"), "not valid JSON"),
    "an empty index": (lambda at: (at / "model_index.json").write_text("{}"), "lacks all parts"),
    "a part is missing": (lambda at: shutil.rmtree(at / "vae"), "lacks vae of what"),
    "a part is empty": (lambda at: [file.unlink() for file in (at / "tokenizer").iterdir()], "lacks tokenizer"),
    "no configuration": (lambda at: (at / "unet" / "config.json").unlink(), "config.json"),
    "a broken configuration": (lambda at: (at / "text_encoder" / "config.json").write_text("[]"), "loaded"),
    "a broken tokenizer": (lambda at: [one.write_text("{") for one in (at / "tokenizer").glob("*.json")], "loaded"),
    "a broken scheduler": (lambda at: (at / "scheduler" / "scheduler_config.json").write_text("null"), "loaded"),
    "an unknown class": (lambda at: _replace(at / "model_index.json", "UNet2DConditionModel", "NoSuchModel"), "NoSuch"),
    "a cut-off weight": (lambda at: _cut(next((at / "vae").glob("*.safetensors"))), "loaded"),
}


@pytest.mark.parametrize("spoil, says", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_told_with_what_is_wrong(folder, spoil, says):
    assert check.named_model(str(folder)).state == "ok"
    spoil(folder)
    found = check.named_model(str(folder))
    assert found.state == "failed" and re.search(says, found.found) and found.advice and "\n" not in found.found


def test_a_model_whose_training_is_unknown_can_be_loaded_but_not_forget(folder):
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    _replace(folder / "model_index.json", "DPMSolverMultistepScheduler", EDMEulerScheduler.__name__)
    found = check.named_model(str(folder))
    assert found.state == "note" and "can't forget" in found.found and "EDMEulerScheduler" in found.advice


def test_a_single_file_needs_its_configuration_from_elsewhere(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = check.named_model(str(tmp_path / "model.safetensors"))
    assert found.state == "note" and "--config FOLDER" in found.advice


def test_a_folder_of_half_precision_variants_is_named_as_such(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "half", variant="fp16")
    found = check.named_model(str(tmp_path / "half"))
    assert found.state == "ok" and "as fp16 variants, loaded" in found.found


def test_a_pickled_checkpoint_is_refused_with_the_reason(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    found = check.named_model(str(tmp_path / "model.ckpt"))
    assert found.state == "failed" and "could run code" in found.found and ".safetensors" in found.found
    assert "use one of these" in check.named_model("foo").advice


@pytest.mark.parametrize("name", ["emoji-grounded", "emoji-oracle-grounded", "emoji-joint", "emoji-oracle"])
def test_every_bundled_model_is_found_whole(name):
    found = check.named_model(name)
    assert found.state == "ok" and name in found.found, found


def test_gated_layers_without_what_they_belong_to_are_told(tmp_path):
    lone = Path(shutil.copytree(bundled_models()["emoji-grounded"], tmp_path / "lone"))
    _replace(lone / "grounding.json", "emoji-diffusion", "no-diffusion")
    found = check.named_model(str(lone))
    assert found.state == "failed" and "needs the pipeline no-diffusion beside it" in found.found
