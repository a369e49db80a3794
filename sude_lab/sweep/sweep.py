"""Grids of runs: one file, one command, on this machine or on a cluster.

    OUT/plan.json          where the runs are
    OUT/results.parquet    a row a picture and metric of every finished run, a row a failed run
    OUT/subjects/          the pictures of drawn subjects
    RUNS/KEY/              a run, as `sude-lab tune` and `evaluate` write it, and timing.json
    RUNS/.sweep/           locks, and the reasons of failures

RUNS is OUT/runs, or a folder that several sweeps share; KEY is a hash of what the run is: its
settings, its picture's bytes, the backbone's files. A run whose scores are there is finished; any
other is begun, or continued from its checkpoint, by whoever holds its lock. The table is made anew
from the runs' own scores: no fault can leave a run in it twice or not at all.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError, check_whole, explained
from sude_lab.evaluate.encoders import Encoder
from sude_lab.evaluate.evaluate import FOLDER, evaluate
from sude_lab.io.files import (
    PARTIAL,
    DiskFullError,
    atomic_write,
    lock_holder,
    locked,
    remove_partials,
    require_own,
    write_file,
)
from sude_lab.io.opening import backbone_identity, open_backbone, resolve_source
from sude_lab.io.reading import digest, read_json
from sude_lab.io.workers import worker_pool
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run, run_tuning
from sude_lab.sweep.grid import LABEL, SCORE, Job, Plan, kind_of, make_plan, read_grid, run_key
from sude_lab.tuning import Step
from sude_lab.world.oracle import drawn_judge

PLAN, RESULTS, TIMING, STATE = "plan.json", "results.parquet", "timing.json", ".sweep"
COSTS = ("seconds_per_step", "seconds_per_picture", "megabytes_per_run", "megabytes_per_picture")
"""What timing.json says of a run, beside its kind and its seconds."""

# --- one run -------------------------------------------------------------------------------------


Status = Literal["finished", "running", "failed", "waiting"]
Standing = tuple[Status, str]
"""How far a run is, and who is at it, or why it failed."""


def standing(job: Job, runs: Path) -> Standing:
    """Return how far a run is now, from any process."""
    if job.scores(runs).is_file():
        return "finished", ""
    if holder := lock_holder(_beside(runs, job.key, "lock")):
        host, process, since = (*holder.split(), "?", "0", "0")[:3]
        minutes = max(0.0, time.time() - float(since)) / 60
        return "running", f"process {process} on {host}, for {minutes:.0f} min"
    failure = _failure(runs, job.key)
    return ("failed", failure) if failure else ("waiting", "")


def perform(job: Job, runs: Path, *, wait: bool = True, checkpoint_every: int = 100) -> Standing:
    """Tune, draw and judge one run from where it stands, under its lock; record a failure.

    A failure that is recorded stands until its file is removed, as `sweep` does when it begins.
    With `wait` it waits where another process is at the run.
    """
    with locked(_beside(runs, job.key, "lock"), wait=wait) as held:
        if not held:
            return "running", ""
        if job.scores(runs).is_file():
            return "finished", ""
        if reason := _failure(runs, job.key):
            return "failed", reason
        for left in (runs / STATE).glob(f"{PARTIAL}*-{job.key}.failed.json"):
            left.unlink()
        try:
            _tune_and_judge(job, runs, checkpoint_every)
        except Exception as error:  # of any class: the other runs go on
            if _is_full(error):
                text = "No space is left on the disk: free some, and give the command again."
                raise DiskFullError(text) from error
            return _record(runs, job.key, error)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return "finished", ""


def _tune_and_judge(job: Job, runs: Path, checkpoint_every: int) -> None:
    folder, config = runs / job.key, job.config
    remove_partials(folder)  # of a killed process; a resume would trip over what is half done
    if folder.is_dir() and not (folder / CONFIG).is_file():
        shutil.rmtree(folder)
    stamps = [time.perf_counter()]
    quiet: dict[str, Any] = {"report_to": "none", "num_samples": 0, "progress": False}

    def stamp(step: Step) -> None:
        stamps.append(time.perf_counter())

    if not (folder / ENVIRONMENT).is_file():
        if run_key(config, digest(config.image)) != job.key:
            changed = "A picture or the regularizer of this run was changed after it was planned"
            raise UserError(f"{changed}: give the command again.")
        quiet |= {"checkpoint_every": checkpoint_every, "resume": folder.is_dir()}
        quiet["keep_at"] = sorted({s.step for s in job.strengths if s.step})
        run_tuning(config, folder, backbone=fresh_backbone(config), on_step=stamp, **quiet)
    tuned = time.perf_counter()
    evaluation = evaluate(
        [f"{folder}@{strength}" if str(strength) else folder for strength in job.strengths],
        out=folder / FOLDER,
        **job.asked,
        judges=partial(drawn_judge, scene=job.scene),
        device=config.device,
        progress=False,
        open_base=lambda run: fresh_backbone(run.config),
        opened_encoders=_encoders.setdefault((*job.asked.get("encoders", ()), config.device), {}),
    )
    now = time.perf_counter()
    steps = len(stamps) - 2  # without the first one, which opens what is slow
    a_step = (stamps[-1] - stamps[1]) / steps if steps > 0 else None
    costs = (
        a_step or _noted(folder / TIMING).get("seconds_per_step"),  # of another sweep
        (now - tuned) / job.pictures,
        _megabytes(p for p in folder.rglob("*") if p.suffix != ".png"),
        _megabytes(folder.rglob("seed-*/*.png")) / job.pictures,
    )
    about = {"kind": kind_of(config), **dict(zip(COSTS, costs, strict=True))}
    about["seconds"] = now - stamps[0]
    write_file(folder / TIMING, json.dumps(about, indent=1))
    means = Run.open(folder).metrics()[["open_gates", "rho"]].mean()
    scores = evaluation.scores.assign(**means).reindex(columns=_SCORES.names)
    rows = pa.Table.from_pandas(scores, schema=_SCORES, preserve_index=False)
    with atomic_write(job.scores(runs)) as path:  # last: it says that the run is finished
        pq.write_table(rows.replace_schema_metadata(), path)


_opened: dict[tuple[str, str, str], Backbone] = {}
_encoders: dict[Any, dict[str, Encoder]] = {}
"""What this process keeps open between its runs."""


def fresh_backbone(config: TuningConfig) -> Backbone:
    """Return a copy of the model, which this process keeps open in main memory."""
    key = (resolve_source(config.backbone), config.device, config.dtype)
    if key not in _opened:
        _opened.clear()
        base = open_backbone(config.backbone, device=config.device, dtype=config.dtype)
        base.pipeline.to("cpu")
        _opened[key] = base
    backbone = _opened[key].copy()
    backbone.pipeline.to(backbone.device)
    return backbone


def _noted(path: Path) -> dict[str, Any]:
    """Return what a JSON file says in texts and numbers; nothing where it is damaged or missing."""
    try:
        about = read_json(path).items()
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: value for name, value in about if isinstance(value, str | int | float)}


def _megabytes(files: Iterable[Path]) -> float:
    """Return the size of files, in units of 1e6 bytes."""
    return sum(p.stat().st_size for p in files if p.is_file()) / 1e6


def _beside(runs: Path, key: str, what: str) -> Path:
    return runs / STATE / f"{key}.{what}"


def _failure(runs: Path, key: str) -> str:
    return str(_noted(_beside(runs, key, "failed.json")).get("reason", ""))


def _record(runs: Path, key: str, error: BaseException) -> Standing:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.replace(f"{runs}{os.sep}", "").split())[:1000]
    about = {"reason": reason, "traceback": "".join(traceback.format_exception(error))}
    write_file(_beside(runs, key, "failed.json"), json.dumps(about, indent=1))
    return "failed", reason


def _is_full(error: BaseException | None) -> bool:
    if error is None or isinstance(error, DiskFullError):
        return error is not None
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or _is_full(error.__cause__ or error.__context__)


# --- all runs ------------------------------------------------------------------------------------


def sweep(
    grid: Path | str,
    out: Path | str,
    *,
    runs: Path | str | None = None,
    workers: int = 1,
    cluster: str | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> dict[str, str]:
    """Do what is missing of a grid and write its table; return the failed runs' reasons by key.

    Runs that failed before are tried again. Several processes may work on one folder, and several
    sweeps may share their runs. The table holds the runs of the grid as it is now.

    Args:
        runs: Folder of the runs; None: OUT/runs.
        workers: Processes of one thread each, which end with this one; 1: this process alone.
        cluster: None: on this machine; else for Ray: "local" (all of this machine), "auto" (the
            cluster that this machine is part of) or ray://HOST:PORT.
    """
    check_whole("--checkpoint-every", checkpoint_every, 1)
    check_whole("--workers", workers, 1)
    if workers > 1 and cluster is not None:
        raise UserError("--workers are processes of this machine, and --cluster has its own.")
    plan = make_plan(read_grid(grid), out, runs)
    for folder in (plan.out, plan.runs):
        if folder.is_file():
            raise UserError(f"{folder} is a file: name a folder.")
    require_own(plan.out, PLAN, '{\n "runs": ', (RESULTS,))
    if unknown := [source for source in plan.grid.backbone if not backbone_identity(source)]:
        text = f"The backbone {unknown[0]} is neither on the hub nor in its cache"
        raise UserError(f"{text}: run with a connection, or name a pipeline folder.")
    todo = [job for job in plan.jobs if not job.scores(plan.runs).is_file()]
    failed: dict[str, str] = {}
    about = {"total": len(plan.jobs), "initial": len(plan.jobs) - len(todo)}
    bar = tqdm(desc="sweep", unit="run", disable=not progress, **about)

    def ended(jobs: list[Job], wait: bool) -> Iterator[tuple[Job, Standing]]:
        """Attempt jobs, and yield how each one ended."""
        settings: dict[str, Any] = {"runs": plan.runs, "wait": wait}
        settings["checkpoint_every"] = checkpoint_every
        if submit is None:
            yield from ((job, perform(job, **settings)) for job in jobs)
            return
        running = {submit(job, **settings): job for job in jobs}
        for future in as_completed(running):
            yield running[future], _outcome(future, plan.runs, running[future].key)

    with bar, ExitStack() as stack:
        submit: Callable[..., Future[Standing]] | None = None  # `perform`, in another process
        if cluster is not None:
            submit = stack.enter_context(_on_ray(plan, cluster))
        elif workers > 1:
            pool: Any = stack.enter_context(worker_pool(workers))
            submit = partial(pool.submit, perform)
        _write_plan(plan)
        for job in todo:  # what failed before is tried again
            _beside(plan.runs, job.key, "failed.json").unlink(missing_ok=True)
        took, written = _write_table(plan), time.monotonic()
        for wait in (False, True):  # what others are at comes last
            busy = []
            for job, (status, reason) in ended(todo, wait):
                if status == "running":
                    busy.append(job)
                    continue
                if status == "failed":
                    failed[job.key] = reason
                    bar.set_postfix_str(f"{len(failed)} failed")
                bar.update()
                if time.monotonic() - written > 20 * took:  # a twentieth of the time at most
                    took, written = _write_table(plan), time.monotonic()
            todo = busy
        _write_table(plan)
    return failed


def _outcome(future: Future[Standing], runs: Path, key: str) -> Standing:
    """Return how a run ended in another process; what `perform` raises there stops every run."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        text = "A worker process was ended from outside, for its memory perhaps"
        raise UserError(f"{text}: give the command again, with fewer --workers.") from error
    except Exception as error:
        if cause := getattr(error, "cause", None):  # as Ray hands it over
            raise UserError(str(cause)) from error
        if not type(error).__module__.startswith("ray."):
            raise
        return _record(runs, key, error)  # its worker died more often than it is started again


@contextmanager
def _on_ray(plan: Plan, cluster: str) -> Iterator[Callable[..., Future[Standing]]]:
    """Give the jobs to Ray, which queues, places and restarts them; a restarted run resumes."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--cluster needs Ray: pip install 'sude-lab[cluster]'.") from error
    gpus = plan.grid.num_gpus or 0.0
    ours = not ray.is_initialized()
    cure = "give local, or start a cluster with `ray start` and give auto or ray://HOST:PORT"
    try:
        with explained(f"Ray could not be had with --cluster {cluster}", cure):
            if ours:
                ray.init(address=cluster, log_to_driver=False, logging_level=logging.ERROR)
        task: Any = ray.remote(num_gpus=gpus, max_retries=3)(perform)
        there = ray.cluster_resources().get("GPU", 0)
        if cluster == "local" and there < gpus:
            raise UserError(
                f"A run asks for {gpus:g} GPUs and this machine has {there:g}: write num_gpus: 0 "
                "into the grid to run on the CPU."
            )
        yield lambda job, **settings: task.remote(job, **settings).future()
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _writing(plan: Plan) -> Iterator[None]:
    """Hold the lock on the sweep's own files, without what a killed process left half written."""
    with locked(plan.out / ".results.lock"):
        for left in [*plan.out.glob(f"{PARTIAL}*"), *plan.out.glob(f"subjects/{PARTIAL}*")]:
            if left.is_file():  # a folder is a run's, where RUNS is OUT
                left.unlink()
        yield


def _write_plan(plan: Plan) -> None:
    with _writing(plan):
        for who in plan.grid.subjects:
            file = plan.out / "subjects" / f"{who.name}.png"
            if who.png and not file.is_file():
                write_file(file, who.png)
        write_file(plan.out / PLAN, json.dumps({"runs": str(plan.runs)}, indent=1))


# --- the table -----------------------------------------------------------------------------------

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_LABELS, _SCORES = (
    pa.schema([(name, _TYPES[kind]) for name, kind in kinds.items()]) for kinds in (LABEL, SCORE)
)
_TABLE = pa.schema([*_LABELS, *_SCORES, ("error", _TYPES[str])])


def _write_table(plan: Plan) -> float:
    """Make the table anew of the runs' own scores, whoever finished them; return the seconds."""
    started = time.monotonic()
    # Read and written under one lock: of two processes none puts back what it saw before.
    table, writer_of = plan.out / RESULTS, partial(pq.ParquetWriter, schema=_TABLE)
    with _writing(plan), atomic_write(table) as path, writer_of(path) as writer:
        parts = filter(None, (_part(plan, job) for job in plan.jobs))
        while some := list(itertools.islice(parts, 64)):
            writer.write_table(pa.concat_tables(some))
    return time.monotonic() - started


def _part(plan: Plan, job: Job) -> pa.Table | None:
    scores, failure = job.scores(plan.runs), _failure(plan.runs, job.key)
    if not scores.is_file():
        rows = [job.label | {"error": failure}]
        return pa.Table.from_pylist(rows, schema=_TABLE) if failure else None
    with explained(f"{scores} is damaged", "delete it, and give the command again"):
        columns = pq.read_table(scores).cast(_SCORES).columns
    about = [pa.array([job.label[f.name]] * len(columns[0]), f.type) for f in _LABELS]
    error = pa.array([""] * len(columns[0]))
    return pa.Table.from_arrays([*about, *columns, error], schema=_TABLE)


# --- what is left --------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """Say what is left of a grid; hours and sizes are by medians over finished runs of a kind.

    Kinds are those of `grid.kind_of`, the finished runs those in the folder of the runs. Class
    images, which are drawn once, are not counted.
    """
    states = [(job, *standing(job, plan.runs)) for job in plan.jobs]
    todo = [job for job, status, _ in states if status != "finished"]
    equal = f" ({plan.num_equal:,} more are equal to one of these)" if plan.num_equal else ""
    counts = (
        f"{len(plan.jobs):,} runs{equal}, {len(plan.jobs) - len(todo):,} of them finished. "
        f"To do: {len(todo):,} runs, {sum(job.pictures for job in todo):,} pictures."
    )
    if not todo:
        return counts
    work = pd.DataFrame(
        [(kind_of(job.config), 1, job.config.max_train_steps, job.pictures) for job in todo],
        columns=["kind of run", "runs", "steps", "pictures"],
    )
    took = pd.DataFrame(map(_noted, plan.runs.glob(f"*/{TIMING}")), columns=["kind", *COSTS])
    took[[*COSTS]] = took[[*COSTS]].apply(pd.to_numeric, errors="coerce")
    finished = took.dropna().groupby("kind")
    table = work.groupby("kind of run", sort=False).sum()
    step, picture, run, each = (finished.median()[name].reindex(table.index) for name in COSTS)
    table["hours"] = (table["steps"] * step + table["pictures"] * picture) / 3600
    table["GB"] = (table["runs"] * run + table["pictures"] * each) / 1000
    known = finished.size().reindex(table.index, fill_value=0)
    shown = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else f"{x:,}")
    shown = shown.replace("nan", "?")
    shown["known from"] = [f"{number} runs" if number else "nobody" for number in known]
    parts = [counts, shown.reset_index().to_markdown(index=False, disable_numparse=True)]
    unknown = table["runs"][known == 0].sum()
    if unknown:
        parts.append(f"Unknown are {unknown:,} of the runs: finish one of each kind to know more.")
    if unknown < len(todo):
        hours, size = table["hours"].sum(), table["GB"].sum()
        parts.append(f"About {hours:,.1f} hours one after another, {size:,.2f} GB.")
    name = "{subject}, {settings}, {variant}, seed {tuning_seed}"
    now = [f"{s}: {name.format(**job.label)} ({reason})" for job, s, reason in states if reason]
    return "\n\n".join([*parts, *filter(None, ["\n".join(now)])])
