"""Parameters are read from the tagged cell and every value is checked before a kernel starts."""

from pathlib import Path

import numpy as np
import pytest

from fmn_nb.forgetting.settings import PRESETS
from fmn_nb.runs.parameters import Parameter, ParameterError, check_parameters, read_parameters

CELL = """\
concept: str = "cat"  # what to forget
kind: str = "object"  # what the concept is {object|style|identity}
steps: int = 35  # fine-tuning steps [1..1000]
learning_rate: float = 2e-6  # AdamW's learning rate [0..1]
keep: bool = True  # keep the patch
layers: list[str] = ["mid", "up"]  # layers to look at
out: "Optional[str]" = None  # folder for artefacts
"""


@pytest.fixture
def declared(write_notebook):
    return read_parameters(write_notebook("03_stub.ipynb", CELL))


def test_the_cell_is_read_in_order_with_types_limits_and_help(declared):
    assert list(declared) == ["concept", "kind", "steps", "learning_rate", "keep", "layers", "out"]
    assert declared["steps"] == Parameter("steps", "int", 35, "fine-tuning steps [1..1000]", limits=(1, 1000))
    assert declared["kind"].choices == ("object", "style", "identity")
    assert declared["out"].optional and declared["out"].default is None
    assert declared["layers"].default == ["mid", "up"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 1.0, "steps must be an int, not the float 1.0"),
        ("steps", True, "steps must be an int, not the bool True"),
        ("steps", np.int64(3), "not the numpy.int64"),
        ("steps", 0, "steps must lie from 1 to 1000, not 0"),
        ("learning_rate", np.float64(0.1), "not the numpy.float64"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", -1e-3, "learning_rate must lie from 0 to 1"),
        ("kind", "thing", "it is one of: object, style, identity"),
        ("layers", ("mid",), "layers must be a list, not the tuple"),
        ("layers", [("mid",)], "plain JSON values"),
        ("concept", Path("cat"), "concept must be a str"),
        ("concept", None, "concept must be a str, not the NoneType"),
        ("out", 3, "out must be a str or None"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(declared, name, value, says):
    with pytest.raises(ParameterError, match=says.replace(".", r"\.")):
        check_parameters(declared, {name: value})


def test_an_unknown_name_lists_what_there_is(declared):
    with pytest.raises(ParameterError, match="no chosen notebook has a parameter 'stepz'") as caught:
        check_parameters(declared, {"stepz": 3})
    assert all(name in str(caught.value) for name in declared)
    assert "fine-tuning steps" in str(caught.value)


def test_good_values_pass_and_a_whole_number_becomes_a_float(declared):
    checked = check_parameters(declared, {"steps": 5, "learning_rate": 1, "out": None, "layers": ["a", 1, None]})
    assert checked == {"steps": 5, "learning_rate": 1.0, "out": None, "layers": ["a", 1, None]}
    assert type(checked["learning_rate"]) is float


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("steps", "12", 12), ("learning_rate", "1e-4", 1e-4), ("concept", "12", "12"), ("keep", "false", False),
     ("layers", "['a']", ["a"]), ("out", "none", None)],
)
def test_text_from_a_command_line_is_read_by_type(declared, name, text, value):
    assert declared[name].parse(text) == value


@pytest.mark.parametrize(("name", "text"), [("steps", "1e3"), ("steps", "many"), ("keep", "1"), ("layers", "(1,)")])
def test_text_of_another_type_is_refused(declared, name, text):
    with pytest.raises(ParameterError, match=name):
        declared[name].parse(text)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("steps = 35  # untyped", "has the type None"),
        ("steps: int = 5 * 7  # computed", "not a literal"),
        ("steps: int = 'many'  # a word", "breaks its own rule"),
        ("steps: int = 3  # too few [10..20]", "breaks its own rule"),
        ("steps: int = 3  # no numbers [low..high]", "isn.t a pair of numbers"),
        ("out: pathlib.Path = None  # a type JSON lacks", "cannot read the parameter 'out'"),
        ("steps: int = 3  # where a = b", "cannot read the parameter 'steps'"),
        ("steps: int = = 3", "is not valid Python"),
    ],
)
def test_a_cell_that_cannot_be_checked_is_refused(write_notebook, cell, says):
    with pytest.raises(ParameterError, match=says):
        read_parameters(write_notebook("03_stub.ipynb", cell))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"cells": null}', '{"cells": [], "nbformat": 99}',
                                     '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4}',
                                     '{"cells": [], "metadata": [], "nbformat": 4, "nbformat_minor": 5}', "[" * 99_999])
def test_a_broken_notebook_is_told_in_one_line(tmp_path, content):
    (tmp_path / "03_broken.ipynb").write_text(content)
    with pytest.raises(ParameterError, match="03_broken.ipynb is not an executable notebook") as caught:
        read_parameters(tmp_path / "03_broken.ipynb")
    assert "\n" not in str(caught.value)


def test_every_preset_is_a_value_of_the_course_s_notebooks() -> None:
    course = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
    declared = [read_parameters(path) for path in course]
    presets = [found["preset"] for found in declared if "preset" in found]
    assert len(presets) >= 4
    for preset in PRESETS:
        for parameter in presets:
            parameter.check(preset)
    with pytest.raises(ParameterError, match="it is one of: paper, balanced"):
        presets[0].check("balancd")
