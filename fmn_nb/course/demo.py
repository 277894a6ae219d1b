"""The demo: a page that draws, forgets and shows attention in the reader's browser, written by `fmn-nb course demo`.

The page's own files are in `demo_page/`. This writes beside them what the page works with: data.js (vocabulary,
tokenizer, noise schedule, what the patches change) and payload/ (ONNX networks, tensors and the runtime's WebAssembly,
each gzipped as base64 in a script), so that the page works from a folder without a server and contacts no other host.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb import __version__
from fmn_nb.files import data_dir, read_json, replacing_folder, write_text
from fmn_nb.runs.plan import RequestError
from fmn_nb.runs.single import PatchRequest, make_patch

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline

    from fmn_nb.patches import Patch

RUNTIME = "1.30.0"  # the version of onnxruntime-web that the page was tested with
SCRIPT, LOADER, BINARY = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
TOOLS = ("onnx", "onnxscript")
MOST_BYTES = 25_000_000  # of the networks and tensors together
PAGE = Path(__file__).parent / "demo_page"
MARK = "demo.json"  # in a folder that this wrote, which it may write again
COLOURS = 64  # of the maps' colour table


class DemoError(ValueError):
    """The page can't be written; the message says why and what to do."""


def find_runtime(folder: Path | None) -> Path:
    """The `dist` folder of onnxruntime-web in the pinned version, from the package in `folder` or else from the one
    that npm installed in node_modules/ here.

    Raises:
        DemoError: it isn't there, or has another version.
    """
    package = (folder or Path("node_modules/onnxruntime-web")).expanduser()
    how = f"npm install onnxruntime-web@{RUNTIME}, or name the package's folder with --runtime"
    about = package / "package.json"
    if not about.is_file():
        raise DemoError(f"no onnxruntime-web in {package}: {how}")
    said = read_json(about)
    name, version = (said.get("name"), said.get("version")) if isinstance(said, dict) else (None, None)
    if name != "onnxruntime-web" or version != RUNTIME:
        raise DemoError(f"{package} holds {name} {version}, the page needs onnxruntime-web {RUNTIME}: {how}")
    if missing := [file for file in (SCRIPT, LOADER, BINARY) if not (package / "dist" / file).is_file()]:
        raise DemoError(f"{package / 'dist'} lacks {', '.join(missing)}: {how}")
    return package / "dist"


def check_tools() -> None:
    """Raise a DemoError if a package that the export needs is missing."""
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        raise DemoError(f"the export needs {' and '.join(missing)}: pip install -c constraints.txt '.[course]'")


def check_free(out: Path) -> None:
    """Raise a DemoError if `out` holds anything that isn't an earlier demo."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise DemoError(f"{out} holds other files, which would be lost; give --out a new or empty folder")


def demo_patch(request: PatchRequest) -> Patch:
    """The patch of a request, from where `fmn-nb forget` leaves it, or made now and left there."""
    from fmn_nb.patches import Patch, PatchFileError

    try:
        found = Patch.load(request.folder)
        if found.info.get("request") == request.stated():
            return found
    except (PatchFileError, FileNotFoundError):
        pass
    try:
        return make_patch(request, request.folder)
    except RequestError as error:
        raise DemoError(f"{request.folder} holds a patch that was made with other settings: show that one with --patch "
                        f"{request.folder}, or replace it with fmn-nb forget ... --again") from error


def write_demo(out: Path, patches: Sequence[Patch], runtime: Path, log: Callable[[str], None] = lambda _: None) -> Path:
    """Write the page into the folder `out`, as a whole or not at all, and return its index.html.

    Args:
        patches: what the slider applies, one at a time; made for the bundled emoji model.
        runtime: what `find_runtime` returned.
        log: called with what was exported.

    Raises:
        DemoError: `out` holds other things, a tool is missing, or the parts are too large together.
        PatchMismatchError: a patch was made for another model.
    """
    check_free(out)
    check_tools()
    if not patches:
        raise DemoError("the page needs at least one patch")

    from fmn_nb.concepts import world_of
    from fmn_nb.course import demo_networks
    from fmn_nb.models import load

    pipe = load("emoji", device="cpu")
    for patch in patches:  # one that doesn't fit is refused before anything is exported
        with patch.applied(pipe):
            pass
    changed = sorted(set().union(*(patch.changed() for patch in patches)))
    tensors = _Tensors()
    data = _data(pipe, patches, changed, tensors)
    parts = {"text_encoder": demo_networks.text_encoder(pipe), "denoiser": demo_networks.denoiser(pipe, changed),
             "decoder": demo_networks.decoder(pipe), "judge": demo_networks.judge(world_of(pipe).judge),
             "tensors": tensors.bytes()}
    for name, content in parts.items():
        log(f"{name}: {len(content):,} bytes")
    if (total := sum(map(len, parts.values()))) > MOST_BYTES:
        raise DemoError(f"networks and patches take {total:,} bytes, more than {MOST_BYTES:,}: give fewer patches, or "
                        "low-rank ones (fmn.Patch.low_rank)")
    parts |= {"runtime": (runtime / BINARY).read_bytes(), "runtime_script": (runtime / LOADER).read_bytes()}
    with replacing_folder(out) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        shutil.copytree(data_dir() / "licenses", folder / "licenses")
        (folder / "runtime").mkdir()
        shutil.copy(runtime / SCRIPT, folder / "runtime" / SCRIPT)
        write_text(folder / "data.js", f"globalThis.FMN = {{ data: {json.dumps(data, separators=(',', ':'))} }};\n")
        for name, content in parts.items():
            write_text(folder / "payload" / f"{name}.js", _payload(name, content))
        write_text(folder / MARK, json.dumps({"fmn_nb": __version__, "onnxruntime-web": RUNTIME,
                                              "bytes": {name: len(content) for name, content in parts.items()}}))
    return out / "index.html"


class _Tensors:
    """Float32 tensors in a row, and where each begins, counted in values."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._length = 0

    def add(self, tensor: Any) -> dict[str, Any]:
        """Keep a tensor; its place as the page reads it."""
        values = tensor.detach().float().cpu().contiguous().numpy()
        place = {"at": self._length, "shape": list(values.shape)}
        self._rows.append(values.ravel())
        self._length += values.size
        return place

    def bytes(self) -> bytes:
        """All of them, little-endian."""
        return b"".join(values.astype("<f4").tobytes() for values in self._rows)


def _payload(name: str, content: bytes) -> str:
    """A script that hands `content` to the page."""
    packed = base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")
    return f'FMN.payload("{name}", "{packed}");\n'


def _data(pipe: DiffusionPipeline, patches: Sequence[Patch], changed: Iterable[str],
          tensors: _Tensors) -> dict[str, Any]:
    """What data.js says; tensors go into `tensors`."""
    from fmn_nb.concepts import world_of
    from fmn_nb.models.images import GUIDANCE, STEPS
    from fmn_nb.plots.attention import ACROSS, DOWN

    judge, config = world_of(pipe).judge.config, pipe.unet.config
    made = ", ".join(f"{one['name']} ({one['preset']}, seed {one['seed']})" for one in map(_about, patches))
    return {
        "made": f"Written by fmn-nb {__version__} from the bundled emoji model; patches: {made}.",
        "guidance": GUIDANCE, "steps": STEPS, "alphas": _alphas(pipe), "imageSize": judge.image_size,
        "latents": [config.in_channels, config.sample_size, config.sample_size],
        "tokenizer": _tokenizer(pipe), **_words(), "down": DOWN, "across": ACROSS, "colours": _colours(),
        "judge": {"labels": list(judge.labels), "styles": list(judge.styles)},
        "weights": {name: tensors.add(pipe.unet.get_parameter(name)) for name in changed},
        "patches": [{**_about(patch), "changes": _changes(patch, tensors)} for patch in patches],
    }


def _about(patch: Patch) -> dict[str, Any]:
    """What a patch forgets, and how it was made."""
    concepts = [one for one in patch.info.get("concepts", []) if isinstance(one, dict)]
    return {"name": " and ".join(str(one.get("name")) for one in concepts) or "nothing stated",
            "kind": str(concepts[0].get("kind")) if concepts else "", "preset": str(patch.info.get("preset")),
            "seed": patch.info.get("seed")}


def _changes(patch: Patch, tensors: _Tensors) -> dict[str, dict[str, Any]]:
    """Name of a changed weight -> the place of its difference, whole or as factors up [out, rank], down [rank, in]."""
    from fmn_nb.patches import LORA_A, LORA_B

    if patch.kind == "weights":
        return {name: {"full": tensors.add(tensor)} for name, tensor in patch.tensors.items()}
    changes = {}
    for name, difference in patch.differences():
        module = name.removesuffix(".weight")
        if module + LORA_A in patch.tensors and name.endswith(".weight"):
            up, down = patch.tensors[module + LORA_B], patch.tensors[module + LORA_A]
            changes[name] = {"up": tensors.add(up.flatten(1)), "down": tensors.add(down.flatten(1))}
        else:  # a bias
            changes[name] = {"full": tensors.add(difference)}
    return changes


def _alphas(pipe: DiffusionPipeline) -> list[float]:
    """The scheduler's cumulative products, one for each timestep.

    Raises:
        DemoError: the scheduler isn't the one that the page has.
    """
    needed = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "use_karras_sigmas": False,
              "final_sigmas_type": "zero", "timestep_spacing": "linspace", "prediction_type": "epsilon"}
    config = pipe.scheduler.config
    if other := {name: config.get(name) for name, value in needed.items() if config.get(name) != value}:
        raise DemoError(f"the page samples with DPM-Solver++ (2M) as the emoji model does, not with {other}")
    return pipe.scheduler.alphas_cumprod.tolist()


def _tokenizer(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the page's tokenizer needs of tokenizer.json."""
    said = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    pairs = [one if isinstance(one, list) else one.split(" ") for one in said["model"]["merges"]]
    return {"vocabulary": said["model"]["vocab"], "merges": pairs,
            "special": {one["content"]: one["id"] for one in said["added_tokens"]},
            "begin": pipe.tokenizer.bos_token_id, "end": pipe.tokenizer.eos_token_id,
            "columns": pipe.tokenizer.model_max_length}


def _words() -> dict[str, Any]:
    """The world's vocabulary, for the page's selects: each thing's name and how captions write it."""
    from fmn_nb.concepts import with_article
    from fmn_nb.emoji.world import AMBIGUOUS, BACKGROUNDS, IDENTITIES, OBJECTS, OPENINGS, READINGS, STYLES

    groups = {"objects": OBJECTS, "ambiguous words": AMBIGUOUS, "their readings": READINGS, "names": IDENTITIES}
    return {"openings": OPENINGS, "styles": list(STYLES), "backgrounds": list(BACKGROUNDS),
            "things": [[group, [[name, name if name in IDENTITIES else with_article(name)] for name in names]]
                       for group, names in groups.items()]}


def _colours() -> list[list[int]]:
    """The maps' colours from the lowest value to the highest, RGB of 0 to 255."""
    from matplotlib import colormaps

    from fmn_nb.plots.style import MAP_COLOURS

    shades = colormaps[MAP_COLOURS]([number / (COLOURS - 1) for number in range(COLOURS)])
    return [[round(255 * float(part)) for part in shade[:3]] for shade in shades]
