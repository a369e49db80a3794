"""Grids of runs: one file, one command, on this machine or on a cluster.

    OUT/plan.json          the runs of the grid, in their order
    OUT/results.parquet    a row a picture and metric of every finished run, a row a failed run
    OUT/results.csv        the same, written at the end
    OUT/subjects/          the pictures of drawn subjects
    RUNS/KEY/              a run, as `sude-lab tune` and `evaluate` write it, and timing.json
    RUNS/.sweep/           locks, and the reasons of failures

RUNS is OUT/runs, or a folder that several sweeps share; KEY is a hash of what the run is: its
settings, its picture's bytes, the backbone's files. Nothing else remembers what was done. A run
whose scores are there is finished; any other is begun, or continued from its checkpoint, by whoever
holds its lock. The table is made anew from the runs' own scores, so that no fault can leave a run
in it twice or not at all.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import gc
import html
import itertools
import json
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError, one_line
from sude_lab.evaluate.encoders import Encoder
from sude_lab.evaluate.evaluate import FOLDER, PICTURES, evaluate
from sude_lab.io.files import (
    PARTIAL,
    DiskFullError,
    atomic_write,
    lock_holder,
    locked,
    remove_partials,
    require_own,
)
from sude_lab.io.opening import open_backbone, resolve_source
from sude_lab.io.reading import read_json
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run, run_tuning
from sude_lab.sweep.grid import Job, Plan, is_known, kind_of, make_plan, read_grid
from sude_lab.sweep.lockstep import MAY_DIFFER, PRIOR, check_together, feed
from sude_lab.tuning import Step, TuningConfig

PLAN, RESULTS, TIMING, STATE = "plan.json", "results.parquet", "timing.json", ".sweep"
_FULL = "No space is left on the disk: free some, and give the command again."

# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a run ended; `busy`: another process is at it, `full`: the disk is."""

    status: Literal["finished", "failed", "busy", "full"]
    reason: str = ""


def perform(
    job: Job,
    runs: Path,
    *,
    wait: bool = True,
    retry: float = 0.0,
    checkpoint_every: int = 100,
    on_step: Callable[[Step], None] | None = None,
) -> Outcome:
    """Tune, draw and judge one run from where it stands, under its lock; record a failure.

    Args:
        job: The run.
        runs: The folder of all runs.
        wait: Whether to wait where another process is at it.
        retry: The time of the failure that is to be tried again; a newer one stands.
        checkpoint_every: Steps between checkpoints.
        on_step: Called after every step of tuning.

    Raises:
        UserError: the run cannot be locked.
    """
    try:
        with locked(_beside(runs, job.key, "lock"), wait=wait) as mine:
            if not mine:
                return Outcome("busy")
            if job.scores(runs).is_file():
                return Outcome("finished")
            failure = _failure(runs, job.key)
            if failure and failure["when"] != retry:
                return Outcome("failed", failure["reason"])
            for left in (runs / STATE).glob(f"{PARTIAL}*-{job.key}.failed.json"):
                left.unlink()
            try:
                _tune_and_judge(job, runs, checkpoint_every, on_step)
            except Exception as error:  # of any class: the other runs go on
                if _is_full(error):
                    raise
                return _record(runs, job.key, error)
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            _beside(runs, job.key, "failed.json").unlink(missing_ok=True)
            return Outcome("finished")
    except Exception as error:
        if _is_full(error):
            return Outcome("full", _FULL)
        raise


def _tune_and_judge(
    job: Job, runs: Path, checkpoint_every: int, on_step: Callable[[Step], None] | None
) -> None:
    folder, config = runs / job.key, job.config
    _clear_halves(folder, job.asked["num_images"])
    stamps = [time.perf_counter()]

    def stamp(step: Step) -> None:
        stamps.append(time.perf_counter())
        if on_step:
            on_step(step)

    if not (folder / ENVIRONMENT).is_file():
        run_tuning(
            config,
            folder,
            resume=folder.is_dir(),
            checkpoint_every=checkpoint_every,
            num_samples=0,
            report_to="none",
            backbone=fresh_backbone(config),
            on_step=stamp,
            progress=False,
        )
    tuned = time.perf_counter()
    found = evaluate(
        [folder],
        **job.asked,
        scene=job.scene,
        device=config.device,
        progress=False,
        load=lambda run: run.load(backbone=fresh_backbone(config)),
        opened_encoders=_encoders.setdefault((job.asked.get("encoders"), config.device), {}),
    )
    now = time.perf_counter()
    steps = len(stamps) - 2  # without the first one, which opens what is slow
    about = {
        "kind": kind_of(config),
        "seconds_per_step": (stamps[-1] - stamps[1]) / steps if steps > 0 else None,
        "seconds_per_picture": (now - tuned) / job.pictures,
        "megabytes_per_run": megabytes(p for p in folder.rglob("*") if p.suffix != ".png"),
        "megabytes_per_picture": megabytes(folder.rglob("seed-*/*.png")) / job.pictures,
        "seconds": now - stamps[0],
    }
    if steps <= 0 and (folder / TIMING).is_file():  # tuned for another sweep
        about["seconds_per_step"] = timing(folder).get("seconds_per_step")
    with atomic_write(folder / TIMING) as path:
        path.write_text(json.dumps(about, indent=1), encoding="utf-8")
    means = Run.open(folder).metrics()[["open_gates", "rho"]].mean()
    scores = found.scores.assign(**means).reindex(columns=_SCORES.names)
    rows = pa.Table.from_pandas(scores, schema=_SCORES, preserve_index=False)
    with atomic_write(job.scores(runs)) as path:  # last: it says that the run is finished
        pq.write_table(rows.replace_schema_metadata(), path)


def lockstep_groups(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Return those of the runs that can be tuned together, `most` at once, in their order."""
    usual = {name: getattr(TuningConfig, name) for name in (*MAY_DIFFER, *PRIOR)}
    alike: dict[Any, dict[Any, list[Job]]] = {}
    order = {job.key: number for number, job in enumerate(jobs)}
    for job in jobs:
        priors = alike.setdefault(replace(job.config, **usual), {})
        asked = tuple(getattr(job.config, name) for name in PRIOR)
        priors.setdefault(asked if job.config.with_sude else None, []).append(job)
    groups = []
    for priors in alike.values():
        plain = priors.pop(None, [])  # without SuDe the prior says nothing: they go with the first
        for found in priors.values():
            group, plain = sorted(plain + found, key=lambda job: order[job.key]), []
            groups += [group[k : k + most] for k in range(0, len(group), most)]
    return [group for group in groups if len(group) > 1 and _fits(group)]


def _fits(group: list[Job]) -> bool:
    try:
        check_together([job.config for job in group])
    except UserError:
        return False
    return True


def tune_in_lockstep(
    jobs: Sequence[Job],
    runs: Path,
    *,
    checkpoint_every: int = 100,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Tune runs together, each into its folder, as far as that goes; `perform` does what is left.

    Runs that were begun before, and those that another process is at, are left out. One that fails
    is left as it is: alone it fails again, and is recorded.
    """
    with ExitStack() as locks:
        mine = [
            job
            for job in jobs
            if not (runs / job.key).exists()
            and locks.enter_context(locked(_beside(runs, job.key, "lock"), wait=False))
            and not (runs / job.key).exists()  # nor since
        ]
        if len(mine) < 2:
            return
        backbone = fresh_backbone(mine[0].config)
        consumers = [
            partial(
                run_tuning,
                job.config,
                runs / job.key,
                checkpoint_every=checkpoint_every,
                num_samples=0,
                report_to="none",
                backbone=backbone,
                on_step=on_step if job is mine[0] else None,
                progress=False,
            )
            for job in mine
        ]
        feed(consumers, backbone)


def _clear_halves(folder: Path, num_images: int) -> None:
    """Remove what a killed process left half done and a resume would trip over.

    Pictures of one prompt are drawn in one batch, and the last bits hang on a batch's size: a
    prompt that lacks pictures is drawn anew as a whole.
    """
    remove_partials(folder)
    for drawn in list(folder.glob(f"{FOLDER}/{PICTURES}/*/seed-*")):
        if len(list(drawn.glob("*.png"))) < num_images:
            shutil.rmtree(drawn)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        shutil.rmtree(folder)


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


def timing(folder: Path) -> dict[str, Any]:
    """Return what a run took, as its folder tells; nothing where its file is damaged or missing."""
    try:
        found = read_json(folder / TIMING)
        return {k: v for k, v in found.items() if isinstance(v, str | int | float)}
    except (OSError, ValueError, AttributeError):
        return {}


def megabytes(files: Iterable[Path]) -> float:
    """Return the size of files, in units of 1e6 bytes."""
    return sum(p.stat().st_size for p in files if p.is_file()) / 1e6


def _beside(runs: Path, key: str, what: str) -> Path:
    return runs / STATE / f"{key}.{what}"


def _failure(runs: Path, key: str) -> dict[str, Any] | None:
    try:
        told = read_json(_beside(runs, key, "failed.json"))
        return {"reason": str(told["reason"]), "when": float(told["when"])}
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is tried again
        return None


def _record(runs: Path, key: str, error: BaseException) -> Outcome:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.replace(f"{runs}{os.sep}", "").split())[:1000]
    trace = "".join(traceback.format_exception(error))
    about = {"reason": reason, "when": time.time(), "traceback": trace}
    with atomic_write(_beside(runs, key, "failed.json")) as path:
        path.write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Outcome("failed", reason)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, DiskFullError) or number in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- all runs ------------------------------------------------------------------------------------

Engine = Callable[[Sequence[Job], bool], Iterator[tuple[Job, Outcome]]]
"""Attempts jobs, waiting for those that others are at or not, and yields how each one ended."""


def sweep(
    grid: Path | str,
    out: Path | str,
    *,
    runs: Path | str | None = None,
    cluster: str | None = None,
    checkpoint_every: int = 100,
    lockstep: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """Do what is missing of a grid and write its table; return the failed runs' reasons by key.

    Runs that failed before are tried again. Several processes may work on one folder, and several
    sweeps may share their runs. The table holds the runs of the grid as it is now: what a changed
    file no longer names stays in RUNS alone.

    Args:
        grid: The grid file.
        out: Folder of the sweep.
        runs: Folder of the runs; None: OUT/runs.
        cluster: None: one after another in this process; else for Ray: "local" (all of this
            machine), "auto" (the cluster that this machine is part of) or ray://HOST:PORT.
        checkpoint_every: Steps between checkpoints.
        lockstep: How many runs that differ in their use of SuDe alone are tuned together, where
            their method allows it (`sude_lab.sweep.lockstep`): the same numbers but for rounding.
        progress: Whether to show the bar.

    Raises:
        UserError: bad input (nothing is written then), a full disk, or no such cluster.
    """
    if checkpoint_every < 1:
        raise UserError("--checkpoint-every must be at least 1.")
    if lockstep < 1 or (lockstep > 1 and cluster is not None):
        raise UserError("--lockstep must be at least 1, and is not for --cluster.")
    plan = make_plan(read_grid(grid), out, runs)
    for folder in (plan.out, plan.runs):
        if folder.is_file():
            raise UserError(f"{folder} is a file: name a folder.")
    require_own(plan.out, PLAN, '{\n "runs": ', (RESULTS, "results.csv"))
    unknown = [s for s in plan.grid.backbones if not is_known(s)]
    if unknown:
        raise UserError(
            f"The backbone {unknown[0]} is neither on the hub nor in its cache: run with a "
            "connection, or name a pipeline folder."
        )
    retry = {j.key: f["when"] for j in plan.jobs if (f := _failure(plan.runs, j.key))}
    todo = [job for job in plan.jobs if not job.scores(plan.runs).is_file()]
    failed: dict[str, str] = {}
    done = len(plan.jobs) - len(todo)
    total = len(plan.jobs)
    bar = tqdm(total=total, initial=done, desc="sweep", unit="run", disable=not progress)

    shown = time.monotonic()

    def on_step(step: Step) -> None:
        nonlocal shown
        if time.monotonic() - shown > 1:
            shown = time.monotonic()
            bar.set_postfix_str(f"{len(failed)} failed, step {step.number}")

    def options(job: Job, wait: bool) -> dict[str, Any]:
        again = retry.get(job.key, 0.0)
        return {"wait": wait, "retry": again, "checkpoint_every": checkpoint_every}

    def here(jobs: Sequence[Job], wait: bool) -> Iterator[tuple[Job, Outcome]]:
        groups = [] if wait or lockstep == 1 else lockstep_groups(jobs, lockstep)
        together = {group[0].key: group for group in groups}
        for job in jobs:
            if job.key in together:
                tune_in_lockstep(
                    together[job.key],
                    plan.runs,
                    checkpoint_every=checkpoint_every,
                    on_step=on_step,
                )
            yield job, perform(job, plan.runs, **options(job, wait), on_step=on_step)

    how: AbstractContextManager[Engine] = nullcontext(here)
    if cluster is not None:
        how = _on_ray(plan, cluster, options)
    with bar, how as engine:
        _write_plan(plan)
        table = _Table(plan)
        table.write()
        for wait in (False, True):  # what others are at comes last
            busy = []
            for job, outcome in engine(todo, wait):
                if outcome.status == "full":
                    raise DiskFullError(outcome.reason)
                if outcome.status == "busy":
                    busy.append(job)
                    continue
                if outcome.status == "failed":
                    failed[job.key] = outcome.reason
                bar.update()
                table.write(sparingly=True)
            todo = busy
        table.write()
        table.write_csv()
    return failed


@contextmanager
def _on_ray(
    plan: Plan, cluster: str, options: Callable[[Job, bool], dict[str, Any]]
) -> Iterator[Engine]:
    """Give the jobs to Ray, which queues, places and restarts them; a restarted run resumes."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--cluster needs Ray: pip install 'sude-lab[cluster]'.") from error
    gpus = plan.grid.num_gpus
    mine = not ray.is_initialized()
    try:
        if mine:
            ray.init(address=cluster, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's, the network's, the system's
        ray.shutdown()
        raise UserError(
            f"Ray could not be had with --cluster {cluster} ({str(error)[:160]}): give local, or "
            "start a cluster with `ray start` and give auto or ray://HOST:PORT."
        ) from error

    def engine(jobs: Sequence[Job], wait: bool) -> Iterator[tuple[Job, Outcome]]:
        task = ray.remote(num_gpus=gpus, max_retries=3)(perform)
        waiting = {task.remote(job, plan.runs, **options(job, wait)): job for job in jobs}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                outcome = ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # what `perform` raises stops every run
                raise UserError(str(error.cause)) from error
            except ray.exceptions.RayError as error:  # its worker died more often than is retried
                outcome = _record(plan.runs, job.key, error)
            yield job, outcome

    try:
        there = ray.cluster_resources().get("GPU", 0)
        if cluster == "local" and there < gpus:
            raise UserError(
                f"A run asks for {gpus:g} GPUs and this machine has {there:g}: write num_gpus: 0 "
                "into the grid to run on the CPU."
            )
        yield engine
    finally:
        if mine:
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
                with atomic_write(file) as path:
                    path.write_bytes(who.png)
        jobs = [{"key": j.key, "rows": j.rows, "label": j.label} for j in plan.jobs]
        with atomic_write(plan.out / PLAN) as path:
            text = json.dumps({"runs": str(plan.runs), "jobs": jobs}, indent=1)
            path.write_text(text, encoding="utf-8")


# --- the table -----------------------------------------------------------------------------------

_text, _whole, _real = pa.string(), pa.int64(), pa.float64()
_LABELS = pa.schema(
    [
        *((n, _text) for n in ("run", "subject", "category", "method", "backbone", "settings")),
        *(("variant", _text), ("tuning_seed", _whole), ("w_s", _real), ("w_s_factor", _real)),
        *(("truncate", pa.bool_()), ("truncate_at", _real), ("prior", _text)),
        *(("weighting", _text), ("steps", _whole)),
    ]
)
_SCORES = pa.schema(
    [
        *(("open_gates", _real), ("rho", _real), ("number", _whole)),
        *((n, _text) for n in ("kind", "prompt", "caption", "attribute", "background")),
        *(("seed", _whole), ("picture", _whole), ("metric", _text), ("encoder", _text)),
        ("value", _real),
    ]
)
_TABLE = pa.schema([*_LABELS, *_SCORES, ("error", _text)])


class _Table:
    """The file of all results; it is made anew of the runs' own, whoever finished them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.written, self.took = 0.0, 0.0

    def write(self, *, sparingly: bool = False) -> None:
        """Write it; `sparingly`: only where this takes less than a twentieth of the time."""
        started = time.monotonic()
        if sparingly and started - self.written < 20 * self.took:
            return
        # Read and written under one lock: of two processes none puts back what it saw before.
        with (
            _writing(self.plan),
            atomic_write(self.plan.out / RESULTS) as path,
            pq.ParquetWriter(path, _TABLE) as writer,
        ):
            parts = filter(None, map(self._part, self.plan.jobs))
            while some := list(itertools.islice(parts, 64)):
                writer.write_table(pa.concat_tables(some))
        self.written = time.monotonic()
        self.took = self.written - started

    def _part(self, job: Job) -> pa.Table | None:
        scores = job.scores(self.plan.runs)
        if scores.is_file():
            try:
                rows = pq.read_table(scores).cast(_SCORES)
            except (OSError, pa.ArrowException) as damage:
                raise UserError(
                    f"{scores} is damaged ({one_line(str(damage), 160)}): delete it, and give the "
                    "command again."
                ) from damage
            label = [pa.array([job.label[f.name]] * len(rows), f.type) for f in _LABELS]
            error = pa.array([""] * len(rows), _text)
            return pa.Table.from_arrays([*label, *rows.columns, error], schema=_TABLE)
        failure = _failure(self.plan.runs, job.key)
        if failure is None:
            return None
        return pa.Table.from_pylist([job.label | {"error": failure["reason"]}], schema=_TABLE)

    def write_csv(self, most: int = 1_000_000) -> None:
        """Write results.csv, unless it would have more than `most` rows."""
        with _writing(self.plan):
            if pq.read_metadata(self.plan.out / RESULTS).num_rows <= most:
                with atomic_write(self.plan.out / "results.csv") as path:
                    pq.read_table(self.plan.out / RESULTS).to_pandas().to_csv(path, index=False)


# --- what is going on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """One run of a sweep, as its folder tells it now."""

    name: str
    folder: Path
    status: Literal["finished", "running", "failed", "waiting"]
    told: str
    """Why it failed, or who is at it."""


def survey(out: Path | str) -> list[State]:
    """Return the state of every run of a sweep; from any process, at any time.

    Raises:
        UserError: there is no sweep in the folder.
    """
    try:
        plan = read_json(Path(out) / PLAN)
        runs, found = Path(plan["runs"]), []
        jobs = [(job["key"], job["rows"], _name_of(job["label"])) for job in plan["jobs"]]
        names = [part for key, rows, _ in jobs for part in (key, rows)]
        if not all(re.fullmatch(r"\w[\w.-]*", part) for part in names):
            raise ValueError("a name that leaves the folder of the runs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"There is no sweep in {out}: name the --out of one.") from error
    for key, rows, name in jobs:
        state = State(name, runs / key, "waiting", "")
        if (runs / key / FOLDER / rows).is_file():
            state = replace(state, status="finished")
        elif holder := lock_holder(_beside(runs, key, "lock")):
            host, process, since = (*holder.split(), "?", "0", "0")[:3]
            minutes = max(0.0, time.time() - float(since)) / 60
            told = f"process {process} on {host}, for {minutes:.0f} min"
            state = replace(state, status="running", told=told)
        elif failure := _failure(runs, key):
            state = replace(state, status="failed", told=failure["reason"])
        found.append(state)
    return found


def _name_of(label: dict[str, Any]) -> str:
    parts = [label["subject"], label["settings"], label["variant"], f"seed {label['tuning_seed']}"]
    return ", ".join(parts)


def summary(states: Sequence[State]) -> str:
    """Return the counts, and the time left: what finished runs took, by how many run at once."""
    number = {s: sum(x.status == s for x in states) for s in ("finished", "running", "failed")}
    waiting = len(states) - sum(number.values())
    text = f"{len(states)} runs: {number['finished']} finished, {number['running']} running, "
    text += f"{number['failed']} failed, {waiting} waiting"
    took = [
        seconds
        for x in states
        if x.status == "finished" and (seconds := timing(x.folder).get("seconds"))
    ]
    if took and number["running"]:
        left = (waiting + number["running"] / 2) * sum(took) / len(took) / number["running"]
        text += f"; about {left / 60:,.0f} minutes left"
    return text + "."


def status(out: Path | str) -> str:
    """Return what the terminal shows of a sweep: the counts, who is running, what failed and why.

    Raises:
        UserError: there is no sweep in the folder.
    """
    states = survey(out)
    lines = [f"{s.status}: {s.name} ({s.told})" for s in states if s.told]
    return "\n".join([summary(states), *lines])


def watch(out: Path | str, *, every: float = 5.0) -> Any:
    """Return a live page of a sweep for a notebook: counts, time left, a run's pictures by a click.

    It is renewed `every` seconds while the notebook is open and runs are left. Without ipywidgets
    it is the text of `status`.

    Raises:
        UserError: there is no sweep in the folder.
    """
    try:
        import ipywidgets as widgets
    except ImportError:
        return status(out)

    counts, about = widgets.HTML(), widgets.HTML()
    runs = widgets.Select(rows=16, layout={"width": "48%"})
    states: dict[str, State] = {}

    def show(*_: Any) -> None:
        about.value = _page(states[runs.value]) if runs.value in states else ""

    def renew() -> None:
        found = survey(out)
        states.update({s.folder.name: s for s in found})
        counts.value = f"<b>{html.escape(summary(found))}</b>"
        marks = {"finished": "✓", "running": "▶", "failed": "✗", "waiting": "·"}
        options = [(f"{marks[s.status]} {s.name}", s.folder.name) for s in found]
        if options != list(runs.options):
            chosen, runs.options = runs.value, options
            runs.value = chosen or options[0][1]
        show()

    async def keep_renewing() -> None:
        while any(s.status in ("running", "waiting") for s in states.values()):
            await asyncio.sleep(every)
            renew()

    runs.observe(show, names="value")
    renew()
    page = widgets.VBox([counts, widgets.HBox([runs, about])])
    with suppress(RuntimeError):  # no notebook: the page as it is now
        page.renewing = asyncio.get_running_loop().create_task(keep_renewing())
    return page


def _page(state: State, most: int = 8) -> str:
    """Return a run as HTML: what it is, and its first pictures of up to `most` prompts."""
    parts = [f"<p>{html.escape(state.name)}: {state.status}. {html.escape(state.told)}</p>"]
    for folder in sorted(state.folder.glob(f"{FOLDER}/{PICTURES}/*"))[:most]:
        words = folder.name.rsplit("-", 1)[0].replace("-", " ")
        pictures = sorted(folder.glob("seed-*/*.png"))[:4]
        coded = [base64.b64encode(p.read_bytes()).decode() for p in pictures]
        images = "".join(f'<img src="data:image/png;base64,{x}" height="96">' for x in coded)
        parts.append(f"<div>{html.escape(words)}</div><div>{images}</div>")
    return "".join(parts)
