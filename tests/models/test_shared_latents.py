"""Latents drawn once for many runs: the same bits with and without the cache, and nothing damaged is trusted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from quick import quick
from tiny import tiny_sd

from fmn_nb.concepts.concept import Concept
from fmn_nb.models import images as references
from fmn_nb.models.images import generate_latents

PROMPTS = ["a photo of a cat", "a photo of a dog"]
HOW = {"seed": 0, "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture
def drawn(monkeypatch):
    """How many times the model drew."""
    calls, draw = [], references._drawn

    def counted(*arguments, **options):
        calls.append(arguments)
        return draw(*arguments, **options)

    monkeypatch.setattr(references, "_drawn", counted)
    return calls


def test_a_patch_is_the_same_without_a_cache_with_an_empty_one_and_with_a_full_one(pipe, drawn, tmp_path):
    options = {"references": None, "reference_count": 2, "reference_steps": 2, "retain_weight": 1.0, "retain_count": 2,
               "towards": "dog", "towards_weight": 1.0}
    plain = quick(pipe, Concept("cat"), **options)
    asked = len(drawn)
    assert asked == 3, "references, retain images and the reading's"
    cold, warm = (quick(pipe, Concept("cat"), cache=tmp_path, **options) for _ in range(2))
    assert len(drawn) == 2 * asked, "the second one drew again"
    for patch in (cold, warm):
        assert patch.tensors.keys() == plain.tensors.keys()
        assert all(torch.equal(patch.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"steps": 3}, {"guidance": 3.0}, {"prompts": PROMPTS[:1]}, {"size": (32, 48)}, {"weights": 1.5},
])
def test_other_latents_are_other_files(pipe, drawn, tmp_path, change):
    generate_latents(pipe, PROMPTS, **HOW, cache=tmp_path)
    how = HOW | {"prompts": PROMPTS} | change
    factor = how.pop("weights", None)
    weight = pipe.unet.conv_in.weight
    before = weight.detach().clone()
    try:
        if factor:
            weight.data.mul_(factor)
        generate_latents(pipe, **how, cache=tmp_path)
    finally:
        weight.data.copy_(before)
    assert len(drawn) == 2 and len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_and_foreign_files_are_drawn_anew(pipe, drawn, tmp_path, damage):
    first = generate_latents(pipe, PROMPTS, **HOW, cache=tmp_path).mean
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "foreign":
        generate_latents(pipe, PROMPTS, **HOW | {"seed": 9}, cache=tmp_path)
        (other,) = set(tmp_path.rglob("*.safetensors")) - {file}
        content = other.read_bytes()
    if damage == "flipped":
        content[-1] ^= 1
    file.write_bytes({"cut": content[:-8], "empty": b""}.get(damage, bytes(content)))
    drawn.clear()
    assert torch.equal(generate_latents(pipe, PROMPTS, **HOW, cache=tmp_path).mean, first) and len(drawn) == 1
    assert torch.equal(generate_latents(pipe, PROMPTS, **HOW, cache=tmp_path).mean, first) and len(drawn) == 1


def test_who_wants_the_same_waits_for_the_one_who_draws(pipe, drawn, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: generate_latents(pipe, PROMPTS, **HOW, cache=tmp_path), range(4)))
    assert len(drawn) == 1 and all(torch.equal(one.mean, found[0].mean) for one in found)
