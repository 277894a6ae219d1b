"""YAML as people mean it, and as nobody means it."""

import os
import shutil

import pytest

from fmn_nb.files import MOST_YAML, data_dir, model_print, parse_yaml, read_json, read_yaml, replacing_folder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5), ("1.0e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("-.inf", float("-inf")),
        ("12", 12), ("-3", -3), ("0", 0), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("007", "007"), ("010", "010"), ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("0x1f", "0x1f"),
        ("1_000", "1_000"), ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"), ("'12'", "12"), ("[1e-5, no]", [1e-5, "no"]),
    ],
)
def test_a_plain_value_is_what_yaml_1_2_makes_of_it(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
BAD = {
    "a key twice": ("concept: [cat]\nseed: [0]\nconcept: [frog]", "key 'concept' occurs twice"),
    "a key twice, deeper": ("grid: {seed: [0], seed: [1]}", "key 'seed' occurs twice"),
    "aliases of aliases": (BOMB, f"more than {MOST_YAML:,} values"),
    "a list that contains itself": ("a: &a [*a]", "contains itself"),
    "too deep": ("[" * 5000, "too deeply"),
    "no YAML": ("a: [", "not valid YAML"),
    "an object of Python's": ("!!python/object/apply:os.getcwd []", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_what_nobody_means_is_an_error_of_one_line_that_names_the_file(tmp_path, text, says):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_yaml(tmp_path / "spec.yaml")
    assert str(caught.value).startswith(str(tmp_path / "spec.yaml")) and len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_an_alias_and_a_merge_are_taken():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "here")["b"] == {"x": 3, "y": 2}
    levels = "\n".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}], k{n}: {n}}}" for n in range(60))
    found = parse_yaml(f"a0: &a0 {{x: 1}}\n{levels}", "here")
    assert found["a60"] == {"x": 1, **{f"k{n}": n for n in range(60)}}, "what is named twice is merged once"


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"])
def test_broken_json_is_a_value_error_that_names_the_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="x.json"):
        read_json(tmp_path / "x.json")


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "x"):
        1 / 0  # noqa: B018
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="the disk is gone"), replacing_folder(tmp_path / "x") as new:
        (new / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "x"]


def test_two_trainings_of_a_model_have_two_prints_wherever_they_differ(tmp_path):
    """Weights in the middle of a file, and those of a bundled model that holds the rest, not what was measured."""
    emoji, oracle = (shutil.copytree(data_dir() / name, tmp_path / name, ignore=shutil.ignore_patterns("images"))
                     for name in ("emoji-diffusion", "emoji-oracle"))
    before = model_print(emoji), model_print(oracle)
    (emoji / "quality.json").write_text("{}")
    assert model_print(emoji) == before[0]
    weights = emoji / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert model_print(emoji) != before[0] and model_print(oracle) == before[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fmn_nb.files.bundled_models", lambda: {"emoji": emoji})
        assert model_print(oracle) != before[1]
    assert model_print("org/model") == ""
