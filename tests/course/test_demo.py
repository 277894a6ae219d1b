"""The demo's parts in Python: each network as ONNX beside torch, what the page is told, what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fmn_nb.attention.recorder import record_attention
from fmn_nb.cli import main
from fmn_nb.course import demo_networks
from fmn_nb.course.demo import MOST_BYTES, RUNTIME, DemoError, check_free, demo_patch, find_runtime, write_demo
from fmn_nb.models.images import generate
from fmn_nb.patches.patch import PatchMismatchError
from fmn_nb.runs.single import PatchRequest

CLOSE = 2e-5  # of numbers up to about 4, after a network in float32
NETWORKS = ("text_encoder", "denoiser", "decoder", "judge")
PROMPT, WORD, STEPS, SEED = "a photo of a cat and a birthday cake", "cat", 4, 3


@pytest.fixture(scope="module")
def sessions(demo):
    """Each network in onnxruntime, from the page's own files."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {name: onnxruntime.InferenceSession(demo.payload(name), options)
            for name in NETWORKS}


def tokens(emoji, *prompts):
    return emoji.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np").input_ids


def changed_weights(demo, number, scale):
    """W + scale * D from the page's tensors, by name."""
    row, data = np.frombuffer(demo.payload("tensors"), "<f4"), demo.data

    def read(place):
        return row[place["at"]:place["at"] + int(np.prod(place["shape"]))].reshape(place["shape"])

    weights = {name: read(place) for name, place in data["weights"].items()}
    for name, change in data["patches"][number]["changes"].items():
        difference = read(change["full"]) if "full" in change else read(change["up"]) @ read(change["down"])
        weights[name] = weights[name] + np.float32(scale) * difference
    return weights


def draw_by_onnx(demo, sessions, emoji, number, scale):
    """What the page does: pixels uint8 [height, width, 3] and attention [columns, height, width]."""
    (text,) = sessions["text_encoder"].run(None, {"ids": tokens(emoji, "", PROMPT).astype(np.int32)})
    latents = torch.randn(1, *demo.data["latents"], generator=torch.Generator().manual_seed(SEED))
    scheduler = type(emoji.scheduler).from_config(emoji.scheduler.config)
    scheduler.set_timesteps(STEPS)
    weights, maps = changed_weights(demo, number, scale), []
    for step in scheduler.timesteps:
        noise, shares = sessions["denoiser"].run(None, {
            "latents": latents.numpy(), "timestep": np.asarray(step, np.float32), "text": text, **weights})
        guided = torch.from_numpy(noise[:1] + demo.data["guidance"] * (noise[1:] - noise[:1]))
        latents = scheduler.step(guided, step, latents).prev_sample
        maps.append(shares)
    (pixels,) = sessions["decoder"].run(None, {"latents": latents.numpy()})
    return pixels, np.mean(maps, axis=0)


def test_the_text_encoder_says_what_it_says_in_torch(emoji, sessions):
    ids = tokens(emoji, "", PROMPT)
    (text,) = sessions["text_encoder"].run(None, {"ids": ids.astype(np.int32)})
    with torch.no_grad():
        own = emoji.text_encoder(torch.from_numpy(ids)).last_hidden_state
    assert np.abs(text - own.numpy()).max() < CLOSE < own.std()


@pytest.mark.parametrize("number", [0, 1], ids=["weights", "lora"])
def test_an_image_and_its_map_are_those_of_torch_at_any_scale(demo, emoji, sessions, number):
    pictures = []
    for scale in (0.0, 0.7):
        pixels, attention = draw_by_onnx(demo, sessions, emoji, number, scale)
        with demo.patches[number].applied(emoji, scale=scale), record_attention(emoji, branch="cond") as record:
            own = np.asarray(generate(emoji, [PROMPT], [SEED], steps=STEPS)[0])
        assert np.abs(pixels.astype(int) - own).max() <= 1 and (pixels != own).mean() < 0.01
        mine = attention[list(record.text().find(WORD).columns)].sum(axis=0)
        assert np.abs(mine - record.map(WORD)).max() < CLOSE < record.map(WORD).std()
        pictures.append(pixels.astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 5, "the scale changes nothing"


def test_the_judge_says_what_it_says_in_torch(sessions, world):
    from fmn_nb.emoji.organism import held_out_scenes

    for image in held_out_scenes(3)[0]:
        labels, styles = sessions["judge"].run(None, {"pixels": np.asarray(image)})
        (verdict,) = world.judge.verdicts([image])
        config = world.judge.config
        assert abs(float(labels.max()) - verdict.probability) < CLOSE and styles.sum() == pytest.approx(1, abs=1e-5)
        assert {name for name, share in zip(config.labels, labels, strict=True) if share > 0.5} == verdict.seen
        assert config.styles[int(styles.argmax())] == verdict.style


def test_only_what_half_precision_holds_is_halved():
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper

    exact, rounded = np.full((2, 64), 0.25, np.float32), np.full((2, 64), 1 / 3, np.float32)
    large, few = np.full((2, 64), 1e6, np.float32), np.ones(2, np.float32)
    weights = {"exact": exact, "rounded": rounded, "large": large, "few": few}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights], "weights", [],
        [helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, values.shape)
         for name, values in weights.items()],
        [numpy_helper.from_array(values, name) for name, values in weights.items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    demo_networks._halve(proto)
    onnx.checker.check_model(proto)
    half = [one.name for one in proto.graph.initializer if one.data_type == onnx.TensorProto.FLOAT16]
    assert half == ["exact" + demo_networks.HALF]
    outputs = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {})
    assert all(np.array_equal(one, own) for one, own in zip(outputs, weights.values(), strict=True))


def test_the_parts_are_small_the_same_each_time_and_name_no_folder(demo, world):
    parts = [demo.payload(name) for name in (*NETWORKS, "tensors")]
    assert sum(map(len, parts)) < MOST_BYTES / 1.5
    assert not [part for part in parts if b"site-packages" in part or b".py" in part]
    assert demo_networks.judge(world.judge) == demo.payload("judge")


def test_the_page_is_told_of_its_patches_and_loads_nothing_from_elsewhere(demo):
    (whole, low) = demo.data["patches"]
    assert whole["name"] == low["name"] == "cat" and whole["preset"] == "uce"
    assert set(whole["changes"]) == set(low["changes"]) == set(demo.data["weights"])
    sources = {path: path.read_text(encoding="utf-8") for path in demo.folder.glob("*.*") if path.suffix != ".json"}
    assert len(sources) == 8 and not [path for path, text in sources.items() if "http:" in text or "https:" in text]
    assert json.loads((demo.folder / "demo.json").read_text())["onnxruntime-web"] == RUNTIME


def test_an_earlier_demo_is_replaced_and_anything_else_is_left(demo, tmp_path, stand_in):
    check_free(demo.folder)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DemoError, match="other files"):
        write_demo(tmp_path, demo.patches, find_runtime(stand_in))
    with pytest.raises(DemoError, match="other files"):
        check_free(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_patch_for_another_model_is_refused_before_the_export(demo, tmp_path, stand_in):
    from dataclasses import replace

    base = {**demo.patches[0].info["base"], "fingerprint": "0" * 16, "signs": "", "denoiser": ""}
    other = replace(demo.patches[0], info={**demo.patches[0].info, "base": base})
    with pytest.raises(PatchMismatchError, match="another|made for"):
        write_demo(tmp_path / "page", [other], find_runtime(stand_in))
    assert not (tmp_path / "page").exists()


def test_the_runtime_must_be_there_in_its_version(tmp_path, stand_in):
    assert find_runtime(stand_in) == stand_in / "dist"
    with pytest.raises(DemoError, match=f"npm install onnxruntime-web@{RUNTIME}"):
        find_runtime(tmp_path)
    shutil.copytree(stand_in, tmp_path / "other")
    (tmp_path / "other" / "dist" / "ort.wasm.min.js").unlink()
    with pytest.raises(DemoError, match="lacks ort.wasm.min.js"):
        find_runtime(tmp_path / "other")
    (tmp_path / "other" / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.2.3"}')
    with pytest.raises(DemoError, match="1.2.3, the page needs"):
        find_runtime(tmp_path / "other")


def test_the_command_takes_the_patch_that_forget_left(demo, tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.chdir(tmp_path)
    request = PatchRequest.checked(concept="cat", kind=None, model="emoji", preset="uce", seed=0)
    replace(demo.patches[0], info={**demo.patches[0].info, "request": request.stated()}).save(request.folder)
    made = []
    monkeypatch.setattr("fmn_nb.course.demo.make_patch", lambda *given: made.append(given))
    assert demo_patch(request).changed() == demo.patches[0].changed() and not made
    other = PatchRequest.checked(concept="cat", kind=None, model="emoji", preset="uce", seed=1)
    demo_patch(other)
    assert made == [(other, other.folder)]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    changed = PatchRequest.checked(["tokens=later"], concept="cat", kind=None, model="emoji", preset="uce", seed=0)
    with pytest.raises(DemoError, match="made with other settings: show that one with --patch runs/patches/cat-uce"):
        demo_patch(changed)


@pytest.mark.parametrize("words, said", [
    (["--concept", "cat", "--patch", "."], "either --concept"), (["--concept", "cta"], "did you mean"),
    (["--preset", "balancd"], "no preset 'balancd'"), (["--runtime", "."], "no onnxruntime-web in")])
def test_the_command_refuses_wrong_words_at_once(words, said, tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fmn_nb.course.demo.check_tools", lambda: None)
    runtime = [] if "--runtime" in words else ["--runtime", str(stand_in)]
    result = CliRunner().invoke(main, ["course", "demo", "--out", "page", *runtime, *words])
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "page").exists()


def test_the_export_tools_are_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoError, match=r"onnx and onnxscript: pip install -c constraints.txt '.\[course\]'"):
        from fmn_nb.course.demo import check_tools

        check_tools()
