"""SHA-256 checksums of the bundled data, so that a damaged or half-copied file is noticed by name."""

import hashlib
from pathlib import Path

from fmn_nb.files import read_json, write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> Path:
    """Write the checksums of all files in a data folder and return the file's path.

    Left out are this file itself, prose, and `results`, which `fmn-nb benchmark` writes anew.
    """
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    return write_json(folder / CHECKSUMS, {
        path.as_posix(): sha256(folder / path) for path in paths
        if path.name != CHECKSUMS and path.parts[0] != "results" and not any(p.startswith(".") for p in path.parts)
    })


def damaged_files(folder: Path) -> tuple[list[str], int]:
    """Names of the files that are missing or changed, and how many are known. FileNotFoundError without checksums."""
    expected = read_json(folder / CHECKSUMS)
    return [name for name, digest in expected.items() if sha256(folder / name) != digest], len(expected)


def sha256(path: Path) -> str:
    """A file's checksum in hexadecimal; "missing" where there is none."""
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
