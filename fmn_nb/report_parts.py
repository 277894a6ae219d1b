"""What the page of a run and that of a sweep share: the measures in words, and figures as a reader wants them."""

from pathlib import Path
from typing import Any

REPORT_FILE = "report.html"
Measure = tuple[str, str, str, bool]  # name in metrics.json, short title, what it says, whether more is better
MEASURES: tuple[Measure, ...] = (
    ("ua", "UA", "forgotten: share of the concept's images in which the judge no longer sees it", True),
    ("ira", "IRA", "kept nearby: judge accuracy on the other concepts of the same kind", True),
    ("cra", "CRA", "kept elsewhere: judge accuracy in the other domain", True),
    ("h", "H", "harmonic mean of UA, IRA and CRA", True),
    ("frechet", "Frechet", "distance of the images' distribution to real ones", False),
    ("kernel", "Kernel", "distance to real ones as a squared maximum mean discrepancy, unbiased", False),
    ("clip_score", "CLIP score", "agreement of image and prompt", True),
)
FRACTIONS = ("ua", "ira", "cra", "h")


def description_of(path: Path) -> str:
    """What the PNG's own text says is to be seen in it, else its name."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # text may stand after the pixels
        return str(getattr(image, "text", {}).get("Description", "")).strip() or path.stem.replace("_", " ")


def executed(folder: Path, name: str) -> str | None:
    for candidate in (name, name.removesuffix(".ipynb") + ".failed.ipynb"):
        if (folder / candidate).exists():
            return candidate
    return None


def format_figure(value: Any) -> str:
    """A number as a reader wants it: three digits after the point for small ones, thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def format_size(count: int) -> str:
    """A number of bytes in kB or MB (powers of 1000)."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
