"""Tables of tokens, layers, steps and heads: the record's masses, and what they need to be recorded."""

import numpy as np
import pytest
import torch
from tiny import generate, recorded, tiny_flux, tiny_sd, tiny_sd3

from fmn_nb.attention import (
    NotRecordedError,
    attention_with_graph,
    head_table,
    layer_table,
    record_attention,
    short_name,
    step_table,
    token_table,
)


def test_tables_agree_with_the_maps(record):
    table = token_table(record)
    assert table["mass"].sum() == pytest.approx(1, abs=1e-5) and len(table) == 11
    assert table.set_index("token").loc["cat", "mass"] == pytest.approx(record.mass("cat"))
    assert table["part"].tolist() == ["begin"] + ["words"] * 8 + ["first_eot", "padding"]
    steps, layers = step_table(record, "cat"), layer_table(record, "cat")
    assert steps["mass"].mean() == pytest.approx(record.mass("cat"))
    assert layers["mass"].mean() == pytest.approx(record.mass("cat"))
    heads = head_table(record, "cat", record.layers[0])
    assert heads["mass"].mean() == pytest.approx(layers["mass"][0])
    assert record.mass("cat", layer=record.layers[0]) == pytest.approx(
        float(record.select("cat", layer=record.layers[0]).mean()))


def test_tables_need_what_was_recorded():
    pipe = tiny_sd()
    attention = recorded(pipe, keeping=dict(phrases="cat"))
    with pytest.raises(NotRecordedError, match="only the phrases 'cat'"):
        token_table(attention)
    assert layer_table(attention, "cat")["mass"].between(0, 1).all()


@pytest.mark.parametrize("layer, short", [
    ("down_blocks.0.attentions.1.transformer_blocks.0.attn2", "down 0.1"),
    ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid 0"),
    ("up_blocks.1.attentions.0.transformer_blocks.1.attn2", "up 1.0.1"),
    ("transformer_blocks.3.attn", "transformer_blocks.3"),
    ("single_transformer_blocks.3.attn", "single_transformer_blocks.3")])
def test_short_names(layer, short):
    assert short_name(layer) == short


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_a_layer_is_named_as_tables_and_figures_name_it(make):
    pipe = make()
    with record_attention(pipe) as every:
        generate(pipe)
    assert len(set(map(short_name, every.layers))) == len(every.layers)
    for layer in every.layers:
        short = short_name(layer)
        assert (every.map("cat", layer=short) == every.map("cat", layer=layer)).all()
        assert every.values(short).equal(every.values(layer))
        assert head_table(every, "cat", short).equals(head_table(every, "cat", layer))
    with record_attention(pipe, layers=short) as one, attention_with_graph(pipe, layers=[short]) as graph:
        generate(pipe)
    assert one.layers == list(graph) == [layer]
    for asked in (lambda: every.map("cat", layer="up 9"), lambda: every.values("up 9"),
                  lambda: record_attention(pipe, layers="up 9").__enter__()):
        with pytest.raises(ValueError, match=f"{short_name(every.layers[0])}, .*{short}"):
            asked()


def test_each_drawing_of_a_record_has_its_own_columns_and_steps():
    flux = tiny_flux()
    with record_attention(flux) as attention:
        generate(flux, "a cat", max_sequence_length=6)
        generate(flux, "a photo of a frog in the style of noto", max_sequence_length=20)
    assert attention.mass("noto", image=1) == pytest.approx(
        recorded(flux, "a photo of a frog in the style of noto", max_sequence_length=20).mass("noto"), rel=1e-4)
    assert len(token_table(attention, image=1)) > len(token_table(attention, image=0))
    with pytest.raises(NotRecordedError, match=r"columns \[15\] weren't recorded"):
        attention.mass(columns=[15], image=0)
    sd = tiny_sd()
    with record_attention(sd) as attention:
        generate(sd, "a cat", num_inference_steps=2)
        generate(sd, "a frog", num_inference_steps=5)
    for image, phrase, steps in ((0, "cat", 2), (1, "frog", 5)):
        alone = recorded(sd, f"a {phrase}", num_inference_steps=steps)
        table = step_table(attention, phrase, image=image)
        assert table["timestep"].tolist() == alone.timesteps and len(table) == steps


def test_numbers_of_tables_choose_and_nothing_chosen_is_an_error(record):
    table = step_table(record, "cat")
    step = table.loc[table["mass"].idxmax(), "step"]
    assert record.mass("cat", step=step) == pytest.approx(table["mass"].max())
    assert record.mass(columns=np.int64(1)) == record.mass(columns=[1]) == record.mass(columns=torch.tensor([1]))
    for name in ("step", "head", "columns", "layer"):
        with pytest.raises(ValueError, match="nothing is chosen; leave it out for all"):
            record.mass(*(() if name == "columns" else ("cat",)), **{name: []})
    with pytest.raises(ValueError, match="head are whole numbers, not 0.5"):
        record.mass("cat", head=0.5)
