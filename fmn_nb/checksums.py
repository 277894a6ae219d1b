"""SHA-256 checksums of the bundled data, so that a damaged or half-copied file is noticed by name."""

import hashlib
from pathlib import Path

from fmn_nb.files import read_json, write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> Path:
    """Write the checksums of all files in a data folder (but itself and the prose) and return the file's path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    return write_json(folder / CHECKSUMS, {
        path.relative_to(folder).as_posix(): sha256(path) for path in paths
        if path.name != CHECKSUMS and not any(part.startswith(".") for part in path.relative_to(folder).parts)
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
