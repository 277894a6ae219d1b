"""Where a concept's attention goes, layer by layer: on its words, and on the later positions it leaks into."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from diffusers import DiffusionPipeline

from fmn_nb.attention import record_attention
from fmn_nb.concepts import Concept
from fmn_nb.generation import STEPS, generate
from fmn_nb.protocol import Drawing

MOST_PROMPTS = 4
LATER = ("later", "first_eot", "padding")


def attention_by_layer(pipe: DiffusionPipeline, concept: Concept, wanted: Sequence[Drawing],
                       steps: int = STEPS) -> pd.DataFrame:
    """The share of cross-attention that goes to the concept's words and to the positions after them, in [0, 1].

    Index: layer; columns: "words", "later" (words after the concept, end of text, padding). The mean over pixels,
    heads, steps and the first four different prompts among the drawings.
    """
    chosen = list({d.prompt: d for d in wanted}.values())[:MOST_PROMPTS]
    with record_attention(pipe, branch="cond", keep="mean") as attention:
        generate(pipe, [d.prompt for d in chosen], [d.seed for d in chosen], steps=steps, batch=len(chosen))
    images = range(len(chosen))

    def mean(layer: str, *parts: str) -> float:
        masses = [sum(attention.mass(concept, part=part, layer=layer, image=i) for part in parts) if parts else
                  attention.mass(concept, layer=layer, image=i) for i in images]
        return sum(masses) / len(masses)

    rows = {layer: {"words": mean(layer), "later": mean(layer, *LATER)} for layer in attention.layers}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def attention_totals(by_layer: pd.DataFrame, when: str) -> dict[str, float]:
    """The attention section of metrics.json for one model: the means over all layers."""
    return {f"mass_{when}": float(by_layer["words"].mean()), f"later_{when}": float(by_layer["later"].mean())}
