"""What a model may be called, and whether the name leads to one; without torch, so a wrong name fails at once.

A model is named by a bundled name ("emoji"), a hub id ("owner/name"), a diffusers folder, or a single `.safetensors`
checkpoint.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from fmn_nb.files import GROUNDED
from fmn_nb.files import bundled_models as bundled

ORACLE = "emoji-oracle"  # the bundled oracle
GROUNDED_ORACLE = f"{ORACLE}-grounded"  # the same with gated layers of its own
HUB_PATIENCE = 10  # seconds for the hub's answer
_WITHOUT = '--without "cat,banana,guitar,rocket,fluent,Bruno,wild bat" --out runs/oracle'
_AND_COPIED = " (then copy its folder from runs/oracle into the kit's data folder)"
#: bundled names whose weights a checkout may lack -> the command that trains them, in some hours of one core
TRAINED_BY = {
    "emoji-joint": "fmn-nb pretrain --organism joint",
    "emoji-grounded": "fmn-nb pretrain --organism grounded",
    ORACLE: f"fmn-nb pretrain {_WITHOUT}{_AND_COPIED}",
    GROUNDED_ORACLE: f"fmn-nb pretrain --organism grounded {_WITHOUT}{_AND_COPIED}",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")


class UnknownModelError(ValueError):
    """The name leads to no model; the message says which names there are."""


def resolve(name: str | Path) -> str | Path:
    """Turn a model's name into what can be loaded: a folder, a `.safetensors` file, or a hub id (str).

    Only looks at the name and the file system: nothing is imported, downloaded or read. See `check_on_hub` for ids.

    Raises:
        UnknownModelError: the name leads nowhere; the message has the bundled names and the other ways to name a model.
    """
    known, path = bundled(), Path(name).expanduser()
    if str(name) in known:
        return known[str(name)]
    if path.is_dir() and ((path / "model_index.json").is_file() or (path / GROUNDED).is_file()):
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if path.is_file() and path.suffix in _PICKLED:
        raise UnknownModelError(f"{name} is a pickled checkpoint, which could run code, so it is not read; "
                                "convert it to .safetensors, or get its author's own .safetensors")
    if str(name) in TRAINED_BY and not path.exists():
        raise UnknownModelError(f"the model '{name}' isn't there yet; train it with: {TRAINED_BY[str(name)]}")
    if not path.exists() and _HUB_ID.fullmatch(str(name)) and path.suffix != ".safetensors":
        return str(name)
    raise UnknownModelError(f"there is no model '{name}'; bundled: {_listed()}; or give a hub id (owner/name), a "
                            "folder with a model_index.json, or a .safetensors file")


@lru_cache(maxsize=256)  # sweeps ask a thousand times; a refusal is never kept
def check_on_hub(name: str) -> None:
    """Raise UnknownModelError unless the hub id `name` is in the local cache or names a pipeline on the hub."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    here = f"a bundled name ({_listed()}), a folder or a .safetensors file"
    try:
        if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
            return
        files = model_info(name, timeout=HUB_PATIENCE).siblings
    except HFValidationError as error:
        raise UnknownModelError(f"'{name}' is not a hub id: {error}") from None
    except OfflineModeIsEnabled:
        raise UnknownModelError(f"the model '{name}' is not on this machine and HF_HUB_OFFLINE forbids fetching it; "
                                f"unset that, or give {here}") from None
    except RepositoryNotFoundError:
        raise UnknownModelError(f"the hub has no model '{name}', or hides it from you; look it up on huggingface.co, "
                                f"log in (hf auth login) if it is private, or give {here}") from None
    except Exception as error:  # whichever HTTP library is at work has errors of its own
        raise UnknownModelError(f"the model '{name}' is not on this machine and the hub can't be reached "
                                f"({type(error).__name__}); try again with a connection, or give {here}") from error
    if files is not None and not any(file.rfilename == "model_index.json" for file in files):
        raise UnknownModelError(f"the hub's '{name}' holds no model_index.json, so it isn't a diffusers pipeline")


def _listed() -> str:
    return ", ".join(bundled()) or "none; build it with: fmn-nb pretrain"
