"""Two processes that `accelerate launch` starts take the steps of one with the doubled batch."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sude_lab.cli import main
from sude_lab.runs.export import CARD
from sude_lab.runs.folder import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    LOGS,
    METRICS,
    PICTURE,
    SAMPLES,
    VALIDATION,
    WEIGHTS,
    Run,
)

ROOT = Path(__file__).parents[2]


def launch(*command: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes on the CPU, as a user with two cards does."""
    # --multi_gpu says "several processes on this machine": with --cpu accelerate starts only one.
    launcher = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0)
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no")
    arguments = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *plain, *command]
    # No settings of this user's `accelerate config`, and one thread a process.
    env = os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [str(a) for a in arguments], cwd=home, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floats depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flags(tiny_folder: Path, subject_picture: Path) -> list[object]:
    where = (subject_picture, "--backbone", tiny_folder, "--category", "dog", "--device", "cpu")
    how = ("--max-train-steps", 3, "--token-learning-rate", "1e-2", "--learning-rate", "1e-3")
    kept = ("--prior-loss-weight", 1, "--num-class-images", 2)
    return ["tune", *where, *how, *kept, "--num-samples", 1]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}.{name}": value
        for path in sorted((run.folder / WEIGHTS).iterdir())
        for name, value in load_file(path).items()
    }


@pytest.mark.usefixtures("one_thread")
def test_two_processes_take_the_steps_of_one(
    flags: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two"
    batch, watch = ("--train-batch-size", 1), ("--validation-every", 2)
    told = launch("-m", "sude_lab", *flags, *batch, *watch, "--out", out, home=tmp_path)
    assert told.returncode == 0, told.stderr
    # The main process alone writes, draws and speaks.
    assert told.stdout.count("The run is in") == 1
    files = {CARD, CONFIG, ENVIRONMENT, METRICS, PICTURE, SAMPLES, WEIGHTS, LOGS, VALIDATION}
    assert {path.name for path in out.iterdir()} == files
    assert [path.name for path in (out / VALIDATION).iterdir()] == ["step-000002.png"]
    assert told.stderr.count("| 0/3 ") == 1  # one bar
    about = json.loads((out / ENVIRONMENT).read_text())
    assert about["processes"] == 2 and about["device"] == "cpu"

    def alone(name: str, *settings: object) -> Run:
        where = ("--report-to", "none", "--out", tmp_path / name)
        assert main([str(a) for a in (*flags, *settings, *where)]) == 0
        return Run.open(tmp_path / name)

    two = Run.open(out)
    doubled = alone("doubled", "--train-batch-size", 2)
    columns = two.metrics().columns
    assert columns.equals(doubled.metrics().columns) and len(two.metrics()) == 3
    for name in columns:
        expected = pytest.approx(doubled.metrics()[name].tolist(), rel=1e-4, abs=1e-7)
        assert two.metrics()[name].tolist() == expected, name
    start = weights(alone("start", "--train-batch-size", 2, "--learning-rate", "1e-12"))
    ours, theirs = weights(two), weights(doubled)
    assert ours.keys() == theirs.keys()
    for name in ours:
        moved = (theirs[name] - start[name]).norm()
        if "learned_embeds" not in name:
            assert moved > 0, name
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * moved, name

    # A batch of two is computed in other shapes than two of one. The same two, one after the other
    # in one process, leave no excuse: bit for bit.
    halves = ("--train-batch-size", 1, "--gradient-accumulation-steps", 2)
    theirs = weights(alone("halves", *halves))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


WORKER = """
import os, sys
from sude_lab import tuning
from sude_lab.cli import main

total, calls = tuning.total_loss, []

def spoilt(*args):
    calls.append(1)
    bad = len(calls) == 3 and os.environ["RANK"] == "1"
    return total(*args) * (float("nan") if bad else 1.0)

tuning.total_loss = spoilt
sys.exit(main(sys.argv[1:]))
"""


def test_a_loss_that_goes_wrong_in_one_process_stops_all_and_names_the_checkpoint(
    flags: list[object], tmp_path: Path
) -> None:
    worker, out = tmp_path / "worker.py", tmp_path / "run"
    worker.write_text(WORKER)
    batch = ("--train-batch-size", 1, "--checkpoint-every", 1)
    told = launch(worker, *flags, *batch, "--report-to", "none", "--out", out, home=tmp_path)
    assert told.returncode != 0
    (said,) = (line for line in told.stderr.splitlines() if line.startswith("sude-lab: "))
    assert "The loss became nan at step 3 (t = " in said
    assert f"{out / CHECKPOINT} is kept" in said
    assert {path.name for path in out.iterdir()} == {CONFIG, PICTURE, CHECKPOINT}
    with redirect_stderr(io.StringIO()) as said:
        code = main([str(a) for a in (*flags, *batch, "--out", out, "--resume")])
    assert code == 2 and "was begun with 2 process(es), not 1" in said.getvalue()
    assert {path.name for path in out.iterdir()} == {CONFIG, PICTURE, CHECKPOINT}
