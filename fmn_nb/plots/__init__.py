"""Figures, and what each shows in words. Every function returns a figure and shows nothing by itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "attention": ["attention_map", "before_after", "compare", "comparison", "cond_uncond", "describe", "head_sheet",
        "map_picture", "overlay", "qkv", "sheet", "short_name", "step_gif", "step_layer_sheet", "token_panel"],
    "diagrams": ["diagram"],
    "evaluation": ["attention_figure", "beginning_and_end", "collateral_figure", "confusion_figure", "curves",
        "floor_figure", "m_score_figure", "relearning_figure", "sequence_figure", "similarity_figure",
        "success_figure"],
    "style": ["as_png", "few_colours", "image_grid", "look", "new_figure"],
    "tradeoff": ["cost_and_quality", "cost_of_presets", "excess_against_keeping", "forgetting_against_keeping",
        "forgotten_and_kept", "measure_along", "tradeoff_figure"],
})
