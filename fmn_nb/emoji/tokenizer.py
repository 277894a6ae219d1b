"""The tokenizer: byte-pair encoding trained on captions, in CLIP's format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from fmn_nb.emoji.world import MAX_TOKENS

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Small enough that only frequent words become one token; rarer names stay in pieces, as in real CLIP.
MERGES = 198


def train_tokenizer(captions: Iterable[str], folder: Path, merges: int = MERGES) -> CLIPTokenizer:
    """Train a byte-pair vocabulary on `captions` and return it as a CLIPTokenizer, saved in `folder`.

    The vocabulary is CLIP's layout: 256 bytes, the same 256 ending a word (`</w>`), the merges, begin and end of text.
    """
    pairs = _learn_merges(captions, merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in pairs] + [BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=pairs, unk_token=END, bos_token=BEGIN, eos_token=END,
                              pad_token=END, model_max_length=MAX_TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _learn_merges(captions: Iterable[str], merges: int) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=512 + merges, end_of_word_suffix="</w>", show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned][:merges]
