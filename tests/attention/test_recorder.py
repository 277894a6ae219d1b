"""The recorder against attention computed by hand, on every kind of model; and that it changes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import by_hand, spied
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import load_file, save_file
from tiny import generate, recorded, tiny_sd, tiny_sd3, tiny_sdxl
from torch._subclasses.fake_tensor import FakeTensorMode

from fmn_nb.attention.batch import Row
from fmn_nb.attention.layers import UnknownArchitectureError
from fmn_nb.attention.listening import MissedLayersError
from fmn_nb.attention.qkv import probabilities
from fmn_nb.attention.record import AttentionBudgetError, AttentionRecord, AttentionRecordError, NotRecordedError
from fmn_nb.attention.recorder import Recorder, Selection, record_attention
from fmn_nb.concepts import Concept, PhraseNotFoundError, read_prompt
from fmn_nb.models.digests import digest
from fmn_nb.models.pipelines import denoiser

SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def restored():
    yield
    assert F.scaled_dot_product_attention is SDPA


def text_length(pipe) -> int:
    return {"StableDiffusion3Pipeline": 36, "PixArtSigmaPipeline": 20, "FluxPipeline": 20}.get(type(pipe).__name__, 16)


def test_images_are_bit_identical_and_everything_is_restored(pipe):
    model = denoiser(pipe)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    plain = generate(pipe, ["a cat", "a dog and a frog"], num_images_per_prompt=2)
    with record_attention(pipe):
        recorded = generate(pipe, ["a cat", "a dog and a frog"], num_images_per_prompt=2)
    assert np.array_equal(plain, recorded)
    assert "encode_prompt" not in vars(pipe) and "prepare_latents" not in vars(pipe)
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


def test_kept_probabilities_are_those_computed_by_hand(pipe):
    model = denoiser(pipe)
    with record_attention(pipe) as attention:
        with spied(model, attention.chosen_layers) as seen:
            generate(pipe, ["a photo of a cat", "a frog"], steps=2)
    guided, text = "uncond" in attention.branches, text_length(pipe)
    for name in attention.layers:
        height, width = attention.grids[name]
        assert height / width == 16 / 24 and attention.values(name).shape[1] == height * width
        with torch.no_grad():
            for step, inputs in enumerate(seen[name]):
                full = by_hand(model.get_submodule(name), inputs)
                if attention.rules[name].text == "first":
                    expected = full[:, :, text:, :text]
                elif attention.rules[name].text == "last":
                    expected = full[:, :, : height * width, -text:]
                else:
                    expected = full
                for image in (0, 1):  # rows: uncond of both images, then cond of both
                    row = image + 2 * guided
                    kept = attention.values(name, step=step, image=image)
                    torch.testing.assert_close(kept, expected[row], atol=1e-5, rtol=0)
                    if guided:
                        other = attention.values(name, step=step, image=image, branch="uncond")
                        torch.testing.assert_close(other, expected[image], atol=1e-5, rtol=0)


def test_maps_are_shares_with_the_image_s_shape(pipe):
    attention = recorded(pipe, "a photo of a cat and a frog")
    maps = {phrase: attention.map(phrase) for phrase in ("cat", "frog")}
    finest = max(attention.grids.values())
    for values in maps.values():
        assert isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == finest
        assert 0 < values.min() and values.max() < 1
    assert not np.allclose(maps["cat"], maps["frog"])
    whole = attention.select(columns=range(text_length(pipe)))
    joint = any(rule.text != "all" for rule in attention.rules.values())
    assert (whole < 0.999).all() if joint else np.allclose(whole, 1, atol=1e-5)
    assert {entry.state for entry in attention.coverage()} == {"recorded"}


def test_the_second_attention_of_a_dual_block_is_no_text_attention():
    pipe = tiny_sd3(dual_attention=True)
    assert any(name.endswith("attn2") for name, _ in pipe.transformer.named_modules())
    attention = recorded(pipe)
    assert attention.layers == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def test_phrase_columns_of_three_encoders_are_clip_s_then_t5_s():
    with record_attention(tiny_sd3()) as attention:
        generate(attention.pipe, "a photo of a cat", negative_prompt="a dog")
    text = attention.text()
    assert [text.tokens[column] for column in text.find("cat").columns] == ["cat</w>", "▁cat"]
    assert text.find("cat").columns[0] < 16 <= text.find("cat").columns[1]
    assert len(text.tokens) == 36
    assert attention.text(branch="uncond").prompt == "a dog"


def test_selection_keeps_exactly_what_was_chosen(sd):
    every = recorded(sd, "a photo of a cat and a frog", steps=3)
    layer = every.layers[1]
    with record_attention(sd, layers=layer, steps=[1, 2], heads=[1], branch="cond", phrases=["frog"]) as chosen:
        generate(sd, "a photo of a cat and a frog", steps=3)
    assert chosen.layers == [layer] and chosen.steps == [1, 2] and chosen.branches == ["cond"]
    assert chosen.values(layer).shape == (1, every.values(layer).shape[1], 1)
    expected = every.select("frog", layer=layer, step=[1, 2], head=1)
    np.testing.assert_allclose(chosen.map("frog"), expected, atol=1e-6)
    states = {entry.layer: entry.state for entry in chosen.coverage()}
    assert states.pop(layer) == "recorded" and set(states.values()) == {"skipped"}
    for wrong in ({"step": 0}, {"head": 0}, {"branch": "uncond"}, {"image": 1}):
        with pytest.raises(NotRecordedError):
            chosen.select("frog", **wrong)
    with pytest.raises(NotRecordedError, match="only the phrases 'frog'"):
        chosen.map("cat")
    with pytest.raises(ValueError, match="no layer with text attention matches 'attn9'"):
        chosen.select("frog", layer="attn9")


@pytest.mark.parametrize("keep", ["mean", "steps"])
def test_mean_and_steps_agree_with_each_other_and_with_heads_averaged_at_once(sd, keep):
    every = recorded(sd, steps=3, keeping=dict(keep="steps"))
    reduced = recorded(sd, steps=3, keeping=dict(keep=keep, heads="mean", columns=[2, 5]))
    np.testing.assert_allclose(reduced.select(columns=[5]), every.select(columns=[5]), atol=1e-6)
    np.testing.assert_allclose(every.select("cat"), np.mean([every.select("cat", step=n) for n in range(3)], 0),
                               atol=1e-6)
    if keep == "mean":
        with pytest.raises(NotRecordedError, match="keep='steps'"):
            reduced.select(columns=[5], step=0)
    assert reduced.bytes < every.bytes / 8


def test_half_precision_halves_the_memory(sd):
    single = recorded(sd)
    half = recorded(sd, keeping=dict(dtype=torch.float16))
    assert half.bytes * 2 == single.bytes
    np.testing.assert_allclose(half.map("cat"), single.map("cat"), atol=1e-3)
    assert half.map("cat").dtype == np.float32


def test_the_budget_holds_before_it_is_exceeded(sd):
    mean = recorded(sd, steps=3, keeping=dict(keep="mean"))
    with pytest.raises(AttentionBudgetError, match="3 steps"), \
            record_attention(sd, keep="steps", max_bytes=mean.bytes * 2) as attention:
        generate(sd, steps=3)
    assert attention.steps == [0]  # it failed at the end of the first step
    with pytest.raises(AttentionBudgetError, match="heads='mean'"), \
            record_attention(sd, keep="mean", max_bytes=mean.bytes - 1) as attention:
        generate(sd, steps=3)
    assert attention.bytes < mean.bytes
    with pytest.warns(UserWarning, match="only the mean over steps"), \
            record_attention(sd, max_bytes=mean.bytes * 2) as attention:
        generate(sd, steps=3)
    assert attention.bytes == mean.bytes
    np.testing.assert_allclose(attention.map("cat"), mean.map("cat"), atol=1e-6)


def test_steps_on_a_gpu_become_a_mean_there(sd):
    """Kept steps are moved to the CPU, so the mean begun from them is there and the next step isn't."""
    with FakeTensorMode():
        recorder = Recorder(sd.unet, None, Selection(max_bytes=1500))
        with pytest.warns(UserWarning, match="only the mean"):
            for step in range(3):
                recorder._add("layer", step, (Row("cond", 0),), torch.zeros(1, 2, 10, 16, device="cuda"))
    assert recorder.counts == {("layer", None, (Row("cond", 0),)): 3}


def test_the_budget_counts_finished_generations_once(sd):
    one = recorded(sd, steps=3, keeping=dict(keep="steps"))
    with record_attention(sd, keep="steps", max_bytes=2 * one.bytes) as two:
        generate(sd, steps=3)
        generate(sd, steps=3, seed=1)
    assert two.bytes == 2 * one.bytes and len(two.images) == 2
    with pytest.raises(AttentionBudgetError, match="after .* of earlier generations"), \
            record_attention(sd, keep="steps", max_bytes=2 * one.bytes - 1) as two:
        generate(sd, steps=3)
        generate(sd, steps=3, seed=1)
    assert two.bytes < 1.5 * one.bytes  # it failed at the end of the first step


def test_the_denoiser_alone_needs_prompts_that_say_their_columns(sd):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    with pytest.raises(ValueError, match=r"denoiser alone has no tokenizer.*read_prompt\(tokenizer, text\)"), \
            record_attention(sd.unet, prompts=["a cat", "a frog"]):
        pass
    named = [read_prompt(sd.tokenizer, prompt) for prompt in ("a cat", "a frog")]
    with torch.no_grad(), record_attention(sd.unet, prompts=named) as attention:
        sd.unet(x, 500, encoder_hidden_states=text)
    assert np.array_equal(attention.map("frog", image=1), attention.select(columns=[2], image=1))
    with pytest.raises(ValueError, match="prompts is empty"), record_attention(sd, prompts=[]):
        pass


def test_the_denoiser_alone_is_recorded_by_columns(sd):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    with torch.no_grad(), record_attention(sd.unet) as attention:
        for timestep in (900, 500):
            sd.unet(x, timestep, encoder_hidden_states=text)
    assert attention.timesteps == [900, 500] and len(attention.images) == 2
    assert attention.select(columns=[3], image=1, step=1).shape == (8, 8)
    with pytest.raises(NotRecordedError, match="prompts="):
        attention.map("cat")
    with pytest.raises(NotRecordedError, match=r"columns \[16\] weren't recorded"):
        attention.select(columns=[16])


@pytest.mark.parametrize("kind, advice, follow", [
    (AttnProcessor, "set_attn_processor(AttnProcessor2_0())",
     lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0())),
    (lambda: SlicedAttnProcessor(1), "pipe.disable_attention_slicing()",
     lambda pipe: pipe.disable_attention_slicing()),
    (lambda: SlicedAttnProcessor(1), "set_attention_slice(None)", lambda pipe: pipe.unet.set_attention_slice(None))])
def test_layers_that_cannot_be_heard_are_named(kind, advice, follow):
    pipe = tiny_sd()
    layer = next(name for name in pipe.unet.attn_processors if "attn2" in name)
    pipe.unet.set_attn_processor({name: kind() if name == layer else processor
                                  for name, processor in pipe.unet.attn_processors.items()})
    layer = layer.removesuffix(".processor")
    with pytest.raises(MissedLayersError, match=layer.replace(".", r"\.")) as error, \
            record_attention(pipe) as attention:
        generate(pipe)
    assert advice in str(error.value)
    assert {entry.layer for entry in attention.coverage() if entry.state == "missed"} == {layer}
    attention = recorded(pipe, keeping=dict(layers=[name for name in attention.layers if name != layer]))
    assert layer not in attention.layers
    follow(pipe)
    attention = recorded(pipe)
    assert layer in attention.layers


def test_the_math_backend_is_heard(sd):
    expected = recorded(sd)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), record_attention(sd) as attention:
        generate(sd)
    np.testing.assert_allclose(attention.map("cat"), expected.map("cat"), atol=1e-5)


def test_an_exception_inside_restores_everything(sd):
    with pytest.raises(ZeroDivisionError), record_attention(sd):
        def stop(*_):
            raise ZeroDivisionError
        generate(sd, callback_on_step_end=stop)
    assert F.scaled_dot_product_attention is SDPA and "encode_prompt" not in vars(sd)
    assert not sd.unet._forward_hooks and not sd.unet._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), record_attention(sd):
        sd.unet.mid_block.attentions[0].register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            generate(sd)
        finally:
            sd.unet.mid_block.attentions[0]._forward_pre_hooks.clear()
    attention = recorded(sd)
    assert len(attention.layers) == 7


def test_recorders_nest_and_those_of_two_models_do_not_mix(sd):
    other = tiny_sdxl()
    alone = recorded(sd)
    with record_attention(sd) as outer, record_attention(other) as second:
        generate(sd)
        inner = recorded(sd, "a frog", keeping=dict(layers="mid_block*"))
        generate(other, "a dog")
    assert len(outer.images) == 2 and len(inner.images) == 1 and len(second.images) == 1
    assert second.text().prompt == "a dog" and len(second.layers) == 11
    assert np.array_equal(outer.map("cat"), alone.map("cat"))
    np.testing.assert_allclose(inner.map("frog"), outer.select("frog", image=1, layer="mid_block*"), atol=1e-7)


def test_someone_else_s_patch_of_torch_s_function_survives(sd):
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        return SDPA(*args, **kwargs)

    F.scaled_dot_product_attention = theirs
    try:
        attention = recorded(sd)
        assert F.scaled_dot_product_attention is theirs and calls and attention.map("cat").any()
    finally:
        F.scaled_dot_product_attention = SDPA


def test_saved_and_loaded_records_are_equal(sd, tmp_path):
    attention = recorded(sd, ["a cat", "a frog"], seed=7, negative_prompt=["a dog", "a dog"])
    loaded = AttentionRecord.load(attention.save(tmp_path / "record"))
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == ["attention.json", "attention.safetensors"]
    assert np.array_equal(loaded.map("frog", image=1), attention.map("frog", image=1))
    assert np.array_equal(loaded.select("dog", branch="uncond", step=1, head=0),
                          attention.select("dog", branch="uncond", step=1, head=0))
    assert loaded.coverage() == attention.coverage() and loaded.images == attention.images
    assert loaded.images[0].seed == 7 and loaded.timesteps == attention.timesteps
    assert loaded.model["denoiser"] == "UNet2DConditionModel"
    different = recorded(sd)
    (tmp_path / "other").mkdir()
    different.save(tmp_path / "other")
    (tmp_path / "other" / "attention.safetensors").replace(tmp_path / "record" / "attention.safetensors")
    with pytest.raises(ValueError, match="don't belong to one record"):
        AttentionRecord.load(tmp_path / "record")
    with pytest.raises(FileNotFoundError, match="attention.json is missing"):
        AttentionRecord.load(tmp_path)


def changed_record(folder, change) -> None:
    """Change a saved record's description and sums as someone does who knows how; `change` gets the tensors too."""
    description = json.loads((folder / "attention.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "attention.safetensors")
    change(description, tensors)
    text = json.dumps(description)
    (folder / "attention.json").write_text(text, encoding="utf-8")
    save_file(tensors, folder / "attention.safetensors", {"description": digest([text])})


def test_records_without_a_sum_load_as_before(sd, tmp_path):
    attention = recorded(sd)
    changed_record(attention.save(tmp_path), lambda description, _: description.pop("sha256"))
    assert np.array_equal(AttentionRecord.load(tmp_path).map("cat"), attention.map("cat"))


def test_each_flipped_bit_of_a_record_is_noticed(sd, tmp_path):
    recorded(sd, keeping=dict(phrases="cat", heads="mean")).save(tmp_path)
    places = np.random.default_rng(0)
    for name in ("attention.safetensors", "attention.json"):
        whole = (tmp_path / name).read_bytes()
        for place in places.integers(0, len(whole.strip()), 60):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << places.integers(8)
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(AttentionRecordError, match=str(tmp_path)):
                AttentionRecord.load(tmp_path)
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(AttentionRecordError):
            AttentionRecord.load(tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize("change", [
    *(lambda said, _, name=name: said.pop(name) for name in ("layers", "grids", "images", "tensors", "heads")),
    lambda said, _: said.update(tensors=[[]]),
    lambda said, _: said["tensors"][0].update(steps_added="1"),
    lambda said, _: said["tensors"][0].update(step=99),
    lambda said, _: said["tensors"][0].update(rows=[["cond", 5]]),
    lambda said, _: said.update(phrases=["cat", "dog"]),
    lambda said, _: said["grids"].update(dict.fromkeys(said["grids"], [3, 3])),
    lambda _, tensors: tensors["0"].fill_(float("nan")),
    lambda _, tensors: tensors["0"].neg_(),
    lambda _, tensors: tensors["0"].mul_(1e6),
    lambda _, tensors: tensors.update({"0": tensors["0"].view(torch.int32)}),
    lambda _, tensors: tensors.pop("0"),
])
def test_a_record_that_cannot_be_attention_is_refused(sd, tmp_path, change):
    def both(said: dict, tensors: dict) -> None:
        said.pop("sha256")
        change(said, tensors)

    changed_record(recorded(sd).save(tmp_path), both)
    with pytest.raises(AttentionRecordError):
        AttentionRecord.load(tmp_path)


def test_what_is_asked_for_is_taken_as_prompts_are_or_hinted_at(sd):
    attention = recorded(sd, keeping=dict(phrases="cat"))
    assert np.array_equal(attention.map("Cat"), attention.map("cat"))
    attention = recorded(sd)
    with pytest.raises(PhraseNotFoundError, match="did you mean 'cat'"):
        attention.map("cta")
    with pytest.raises(ValueError, match="did you mean 'down_blocks"):
        attention.map("cat", layer=attention.layers[0][:-1])
    for wrong in (dict(phrase=5), dict(phrase="cat", size=(0, 0)), dict(phrase="cat", size=8),
                  dict(phrase="cat", size=(8, 10**9))):
        with pytest.raises(ValueError, match="columns=|size is|a side of a map"):
            attention.select(**wrong)


def test_a_record_shows_itself(sd):
    for attention in (recorded(sd, "a <b>cat</b>"), recorded(sd, keeping=dict(phrases="cat")),
                      recorded(sd, keeping=dict(columns=[3])), AttentionRecord()):
        shown = attention._repr_html_()
        assert "Attention record" in shown and "<b>" not in shown and len(shown) < 20_000
    assert recorded(sd)._repr_html_().count("data:image/png") == 4  # a, photo, of, cat


def test_layers_may_come_one_by_one(sd):
    with record_attention(sd, layers=(name for name in ["up*"])) as heard:
        generate(sd)
    assert heard.layers and all(name.startswith("up_blocks") for name in heard.layers)


def test_bad_selections_are_named(sd):
    for wrong, message in [({"keep": "all"}, "keep='all'"), ({"branch": "conditional"}, "branch='conditional'"),
                           ({"layers": "nowhere"}, "no layer with text attention matches 'nowhere'"),
                           ({"heads": "all"}, "heads='all'"), ({"layers": ""}, "no layer is named"),
                           ({"heads": []}, "heads is empty"), ({"steps": [-1]}, "steps count from 0"),
                           ({"phrases": ["cat"], "columns": [1]}, "not both"), ({"max_bytes": 0}, "max_bytes=0")]:
        with pytest.raises(ValueError, match=message), record_attention(sd, **wrong):
            pass
    with pytest.raises(PhraseNotFoundError, match="'frog' is not in the prompt"), record_attention(sd, phrases="frog"):
        generate(sd)
    with pytest.raises(ValueError, match="head 5 was selected"), record_attention(sd, heads=[5]):
        generate(sd)
    with pytest.raises(NotRecordedError, match="2 steps ran"), record_attention(sd, steps=[9]):
        generate(sd)
    for column in (99, -1):
        with pytest.raises(ValueError, match=r"text columns go from 0 to 15"), record_attention(sd, columns=[column]):
            generate(sd)
    for columns in ([[1], [2]], torch.ones(16, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="plain numbers"), record_attention(sd, columns=columns):
            pass
    with pytest.raises(UnknownArchitectureError, match="Linear"), record_attention(torch.nn.Linear(2, 2)):
        pass


def test_an_occurrence_of_a_summed_phrase_cannot_be_chosen(sd):
    attention = recorded(sd, "a cat and a cat", keeping=dict(phrases="cat"))
    with pytest.raises(NotRecordedError, match="'cat' were recorded.*occurrence=1 can't be chosen"):
        attention.select("cat", occurrence=1)


def test_a_concept_is_looked_up_by_its_phrase(sd):
    attention = recorded(sd, keeping=dict(phrases=[Concept("a cat")]))
    assert np.array_equal(attention.map(Concept("cat")), attention.map("cat"))


def test_images_of_two_sizes_need_two_blocks(sd):
    with pytest.raises(ValueError, match="one size at a time"), record_attention(sd):
        generate(sd)
        generate(sd, height=24)


def test_masks_scales_and_empty_rows_as_torch_has_them():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.eye(7).expand(2, 3, 7, 7)
    allowed = torch.rand(2, 1, 5, 7) > 0.3
    allowed[..., 0] = True
    for mask in (None, allowed, torch.randn(2, 1, 5, 7)):
        for scale in (None, 0.5):
            torch.testing.assert_close(probabilities(q, k, mask, scale), SDPA(q, k, v, attn_mask=mask, scale=scale))
    nothing = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    assert not probabilities(q, k, nothing).any()


@pytest.mark.parametrize("keep", ["steps", "mean"])
def test_what_is_kept_takes_no_more_memory_than_it_says(keep):
    pipe = tiny_sd3()
    with record_attention(pipe, keep=keep) as attention:
        generate(pipe)
    assert attention.bytes == sum(kept.untyped_storage().nbytes() for kept in attention.sums.values())


def test_heads_and_columns_come_as_arrays_and_single_numbers(sd):
    with record_attention(sd, heads=np.array([0, 1]), columns=3) as attention:
        generate(sd)
    assert attention.chosen_columns == [3] and set(attention.heads.values()) == {(0, 1)}
