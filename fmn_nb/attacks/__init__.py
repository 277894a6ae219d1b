"""Can a forgotten concept be brought back?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "attack": ["Attack", "InversionBudget", "attack_table", "concept_inversion"],
    "budgets": ["Budgets", "choose_budgets", "fix_budgets", "read_budgets"],
    "curves": ["Tries", "success_curve"],
    "floor": ["attacked"],
    "grounding": ["grounded_oracle", "grounding_attack", "grounding_table"],
    "memorization": ["MScore", "centre_of", "embedding", "m_score"],
    "probes": ["PROBES", "probe", "probe_table"],
    "prompt_search": ["SearchBudget", "adversarial_prompt"],
    "relearning": ["RelearningBudget", "relearn", "steps_until"],
    "wording": ["misspellings", "paraphrase_attack", "paraphrases", "wordings_table"],
})
