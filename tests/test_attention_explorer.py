"""The explorer where a choice has no map."""

from __future__ import annotations

from tiny import generate, tiny_sd

from fmn_nb.attention import record_attention
from fmn_nb.widgets import AttentionExplorer


def test_no_picture_stands_beside_nothing_to_show():
    pipe = tiny_sd()
    with record_attention(pipe, phrases=["cat", "dog"]) as attention:
        generate(pipe, ["a cat", "a dog"], steps=1)
    explorer = AttentionExplorer(attention)
    assert explorer.token.value == "dog" and explorer.words.value.startswith("Nothing to show")
    explorer.image.value = 1
    assert explorer.picture.value and "dog" in explorer.words.value
    explorer.image.value = 0
    assert explorer.picture.value == b"" and explorer.words.value.startswith("Nothing to show")
