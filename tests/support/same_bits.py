"""What a change of the code's shape must leave as it is, bit for bit: patches, maps, figures, learned tokens.

    python tests/support/same_bits.py write before.json       # with the code as it was
    python tests/support/same_bits.py compare before.json     # with the code as it is

Both on one machine, with one set of library versions: other processors and versions round differently. Only the public
interface is used, so that the same file can run beside either code. `compare` prints a line for each fact and ends with
"equal", or with exit code 1. `write` also leaves a saved patch beside the file, which `compare` loads and applies.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fmn_nb as fmn

PROMPT = "a photo of a cat and a frog in the style of noto"


def digest(*arrays: Any) -> str:
    """SHA-256 over shapes, types and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array))
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def of_patch(patch: fmn.Patch) -> str:
    """A patch's kind, names and tensors."""
    names = sorted(patch.tensors)
    return f"{patch.kind} {len(names)} {digest(*(patch.tensors[name] for name in names))}"


def facts(beside: Path, writing: bool) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is compared; JSON values."""
    pipe = fmn.load("emoji", device="cpu")
    yield "fingerprint", fmn.fingerprint(pipe)
    yield from of_recording(pipe)
    cat = fmn.Concept("cat")
    patch = fmn.forget(pipe, cat, preset="balanced", seed=0)
    yield "patch: balanced, cat", of_patch(patch)
    yield "patch: losses", patch.info["forgetting"]["losses"]
    short = {"steps": 4, "reference_count": 4, "reference_steps": 4}
    small = {**short, "retain_count": 8}
    for name, kind, options in (("noto", "style", small), ("Milo", "identity", small),
                                ("mouse", "object", {**small, "towards": "computer mouse"})):
        made = fmn.forget(pipe, fmn.Concept(name, kind=kind), preset="balanced", seed=1, **options)
        yield f"patch: balanced, {name}", of_patch(made)
    yield "patch: paper, cat", of_patch(fmn.forget(pipe, cat, preset="paper", seed=0, **short))
    if writing:
        patch.save(beside)
    old = fmn.Patch.load(beside)
    with old.applied(pipe):
        images = fmn.generate(pipe, ["a photo of a cat", PROMPT], [0, 1], steps=8)
    yield "an old patch applied: images", digest(*images)
    report = fmn.evaluate(pipe, cat, patch=patch, seed=0)
    yield from of_report(report)
    yield from of_inversion(pipe)


def of_recording(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Maps of a generation, by step, layer, head and branch, and the image itself."""
    with fmn.record_attention(pipe) as attention:
        image = pipe(PROMPT, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images[0]
    yield "recording: image", digest(image)
    yield "recording: layers", attention.layers
    yield "recording: maps", digest(attention.map("cat"), attention.map("frog"), attention.map("cat", branch="uncond"),
                                    attention.select("cat", step=2, head=1, layer=attention.layers[0]),
                                    attention.select(part="padding"), attention.masses())
    with fmn.record_attention(pipe, phrases=["cat"], heads="mean", keep="mean", branch="cond") as attention:
        fmn.generate(pipe, [PROMPT, "a photo of a cat"], [0, 1], steps=4)
    yield "recording: running mean", digest(attention.map("cat", image=0), attention.map("cat", image=1))


def of_report(report: fmn.Report) -> Iterator[tuple[str, Any]]:
    """A quick evaluation's metrics but for seconds and memory, its outcomes and images."""
    metrics = report.to_metrics()
    for section in ("before", "after", "attention"):
        yield f"evaluation: {section}", metrics[section]
    yield "evaluation: outcomes", hashlib.sha256(report.outcomes.to_csv().encode()).hexdigest()[:16]
    yield "evaluation: images", digest(*report.images["before"], *report.images["after"])
    yield "evaluation: prompts", [[d.prompt, d.seed, d.role] for d in report.wanted][::7]
    yield "evaluation: similarity", digest(report.similarity.to_numpy()) + " ".join(report.similarity.index)


def of_inversion(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The embedding that an inversion learns from two drawn images, and its losses."""
    images = fmn.generate(pipe, ["a photo of a dog", "a photo of a dog in the style of noto"], [3, 4], steps=8)
    tokens = fmn.invert(pipe, images, name="<toy>", initial="dog", seed=0, settings=_inversion_settings())
    yield "inversion: embedding", digest(*tokens.vectors)
    yield "inversion: losses", list(tokens.losses)


def _inversion_settings() -> Any:
    from fmn_nb.inversion import InversionSettings

    return InversionSettings(tokens=2, steps=30, warmup=5, batch_size=2)


def main(task: str, file: Path) -> int:
    """Write the facts, or compare them with those written before."""
    torch.set_num_threads(1)
    beside = file.with_suffix(".patch")
    found = json.loads(json.dumps(dict(facts(beside, task == "write"))))
    if task == "write":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} facts in {file}, a patch in {beside}")
        return 0
    before = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in {**before, **found}:
        print(f"{'DIFFERENT' if name in different else 'equal':10} {name}")
    print(f"{len(different)} of {len(before)} facts differ" if different else "equal")
    return 1 if different else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare"):
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
