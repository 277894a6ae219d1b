"""Textual inversion: the new rows are learned and nothing else, and plain diffusers takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick import quick
from safetensors.torch import save_file
from snapshots import assert_unchanged, draw, noise_images, snapshot
from tiny import tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb import inversion as inversion
from fmn_nb.attention.recorder import record_attention
from fmn_nb.concepts import written_out
from fmn_nb.concepts.concept import TEMPLATES, Concept
from fmn_nb.inversion import InversionSettings, invert
from fmn_nb.models import text_encoders, tokenizers
from fmn_nb.models.images import encode
from fmn_nb.patches import InversionError, LearnedTokens, Patch

QUICK = InversionSettings(tokens=2, steps=3, warmup=0, learning_rate=1e-2)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_learns_for_every_text_encoder_and_leaves_the_pipeline_as_it_was(make) -> None:
    pipe = make()
    before = snapshot(pipe)
    tokens = invert(pipe, noise_images(2), initial="cat", settings=QUICK)
    assert_unchanged(pipe, before)
    assert [vectors.shape for vectors in tokens.vectors] == [(2, 16)] * (1 if make is tiny_sd else 2)
    assert len(tokens.losses) == 3 and all(loss > 0 for loss in tokens.losses)
    with tokens.loaded(pipe):
        assert not torch.equal(draw(pipe, "a photo of <concept>"), draw(pipe, "a photo of <concept>_1"))
    assert "<concept>" not in pipe.tokenizer.get_vocab()


def test_the_loss_falls_and_the_same_seed_learns_the_same() -> None:
    """On one image at all timesteps of a fixed stream, learning beats not learning."""
    pipe = tiny_sd()
    latents = encode(pipe, noise_images(1))
    learned, still = (
        invert(pipe, latents, settings=InversionSettings(tokens=4, steps=30, warmup=0, learning_rate=rate, norm="free",
                                                         weight_decay=0.0)) for rate in (5e-2, 0.0))
    again = invert(pipe, latents, settings=InversionSettings(tokens=4, steps=30, warmup=0, learning_rate=5e-2,
                                                             norm="free", weight_decay=0.0))
    assert sum(learned.losses[-10:]) < sum(still.losses[-10:])
    assert learned.losses[0] == still.losses[0]
    assert torch.equal(learned.vectors[0], again.vectors[0]) and learned.losses == again.losses


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_plain_diffusers_draws_the_same_with_the_tokens_of_all_text_encoders(make, tmp_path: Path) -> None:
    pipe, plain = make(), make()
    tokens = invert(pipe, noise_images(2), settings=QUICK, name="<toy>")
    tokens.save(tmp_path)
    for suffix in ("", "_2")[:len(tokens.vectors)]:
        plain.load_textual_inversion(
            tmp_path, weight_name=f"learned_embeds{suffix}.safetensors",
            text_encoder=getattr(plain, f"text_encoder{suffix}"), tokenizer=getattr(plain, f"tokenizer{suffix}"))
    with tokens.loaded(pipe):
        assert torch.equal(draw(pipe, "a photo of <toy>"), draw(plain, "a photo of <toy>"))
    again = LearnedTokens.load(tmp_path)
    assert again.name == "<toy>"
    assert all(torch.equal(*pair) for pair in zip(again.vectors, tokens.vectors, strict=True))


@pytest.mark.parametrize(("kind", "first"), [
    ("object", "a photo of <t>"), ("style", "a photo in the style of <t>"), ("identity", "a photo of <t>")])
def test_each_kind_has_its_templates(kind: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], inversion.conditions
    monkeypatch.setattr(inversion, "conditions",
                        lambda pipe, prompts, **more: (seen.extend(prompts), real(pipe, prompts, **more))[1])
    still = {"tokens": 1, "steps": 3}
    invert(tiny_sd(), noise_images(1), kind=kind, name="<t>", settings=InversionSettings(**still))
    assert seen == [first] * 3
    seen.clear()
    invert(tiny_sd(), noise_images(1), kind=kind, name="<t>", settings=InversionSettings(**still, varied=True))
    assert seen == [template.format("<t>") for template in TEMPLATES[kind][:3]] and seen[0] == first


def test_several_learned_tokens_can_be_known_at_once() -> None:
    pipe = tiny_sd()
    before, noise = snapshot(pipe), torch.Generator().manual_seed(0)
    one, two = (LearnedTokens(name, (torch.randn(2, 16, generator=noise),)) for name in ("<one>", "<two>"))
    with one.loaded(pipe):
        alone = draw(pipe, "a photo of <one>")
        with two.loaded(pipe):
            assert torch.equal(draw(pipe, "a photo of <one>"), alone)
            both = draw(pipe, "<one> and <two>")
        with LearnedTokens("<two>", (two.vectors[0] + 1,)).loaded(pipe):
            assert not torch.equal(draw(pipe, "<one> and <two>"), both)
    assert_unchanged(pipe, {**before, "timesteps": pipe.scheduler.timesteps, "steps": 3})


def test_a_token_that_would_break_the_order_is_refused() -> None:
    pipe = tiny_sd()
    with LearnedTokens("<toy>_1", (torch.zeros(1, 16),)).loaded(pipe):
        with pytest.raises(InversionError, match="already knows a token '<toy>_1'"):
            invert(pipe, noise_images(1), name="<toy>", settings=QUICK)
        for known in ("<toy>_1", "<TOY>_1"):  # CLIP's tokenizer reads both alike
            with (pytest.raises(InversionError, match="already knows some"),
                  LearnedTokens(known, (torch.ones(1, 16),)).loaded(pipe)):
                pass
        with (pytest.raises(InversionError, match="already knows some"),
              LearnedTokens("<toy>", (torch.zeros(2, 16),)).loaded(pipe)):
            pass


def test_lengths_are_drawn_to_what_was_asked_for() -> None:
    pipe = tiny_sd()
    vocabulary = pipe.text_encoder.get_input_embeddings().weight.norm(dim=-1).mean()
    for norm, wanted in ((0.4, 0.4), ("vocabulary", float(vocabulary.detach()))):
        tokens = invert(pipe, noise_images(1), settings=InversionSettings(tokens=2, steps=2, warmup=0, norm=norm,
                                                                          learning_rate=0.01))
        assert tokens.vectors[0].norm(dim=-1).tolist() == pytest.approx([wanted] * 2, rel=1e-4)


def test_initial_words_are_shared_out_over_the_tokens() -> None:
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    ids = pipe.tokenizer("birthday cake", add_special_tokens=False).input_ids
    still = {"steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "norm": "free"}
    one = invert(pipe, noise_images(1), initial="birthday cake", settings=InversionSettings(tokens=1, **still))
    torch.testing.assert_close(one.vectors[0][0], table[ids].mean(0))
    more = InversionSettings(tokens=len(ids) + 2, **still)
    many = invert(pipe, noise_images(1), initial="birthday cake", settings=more)
    assert torch.equal(many.vectors[0][: len(ids)], table[ids])
    assert len({tuple(row.tolist()) for row in many.vectors[0]}) == len(ids) + 2


def test_a_concept_that_words_describe_badly_is_inverted_and_then_forgotten(tmp_path: Path) -> None:
    """The whole way: tokens from images, a fine-tune on their name, and the patch without them in it."""
    pipe, images = tiny_sd(), noise_images(2)
    before = snapshot(pipe)
    tokens = invert(pipe, images, name="<toy>", settings=QUICK)

    def mass() -> float:
        with record_attention(pipe) as attention:
            draw(pipe, "a photo of <toy>")
        return attention.mass("<toy>")

    with tokens.loaded(pipe):
        patch = quick(pipe, Concept("toy", phrase="<toy>"), references=images, steps=25, learning_rate=2e-2,
                      retain_weight=1.0, positions=("words",))
        whole = mass()
        with Patch.load(patch.save(tmp_path)).applied(pipe):
            forgotten = mass()
    assert 0 < forgotten < 0.6 * whole
    assert patch.info["concepts"] == [{"name": "toy", "kind": "object", "phrase": "<toy>"}] and patch.tokens is None
    assert not list(tmp_path.glob("learned_embeds*"))
    assert_unchanged(pipe, {**before, "timesteps": pipe.scheduler.timesteps, "steps": 3})  # draw sets these


@pytest.mark.parametrize(("wrong", "text"), [
    ({"name": "toy"}, "angle brackets"), ({"name": "<a b>"}, "angle brackets"), ({"kind": "animal"}, "not a kind"),
    ({"name": "<|endoftext|>"}, "angle brackets"), ({"initial": "<|endoftext|>"}, "no token but special"),
])
def test_wrong_requests_are_clear_errors(wrong: dict, text: str) -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(InversionError, match=text):
        invert(pipe, noise_images(1), settings=QUICK, **wrong)
    assert_unchanged(pipe, before)
    for settings in ({"tokens": 0}, {"norm": "long"}, {"norm": -1.0}, {"learning_rate": float("nan")},
                     {"learning_rate": "1e-3"}):
        with pytest.raises(InversionError):
            InversionSettings(**settings)


def test_a_name_taken_and_an_interrupt_leave_the_pipeline_as_it_was() -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    tokens = LearnedTokens("<toy>", (torch.randn(1, 16, generator=torch.Generator().manual_seed(0)),))
    with tokens.loaded(pipe), pytest.raises(InversionError, match="already knows"):
        invert(pipe, noise_images(1), name="<toy>", settings=QUICK)

    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(pipe, noise_images(1), settings=QUICK, callback=interrupt)
    assert_unchanged(pipe, before)
    with pytest.raises(InversionError, match="don't fit"), LearnedTokens("<toy>", (torch.zeros(1, 5),)).loaded(pipe):
        pass
    assert_unchanged(pipe, before)


def test_damaged_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="can't be read"):
        LearnedTokens.load(tmp_path)
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"xx")
    with pytest.raises(InversionError, match="can't be read"):
        LearnedTokens.load(tmp_path)
    for vectors in (torch.tensor(1.0), torch.zeros(2, 0)):
        save_file({"<a>": vectors}, tmp_path / "learned_embeds.safetensors")
        with pytest.raises(InversionError, match="learned tokens are vectors"):
            LearnedTokens.load(tmp_path)
    save_file({"<a>": torch.zeros(1, 4), "<b>": torch.zeros(1, 4)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(InversionError, match="learned tokens are one"):
        LearnedTokens.load(tmp_path)


@pytest.mark.parametrize(("content", "name", "count"), [
    ({"emb_params": torch.ones(2, 16)}, None, 1), ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 20)}, None, 2),
    ({"text_encoders_0": torch.ones(2, 16), "text_encoders_1": torch.ones(2, 20)}, None, 2),
    ({"clip_g": torch.ones(2, 16)}, None, 1), ({"<toy>": torch.ones(2, 16)}, "<toy>", 1),
    ({"my-toy": torch.ones(16, dtype=torch.float16)}, "my-toy", 1)])
@pytest.mark.parametrize("file", ["learned_embeds.safetensors", "toy.safetensors"])
def test_embeddings_from_elsewhere_are_read_by_folder_or_file_and_named(content, name, count, file, tmp_path) -> None:
    save_file(content, tmp_path / file)
    for place in (tmp_path, tmp_path / file, str(tmp_path / file)):
        if name is None:
            with pytest.raises(InversionError, match="choose a name"):
                LearnedTokens.load(place)
        else:
            assert LearnedTokens.load(place).name == name
        tokens = LearnedTokens.load(place, name="<mine>")
        assert tokens.token_names[0] == "<mine>" and len(tokens.vectors) == count
        assert [vectors.shape[1] for vectors in tokens.vectors] == [16, 20][:count]
        assert all(vectors.dtype == torch.float32 for vectors in tokens.vectors)


@pytest.mark.parametrize(("content", "text"), [
    ({"<toy>": torch.full((1, 16), float("nan"))}, "NaN"), ({"<toy>": torch.full((1, 16), float("inf"))}, "NaN"),
    ({"<toy>": torch.ones(1, 16, dtype=torch.int64)}, "floating"), ({"<toy>": torch.ones(1, 16) > 0}, "floating"),
    ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(1, 16)}, "as many"), ({"a b": torch.ones(1, 16)}, "blanks"),
    ({"x": torch.ones(1, 16), "y": torch.ones(1, 16)}, "holds 2 tensors")])
def test_embeddings_that_are_none_are_refused(content: dict, text: str, tmp_path: Path) -> None:
    save_file(content, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(InversionError, match=text):
        LearnedTokens.load(tmp_path, name=None if set(content) & {"a b", "<toy>"} else "<toy>")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickled_embeddings_are_told_by_file_and_folder(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"learned_embeds{suffix}"
    torch.save({"<toy>": torch.ones(1, 16)}, file)
    for place in (tmp_path, file):
        with pytest.raises(InversionError, match="is pickled"):
            LearnedTokens.load(place)


def test_tokens_are_learned_for_the_encoders_that_are_there() -> None:
    pipe = tiny_sd3()
    pipe.text_encoder_3 = None  # its tokenizer is still there
    learned = invert(pipe, noise_images(2), settings=InversionSettings(tokens=1, steps=1), size=(16, 16))
    assert len(learned.vectors) == 2


def test_a_flipped_bit_and_too_few_encoders_are_told(tmp_path: Path) -> None:
    tokens = LearnedTokens("<toy>", (torch.randn(1, 16), torch.randn(1, 16)))
    file = tokens.save(tmp_path) / "learned_embeds.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(InversionError, match="damaged or was changed"):
        LearnedTokens.load(tmp_path)
    pipe = tiny_sd()
    before = snapshot(pipe)
    with pytest.raises(InversionError, match="2 text encoders don't fit"), tokens.loaded(pipe):
        pass
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_all_vectors_of_a_token_are_read_also_by_pipelines_that_do_not_write_them_out(make) -> None:
    pipe, noise = make(), torch.Generator().manual_seed(0)
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in text_encoders(pipe)]
    before = [type(tokenizer) for tokenizer in tokenizers(pipe)]
    one, other = ([torch.randn(2, width, generator=noise) for width in widths] for _ in range(2))
    found = []
    for last in (one, other):  # what the second vector is must make a difference
        vectors = tuple(torch.stack([first[0], second[1]]) for first, second in zip(one, last, strict=True))
        with LearnedTokens("<toy>", vectors).loaded(pipe), record_attention(pipe) as attention:
            found.append(draw(pipe, "a <toy> on grass"))
        read = attention.text(0)
        texts = {read.prompt[slice(*read.spans[column])] for column in read.find("<toy>").columns}
        assert texts == {"<toy>", "<toy>_1"}
    assert not torch.equal(*found)
    assert [type(tokenizer) for tokenizer in tokenizers(pipe)] == before


def test_a_token_that_the_pipelines_cleaning_loses_is_refused(monkeypatch) -> None:
    pipe = tiny_pixart()
    with pytest.raises(InversionError, match="cleans its prompts, and of '<Toy>' it leaves '<toy>': .*small letters"):
        invert(pipe, noise_images(1), name="<Toy>", settings=QUICK)
    monkeypatch.setattr(type(pipe), "_text_preprocessing", lambda self, text, clean_caption: [text.split("<")[0]])
    with pytest.raises(InversionError, match="can't read learned tokens"):
        invert(pipe, noise_images(1), name="<toy>", settings=QUICK)


def test_a_token_whose_name_begins_anothers_leaves_it_alone() -> None:
    pipe, noise = tiny_sd(), torch.Generator().manual_seed(0)
    short, long = (LearnedTokens(name, (torch.randn(count, 16, generator=noise),))
                   for name, count in (("bad", 3), ("bad-hands", 1)))
    with long.loaded(pipe):
        alone = draw(pipe, "a bad-hands cat")
        with short.loaded(pipe):
            assert torch.equal(draw(pipe, "a bad-hands cat"), alone)
            assert written_out(pipe.tokenizer, "a bad and a bad-hands") == "a bad bad_1 bad_2 and a bad-hands"
