"""Differentiable recording: the same probabilities with their graph, under everything training does to a model."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from test_attention_recorder import by_hand, spied
from tiny import tiny_sd, tiny_sd3

from fmn_nb.attention import MissedLayersError, NotRecordedError, record_attention

ROWS = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]


@pytest.fixture
def unet():
    return tiny_sd().unet


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)


def loss_and_gradients(unet, backward_inside: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    x, text = inputs()
    unet.zero_grad()
    with record_attention(unet, differentiable=True, columns=ROWS) as attention:
        unet(x, 500, encoder_hidden_states=text)
        loss = sum(values.square().mean() for values in attention.columns().values())
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def test_chosen_columns_of_each_row(unet):
    x, text = inputs()
    with record_attention(unet, differentiable=True, columns=ROWS) as attention:
        seen, handles = spied(unet, attention.chosen_layers)
        unet(x, 500, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    assert attention.column_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    columns = attention.columns()
    assert list(columns) == attention.layers and len(columns) == 7
    for name, values in columns.items():
        assert values.requires_grad and values.shape[:2] == (2, 2) and values.shape[-1] == 3
        expected = by_hand(unet.get_submodule(name), seen[name][0])
        torch.testing.assert_close(values[0, ..., :2], expected[0][..., [1, 2]], atol=1e-5, rtol=0)
        torch.testing.assert_close(values[1], expected[1][..., [3, 4, 5]], atol=1e-5, rtol=0)
        assert not values[0, ..., 2].any()


def test_gradients_are_those_of_the_loss_by_hand(unet):
    x, text = inputs()
    _, gradients = loss_and_gradients(unet)
    seen, handles = spied(unet, [name for name, m in unet.named_modules() if name.endswith("attn2")])
    unet.zero_grad()
    unet(x, 500, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    loss = 0
    for name, calls in seen.items():
        full = by_hand(unet.get_submodule(name), calls[0])
        chosen = [full[row][..., columns].square().sum() for row, columns in enumerate(ROWS)]
        loss = loss + sum(chosen) / (2 * 2 * full.shape[2] * 3)
    loss.backward()
    for name, parameter in unet.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
    assert any("attn2.to_k" in name and gradient.any() for name, gradient in gradients.items())


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_checkpointing_changes_nothing(unet, mode, backward_inside):
    getattr(unet, mode)()
    plain = loss_and_gradients(unet)
    unet.enable_gradient_checkpointing()
    checkpointed = loss_and_gradients(unet, backward_inside)
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-6)
    assert checkpointed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_checkpointed_layers_are_counted_once(unet):
    unet.train()
    unet.enable_gradient_checkpointing()
    x, text = inputs()
    with record_attention(unet, differentiable=True) as attention:
        unet(x, 500, encoder_hidden_states=text)
        before = {name: values.clone() for name, values in attention.columns().items()}
        sum(values.sum() for values in attention.columns().values()).backward()
    assert all(entry.runs == 1 for entry in attention.coverage())
    assert all(torch.equal(before[name], values) for name, values in attention.columns().items())


def test_reentrant_checkpointing_is_refused_with_advice(unet):
    unet.train()
    unet.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True))
    x, text = inputs()
    with pytest.raises(MissedLayersError, match="non-re-entrant"), \
            record_attention(unet, differentiable=True):
        unet(x.requires_grad_(), 500, encoder_hidden_states=text)


def test_autocast_keeps_probabilities_in_single_precision(unet):
    x, text = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), record_attention(unet, differentiable=True) as attention:
        unet(x, 500, encoder_hidden_states=text)
    for values in attention.columns().values():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))
    sum(values[..., 2].mean() for values in attention.columns().values()).backward()
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.any()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_autocast_under_checkpointing(unet, mode):
    getattr(unet, mode)()
    seen = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(loss_and_gradients(unet, backward_inside=checkpointing))
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-6) and seen[1][1].keys() == seen[0][1].keys()
    for name, gradient in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], gradient, atol=1e-6, rtol=1e-3)


def test_only_the_last_run_is_kept_and_none_without_one(unet):
    x, text = inputs()
    with record_attention(unet, differentiable=True) as attention:
        with pytest.raises(NotRecordedError, match="nothing was recorded"):
            attention.columns()
        unet(x, 500, encoder_hidden_states=text)
        first = attention.columns()
        unet(x[:1], 100, encoder_hidden_states=text[:1])
    second = attention.columns()
    assert all(len(second[name]) == 1 and len(first[name]) == 2 for name in first)
    with record_attention(unet) as plain, torch.no_grad():
        unet(x, 500, encoder_hidden_states=text)
    with pytest.raises(NotRecordedError, match="differentiable=True"):
        plain.columns()


def test_what_would_be_ignored_is_refused(unet):
    for ignored in ({"phrases": "cat"}, {"branch": "cond"}, {"steps": [0]}, {"keep": "mean"}, {"dtype": torch.float16},
                    {"max_bytes": 10}):
        with pytest.raises(ValueError, match=f"{next(iter(ignored))} can't be selected with differentiable=True"), \
                record_attention(unet, differentiable=True, **ignored):
            pass


def test_layers_that_cannot_be_heard_are_named_before_the_loss_is_needed(unet):
    unet.set_attn_processor(AttnProcessor())
    x, text = inputs()
    with pytest.raises(MissedLayersError, match=r"AttnProcessor2_0\(\)"), \
            record_attention(unet, differentiable=True) as attention:
        unet(x, 500, encoder_hidden_states=text)
        with pytest.raises(MissedLayersError, match=r"AttnProcessor2_0\(\)"):
            attention.columns()


def test_masks_numbers_and_lists_mean_the_same(unet):
    x, text = inputs()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, [2, 5]] = True
    kept = []
    for columns in ([2, 5], torch.tensor([2, 5]), [[2, 5], [2, 5]], torch.tensor([[2, 5], [2, 5]]), mask, mask[:1]):
        with torch.no_grad(), record_attention(unet, differentiable=True, columns=columns) as attention:
            unet(x, 500, encoder_hidden_states=text)
        kept.append(attention.columns())
    assert all(torch.equal(other[name], values) for other in kept[1:] for name, values in kept[0].items())
    for wrong, message in [([[1]] * 3, "given for 3 rows; the batch has 2"), ([16], "columns go from 0 to 15"),
                           (torch.ones(2, 15, dtype=torch.bool), "mask has 15 columns")]:
        with pytest.raises(ValueError, match=message), torch.no_grad(), \
                record_attention(unet, differentiable=True, columns=wrong):
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
        with record_attention(transformer, differentiable=True, columns=[2, 18]) as attention:
            transformer(**arguments)
        columns = attention.columns()
        assert [tuple(values.shape) for values in columns.values()] == [(1, 2, 24, 2)] * 2
        sum(values.square().mean() for values in columns.values()).backward()
        gradients.append(transformer.transformer_blocks[1].attn.add_k_proj.weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-8, rtol=1e-5)
