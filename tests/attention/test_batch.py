"""Which prompt, image, branch and step each row belongs to, in every combination pipelines make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import by_hand, spied
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from tiny import generate, quiet, recorded, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from fmn_nb.attention import NotRecordedError, record_attention
from fmn_nb.concepts.tokens import PhraseNotFoundError, UnreadablePromptError, read_prompt
from fmn_nb.models.pipelines import denoiser

PROMPTS = ["a photo of a cat", "a frog and a dog"]


def guided(pipe, on: bool) -> dict:
    """Arguments that turn classifier-free guidance on or off."""
    if "Flux" in type(pipe).__name__:
        return {"true_cfg_scale": 4.0 if on else 1.0}
    return {"guidance_scale": 4.0 if on else 1.0}


def latents(pipe, count: int) -> torch.Tensor:
    noise = torch.randn(count, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    if "Flux" in type(pipe).__name__:
        return pipe._pack_latents(noise, count, 4, 8, 12)
    return noise


@pytest.mark.parametrize("guidance", [True, False])
def test_a_batch_s_maps_are_those_of_its_images_alone(pipe, guidance):
    """Two prompts with two images each, against four generations of one image from the same noise."""
    noise = latents(pipe, 4)
    negative = ["a fish", "a penguin"]
    with record_attention(pipe) as batch:
        generate(pipe, PROMPTS, num_images_per_prompt=2, latents=noise, negative_prompt=negative,
                 **guided(pipe, guidance))
    assert len(batch.images) == 4 and batch.steps == [0, 1]
    assert batch.branches == (["cond", "uncond"] if guidance else ["cond"])
    for image in range(4):
        prompt = PROMPTS[image // 2]
        with record_attention(pipe) as alone:
            generate(pipe, prompt, latents=noise[image : image + 1], negative_prompt=negative[image // 2],
                     **guided(pipe, guidance))
        assert alone.text().prompt.endswith(prompt) and alone.text(0) == batch.text(image)
        word = "cat" if image < 2 else "dog"
        for step in (0, 1):
            np.testing.assert_allclose(batch.select(word, image=image, step=step), alone.select(word, step=step),
                                       atol=2e-5)
            if guidance:
                absent = "fish" if image < 2 else "penguin"
                np.testing.assert_allclose(batch.select(absent, image=image, step=step, branch="uncond"),
                                           alone.select(absent, step=step, branch="uncond"), atol=2e-5)


def test_uncond_reads_the_negative_prompt_or_else_the_prompt_s_columns(sd):
    attention = recorded(sd, "a photo of a cat", negative_prompt="a dog", guidance_scale=4.0)
    column = attention.text().find("cat").columns
    assert np.array_equal(attention.select("cat", branch="uncond"), attention.select(columns=column, branch="uncond"))
    column = attention.text(branch="uncond").find("dog").columns
    assert np.array_equal(attention.select("dog", branch="uncond"), attention.select(columns=column, branch="uncond"))
    with pytest.raises(PhraseNotFoundError):
        attention.select("dog", branch="cond")
    with pytest.raises(PhraseNotFoundError):
        attention.select("frog", branch="uncond")


@pytest.mark.parametrize("maker", [tiny_sd, tiny_flux])
def test_the_same_text_in_both_branches_is_told_apart_by_order(maker):
    """In one batch, and in two calls."""
    pipe = maker()
    same = recorded(pipe, "a cat", negative_prompt="a cat", steps=3, **guided(pipe, True))
    assert same.branches == ["cond", "uncond"] and same.steps == [0, 1, 2] and len(same.images) == 1
    np.testing.assert_allclose(same.map("cat"), same.map("cat", branch="uncond"), atol=1e-6)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_scheduler_that_repeats_timesteps_makes_a_step_of_each_evaluation(scheduler, guidance):
    pipe = tiny_sd()
    pipe.scheduler = scheduler(**({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    evaluations = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: evaluations.append(1))
    attention = recorded(pipe, steps=4, guidance_scale=guidance)
    handle.remove()
    assert len(evaluations) > 4
    assert attention.steps == list(range(len(evaluations))) == list(range(len(attention.timesteps)))
    assert len(attention.images) == 1


PICTURE = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
FROM_IMAGES = {
    "sd-img2img": (tiny_sd, StableDiffusionImg2ImgPipeline), "sd-inpaint": (tiny_sd, StableDiffusionInpaintPipeline),
    "sdxl-img2img": (tiny_sdxl, StableDiffusionXLImg2ImgPipeline),
    "sdxl-inpaint": (tiny_sdxl, StableDiffusionXLInpaintPipeline),
    "sd3-img2img": (tiny_sd3, StableDiffusion3Img2ImgPipeline),
    "flux-img2img": (tiny_flux, FluxImg2ImgPipeline), "flux-inpaint": (tiny_flux, FluxInpaintPipeline)}


@pytest.mark.filterwarnings("ignore:You have passed 4 text prompts:FutureWarning")
@pytest.mark.parametrize("kind", FROM_IMAGES)
def test_image_to_image_and_inpainting(kind):
    """Two prompts with two images each, part of the steps; whose map is whose, by each prompt's own embeddings."""
    maker, pipeline = FROM_IMAGES[kind]
    pipe = quiet(pipeline.from_pipe(maker()))
    masks = {"mask_image": Image.new("L", (24, 16), 255)} if "inpaint" in kind else {}

    def run() -> np.ndarray:
        return generate(pipe, PROMPTS, image=PICTURE, strength=0.5, steps=4, num_images_per_prompt=2,
                        negative_prompt=["a fish", "a penguin"], seed=5, **guided(pipe, True), **masks)

    plain = run()
    with record_attention(pipe) as attention:
        layer = attention.chosen_layers[0]
        with spied(denoiser(pipe), [layer]) as seen:
            assert np.array_equal(plain, run())
    assert attention.steps == [0, 1] and len(attention.images) == 4 and attention.branches == ["cond", "uncond"]
    assert [image.seed for image in attention.images] == [5] * 4
    assert attention.map("dog", image=3).shape == max(attention.grids.values())
    assert [attention.text(n, "uncond").find(word).phrase for n, word in ((1, "fish"), (2, "penguin"))]

    calls, (height, width) = seen[layer], attention.grids[layer]
    guided_together = len(calls) == 2  # Flux calls cond and uncond one after the other
    tokens = len(attention.text().tokens)
    with torch.no_grad():
        for step in (0, 1):
            for image in range(4):
                inputs = calls[step if guided_together else 2 * step]
                full = by_hand(denoiser(pipe).get_submodule(layer), inputs)[image + 4 * guided_together]
                expected = {"all": full, "last": full[:, : height * width, -tokens:],
                            "first": full[:, tokens:, :tokens]}[attention.rules[layer].text]
                torch.testing.assert_close(attention.values(layer, step=step, image=image), expected, atol=1e-5, rtol=0)


def test_an_inpainting_model_with_mask_channels():
    sd = tiny_sd(in_channels=9)
    pipe = quiet(StableDiffusionInpaintPipeline(**sd.components, requires_safety_checker=False))
    mask = Image.new("L", (24, 16), 255)
    attention = recorded(pipe, "a cat", image=PICTURE, mask_image=mask, num_images_per_prompt=2)
    assert len(attention.images) == 2 and attention.map("cat", image=1).shape == (8, 12)


def test_guidance_switched_off_midway(sd):
    def off(pipe, step, _timestep, tensors):
        if step == 0:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    with record_attention(sd) as attention:
        generate(sd, PROMPTS, steps=3, guidance_scale=4.0, callback_on_step_end=off,
                 callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert attention.steps == [0, 1, 2] and len(attention.images) == 2
    assert attention.select("dog", image=1, step=2).any()
    with pytest.raises(NotRecordedError, match=r"'uncond' of down 0.0 ran at steps \[0\], not at \[1, 2\]"):
        attention.select("cat", branch="uncond", step=[0, 1, 2])


def test_perturbed_rows_are_left_out(sd):
    pag = StableDiffusionPAGPipeline(**sd.components, requires_safety_checker=False, pag_applied_layers=["mid"])
    attention = recorded(pag, PROMPTS, guidance_scale=4.0, pag_scale=3.0)
    assert len(attention.images) == 2 and attention.branches == ["cond", "uncond"]
    assert all(len(rows) == 4 for _, _, rows in attention.sums)


def test_skip_layer_guidance_is_no_branch_and_no_step():
    """Stable Diffusion 3 calls its transformer a third time, with some layers left out."""
    sd3 = tiny_sd3()
    plain = recorded(sd3, PROMPTS, guidance_scale=4.0, steps=3)
    calls = []
    handle = sd3.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with record_attention(sd3) as attention:
        generate(sd3, PROMPTS, guidance_scale=4.0, steps=3, skip_guidance_layers=[0], skip_layer_guidance_start=-1,
                 skip_layer_guidance_stop=1)
    handle.remove()
    assert len(calls) == 6 and attention.steps == [0, 1, 2] and attention.branches == ["cond", "uncond"]
    assert len(attention.images) == 2
    np.testing.assert_allclose(attention.select("dog", image=1, step=0), plain.select("dog", image=1, step=0),
                               atol=1e-6)


def test_several_calls_are_several_images(sd):
    with record_attention(sd) as attention:
        generate(sd, "a cat", seed=1)
        generate(sd, "a frog", seed=2, steps=3)
    assert [image.prompt.prompt for image in attention.images] == ["a cat", "a frog"]
    assert [image.seed for image in attention.images] == [1, 2]
    alone = recorded(sd, "a frog", seed=2, steps=3)
    assert np.array_equal(attention.map("frog", image=1), alone.map("frog"))


def test_embeddings_without_their_text(sd):
    cond, uncond = sd.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    attention = recorded(sd, None, **given)
    assert attention.branches == ["cond", "uncond"]
    with pytest.raises(NotRecordedError, match="prompts="):
        attention.map("cat")
    named = recorded(sd, None, **given, keeping=dict(prompts=["a cat"]))
    read = recorded(sd, None, **given, keeping=dict(prompts=[read_prompt(sd.tokenizer, "a cat")]))
    with record_attention(sd) as inside:
        cond, uncond = sd.encode_prompt("a cat", "cpu", 1, True)
        generate(sd, None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    plain = recorded(sd, "a cat")
    for other in (named, read, inside):
        assert np.array_equal(other.map("cat"), plain.map("cat"))


@pytest.mark.parametrize("maker", [tiny_sd, tiny_sd3, tiny_flux])
def test_prompts_encoded_once_are_known_in_every_generation(maker):
    pipe, texts = maker(), ["a cat", "a frog and a dog"]
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]

    def encoded(prompt: str) -> dict:
        if maker is tiny_flux:
            return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_prompt(prompt, prompt, None, 1),
                            strict=False))
        if maker is tiny_sd3:
            return dict(zip(names, pipe.encode_prompt(prompt, prompt, prompt, max_sequence_length=20), strict=False))
        return dict(zip(names, pipe.encode_prompt(prompt, "cpu", 1, True), strict=False))

    with record_attention(pipe) as attention:
        first, second = map(encoded, texts)
        for given in (first, second, first):
            generate(pipe, None, **given)
        generate(pipe, "a fish")
    said = [image.prompt.prompt for image in attention.images]
    assert said == [texts[0], texts[1], texts[0], "a fish"]
    assert attention.images[0].negative is None or attention.images[0].negative.prompt == ""
    if maker is not tiny_flux:  # its columns go beyond the tokenizer's limit here
        np.testing.assert_allclose(attention.map("dog", image=1), recorded(pipe, texts[1]).map("dog"), atol=1e-6)
    with record_attention(pipe, phrases="cat") as attention:
        given = encoded(texts[0])
        for seed in range(2):
            generate(pipe, None, **given, seed=seed)
    assert attention.map("cat", image=1).any()


def long_embeddings(pipe, text: str, room: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of a text in chunks, as compel makes them, and their tokens: [1, columns, width], [columns]."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chunks = [[tokenizer.bos_token_id, *ids[i:i + room], tokenizer.eos_token_id] for i in range(0, len(ids), room)]
    chunks = torch.tensor([chunk + [tokenizer.pad_token_id] * (16 - len(chunk)) for chunk in chunks])
    with torch.no_grad():
        embeddings = torch.cat([pipe.text_encoder(chunk[None])[0] for chunk in chunks], dim=1)
    return embeddings, chunks.flatten()


LONG = "a photo of a cat and a dog and a fish and a penguin on a blue background and a frog"


def test_words_past_the_first_chunk_of_a_long_prompt(sd):
    embeddings, tokens = long_embeddings(sd, LONG)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": embeddings}
    attention = recorded(sd, None, **given, keeping=dict(prompts=[LONG]))
    (column,) = attention.text().find("frog").columns
    assert sd.tokenizer.convert_ids_to_tokens(int(tokens[column])) == "frog</w>" and not attention.text().cut_off
    assert np.array_equal(attention.map("frog"), attention.select(columns=[column]))
    short = {name: values[:, :16] for name, values in given.items()}
    assert recorded(sd, None, **short, keeping=dict(prompts=[LONG])).text().cut_off.endswith("and a frog")
    twice = long_embeddings(sd, LONG + " " + LONG)[0][:, :32]
    longer = recorded(sd, None, prompt_embeds=twice, negative_prompt_embeds=twice,
                      keeping=dict(prompts=[LONG + " " + LONG]))
    assert longer.text().cut_off.endswith("and a frog")


@pytest.mark.parametrize("damage", ["room", "text", "columns"])
def test_a_long_prompt_that_was_not_encoded_in_plain_chunks_is_refused(sd, damage):
    embeddings, _ = long_embeddings(sd, LONG, 12 if damage == "room" else 14)
    embeddings = embeddings[:, :-1] if damage == "columns" else embeddings
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": embeddings}
    text = LONG.replace("frog", "cat") if damage == "text" else LONG
    with pytest.raises(UnreadablePromptError, match="by number"), record_attention(sd, prompts=[text]):
        generate(sd, None, **given)
    assert recorded(sd, None, **given, keeping=dict(columns=[20])).select(columns=[20]).any()


def test_columns_by_number_need_no_readable_words(sd, monkeypatch):
    tokenizer, pipe = sd.tokenizer, tiny_sd()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_: "\ufffd")
    attention = recorded(pipe, keeping=dict(columns=[3]))
    assert attention.select(columns=[3]).any()
    with pytest.raises(NotRecordedError, match="spell"):
        attention.map("cat")


def test_given_prompts_are_placed_as_pipelines_order_images(sd):
    prompts = ["a photo of a cat", "a frog and a dog", "a fish"]
    cond, uncond = sd.encode_prompt(prompts, "cpu", 1, True)

    def run(rows: slice, each: int) -> None:
        generate(sd, None, prompt_embeds=cond[rows], negative_prompt_embeds=uncond[rows], num_images_per_prompt=each)

    expected = recorded(sd, prompts[:2], num_images_per_prompt=2)
    with record_attention(sd, prompts=prompts[:2]) as attention:
        run(slice(2), 2)
        run(slice(2), 1)
    texts = [image.prompt.prompt for image in attention.images]
    assert texts == [prompts[0]] * 2 + [prompts[1]] * 2 + prompts[:2]
    assert np.array_equal(attention.map("dog", image=2), expected.map("dog", image=2))
    with record_attention(sd, prompts=prompts) as attention:  # a batch after the other
        run(slice(2), 1)
        run(slice(2, 3), 1)
    assert [image.prompt.prompt for image in attention.images] == prompts
    with pytest.raises(ValueError, match="3 prompts were given for a generation of 4 images"), \
            record_attention(sd, prompts=prompts):
        run(slice(2), 2)


@pytest.mark.parametrize("maker", [tiny_sdxl, tiny_sd3])
def test_a_second_prompt_is_searched_too(maker):
    pipe = maker()
    own = {"prompt_3": "a fish"} if maker is tiny_sd3 else {}
    with record_attention(pipe) as attention:
        generate(pipe, "a photo of a cat", prompt_2="a frog", negative_prompt="a penguin", negative_prompt_2="a cake",
                 guidance_scale=4.0, **own)
    assert attention.text().find("cat").columns == (5,) and attention.text().find("frog").columns == (2,)
    assert np.array_equal(attention.map("frog"), attention.select(columns=[2]))
    with pytest.raises(PhraseNotFoundError, match="'dog' is not in the prompt .* or 'a frog'; words there: .*frog"):
        attention.map("dog")
    negative = attention.text(branch="uncond")
    assert negative.prompt.startswith("a penguin") and negative.find("cake").columns[0] == 2
    assert type(attention.text()).from_dict(attention.text().to_dict()) == attention.text()
    same = recorded(pipe, "a photo of a cat", prompt_2="a photo of a cat", **own)
    assert same.text().beside is None


def test_a_pipeline_whose_rows_cannot_be_told_apart_is_refused():
    pipe = StableDiffusionInstructPix2PixPipeline(**tiny_sd(in_channels=8).components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"Pix2PixPipeline has no encode_prompt.*record_attention\(pipe.unet\)"), \
            record_attention(pipe):
        pass
    with record_attention(pipe.unet) as attention:  # as the error says
        quiet(pipe)("a cat", image=PICTURE, num_inference_steps=2, output_type="np")
    assert len(attention.images) == 3 and attention.select(columns=[2], image=0).shape == (8, 12)


def test_phrases_of_some_prompts_only(sd):
    attention = recorded(sd, PROMPTS, keeping=dict(phrases=["cat", "dog"]))
    assert attention.map("cat", image=0).any() and attention.map("dog", image=1).any()
    with pytest.raises(PhraseNotFoundError, match="'cat' is not in the prompt 'a frog and a dog'"):
        attention.map("cat", image=1)


def test_learned_tokens_of_several_vectors():
    pipe = tiny_sd()
    pipe.load_textual_inversion({"<toy>": torch.randn(3, 16)}, token="<toy>")
    attention = recorded(pipe, "a photo of <toy> and a cat")
    columns = attention.text().find("<toy>").columns
    assert [attention.text().tokens[column] for column in columns] == ["<toy>", "<toy>_1", "<toy>_2"]
    assert attention.text().tokens[columns[-1] + 1] == "and</w>"
    assert attention.map("<toy>").any()


LONG = "a photo of a cat and a dog and a fish and a penguin on a blue background and a frog"


@pytest.mark.parametrize("make, cat, frog", [(tiny_sd3, [5, 22], [43]), (tiny_flux, [6], [27])])
def test_words_of_a_long_prompt_that_only_t5_reads(make, cat, frog):
    attention = recorded(make(), LONG, max_sequence_length=40)
    read = attention.text()
    assert [read.label(column) for column in (*cat, *frog)] == ["cat"] * len(cat) + ["frog"]
    assert (list(read.find("cat").columns), list(read.find("frog").columns)) == (cat, frog)
    assert (attention.map("frog") == attention.select(columns=frog)).all()
    short = recorded(make(), LONG, max_sequence_length=12)
    with pytest.raises(PhraseNotFoundError, match="'frog' stands past the limit of 1[26] tokens"):
        short.map("frog")


def test_columns_of_an_encoder_that_is_not_loaded_hold_no_words():
    pipe = tiny_sd3()
    pipe.text_encoder_3 = None  # its tokenizer is still there, and zeros stand in its columns
    attention = recorded(pipe, LONG, max_sequence_length=40)
    assert attention.text().find("cat").columns == (5,)
    with pytest.raises(PhraseNotFoundError, match="'frog' stands past the limit of 16 tokens"):
        attention.map("frog")
    kept = tiny_sd3()
    texts = kept.encode_prompt(LONG, None, None, max_sequence_length=40, do_classifier_free_guidance=False)
    kept.text_encoder_3 = None
    with record_attention(kept, prompts=[LONG]) as attention:
        generate(kept, None, prompt_embeds=texts[0], pooled_prompt_embeds=texts[2], guidance_scale=1.0,
                 max_sequence_length=40)
    assert attention.text().find("frog").columns == (43,)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_recordings_may_end_in_any_order(first_to_end):
    pipe = tiny_sd()
    open_ones = [record_attention(pipe), record_attention(pipe)]
    records = [one.__enter__() for one in open_ones]
    generate(pipe, "a photo of a cat")
    open_ones[first_to_end].__exit__(None, None, None)
    generate(pipe, "a photo of a dog")
    open_ones[1 - first_to_end].__exit__(None, None, None)
    texts = [[image.prompt.prompt for image in record.images] for record in records]
    assert texts[first_to_end] == ["a photo of a cat"]
    assert texts[1 - first_to_end] == ["a photo of a cat", "a photo of a dog"]
    assert not {"encode_prompt", "prepare_latents"} & set(vars(pipe))


def test_a_layer_that_a_cache_skipped_is_named_with_its_steps():
    pipe, kept = tiny_sd(), []
    middle = pipe.unet.mid_block.forward

    def every_other(*args, **more):
        kept.append(kept[-1] if len(kept) % 2 else middle(*args, **more))
        return kept[-1]

    pipe.unet.mid_block.forward = every_other
    attention = recorded(pipe, steps=4)
    assert attention.map("cat").any()
    with pytest.raises(NotRecordedError, match=r"'cond' of mid 0 ran at steps \[0, 2\], not at \[1\]"):
        attention.map("cat", step=1)
    assert attention.map("cat", step=1, layer="up*").any()


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd])
def test_a_call_that_fails_after_encoding_leaves_the_next_one_alone(make):
    pipe = make()
    with record_attention(pipe) as attention:
        with pytest.raises(ValueError, match="generator"):
            generate(pipe, "a dog", generator=[torch.Generator()] * 3, **guided(pipe, False))
        generate(pipe, "a cat", **guided(pipe, False))
    assert attention.branches == ["cond"] and attention.text(0).prompt == "a cat"
