"""What works on this machine and what to do about what doesn't: the command `fmn-nb check`."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import fmn_nb
from fmn_nb.files import (
    CHECKSUMS,
    GROUNDED,
    REST,
    base_folder,
    bundled_models,
    damaged_files,
    data_dir,
    notebooks_dir,
    read_json,
)
from fmn_nb.models.names import UnknownModelError, check_on_hub, resolve
from fmn_nb.runs.kernel import ask_kernel
from fmn_nb.runs.plan import course_notebooks

MARKS = {"ok": "  ok ", "note": "note ", "failed": "FAIL "}
_LEAST_PYTHON = (3, 11)
_LEAST_MEMORY = 4e9  # bytes; the emoji model's runs peak well below
_LEAST_DISK = 1e9  # bytes
_MOST_LOADED = 1e9  # bytes of weights
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")  # what this package does without


@dataclass(frozen=True)
class Check:
    """One line of the answer; `state` is ok, note (works, worth knowing) or failed."""

    name: str
    state: str
    found: str
    advice: str = ""


def all_checks(model: str = "emoji") -> Iterator[Check]:
    """Every check in turn, cheap ones first. A check that breaks is itself a failed check, never an exception.

    Each has a name, a state (a key of `MARKS`), what was found and what to do about it.
    """
    for check in (python, packages, machine, kernel, widgets, notebooks, data, lambda: named_model(model)):
        yield _safely(check)


def _safely(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  whatever is wrong here is what the user asked about
        name = getattr(check, "__name__", "check").strip("<>")
        return Check("model" if name == "lambda" else name, "failed", f"{type(error).__name__}: {error}",
                     "reinstall with: pip install -c constraints.txt .")


def python() -> Check:
    """Python is new enough."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _LEAST_PYTHON:
        return Check("python", "failed", found, "install Python 3.11 or newer; environment.yml brings it")
    return Check("python", "ok", found)


def packages() -> Check:
    """The dependencies are there, in versions that this package accepts."""
    from packaging.requirements import Requirement

    missing, other = [], []
    for text in metadata.requires("fmn-nb") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} (wanted {requirement.specifier})")
    if missing or other:
        return Check("packages", "failed", "; ".join([*(f"{name} missing" for name in missing), *other]),
                     "pip install -c constraints.txt .")
    different = _untested()
    if different:
        return Check("packages", "note", f"not the tested versions: {', '.join(different)}",
                     "if something breaks: pip install -c constraints.txt .")
    return Check("packages", "ok", f"torch {metadata.version('torch')}, diffusers {metadata.version('diffusers')}")


def _untested() -> list[str]:
    """Direct dependencies whose version differs from constraints.txt, as "name 1.0 (tested 2.0)"."""
    tested = tested_versions(constraints_file())
    names = {re.split(r"[^\w.-]", text)[0] for text in metadata.requires("fmn-nb") or [] if "extra ==" not in text}
    found = {name: metadata.version(name).split("+")[0] for name in sorted(names)}
    return [f"{name} {version} (tested {tested[_plain(name)]})" for name, version in found.items()
            if _plain(name) in tested and tested[_plain(name)] != version]


def constraints_file() -> Path:
    """constraints.txt, which is beside data/ in a checkout and in a wheel."""
    return data_dir().parent / "constraints.txt"


def tested_versions(constraints: Path) -> dict[str, str]:
    """Package name (lower case, dashes) -> version of every `name==version` line; empty without the file."""
    if not constraints.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return {_plain(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def machine() -> Check:
    """The device torch would use, memory and disk."""
    import psutil
    import torch

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(Path.cwd()).free
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        device = f"{card.name} with {card.total_memory / 1e9:.0f} GB"
    else:
        device = "Apple GPU" if torch.backends.mps.is_available() else f"CPU, {torch.get_num_threads()} threads"
    found = f"{device}; {memory / 1e9:.1f} GB memory free, {disk / 1e9:.1f} GB disk free"
    if disk < _LEAST_DISK:
        return Check("machine", "failed", found, f"free at least {_LEAST_DISK / 1e9:.0f} GB of disk in this folder")
    if memory < _LEAST_MEMORY:
        return Check("machine", "note", found, f"runs may need {_LEAST_MEMORY / 1e9:.0f} GB: close other programs")
    return Check("machine", "ok", found)


def kernel() -> Check:
    """Kernels start and import this very package; a note if JupyterLab starts another Python than runs do."""
    try:
        theirs = Path(ask_kernel("import fmn_nb; print(fmn_nb.__file__)"))
    except Exception as error:  # noqa: BLE001  a kernel can fail in as many ways as its system
        return Check("kernel", "failed", f"it starts, but doesn't answer: {type(error).__name__}: {error}",
                     f"see what it says: {sys.executable} -m ipykernel; then pip install -c constraints.txt .")
    ours = Path(fmn_nb.__file__)
    if theirs.resolve() != ours.resolve():
        return Check("kernel", "failed", f"notebooks import {theirs}, this command {ours}",
                     "install the right one into this environment, and unset PYTHONPATH if it names another")
    if (other := _other_kernel()) is not None:
        return Check("kernel", "note", f"runs start this Python, JupyterLab's kernel python3 starts {other}",
                     f"for JupyterLab: {sys.executable} -m ipykernel install --sys-prefix --name python3")
    return Check("kernel", "ok", f"this Python, started; it imports {theirs.parent}")


def _other_kernel() -> str | None:
    """What the installed kernel python3 starts, if that is not this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return "nothing: it isn't installed"
    # A bare "python" is replaced by this interpreter when the kernel starts.
    resolved = sys.executable if re.fullmatch(r"python(3(\.\d+)?)?", command) else shutil.which(command) or command
    return None if Path(resolved).absolute() == Path(sys.executable).absolute() else command


def widgets() -> Check:
    """Widgets can be shown in JupyterLab, if that is installed."""
    version = metadata.version("ipywidgets")
    try:
        lab = metadata.version("jupyterlab")
    except metadata.PackageNotFoundError:
        return Check("widgets", "note", f"ipywidgets {version}, no JupyterLab",
                     'to work through the course: pip install -c constraints.txt ".[lab]"')
    bridge = metadata.version("jupyterlab_widgets")  # its absence is caught as a failed check
    return Check("widgets", "ok", f"ipywidgets {version}, jupyterlab {lab}, jupyterlab_widgets {bridge}")


def notebooks() -> Check:
    """The course's notebooks are there."""
    course = course_notebooks()
    if not course:
        return Check("notebooks", "failed", f"none in {notebooks_dir()}", "reinstall from a complete checkout")
    return Check("notebooks", "ok", ", ".join(course))


def data() -> Check:
    """Every bundled data file is there and unchanged."""
    checksums = data_dir() / CHECKSUMS
    if not checksums.is_file():
        return Check("data", "failed", f"{checksums} is missing", "reinstall from a complete checkout")
    wrong, known = damaged_files(data_dir())
    if wrong:
        found = f"{len(wrong)} of {known} files missing or changed: {', '.join(wrong[:3])}"
        return Check("data", "failed", found, "restore them (git checkout data) or reinstall")
    return Check("data", "ok", f"{known} files, models: {', '.join(bundled_models()) or 'none'}")


def named_model(name: str) -> Check:
    """The model asked about can be loaded if it is small; a large one is here or available on the hub."""
    try:
        place = resolve(name)
        if isinstance(place, str):
            check_on_hub(place)
            return _on_hub(place)
        if place.is_file():
            return Check("model", "note", f"{place.resolve()}, {place.stat().st_size / 1e9:.2f} GB",
                         "its configuration and tokenizer come from the hub at the first use, unless a folder with "
                         "them is given: fmn-nb run --config FOLDER, or fmn.load(FILE, config=FOLDER)")
        whole = base_folder(place) if (place / GROUNDED).is_file() else place  # gated layers, and what they belong to
        parts = read_json(whole / "model_index.json")
        missing = [part for part in _parts(parts) if not any(_folder_of(part, whole, parts).glob("*"))]
    except UnknownModelError as error:
        return Check("model", "failed", str(error), "use one of these, or give another --model")
    except (ValueError, FileNotFoundError) as error:
        return Check("model", "failed", str(error), "get the model's folder again")
    if missing or not _parts(parts):
        return Check("model", "failed", f"{whole} lacks {', '.join(missing) or 'all parts'} of what its "
                     "model_index.json names", "get the model's folder again")
    size = sum(file.stat().st_size for folder in {place, whole} for file in folder.rglob("*.safetensors"))
    variant, beside = _variant(whole), "" if whole == place else f" beside {whole}"
    found = f"{place}{beside}: {', '.join(_parts(parts))}; {size / 1e6:,.0f} MB of weights" + (
        f", as {variant} variants" if variant else "")
    if size <= _MOST_LOADED and (fault := _fault_in_loading(name)):
        return Check("model", "failed", fault, "get the model's folder again, or fix what this line names")
    if untrained := _fault_in_training(whole):
        return Check("model", "note", f"{found}: it draws and is recorded, but can't forget", untrained)
    if size > _MOST_LOADED:
        return Check("model", "note", f"{found}, too many to try here", "the first run loads them")
    return Check("model", "ok", f"{found}, loaded")


def _variant(folder: Path) -> str | None:
    from fmn_nb.models.pipelines import variant_of

    return variant_of(folder)


def _fault_in_training(place: Path) -> str | None:
    """Why the model in a folder can't be trained, judging by its scheduler; None if it can."""
    import diffusers

    from fmn_nb.models import Noising, UnsupportedPipelineError

    index = read_json(place / "model_index.json")
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(_folder_of("scheduler", place, index))
    try:
        Noising(SimpleNamespace(scheduler=scheduler))
    except UnsupportedPipelineError as error:
        return str(error)
    return None


def _fault_in_loading(name: str) -> str | None:
    """What `load` says about a model that it can't load, in one line; None if it can."""
    from fmn_nb.models.pipelines import load

    try:
        load(name, device="cpu")
    except Exception as error:  # noqa: BLE001  a broken folder fails in as many ways as there are libraries reading it
        said = " ".join(str(error).split()) or "no reason given"
        return said if isinstance(error, ValueError) else f"{name} can't be loaded: {type(error).__name__}: {said}"
    return None


def _folder_of(part: str, place: Path, index: dict) -> Path:
    """Where a part of the model in the folder `place` is: there, or in the bundled model that has the rest."""
    shared = bundled_models().get(index.get(REST, {}).get("of"))
    return place / part if shared is None or (place / part).is_dir() else shared / part


def _parts(index: dict) -> list[str]:
    """The components of a pipeline, as its model_index.json names them."""
    return [name for name, kind in index.items() if isinstance(kind, list) and kind[0] and name not in _UNREAD]


def _on_hub(name: str) -> Check:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        return Check("model", "ok", f"{name}, in the local Hugging Face cache")
    return Check("model", "note", f"{name} is not on this machine yet",
                 "the first use downloads it; by arithmetic the U-Net's weights alone take 1.7 GB in float16 and 3.4 "
                 "GB in float32 for Stable Diffusion 1.x, 5.1 and 10.3 GB for SDXL")
