"""What forgetting costs: seconds and peak memory against the same algorithm in a straight line, and bytes of a patch.

    python tests/speed/bench_forgetting.py sd15 [STEPS]   a randomly initialised Stable Diffusion 1.5, 256 x 256 pixels,
                                                          batch 1, 10 references, cross-attention only: the kit, the
                                                          published algorithm and a lean loop
    python tests/speed/bench_forgetting.py emoji          35 steps of each preset on the emoji model, then as `lean`
    python tests/speed/bench_forgetting.py lean           the kit's step beside the lean loop's on the emoji model

The published code leaves gradients on all weights of the U-Net, also where only the cross-attention is trained: that is
most of the memory and of the time that the kit saves against it. The lean loop is a straight line without them, which
also encodes images and text only once; against it one sees what the kit itself costs or saves.

The sides of `sd15` run in processes of their own, one after the other, on the same data: their losses agree. A step's
times are medians, by the clock and of the processor; the latter are hardly disturbed by what else a machine does.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import supported  # noqa: F401
from diffusers import StableDiffusionPipeline
from full_size import sd15
from published import published_forget_me_not
from snapshots import noise_images
from torch.optim.optimizer import register_optimizer_step_post_hook

import fmn_nb as fmn
from fmn_nb.models.denoising import Stream, seeded

SIZE, REFERENCES, SEED = 256, 10, 0
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 6


def kit(pipe: StableDiffusionPipeline, images: list, steps: int = STEPS, **settings: object) -> list[float]:
    patch = fmn.forget(pipe, "cat", references=images, preset="paper", train="cross_attention", seed=SEED, steps=steps,
                       **settings)
    return patch.info["forgetting"]["losses"]


def straight(pipe: StableDiffusionPipeline, images: list, steps: int = STEPS, lean: bool = False) -> list[float]:
    """The algorithm in a straight line: with gradients on all of the U-Net's weights, or lean."""
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    return published_forget_me_not(pipe, images, "a photo of cat", cat, seeded(SEED, Stream.FORGET), steps,
                                   cross_attention_only=True, lean=lean)


SIDES: dict[str, Callable[..., list[float]]] = {
    "published": straight, "lean": partial(straight, lean=True),
    "kit": partial(kit, height=SIZE, width=SIZE, offload="disk")}


def timed(run: Callable[[], list[float]]) -> dict[str, Any]:
    """What a fine-tune cost: seconds of the whole call, seconds between its steps, by the clock and of the processor;
    its losses."""
    ends, started = [], time.perf_counter()
    handle = register_optimizer_step_post_hook(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    losses = run()
    handle.remove()
    clock, processor = ([later - earlier for earlier, later in itertools.pairwise(times)]
                        for times in zip(*ends, strict=True))
    return {"whole": time.perf_counter() - started, "clock": clock, "processor": processor, "losses": losses}


def one_side(name: str) -> None:
    """Run one side in this process and print what it cost, as JSON."""
    pipe, images = sd15(), noise_images(REFERENCES, size=(SIZE, SIZE))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = timed(lambda: SIDES[name](pipe, images))
    found |= {what: statistics.median(found[what]) for what in ("clock", "processor")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak": peak, "loaded": loaded}))


def lora_bytes() -> int:
    """The bytes on disk of a saved LoRA patch of the preset's own rank."""
    pipe = sd15()
    patch = fmn.forget(pipe, "cat", references=noise_images(1, size=(64, 64)), preset="balanced", steps=1, batch_size=1,
                       retain_batch=1, retain_count=0, retain_prompts=["a dog"], height=64, width=64, train="lora")
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in patch.save(Path(folder) / "patch").iterdir())


def compare() -> None:
    """All three sides, and the kit's ratios to the other two."""
    found = {}
    for name in SIDES:
        result = subprocess.run([sys.executable, __file__, name, str(STEPS)], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stderr)
        found[name] = json.loads(result.stdout.splitlines()[-1])
        print(f"{name:10} {found[name]['clock']:7.2f} s a step ({found[name]['processor']:.2f} s of the processor)   "
              f"{found[name]['whole']:7.1f} s in all   {found[name]['peak'] / 1e9:5.2f} GB at most "
              f"({found[name]['loaded'] / 1e9:.2f} GB once loaded)", flush=True)
    for other in ("published", "lean"):
        ratios = "   ".join(f"{what} {found['kit'][what] / found[other][what]:.2f} x"
                            for what in ("clock", "processor", "whole", "peak"))
        print(f"kit against {other:10} {ratios}   losses at most {apart(found['kit'], found[other]):.1e} apart")
    print("most of the memory between published and lean are gradients on weights that aren't trained")
    print(f"LoRA patch {lora_bytes() / 1e6:7.2f} MB on disk")


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far two sides' losses are apart at most, relative."""
    return max(abs(a - b) / b for a, b in zip(one["losses"], other["losses"], strict=True))


def emoji() -> None:
    """Whole fine-tunes on the bundled model, references and all; then its step beside the lean loop's."""
    pipe = fmn.load("emoji")
    for preset in ("paper", "balanced"):
        report = fmn.forget(pipe, "cat", preset=preset, seed=SEED).info["forgetting"]
        print(f"{preset:10} {report['seconds']:7.2f} s for {report['steps']} steps   "
              f"{report['patch_bytes'] / 1e6:.2f} MB patch, {report['peak_memory_bytes'] / 1e9:.2f} GB at most")
    lean()


def lean(rounds: int = 15, steps: int = 20) -> None:
    """Seconds of the processor a step, cross-attention alone, on the emoji model: the kit and the lean loop in turn.

    Another program on the machine only ever adds time, so what is compared are the shortest steps of many.
    """
    images, found = noise_images(REFERENCES, size=(64, 64)), {"lean": [], "kit": []}
    for _ in range(rounds):
        for name, run in {"lean": partial(straight, lean=True), "kit": kit}.items():
            pipe = fmn.load("emoji")
            found[name].append(timed(partial(run, pipe, images, steps)))
    shortest = {name: min(step for one in runs for step in one["processor"]) for name, runs in found.items()}
    middle = {name: statistics.median(min(one["processor"]) for one in runs) for name, runs in found.items()}
    for name in found:
        print(f"{name:10} {1e3 * shortest[name]:7.2f} ms at least for a step, {1e3 * middle[name]:.2f} ms in the "
              f"middle of {rounds} rounds")
    print(f"kit against lean: {shortest['kit'] / shortest['lean']:.3f} x at least, "
          f"{middle['kit'] / middle['lean']:.3f} x in the middle, losses at most "
          f"{apart(found['kit'][0], found['lean'][0]):.1e} apart")


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "emoji"
    {"sd15": compare, "emoji": emoji, "lean": lean}.get(what, lambda: one_side(what))()
