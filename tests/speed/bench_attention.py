"""What recording costs: processor seconds with and without it, as ratios from one run, and the memory kept.

All on one thread: with more, threads that wait for each other count as work, and vary more than recording costs.

    python tests/speed/bench_attention.py emoji    the bundled emoji pipeline, 20 steps with guidance
    python tests/speed/bench_attention.py sd15     a randomly initialised Stable Diffusion 1.5 U-Net in its full size,
                                                   32 x 32 latents, a step with guidance; some minutes
    python tests/speed/bench_attention.py memory   what 50 steps at 64 x 64 latents keep: means of two phrases

Each figure stands beside the limit it is to keep.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import supported  # noqa: F401
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from tiny import clip_text_encoder, clip_tokenizer, quiet, tiny_sd, tiny_vae

import fmn_nb as fmn
from fmn_nb.attention.recorder import record_attention

PROMPT, PHRASES = "a photo of a cat and a frog", ["cat", "frog"]
EVERYTHING, TWO_PHRASES = {}, {"phrases": PHRASES, "keep": "mean"}


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's U-Net in its full size; what stands around it is small and hardly takes time."""
    tokenizer = clip_tokenizer(77)
    return quiet(StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval(),
        tokenizer=tokenizer, text_encoder=clip_text_encoder(tokenizer, width=768), vae=tiny_vae(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False))


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of one run, which a busy machine disturbs less than the clock."""
    started = time.process_time()
    run()
    return time.process_time() - started


def speed(pipe: DiffusionPipeline, limits: dict[str, tuple[dict, float | None]], times: int,
          **arguments: object) -> None:
    """Compare recorded generations with plain ones.

    Args:
        limits: name -> what to record, and the ratio that is to hold (None where none is set).
        times: how often each is measured.
        arguments: of the pipeline.
    """
    def generation() -> None:
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments)

    def recorded(selection: dict) -> Callable[[], None]:
        def run() -> None:
            with record_attention(pipe, **selection) as attention:
                generation()
            assert all(attention.map(phrase).any() for phrase in PHRASES)
        return run

    generation()
    runs = {name: recorded(selection) for name, (selection, _) in limits.items()} | {"plain again": generation}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    plain = [seconds(generation)]
    for _ in range(times):
        for name, run in runs.items():  # each between two plain runs, so that a drift of the machine cancels out
            found = seconds(run)
            plain.append(seconds(generation))
            ratios[name].append(2 * found / sum(plain[-2:]))
    print(f"plain        {statistics.median(plain):8.3f} s of the processor")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        limit = limits[name][1] if name in limits else None
        verdict = "" if limit is None else against(middle, limit, "x")
        print(f"{name:12} {middle:8.3f} x   (half of {times} runs: {low:.3f} to {high:.3f})   {verdict}")


def against(value: float, limit: float, unit: str) -> str:
    return f"limit {limit:.2f} {unit}: {'holds' if value <= limit else 'DOES NOT HOLD'}"


def memory() -> None:
    """Kept bytes depend on layers, heads and pixels alone: a narrow U-Net with Stable Diffusion 1.5's stands for it."""
    pipe = tiny_sd(block_out_channels=(32, 32, 32, 32), layers_per_block=2, attention_head_dim=8,
                   down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                   up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    kept = []
    for steps in (1, 3):  # a running mean doesn't grow: what these keep, 50 steps keep
        with record_attention(pipe, **TWO_PHRASES) as attention:
            pipe(PROMPT, num_inference_steps=steps, height=128, width=128, output_type="latent")
        kept.append(attention.bytes)
    assert kept[0] == kept[1]
    finest = attention.grids[attention.layers[0]]
    print(f"{len(attention.layers)} layers of 8 heads, {finest[0]} x {finest[1]} at the finest, both branches: "
          f"{kept[0] / 1e6:.2f} MB after 1 step, {kept[1] / 1e6:.2f} MB after 3, so also after 50   "
          f"{against(kept[1] / 1e6, 5, 'MB')}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    what = sys.argv[1] if len(sys.argv) > 1 else "emoji"
    if what == "emoji":
        # the limit for two phrases is set on the full-size model: here each layer takes less than the way to it
        speed(quiet(fmn.load("emoji")), {"everything": (EVERYTHING, 1.3), "two phrases": (TWO_PHRASES, None)}, times=9,
              num_inference_steps=20)
    elif what == "sd15":
        speed(sd15(), {"everything": (EVERYTHING, 1.10), "two phrases": (TWO_PHRASES, 1.05)}, times=5,
              num_inference_steps=1, height=64, width=64, output_type="latent")
    else:
        memory()
