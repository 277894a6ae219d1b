"""The demo page in a headless Chromium: the kit's noise, tokens, steps and pictures in JavaScript, and its controls.

    pip install -c constraints.txt ".[test,browser,course]" && apt-get install chromium
    npm install --no-save onnxruntime-web@1.30.0 && pytest -m browser tests/course
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from typing import Any

import numpy as np
import pytest
import torch

from fmn_nb.attention.recorder import record_attention
from fmn_nb.concepts.tokens import PhraseNotFoundError, read_prompt
from fmn_nb.course.demo import RUNTIME
from fmn_nb.emoji.world import caption
from fmn_nb.models.images import generate
from fmn_nb.plots.attention import describe

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
LEVELS = 2  # of 255: the largest difference of a pixel between browser and Python, after 20 steps
SHARE = 1e-4  # of attention: the largest difference of a map's value
SECONDS = 15  # of processor time at most, for an image of 20 steps
LOADED = 180_000  # milliseconds at most
PROMPT, SEED = "a photo of a cat in the style of noto", 5
STATUS = "document.getElementById('status').textContent"
TEXTS = ["", "a photo of a cat", "A PHOTO of  a\tCat", "a birthday cake and an alarm clock in noto style",
         "Milo the cat", "the cat's 2026 eyes, aren't they?!", "Élan – naïve 猫 🐱 ﬁne", "two <|endoftext|> texts",
         "<|EndOfText|>'ll", "a cat and " * 20]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install '.[browser]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield opened
        opened.close()


def open_page(browser: Any, address: str) -> Any:
    """The page after its first picture; it remembers its requests and the scripts' errors."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.errors, page.requests = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    page.wait_for_function(f"/Drawn|failed|could not/.test({STATUS})", timeout=LOADED)
    assert page.inner_text("#status").startswith("Drawn"), page.inner_text("#status")
    return page


@pytest.fixture(scope="module")
def page(browser, demo):
    """The page as a file, without a server."""
    if not demo.can_run:
        pytest.skip(f"no onnxruntime-web here: npm install --no-save onnxruntime-web@{RUNTIME}")
    opened = open_page(browser, (demo.folder / "index.html").as_uri())
    yield opened
    opened.close()


def test_a_seed_gives_the_noise_that_torch_gives(page):
    for seed in (0, 5, 2**32 - 1):
        own = torch.randn(2048, generator=torch.Generator().manual_seed(seed)).numpy()
        noise = page.evaluate("seed => [...FMN.noise(seed, 2048)]", seed)
        assert np.abs(np.array(noise) - own).max() < 1e-5


def test_texts_are_read_as_the_tokenizer_reads_them(page, emoji):
    for text in TEXTS:
        own = emoji.tokenizer(text, padding="max_length", truncation=True).input_ids
        assert page.evaluate("text => [...FMN.tokenizer.read(text).ids]", text) == own, text
    for text, word in [("a cat and a cat", "cat"), ("a birthday cake", "Birthday Cake"), ("two cats", "cat"),
                       ("Milo the cat", "Milo"), ("a cat and " * 20, "cat")]:
        try:
            own = list(read_prompt(emoji.tokenizer, text).find(word).columns)
        except PhraseNotFoundError:
            own = []
        found = page.evaluate("([text, word]) => FMN.tokenizer.find(FMN.tokenizer.read(text), word)", [text, word])
        assert found == own, (text, word)


def test_prompts_are_worded_as_the_model_learned_them(page, demo):
    things = {label: phrase for _, those in demo.data["things"] for label, phrase in those}
    for names, style, background in [(["cat"], None, None), (["umbrella", "Milo"], "noto", "blue"),
                                     (["computer mouse"], None, "gray")]:
        for opening in demo.data["openings"]:
            wish = {"opening": opening, "things": [things[name] for name in names], "style": style or "",
                    "background": background or ""}
            assert page.evaluate("wish => FMN.caption(wish)", wish) == caption(names, style, background, opening)
    empty = {"opening": "a photo of {}", "things": [""], "style": "noto", "background": ""}
    assert page.evaluate("wish => FMN.caption(wish)", empty) == "a photo in the style of noto"


@pytest.mark.parametrize("steps", [2, 6, 20, 37])
def test_the_sampler_steps_as_diffusers_does(page, emoji, steps):
    scheduler = type(emoji.scheduler).from_config(emoji.scheduler.config)
    scheduler.set_timesteps(steps)
    start, noises = torch.linspace(-2, 2, 16), torch.linspace(-1, 1, 16 * steps).sin().reshape(steps, 16)
    latents = start
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        latents = scheduler.step(noise, timestep, latents).prev_sample
    timesteps, found = page.evaluate("""([noises, start]) => {
        const sampler = new FMN.Sampler(FMN.data.alphas, noises.length);
        return [sampler.timesteps, [...noises.reduce((x, noise) => sampler.step(noise, x), Float32Array.from(start))]];
    }""", [noises.tolist(), start.tolist()])
    assert timesteps == scheduler.timesteps.tolist()
    assert np.abs(np.array(found) - latents.numpy()).max() < 1e-4 * float(latents.abs().max())


@pytest.mark.parametrize("number", [0, 1], ids=["weights", "lora"])
def test_the_same_seed_gives_the_picture_and_the_map_of_python(page, demo, emoji, world, number):
    ends = []
    for scale in (0.0, 1.0):
        found = page.evaluate("""async request => {
            const image = await FMN.draw(request);
            const map = FMN.map(image.attention, FMN.tokenizer.find(image.read, "cat"));
            return {pixels: [...image.pixels], map: [...map], words: FMN.describe(map, "cat"), verdict: image.verdict};
        }""", {"prompt": PROMPT, "seed": SEED, "steps": 20, "patch": number, "scale": scale})
        with demo.patches[number].applied(emoji, scale=scale), record_attention(emoji, branch="cond") as record:
            image = generate(emoji, [PROMPT], [SEED], steps=20)[0]
        own, pixels = np.asarray(image).astype(int), np.array(found["pixels"]).reshape(image.height, image.width, 3)
        assert np.abs(pixels - own).max() <= LEVELS and np.abs(pixels - own).mean() < 0.05
        assert np.abs(np.array(found["map"]).reshape(16, 16) - record.map("cat")).max() < SHARE
        assert found["words"] == describe(record.map("cat"), "cat")
        (verdict,) = world.judge.verdicts([image])
        label = found["verdict"]["label"] or "nothing"
        assert (label, found["verdict"]["style"]) == (verdict.label, verdict.style)
        assert found["verdict"]["share"] == pytest.approx(verdict.probability, abs=0.01)
        ends.append((pixels, own))
    (knows, own_knows), (forgotten, own_forgotten) = ends
    moved, own_moved = np.abs(knows - forgotten).mean(), np.abs(own_knows - own_forgotten).mean()
    assert own_moved > 5 and moved == pytest.approx(own_moved, rel=0.01)


def test_an_image_takes_seconds(page, browser):
    """Of processor time, which other work on the machine does not change."""
    session = browser.new_browser_cdp_session()

    def seconds() -> float:
        return sum(one["cpuTime"] for one in session.send("SystemInfo.getProcessInfo")["processInfo"])

    before = seconds()
    page.evaluate("async request => { await FMN.draw(request); }",
                  {"prompt": PROMPT, "seed": SEED, "steps": 20, "patch": 1, "scale": 0.5})
    assert 0 < seconds() - before < SECONDS


def test_the_given_noise_takes_the_place_of_the_seeds(page):
    pictures = page.evaluate("""async request => {
        const noise = FMN.noise(1, 2048), drawn = [];
        for (const one of [{seed: 1}, {seed: 2, noise}, {seed: 2}]) {
            drawn.push([...(await FMN.draw({...request, ...one})).pixels]);
        }
        return drawn;
    }""", {"prompt": PROMPT, "steps": 2, "patch": 0, "scale": 0})
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_page_is_used_by_keyboard_and_says_what_it_shows(page):
    page.locator("#steps").fill("3")
    page.locator("#prompt").fill("a photo of a birthday cake and a cat")
    page.locator("#prompt").press("Enter")
    page.wait_for_function("document.getElementById('before').alt.includes('birthday cake')", timeout=LOADED)
    page.wait_for_function(f"{STATUS}.startsWith('Drawn')", timeout=LOADED)
    pictures = [page.locator("#after").get_attribute("src")]
    assert pictures[0] == page.locator("#before").get_attribute("src"), "at scale 0 both are one"
    page.locator("#patch").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "scale"
    for key, scale, words in [("End", "1.00", "forgotten"), ("ArrowLeft", "0.95", "between knows and forgotten"),
                              ("Home", "0.00", "knows")]:
        page.keyboard.press(key)
        page.wait_for_function(f"{STATUS}.includes('scale {scale}.')", timeout=LOADED)
        assert page.locator("#scale").get_attribute("aria-valuetext") == f"{scale}, {words}"
        assert f"scale {scale}. The judge sees" in page.locator("#after").get_attribute("alt")
        pictures.append(page.locator("#after").get_attribute("src"))
    assert pictures[0] == pictures[3] and len(set(pictures)) == 3
    offered = page.locator("#word option").all_inner_texts()
    assert offered == ["birthday cake", "a", "photo", "of", "birthday", "cake", "and", "cat"]
    maps = set()
    for word in ("cat", "birthday cake"):
        page.locator("#word").select_option(word)
        assert f"'{word}' gets" in page.locator("#map").get_attribute("alt") == \
            f"Attention map over the picture. {page.inner_text('#map-words')}"
        maps.add(page.locator("#map").get_attribute("src"))
    assert len(maps) == 2
    unnamed = page.evaluate("[...document.querySelectorAll('select, input')].filter(one => !one.labels.length).length")
    assert unnamed == 0 and page.locator("img:not([alt]), img[alt='']").count() == 0
    assert not page.errors


def test_wrong_numbers_are_told_and_not_drawn(page):
    before = page.locator("#before").get_attribute("src")
    page.locator("#steps").fill("0")
    page.locator("#draw").click()
    assert page.evaluate("document.getElementById('steps').validity.rangeUnderflow")
    page.wait_for_timeout(500)
    assert page.locator("#before").get_attribute("src") == before
    page.locator("#steps").fill("3")


def test_nothing_is_asked_of_another_host_and_it_fits_a_phone_in_the_dark(page, demo):
    assert len(page.requests) > 10
    own = demo.folder.as_uri()
    assert not [one for one in page.requests if not one.startswith((own, "blob:null/", "data:"))]
    page.set_viewport_size({"width": 360, "height": 740})
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_it_works_from_a_server_too(browser, demo, page):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Silent, directory=str(demo.folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        other = open_page(browser, address + "index.html")
        assert not [one for one in other.requests if not one.startswith((address, f"blob:{address}", "data:"))]
        assert not other.errors
        other.close()
    finally:
        server.shutdown()
        server.server_close()
