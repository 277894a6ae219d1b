"""Interaction control: who does what to whom, and where in the image."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "drawing": ["How", "draw_grounded", "draw_interactions"],
    "gates": ["BoxAttention", "record_boxes"],
    "inside": ["forget_inside"],
    "interaction": ["Interaction", "InteractionError", "as_text", "laid_out", "parse_interactions"],
    "picture": ["boxes_picture", "boxes_table"],
    "relations": ["ACTIONS", "RELATIONS", "Box", "between", "holds", "union"],
    "grounding": ["ABLATIONS", "Grounding", "ROLES", "ROOM", "Tokens", "grounding_of", "phrase_embeddings",
        "save_pipeline", "tokens_of", "with_grounding"],
    "turns": ["Turns", "things_of"],
})
