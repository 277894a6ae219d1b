"""What the kit costs on models of the real checkpoints' sizes, with random weights: seconds a step and peak memory.

    python tests/speed/bench_checkpoints.py [sd15|sd21|sdxl|flux-small] [--size PIXELS] [--steps N]

On a GPU each model runs in bfloat16 at its own size; on a CPU in float32 at 256 pixels, and Stable Diffusion 1.5 alone
where no model is named. Flux is cut to fewer blocks of the full width. Each model is drawn, drawn while its attention
is recorded (means of two phrases), taught to forget with a LoRA (gradient checkpointing, the other parts waiting on the
CPU), saved, and drawn with the patch; the patch must take nothing away from the model and leave nothing behind.

`--precisions` compares patches instead: forgotten in bfloat16 and in float32, do both change the prediction for the
concept in the same direction (the cosine of the two changes), and how much stays as it was without it?
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import supported  # noqa: F401
import torch
from diffusers import DiffusionPipeline
from full_size import FULL_SIZE
from snapshots import noise_images

import fmn_nb as fmn
from fmn_nb.attention import record_attention
from fmn_nb.models import denoiser, generate, weights_checksum
from fmn_nb.patches import Patch

PROMPT, CONCEPT, PHRASES = "a photo of a cat and a frog", "cat", ("cat", "frog")
CPU_PIXELS, SEED = 256, 0
GIGA = 1e9


@dataclass
class Costs:
    """What a model's stages took, each [seconds a step, peak bytes]."""

    model: str
    device: str
    pixels: int
    parameters: int
    stages: dict[str, tuple[float, int]] = field(default_factory=dict)

    def table(self) -> str:
        """A Markdown table of the stages."""
        head = (f"{self.model}, {self.parameters / GIGA:.2f} billion weights in the denoiser, {self.pixels} x "
                f"{self.pixels} pixels, {self.device}\n\n| stage | seconds a step | GB at most |\n|---|---|---|\n")
        return head + "\n".join(f"| {name} | {seconds:.2f} | {peak / GIGA:.1f} |"
                                for name, (seconds, peak) in self.stages.items())


def peak_bytes(reset: bool = False) -> int:
    """The most memory in use so far: of the GPU, or of the process, where it can't be reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(costs: Costs, stage: str, steps: int, run: Callable[[], object]) -> object:
    """Run a stage and note its seconds a step and the memory's peak."""
    peak_bytes(reset=True)
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    costs.stages[stage] = ((time.perf_counter() - started) / steps, peak_bytes())
    return result


def built(name: str) -> DiffusionPipeline:
    """The pipeline where it is to run: in half precision on a GPU."""
    pipe = FULL_SIZE[name][0]()
    return pipe.to("cuda", torch.bfloat16) if torch.cuda.is_available() else pipe


def forget(pipe: DiffusionPipeline, pixels: int, steps: int, **settings: object) -> Patch:
    """A few steps of re-steering on a LoRA, on images of noise; fast enough for the patch to show in the image."""
    return fmn.forget(pipe, CONCEPT, references=noise_images(4, size=(pixels, pixels)), preset="paper", train="lora",
                      steps=steps, batch_size=1, height=pixels, width=pixels, gradient_checkpointing=True, seed=SEED,
                      retain_count=0, learning_rate=1e-2, **settings)


def costs_of(name: str, pixels: int, steps: int) -> Costs:
    """Draw, record, forget, patch and draw again."""
    pipe = built(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    costs = Costs(name, device, pixels, sum(p.numel() for p in denoiser(pipe).parameters()))
    before = weights_checksum(pipe)

    def draw(count: int = steps) -> list:
        return generate(pipe, [PROMPT], [SEED], steps=count, height=pixels, width=pixels)

    def record() -> None:
        with record_attention(pipe, phrases=PHRASES, keep="mean"):
            draw()

    draw(1)  # memory is taken and kernels are chosen in the first step, which is no measure of the others
    plain = measured(costs, "draw", steps, draw)
    measured(costs, "draw, recorded", steps, record)
    patch = measured(costs, "forget (LoRA)", steps, lambda: forget(pipe, pixels, steps, offload="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        patch = Patch.load(patch.save(Path(folder) / "patch"))
    with patch.applied(pipe):
        changed = measured(costs, "draw, patched", steps, draw)
    assert plain[0].tobytes() != changed[0].tobytes(), "the patch changes nothing"
    assert weights_checksum(pipe) == before, "the patch left something behind"
    return costs


def agreement(name: str, pixels: int, steps: int) -> str:
    """How alike patches made in bfloat16 and float32 are: the cosine of the two changes of all weights, and their
    lengths."""
    changes = []
    for precision in ("bf16", "no"):
        pipe = FULL_SIZE[name][0]()
        pipe = pipe.to("cuda") if torch.cuda.is_available() else pipe
        patch = forget(pipe, pixels, steps, precision=precision)
        difference = dict(patch.differences())
        changes.append(torch.cat([difference[key].flatten().float().cpu() for key in sorted(difference)]))
        del pipe
    cosine = torch.nn.functional.cosine_similarity(*changes, dim=0).item()
    return (f"{name}: cosine of the changes {cosine:.3f}, length in bfloat16 {changes[0].norm():.4g}, in float32 "
            f"{changes[1].norm():.4g}")


def main() -> None:
    """Read the command line and print a table for each model."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("models", nargs="*", choices=[*FULL_SIZE, []], help="all on a GPU, sd15 on a CPU")
    reader.add_argument("--size", type=int, help="pixels a side; on a GPU the model's own, on a CPU 256")
    reader.add_argument("--steps", type=int, default=4)
    reader.add_argument("--precisions", action="store_true")
    asked = reader.parse_args()
    on_gpu = torch.cuda.is_available()
    for name in asked.models or (FULL_SIZE if on_gpu else ["sd15"]):
        pixels = asked.size or (FULL_SIZE[name][1] if on_gpu else CPU_PIXELS)
        done = agreement(name, pixels, asked.steps) if asked.precisions else costs_of(name, pixels, asked.steps).table()
        print(done + "\n", flush=True)


if __name__ == "__main__":
    main()
