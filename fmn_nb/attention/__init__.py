"""Attention: the QKV equations, the recorder, and attention maps and how well they point at things."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "batch": ["Row"],
    "columns": ["as_encoded", "read_columns", "text_parts"],
    "grounding": ["attention_on_images", "ground", "ground_images", "summarise"],
    "layers": ["ARCHITECTURES", "Architecture", "TextLayers", "UnknownArchitectureError", "architecture_of",
        "pixel_grid", "register", "short_name", "text_layers"],
    "listening": ["LayerCall", "Listener", "MissedLayersError", "attention_with_graph", "text_layer_calls"],
    "qkv": ["attend", "join_heads", "probabilities", "scores", "split_heads"],
    "record": ["AttentionBudgetError", "AttentionRecord", "AttentionRecordError", "LayerCoverage",
        "NotRecordedError", "head_table", "layer_table", "step_table", "token_table"],
    "recorder": ["Recorder", "record_attention"],
})
