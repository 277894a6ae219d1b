"""Where the bundled data and the course's notebooks stand, in a checkout and in an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _bundled(name: str) -> Path:
    """The folder `name` inside the wheel (`fmn_nb/_bundled/name`), else beside the package in a checkout."""
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
    """Name -> folder of every bundled diffusion pipeline: `data/NAME-diffusion` is the model NAME."""
    return {
        index.parent.name.removesuffix("-diffusion"): index.parent
        for index in sorted(data_dir().glob("*/model_index.json"))
    }
