"""Sweeps finish every run once, whatever is killed, full, or failing on the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from sude_lab import tuning
from sude_lab.cli import main
from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import compare
from sude_lab.io import files
from sude_lab.io.files import PARTIAL, lock_holder, locked
from sude_lab.runs.folder import CHECKPOINT, ENVIRONMENT, Run
from sude_lab.sweep import sweep as room
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.sweep.sweep import RESULTS, describe, standing, sweep
from sude_lab.world import subjects as study
from sude_lab.world.oracle import judge, load_oracle

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40

DRIVER = """
import sys
from pathlib import Path
from sude_lab.sweep import sweep as room
from sude_lab.cli import main
tune = room.run_tuning
def told(config, out, **settings):
    with Path(sys.argv[1]).open("a") as log:
        log.write(out.name + "\\n")
    return tune(config, out, **settings)
room.run_tuning = told
sys.exit(main(sys.argv[2:]))
"""
"""A sweep in a process of its own, which writes down every run that it begins or continues."""


@pytest.fixture(scope="module", autouse=True)
def _tiny_world(tiny_data: Path) -> Iterator[pytest.MonkeyPatch]:
    """The tiny model in the place of the embedded one; one thread."""
    threads = torch.get_num_threads()  # sums of floats hang on how many threads share them
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUDE_LAB_DATA", str(tiny_data))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield patch
    torch.set_num_threads(threads)


def write_grid(folder: Path, **keys: Any) -> Path:
    """A grid of two runs of a few steps; later keys win."""
    usual: dict[str, Any] = {
        "subjects": ["held-out 0"],
        "w_s": [0, "x1"],
        "pictures": 2,
        "settings": {"max_train_steps": 4, "device": "cpu"},
        "num_gpus": 0,
    }
    file = folder / "grid.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(usual | keys), encoding="utf-8")
    return file


LONG: dict[str, Any] = {
    "subjects": ["held-out 0 1"],
    "settings": {"max_train_steps": STEPS, "device": "cpu"},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of an unbroken sweep of these keys; do not write in it."""
    known: dict[str, Path] = {}

    def swept(**keys: Any) -> Path:
        if repr(keys) not in known:
            out = tmp_path_factory.mktemp("unbroken")
            assert sweep(write_grid(out / "grid", **keys), out / "out", progress=False) == {}
            known[repr(keys)] = out / "out"
        return known[repr(keys)]

    return swept


Swept = Callable[..., Path]


def table(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / RESULTS)


def assert_equal(out: Path, other: Path, runs: Path | None = None) -> None:
    """Every run is in the table exactly once, and all numbers are the same to the bit."""
    assert (out / RESULTS).read_bytes() == (other / RESULTS).read_bytes()
    found = table(out)
    assert not found.duplicated(["run", "prompt", "seed", "picture", "metric"]).any()
    for folder in (other / "runs").iterdir():
        if folder.name != room.STATE:
            mine = (runs or out / "runs") / folder.name
            assert Run.open(mine).metrics().equals(Run.open(folder).metrics())
            for file in (folder / "weights").glob("*.safetensors"):
                kept, again = load_file(file), load_file(mine / "weights" / file.name)
                assert kept.keys() == again.keys()
                assert all(torch.equal(kept[k], again[k]) for k in kept), file
            assert not list(mine.rglob(".partial-*")) and not (mine / CHECKPOINT).exists()


def until(condition: Callable[[], Any], seconds: float = 1200.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def in_the_middle(out: Path, but: str = "") -> Callable[[], str | None]:
    """Return a question: which run has a checkpoint, and is not finished?"""

    def ask() -> str | None:
        found = [p.parent for p in (out / "runs").glob(f"*/{CHECKPOINT}")]
        return next((f.name for f in found if f.name != but), None)

    return ask


def statuses(grid: Path, out: Path) -> list[str]:
    plan = make_plan(read_grid(grid), out)
    return [standing(job, plan.runs)[0] for job in plan.jobs]


# --- what is written -----------------------------------------------------------------------------


def test_the_table_is_tidy_and_the_second_time_nothing_is_done(
    unbroken: Swept, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = unbroken()
    found = table(out)
    assert found["run"].nunique() == 2 and set(found["error"]) == {""}
    assert set(found["variant"]) == {"plain", "SuDe"} and set(found["w_s"]) == {0.0, 1.0}
    measures = {"attribute_alignment", "subject_fidelity", "category_alignment"}
    assert set(found["metric"]) == measures
    assert len(found) == 2 * 4 * 2 * len(measures)  # runs, attributes, pictures
    assert found["value"].between(0, 1).all() and found["value"].nunique() > 20
    assert found[found["w_s"] == 0]["rho"].isna().all()
    assert found[found["w_s"] == 1]["rho"].notna().all()
    compared = compare(found)  # the table is what the room of metrics reads
    assert compared[compared["variant"] == "SuDe"]["difference"].notna().all()
    for key, mine in found.groupby("run"):
        run = Run.open(out / "runs" / str(key))
        assert run.config.max_train_steps == 4 and len(run.metrics()) == 4
        own = pd.read_csv(run.folder / "evaluation" / "scores.csv")
        assert own["value"].tolist() == mine["value"].tolist()
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    halves = [copy / place / f"{PARTIAL}0-half" for place in ("", "subjects")]
    for half in halves:  # of a process that was killed while it wrote the table
        half.write_text("half")
    monkeypatch.setattr(room, "run_tuning", lambda *_, **__: pytest.fail("tuned again"))
    monkeypatch.setattr(room, "evaluate", lambda *_, **__: pytest.fail("judged again"))
    assert sweep(write_grid(tmp_path), copy, progress=False) == {}
    assert (copy / RESULTS).read_bytes() == (out / RESULTS).read_bytes()
    assert not any(half.exists() for half in halves)


def test_a_drawn_subject_is_judged_by_what_it_is(unbroken: Swept) -> None:
    """By the scene that was drawn, not by what the oracle reads from the picture of it."""
    found, who, oracle = table(unbroken()), study.subject("held-out", 0), load_oracle()
    for key, mine in found[found["metric"] == "subject_fidelity"].groupby("run"):
        folder = unbroken() / "runs" / str(key)
        scores = pd.read_csv(folder / "evaluation" / "scores.csv")
        files = scores[scores["metric"] == "subject_fidelity"]["file"]
        # The oracle reads the pictures of a prompt together: to rounding it is the same.
        images = [Image.open(folder / f) for f in files]
        expected = judge(oracle, images, who.scene, None).subject_fidelity
        assert mine["value"].tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    assert set(found["attribute"]) == set(who.other_attributes)


def test_sweeps_share_runs_and_a_changed_grid_keeps_the_table_its_own(
    unbroken: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Path(shutil.copytree(unbroken() / "runs", tmp_path / "shared"))
    tuned: list[str] = []
    tune = room.run_tuning

    def counted(config: Any, out: Path, **settings: Any) -> Run:
        tuned.append(out.name)
        return tune(config, out, **settings)

    monkeypatch.setattr(room, "run_tuning", counted)
    grid = write_grid(tmp_path / "a", w_s=["x1", "x2"], pictures=1)
    assert sweep(grid, tmp_path / "out", runs=shared, progress=False) == {}
    assert len(tuned) == 1 and set(table(tmp_path / "out")["w_s"]) == {1.0, 2.0}
    assert not (tmp_path / "out" / "runs").exists()
    # More runs in the same folder are added; what is no longer named leaves the table alone.
    grid = write_grid(tmp_path / "a", w_s=["x2", "x4"], pictures=1)
    assert sweep(grid, tmp_path / "out", runs=shared, progress=False) == {}
    assert len(tuned) == 2 and set(table(tmp_path / "out")["w_s"]) == {2.0, 4.0}
    # The first sweep's own table is as it was, though it was asked for fewer pictures since.
    assert sweep(write_grid(tmp_path / "b"), tmp_path / "o", runs=shared, progress=False) == {}
    assert (tmp_path / "o" / RESULTS).read_bytes() == (unbroken() / RESULTS).read_bytes()


def test_the_model_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = room.open_backbone
    monkeypatch.setattr(room, "open_backbone", lambda *a, **k: opened.append(a) or real(*a, **k))
    monkeypatch.setattr(
        "sude_lab.runs.folder.open_backbone", lambda *_, **__: pytest.fail("opened anew")
    )
    room._opened.clear()
    settings = {"max_train_steps": 1, "device": "cpu"}
    sweep(write_grid(tmp_path, settings=settings), tmp_path / "out", progress=False)
    assert len(opened) == 1


# --- faults --------------------------------------------------------------------------------------


def start(log: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(log), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_the_driver_is_killed_and_started_again(unbroken: Swept, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    grid = write_grid(tmp_path, **LONG)
    driver = start(log, "sweep", grid, "--out", out, "--checkpoint-every", 2)
    first = until(in_the_middle(out))
    key = until(in_the_middle(out, but=first))  # the second run: one is finished
    os.kill(int((lock_holder(out / "runs" / room.STATE / f"{key}.lock") or "").split()[1]), 9)
    assert driver.wait() == -signal.SIGKILL
    assert not (out / "runs" / key / ENVIRONMENT).is_file()  # it was in the middle
    assert lock_holder(out / "runs" / room.STATE / f"{key}.lock") is None
    assert statuses(grid, out).count("finished") == 1
    assert table(out)["run"].nunique() <= 1  # readable, and nothing unfinished is in it
    assert sweep(grid, out, progress=False) == {}
    assert_equal(out, unbroken(**LONG))


def test_two_drivers_share_the_work(
    unbroken: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    grid = write_grid(tmp_path, **LONG)
    tune = room.run_tuning

    def told(config: Any, folder: Path, **settings: Any) -> Run:
        with log.open("a") as file:
            file.write(folder.name + "\n")
        return tune(config, folder, **settings)

    monkeypatch.setattr(room, "run_tuning", told)
    driver = start(log, "sweep", grid, "--out", out)
    until(lambda: log.is_file())  # it is at its first run
    assert statuses(grid, out).count("running") == 1
    assert sweep(grid, out, progress=False) == {}
    assert driver.wait() == 0, driver.stderr and driver.stderr.read()
    keys = [job.key for job in make_plan(read_grid(grid), out).jobs]
    assert sorted(log.read_text().split()) == sorted(keys)  # each by one of them
    assert_equal(out, unbroken(**LONG))


def ended(process: int) -> bool:
    """Whether a process has ended; whoever inherited it may not have asked yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


def test_workers_share_the_work_and_end_with_their_parent(unbroken: Swept, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    grid = write_grid(tmp_path, **LONG)
    driver = start(log, "sweep", grid, "--out", out, "--workers", 2, "--checkpoint-every", 2)
    locks = out / "runs" / room.STATE

    def at_work() -> set[int]:
        holders = [lock_holder(lock) for lock in locks.glob("*.lock")]
        # A lock that was taken just now may not say yet by whom.
        return {int(holder.split()[1]) for holder in holders if holder and " " in holder}

    until(lambda: len(at_work()) == 2 and in_the_middle(out)())
    processes = at_work()
    assert driver.pid not in processes
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    until(lambda: all(map(ended, processes)), 20)
    assert sweep(grid, out, progress=False) == {}
    assert_equal(out, unbroken(**LONG))


def test_a_worker_that_is_killed_is_told_of(tmp_path: Path) -> None:
    out, grid = tmp_path / "out", write_grid(tmp_path, **LONG)

    def kill() -> None:
        lock = until(lambda: next((out / "runs" / room.STATE).glob("*.lock"), None))
        # Whoever holds a lock writes its name a moment later: until then it is "?".
        number, *_ = until(lambda: (lock_holder(lock) or "").split()[1:])
        os.kill(int(number), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="fewer --workers"):
        sweep(grid, out, workers=2, progress=False)
    killer.join()


@pytest.mark.parametrize("kind", ["nan", "raise"])
def test_a_failed_run_is_recorded_and_the_others_go_on(
    kind: str,
    unbroken: Swept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = {"w_s": [0, 3, "x1"]}
    whole = table(unbroken(**keys))
    out, grid = tmp_path / "out", write_grid(tmp_path, **keys)
    real, calls = tuning.total_loss, []

    def spoilt(*args: Any) -> torch.Tensor:
        loss = real(*args)
        if args[3] != 3.0:
            return loss
        calls.append(1)
        if len(calls) < 3:
            return loss
        if kind == "raise":
            raise RuntimeError("this card\nhas fallen off the bus")
        return loss * float("nan")

    monkeypatch.setattr(tuning, "total_loss", spoilt)
    command = ["sweep", str(grid), "--out", str(out)]
    assert main(command) == 1
    said = capsys.readouterr().err
    expected = {"nan": "The loss became nan at step 3", "raise": "RuntimeError: this card has"}[
        kind
    ]
    assert "sude-lab: 1 runs failed, the first one" in said and expected in said
    found = table(out)
    bad = found[found["error"] != ""]
    assert len(bad) == 1 and bad["w_s"].item() == 3.0 and bad["value"].isna().all()
    assert bad["error"].item().startswith(expected) and str(tmp_path) not in bad["error"].item()
    good = whole[whole["w_s"] != 3.0].reset_index(drop=True)
    kept = found[found["error"] == ""].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, good, check_dtype=False)  # gaps make floats of integers
    assert statuses(grid, out) == ["finished", "failed", "finished"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 runs, 2 of them finished" in said and expected in said and "\nfailed: held" in said

    calls.clear()  # it is tried again, once, and fails again
    assert main(command) == 1 and len(calls) >= 1
    assert len(table(out)[table(out)["error"] != ""]) == 1
    monkeypatch.setattr(tuning, "total_loss", real)
    assert main(command) == 0
    assert_equal(out, unbroken(**keys))
    assert not list((out / "runs" / room.STATE).glob("*.failed.json"))


def test_a_run_is_tuned_as_it_was_planned_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is the hash of its files: one that is changed meanwhile would be another run."""
    file = tmp_path / "own.py"
    file.write_text(
        "def regularizer(x_t, t, output, frozen):\n    return 0 * output.mean((1, 2, 3))\n"
    )
    settings = {"max_train_steps": 2, "device": "cpu", "regularizer_file": str(file)}
    grid, out = write_grid(tmp_path, settings=settings, w_s=[1, 2]), tmp_path / "out"
    real = room.run_tuning

    def tuned(*args: Any, **how: Any) -> Any:
        run = real(*args, **how)
        file.write_text(file.read_text() + "# changed\n")
        return run

    with monkeypatch.context() as patch:
        patch.setattr(room, "run_tuning", tuned)
        (reason,) = sweep(grid, out, progress=False).values()  # of the second run
    assert "was changed after it was planned: give the command again" in reason
    assert not sweep(grid, out, progress=False)  # planned anew: runs of the file as it is
    assert table(out)["run"].nunique() == 2


def test_a_failure_of_another_process_stands(tmp_path: Path) -> None:
    plan = make_plan(read_grid(write_grid(tmp_path)), tmp_path / "out")
    room._write_plan(plan)
    room._record(plan.runs, plan.jobs[0].key, UserError("It was too hot."))
    ended = room.perform(plan.jobs[0], plan.runs)  # a driver that began before this failure
    assert ended == ("failed", "It was too hot.")
    assert sweep(tmp_path / "grid.yaml", tmp_path / "out", progress=False) == {}


@pytest.mark.parametrize(
    "where", ["checkpoint.pt", "unet.safetensors", "001.png", "rows-", "results.parquet", ".lock"]
)
def test_a_full_disk_stops_the_sweep_with_a_sentence(
    where: str,
    unbroken: Swept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, grid = tmp_path / "out", write_grid(tmp_path)
    flush, opened, seen = files._flush, os.open, []

    def full(name: str) -> None:
        if where in name:
            seen.append(name)
            if len(seen) > 1:  # the first one still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_flush(file: Path) -> None:
        full(file.name)
        flush(file)

    def full_open(path: Any, *args: Any, **keys: Any) -> int:
        full(Path(path).name)
        return opened(path, *args, **keys)

    monkeypatch.setattr(files, "_flush", full_flush)
    if where == ".lock":
        monkeypatch.setattr(os, "open", full_open)
    command = ["sweep", str(grid), "--out", str(out), "--checkpoint-every", "1"]
    assert main(command) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sude-lab: ")]
    assert len(lines) == 1 and "No space is left on the disk" in lines[0], lines
    # No run is to blame: none is recorded as failed, and none is half in the table.
    assert not list((out / "runs" / room.STATE).glob("*.failed.json"))
    monkeypatch.undo()
    assert main(command) == 0
    assert_equal(out, unbroken())


def test_a_killed_ray_worker_is_started_again(unbroken: Swept, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sude-lab[cluster]'")
    out = tmp_path / "out"
    keys = {"settings": LONG["settings"]}
    grid = write_grid(tmp_path, **keys)
    state, killed = out / "runs" / room.STATE, []

    def kill() -> None:
        key = until(in_the_middle(out))
        holder = lock_holder(state / f"{key}.lock")
        if holder and not (out / "runs" / key / ENVIRONMENT).is_file():
            os.kill(int(holder.split()[1]), signal.SIGKILL)
            killed.append(int(holder.split()[1]))

    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        ray.shutdown()
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("Ray's own processes did not start within its 30 s: this machine is too busy")
    try:
        killer = threading.Thread(target=kill)
        killer.start()
        options: dict[str, Any] = {"cluster": "local", "checkpoint_every": 2, "progress": False}
        assert sweep(grid, out, **options) == {}
        killer.join()
        assert killed and os.getpid() not in killed
        assert_equal(out, unbroken(**keys))
        with pytest.raises(UserError, match="asks for 1 GPUs and this machine has 0"):
            sweep(write_grid(tmp_path / "g", num_gpus=1), tmp_path / "gpu", cluster="local")
    finally:
        ray.shutdown()


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run_says_who_is_at_what(unbroken: Swept, tmp_path: Path) -> None:
    out, grid = Path(shutil.copytree(unbroken(), tmp_path / "out")), write_grid(tmp_path)
    plan = make_plan(read_grid(grid), out)
    assert describe(plan) == "2 runs, 2 of them finished. To do: 0 runs, 0 pictures."
    rows = next((out / "runs").glob("*/evaluation/rows-*"))
    rows.unlink()
    with locked(out / "runs" / room.STATE / f"{rows.parents[1].name}.lock"):
        assert sorted(statuses(grid, out)) == ["finished", "running"]
        *_, line = describe(plan).splitlines()
    assert line.startswith("running: held-out-0-dog") and f"process {os.getpid()}" in line
    assert sorted(statuses(grid, out)) == ["finished", "waiting"]
    assert "1 of them finished" in describe(plan) and "running" not in describe(plan)


def test_a_dry_run_knows_the_times_of_finished_runs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, grid = tmp_path / "out", write_grid(tmp_path)
    assert main(["sweep", str(grid), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 0 of them finished. To do: 2 runs, 16 pictures." in said
    assert "Unknown are 2 of the runs" in said and not out.exists()
    assert sweep(grid, out, progress=False) == {}
    more = write_grid(tmp_path, seeds=[0, 1])
    assert main(["sweep", str(more), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 runs, 2 of them finished. To do: 2 runs, 16 pictures." in said
    assert said.count("1 runs") >= 2 and "Unknown" not in said


@pytest.mark.quick
def test_a_dry_run_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    code = "import sys; from sude_lab.cli import main; main(sys.argv[1:]); print(set(sys.modules))"
    command = ["sweep", str(write_grid(tmp_path)), "--out", str(tmp_path / "out"), "--dry-run"]
    said = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    ).stdout
    assert "'torch'" in said
    for name in ("diffusers", "transformers", "accelerate", "peft", "matplotlib", "ray"):
        assert f"'{name}'" not in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["GRID", "--out", "GRID"], "is a file"),
        (["GRID", "--out", "new", "--runs", "GRID"], "is a file"),
        (["GRID", "--out", "new", "--checkpoint-every", "0"], "at least 1"),
        (["GRID", "--out", "new", "--workers", "0"], "--workers is 0"),
        (["GRID", "--out", "new", "--workers", "2", "--cluster", "local"], "has its own"),
        (["nothing.yaml", "--out", "new"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = str(write_grid(tmp_path))
    given = [{"GRID": grid, "new": str(tmp_path / "new")}.get(f, f) for f in flags]
    assert main(["sweep", *given]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and expected in said.err and said.out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [room.PLAN, RESULTS])
def test_somebody_elses_file_is_left_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not from this command"):
        sweep(write_grid(tmp_path), out, progress=False)
    assert [p.name for p in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_without_ray_a_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'sude-lab\\[cluster\\]'"):
        sweep(write_grid(tmp_path), tmp_path / "out", cluster="local", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_hub_id_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    grid = write_grid(tmp_path, backbone="nobody/nothing", prompts=["plain"])
    with pytest.raises(UserError, match="neither on the hub nor in its cache"):
        sweep(grid, tmp_path / "out", progress=False)


def test_the_parquet_can_be_read_while_it_is_replaced(unbroken: Swept, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken(), tmp_path / "out"))
    plan = make_plan(read_grid(write_grid(tmp_path)), out)
    writing = plan
    rows = pq.read_metadata(out / RESULTS).num_rows
    ended = threading.Event()

    def write() -> None:
        for _ in range(20):
            room._write_table(writing)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not ended.is_set():
        assert len(pq.read_table(out / RESULTS)) == rows
        reads += 1
    writer.join()
    assert reads > 0


def test_damaged_rows_are_told_and_a_damaged_failure_is_none(
    unbroken: Swept, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(unbroken(), tmp_path / "out"))
    grid = write_grid(tmp_path)
    rows = next((out / "runs").rglob("*.parquet"))
    whole = rows.read_bytes()
    for damage in (whole[:100], b""):
        rows.write_bytes(damage)
        with pytest.raises(UserError, match=r"is damaged .* delete it"):
            sweep(grid, out, progress=False)
    rows.write_bytes(whole)
    key = make_plan(read_grid(grid), out).jobs[0].key
    for damage in ("{}", "[]", "null", '{"reasons": "x"}'):
        (out / "runs" / room.STATE / f"{key}.failed.json").write_text(damage)
        assert not room._failure(out / "runs", key)
        assert sweep(grid, out, progress=False) == {}
