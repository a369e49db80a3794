"""The explorer of lesson 03 as a reader meets it: JupyterLab, a real browser, the arrow keys.

Needs playwright (the extra `browser`) and a Chromium, the system's or one that
`playwright install chromium` fetched; without them it is skipped and says why.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
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

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing: pip install -e '.[browser]'"
)

ROOT = Path(__file__).resolve().parents[2]
START, RUN, MOVE = 120, 240, 60  # seconds of patience: a server, a cell, a slider on a busy machine
IMAGE = ".jupyter-widgets.widget-image"
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


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own, else the system's."""
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        places = (driver.chromium.executable_path, *map(shutil.which, names))
        found = next((place for place in places if place and Path(place).exists()), None)
        if found is None:
            pytest.skip("no Chromium: install the system's, or run `playwright install chromium`")
        # In a container Chromium's own sandbox has no rights; the only page is ours.
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def ask_server(url: str, token: str, method: str = "GET") -> Any:
    request = urllib.request.Request(
        url, method=method, headers={"Authorization": f"token {token}"}
    )
    # Not through a proxy: the server is on this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


@pytest.fixture
def lab(tiny_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own, with settings of its own."""
    (tmp_path / "books").mkdir()
    cells = [nbformat.v4.new_code_cell(cell.format(folder=str(tiny_folder))) for cell in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(book, tmp_path / "books" / "explorer.ipynb")
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
    environment = {k: v for k, v in os.environ.items() if k != "SUDE_LAB_STATIC"}
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
            for kernel in ask_server(f"{url}/api/kernels", token):
                ask_server(f"{url}/api/kernels/{kernel['id']}", token, "DELETE")
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


def test_the_arrow_keys_move_the_explorer(browser: Any, lab: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(1000 * START)
    try:
        page.goto(lab)
        editor = page.locator(".jp-NotebookPanel .jp-CodeCell .cm-content").first
        editor.wait_for()
        # Before its kernel is there, JupyterLab forgets what it is asked to run.
        page.get_by_text(re.compile(r"\| Idle$")).wait_for()
        editor.click()
        for number, _ in enumerate(CELLS, 1):
            page.keyboard.press("Shift+Enter")
            done = page.locator(".jp-InputPrompt", has_text=f"[{number}]:")
            done.wait_for(timeout=1000 * RUN)
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
            print(f"{label}: {1000 * there:.0f} ms there, {1000 * back:.0f} ms back")
    except BaseException:
        page.screenshot(path=tmp_path / "page.png")
        print(f"The page as it was: {tmp_path / 'page.png'}")
        raise
    finally:
        page.close()
