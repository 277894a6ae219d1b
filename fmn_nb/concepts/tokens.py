"""Where a phrase's tokens stand in a prompt.

A text encoder turns a prompt into a row of token embeddings, and each is one column of every attention map.
`read_prompt` says what each column is, from the tokenizer's own character offsets: the *begin* token, the *words*, the
*first end-of-text* token, or *padding*. The four have separate names because Stable Diffusion 1.x pads with its
end-of-text token, so "every end-of-text" would mean almost every column.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fmn_nb.concepts.concept import Concept

PARTS = ("words", "later", "first_eot", "padding", "begin")


class UnreadablePromptError(ValueError):
    """Which columns hold a prompt's words is unknown; the message says why."""


class PhraseNotFoundError(ValueError):
    """The phrase isn't in the prompt (or only past the limit of tokens); the message names what is there."""


@dataclass(frozen=True)
class TokenPositions:
    """Where a phrase's tokens stand: one tuple of columns per occurrence, in the order of the prompt."""

    phrase: str
    occurrences: tuple[tuple[int, ...], ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of all occurrences, ascending, each once."""
        return tuple(sorted({column for occurrence in self.occurrences for column in occurrence}))


@dataclass(frozen=True)
class PromptTokens:
    """What each column of the text is. Columns are counted from 0, over all tokenizers of the model in order.

    Attributes:
        prompt: the text.
        tokens: the token in each column as text.
        spans: the characters [start, end) of `prompt` each column stands for; None for begin, end-of-text, padding.
        begin, words, first_eot, padding: the columns of each part; every column belongs to exactly one.
        cut_off: the end of the prompt that didn't fit into the limit of tokens ("" if all of it did); with several
            tokenizers, the longest.
        limit: the limit that cut it off, in tokens.
        beside: what the same columns, from the first on, are to another text encoder that got a text of its own (Stable
            Diffusion XL's prompt_2): phrases that this text lacks are looked up there.
    """

    prompt: str
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int] | None, ...]
    begin: tuple[int, ...]
    words: tuple[int, ...]
    first_eot: tuple[int, ...]
    padding: tuple[int, ...]
    cut_off: str = ""
    limit: int = 0
    beside: PromptTokens | None = None

    def find(self, phrase: str, occurrence: int | Literal["all"] = "all") -> TokenPositions:
        """The columns of `phrase` (whole words, in any case): of every occurrence, or of the n-th, counted from 0.

        A learned token that stands for several ("<toy> <toy>_1 <toy>_2") is found with all of them. An occurrence that
        was cut off, even in part, doesn't count.

        Raises:
            PhraseNotFoundError: it isn't in the prompt, there are fewer occurrences, or it was cut off.
        """
        spans = find_phrase(self.prompt, phrase)
        if not spans:
            if self.beside is not None and find_phrase(self.beside.prompt, phrase):
                return self.beside.find(phrase, occurrence)
            texts = [self.prompt] if self.beside is None else [self.prompt, self.beside.prompt]
            words = [word.strip(".,;:!?\"()[]{}") for word in " ".join(texts).split()]
            close = difflib.get_close_matches(phrase.casefold(), [word.casefold() for word in words if word], 1)
            raise PhraseNotFoundError(f"{phrase!r} is not in the prompt {' or '.join(map(repr, texts))}; words there: "
                                      f"{', '.join(dict.fromkeys(word for word in words if word))}"
                                      f"{f' (did you mean {close[0]!r}?)' if close else ''}")
        found = []
        for start, end in spans:
            columns = tuple(c for c in self.words if self.spans[c][0] < end and start < self.spans[c][1])
            whole = not self.cut_off or any(self.spans[column][1] >= end for column in columns)
            found.append(columns if whole else ())
        if occurrence != "all":
            if not 0 <= occurrence < len(found):
                raise PhraseNotFoundError(f"{phrase!r} occurs {len(found)} time(s) in {self.prompt!r}, counted from 0; "
                                          f"there is no occurrence {occurrence}")
            found = [found[occurrence]]
        if not any(found):
            which = "" if occurrence == "all" else f", occurrence {occurrence} from 0,"
            raise PhraseNotFoundError(
                f"{phrase!r}{which} stands past the limit of {self.limit or len(self.tokens)} tokens; cut off was "
                f"{self.cut_off!r}: shorten the prompt or put the phrase first")
        return TokenPositions(phrase, tuple(columns for columns in found if columns))

    def part(self, name: str, phrase: str | None = None) -> tuple[int, ...]:
        """The columns of a named part.

        "begin", "first_eot" and "padding" belong to the prompt. "words" are the phrase's columns, and "later" are the
        words after its first occurrence; without a phrase, "words" are all words.

        Raises:
            ValueError: an unknown part, or "later" without a phrase.
        """
        if name not in PARTS:
            raise ValueError(f"{name!r} is not a part of a prompt; choose from {', '.join(PARTS)}")
        if name in ("begin", "first_eot", "padding"):
            return getattr(self, name)
        if name == "words":
            return self.words if phrase is None else self.find(phrase).columns
        if phrase is None:
            raise ValueError("'later' means the words after a phrase: name the phrase")
        own = self.find(phrase)
        end = max(self.spans[column][1] for column in own.occurrences[0])
        return tuple(c for c in self.words if self.spans[c][0] >= end and c not in own.columns)

    def label(self, column: int) -> str:
        """What to write beside a column: the characters it stands for, or "begin", "end" or "padding"."""
        if self.spans[column] is not None:
            return self.prompt[slice(*self.spans[column])].strip() or self.tokens[column]
        return "begin" if column in self.begin else "end" if column in self.first_eot else "padding"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptTokens:
        """The reverse of `to_dict`."""
        parts = {name: tuple(values[name]) for name in ("begin", "words", "first_eot", "padding")}
        spans = tuple(None if span is None else (int(span[0]), int(span[1])) for span in values["spans"])
        beside = values.get("beside")
        return cls(values["prompt"], tuple(values["tokens"]), spans, **parts, cut_off=values["cut_off"],
                   limit=values.get("limit", 0), beside=beside and cls.from_dict(beside))


def written_out(tokenizer: Any, text: str) -> str:
    """The text, "<toy>" written as the tokens it was learned as, "<toy> <toy>_1 <toy>_2", as diffusers does."""
    added = tokenizer.get_added_vocab()
    several = [token for token in added if f"{token}_1" in added and f"{token}_1" not in text]
    if not any(token in text for token in several):
        return text

    def whole(found: re.Match[str]) -> str:
        token = found[0]
        if token not in several:
            return token
        count = next(n for n in range(1, len(added) + 1) if f"{token}_{n}" not in added)
        return " ".join([token, *(f"{token}_{n}" for n in range(1, count))])

    names = sorted(added, key=len, reverse=True)  # as the tokenizer reads them: of two that begin alike, the longer
    return re.sub("|".join(map(re.escape, names)), whole, text)


def read_prompt(tokenizer: Any, prompt: str, max_length: int | None = None) -> PromptTokens:
    """What each column is when `tokenizer` pads and truncates `prompt` to `max_length`, as pipelines do.

    Learned tokens of several vectors are written out first (`written_out`), also in the result's `prompt`.

    Args:
        tokenizer: any transformers tokenizer; if it reports no character offsets, its tokens are searched for in the
            prompt one after another.
        max_length: columns in all; None for the tokenizer's own limit (or no padding if it has none).

    Raises:
        UnreadablePromptError: the tokenizer reports no offsets, and its tokens don't spell the prompt.
    """
    prompt = written_out(tokenizer, prompt)
    limit = max_length or tokenizer.model_max_length
    padded = {"padding": "max_length", "max_length": limit, "truncation": True} if limit < 1_000_000 else {}
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(prompt, **padded, **({"return_offsets_mapping": True} if fast else {}))
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    offsets = encoded["offset_mapping"] if fast else spelt_offsets(tokenizer, prompt, ids, mask)
    tokens = tuple(tokenizer.convert_ids_to_tokens(ids))
    spans = tuple(tuple(span) if kept and span[1] > span[0] else None
                  for span, kept in zip(offsets, mask, strict=True))
    special = [column for column, span in enumerate(spans) if span is None and mask[column]]
    eot = [column for column in special if ids[column] == tokenizer.eos_token_id][:1]
    padding = tuple(column for column, kept in enumerate(mask) if not kept)
    words = tuple(column for column, span in enumerate(spans) if span is not None)
    begin = tuple(column for column in special if column not in eot)
    whole = len(tokenizer(prompt, verbose=False)["input_ids"]) <= sum(mask)
    cut_off = "" if whole else prompt[max((span[1] for span in spans if span), default=0):].strip()
    return PromptTokens(prompt, tokens, spans, begin, words, tuple(eot), padding, cut_off, len(tokens))


def read_chunks(tokenizer: Any, prompt: str, chunks: int) -> tuple[PromptTokens, list[list[int]]]:
    """What each column is when a long prompt is encoded in chunks that stand in a row, and each chunk's token ids.

    A chunk has as many columns as the tokenizer's limit: begin, as many of the prompt's tokens as there is room for,
    end-of-text, padding.
    """
    prompt = written_out(tokenizer, prompt)
    limit = tokenizer.model_max_length
    fast, room = getattr(tokenizer, "is_fast", False), limit - 2
    asked = {"return_offsets_mapping": True} if fast else {}
    read = tokenizer(prompt, add_special_tokens=False, verbose=False, **asked)
    ids = read["input_ids"]
    offsets = read["offset_mapping"] if fast else spelt_offsets(tokenizer, prompt, ids, [1] * len(ids))
    parts, rows = [], []
    for start in range(0, chunks * room, room):
        own, spans = ids[start:start + room], [tuple(span) for span in offsets[start:start + room]]
        empty = room - len(own)
        rows.append([tokenizer.bos_token_id, *own, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * empty])
        parts.append(PromptTokens(
            prompt, tuple(tokenizer.convert_ids_to_tokens(rows[-1])), (None, *spans, *[None] * (1 + empty)), (0,),
            tuple(range(1, 1 + len(own))), (1 + len(own),), tuple(range(2 + len(own), limit))))
    rest = prompt[offsets[chunks * room - 1][1]:].strip() if len(ids) > chunks * room else ""
    return replace(join_prompts(parts), cut_off=rest, limit=chunks * limit), rows


def spelt_offsets(tokenizer: Any, prompt: str, ids: Sequence[int], mask: Sequence[int]) -> list[tuple[int, int]]:
    """The characters [start, end) of each token, found by decoding one after another; (0, 0) for special tokens.

    Raises:
        UnreadablePromptError: tokens that aren't in the prompt stand between tokens that are, or the prompt has more.
    """
    offsets, place, folded = [(0, 0)] * len(ids), 0, prompt.lower()
    spelt, more = [], []
    for column, (number, kept) in enumerate(zip(ids, mask, strict=True)):
        piece = tokenizer.decode([number]).strip().lower() if kept and number not in tokenizer.all_special_ids else ""
        start = place + len(folded[place:]) - len(folded[place:].lstrip())
        if kept and number not in tokenizer.all_special_ids and start < len(folded) and folded.startswith(piece, start):
            offsets[column] = (start, start + max(1, len(piece)))  # T5 may write a space as a token of its own
            place = start + len(piece)
            spelt.append(column)
        elif piece:
            more.append(column)
    between = spelt and any(spelt[0] < column < spelt[-1] for column in more)
    all_there = not folded[place:].strip() or all(mask)  # a full row may be cut off
    if between or not all_there or len(folded) != len(prompt):
        raise UnreadablePromptError(f"{type(tokenizer).__name__} reports no character offsets, and its tokens don't "
                                    f"spell {prompt!r}: load its fast version, or ask for columns by number")
    return offsets


def join_prompts(parts: Sequence[PromptTokens]) -> PromptTokens:
    """The columns of several tokenizers one after another (Stable Diffusion 3: CLIP's, then T5's)."""
    cut = max((part for part in parts if part.words), key=lambda part: len(part.cut_off), default=parts[0])
    joined = parts[0]
    for part in parts[1:]:
        columns, text, characters = len(joined.tokens), joined.prompt, 0
        if part.prompt != text:
            text, characters = f"{text}\n{part.prompt}", len(text) + 1
        spans = tuple(span and (span[0] + characters, span[1] + characters) for span in part.spans)
        shifted = {name: getattr(joined, name) + tuple(column + columns for column in getattr(part, name))
                   for name in ("begin", "words", "first_eot", "padding")}
        joined = PromptTokens(text, joined.tokens + part.tokens, joined.spans + spans, **shifted)
    return replace(joined, cut_off=cut.cut_off, limit=cut.limit)


def find_phrase(text: str, phrase: str) -> list[tuple[int, int]]:
    """The character ranges [start, end) of `phrase` in `text`. Case and the kind of white space or apostrophe don't
    matter; words must be whole ("cat" isn't in "concatenate"), except in scripts written without spaces.

    Raises:
        ValueError: an empty phrase.
    """
    if not phrase.strip():
        raise ValueError("the phrase is empty; name a word of the prompt")
    for form in dict.fromkeys((phrase, unicodedata.normalize("NFC", phrase), unicodedata.normalize("NFD", phrase))):
        body = r"\s+".join(re.sub("['\u2019]", "['\u2019]", re.escape(word)) for word in form.split())
        before = r"(?<!\w)" if _spaced(form.strip()[0]) else ""
        after = r"(?!\w)" if _spaced(form.strip()[-1]) and not _takes_particles(form.strip()[-1]) else ""
        pattern = rf"{before}{body}{after}(?:\s+{body}_\d+)*"
        if found := [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]:
            return found
    return []


def put_instead(text: str, phrases: Sequence[str], words: str) -> str | None:
    """The text with `words` wherever the first of the phrases that it holds stands; None if it holds none of them."""
    for phrase in phrases:
        if spans := find_phrase(text, phrase):
            for start, end in reversed(spans):
                text = text[:start] + words + text[end:]
            return text
    return None


def spoken(concept: Concept) -> Concept:
    """The concept, named by what stands for it in a prompt: its name, or the phrase (a learned token) in its place."""
    return concept if find_phrase(concept.name, concept.phrase) else replace(concept, name=concept.phrase)


def _spaced(letter: str) -> bool:
    """Whether a letter belongs to a script that puts spaces between words, so that words have borders."""
    name = unicodedata.name(letter, "")
    return bool(re.match(r"\w", letter)) and not name.startswith(
        ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def _takes_particles(letter: str) -> bool:
    """Whether the letter's script writes grammar at the end of a word, as Korean writes particles."""
    return unicodedata.name(letter, "").startswith("HANGUL")
