"""Every line of the architecture table, and what people change about a model's attention: projections, LoRA, adapters,
processors, backends, precision, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import generate, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_denoisers import MAKERS as DENOISERS
from tiny_denoisers import TOKENS, make

from fmn_nb import attention_maths
from fmn_nb.attention import (
    ARCHITECTURES,
    Architecture,
    MissedLayersError,
    TextLayers,
    UnknownArchitectureError,
    record_attention,
    register,
)
from fmn_nb.concepts import join_prompts, read_prompt
from fmn_nb.models import denoiser

PIPES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "pixart": tiny_pixart, "sd3": tiny_sd3, "flux": tiny_flux}
JOINT = {"chroma", "aura_flow", "qwen_image", "cogview4"}
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
by_pipe = pytest.mark.parametrize("kind", PIPES)


def test_the_table_has_no_line_without_a_test():
    tested = {type(denoiser(maker())).__name__ for maker in PIPES.values()}
    tested |= {type(make(name)[0]).__name__ for name in DENOISERS}
    assert tested == set(ARCHITECTURES)


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_further_denoisers_are_recorded_whole_and_unchanged(name):
    model, arguments = make(name)
    plain = model(**arguments, return_dict=False)[0]
    with record_attention(model) as attention:
        recorded = model(**arguments, return_dict=False)[0]
    assert torch.equal(plain, recorded)
    assert [entry.state for entry in attention.coverage()] == ["recorded", "recorded"]
    for layer in attention.layers:
        values, (height, width) = attention.values(layer), attention.grids[layer]
        assert height * 3 == width * 2 and values.shape == (2, height * width, TOKENS)
        total = values.sum(-1)
        assert (total < 0.9).all() and (values > 0).all() if name in JOINT else np.allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_each_column_is_its_own_token_s(name):
    """In the first layer, a changed token changes its own column's weight; those of the others keep their ratios."""
    model, arguments = make(name)
    text = arguments["encoder_hidden_states"]
    for token in range(text.shape[1]):
        changed = text.clone()
        changed[:, token] += torch.linspace(-2, 2, text.shape[-1])
        seen = []
        for embeddings in (text, changed):
            with record_attention(model) as attention:
                model(**arguments | {"encoder_hidden_states": embeddings})
            seen.append(attention.values(attention.layers[0]))
        ratio = seen[1] / seen[0]
        others = [column for column in range(TOKENS) if column != token]
        torch.testing.assert_close(ratio[..., others], ratio[..., others[:1]].expand(-1, -1, len(others)),
                                   atol=1e-4, rtol=1e-4)
        assert (ratio[..., token] - ratio[..., others[0]]).abs().max() > 0.01


def test_a_model_that_is_not_in_the_table_can_be_added_and_is_never_empty():
    model = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16), cap_feat_dim=16).eval()
    arguments = {"hidden_states": torch.randn(1, 4, 8, 12), "timestep": torch.tensor([0.5]),
                 "encoder_hidden_states": torch.randn(1, 5, 16),
                 "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)}
    with pytest.raises(UnknownArchitectureError, match=r"where Lumina2.* looks at the text.*register"), \
            record_attention(model):
        pass
    register("Lumina2Transformer2DModel", Architecture((TextLayers(r"layers\.\d+\.attn", "first"),)))
    try:
        with torch.no_grad(), record_attention(model) as attention:
            model(**arguments)
    finally:
        del ARCHITECTURES["Lumina2Transformer2DModel"]
    assert attention.values("layers.0.attn").shape == (2, 24, 5)  # two heads, though keys have one


@by_pipe
def test_fused_projections_change_nothing(kind):
    pipe = PIPES[kind]()
    with record_attention(pipe) as expected:
        generate(pipe)
    denoiser(pipe).fuse_qkv_projections()
    with record_attention(pipe) as fused:
        generate(pipe)
    assert fused.layers == expected.layers and {entry.state for entry in fused.coverage()} == {"recorded"}
    np.testing.assert_allclose(fused.map("cat"), expected.map("cat"), atol=1e-5)


@by_pipe
def test_a_lora_is_heard_and_its_absence_too(kind):
    pipe = PIPES[kind]()
    model = denoiser(pipe)
    with record_attention(pipe) as before:
        generate(pipe)
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False), model)
    with record_attention(pipe) as after:
        generate(pipe)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    with record_attention(pipe) as off:
        generate(pipe)
    assert before.layers == after.layers == off.layers
    assert not np.allclose(before.map("cat"), after.map("cat"), atol=1e-4)
    np.testing.assert_allclose(off.map("cat"), before.map("cat"), atol=1e-6)


@by_pipe
def test_attention_computed_by_hand_is_named_not_left_out(kind):
    """A processor that calls nothing of torch's: the error says which layers, and what to do."""
    class ByHand:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_args, **_kwargs):
            return hidden_states if encoder_hidden_states is None or kind not in ("sd3", "flux") else (
                hidden_states, encoder_hidden_states)

    pipe = PIPES[kind]()
    model = denoiser(pipe)
    with record_attention(pipe) as attention:
        generate(pipe)
    layer = attention.layers[0]
    model.get_submodule(layer).processor = ByHand()
    with pytest.raises(MissedLayersError) as error, record_attention(pipe):
        generate(pipe)
    advice = "reset_attention_backend" if kind in ("sd3", "flux") else "set_default_attn_processor"
    assert layer in str(error.value) and "ByHand" in str(error.value) and advice in str(error.value)
    with record_attention(pipe, layers=attention.layers[1:]) as rest:
        generate(pipe)
    assert rest.layers == attention.layers[1:] and rest.map("cat").any()


def test_a_model_that_runs_past_its_hooks_is_named():
    """As a compiled model does, whose forward calls no module."""
    pipe = tiny_sd()
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    layer.__class__ = type("Compiled", (type(layer),), {"__call__": type(layer).forward})
    with pytest.raises(MissedLayersError, match="before torch.compile"), record_attention(pipe):
        generate(pipe)


def test_a_backend_chosen_for_a_transformer_is_heard():
    pipe = tiny_flux()
    with record_attention(pipe) as expected:
        generate(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    with record_attention(pipe) as attention:
        generate(pipe)
    np.testing.assert_allclose(attention.map("cat"), expected.map("cat"), atol=1e-5)


@torch.no_grad()
def test_an_image_adapter_s_keys_are_not_taken_for_text():
    pipe = tiny_sd()
    unet, image = pipe.unet, torch.randn(2, 1, 8)
    with record_attention(unet) as expected:
        unet(torch.ones(2, 4, 8, 8), 500, encoder_hidden_states=torch.ones(2, 16, 16))
    torch.manual_seed(1)
    processors = {}
    for name, processor in unet.attn_processors.items():
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        processors[name] = IPAdapterAttnProcessor2_0(width, 16, num_tokens=(4,)) if "attn2" in name else processor
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 16, num_image_text_embeds=4)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    with record_attention(unet) as attention:
        unet(torch.ones(2, 4, 8, 8), 500, encoder_hidden_states=torch.ones(2, 16, 16),
             added_cond_kwargs={"image_embeds": [image]})
    first = attention.layers[0]
    assert attention.values(first).shape[-1] == 16
    torch.testing.assert_close(attention.values(first), expected.values(first))


@by_pipe
def test_half_precision_models(kind):
    pipe = PIPES[kind]()
    with record_attention(pipe) as single:
        generate(pipe, steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_attention(pipe) as half:
        generate(pipe, steps=1)
    assert half.map("cat").dtype == np.float32
    np.testing.assert_allclose(half.map("cat"), single.map("cat"), atol=0.02)


@by_pipe
def test_some_heads_at_a_time_are_the_same(kind, monkeypatch):
    pipe = PIPES[kind]()
    with record_attention(pipe) as expected:
        generate(pipe, ["a cat", "a frog"])
    monkeypatch.setattr(attention_maths, "MOST_AT_ONCE", 1)
    with record_attention(pipe) as attention:
        generate(pipe, ["a cat", "a frog"])
    for layer in expected.layers:
        torch.testing.assert_close(attention.values(layer, image=1), expected.values(layer, image=1))


@pytest.mark.parametrize("columns", [3, 16, 48])
@torch.no_grad()
def test_any_number_of_text_columns(columns):
    """Embeddings shorter than the tokenizer's limit, or several chunks of it one after another, as for long prompts."""
    pipe = tiny_sd()
    text = torch.randn(1, columns, 16)
    given = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    chunks = ["a photo of a cat", "a frog", "a dog and a cat"]
    named = join_prompts([read_prompt(pipe.tokenizer, chunk) for chunk in chunks]) if columns == 48 else "a cat"
    with record_attention(pipe, prompts=[named]) as attention:
        generate(pipe, None, **given)
    assert len(attention.text().tokens) == columns and attention.masses().shape == (columns,)
    assert attention.masses().sum() == pytest.approx(1, abs=1e-5)
    if columns == 48:
        assert attention.columns_of("cat") == [5, 37]
    with record_attention(pipe, prompts=[named], phrases="cat" if columns == 48 else "a", keep="mean") as chosen:
        generate(pipe, None, **given)
    assert chosen.bytes == attention.bytes / columns / 2


def test_two_models_in_two_threads_do_not_mix():
    alone, together = {}, {}
    pipes = {"a cat": tiny_sd(0), "a frog": tiny_sdxl(1)}

    def record(prompt: str, into: dict) -> None:
        with record_attention(pipes[prompt]) as attention:
            generate(pipes[prompt], prompt, steps=4)
        into[prompt] = attention

    for prompt in pipes:
        record(prompt, alone)
    threads = [threading.Thread(target=record, args=(prompt, together)) for prompt in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, word in (("a cat", "cat"), ("a frog", "frog")):
        assert together[prompt].layers == alone[prompt].layers and len(together[prompt].images) == 1
        assert np.array_equal(together[prompt].map(word), alone[prompt].map(word))
