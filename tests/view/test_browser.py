"""Explorers as a reader meets them: JupyterLab, a real browser, the arrow keys, a second visit.

Needs playwright (the extra `browser`) and a Chromium, the system's or one that
`playwright install chromium` fetched; without them it is skipped and says why (`browser`).
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
START, RUN, MOVE = 120, 240, 60  # seconds of patience: a server, a cell, a slider on a busy machine
IMAGE = ".sude-lab-shown img"
DEAD = "Error displaying widget"
SLIDERS = ("t", "category", "noise", "w_s")
CELLS = (
    "from PIL import Image\nfrom sude_lab.view import thresholds as explorers\n"
    "from sude_lab.io.opening import open_backbone",
    "model = open_backbone({folder!r}, device='cpu')\n"
    "picture, prompt = Image.new('RGB', (32, 32), 'olive'), 'photo of a running dog'\n"
    "categories, times, seeds = ('dog', 'candle'), (50, 400, 900), (3, 4)\n"
    "grid = explorers.ask(model, model, picture, prompt, categories, times, seeds)\n"
    "explorers.ThresholdExplorer(model, grid)",
)
OTHERS = (
    "from PIL import Image\nfrom sude_lab.view.flipbook import Flipbook\n"
    "def pictures(name): return {{'running': [Image.new('RGB', (32, 32), name)] * 2}}",
    "Flipbook({{0: pictures('red'), 1: pictures('blue')}}, name='g')",
    "Flipbook({{0: pictures('red'), 1: pictures('blue')}}, name='w_s')",
    "from sude_lab.view.live import LiveView\nwith LiveView(2) as live:\n    pass",
    "from sude_lab.view import plots\n"
    "plots.curves(plots.panels(), [0, 1], {{'plain': [1, 2]}}, xlabel='x', ylabel='y');",
)


def ask_server(url: str, token: str, method: str = "GET") -> Any:
    request = urllib.request.Request(
        url, method=method, headers={"Authorization": f"token {token}"}
    )
    # Not through a proxy: the server is on this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def stop_kernels(lab: str) -> None:
    """End the sessions, and their kernels, of a JupyterLab by the address of its notebook."""
    url, token = lab.split("/lab/")[0], lab.split("token=")[1]
    for session in ask_server(f"{url}/api/sessions", token):
        ask_server(f"{url}/api/sessions/{session['id']}", token, "DELETE")


@pytest.fixture
def lab(tiny_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own, with settings of its own."""
    (tmp_path / "books").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, sources in (("explorer", CELLS), ("others", OTHERS)):
        texts = [source.format(folder=str(tiny_folder)) for source in sources]
        cells = [nbformat.v4.new_code_cell(text) for text in texts]
        book = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(book, tmp_path / "books" / f"{name}.ipynb")
    # Else a first start asks whether it may fetch news.
    news = tmp_path / "config/lab/user-settings/@jupyterlab/apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8"
    )
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        port = any_free.getsockname()[1]
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    folders = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
    not_ours = ("SUDE_LAB_STATIC", "MPLBACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in not_ours}
    environment |= {f"JUPYTER_{k}_DIR": str(tmp_path / v) for k, v in folders.items()}
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    settings = (
        *("--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"),
        *("--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
        f"--ServerApp.root_dir={tmp_path / 'books'}",
    )
    log_path = tmp_path / "server.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *settings],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + START
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    ask_server(f"{url}/api/status", token)
                    break
                assert server.poll() is None and time.monotonic() < until, log_path.read_text()
                time.sleep(0.5)
            yield f"{url}/lab/tree/explorer.ipynb?token={token}"
            stop_kernels(f"{url}/lab/tree/explorer.ipynb?token={token}")
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def pixels(image: Any) -> np.ndarray:
    """What the browser shows of an element."""
    return np.asarray(Image.open(BytesIO(image.screenshot())).convert("RGB"), dtype=int)


def press(page: Any, slider: Any, key: str) -> float:
    """Press a key on a slider; return the seconds until another figure is on the page."""
    before = page.locator(IMAGE).get_attribute("src")
    slider.focus()
    started = time.perf_counter()
    slider.press(key)
    page.wait_for_function(
        "([where, old]) => { const it = document.querySelector(where);"
        " return it.src !== old && it.complete && it.naturalWidth > 0 }",
        arg=[IMAGE, before],
        timeout=1000 * MOVE,
    )
    return time.perf_counter() - started


def open_book(page: Any, address: str) -> None:
    page.set_default_timeout(1000 * START)
    page.goto(address)
    page.locator(".jp-NotebookPanel .jp-CodeCell .cm-content").first.wait_for()
    # Before its kernel is there, JupyterLab forgets what it is asked to run.
    page.get_by_text(re.compile(r"\| Idle$")).wait_for()


def run_all(page: Any, address: str, cells: tuple[str, ...]) -> None:
    open_book(page, address)
    page.locator(".jp-NotebookPanel .jp-CodeCell .cm-content").first.click()
    for number, _ in enumerate(cells, 1):
        page.keyboard.press("Shift+Enter")
        done = page.locator(".jp-InputPrompt", has_text=f"[{number}]:")
        done.wait_for(timeout=1000 * RUN)


def spoken(page: Any) -> list[str]:
    """What is said of each picture to those who do not see it."""
    pictures = page.locator(".jp-OutputArea-output img").all()
    return [picture.get_attribute("alt") or "" for picture in pictures]


def visit_again(browser: Any, page: Any, address: str, width: int, shot: Path) -> None:
    """Save, stop the kernel, open the book anew: the same pictures, and no dead widget."""
    images = page.locator(IMAGE).all()
    before = [(image.get_attribute("alt"), image.get_attribute("src")) for image in images]
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").wait_for(state="detached")
    page.close()
    stop_kernels(address)
    page = browser.new_page(viewport={"width": width, "height": 1000})
    open_book(page, address)
    page.locator(IMAGE).last.wait_for()
    page.wait_for_timeout(3000)  # the manager of widgets looks for those that are gone
    page.screenshot(path=shot)
    assert all(spoken(page))
    images = page.locator(IMAGE).all()
    assert before == [(image.get_attribute("alt"), image.get_attribute("src")) for image in images]
    assert all(image.is_visible() for image in images)
    assert not any(place.is_visible() for place in page.get_by_text(DEAD).all())
    page.close()


def inside(page: Any, *elements: Any) -> None:
    """No element is wider than the output it stands in."""
    outer = page.locator(".jp-NotebookPanel .jp-OutputArea-output").first.bounding_box()
    for element in elements:
        box = element.bounding_box()
        assert box["x"] + box["width"] <= outer["x"] + outer["width"] + 1, box


@pytest.mark.parametrize("width", [1400, 1024])
def test_the_arrow_keys_move_the_explorer_which_outlives_its_kernel(
    width: int, browser: Any, lab: str, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 1000})
    try:
        run_all(page, lab, CELLS)
        image = page.locator(IMAGE)
        image.wait_for(timeout=1000 * RUN)
        sliders = page.get_by_role("slider")
        sliders.nth(len(SLIDERS) - 1).wait_for()
        assert sliders.count() == len(SLIDERS)
        labels = page.locator(".widget-hslider .widget-label").all_inner_texts()
        assert labels == list(SLIDERS)
        assert image.count() == 1
        assert page.locator(".jp-RenderedImage").count() == 0  # the static figure stays away
        assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0
        tracks = page.locator(".widget-hslider .noUi-base").all()
        assert min(track.bounding_box()["width"] for track in tracks) > 90
        inside(page, image, page.locator(".widget-hslider").last)
        readouts = page.locator(".widget-hslider .widget-readout").all_inner_texts()
        assert readouts[1:] == ["dog", "3", "1"]
        start = pixels(image)
        for label, slider in zip(SLIDERS, sliders.all(), strict=True):
            now, last = (float(slider.get_attribute(f"aria-value{k}")) for k in ("now", "max"))
            keys = ("ArrowRight", "ArrowLeft") if now < last else ("ArrowLeft", "ArrowRight")
            there = press(page, slider, keys[0])
            moved = pixels(image)
            assert moved.shape == start.shape, label
            assert np.abs(moved - start).max() > 50, f"{label} changed nothing that one sees"
            back = press(page, slider, keys[1])
            assert np.array_equal(pixels(image), start), f"{label} did not lead back"
            words = f"{label}: {readouts[SLIDERS.index(label)]}"
            page.wait_for_function(
                "([at, words]) => { const it = document.querySelectorAll('[role=slider]')[at];"
                " return it.ariaLabel + ': ' + it.ariaValueText === words }",
                arg=[SLIDERS.index(label), words],
                timeout=10_000,
            )
            print(f"{label}: {1000 * there:.0f} ms there, {1000 * back:.0f} ms back")
        press(page, sliders.last, "ArrowLeft")
        page.screenshot(path=tmp_path / f"live-{width}.png")
        visit_again(browser, page, lab, width, tmp_path / f"again-{width}.png")
    except BaseException:
        if not page.is_closed():
            page.screenshot(path=tmp_path / "page.png")
        print(f"The page as it was: {tmp_path / 'page.png'}")
        raise
    finally:
        page.close()


@pytest.mark.parametrize("width", [1400, 1024])
def test_flipbooks_and_curves_outlive_their_kernel(
    width: int, browser: Any, lab: str, tmp_path: Path
) -> None:
    address = lab.replace("explorer.ipynb", "others.ipynb")
    page = browser.new_page(viewport={"width": width, "height": 1000})
    run_all(page, address, OTHERS)
    images, sliders = page.locator(IMAGE), page.get_by_role("slider")
    images.nth(2).wait_for(timeout=1000 * RUN)
    sliders.nth(1).wait_for()
    before = [image.get_attribute("src") for image in images.all()]
    sliders.nth(1).press("ArrowRight")
    page.wait_for_function(
        "([where, old]) => document.querySelectorAll(where)[1].src !== old",
        arg=[IMAGE, before[1]],
        timeout=1000 * MOVE,
    )
    assert images.nth(0).get_attribute("src") == before[0]
    inside(page, *images.all(), *page.locator(".widget-hslider").all())
    page.locator(".jp-OutputArea-output img").nth(3).wait_for()
    assert all(spoken(page)) and spoken(page)[3] == "y over x; plain from 1 to 2"
    page.screenshot(path=tmp_path / "others.png")
    visit_again(browser, page, address, width, tmp_path / "others-again.png")
