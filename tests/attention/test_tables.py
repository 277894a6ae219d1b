"""Tables of tokens, layers, steps and heads: the record's masses, and what they need to be recorded."""

import pytest
from tiny import generate, recorded, tiny_sd, tiny_sd3

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
