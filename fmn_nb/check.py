"""What works on this machine and what to do about what doesn't: the command `fmn-nb check`."""

import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from math import prod
from pathlib import Path

import fmn_nb
from fmn_nb.checksums import CHECKSUMS, damaged_files
from fmn_nb.files import read_json
from fmn_nb.paths import bundled_models, data_dir, notebooks_dir
from fmn_nb.plans import check_model, check_on_hub, course_notebooks
from fmn_nb.runs import ask_kernel

MARKS = {"ok": "  ok ", "note": "note ", "failed": "FAIL "}
_LEAST_PYTHON = (3, 11)
_LEAST_MEMORY = 4e9  # bytes; the emoji model's runs peak well below
_LEAST_DISK = 1e9  # bytes
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")  # what this package does without
_IN_ONE_FILE = {"U-Net": ("model.diffusion_model.",), "text encoder": ("cond_stage_model.", "conditioner.embedders.")}


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
    """The dependencies are there, and in the versions that this package asks for."""
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
    """constraints.txt, which stands beside data/ in a checkout and in a wheel."""
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
    """The notebooks' kernel is there, is this very Python, starts, and imports this very package."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    install = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Check("kernel", "failed", "no kernel named python3", install)
    command = spec.argv[0]
    # A bare "python" is replaced by this interpreter when the kernel starts.
    resolved = sys.executable if re.fullmatch(r"python(3(\.\d+)?)?", command) else shutil.which(command) or command
    if Path(resolved).absolute() != Path(sys.executable).absolute():
        return Check("kernel", "failed", f"python3 starts {command}, not {sys.executable}", install)
    try:
        theirs = Path(ask_kernel("import fmn_nb; print(fmn_nb.__file__)"))
    except Exception as error:  # noqa: BLE001  a kernel can fail in as many ways as its system
        return Check("kernel", "failed", f"python3 starts, but gives no answer: {type(error).__name__}: {error}",
                     f"see what it says: {sys.executable} -m ipykernel; then pip install -c constraints.txt .")
    ours = Path(fmn_nb.__file__)
    if theirs.resolve() != ours.resolve():
        return Check("kernel", "failed", f"notebooks import {theirs}, this command {ours}",
                     "install the one that is meant into this environment, and unset PYTHONPATH where it names another")
    return Check("kernel", "ok", f"python3 from {spec.resource_dir}, started; it imports {theirs.parent}")


def widgets() -> Check:
    """Widgets can be shown in JupyterLab, where that is installed."""
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
    """The model that was asked about is here and whole, with the memory its weights need, or can be had on the hub."""
    path = Path(name).expanduser()
    do_this = "do what this line says, or give another --model"
    try:
        if path.suffix in _PICKLED and path.is_file():
            return Check("model", "failed", f"{path} is pickled, and reading it could run code that it holds",
                         "convert it to .safetensors where that does no harm, or get the author's own .safetensors")
        check_model(name)
        if name in bundled_models():
            return _look_into(f"{name}, bundled", bundled_models()[name])
        if path.exists():
            return _look_into(str(path.resolve()), path)
        check_on_hub(name)
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(name, "model_index.json")
        if isinstance(index, str):
            return _look_into(f"{name}, in the local Hugging Face cache", Path(index).parent)
    except ValueError as error:  # RequestError and _ModelFault are such
        return Check("model", "failed", str(error), do_this)
    return Check("model", "note", f"{name} is not on this machine yet",
                 "the first use downloads it; by arithmetic the U-Net's weights alone take 1.7 GB in float16 and 3.4 "
                 "GB in float32 for Stable Diffusion 1.x, 5.1 and 10.3 GB for SDXL")


class _ModelFault(ValueError):
    """A model's files are not all there, or not to be read."""


def _look_into(label: str, path: Path) -> Check:
    """What a model here holds, from its index and its files' headers: no weight is loaded."""
    files = _weights_of_folder(path) if path.is_dir() else [path]
    names: dict[str, int] = {}
    for file in files:
        names |= {f"{file}:{name}": count for name, count in _parameters(file).items()}
    if path.is_file():
        _check_single_file(path, [name.removeprefix(f"{path}:") for name in names])
    count, on_disk, (where, memory) = sum(names.values()), sum(file.stat().st_size for file in files), _memory()
    half, full = count * 2, count * 4
    found = (f"{label}: {on_disk / 1e6:,.0f} MB of weights on disk, {count / 1e6:,.1f} million parameters; these alone "
             f"need {half / 1e9:.2f} GB in float16, {full / 1e9:.2f} GB in float32 (arithmetic); "
             f"{where} {memory / 1e9:.1f} GB")
    if half > memory:
        return Check("model", "failed", found, "it does not fit even in float16: use a machine with more memory")
    if full > memory:
        return Check("model", "note", found, "float32, which fine-tuning uses by default, does not fit: draw in "
                     "float16, or use a machine with more memory")
    if path.is_file():
        return Check("model", "note", found, "its configuration and tokenizer come from the hub at the first use, "
                     "unless fmn.load is given a folder with them (config=)")
    return Check("model", "ok", found)


def _weights_of_folder(folder: Path) -> list[Path]:
    """The weight files of a diffusers folder's components; _ModelFault for the first part that is absent."""
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise _ModelFault(f"{folder / 'model_index.json'} holds no components; get the model's folder again")
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] and name not in _UNREAD]
    for wanted in (("unet", "transformer"), ("text_encoder",), ("tokenizer",), ("vae",)):
        if not set(wanted) & set(parts):
            raise _ModelFault(f"{folder} names no {' or '.join(wanted)} in model_index.json; give a whole "
                              "text-to-image pipeline's folder")
    files: list[Path] = []
    for part in parts:
        inside = folder / part
        if not inside.is_dir() or not any(inside.iterdir()):
            raise _ModelFault(f"the folder {inside} is missing or empty; get the model again")
        if part.startswith(("tokenizer", "scheduler")):
            if part.startswith("tokenizer") and not any((inside / name).is_file() for name in _VOCABULARIES):
                raise _ModelFault(f"{inside} holds no vocabulary; get the model again")
        else:
            files += _weights_of(inside)
    return files


def _weights_of(part: Path) -> list[Path]:
    whole = [part / name for name in _WEIGHTS if (part / name).is_file()]
    if whole:
        return whole[:1]
    for index in sorted(part.glob("*.safetensors.index.json")):
        shards = sorted({part / name for name in read_json(index)["weight_map"].values()})
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise _ModelFault(f"{missing[0]} is missing, of {len(shards)} parts; get the model again")
        return shards
    others = ", ".join(sorted(file.name for file in part.iterdir())) or "nothing"
    raise _ModelFault(f"{part} holds no {' or '.join(_WEIGHTS)} but {others}; pickled weights are not read: save the "
                      "pipeline anew with save_pretrained(folder, safe_serialization=True)")


def _parameters(file: Path) -> dict[str, int]:
    """Name -> number of values of each tensor that a .safetensors file's header lists."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise _ModelFault(f"{file} is no whole .safetensors file ({error}); get it again") from None


def _check_single_file(path: Path, names: list[str]) -> None:
    for part, prefixes in _IN_ONE_FILE.items():
        if not any(name.startswith(prefixes) for name in names):
            raise _ModelFault(f"{path} holds no {part} (no tensor named {prefixes[0]}...), so it is no whole "
                              "checkpoint; give one of Stable Diffusion 1.x, 2.x or SDXL, or a diffusers folder")


def _memory() -> tuple[str, int]:
    """What a model on this machine is loaded into, in words, and its bytes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return "the GPU has", torch.cuda.get_device_properties(0).total_memory
    return "free memory here:", psutil.virtual_memory().available
