"""Every line of the architecture table, and what people change about a model's attention: projections, LoRA, adapters,
processors, backends, precision, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from diffusers import Lumina2Transformer2DModel, WanTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection, apply_rotary_emb
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import fill_zero_weights, generate, recorded, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_denoisers import MAKERS as DENOISERS
from tiny_denoisers import TOKENS, make

from fmn_nb.attention import qkv as attention_maths
from fmn_nb.attention import read_columns
from fmn_nb.attention.layers import ARCHITECTURES, Architecture, TextLayers, UnknownArchitectureError, register
from fmn_nb.attention.listening import MissedLayersError, attention_with_graph
from fmn_nb.attention.qkv import probabilities
from fmn_nb.attention.recorder import record_attention
from fmn_nb.concepts.tokens import join_prompts, read_prompt
from fmn_nb.forgetting.methods.fmn import concept_mask
from fmn_nb.models.digests import fingerprint
from fmn_nb.models.pipelines import denoiser, denoiser_name

PIPES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "pixart": tiny_pixart, "sd3": tiny_sd3, "flux": tiny_flux}
JOINT = {"chroma", "aura_flow", "qwen_image", "cogview4"}
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
by_pipe = pytest.mark.parametrize("kind", PIPES)


def test_the_table_has_no_line_without_a_test():
    tested = {type(denoiser(maker())).__name__ for maker in PIPES.values()}
    tested |= {type(make(name)[0]).__name__ for name in DENOISERS} | {"Lumina2Transformer2DModel"}
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


def lumina2() -> Lumina2Transformer2DModel:
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16), cap_feat_dim=16)
    fill_zero_weights(model)
    return model.eval()


def test_a_model_that_is_not_in_the_table_can_be_added_and_is_never_empty(monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "Lumina2Transformer2DModel")
    model = lumina2()
    arguments = {"hidden_states": torch.randn(1, 4, 8, 12), "timestep": torch.tensor([0.5]),
                 "encoder_hidden_states": torch.randn(1, 5, 16),
                 "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)}
    with pytest.raises(UnknownArchitectureError, match=r"where Lumina2.* looks at the text.*register"), \
            record_attention(model):
        pass
    register("Lumina2Transformer2DModel", Architecture((TextLayers(r"layers\.\d+\.attn", "first"),)))
    with torch.no_grad(), record_attention(model) as attention:
        model(**arguments)
    assert attention.values("layers.0.attn").shape == (2, 24, 5)  # two heads, though keys have one


@torch.no_grad()
def test_rows_packed_with_texts_of_different_lengths():
    """Lumina 2 puts each row's pixels right behind its own text: a batch's maps are those of its rows alone."""
    model, lengths = lumina2(), [3, 6, 5]
    noise, text = torch.randn(3, 4, 8, 12), torch.randn(3, 7, 16)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]

    def arguments(rows: slice) -> dict:
        return {"hidden_states": noise[rows], "timestep": torch.full((len(noise[rows]),), 0.5),
                "encoder_hidden_states": text[rows], "encoder_attention_mask": mask[rows]}

    plain = model(**arguments(slice(3)), return_dict=False)[0]
    with record_attention(model) as batch:
        assert torch.equal(model(**arguments(slice(3)), return_dict=False)[0], plain)
    assert batch.grids == {"layers.0.attn": (4, 6)}
    for row, length in enumerate(lengths):
        kept = batch.values("layers.0.attn", image=row)
        assert kept.shape == (2, 24, 7) and (kept[..., :length] > 0).all() and not kept[..., length:].any()
        with record_attention(model) as alone:
            seen = []
            handle = model.get_submodule("layers.0.attn").register_forward_pre_hook(
                lambda _module, _args, inputs, seen=seen: seen.append(inputs), with_kwargs=True)
            model(**arguments(slice(row, row + 1)))
            handle.remove()
        torch.testing.assert_close(kept, alone.values("layers.0.attn"), atol=1e-5, rtol=0)
        expected = lumina2_by_hand(model.get_submodule("layers.0.attn"), seen[0])[0, :, length:, :length]
        torch.testing.assert_close(kept[..., :length], expected, atol=1e-5, rtol=0)
    model.train()
    with torch.enable_grad(), attention_with_graph(model) as attention:
        model(**arguments(slice(3)))
        sum(values[..., [1, 2]].square().sum() for values in attention.values()).backward()
    assert model.layers[0].attn.to_k.weight.grad.any()
    torch.testing.assert_close(attention["layers.0.attn"][1].detach(), batch.values("layers.0.attn", image=1),
                               atol=1e-5, rtol=0)


def lumina2_by_hand(module: torch.nn.Module, inputs: dict) -> torch.Tensor:
    x = inputs["hidden_states"]
    q, k = (project(x).unflatten(-1, (-1, 12)) for project in (module.to_q, module.to_k))
    q, k = (apply_rotary_emb(norm(y), inputs["image_rotary_emb"], use_real=False).transpose(1, 2)
            for norm, y in ((module.norm_q, q), (module.norm_k, k)))
    return (module.scale * q @ k.transpose(-1, -2)).softmax(-1)


@torch.no_grad()
def test_the_keys_of_an_image_that_come_first_are_not_taken_for_text():
    """Wan with image conditioning attends to the image before it attends to its 512 text tokens."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24)
    fill_zero_weights(model)
    seen = []
    with record_attention(model.eval()) as attention:
        model.get_submodule(attention.chosen_layers[0]).register_forward_pre_hook(
            lambda _module, args: seen.append(args))
        model(hidden_states=torch.randn(1, 4, 1, 8, 12), encoder_hidden_states=torch.randn(1, 512, 16),
              encoder_hidden_states_image=torch.randn(1, 9, 16), timestep=torch.tensor([500]))
    layer = attention.layers[0]
    module, (pixels, text) = model.get_submodule(layer), seen[0][:2]
    q, k = (norm(y).unflatten(-1, (2, -1)).transpose(1, 2) for norm, y in (
        (module.norm_q, module.to_q(pixels)), (module.norm_k, module.to_k(text[:, 9:]))))
    torch.testing.assert_close(attention.values(layer), probabilities(q, k)[0], atol=1e-6, rtol=0)
    assert {entry.state for entry in attention.coverage()} == {"recorded"}


@by_pipe
def test_fused_projections_change_nothing(kind):
    pipe = PIPES[kind]()
    expected = recorded(pipe)
    denoiser(pipe).fuse_qkv_projections()
    fused = recorded(pipe)
    assert fused.layers == expected.layers and {entry.state for entry in fused.coverage()} == {"recorded"}
    np.testing.assert_allclose(fused.map("cat"), expected.map("cat"), atol=1e-5)


@by_pipe
def test_a_lora_is_heard_and_its_absence_too(kind):
    pipe = PIPES[kind]()
    model = denoiser(pipe)
    before = recorded(pipe)
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False), model)
    after = recorded(pipe)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    off = recorded(pipe)
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
    loaded_with = dict(model.attn_processors)
    attention = recorded(pipe)
    layer = attention.layers[0]
    model.get_submodule(layer).processor = ByHand()
    with pytest.raises(MissedLayersError) as error, record_attention(pipe):
        generate(pipe)
    joint = kind in ("sd3", "flux")
    advice = "Put back the attention processors" if joint else "set_attn_processor(AttnProcessor2_0())"
    assert layer in str(error.value) and "ByHand" in str(error.value) and advice in str(error.value)
    rest = recorded(pipe, keeping=dict(layers=attention.layers[1:]))
    assert rest.layers == attention.layers[1:] and rest.map("cat").any()
    model.set_attn_processor(loaded_with if joint else AttnProcessor2_0())  # as the error says
    again = recorded(pipe)
    np.testing.assert_allclose(again.map("cat"), attention.map("cat"), atol=1e-5)


def test_a_model_that_runs_past_its_hooks_is_named():
    """As an exported model does, whose forward calls no module."""
    pipe = tiny_sd()
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    layer.__class__ = type("Compiled", (type(layer),), {"__call__": type(layer).forward})
    with pytest.raises(MissedLayersError, match="as it was before"), record_attention(pipe):
        generate(pipe)


@pytest.mark.parametrize("kind", ["sd", "pixart"])
@pytest.mark.parametrize("every", [2, 4])
def test_merged_tokens_have_no_map(kind, every):
    """As tomesd's merge_crossattn does: cross-attention sees every n-th position, in an order of its own."""
    pipe = PIPES[kind]()
    for name, layer in denoiser(pipe).named_modules():
        if name.endswith("attn2"):
            layer.register_forward_pre_hook(lambda _, args: (args[0][:, ::every], *args[1:]))
            layer.register_forward_hook(lambda *given: given[-1].repeat_interleave(every, dim=1))
    with pytest.raises(MissedLayersError, match="merged .*tomesd"), record_attention(pipe):
        generate(pipe, height=32, width=32)
    with pytest.raises(MissedLayersError, match="merged"), attention_with_graph(pipe):
        generate(pipe, height=32, width=32)


@pytest.mark.parametrize("maker", [tiny_sd, tiny_sd3])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_denoiser_is_recorded_as_what_it_was(maker, wrapped):
    pipe, name = maker(), denoiser_name(maker())
    plain, prints = recorded(pipe), fingerprint(pipe)
    if wrapped:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    else:
        getattr(pipe, name).compile(backend="eager")
    generate(pipe)  # compiled before it is recorded
    attention = recorded(pipe)
    np.testing.assert_array_equal(attention.map("cat"), plain.map("cat"))
    assert attention.layers == plain.layers and attention.model == plain.model and fingerprint(pipe) == prints
    with record_attention(getattr(pipe, name)) as bare:
        generate(pipe)
    assert bare.layers == plain.layers


def test_a_backend_chosen_for_a_transformer_is_heard():
    pipe = tiny_flux()
    expected = recorded(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    attention = recorded(pipe)
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
    single = recorded(pipe, steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_attention(pipe) as half:
        generate(pipe, steps=1)
    assert half.map("cat").dtype == np.float32
    np.testing.assert_allclose(half.map("cat"), single.map("cat"), atol=0.02)


@by_pipe
def test_some_heads_at_a_time_are_the_same(kind, monkeypatch):
    pipe = PIPES[kind]()
    expected = recorded(pipe, ["a cat", "a frog"])
    monkeypatch.setattr(attention_maths, "MOST_AT_ONCE", 1)
    attention = recorded(pipe, ["a cat", "a frog"])
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
    attention = recorded(pipe, None, **given, keeping=dict(prompts=[named]))
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


def test_columns_are_those_of_the_text_as_the_pipeline_encodes_it():
    """PixArt writes prompts in small letters, and its tokens differ by case."""
    pipe, text = tiny_pixart(), "a photo of a CAT and a dog"
    heard = recorded(pipe, text).text(0)
    length = len(heard.tokens)
    for phrase in ("dog", "CAT"):
        columns = heard.find(phrase).columns
        assert read_columns(pipe, text, length).find(phrase).columns == columns
        assert concept_mask(pipe, text, phrase, ("words",), length).nonzero().flatten().tolist() == [*columns]


def test_a_text_that_the_pipeline_encoded_as_it_is_is_read_as_it_is(monkeypatch):
    """With clean_caption=False, as tests draw, a cleaning that would take words away doesn't move the columns."""
    pipe, plain = tiny_pixart(), type(tiny_pixart())._text_preprocessing

    def cleaned(self, text, clean_caption=False):
        texts = plain(self, text, clean_caption=False)
        return [one.replace("red ", "") for one in texts] if clean_caption else texts

    monkeypatch.setattr(type(pipe), "_text_preprocessing", cleaned)
    text = "a red photo of a cat"
    heard = recorded(pipe, text).text(0)
    assert "red" in heard.prompt and "red" not in read_columns(pipe, text, len(heard.tokens)).prompt
    assert heard.find("cat").columns != read_columns(pipe, text, len(heard.tokens)).find("cat").columns
