"""What to forget: concepts, where their words stand in a prompt, and the world that they belong to."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "concept": ["Concept", "DETERMINERS", "KINDS", "TEMPLATES", "forms_of", "with_article", "without_article"],
    "tokens": ["PhraseNotFoundError", "PromptTokens", "UnreadablePromptError", "find_phrase", "join_prompts",
        "put_instead", "read_chunks", "read_prompt", "spoken", "written_out"],
    "world": ["JudgeLike", "NOTHING", "NotThereError", "UNTAUGHT_KEY", "UnknownConceptError", "Verdict", "Vocabulary",
        "WORLD_KEY", "World", "neutral_prompts", "same_name", "untaught_of", "vocabulary_of", "world_of"],
})
