"""The playground: its networks are the library's, and the page computes what the library computes.

Networks need onnx and onnxruntime (the extra `dev`); the page needs npm, playwright and a Chromium.
Without them tests are skipped and say why. Runs of two steps stand for those of two hundred.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx", reason="onnx is missing: pip install -e '.[dev]'")

from studies.playground import build, noise
from studies.playground.models import models, tuned
from sude_lab.classify.implicit import spread_times, step_weights
from sude_lab.diffusion import add_noise, to_x_0
from sude_lab.errors import UserError
from sude_lab.io.opening import open_backbone
from sude_lab.losses import output_weight
from sude_lab.sude import sude_terms
from sude_lab.view.thresholds import sude_move
from sude_lab.world.drawing import CATEGORIES

WAIT = 300_000  # milliseconds, on a busy machine
DRAWN = """const [model, prompt, ...how] = a;
    let last;
    for await (const step of m.sample(model, (name) => `${name}: ${prompt}`, ...how)) last = step;
    return [[...last.latents], [...(await m.decode(last.latents)).data]]"""
"""Latents and pixels of a model, a prompt, a seed and a guidance."""
CLASS, SUBJECT = "photo of a running dog", "photo of a running {S*} dog"
MODEL = "sude-2"


@pytest.fixture(scope="module")
def base() -> Any:
    return open_backbone(device="cpu")


@pytest.fixture(scope="module")
def runs(base: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return tuned(tmp_path_factory.mktemp("runs"), base, steps=2)


@pytest.fixture(scope="module")
def built(base: Any, runs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page; without npm it lacks what runs it."""
    out = tmp_path_factory.mktemp("playground")
    try:
        build.build(out, base, runs)
    except UserError as error:
        assert "npm" in str(error)
    return out


@pytest.fixture(scope="module")
def kept(base: Any, runs: list[Any], built: Path) -> Callable[[str], Any]:
    """The model of a name as the page has it: words of the run, weights unpacked."""

    def of(name: str) -> Any:
        run = next(run for model, run in runs if model.name == name)
        backbone = run.load(backbone=base.copy())
        packed = (built / f"{name}.bin").read_bytes()
        backbone.unet.load_state_dict(build.unpack(packed, base.unet.state_dict()))
        return backbone

    return of


def read(data: Any) -> Tensor:
    return torch.tensor(data, dtype=torch.float32)


@torch.no_grad()
def test_the_networks_agree_with_torch(base: Any, built: Path, kept: Any) -> None:
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is missing: pip install -e '.[dev]'"
    )

    def run(name: str, **feeds: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(built / f"{name}.onnx")
        return torch.tensor(session.run(None, {k: v.numpy() for k, v in feeds.items()})[0])

    for backbone in (base, kept(MODEL)):
        weights = {f"unet.{k}": v for k, v in backbone.unet.state_dict().items()}
        for number in (1, 3):
            x = torch.stack([noise.normal(7, k) for k in range(number)])
            t = torch.tensor([0, 999, 400])[:number]
            condition = backbone.encode_prompts([CLASS]).expand(number)
            ours = run("unet", x=x, t=t, condition=condition.hidden, **weights)
            assert (ours - backbone.predict(x, t, condition)).abs().max() < 1e-4
    x = noise.normal(8)[None]
    pixels = base.pipeline.vae.decode(base.unscaled(x)).sample
    assert (run("decoder", x=x) - pixels).abs().max() < 1e-4
    latents = base.pipeline.vae.encode(pixels).latent_dist.mean
    assert (run("encoder", x=pixels) - base.scaled(latents, latents)[0]).abs().max() < 1e-4


@torch.no_grad()
def test_a_tuned_model_is_kept_to_half_a_step_of_its_scale(
    base: Any, runs: list[Any], built: Path, kept: Any
) -> None:
    start = base.unet.state_dict()
    model, run = runs[-1]
    tuned_run = run.load(backbone=base.copy())
    weights = tuned_run.unet.state_dict()
    again = build.unpack((built / f"{model.name}.bin").read_bytes(), start)
    for name, weight in weights.items():
        rows = (weight - start[name]).reshape(len(weight) if weight.ndim > 1 else 1, -1)
        off = (again[name] - weight).reshape(rows.shape).abs()
        assert (off <= rows.abs().amax(1, keepdim=True) / 254 * 1.001 + 1e-7).all(), name
    assert any((again[name] != start[name]).any() for name in start)
    about = noise.normal(4)[None], torch.tensor([500]), base.encode_prompts([CLASS])
    before, after, shown = (m.predict(*about) for m in (base, tuned_run, kept(model.name)))
    assert (shown - after).norm() < 2e-3 * (after - before).norm()


@torch.no_grad()
def test_every_prompt_is_kept_as_its_model_reads_it(base: Any, built: Path, kept: Any) -> None:
    names = json.loads((built / "playground.json").read_text())["prompts"]
    rows = torch.frombuffer(bytearray((built / "prompts.bin").read_bytes()), dtype=torch.float32)
    rows = rows.reshape(len(names), 32, -1)
    assert names[0] == "" and len(names) == len(set(names))
    for name, backbone, text in (
        (CLASS, base, CLASS),
        ("", base, ""),
        (f"{MODEL}: {SUBJECT}", kept(MODEL), SUBJECT.replace("{S*}", "<sks>")),
    ):
        row = rows[names.index(name)]
        torch.testing.assert_close(row, backbone.encode_prompts([text]).hidden[0])


def test_the_models_are_seven_and_their_folder_is_small(built: Path) -> None:
    labels = [model.label for model in models()]
    assert labels[:2] == ["plain, 25 steps", "plain, 200 steps"] and len(labels) == 6
    assert sum(file.stat().st_size for file in built.iterdir()) < 60e6
    for file in build.PAGE.iterdir():  # no network: the only address is the name of a format
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text


def test_runs_of_other_steps_are_not_shown_under_false_names(base: Any, runs: list[Any]) -> None:
    folder = runs[0][1].folder.parent
    with pytest.raises(UserError, match="has 2 steps"):
        tuned(folder, base, steps=4)


def test_the_noise_is_normal() -> None:
    x = torch.stack([noise.normal(3, k) for k in range(40)]).double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x[1:] * x[:-1]).mean()) < 0.01
    assert abs((x.flatten()[1:] * x.flatten()[:-1]).mean()) < 0.01


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    if not (built / "ort.js").is_file():
        pytest.skip(f"npm is missing, or could not fetch {build.RUNTIME}")
    for file in build.PAGE.iterdir():
        assert (built / file.name).read_bytes() == file.read_bytes()
    handler = functools.partial(Quiet, directory=str(built))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def visit(browser: Any, address: str, width: int = 1024, script: str = "") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(WAIT)
    page.add_init_script(script)
    page.goto(address)
    page.wait_for_selector("main:not([hidden]), #status.wrong", state="attached")
    return page


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Iterator[Any]:
    page = visit(browser, address)
    page.click("#tab-classify")  # where nothing is computed until it is asked
    yield page
    page.close()


def ask(page: Any, body: str, *arguments: Any) -> Any:
    """Run JavaScript beside the page's own module."""
    start = "async (a) => { const m = await import('./playground.js'); "
    return page.evaluate(f"{start}{body} }}", list(arguments))


def test_the_page_draws_the_noise_of_python(page: Any) -> None:
    for seed, stream in ((0, 0), (1, 0), (9999, 32)):
        drawn = read(ask(page, "return [...m.normal(...a)]", seed, stream))
        torch.testing.assert_close(drawn, noise.normal(seed, stream).flatten())


@torch.no_grad()
@pytest.mark.parametrize("share", [None, 0.25])
def test_the_same_seed_gives_the_same_picture(
    page: Any, kept: Any, base: Any, share: float | None
) -> None:
    backbone = kept(MODEL)
    prompt = SUBJECT.replace("{S*}", "<sks>")
    condition = backbone.encode_prompts([prompt]).hidden
    if share is not None:
        plain = kept("plain")
        start = plain.encode_prompts([prompt]).hidden
        condition = start + share * (condition - start)
        ends = plain.unet.state_dict(), backbone.unet.state_dict()
        mixed = {name: w + share * (ends[1][name] - w) for name, w in ends[0].items()}
        backbone.unet.load_state_dict(mixed)
    backbone.pipeline.scheduler = backbone.sampler()
    latents = backbone.pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=base.encode_prompts([""]).hidden,
        latents=noise.normal(5)[None],
        num_inference_steps=20,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    pixels = backbone.pipeline.vae.decode(backbone.unscaled(latents)).sample[0]
    model = MODEL if share is None else {"plain": "plain", "sude": MODEL, "share": share}
    ours, image = ask(page, DRAWN, model, SUBJECT, 5, 3)
    assert (read(ours) - latents.flatten()).abs().max() < 2e-3
    shown = np.array(image).reshape(64, 64, 4)[..., :3]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(shown - expected).max() <= 1


@torch.no_grad()
def test_rho_threshold_and_gate_are_those_of_sude_terms(
    page: Any, base: Any, runs: list[Any], kept: Any
) -> None:
    x_0, _ = base.encode_pictures([runs[0][1].picture()])
    body = """const r = await m.answers(...a.slice(0, 3));
        const f = m.terms(r.subject, r.category, r.uncond, a[1], a[3]);
        return [f, [...r.x], [...r.subject], [...r.category], [...r.uncond]]"""
    backbone, gates = kept(MODEL), set()
    for seed, t in enumerate((0, 40, 300, 650, 975)):
        time, ws = torch.tensor([t]), 0.25
        found, *answers = ask(page, body, MODEL, t, seed, ws)
        x, subject, category, uncond = (read(v).reshape(1, *base.latent_shape) for v in answers)
        expected = add_noise(x_0, noise.normal(seed)[None], time, base.schedule)
        assert (x - expected).abs().max() < 1e-4
        for ours, model, prompt in (
            (subject, backbone, "photo of a <sks> dog"),
            (category, base, "photo of a dog"),
            (uncond, base, ""),
        ):
            theirs = model.predict(x, time, model.encode_prompts([prompt]))
            assert (ours - theirs).abs().max() < 1e-4
        terms = sude_terms(subject, category, uncond, x, time, base.schedule)
        assert found["rho"] == pytest.approx(terms.rho.item(), abs=1e-4)
        assert found["threshold"] == pytest.approx(terms.threshold.item(), rel=1e-4)
        assert found["loss"] == pytest.approx(terms.loss.item(), rel=1e-3, abs=1e-6)
        assert found["open"] == terms.gate.item()
        variance = 0.5 / output_weight(time, base.schedule, "reference")
        move = sude_move(subject, category, uncond, variance, ws).item()
        assert found["move"] == pytest.approx(move, abs=1e-4)
        gates.add(found["open"])
    assert gates == {True, False}


@torch.no_grad()
def test_the_class_is_that_of_the_library_at_the_same_pairs(page: Any, base: Any) -> None:
    weights = step_weights(base.schedule)
    shift = float(noise.uniform(6, 0, 1)[0])
    assert (
        ask(page, "return m.pairTimes(...a)", 32, shift)
        == spread_times(32, weights, shift).tolist()
    )
    times = spread_times(4, weights, shift)
    x_0 = noise.normal(2)
    prompts = base.encode_prompts([f"photo of a {name}" for name in CATEGORIES])
    number, sums = len(CATEGORIES), torch.zeros(len(CATEGORIES), dtype=torch.float64)
    for m, t in enumerate(times):
        eps = noise.normal(6, m + 1)
        x = add_noise(x_0[None], eps[None], t[None], base.schedule).expand(number, -1, -1, -1)
        off = base.predict(x, t.expand(number), prompts) - eps
        sums += weights.sum() * off.double().square().flatten(1).sum(1)
    body = """const all = [], x_0 = Float32Array.from(a[0]);
        for await (const step of m.classify(x_0, 4, 6)) all.push(step);
        return all"""
    steps = ask(page, body, x_0.flatten().tolist())
    assert [s["t"] for s in steps] == times.tolist()
    p = (-sums / 4).softmax(0)
    np.testing.assert_allclose(steps[-1]["p"], p, atol=2e-3)
    assert to_x_0(eps[None], x[:1], t[None], base.schedule).sub(x_0).abs().max() < 1e-3


def test_the_next_input_interrupts_and_the_last_one_is_what_is_shown(page: Any) -> None:
    page.click("#tab-draw")
    page.locator("#seed").fill("11")
    page.locator("#seed").fill("12")
    page.locator("#lambda").fill("1")
    page.wait_for_selector("#between.fresh")
    canvas = "document.querySelector('#between canvas').getContext('2d')"
    shown = page.evaluate(f"[...{canvas}.getImageData(0, 0, 64, 64).data]")
    page.click("#tab-classify")
    _, image = ask(page, DRAWN, MODEL, SUBJECT, 12, 4)
    assert np.abs(np.subtract(shown, image)).max() <= 1


UNNAMED = """() => [...document.querySelectorAll('input, button, canvas, svg[role]')].filter((e) =>
    !(e.labels?.length || e.ariaLabel || e.textContent.trim() || e.ariaLabelledByElements?.length)
).map((e) => e.outerHTML)"""
PALE = """() => {
    const rgb = (words) => words.match(/[\\d.]+/g).map(Number);
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const parts = [0.2126, 0.7152, 0.0722];
    const light = (c) => parts.reduce((sum, w, k) => sum + w * linear(c[k] / 255), 0);
    const under = (e) => {
        for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] === 1) return c;
        }
        return [255, 255, 255];
    };
    const ratio = (e) => {
        const both = [light(rgb(getComputedStyle(e).color)), light(under(e))];
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    };
    const texts = [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
    return texts.filter((e) => ratio(e) < 4.5).map((e) => e.outerHTML);
}"""
"""Of the elements that hold text, those with less than WCAG's contrast AA."""


@pytest.mark.parametrize("width", [1024, 360])
def test_labels_contrast_keys_and_width(browser: Any, address: str, width: int) -> None:
    page = visit(browser, address, width)
    assert "one subject, one seed: an illustration" in page.inner_text("header").lower()
    page.locator("[role=tab][aria-selected=true]").focus()
    for name in ("draw", "look", "classify"):
        assert page.locator(f"#{name}").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(UNNAMED) == [] and page.evaluate(PALE) == []
        page.keyboard.press("ArrowRight")
    assert page.locator("#draw").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-draw"
    page.locator("input[name=who]:checked").focus()
    page.keyboard.press("ArrowRight")
    page.locator("input[name=category]:checked").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#prompt") == "photo of a vase"
    page.close()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("delete globalThis.WebAssembly", "no WebAssembly"),
        (
            "WebAssembly.Memory = function () { throw new RangeError('could not allocate') };"
            "WebAssembly.instantiate = async () => { throw new RangeError('Out of memory') }",
            "too little memory",
        ),
    ],
)
def test_a_browser_that_cannot_says_so(browser: Any, address: str, script: str, words: str) -> None:
    page = visit(browser, address, script=script)
    assert words in page.inner_text("#status") and not page.locator("main").is_visible()
    page.close()


def test_what_is_missing_is_named_and_a_page_from_a_folder_is_not_blank(
    browser: Any, address: str, built: Path
) -> None:
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.route("**/decoder.onnx", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.wait_for_selector("#status.wrong")
    assert "decoder.onnx is missing" in page.inner_text("#status")
    page.goto((built / "index.html").as_uri())
    assert "needs a web server" in page.inner_text("#status")
    page.close()


def test_a_file_that_is_no_picture_gets_a_sentence_and_a_picture_is_judged(
    page: Any, built: Path, tmp_path: Path
) -> None:
    page.click("#tab-classify")
    (tmp_path / "dog.png").write_bytes(b"no picture")
    page.locator("#file").set_input_files(tmp_path / "dog.png")
    page.wait_for_selector("#status.wrong")
    assert "no picture" in page.inner_text("#status")
    page.locator("#file").set_input_files(built / "subject.png")
    page.wait_for_selector("#bars tr.best")
    assert page.inner_text("#status") == "" and "of 32 pairs" in page.inner_text("#pairs")
    assert page.inner_text("#bars tr.best th") == "dog"
