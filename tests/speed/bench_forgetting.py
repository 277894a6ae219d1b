"""What forgetting costs: seconds a step and peak memory against the published algorithm, and bytes of a patch.

    export PYTHONPATH=tests/support
    python tests/speed/bench_forgetting.py sd15 [STEPS]   a randomly initialised Stable Diffusion 1.5, 256 x 256 pixels,
                                                          batch 1, 10 references, cross-attention only: the kit
                                                          against the published algorithm
    python tests/speed/bench_forgetting.py emoji          35 steps of each preset on the emoji model

Both sides of `sd15` run in a process of their own, one after the other, on the same data: their losses agree. Times are
medians over the steps, by the clock and of the processor; the latter are hardly disturbed by what else a machine does.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from published import published_forget_me_not
from snapshots import noise_images
from tiny import clip_tokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CLIPTextConfig, CLIPTextModel

import fmn_nb as fmn
from fmn_nb.models.denoising import Stream, seeded

SIZE, REFERENCES, SEED = 256, 10, 0
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 6


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's parts in their full size, with random weights and a small vocabulary of words."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(77)
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kit(pipe: StableDiffusionPipeline, images: list) -> list[float]:
    patch = fmn.forget(pipe, "cat", references=images, preset="paper", train="cross_attention", seed=SEED, steps=STEPS,
                       height=SIZE, width=SIZE, offload="disk")
    return patch.info["forgetting"]["losses"]


def published(pipe: StableDiffusionPipeline, images: list) -> list[float]:
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    return published_forget_me_not(pipe, images, "a photo of cat", cat, seeded(SEED, Stream.FORGET), STEPS,
                                   cross_attention_only=True)


def one_side(name: str) -> None:
    """Run one side in this process and print what it cost, as JSON."""
    pipe, images, ends = sd15(), noise_images(REFERENCES, size=(SIZE, SIZE)), []
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    register_optimizer_step_post_hook(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    losses = {"kit": kit, "published": published}[name](pipe, images)
    clock, processor = (statistics.median(later - earlier for earlier, later in zip(times, times[1:], strict=False))
                        for times in zip(*ends, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"clock": clock, "processor": processor, "peak": peak, "loaded": loaded, "losses": losses}))


def lora_bytes() -> int:
    """The bytes on disk of a saved LoRA patch of the preset's own rank."""
    pipe = sd15()
    patch = fmn.forget(pipe, "cat", references=noise_images(1, size=(64, 64)), preset="balanced", steps=1, batch_size=1,
                       retain_batch=1, retain_count=0, retain_prompts=["a dog"], height=64, width=64, train="lora")
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in patch.save(Path(folder) / "patch").iterdir())


def compare() -> None:
    """Both sides, and their ratios."""
    found = {}
    for name in ("published", "kit"):
        result = subprocess.run([sys.executable, __file__, name, str(STEPS)], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stderr)
        found[name] = json.loads(result.stdout.splitlines()[-1])
        print(f"{name:10} {found[name]['clock']:7.2f} s a step ({found[name]['processor']:.2f} s of the processor)   "
              f"{found[name]['peak'] / 1e9:5.2f} GB at most ({found[name]['loaded'] / 1e9:.2f} GB once loaded)",
              flush=True)
    ours, theirs = found["kit"], found["published"]
    apart = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    ratios = {what: ours[what] / theirs[what] for what in ("clock", "processor", "peak")}
    print("ratio   " + "".join(f"   {what} {ratio:.2f} x" for what, ratio in ratios.items()))
    print(f"losses     at most {apart:.1e} apart, relative")
    print(f"LoRA patch {lora_bytes() / 1e6:7.2f} MB on disk")


def emoji() -> None:
    """Whole fine-tunes on the bundled model, references and all."""
    pipe = fmn.load("emoji")
    for preset in ("paper", "balanced"):
        report = fmn.forget(pipe, "cat", preset=preset, seed=SEED).info["forgetting"]
        print(f"{preset:10} {report['seconds']:7.2f} s for {report['steps']} steps   "
              f"{report['patch_bytes'] / 1e6:.2f} MB patch, {report['peak_memory_bytes'] / 1e9:.2f} GB at most")


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "emoji"
    {"sd15": compare, "emoji": emoji}.get(what, lambda: one_side(what))()
