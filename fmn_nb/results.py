"""What a run leaves to be read by people and programs: `metrics.json` (schema 1) and captioned images.

A notebook calls `record(out, {"forgetting": {...}})` and `save_image(out, "before", image, alt="...")`;
the runner calls `validate` when all notebooks are done.
"""

import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

METRICS_FILE = "metrics.json"
STACK = (
    "fmn-nb", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torchmetrics", "papermill",
)

_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_POSITIVE = {"type": "number", "minimum": 0}
_COUNT = {"type": "integer", "minimum": 0}
_REASONS = {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}}
_INTERVALS = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
}
_MEASURED = {
    "type": "object",
    "properties": {
        "ua": _FRACTION,
        "ira": _FRACTION,
        "cra": _FRACTION,
        "h": _FRACTION,
        "ceiling": _FRACTION,
        "frechet": _POSITIVE,
        "kernel": {"type": "number"},
        "features": {"type": "string", "minLength": 1},
        "clip_score": {"type": "number"},
        "images": _COUNT,
        **{name: _FRACTION for name in (
            "paraphrase_ua", "pair_ua", "pair_kept", "similar", "unrelated", "own_class", "members", "other_reading",
            "overshadowed")},
        "ci95": _INTERVALS,
        "skipped": _REASONS,
    },
}
_FORGETTING = {
    "type": "object",
    "properties": {
        "steps": _COUNT,
        "seconds": _POSITIVE,
        "loss_first": {"type": "number"},
        "loss_last": {"type": "number"},
        "stopped_because": {"type": "string", "minLength": 1},
        "trainable_parameters": _COUNT,
        "patch_bytes": _COUNT,
        "peak_memory_bytes": _COUNT,
        "skipped": _REASONS,
    },
    "required": ["steps", "seconds", "stopped_because"],
}
#: what notebooks measure; a section that is absent from a run's metrics.json has its reason under "skipped"
MEASURED = ("forgetting", "before", "after", "attention", "m_score")
#: JSON Schema of metrics.json
SCHEMA = {
    "type": "object",
    "properties": {
        "schema": {"const": 1},
        "model": {"type": "string", "minLength": 1},
        "concept": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "kind": {"enum": ["object", "style", "identity"]},
            },
            "required": ["name", "kind"],
        },
        "preset": {"type": "string", "minLength": 1},
        "seed": _COUNT,
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "forgetting": _FORGETTING,
        "before": _MEASURED,
        "after": _MEASURED,
        "attention": {
            "type": "object",
            "properties": {
                **{f"{part}_{when}": _FRACTION for part in ("mass", "later") for when in ("before", "after")},
                "skipped": _REASONS,
            },
        },
        "cost": {
            "type": "object",
            "properties": {
                "forgetting_seconds": _POSITIVE,
                "forgetting_peak_memory_bytes": _COUNT,
                "patch_bytes": _COUNT,
                "evaluation_seconds": _POSITIVE,
                "evaluation_peak_memory_bytes": _COUNT,
            },
        },
        "m_score": {"type": "object"},
        "skipped": _REASONS,
    },
    "required": ["schema", "model", "concept", "preset", "seed", "versions"],
}


class MetricsError(ValueError):
    """A metrics.json that breaks the schema, or a value that has no place in one."""


def record(out: str | os.PathLike[str], sections: dict[str, Any]) -> dict[str, Any]:
    """Merge `sections` into `out/metrics.json` and return the whole.

    A section given again replaces the one that stood there, so that a rerun leaves no stale figure; only the
    reasons under "skipped" add up. A reason goes when its section comes, or when None is given for it. Numpy and
    torch scalars become plain numbers. The file is replaced in one step. Raises MetricsError, before anything is
    written, for an unknown section, a NaN or an infinity (a metric that could not be computed is left out, with its
    reason under "skipped") and for what JSON cannot hold.
    """
    unknown = sorted(set(sections) - set(SCHEMA["properties"]))
    if unknown:
        raise MetricsError(
            f"metrics.json has no section {', '.join(map(repr, unknown))}; it has: {', '.join(SCHEMA['properties'])}"
        )
    path = Path(out) / METRICS_FILE
    metrics = read_json(path) if path.exists() else {"schema": 1}
    plain = {name: _plain(section, name) for name, section in sections.items()}
    given = plain.pop("skipped", {})
    reasons = {name: reason for name, reason in metrics.pop("skipped", {}).items() if name not in plain} | given
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    metrics |= plain | ({"skipped": reasons} if reasons else {})
    write_json(path, metrics)
    return metrics


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types; `where` is the dotted name that an error tells."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str | int | float | bool | None) and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy or torch scalar
    if isinstance(value, float) and not math.isfinite(value):
        raise MetricsError(f'{where} is {value}: leave it out and give the reason under "skipped"')
    if not isinstance(value, str | int | float | bool | None):
        raise MetricsError(f"{where} is a {type(value).__name__}, which metrics.json cannot hold")
    return value


def validate(metrics: Any, sections: tuple[str, ...] = ()) -> None:
    """Raise MetricsError, naming the place, unless `metrics` follows schema 1 and holds all of `sections`.

    A section may be missing if "skipped" tells why. Fractions lie in [0, 1], counts are whole and not negative.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(SCHEMA).iter_errors(metrics))
    if error is not None:
        where = ".".join(map(str, error.absolute_path)) or "metrics.json"
        raise MetricsError(f"{where}: {error.message}")
    missing = [name for name in sections if name not in metrics and name not in metrics.get("skipped", {})]
    if missing:
        raise MetricsError(f"the notebooks left no {', '.join(missing)} in metrics.json, and no reason under 'skipped'")


def save_image(out: str | os.PathLike[str], name: str, image: "Image | Figure", alt: str) -> Path:
    """Write `out/images/NAME.png` with its description inside (PNG text "Description") and return its path.

    The report groups images by the first word of their name: `before...`, `after...`, `attention...`, others.
    `image` is a PIL image or a matplotlib figure; `alt` says in words what is to be seen, for readers who
    cannot see it. Raises ValueError for an empty `alt` or a name that is no plain file name.
    """
    if not alt.strip():
        raise ValueError(f"image '{name}' needs a description: alt says in words what is to be seen")
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise ValueError(f"'{name}' is no image name: letters, digits, '-' and '_' only")
    path = Path(out) / "images" / f"{name}.png"
    with replacing(path) as temporary:
        if hasattr(image, "savefig"):
            image.savefig(temporary, format="png", bbox_inches="tight", metadata={"Description": alt})
        else:
            image.save(temporary, format="PNG", pnginfo=_description(alt))
    return path


def _description(alt: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("Description", alt)  # iTXt holds any letter, tEXt only Latin-1
    return text


def versions() -> dict[str, str]:
    """The versions behind a result: Python, system and the main packages; those not installed are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in STACK:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"after": {"ua": 1, "ci95": {"ua": [0, 1]}}} as {"after.ua": 1, "after.ci95.ua.0": 0, ...}."""
    row = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        row |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return row
