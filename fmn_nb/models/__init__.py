"""Diffusion pipelines: names, loading, one denoising step, images and latents, fingerprints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "denoising": ["Conditions", "Latents", "Noising", "NoisyBatch", "SeedOffset", "Stream", "borrowed", "conditions",
        "denoising_loss", "noisy_batch", "predict", "predict_noisy", "seeded", "spread_batch"],
    "device": ["Cost", "HALVES", "Memory", "MixedPrecision", "evaluating", "measured_cost", "without_gradients"],
    "digests": ["added_tokens", "base_of", "digest", "digest_of", "drawing_key", "fingerprint", "is_base", "model_name",
        "switches", "weights_checksum"],
    "images": ["FilteredImageError", "GUIDANCE", "Images", "LATENTS", "ReferenceImageError", "STEPS", "as_image",
        "encode", "generate", "generate_latents", "generate_trajectories",
        "image_change", "load_images", "load_masks", "pixel_size", "to_pixels"],
    "names": ["UnknownModelError", "bundled", "resolve"],
    "parameters": ["Kept", "ORIGINALS", "own_parameters", "plain_name", "unwrapped"],
    "pipelines": ["CALL_KEY", "ModelLoadError", "UnsupportedPipelineError", "denoiser", "denoiser_name", "load",
        "text_encoders", "tokenized_encoders", "tokenizers", "training_kind", "uncompiled", "without_bars"],
})
