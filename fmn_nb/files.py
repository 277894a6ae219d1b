"""Files on disk: artefacts that are whole or absent, the folders that come with the package, checksums, versions.

Everything is written under a temporary name and then renamed, so nobody sees a half-written file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GROUNDED = "grounding.json"  # in a folder that holds only gated layers: which pipeline beside it they belong to
MOST_YAML = 1_000_000  # values that a YAML file may stand for, aliases written out


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on an exception it vanishes.

    The temporary name keeps the suffix (so that libraries which choose a format by suffix work) and starts
    with a dot. Missing parent folders are made. `path` itself is never seen half written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _open_to_others(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_to_others(file: Path) -> None:
    """Give a file the mode of any new one: safetensors makes files that only their owner can read."""
    if file.stat().st_mode & 0o777 == 0o600:
        probe = _beside(file)  # made to see the umask, which can't be read without changing it for all threads
        probe.touch()
        try:
            shutil.copymode(probe, file)
        finally:
            probe.unlink()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors as a whole safetensors file and return its path."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata))
    return Path(path)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `replacing`, for a folder: yields an empty temporary folder that then takes `path`'s place.

    A folder that stood at `path` is moved aside first and removed last, so an error or an interrupt leaves either the
    old or the new folder whole there. If the process is killed between the two, the old one stays beside it, hidden.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def one_at_a_time(path: str | os.PathLike[str], patience: float) -> Iterator[None]:
    """Hold the lock file `path` of work that several processes share; parent folders are made.

    The system frees the lock of a process that dies. After waiting `patience` seconds in vain, work goes on without the
    lock, so it may only guard work that is wasted, but not wrong, if done twice.
    """
    from filelock import FileLock, Timeout

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=patience)
    try:
        yield
    finally:
        lock.release()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8, "\\n" line ends on every system) as a whole file and return its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON. NaN and infinities are refused, since JSON can't hold them."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, with or without a byte order mark; a broken one raises a ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or restore it") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; delete it or restore it") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file, see `parse_yaml`; a ValueError names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What `text` says by the rules of YAML 1.2: 1e-5 is a number, while no, on, 007 and 2020-01-01 are texts.

    Raises:
        ValueError: it isn't YAML, names a key twice, or stands for more than `MOST_YAML` values; the message begins
            with `where`.
    """
    import yaml

    try:
        content = yaml.load(text, _yaml_loader())  # noqa: S506  a SafeLoader, see there
        size = _size(content, {})
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid YAML: it is nested too deeply, or contains itself") from None
    if size > MOST_YAML:
        raise ValueError(f"{where} stands for more than {MOST_YAML:,} values; write fewer, and no alias of an alias")
    return content


@cache
def _yaml_loader() -> type:
    """PyYAML's safe loader with the plain values of YAML 1.2; it refuses a key that occurs twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Merge what `<<` names, unless a key occurs twice; keys of the merged ones may be overridden.

            Each key stays once, since merges of merges would otherwise double with each level.
            """
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if (key.tag, str(key.value)) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' occurs twice; name it once", key.start_mark)
                seen.add((key.tag, str(key.value)))
            super().flatten_mapping(node)
            node.value = list({(key.tag, str(key.value)): (key, value) for key, value in node.value}.values())

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
            ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"), ("null", r"~|null|Null|NULL|", "~nN\0"),
            ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"), ("merge", r"<<", "<"),
            ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
             "-+0123456789.")):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first))
    Loader.yaml_implicit_resolvers.setdefault("", []).append(
        ("tag:yaml.org,2002:null", re.compile("$")))
    return Loader


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values `value` stands for with every alias written out; RecursionError if one contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in inside)
    return known[id(value)]


def _beside(path: Path) -> Path:
    # Not tempfile: its files are private to their owner, but artefacts are shared.
    if not path.name:
        raise ValueError(f"'{path}' has no name that another could stand beside: write the folder's name")
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")


_PACKAGE = Path(__file__).resolve().parent


def _bundled(name: str) -> Path:
    """The folder `name` inside the wheel (`fmn_nb/_bundled/name`), or else beside the package in a checkout."""
    for folder in (_PACKAGE / "_bundled" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the folder '{name}' is neither inside the installed package nor beside it; "
        "reinstall fmn_nb from a complete checkout"
    )


def data_dir() -> Path:
    """The folder with sprites, the emoji model, its judge and prompt lists (absolute)."""
    return _bundled("data")


def notebooks_dir() -> Path:
    """The folder with the course's numbered notebooks (absolute)."""
    return _bundled("notebooks")


def bundled_models() -> dict[str, Path]:
    """Name -> folder of every bundled diffusion pipeline: `data/NAME-diffusion` is the model NAME; a folder with added
    layers for one of these (`GROUNDED`) has its own name."""
    whole = {index.parent.name.removesuffix("-diffusion"): index.parent
             for index in sorted(data_dir().glob("*/model_index.json"))}
    return whole | {line.parent.name: line.parent for line in sorted(data_dir().glob(f"*/{GROUNDED}"))}


def base_folder(folder: Path) -> Path:
    """The pipeline's folder that the gated layers in `folder` belong to: the one beside them, or the bundled one.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    name = Path(read_json(folder / GROUNDED)["base"]).name  # a name alone, whatever a stranger's file says
    for place in (folder.parent / name, data_dir() / name):
        if (place / "model_index.json").is_file():
            return place
    raise FileNotFoundError(f"{folder.name} needs the pipeline {name} beside it, which isn't there")


REST = "_rest"  # in the index of a model's folder that leaves some parts to a bundled model
CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> Path:
    """Write the checksums of all files in a data folder and return the file's path.

    It leaves out this file itself, prose, and `results`, which `fmn-nb benchmark` writes anew.
    """
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    return write_json(folder / CHECKSUMS, {
        path.as_posix(): sha256(folder / path) for path in paths
        if path.name != CHECKSUMS and path.parts[0] != "results" and not any(p.startswith(".") for p in path.parts)
    })


def damaged_files(folder: Path) -> tuple[list[str], int]:
    """The names of missing or changed files, and how many files are known. FileNotFoundError without checksums."""
    expected = read_json(folder / CHECKSUMS)
    return [name for name, digest in expected.items() if sha256(folder / name) != digest], len(expected)


def sha256(path: Path) -> str:
    """A file's checksum in hexadecimal; "missing" if there is no such file."""
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_BLOCK, _BLOCKS = 2**16, 1024  # bytes, and how many blocks are read of a file
_SAID_OF = ("quality.json", "training.json", CHECKSUMS)  # beside a model: what was measured, which changes no image


def model_print(model: str | Path) -> str:
    """A sum over names, sizes and contents of a model's files, and of those that it leaves to a bundled model, which
    tells two trainings apart; "" for what is no folder or file (a hub id).

    Files of up to 64 MiB are read whole, larger ones in blocks at even distances.
    """
    path = Path(model).expanduser()
    files = [path] if path.is_file() else [
        one for folder in _folders_of(path) for one in sorted(folder.rglob("*"))
        if one.suffix in (".safetensors", ".json") and one.name not in _SAID_OF]
    stats = [(str(one), one.stat()) for one in files]
    return _content_of(tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)) if files else ""


def _folders_of(folder: Path) -> list[Path]:
    """A model's folder, and those that hold its other parts."""
    if (folder / GROUNDED).is_file():
        with suppress(FileNotFoundError):
            return [folder, *_folders_of(base_folder(folder))]
    index = folder / "model_index.json"
    rest = read_json(index).get(REST, {}).get("of") if index.is_file() else None
    return [folder, *(place for name, place in bundled_models().items() if name == rest)]


@lru_cache(maxsize=64)  # sweeps ask a thousand times
def _content_of(files: tuple[tuple[str, int, int], ...]) -> str:
    found = hashlib.sha256()
    for name, size, _changed in files:
        found.update(f"{Path(name).name} {size}".encode())
        with open(name, "rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                found.update(file.read(_BLOCK))
    return found.hexdigest()[:16]


STACK = (
    "fmn-nb", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torchmetrics", "papermill",
)


def versions() -> dict[str, str]:
    """The versions behind a result: Python, system and the main installed packages."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in STACK:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
