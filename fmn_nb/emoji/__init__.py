"""The emoji world: sprites, scenes with captions and masks, and the training of the embedded models.

A *model organism* for concept erasure: every training image, caption and object mask is known.
"""
