"""What recording costs: processor seconds with and without it, as ratios from one run, and the memory kept.

All on one thread: with more, threads that wait for each other count as work, and vary more than recording costs.

    python tests/bench_attention.py emoji      a U-Net of the emoji model's size, 20 steps with guidance
    python tests/bench_attention.py sd15       a randomly initialised Stable Diffusion 1.5 U-Net, 32 x 32 latents
    python tests/bench_attention.py memory     what any number of steps at 64 x 64 latents keeps: means of two phrases
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_sd

from fmn_nb.attention import record_attention


def emoji_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(32, 64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8).eval()


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()


def seconds(run: Callable[[], None]) -> float:
    """Processor seconds of one run, which a busy machine disturbs less than the clock."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def speed(unet: UNet2DConditionModel, side: int, tokens: int, steps: int, times: int) -> None:
    width = unet.config.cross_attention_dim
    latents, text = torch.randn(2, unet.config.in_channels, side, side), torch.randn(2, tokens, width)

    def generation() -> None:
        for step in range(steps):
            unet(latents, 1000 - step, encoder_hidden_states=text)

    def recorded(**selection: object) -> Callable[[], None]:
        def run() -> None:
            with record_attention(unet, **selection):
                generation()
        return run

    generation()
    runs = {"everything": recorded(), "two columns": recorded(columns=[2, 5]), "plain again": generation}
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
        print(f"{name:12} {middle:8.3f} x   (half of {times} runs: {low:.3f} to {high:.3f})")


def memory() -> None:
    """Kept bytes depend on layers, heads and pixels alone: a narrow U-Net with Stable Diffusion 1.5's stands for it."""
    pipe = tiny_sd(block_out_channels=(32, 32, 32, 32), layers_per_block=2, attention_head_dim=8,
                   down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                   up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    kept = []
    for steps in (1, 3):  # a running mean doesn't grow: what these keep, 50 steps keep
        with record_attention(pipe, phrases=["photo", "cat"], keep="mean") as attention:
            pipe("a photo of a cat", num_inference_steps=steps, height=128, width=128, output_type="latent")
        kept.append(attention.bytes)
    finest = attention.grids[attention.layers[0]]
    print(f"{len(attention.layers)} layers of 8 heads, {finest[0]} x {finest[1]} at the finest, both branches: "
          f"{kept[0] / 1e6:.2f} MB after 1 step, {kept[1] / 1e6:.2f} MB after 3")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    what = sys.argv[1] if len(sys.argv) > 1 else "emoji"
    if what == "emoji":
        speed(emoji_unet(), 16, 32, steps=20, times=9)
    elif what == "sd15":
        speed(sd15_unet(), 32, 77, steps=1, times=9)
    else:
        memory()
