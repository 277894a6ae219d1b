/* The emoji model: loads its networks, changes weights by a patch, draws an image with its attention maps, judges it. */
"use strict";
globalThis.FMN = globalThis.FMN || {};

FMN.networks = ["text_encoder", "denoiser", "decoder", "judge"];
FMN._payloads = {};
FMN._sessions = {};

/* What the files in payload/ call: `text` is gzip as base64, so that they can be loaded without a server. */
FMN.payload = (name, text) => { FMN._payloads[name] = text; };

/* Load everything; onPart(number, of, name) before each part. Raises an Error that says what the browser lacks. */
FMN.load = async function (onPart = () => {}) {
  if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
    throw new Error("this browser has no WebAssembly or no DecompressionStream; take one from 2023 or later");
  }
  const parts = ["runtime_script", "runtime", "tensors", ...FMN.networks];
  const load = async (name) => {
    onPart(parts.indexOf(name) + 1, parts.length, name);
    return FMN._unpacked(name);
  };
  const script = new Blob([await load("runtime_script")], { type: "text/javascript" });
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(script) };
  ort.env.wasm.wasmBinary = (await load("runtime")).buffer;
  ort.env.wasm.numThreads = 1; // more need headers that only a server can send
  FMN._tensors = new Float32Array((await load("tensors")).buffer);
  FMN.tokenizer = new FMN.Tokenizer(FMN.data.tokenizer);
  for (const name of FMN.networks) {
    FMN._sessions[name] = await ort.InferenceSession.create(await load(name), { executionProviders: ["wasm"] });
  }
};

FMN._unpacked = async function (name) {
  await new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = `payload/${name}.js`;
    script.onload = done;
    script.onerror = () => failed(new Error(`${script.src} is missing; write the page again`));
    document.head.append(script);
  });
  const bytes = Uint8Array.from(atob(FMN._payloads[name]), (letter) => letter.charCodeAt(0));
  delete FMN._payloads[name];
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

/* ---- the patch: W' = W + scale * D, with D = B A where it is a LoRA ---- */

FMN._tensor = ({ at, shape }) => FMN._tensors.subarray(at, at + shape.reduce((one, other) => one * other, 1));

/* D of one weight, Float32Array; up [out, rank] and down [rank, in] are multiplied. */
FMN.difference = function (change) {
  if (change.full) return FMN._tensor(change.full);
  const [up, down] = [FMN._tensor(change.up), FMN._tensor(change.down)];
  const [rows, rank] = change.up.shape, columns = change.down.shape[1];
  const product = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      let sum = 0;
      for (let i = 0; i < rank; i++) sum += up[row * rank + i] * down[i * columns + column];
      product[row * columns + column] = sum;
    }
  }
  return product;
};

/* Name -> the weight under patch number `patch` at a scale, for every weight that some patch changes. */
FMN.weights = function (patch, scale) {
  const changes = FMN.data.patches[patch].changes, weights = {};
  for (const [name, place] of Object.entries(FMN.data.weights)) {
    const own = FMN._tensor(place);
    if (name in changes && scale !== 0) {
      const difference = (changes[name].kept ??= FMN.difference(changes[name])), factor = Math.fround(scale);
      weights[name] = own.map((value, i) => value + Math.fround(factor * difference[i]));
    } else {
      weights[name] = own;
    }
    weights[name] = new ort.Tensor("float32", weights[name], place.shape);
  }
  return weights;
};

/* ---- drawing ---- */

/* Draw one image.

   request: prompt, seed, steps, patch (its number), scale; noise (Float32Array) in place of the seed's.
   onStep(done, of, preview): after each step; every `previewEvery` steps with what the image would be, as pixels.
   signal: an AbortSignal; null comes back where it was aborted.

   Gives pixels [height * width * 3] of 0 to 255; attention [columns, height, width] of the latents, mean over steps;
   what the tokenizer read; the judge's verdict; and the latents. */
FMN.draw = async function (request, { onStep = () => {}, previewEvery = 0, signal = null } = {}) {
  const { data } = FMN, read = FMN.tokenizer.read(request.prompt);
  const ids = [...FMN.tokenizer.read("").ids, ...read.ids]; // the branch without the prompt first
  const { text } = await FMN._run("text_encoder", { ids: new ort.Tensor("int32", ids, [2, read.ids.length]) });
  const weights = FMN.weights(request.patch, request.scale);
  const sampler = new FMN.Sampler(data.alphas, request.steps);
  const size = data.latents.reduce((one, other) => one * other, 1);
  let latents = request.noise ?? FMN.noise(request.seed, size), attention = null;
  for (const timestep of sampler.timesteps) {
    const step = await FMN._run("denoiser", {
      ...weights, text, latents: FMN._latents(latents), timestep: new ort.Tensor("float32", [timestep], []) });
    const [without, given] = [step.noise.data.subarray(0, size), step.noise.data.subarray(size)];
    latents = sampler.step(without.map((value, i) => value + data.guidance * (given[i] - value)), latents);
    const shares = step.attention.data.map((share) => share / request.steps);
    attention = attention ? attention.map((sum, i) => sum + shares[i]) : shares;
    const preview = previewEvery && sampler.number % previewEvery === 0 && sampler.number < request.steps;
    onStep(sampler.number, request.steps, preview ? await FMN._decoded(sampler.denoised) : null);
    await new Promise((next) => setTimeout(next)); // the page answers between two steps
    if (signal?.aborted) return null;
  }
  const pixels = await FMN._decoded(latents);
  return { pixels, attention, read, latents, verdict: await FMN._judged(pixels) };
};

FMN._run = (name, inputs) => FMN._sessions[name].run(inputs);

FMN._latents = (values) => new ort.Tensor("float32", values, [1, ...FMN.data.latents]);

FMN._decoded = async (latents) => (await FMN._run("decoder", { latents: FMN._latents(latents) })).pixels.data;

/* What the judge sees: label (null where it is sure of none), its share, and style. */
FMN._judged = async function (pixels) {
  const size = FMN.data.imageSize;
  const found = await FMN._run("judge", { pixels: new ort.Tensor("uint8", pixels, [size, size, 3]) });
  const [labels, styles] = [found.labels.data, found.styles.data];
  const highest = (values) => values.indexOf(Math.max(...values));
  const label = highest(labels);
  return { label: labels[label] > 0.5 ? FMN.data.judge.labels[label] : null, share: labels[label],
           style: FMN.data.judge.styles[highest(styles)] };
};

/* The map of some text columns, Float32Array [height * width]: the sum of their shares. */
FMN.map = function (attention, columns) {
  const [, height, width] = FMN.data.latents, values = new Float32Array(height * width);
  for (const column of columns) {
    for (let i = 0; i < values.length; i++) values[i] += attention[column * values.length + i];
  }
  return values;
};

/* A sentence on a map, as the kit's `describe` says it. */
FMN.describe = function (values, name) {
  const [, height, width] = FMN.data.latents;
  const peak = values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
  const sum = values.reduce((one, other) => one + other, 0);
  if (!(values[peak] > 0)) return `'${name}' gets no attention anywhere.`;
  const most = [...values].sort((one, other) => other - one).slice(0, Math.max(1, Math.round(values.length / 10)));
  const top = most.reduce((one, other) => one + other, 0) / sum;
  const third = (at, length) => Math.floor(((at + 0.5) / length) * 3);
  const [down, across] = [third(Math.floor(peak / width), height), third(peak % width, width)];
  const place = down === 1 && across === 1 ? "centre" : `${FMN.data.down[down]} ${FMN.data.across[across]}`;
  const percent = (share, digits) => `${(100 * share).toFixed(digits)}%`;
  return `'${name}' gets ${percent(sum / values.length, 1)} of the attention on average and ` +
    `${percent(values[peak], 1)} at its peak, at the ${place}; the tenth of the image that looks at it most holds ` +
    `${percent(top, 0)} of it.`;
};

/* ---- the prompt ---- */

/* The caption of things, a style and a background, as the kit's `caption` writes it; each part may be empty. */
FMN.caption = function ({ opening, things, style, background }) {
  const named = things.filter(Boolean).join(" and ");
  const parts = [opening.replace("{}", named).replace(/ of $/, "").trim()];
  if (style) parts.push(`in the style of ${style}`);
  if (background) parts.push(`on a ${background} background`);
  return parts.filter(Boolean).join(" ");
};
