"""Loading by name, and recognising a model again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from snapshots import draw
from tiny import tiny_flux, tiny_sd, tiny_sdxl

from fmn_nb.models import names
from fmn_nb.models import pipelines as models
from fmn_nb.models.digests import fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_sd().save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["emojy", "no/such/folder/deep", "x.safetensors", "a/b.safetensors", "", "a b/c"])
def test_a_name_that_means_nothing_is_answered_with_what_there_is(name: str) -> None:
    with pytest.raises(names.UnknownModelError, match="bundled|no model_index"):
        names.resolve(name)


def test_unknown_name_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(models.DiffusionPipeline, "from_pretrained", never)
    monkeypatch.setattr(models.DiffusionPipeline, "load_config", never)
    with pytest.raises(names.UnknownModelError):
        models.load("emojy")


def test_pickled_checkpoints_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(names.UnknownModelError, match="pickled"):
        names.resolve(tmp_path / "model.ckpt")
    with pytest.raises(names.UnknownModelError, match="model_index.json"):
        names.resolve(tmp_path)


def test_hub_id_passes_and_bundled_names_become_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (names, models):
        monkeypatch.setattr(module, "bundled", lambda: {"own": folder})
    assert names.resolve("some-owner/some-model") == "some-owner/some-model"
    assert names.resolve("own") == folder
    pipe = models.load("own", device="cpu")
    assert pipe._progress_bar_config == {"disable": True}


def test_a_folder_loads_and_draws_the_same(folder: Path) -> None:
    pipe = models.load(folder, device="cpu")
    assert pipe.safety_checker is None and not pipe.unet.training
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(tiny_sd()))
    assert models.load(folder, device="cpu", dtype="float16").unet.dtype == torch.float16


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no floating dtype"):
        models.parse_dtype("int8")
    with pytest.raises(ValueError, match="no floating dtype"):
        models.parse_dtype("nn")


def test_damaged_and_missing_weights_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(models.ModelLoadError, match="copy"):
        models.load(copy, device="cpu")
    with pytest.raises(models.ModelLoadError, match="network"):
        models.load("no-such-owner/no-such-model", device="cpu")


@pytest.mark.parametrize(("key", "kind"), [(models._SDXL_KEY, "StableDiffusionXLPipeline"),
                                           ("model.diffusion_model.out.2.bias", "StableDiffusionPipeline")])
def test_single_file_chooses_the_pipeline_by_its_tensors(key, kind, tmp_path, monkeypatch):
    called = {}

    def from_single_file(file: str, **options: object) -> object:
        called.update(options, file=file)
        return tiny_sd()

    monkeypatch.setattr(getattr(models, kind), "from_single_file", from_single_file)
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    models.load(tmp_path / "model.safetensors", device="cpu", config=tmp_path)
    assert called["local_files_only"] is True and called["file"].endswith("model.safetensors")


def test_parts_of_a_pipeline() -> None:
    sd, sdxl, flux = tiny_sd(), tiny_sdxl(), tiny_flux()
    assert models.denoiser(sd) is sd.unet and models.denoiser_name(flux) == "transformer"
    assert [len(models.text_encoders(p)) for p in (sd, sdxl, flux)] == [1, 2, 2]
    assert models.tokenizers(sdxl) == [sdxl.tokenizer, sdxl.tokenizer_2]
    with pytest.raises(models.UnsupportedPipelineError, match="neither a unet nor a transformer"):
        models.denoiser(object())


def test_fingerprint_knows_the_model_and_nothing_else(folder: Path) -> None:
    print_ = fingerprint(tiny_sd())
    assert len(print_) == 64
    assert fingerprint(models.load(folder, device="cpu")) == print_
    assert fingerprint(models.load(folder, device="cpu", dtype="float16")) == print_
    assert fingerprint(tiny_sd(seed=1)) != print_
    changed = tiny_sd()
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[5, 3] += 0.1
    assert fingerprint(changed) != print_


def test_fingerprint_ignores_learned_tokens_adapters_and_samplers(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler
    from peft import LoraConfig

    pipe = tiny_sd()
    print_ = fingerprint(pipe)
    save_file({"<toy>": torch.randn(2, 16)}, tmp_path / "learned_embeds.safetensors")
    pipe.load_textual_inversion(tmp_path)
    assert fingerprint(pipe) == print_
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "own")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert fingerprint(pipe) == print_


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_that_are_there_in_one_variant_are_found(variant: str, folder: Path, tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "all", variant=variant)
    assert models.variant_of(tmp_path / "all") == variant and models.variant_of(folder) is None
    assert fingerprint(models.load(tmp_path / "all", device="cpu")) == fingerprint(pipe)
    shutil.copytree(folder, tmp_path / "unet alone")
    shutil.rmtree(tmp_path / "unet alone" / "unet")
    pipe.unet.save_pretrained(tmp_path / "unet alone" / "unet", variant=variant)
    assert fingerprint(models.load(tmp_path / "unet alone", device="cpu")) == fingerprint(pipe)


@pytest.mark.parametrize(("file", "variant"), [
    ("model.safetensors", None), ("model.fp16.safetensors", "fp16"), ("model-00001-of-00002.safetensors", None),
    ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
    ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"), ("model.non_ema.safetensors", "non_ema"),
    ("pytorch_lora_weights.fp16.safetensors", None)])
def test_a_variant_is_read_from_the_files_name(file: str, variant: str | None, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / file).touch()
    assert models.variant_of(tmp_path) == variant


def _delete(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.mark.parametrize(("place", "content"), [
    ("model_index.json", "null"), ("model_index.json", "[]"), ("model_index.json", "{"), ("unet/config.json", "null"),
    ("unet/config.json", "[]"), ("text_encoder/config.json", "[]"), ("scheduler/scheduler_config.json", "null"),
    ("tokenizer/tokenizer.json", "null"), ("text_encoder/config.json", None), ("unet", None), ("vae/config.json", "{"),
    ("model_index.json", "UNet2DConditionModel=UNetX"), ("model_index.json", "StableDiffusionPipeline=NoPipeline")])
def test_a_broken_folder_is_one_clear_error(place: str, content: str | None, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if content is None:
        _delete(copy / place)
    else:
        old, is_change, new = content.partition("=")
        (copy / place).write_text((copy / place).read_text().replace(old, new) if is_change else content)
    with pytest.raises(models.ModelLoadError, match="copy"):
        models.load(copy, device="cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", 3.5])
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(device, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(models.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(models.ModelLoadError, match="no device|not a device"):
        models.load(folder, device=device)


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                                  "StableDiffusionControlNetPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_a_folder_of_a_pipeline_that_needs_a_picture_is_refused_before_its_weights(kind, tmp_path, monkeypatch) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}", "_diffusers_version": "0.42"}}')
    monkeypatch.setattr(models.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(models.UnsupportedPipelineError, match=f"{kind}.*from_pipe"):
        models.load(tmp_path, device="cpu")


@pytest.mark.parametrize("as_path", [True, False])
def test_a_single_file_offline_names_the_way_out_before_it_is_read(as_path: bool, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "sd15.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(1)}, file)
    monkeypatch.setattr(models.StableDiffusionPipeline, "from_single_file", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(models.ModelLoadError, match="config=FOLDER") as told:
        models.load(file if as_path else str(file), device="cpu")
    assert "is the name right" not in str(told.value)
    with pytest.raises(models.ModelLoadError, match="there is no folder"):
        models.load(file, device="cpu", config=tmp_path / "nowhere")


def test_single_files_that_draw_from_a_picture_are_refused(tmp_path: Path) -> None:
    for name, tensors in {"inpainting": {models._FIRST_KEY: torch.zeros(4, 9, 3, 3)},
                          "refiner": {models._REFINER_KEY: torch.zeros(1)}}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(models.UnsupportedPipelineError, match="draws from a picture"):
            models.load(tmp_path / f"{name}.safetensors", device="cpu")


def test_pipelines_that_draw_videos_are_refused() -> None:
    from diffusers import WanPipeline

    with pytest.raises(models.UnsupportedPipelineError, match="WanPipeline draws videos"):
        models.require_text_to_image(WanPipeline)


def test_every_text_to_image_pipeline_of_diffusers_is_taken_and_those_with_a_picture_are_not() -> None:
    from diffusers.pipelines.auto_pipeline import (
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        AUTO_INPAINT_PIPELINES_MAPPING,
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    )

    def is_refused(kind: type) -> bool:
        try:
            models.require_text_to_image(kind)
        except models.UnsupportedPipelineError:
            return True
        return False

    both = {kind for kind in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values()
            if models._PICTURE_IS_OPTIONAL.match(kind.__name__)}
    for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        assert is_refused(kind) == ("Control" in kind.__name__ or "Helios" in kind.__name__), kind  # which draws videos
    for kind in {*AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values(), *AUTO_INPAINT_PIPELINES_MAPPING.values()} - both:
        assert is_refused(kind), kind
