"""Tables of tokens, layers, steps and heads: the record's masses, and what they need to be recorded."""

import pytest
from tiny import recorded, tiny_sd

from fmn_nb.attention import NotRecordedError, head_table, layer_table, step_table, token_table


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
