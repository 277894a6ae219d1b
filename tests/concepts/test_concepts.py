"""Concepts and their prompts, and where a phrase's tokens stand, on real tokenizers."""

from __future__ import annotations

import pytest
from tiny import clip_tokenizer, t5_tokenizer

from fmn_nb import concepts
from fmn_nb.concepts import (
    Concept,
    PhraseNotFoundError,
    PromptTokens,
    UnreadablePromptError,
    find_phrase,
    join_prompts,
    read_prompt,
)
from fmn_nb.concepts.concept import forms_of


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def t5():
    return t5_tokenizer(24)


@pytest.mark.parametrize("name, kind, prompt", [
    ("cat", "object", "a photo of a cat"), ("octopus", "object", "a photo of an octopus"),
    ("unicorn", "object", "a photo of a unicorn"), ("hourglass", "object", "a photo of an hourglass"),
    ("the moon", "object", "a photo of the moon"), ("noto", "style", "a photo in the style of noto"),
    ("nudity", "object", "a photo of nudity"), ("people", "object", "a photo of people"),
    ("blue jeans", "object", "a photo of blue jeans"), ("MRI scan", "object", "a photo of an MRI scan"),
    ("UFO", "object", "a photo of a UFO"), ("glass bus", "object", "a photo of a glass bus"),
    ("cactus", "object", "a photo of a cactus"), ("lens", "object", "a photo of a lens"),
    ("Elon Musk", "identity", "a photo of Elon Musk"), ("  birthday   cake ", "object", "a photo of a birthday cake")])
def test_the_plain_prompt(name, kind, prompt):
    assert Concept(name, kind).prompt == prompt


@pytest.mark.parametrize("name", ["---", "\u200b", "\u200f", "cat\u202e", "cat\ud800", "cat\ndog", "", 7, None, True])
def test_a_name_is_a_text_with_letters_and_nothing_hidden(name):
    with pytest.raises(ValueError, match="a concept's name must be"):
        Concept(name)


def test_a_number_that_papermill_made_is_told_how_to_stay_a_text():
    with pytest.raises(ValueError, match="-r"):
        Concept(7)


def test_plurals_are_forms_of_a_noun():
    assert {"cat", "cats"} <= set(forms_of("cat")) and "body" in forms_of("bodies") and "foxes" in forms_of("fox")
    assert "cat" in forms_of("cats") and "glas" not in forms_of("glass")
    assert "computer mice" in forms_of("computer mouse") and "mouse" in forms_of("mice")
    assert "wolves" in forms_of("wolf") and "wolf" in forms_of("wolves") and "knives" in forms_of("knife")
    assert "rooves" not in forms_of("roof")


def test_apostrophes_and_particles_do_not_hide_a_phrase():
    assert find_phrase("a photo of Milo\u2019s bowl", "Milo's") and find_phrase("a photo of Milo's bowl", "Milo\u2019s")
    assert find_phrase("\uace0\uc591\uc774\ub97c \uadf8\ub9bc", "\uace0\uc591\uc774")  # a cat, with its particle
    assert not find_phrase("a concatenation", "cat")


def test_a_concept_shows_itself():
    shown = Concept("<i>cat")._repr_html_()
    assert "object" in shown and "a photo of" in shown and "<i>" not in shown


def test_the_paper_s_prompts_have_no_article():
    assert Concept("cat").paper_prompt == "a photo of cat"
    assert Concept("noto", "style").paper_prompt == "a photo in the style of noto"


@pytest.mark.parametrize("kind", ["object", "style", "identity"])
def test_varied_prompts_all_name_the_concept(kind):
    concept = Concept("umbrella", kind)
    prompts = concept.prompts(20)
    assert len(prompts) == 20 and prompts[0] == concept.prompt and len(set(prompts)) >= 6
    assert all(find_phrase(prompt, concept.phrase) for prompt in prompts)
    assert all(("an umbrella" in prompt) == (kind == "object") for prompt in prompts)


def test_the_phrase_to_look_for():
    assert Concept("a birthday cake").phrase == "birthday cake"
    assert Concept("a").phrase == "a"
    assert Concept("cat toy", phrase="<cat-toy>").phrase == "<cat-toy>"


@pytest.mark.parametrize("arguments", [("",), ("  ",), ("a\x00b",), ("a\nb",), (None,), ("cat", "animal"),
                                       ("cat", "object", " ")])
def test_bad_concepts_are_refused(arguments):
    with pytest.raises(ValueError):
        Concept(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        Concept("cat").prompts(0)


@pytest.mark.parametrize("noun, expected", [
    ("apple", "an apple"), ("European city", "a European city"), ("uninvited guest", "an uninvited guest"),
    ("3 cats", "3 cats"), ("<toy>", "<toy>"), ("one-way street", "a one-way street"), ("owl", "an owl")])
def test_articles(noun, expected):
    assert concepts.with_article(noun) == expected


def test_every_column_belongs_to_one_part(clip, t5):
    for tokenizer in (clip, t5):
        read = read_prompt(tokenizer, "a photo of a cat")
        parts = read.begin + read.words + read.first_eot + read.padding
        assert sorted(parts) == list(range(tokenizer.model_max_length))
        assert len(read.first_eot) == 1 and read.first_eot[0] == max(read.words) + 1
    assert read_prompt(clip, "a cat").begin == (0,) and read_prompt(t5, "a cat").begin == ()


def test_padding_that_is_end_of_text_is_not_the_first_end_of_text(clip):
    """Stable Diffusion 1.x pads with <|endoftext|>: one position is the end, the others are padding."""
    assert clip.pad_token == clip.eos_token
    read = read_prompt(clip, "a photo of a cat")
    assert read.tokens[6:] == ("<|endoftext|>",) * 10
    assert read.first_eot == (6,) and read.padding == tuple(range(7, 16))


def test_the_columns_of_parts(clip):
    read = read_prompt(clip, "a cat and a dog")  # begin, a, cat, and, a, dog, end
    columns = {part: read.part(part, "cat") for part in ("begin", "words", "later", "first_eot", "padding")}
    assert columns == {"begin": (0,), "words": (2,), "later": (3, 4, 5), "first_eot": (6,),
                       "padding": tuple(range(7, 16))}
    assert read.part("words") == (1, 2, 3, 4, 5)
    with pytest.raises(PhraseNotFoundError):
        read.part("words", "frog")
    with pytest.raises(ValueError, match="'eot' is not a part"):
        read.part("eot", "cat")
    with pytest.raises(ValueError, match="name the phrase"):
        read.part("later")


def test_words_of_several_tokens_and_phrases_with_spaces(clip, t5):
    for tokenizer in (clip, t5):
        read = read_prompt(tokenizer, "a Birthday  Cake, a toad", 40)
        for phrase, written in (("birthday cake", "Birthday  Cake"), ("TOAD", "toad")):
            columns = read.find(phrase).columns
            assert len(columns) > 1 and columns == tuple(range(columns[0], columns[-1] + 1))
            assert read.prompt[read.spans[columns[0]][0] : read.spans[columns[-1]][1]] == written


def test_repeats_all_or_the_nth(clip):
    read = read_prompt(clip, "a cat, a cat and a Cat")
    assert read.find("cat").occurrences == ((2,), (5,), (8,)) and read.find("cat").columns == (2, 5, 8)
    assert read.find("cat", 1).columns == (5,)
    with pytest.raises(PhraseNotFoundError, match="occurs 3 time"):
        read.find("cat", 3)


def test_words_are_whole_words(clip):
    with pytest.raises(PhraseNotFoundError, match=r"'cat' is not in the prompt 'a dog, a cathedral'; "
                                                  r"words there: a, dog, cathedral"):
        read_prompt(clip, "a dog, a cathedral").find("cat")
    assert find_phrase("(cat) cat's cat-like concat cats", "cat") == [(1, 4), (6, 9), (12, 15)]
    with pytest.raises(ValueError, match="empty"):
        find_phrase("a cat", " ")


def test_non_ascii(clip):
    prompt = "a café, 一只猫在 🐱 Ünïcode"
    read = read_prompt(clip, prompt, 40)
    for phrase in ("café", "cafe\u0301", "猫", "🐱", "ünïcode"):
        columns = read.find(phrase).columns
        assert columns, phrase
        start, end = read.spans[columns[0]][0], read.spans[columns[-1]][1]
        assert find_phrase(prompt, phrase) == [(start, end)]


def test_learned_tokens(clip):
    clip = clip_tokenizer()
    clip.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    read = read_prompt(clip, "a photo of <toy> <toy>_1 <toy>_2 and a cat")
    assert [read.tokens[c] for c in read.find("<toy>").columns] == ["<toy>", "<toy>_1", "<toy>_2"]
    assert [read.tokens[c] for c in read.find("cat").columns] == ["cat</w>"]


def test_what_is_cut_off(clip):
    prompt = "a cat " + "and a dog " * 6 + "and a frog"
    read = read_prompt(clip, prompt)
    assert len(read.tokens) == 16 and read.cut_off == "and a dog and a dog and a frog"
    assert len(read.find("dog").occurrences) == 4
    with pytest.raises(PhraseNotFoundError, match="'frog' stands past the limit of 16 tokens; cut off was 'and a dog"):
        read.find("frog")
    with pytest.raises(PhraseNotFoundError, match="'dog', occurrence 5 from 0, stands past the limit of 16 tokens"):
        read.find("dog", 5)
    with pytest.raises(PhraseNotFoundError, match="occurs 6 time"):
        read.find("dog", 6)
    assert read_prompt(clip, "a cat").cut_off == "" and read_prompt(clip, prompt, 64).cut_off == ""


def test_a_phrase_cut_in_its_middle_is_not_found_in_part(clip):
    start = "a cat and a dog and a cat and a "
    read = read_prompt(clip, start + "butterfly house")
    assert read.words[-1] in read_prompt(clip, start + "butterfly").words and read.cut_off  # "butt" or so is there
    for phrase in ("butterfly house", "butterfly"):
        with pytest.raises(PhraseNotFoundError, match="stands past the limit of 16 tokens; cut off was "):
            read.find(phrase)
    assert len(read_prompt(clip, start + "butterfly, a butterfly house", 24).find("butterfly").occurrences) == 1
    whole = read_prompt(clip, start + "butterfly house", 40).find("butterfly house").columns
    assert len(whole) > 2


def test_what_is_cut_off_of_several_tokenizers(clip):
    long = "a cat " + "and a dog " * 6 + "and a frog"
    absent = PromptTokens(long, ("",) * 20, (None,) * 20, (), (), (), tuple(range(20)))
    without = join_prompts([read_prompt(clip, long), absent])
    assert without.cut_off == "and a dog and a dog and a frog" and len(without.tokens) == 36
    with pytest.raises(PhraseNotFoundError, match="limit of 16 tokens; cut off was 'and a dog and a dog and a frog'"):
        without.find("frog")
    both = join_prompts([read_prompt(clip, long), read_prompt(t5_tokenizer(40), long)])
    assert both.cut_off == without.cut_off and len(both.find("frog").columns) == 1  # the second holds it
    assert PromptTokens.from_dict(both.to_dict()) == both


def test_two_tokenizers_one_after_another(clip, t5):
    same = join_prompts([read_prompt(clip, "a cat"), read_prompt(t5, "a cat")])
    assert same.prompt == "a cat" and len(same.tokens) == 40
    assert [same.tokens[c] for c in same.find("cat").columns] == ["cat</w>", "▁cat"]
    assert len(same.find("cat").occurrences) == 1 and same.first_eot == (3, 19)
    other = join_prompts([read_prompt(clip, "a cat"), read_prompt(t5, "a dog")])
    assert [other.tokens[c] for c in other.find("dog").columns] == ["▁dog"]
    assert [other.tokens[c] for c in other.find("cat").columns] == ["cat</w>"]


class Slow:
    """A tokenizer written in Python alone, as Kolors' ChatGLM: it reports no character offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.inner = tokenizer

    def __call__(self, *texts, **options):
        return self.inner(*texts, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("prompt", ["A photo of a cat,  and a butterfly", "", "a cat " * 20])
def test_a_tokenizer_without_offsets_is_read_by_its_tokens(clip, t5, prompt):
    for tokenizer, text in ((clip, prompt), (t5, prompt.lower())):
        slow, fast = read_prompt(Slow(tokenizer), text), read_prompt(tokenizer, text)
        assert slow.words == fast.words and slow.cut_off == fast.cut_off and slow.first_eot == fast.first_eot
        if text:
            assert slow.find("cat") == fast.find("cat")


def test_a_tokenizer_whose_tokens_do_not_spell_the_prompt_is_refused(clip, monkeypatch):
    monkeypatch.setattr(type(clip), "decode", lambda *_: "\ufffd")
    with pytest.raises(UnreadablePromptError, match="no character offsets"):
        read_prompt(Slow(clip), "a cat")
