"""Attention with its graph: the same probabilities, and gradients through them, under all that training does."""

from __future__ import annotations

import pytest
import torch
from by_hand import by_hand, spied
from diffusers.models.attention_processor import AttnProcessor
from tiny import tiny_sd, tiny_sd3

from fmn_nb.attention import MissedLayersError, attention_with_graph, record_attention, text_layers

ROWS = torch.zeros(2, 16, dtype=torch.bool)  # each row's own columns
ROWS[0, [1, 2]] = ROWS[1, [3, 4, 5]] = True


@pytest.fixture
def unet():
    return tiny_sd().unet


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)


def loss_and_gradients(unet, backward_inside: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    x, text = inputs()
    unet.zero_grad()
    with attention_with_graph(unet) as attention:
        unet(x, 500, encoder_hidden_states=text)
        loss = sum((values * ROWS[:, None, None]).square().mean() for values in attention.values())
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def test_each_rows_columns_are_those_computed_by_hand_and_the_output_is_the_same(unet):
    x, text = inputs()
    plain = unet(x, 500, encoder_hidden_states=text).sample
    with torch.no_grad(), attention_with_graph(unet):
        assert torch.equal(unet(x, 500, encoder_hidden_states=text).sample, plain)
    with spied(unet, text_layers(unet)) as seen, attention_with_graph(unet) as attention:
        output = unet(x, 500, encoder_hidden_states=text).sample
        torch.testing.assert_close(output, plain, atol=1e-5, rtol=1e-5)
    assert set(attention) == set(text_layers(unet)) and len(attention) == 7
    for name, values in attention.items():
        assert values.requires_grad and values.shape[:2] == (2, 2) and values.shape[-1] == 16
        torch.testing.assert_close(values, by_hand(unet.get_submodule(name), seen[name][0]), atol=1e-5, rtol=0)


def test_a_step_computes_a_layers_softmax_once(unet, monkeypatch):
    (x, text), keys, fused = inputs(), [], torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, *rest, **more):
        keys.append(key.shape[2])
        return fused(query, key, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    with attention_with_graph(unet):
        unet(x, 500, encoder_hidden_states=text[:, :12])
    assert len(keys) == 7 and 12 not in keys  # self-attention went to torch, and nothing else


def test_gradients_are_those_of_the_loss_by_hand(unet):
    x, text = inputs()
    _, gradients = loss_and_gradients(unet)
    unet.zero_grad()
    with spied(unet, [name for name, m in unet.named_modules() if name.endswith("attn2")]) as seen:
        unet(x, 500, encoder_hidden_states=text)
    loss = 0
    for name, calls in seen.items():
        full = by_hand(unet.get_submodule(name), calls[0])
        chosen = [full[row][..., columns].square().sum() for row, columns in enumerate(ROWS)]
        loss = loss + sum(chosen) / full.numel()
    loss.backward()
    for name, parameter in unet.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
    assert any("attn2.to_k" in name and gradient.any() for name, gradient in gradients.items())


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("half", [False, True])
def test_gradient_checkpointing_changes_nothing(unet, mode, backward_inside, half):
    near = {"atol": 1e-6, "rtol": 1e-3} if half else {"atol": 1e-7, "rtol": 1e-5}
    getattr(unet, mode)()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        plain = loss_and_gradients(unet)
        unet.enable_gradient_checkpointing()
        checkpointed = loss_and_gradients(unet, backward_inside)
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-6)
    assert checkpointed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, **near)


def test_checkpointed_layers_are_heard_once(unet):
    unet.train()
    unet.enable_gradient_checkpointing()
    x, text = inputs()
    with attention_with_graph(unet) as attention:
        unet(x, 500, encoder_hidden_states=text)
        before = {name: (values, values.clone()) for name, values in attention.items()}
        sum(values.sum() for values in attention.values()).backward()
    assert attention.keys() == before.keys()
    assert all(values is before[name][0] and torch.equal(before[name][1], values) for name, values in attention.items())


def test_reentrant_checkpointing_is_refused_with_advice(unet):
    unet.train()
    unet.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True))
    x, text = inputs()
    with pytest.raises(MissedLayersError, match="non-re-entrant"), attention_with_graph(unet):
        unet(x.requires_grad_(), 500, encoder_hidden_states=text)


def test_autocast_keeps_probabilities_in_single_precision(unet):
    x, text = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_with_graph(unet) as attention:
        unet(x, 500, encoder_hidden_states=text)
    for values in attention.values():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))
    sum(values[..., 2].mean() for values in attention.values()).backward()
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.any()


def test_only_the_last_run_is_kept_and_none_without_one(unet):
    x, text = inputs()
    with attention_with_graph(unet, layers="up_blocks*") as attention:
        assert not attention
        unet(x, 500, encoder_hidden_states=text)
        first = dict(attention)
        unet(x[:1], 100, encoder_hidden_states=text[:1])
    assert first.keys() == attention.keys() and all(name.startswith("up_blocks") for name in first)
    assert all(len(attention[name]) == 1 and len(values) == 2 for name, values in first.items())
    with pytest.raises(ValueError, match=r"attention_with_graph\(model\)"), record_attention(unet, differentiable=True):
        pass


def test_layers_that_cannot_be_heard_are_named_before_the_loss_is_needed(unet):
    unet.set_attn_processor(AttnProcessor())
    x, text = inputs()
    with attention_with_graph(unet), pytest.raises(MissedLayersError, match=r"AttnProcessor2_0\(\)"):
        unet(x, 500, encoder_hidden_states=text)


def test_joint_attention_with_its_graph_and_checkpointing():
    transformer = tiny_sd3().transformer.train()
    generator = torch.Generator().manual_seed(0)
    arguments = {"hidden_states": torch.randn(1, 4, 8, 12, generator=generator),
                 "encoder_hidden_states": torch.randn(1, 36, 32, generator=generator),
                 "pooled_projections": torch.randn(1, 32, generator=generator), "timestep": torch.tensor([500.0])}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        with attention_with_graph(transformer) as attention:
            transformer(**arguments)
        assert [tuple(values.shape) for values in attention.values()] == [(1, 2, 24, 36)] * 2
        sum(values[..., [2, 18]].square().mean() for values in attention.values()).backward()
        gradients.append(transformer.transformer_blocks[1].attn.add_k_proj.weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-8, rtol=1e-5)
