"""A wrong request is one clear error, before torch or a kernel is touched."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fmn_nb.models import names
from fmn_nb.models.names import UnknownModelError
from fmn_nb.runs import plan as plans
from fmn_nb.runs.parameters import ParameterError
from fmn_nb.runs.plan import RequestError, _slug, check_concept, find_notebooks, plan_run

CELL = """\
concept: str = "cat"  # what to forget
seed: int = 0  # seed
steps: int = 35  # fine-tuning steps [1..1000]
out: str = ""  # folder for artefacts
"""


@pytest.fixture
def course(write_notebook, monkeypatch):
    paths = [write_notebook("01_look.ipynb", "seed: int = 0  # seed"), write_notebook("03_forget.ipynb", CELL)]
    monkeypatch.setattr(plans, "notebooks_dir", lambda: paths[0].parent)
    return paths


def test_each_notebook_gets_only_what_it_declares(course, tmp_path):
    plan = plan_run(notebooks="01,03", concept="frog", seed=3, parameters={"steps": 7}, out=tmp_path / "out")
    assert plan.notebooks[0].values == {"seed": 3}
    assert plan.notebooks[1].values == {"concept": "frog", "seed": 3, "steps": 7, "out": str(tmp_path / "out")}
    assert plan.settings == {"model": "emoji", "concept": "frog", "kind": "object", "preset": "balanced", "seed": 3}
    assert not (tmp_path / "out").exists()


def test_the_runs_of_a_sweep_share_a_cache_that_is_no_part_of_them(write_notebook, tmp_path):
    path = str(write_notebook("03_forget.ipynb", CELL + 'cache: str = ""  # folder of drawn images'))
    alone, swept = (plan_run(notebooks=[path], **place) for place in ({"out": tmp_path / "a"}, {"within": tmp_path}))
    assert alone.notebooks[0].values["cache"] == str(tmp_path / "a" / ".cache")
    assert swept.notebooks[0].values["cache"] == str(tmp_path / ".cache")
    assert swept.key == alone.key and swept.parameters == {} == alone.parameters
    own = plan_run(notebooks=[path], within=tmp_path, parameters={"cache": str(tmp_path / "mine")})
    assert own.notebooks[0].values["cache"] == str(tmp_path / "mine") and own.key != swept.key
    plain = plan_run(notebooks=[str(write_notebook("04_plain.ipynb", CELL))], within=tmp_path)
    assert "cache" not in plain.notebooks[0].values


def test_the_folder_is_absolute_and_its_default_name_readable(course, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan_run(notebooks="03", concept="birthday cake").out == tmp_path / "runs" / "birthday_cake-balanced-seed0"
    other = plan_run(notebooks="03", parameters={"steps": 7}).out.name
    assert other.startswith("cat-balanced-seed0-")
    assert other != plan_run(notebooks="03", parameters={"steps": 8}).out.name
    assert plan_run(notebooks="03", texts={"steps": "7"}).out.name == other


def test_folders_mean_the_same_in_every_working_directory(write_notebook, tmp_path, monkeypatch):
    cell = 'model: str = "emoji"  # name\nreferences: str = ""  # folder of reference images\nlook: str = ""  # colour'
    path = write_notebook("03_forget.ipynb", cell)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    plan = plan_run(notebooks=[str(path)], model="mine", parameters={"references": "photos", "look": "photos"})
    assert plan.notebooks[0].values == {
        "model": str(tmp_path / "mine"), "references": str(tmp_path / "photos"), "look": "photos",
    }


@pytest.mark.parametrize("given", ["03", "3", "03_forget", "03_forget.ipynb", ["03"]])
def test_notebooks_are_found_by_number_and_name(course, given):
    assert find_notebooks(given) == [course[1]]


@pytest.mark.parametrize(("given", "found"), [("1-3", 2), ("01-03", 2), (["3-3"], 1), ("01,3-3", 2)])
def test_a_range_names_the_notebooks_between_its_ends(course, given, found):
    assert find_notebooks(given) == course[-found:]


@pytest.mark.parametrize("given", ["3-1", "1-9", "0-3", "1-", "-", "1-2-3"])
def test_a_range_whose_ends_are_not_there_is_refused(course, given):
    with pytest.raises(RequestError, match=f"no notebook '{given}'"):
        find_notebooks(given)


def test_notebooks_are_found_by_path(course):
    assert find_notebooks(str(course[0])) == [course[0]]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"notebooks": "03,09"}, "no notebook '09'; the course has: 01_look, 03_forget"),
        ({"notebooks": "03,03"}, "named twice"),
        ({"notebooks": ""}, "no notebook named"),
        ({"model": "emojj"}, "no model 'emojj'; bundled: emoji"),
        ({"model": "no/such/folder"}, "no model"),
        ({"concept": "kat"}, r"does not know 'kat' \(did you mean 'cat'\?\)"),
        ({"preset": "balance"}, "no preset 'balance'; there are: paper, balanced"),
        ({"concept": "cat\n"}, "printable"),
        ({"concept": "noto", "kind": "object"}, "'noto' is of kind style"),
        ({"kind": "thing"}, "one of: object, style, identity"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": "0"}, "seed must be an int"),
        ({"colour": "red"}, "no setting 'colour'; it has: model, concept"),
        ({"parameters": {"stepz": 1}}, "no chosen notebook has a parameter 'stepz'"),
        ({"parameters": {"steps": 0}}, "steps must lie from 1 to 1000"),
        ({"texts": {"stepz": "1"}}, "no chosen notebook has a parameter 'stepz'"),
        ({"texts": {"steps": "1e3"}}, "steps must be an int"),
        ({"texts": {"concept": "frog"}}, "use --concept"),
    ],
)
def test_a_wrong_request_is_one_clear_error(course, request_, says):
    with pytest.raises((RequestError, ParameterError, UnknownModelError), match=says):
        plan_run(**{"notebooks": "01,03", **request_})


def test_a_parameter_is_given_once_and_is_called_like_no_column_of_a_row(write_notebook, tmp_path):
    path = str(write_notebook("03_own.ipynb", 'folder: str = ""  # of images\nsteps: int = 2  # steps'))
    with pytest.raises(RequestError, match="a run's row has a column 'folder' of its own"):
        plan_run(notebooks=[path], parameters={"folder": "x"}, out=tmp_path / "out")
    with pytest.raises(RequestError, match="'steps' is given twice"):
        plan_run(notebooks=[path], parameters={"steps": 3}, texts={"steps": "4"}, out=tmp_path / "out")
    long = plan_run(notebooks="03", model="emoji", concept="cat", within=tmp_path).out
    assert len(long.name.encode()) < 255 and len(_slug("\u732b" * 90).encode()) <= 100


def test_the_kind_is_found_out_and_foreign_models_take_any_concept():
    assert [check_concept("emoji", name, None) for name in ("cat", "twemoji", "Milo", "mouse")] == [
        "object", "style", "identity", "object",
    ]
    assert check_concept("owner/model", "a very particular vase", None) == "object"
    assert check_concept("owner/model", "van gogh", "style") == "style"


@pytest.fixture
def hub(monkeypatch):
    """A function that puts an answer, or an error, in the place of the hub's; nothing is in the cache."""
    import huggingface_hub

    def answer(error=None, files=("model_index.json",)):
        def model_info(name, timeout):
            if error is not None:
                raise error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

        monkeypatch.setattr(huggingface_hub, "model_info", model_info)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    names.check_on_hub.cache_clear()
    yield answer
    names.check_on_hub.cache_clear()


def _refused(request_kind):
    from huggingface_hub.errors import RepositoryNotFoundError

    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its arguments differ between versions
    return {"unknown": error, "silent": TimeoutError("timed out"), "down": OSError("no route")}[request_kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("unknown", "the hub has no model 'foo/bar', or hides it from you; look it up"),
        ("silent", r"the hub can't be reached \(TimeoutError\); try again with a connection"),
        ("down", "the hub can't be reached"),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_refused_before_any_work(course, hub, kind, says):
    hub(_refused(kind))
    with pytest.raises(UnknownModelError, match=says) as caught:
        plan_run(notebooks="03", model="foo/bar")
    assert "\n" not in str(caught.value)


def test_a_hub_id_of_something_else_is_refused_and_a_pipelines_passes(course, hub):
    hub(files=("config.json",))
    with pytest.raises(UnknownModelError, match="the hub's 'foo/bar' holds no model_index.json"):
        plan_run(notebooks="03", model="foo/bar")
    hub()
    assert plan_run(notebooks="03", model="foo/bar").settings["model"] == "foo/bar"


def test_a_hub_id_needs_no_hub_where_the_cache_has_it(course, monkeypatch):
    import huggingface_hub

    names.check_on_hub.cache_clear()
    with pytest.raises(UnknownModelError, match="'foo/bar' is not on this machine and HF_HUB_OFFLINE forbids"):
        plan_run(notebooks="03", model="foo/bar")  # as all tests run: offline
    with pytest.raises(UnknownModelError, match="'foo/b--r' is not a hub id"):
        plan_run(notebooks="03", model="foo/b--r")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert plan_run(notebooks="03", model="foo/bar").settings["model"] == "foo/bar"
    names.check_on_hub.cache_clear()


def test_a_copy_of_the_emoji_model_knows_its_concepts_alone(course, tmp_path):
    def model(name, world):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "unet" / "config.json").write_text(json.dumps(world))
        return str(tmp_path / name)

    copy, other = model("oracle", {"_world": "emoji"}), model("other", {})
    with pytest.raises(RequestError, match="does not know 'dragon'.*; it knows: cat"):
        plan_run(notebooks="03", model=copy, concept="dragon")
    assert plan_run(notebooks="03", model=copy, concept="noto").settings["kind"] == "style"
    assert plan_run(notebooks="03", model=other, concept="dragon").settings["kind"] == "object"


def test_a_folder_with_something_else_in_it_is_left_alone(course, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="not empty and holds no run"):
        plan_run(notebooks="03", out=tmp_path / "mine")


def test_what_a_notebook_needs_must_be_made_before(write_notebook, tmp_path):
    maker = write_notebook("03_make.ipynb", "seed: int = 0  # seed", gives=["patch"])
    user = write_notebook("04_use.ipynb", "seed: int = 0  # seed", needs=["patch"])
    with pytest.raises(RequestError, match="04_use.ipynb needs 'patch'"):
        plan_run(notebooks=[str(user)], out=tmp_path / "out")
    assert len(plan_run(notebooks=[str(maker), str(user)], out=tmp_path / "out").notebooks) == 2


def test_wrong_names_are_answered_without_torch():
    code = (
        "import sys; from fmn_nb.runs import plan\n"
        "for wrong in ({'concept': 'kat'}, {'model': 'emojj'}):\n"
        "    try: plan.check_settings(wrong)\n"
        "    except ValueError as error: print(error)\n"
        "try: plan.find_notebooks('99')\n"
        "except plan.RequestError as error: print(error)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'papermill', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_a_single_file_whose_configuration_is_out_of_reach_is_refused_before_a_kernel(course, write_notebook, tmp_path,
                                                                                      monkeypatch):
    """Tests are offline, and nothing is cached for it."""
    save_file({"x": np.zeros(1)}, tmp_path / "sd15.safetensors")
    with pytest.raises(RequestError, match=r"holds only weights.*--config \(weights aren't needed\)"):
        plan_run(notebooks="03", model=str(tmp_path / "sd15.safetensors"))
    path = write_notebook("05_model.ipynb", 'model: str = ""  # name\nconfig: str = ""  # folder of a single file')
    request = {"notebooks": [str(path)], "model": str(tmp_path / "sd15.safetensors")}
    with pytest.raises(RequestError, match=r"config is not a folder with a model_index.json: '.*none'"):
        plan_run(**request, parameters={"config": str(tmp_path / "none")})
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    plan = plan_run(**request, texts={"config": "."})
    assert plan.notebooks[0].values == {"model": request["model"], "config": str(tmp_path)}
    monkeypatch.setattr(plans, "check_on_hub", lambda name: None)
    assert plan_run(notebooks="03", model=str(tmp_path / "sd15.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(RequestError, match="can't be read as safetensors"):
        plan_run(notebooks="03", model=str(tmp_path / "cut.safetensors"))


def test_an_empty_folder_name_is_not_the_current_folder(course):
    with pytest.raises(RequestError, match="empty name"):
        plan_run(notebooks="03", out="")


@pytest.mark.parametrize("state", ["[]", "null", "{", "[" * 100_000, '{"settings": 5}', '{"status": "done"}'])
def test_a_folder_whose_state_is_no_run_is_refused_in_one_line(course, tmp_path, state):
    (tmp_path / "run.json").write_text(state)
    with pytest.raises(RequestError, match="run.json") as caught:
        plan_run(notebooks="03", out=tmp_path)
    assert "\n" not in str(caught.value) and (tmp_path / "run.json").read_text() == state
