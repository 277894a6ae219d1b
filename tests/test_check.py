"""`fmn-nb check` looks into the kernel and into a model's files, and says what to do about what is wrong there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fmn_nb import check
from fmn_nb.paths import bundled_models
from fmn_nb.runs import ask_kernel


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
        (RuntimeError("Kernel died before replying"), "no answer: RuntimeError: Kernel died"),
        (TimeoutError("60 seconds"), "no answer: TimeoutError"),
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
    assert not [one for one in children if "ipykernel_launcher" in " ".join(one.cmdline())]


def test_a_whole_model_is_measured_without_loading_it(folder, monkeypatch):
    found = check.named_model(str(folder))
    assert found.state == "ok" and "11 MB of weights" in found.found
    monkeypatch.setattr(check, "_memory", lambda: ("the GPU has", 5_700_000 * 3))
    assert check.named_model(str(folder)).state == "note" and "float16" in check.named_model(str(folder)).advice
    monkeypatch.setattr(check, "_memory", lambda: ("the GPU has", 5_700_000))
    assert check.named_model(str(folder)).state == "failed"


def test_the_number_of_parameters_is_that_of_the_tensors(tmp_path):
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "one.safetensors")
    assert check._parameters(tmp_path / "one.safetensors") == {"a": 15, "b": 7}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _without(name: str, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({key: value for key, value in index.items() if key != name}))


SPOILT = {
    "no index": (lambda at: (at / "model_index.json").write_text("{"), "not valid JSON"),
    "an empty index": (lambda at: (at / "model_index.json").write_text("{}"), "names no unet or transformer"),
    "no text encoder": (lambda at: _without("text_encoder", at), "names no text_encoder"),
    "no tokenizer": (lambda at: _without("tokenizer", at), "names no tokenizer"),
    "no vocabulary": (lambda at: (at / "tokenizer" / "tokenizer.json").unlink(), "no vocabulary"),
    "a part is missing": (lambda at: shutil.rmtree(at / "vae"), "vae is missing or empty"),
    "pickled weights": (
        lambda at: (at / "unet" / "diffusion_pytorch_model.safetensors").rename(at / "unet" / "x.bin"),
        "pickled weights are not read"),
    "half a file": (lambda at: _cut(at / "text_encoder" / "model.safetensors"), "no whole .safetensors file"),
    "a shard is missing": (
        lambda at: (at / "unet" / "diffusion_pytorch_model.safetensors").unlink() or (
            at / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "one.safetensors"}}'),
        "one.safetensors is missing, of 1 parts"),
}


@pytest.mark.parametrize("spoil, says", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_told_with_what_is_wrong(folder, spoil, says):
    spoil(folder)
    found = check.named_model(str(folder))
    assert found.state == "failed" and says in found.found and found.advice


def test_a_single_file_is_known_by_its_header(tmp_path):
    file = tmp_path / "model.safetensors"
    whole = {"model.diffusion_model.x": np.zeros(4), "cond_stage_model.x": np.zeros(4)}
    save_file(whole, file)
    assert check.named_model(str(file)).state == "note" and "config=" in check.named_model(str(file)).advice
    save_file({"lora_unet.x": np.zeros(4)}, file)
    assert "holds no U-Net" in check.named_model(str(file)).found
    save_file({"model.diffusion_model.x": np.zeros(4)}, file)
    assert "holds no text encoder" in check.named_model(str(file)).found
    file.write_bytes(b"no such thing")
    assert "no whole .safetensors file" in check.named_model(str(file)).found


def test_a_pickled_checkpoint_is_refused_with_the_reason(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    found = check.named_model(str(tmp_path / "model.ckpt"))
    assert found.state == "failed" and "could run code" in found.found and ".safetensors" in found.advice
