"""kill -9 at any moment: a folder is complete, or the same command completes it, to the same bytes.

Every case stops a real command of the command line when it is about to touch its folder for the
k-th time, or up to 3 ms later, in the middle of what it writes there; k is drawn at random, with a
seed. Then the command is given again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from sude_lab.io.files import PARTIAL
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run

TOUCHES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
KILLS = int(os.environ.get("SUDE_LAB_KILLS", "12"))
"""How many moments in all; 50 and more before a release."""


def command(arguments: list[str], folder: str, number: int, delay: float, pipe: Any) -> None:
    """Run a command; end this process at touch `number` of `folder` and `delay` seconds more.

    Without a number the touches are counted and sent to `pipe`.
    """
    torch.set_num_threads(1)
    touches = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal touches
        written = event == "open" and isinstance(details[2], int) and details[2] & 3
        if not (written or event in TOUCHES) or not str(details[0]).startswith(folder):
            return
        touches += 1
        if touches == number:
            if delay == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: it ends as by kill -9
            signal.setitimer(signal.ITIMER_REAL, delay)

    sys.addaudithook(watch)
    from sude_lab.cli import main

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        code = main(arguments)
    if pipe is not None:
        pipe.send(touches)
    sys.exit(code)


@pytest.fixture(scope="module")
def world(tiny_data: Path) -> Iterator[None]:
    """The tiny model in the place of the embedded one; one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUDE_LAB_DATA", str(tiny_data))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def start(world: None) -> Callable[..., int]:
    """Gives a function that runs a command in a process of its own and returns its exit code."""
    server = multiprocessing.get_context("forkserver")
    parts = [
        "sude_lab.sweep.sweep",
        "sude_lab.world.oracle",
        "transformers.models.clip.modeling_clip",
    ]
    parts += ["diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
    server.set_forkserver_preload(parts)

    def started(
        arguments: Sequence[Any], folder: Path, number: int = 0, delay: float = 0.0
    ) -> tuple[int, int]:
        ours, theirs = server.Pipe(duplex=False)
        given = (
            [str(a) for a in arguments],
            str(folder),
            number,
            delay,
            None if number else theirs,
        )
        process = server.Process(target=command, args=given)
        process.start()
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, ours.recv() if ours.poll() else 0

    return started


Start = Callable[..., tuple[int, int]]


def contents(folder: Path, *, halves: bool = True) -> dict[str, bytes]:
    """Every file of a folder, without locks and what tells the time it took.

    With `halves` left out what was being written: such names are never read.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in ("timing.json", ".results.lock") or path.suffix == ".lock":
            continue
        if not halves and PARTIAL in name:
            continue
        files[name] = path.read_bytes()
        if path.name == ENVIRONMENT:
            about = json.loads(files[name])
            files[name] = json.dumps({k: v for k, v in about.items() if "second" not in k}).encode()
    return files


def named_alike(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Without the folder's own name, and the part of the pictures' that follows from it."""
    mark = re.compile(rb"(/pictures/[^\n]*?)-[0-9a-f]{10}/")
    renamed = {}
    for name, content in files.items():
        if name.endswith((".csv", ".json", ".md")):
            content = mark.sub(rb"\1/", content.replace(str(folder).encode(), b"OUT"))
        renamed[mark.sub(rb"\1/", name.encode()).decode()] = content
    return renamed


def moments(name: str, share: float, touches: int) -> list[tuple[int, float]]:
    rng = random.Random(f"{name} is killed")
    number = max(2, round(KILLS * share))
    return [
        (rng.randint(1, touches), rng.choice([0.0, rng.uniform(1e-4, 3e-3)])) for _ in range(number)
    ]


KILLED = (-signal.SIGKILL, -signal.SIGALRM)


def tune(picture: Path, out: Path) -> list[Any]:
    return [
        *("tune", picture, "--category", "dog", "--out", out, "--max-train-steps", 5),
        *("--checkpoint-every", 2, "--validation-every", 3, "--num-samples", 1),
        *("--report-to", "none", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def run(start: Start, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run; do not write in it."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert start(tune(subject_picture, out), out)[0] == 0
    return out


def test_tune_is_killed(start: Start, run: Path, subject_picture: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "run"
    code, touches = start(tune(subject_picture, again), again)
    expected = contents(run)
    assert code == 0 and touches > 10 and contents(again) == expected  # twice in a row, too
    for k, (number, delay) in enumerate(moments("tune", 0.4, touches)):
        out = tmp_path / str(k) / "run"
        code, _ = start(tune(subject_picture, out), out, number, delay)
        assert code in KILLED or (delay and code == 0), (number, delay, code)
        if (out / ENVIRONMENT).is_file():  # where it is, the run is finished
            Run.open(out).load("cpu")
        resume = ["--resume"] if out.is_dir() and any(out.iterdir()) else []
        assert start([*tune(subject_picture, out), *resume], out)[0] == 0, (number, delay)
        assert contents(out) == expected, (number, delay)


def test_generate_is_killed(start: Start, run: Path, tmp_path: Path) -> None:
    def generate(out: Path) -> list[Any]:
        return ["generate", run, "photo of a {S*}", "--out", out, "--num-images", 3]

    whole = tmp_path / "whole"
    code, touches = start(generate(whole), whole)
    assert code == 0 and len(contents(whole)) == 3
    _, touches = start(generate(tmp_path / "beside"), tmp_path)  # what it writes beside counts, too
    for k, (number, delay) in enumerate(moments("generate", 0.16, touches)):
        place = tmp_path / str(k)
        out = place / "pictures"
        code, _ = start(generate(out), place, number, delay)
        assert code in KILLED or code == 0
        if not (out.is_dir() and any(out.iterdir())):  # all or nothing
            assert start(generate(out), out)[0] == 0, (number, delay)
        assert contents(out) == contents(whole), (number, delay)


def test_evaluate_is_killed(start: Start, run: Path, tmp_path: Path) -> None:
    def evaluate(out: Path, copy: Path) -> list[Any]:
        options = ["--prompts", "plain", "backgrounds", "--num-images", 2, "--device", "cpu"]
        return ["evaluate", copy, "--out", out, *options]

    def copied(place: Path) -> Path:
        for path in (p for p in run.rglob("*") if p.is_file()):
            target = place / "run" / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        return place / "run"

    place = tmp_path / "whole"
    code, touches = start(evaluate(place / "table", copied(place)), place)
    assert code == 0
    expected = contents(place)
    tables = [name for name in expected if name.endswith((".csv", ".md"))]
    for k, (number, delay) in enumerate(moments("evaluate", 0.2, touches)):
        place = tmp_path / str(k)
        copy = copied(place)
        code, _ = start(evaluate(place / "table", copy), place, number, delay)
        assert code in KILLED or code == 0
        assert start(evaluate(place / "table", copy), place)[0] == 0, (number, delay)
        files = contents(place, halves=False)
        assert files.keys() == expected.keys(), (number, delay)
        for name in expected.keys() - tables:
            assert files[name] == expected[name], (name, number, delay)
        for name in (n for n in tables if n.endswith(".csv")):  # whose paths name the folder
            rows, theirs = pd.read_csv(place / name), pd.read_csv(tmp_path / "whole" / name)
            apart = [
                c for c in rows if c == "run" or (rows[c].dtype == object and "/" in str(rows))
            ]
            pd.testing.assert_frame_equal(rows.drop(columns=apart), theirs.drop(columns=apart))


def test_sweep_is_killed(start: Start, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    settings = {"subjects": ["held-out 0"], "w_s": [0, "x1"], "pictures": 1, "num_gpus": 0}
    settings |= {"prompts": ["plain"], "settings": {"max_train_steps": 4, "device": "cpu"}}
    grid.write_text(yaml.safe_dump(settings))

    def sweep(out: Path) -> list[Any]:
        return ["sweep", grid, "--out", out, "--checkpoint-every", 2]

    whole = tmp_path / "whole"
    code, touches = start(sweep(whole), whole)
    assert code == 0
    expected = named_alike(contents(whole), whole)
    assert any(name.endswith(CONFIG) for name in expected) and "results.parquet" in expected
    for k, (number, delay) in enumerate(moments("sweep", 0.24, touches)):
        out = tmp_path / str(k)
        code, _ = start(sweep(out), out, number, delay)
        assert code in KILLED or code == 0
        assert start(sweep(out), out)[0] == 0, (number, delay)
        files = named_alike(contents(out), out)
        assert files.keys() == expected.keys(), (number, delay)
        for name in expected:
            assert files[name] == expected[name], (name, number, delay)
