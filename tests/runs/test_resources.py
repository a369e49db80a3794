"""A disk, a memory or a device that gives out: what is said, what is kept, and how it goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sude_lab.cli import main
from sude_lab.config import TuningConfig
from sude_lab.errors import machine_failure
from sude_lab.methods.base import Method
from sude_lab.runs.folder import CHECKPOINT, CONFIG, ENVIRONMENT, Run
from sude_lab.runs.prepare import prepared_tuning as tune

ROOT = Path(__file__).resolve().parents[2]
LONG = int(os.environ.get("SUDE_LAB_STEPS", "300"))
"""Steps of the test that memory stays flat; 2,000 before a release."""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives a disk of so many KiB, or with a larger number makes it larger."""
    place = tmp_path / "disk"
    mounted = False

    def disk(kib: int) -> Path:
        nonlocal mounted
        place.mkdir(exist_ok=True)
        again = "remount," if mounted else ""
        mount = ["mount", "-t", "tmpfs", "-o", f"{again}size={kib}k", "tmpfs", str(place)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"No disk can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield disk
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def drawn_world(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in the place of the embedded one."""
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))


def command(picture: Path, backbone: Path, out: Path, *more: str) -> list[str]:
    common = ["--category", "dog", "--backbone", str(backbone), "--device", "cpu"]
    common += ["--max-train-steps", "6", "--num-samples", "1", "--report-to", "none"]
    return ["tune", str(picture), "--out", str(out), "--checkpoint-every", "2", *common, *more]


def test_a_disk_that_fills_while_tuning(
    small_disk: Callable[[int], Path],
    tiny_folder: Path,
    subject_picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole"
    assert main(command(subject_picture, tiny_folder, whole)) == 0
    disk = small_disk(100_000)
    (disk / "earlier.txt").write_text("kept")
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file()) // 1024
    for kib in (1, size // 3, size):  # at the first file, at a checkpoint, at the end
        small_disk(kib + 4)
        capsys.readouterr()
        resume = ["--resume"] if (disk / "run" / CONFIG).is_file() else []
        code = main(command(subject_picture, tiny_folder, disk / "run", *resume))
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and message.startswith("sude-lab: ") and "space" in message, (kib, message)
        assert not (disk / "run" / ENVIRONMENT).exists()
        assert (disk / "earlier.txt").read_text() == "kept"
    small_disk(100_000)
    resume = ["--resume"] if (disk / "run").is_dir() and any((disk / "run").iterdir()) else []
    assert main(command(subject_picture, tiny_folder, disk / "run", *resume)) == 0
    for name in ("metrics.csv", "samples.png"):
        assert (disk / "run" / name).read_bytes() == (whole / name).read_bytes()
    for file in (whole / "weights").iterdir():
        assert (disk / "run" / "weights" / file.name).read_bytes() == file.read_bytes()


def test_a_disk_that_fills_while_drawing_and_judging(
    drawn_world: None,
    small_disk: Callable[[int], Path],
    subject_picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, disk = tmp_path / "run", small_disk(100_000)
    assert main(command(subject_picture, Path("embedded"), run)) == 0
    copy = Path(shutil.copytree(run, disk / "run"))
    used = shutil.disk_usage(disk).used // 1024
    small_disk(used + 12)  # a few pictures' room
    before = tree(disk)
    drawn = ["generate", str(run), "a {S*}", "--out", str(disk / "drawn"), "--num-images", "16"]
    assert main(drawn) == 2 and "space" in capsys.readouterr().err
    assert tree(disk) == before  # all pictures, or none
    judged = [
        "evaluate",
        str(copy),
        "--prompts",
        "plain",
        "--num-images",
        "16",
        "--device",
        "cpu",
    ]
    assert main(judged) == 2 and "space" in capsys.readouterr().err.splitlines()[-1]
    after = tree(disk)
    assert {name: after[name] for name in before} == before
    small_disk(100_000)
    assert main(drawn) == 0 and len(tree(disk / "drawn")) == 16
    assert main(judged) == 0 and (copy / "evaluation" / "scores.csv").is_file()


LIMITED = """
import resource, sys
from sude_lab.cli import main
import torch, diffusers, transformers
from sude_lab.evaluate import evaluate
from sude_lab.runs import folder as runs
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_a_memory_that_is_too_small(
    tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    """As with ulimit -v, 400 MiB above what the program itself takes."""
    out = tmp_path / "run"
    words = command(subject_picture, tiny_folder, out, "--train-batch-size", "4096")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, "400", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
    assert line.startswith("sude-lab: The machine ran out of memory: use") and "smaller" in line
    assert not (out / ENVIRONMENT).exists()
    enough = command(subject_picture, tiny_folder, tmp_path / "again", "--train-batch-size", "1")
    assert main(enough) == 0


def test_what_the_machine_does_is_told_from_what_we_do_wrong() -> None:
    assert machine_failure(torch.OutOfMemoryError("CUDA out of memory.")) == (
        "The device ran out of memory"
    )
    assert machine_failure(MemoryError()) == "The machine ran out of memory"
    words = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate"
    assert machine_failure(RuntimeError(words)) == "The machine ran out of memory"
    gone = machine_failure(RuntimeError("CUDA error: device not ready\nmore"))
    assert gone is not None and gone.startswith("The device failed or is gone (CUDA error")
    assert machine_failure(RuntimeError("shapes disagree")) is None
    assert machine_failure(ValueError("CUDA error")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_device_is_refused_before_anything_is_written(
    tiny_folder: Path,
    subject_picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    words = command(subject_picture, tiny_folder, out)
    words[words.index("cpu")] = "cuda"
    assert main(words) == 2
    assert "cuda" in capsys.readouterr().err and not out.exists()


def test_a_gpu_that_disappears_leaves_the_checkpoint(
    tiny_folder: Path,
    subject_picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Played with the words of PyTorch: nothing that touches the device works from then on."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(command(subject_picture, tiny_folder, whole)) == 0
    calls = 0

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    predict = Method.predict

    def fails(self: Method, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return gone() if calls > 4 else predict(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "predict", fails)
        assert main(command(subject_picture, tiny_folder, out)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The device failed or is gone (CUDA error" in message and "--resume" in message
    assert f"{out / CHECKPOINT} is kept" in message
    assert {p.name for p in out.iterdir()} == {CONFIG, "picture.png", CHECKPOINT}
    assert main(command(subject_picture, tiny_folder, out, "--resume")) == 0
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert Run.open(out).weights.is_dir()


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion"])
def test_memory_stays_flat_over_many_steps(
    method: str, fresh: Callable[[], Any], subject_picture: Path
) -> None:
    """After a tenth of the steps nothing grows: neither tensors nor the process."""
    from PIL import Image

    def resident() -> float:
        words = Path("/proc/self/statm").read_text().split()
        return int(words[1]) * resource.getpagesize() / 2**20

    config = TuningConfig(
        subject_picture, "dog", method=method, max_train_steps=LONG, train_batch_size=1
    )
    sizes = []
    for step in tune(config, fresh(), Image.open(subject_picture).convert("RGB")):
        if step.number % (LONG // 10) == 0:
            sizes.append(resident())
    assert max(sizes[1:]) - sizes[1] < 8  # MiB; a leak of one latent a step would be more
    assert sizes[-1] - sizes[len(sizes) // 2] < 4


def test_a_full_disk_stops_a_sweep_and_the_same_command_continues(
    small_disk: Callable[[int], Path],
    drawn_world: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = {"subjects": ["held-out 0"], "w_s": [0, "x1"], "pictures": 1, "num_gpus": 0}
    grid |= {"prompts": ["plain"], "settings": {"max_train_steps": 4, "device": "cpu"}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    whole, disk = tmp_path / "whole", small_disk(100_000)
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(whole)]) == 0
    one = sum(p.stat().st_size for p in (whole / "runs").rglob("*") if p.is_file()) // 2048
    small_disk(one + one // 2)  # one run and a half
    words = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(disk / "out")]
    capsys.readouterr()
    assert main(words) == 2 and "space" in capsys.readouterr().err.splitlines()[-1]
    small_disk(100_000)
    assert main(words) == 0
    assert (disk / "out/results.parquet").read_bytes() == (whole / "results.parquet").read_bytes()
