"""Can a forgotten concept be brought back?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "attack": ["Attack", "InversionBudget", "attack_table", "concept_inversion"],
    "grounding": ["grounded_oracle", "grounding_attack", "grounding_table"],
    "memorization": ["MScore", "centre_of", "embedding", "m_score"],
    "prompt_search": ["SearchBudget", "adversarial_prompt"],
    "relearning": ["RelearningBudget", "relearn", "steps_until"],
    "wording": ["misspellings", "paraphrase_attack", "paraphrases", "wordings_table"],
})
