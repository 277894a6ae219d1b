/* DPM-Solver++ (2M) (Lu et al., arXiv 2211.01095) as diffusers' DPMSolverMultistepScheduler runs it with order 2,
   "midpoint", "linspace" timesteps, predicted noise and a last sigma of 0. */
"use strict";
globalThis.FMN = globalThis.FMN || {};

FMN.Sampler = class {
  /* alphas: the cumulative products of 1 - beta at each timestep of training. */
  constructor(alphas, steps) {
    const last = alphas.length - 1;
    this.timesteps = Array.from({ length: steps }, (_, i) => FMN.roundHalfEven(((steps - i) * last) / steps));
    this.sigmas = [...this.timesteps.map((t) => Math.sqrt((1 - alphas[t]) / alphas[t])), 0];
    this.number = 0;
    this.denoised = null; // what the image's latents would be if the last prediction were right
  }

  /* The latents after the next step, from the predicted noise and the latents before it, all Float32Array. */
  step(noise, latents) {
    const i = this.number++, before = this.denoised;
    const [now, next] = [FMN.atSigma(this.sigmas[i]), FMN.atSigma(this.sigmas[i + 1])];
    this.denoised = latents.map((x, n) => (x - now.sigma * noise[n]) / now.alpha);
    const h = next.lambda - now.lambda; // infinite at the last step
    const keep = next.sigma / now.sigma, gain = next.alpha * (1 - Math.exp(-h));
    if (before === null || i === this.timesteps.length - 1) {
      return latents.map((x, n) => keep * x + gain * this.denoised[n]);
    }
    const ratio = (now.lambda - FMN.atSigma(this.sigmas[i - 1]).lambda) / h;
    return latents.map((x, n) => {
      const slope = (this.denoised[n] - before[n]) / ratio;
      return keep * x + gain * this.denoised[n] + 0.5 * gain * slope;
    });
  }
};

/* x_t = alpha x_0 + sigma n, where the scheduler's sigma is the share of noise to image. */
FMN.atSigma = function (share) {
  const alpha = 1 / Math.sqrt(share ** 2 + 1);
  return { alpha, sigma: share * alpha, lambda: -Math.log(share) };
};

/* As numpy rounds. */
FMN.roundHalfEven = function (value) {
  const down = Math.floor(value);
  return value - down === 0.5 ? down + (down % 2) : Math.round(value);
};
