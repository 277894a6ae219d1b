/* The page: its controls say what is wanted, and the latest wish is drawn. */
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const { data } = FMN;
  const PREVIEW_EVERY = 4, SIDE = 256;
  let wanted = null, running = null, drawn = null, before = null;

  /* ---- controls ---- */

  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  const fill = (id, choices) => at(id).replaceChildren(...choices.map(([value, text]) => option(value, text)));

  function offerWords() {
    const groups = () => data.things.map(([name, things]) => {
      const group = Object.assign(document.createElement("optgroup"), { label: name });
      group.append(...things.map(([label, phrase]) => option(phrase, label)));
      return group;
    });
    fill("opening", data.openings.map((text) => [text, text.replace("{}", "…")]));
    at("thing").replaceChildren(...groups(), option("", "none"));
    at("second").replaceChildren(option("", "none"), ...groups());
    fill("style", [["", "any"], ...data.styles.map((name) => [name, name])]);
    fill("background", [["", "any"], ...data.backgrounds.map((name) => [name, name])]);
    fill("patch", data.patches.map((patch, number) => [number, `${patch.name} (${patch.kind}, preset ${patch.preset})`]));
    at("guidance").textContent = data.guidance;
    at("steps").value = data.steps;
    at("made").textContent = data.made;
    const stops = data.colours.map(([red, green, blue]) => `rgb(${red} ${green} ${blue})`);
    document.querySelector(".colours").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  }

  /* A prompt that shows what the chosen patch forgets: the thing itself, or something in the style. */
  function suggestPrompt() {
    const { name, kind } = data.patches[at("patch").value];
    const things = data.things.flatMap(([, those]) => those);
    const own = things.find(([label]) => label === name);
    at("opening").value = data.openings[0];
    at("thing").value = own ? own[1] : things[0][1];
    at("second").value = "";
    at("style").value = kind === "style" && data.styles.includes(name) ? name : "";
    at("background").value = "";
    at("word").replaceChildren(); // what it forgets is looked at first
    writePrompt();
  }

  function writePrompt() {
    at("prompt").value = FMN.caption({ opening: at("opening").value, style: at("style").value,
      things: [at("thing").value, at("second").value], background: at("background").value });
  }

  const scale = () => Number(at("scale").value);

  function sayScale() {
    at("value").textContent = scale().toFixed(2);
    const words = scale() === 0 ? "knows" : scale() === 1 ? "forgotten" : "between knows and forgotten";
    at("scale").setAttribute("aria-valuetext", `${scale().toFixed(2)}, ${words}`);
  }

  /* ---- drawing ---- */

  function wish() {
    if (!at("form").reportValidity()) return;
    wanted = { prompt: at("prompt").value, seed: Number(at("seed").value), steps: Number(at("steps").value),
               patch: Number(at("patch").value), scale: scale() };
    running?.abort();
    if (!running) drawWanted();
  }

  async function drawWanted() {
    try {
      while (wanted) {
        running = new AbortController();
        const request = wanted;
        wanted = null;
        await drawBoth(request, running.signal);
      }
    } catch (error) {
      say(`Drawing failed: ${error.message}`);
    } finally {
      running = null;
    }
  }

  /* The picture at scale 0, unless it stands there already, and the one with the patch. */
  async function drawBoth(request, signal) {
    const key = JSON.stringify([request.prompt, request.seed, request.steps]);
    const started = performance.now();
    if (before?.key !== key) {
      const image = await draw({ ...request, scale: 0 }, "before", "the model as it is", signal);
      if (!image) return;
      before = { ...image, key };
      show("before", before, request, 0);
    }
    const image = request.scale === 0 ? before : await draw(request, "after", "with the patch", signal);
    if (!image) return;
    drawn = { ...image, request };
    const name = data.patches[request.patch].name;
    at("after-title").textContent = `With the patch for ${name}, scale ${request.scale.toFixed(2)}`;
    show("after", drawn, request, request.scale);
    offerTokens();
    showMap();
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(`Drawn in ${seconds} seconds, scale ${request.scale.toFixed(2)}. ${seen(drawn.verdict)}`);
  }

  async function draw(request, place, what, signal) {
    const onStep = (done, of, preview) => {
      at("progress").value = done / of;
      if (preview) at(place).src = pictureOf(preview);
    };
    say(`Drawing ${what} ...`);
    return FMN.draw(request, { onStep, previewEvery: PREVIEW_EVERY, signal });
  }

  const say = (text) => { at("status").textContent = text; };

  function seen({ label, share, style }) {
    const percent = `${(100 * share).toFixed(0)}%`;
    return label ? `The judge sees: ${label} (${percent} sure), in the style ${style}.`
      : `The judge sees nothing that it knows (at most ${percent} sure).`;
  }

  function show(place, image, request, at_scale) {
    at(place).src = pictureOf(image.pixels);
    at(place).alt = `Drawn for “${request.prompt}”, seed ${request.seed}, scale ${at_scale.toFixed(2)}. ` +
      seen(image.verdict);
    at(`${place}-words`).textContent = seen(image.verdict);
  }

  /* ---- pictures ---- */

  function canvasOf(pixels, height, width, channels = 3) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const colours = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < 3; c++) colours.data[4 * i + c] = pixels[channels * i + c];
      colours.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(colours, 0, 0);
    return canvas;
  }

  const pictureOf = (pixels) => canvasOf(pixels, data.imageSize, data.imageSize).toDataURL("image/png");

  /* The words that can be looked at: names of several words, then each word of the prompt once. */
  function offerTokens() {
    const { read } = drawn, names = data.things.flatMap(([, things]) => things.map(([label]) => label));
    const phrases = names.filter((name) => /\s/.test(name) && FMN.tokenizer.find(read, name).length);
    const words = read.words.filter((word) => word.whole).map((word) => word.text);
    const choices = [...new Set([...phrases, ...words])];
    const { name } = data.patches[drawn.request.patch];
    const first = [at("word").value, name.toLowerCase(), phrases[0], words.at(-1)].find((one) => choices.includes(one));
    fill("word", choices.map((one) => [one, one]));
    if (first) at("word").value = first;
    at("cut").hidden = !read.cutOff.length;
    at("cut").textContent = `The model reads the beginning only; cut off: ${read.cutOff.join(" ")}`;
  }

  function showMap() {
    const word = at("word").value, [, height, width] = data.latents;
    if (!word) {
      at("map").removeAttribute("src");
      at("map").alt = at("map-words").textContent = "The prompt has no words to look at.";
      return;
    }
    const values = FMN.map(drawn.attention, FMN.tokenizer.find(drawn.read, word));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const colours = [...values].flatMap((value) =>
      data.colours[Math.round((high > low ? (value - low) / (high - low) : 0) * (data.colours.length - 1))]);
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(canvasOf(drawn.pixels, data.imageSize, data.imageSize), 0, 0, SIDE, SIDE);
    pen.imageSmoothingEnabled = true;
    pen.globalAlpha = 0.6;
    pen.drawImage(canvasOf(colours, height, width), 0, 0, SIDE, SIDE);
    at("map").src = canvas.toDataURL("image/png");
    const words = FMN.describe(values, word);
    at("map").alt = `Attention map over the picture. ${words}`;
    at("map-words").textContent = words;
    [["low", low], ["high", high]].forEach(([id, share]) => { at(id).textContent = `${(100 * share).toFixed(1)}%`; });
  }

  /* ---- from here on it runs ---- */

  offerWords();
  suggestPrompt();
  sayScale();
  FMN.ready = FMN.load((number, of) => {
    at("progress").value = number / of;
    say(`Loading the model, part ${number} of ${of} ...`);
  });
  FMN.ready.then(() => {
    at("form").addEventListener("submit", (event) => { event.preventDefault(); wish(); });
    at("another").addEventListener("click", () => { at("seed").value = (Number(at("seed").value) + 1) % 2 ** 32; wish(); });
    for (const id of ["opening", "thing", "second", "style", "background"]) {
      at(id).addEventListener("change", () => { writePrompt(); wish(); });
    }
    for (const id of ["prompt", "seed", "steps"]) at(id).addEventListener("change", wish);
    at("patch").addEventListener("change", () => { suggestPrompt(); wish(); });
    at("scale").addEventListener("input", () => { sayScale(); wish(); });
    at("word").addEventListener("change", () => drawn && showMap());
    wish();
  }, (error) => say(`The model could not be loaded: ${error.message}`));
})();
