"""A run's folder: configuration, pictures, metrics, weights, sample grid; written whole; resumed.

    DIR/config.json        every setting, defaults filled in
    DIR/picture.png        the picture as the model saw it; further subjects': picture-2.png, ...
    DIR/metrics.csv        one row a step
    DIR/regularizer.py     the file that stood in the place of SuDe, where one did
    DIR/samples.png        rows: prompts, columns: seeds
    DIR/weights/           safetensors
    DIR/pytorch_lora_weights.safetensors   a LoRA once more, where plain diffusers looks for it
    DIR/README.md          the model card: what this is, and how to load it elsewhere
    DIR/environment.json   versions, device, seconds
and, where it was asked for,
    DIR/logs/              the tracker's files (TensorBoard's by default)
    DIR/validation/        step-000200.png, ...: the sample grid while tuning
    DIR/kept/000025/       the weights after a step (--keep-at), drawn as DIR@25
While a run is under way, or has failed, the folder holds config.json, the pictures, regularizer.py,
`checkpoint.pt`, validation/, kept/ and logs/ alone. Each file is written whole, except a tracker's,
which grow; nothing is read from those. `environment.json` comes last: where it is, the run is
finished.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import CompleteConfig, TuningConfig, fields_of, read_settings
from sude_lab.draws import side_of
from sude_lab.errors import UserError, check_whole, explained, flag, listed, machine_failures
from sude_lab.generation import generate
from sude_lab.io.files import (
    LOCK,
    PARTIAL,
    atomic_folder,
    atomic_write,
    process_number,
    remove_partials,
    sole_writer,
    write_file,
)
from sude_lab.io.opening import hub_id, open_backbone, pick_device, resolve_source
from sude_lab.io.pictures import load_picture, open_picture
from sude_lab.io.reading import read_json
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import configure, get_method
from sude_lab.prompts import PLACEHOLDER, checked, fill
from sude_lab.runs.export import CARD, LORA_FILE, base_version, model_card
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.runs.regularizer import NAME, OwnRegularizer, load_regularizer
from sude_lab.runs.strength import Strength, split
from sude_lab.runs.trackers import Trackers
from sude_lab.tuning import Step

if TYPE_CHECKING:
    import pandas as pd

CONFIG, PICTURE, METRICS = "config.json", "picture.png", "metrics.csv"
SAMPLES, WEIGHTS, ENVIRONMENT = "samples.png", "weights", "environment.json"
CHECKPOINT = "checkpoint.pt"
LOGS, VALIDATION, KEPT = "logs", "validation", "kept"
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Run:
    """A finished run; a file of its folder that is not there or is damaged is a UserError."""

    folder: Path
    config: CompleteConfig
    strength: Strength = field(default_factory=Strength)
    """What of it is drawn."""

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Read a run's folder; RUN@25, RUN@scale=0.5: see `sude_lab.runs.strength`."""
        folder, strength = split(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not a run's folder: give the --out of `sude-lab tune`.")
        if not (folder / ENVIRONMENT).is_file():
            raise UserError(f"The run in {folder} is not finished: continue it with --resume.")
        run = cls(folder, read_config(folder / CONFIG), strength)
        step = strength.step
        if step and step != run.config.max_train_steps and not run._kept(step).is_dir():
            kept = [str(int(path.name)) for path in sorted(folder.glob(f"{KEPT}/[0-9]*"))]
            raise UserError(
                f"The run in {folder} did not keep the weights of step {step} (it has "
                f"{', '.join([*kept, str(run.config.max_train_steps)])}): tune it into another "
                f"folder with --keep-at {step}."
            )
        return run

    def __str__(self) -> str:
        """Return the folder, and the strength behind an @."""
        return f"{self.folder}@{self.strength}" if str(self.strength) else str(self.folder)

    def _kept(self, step: int) -> Path:
        return self.folder / KEPT / f"{step:06d}"

    def metrics(self) -> pd.DataFrame:
        """Return the steps, one row each."""
        import pandas as pd

        with explained(f"{self.folder / METRICS} is damaged", "tune again"):
            return pd.read_csv(self.folder / METRICS)

    @property
    def environment(self) -> dict[str, Any]:
        """What the run says of versions, device, time, and the kind of its model."""
        with explained(f"{self.folder / ENVIRONMENT} is damaged", "tune again"):
            return dict(read_json(self.folder / ENVIRONMENT))

    def picture(self, number: int = 0) -> Image.Image:
        """Return the picture of subject `number`, as the model saw it."""
        return open_picture(self.folder / picture_name(number))

    @property
    def weights(self) -> Path:
        """The folder of the weights of the run, or of the step that is drawn."""
        step = self.strength.step
        at_end = step in (None, self.config.max_train_steps)
        folder = self.folder / WEIGHTS if step is None or at_end else self._kept(step)
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder} has no safetensors, the only weights that are read: tune again."
            )
        return folder

    def load(
        self,
        device: str = "auto",
        backbone: Backbone | None = None,
        *,
        dtype: str | None = None,
        trust_backbone: bool = False,
    ) -> Backbone:
        """Open the backbone with the run's weights in it, or put them into an opened `backbone`.

        Args:
            backbone: The model, opened and untuned; None: the run's own is opened.
            dtype: The precision to draw in; None: the run's own.
            trust_backbone: Whether a model in the run's folder or beside it, which may have come
                along with the run, is opened.
        """
        weights, config, scale = self.weights, self.config, self.strength.scale
        if backbone is None:
            backbone = self.open_base(device, dtype=dtype, trust_backbone=trust_backbone)
        start = get_method(config.method).initializer
        starts = [start(config, k) for k in range(len(config.subjects))]
        load_weights(config.method, backbone, weights, scale=scale, initializers=starts)
        return backbone

    def open_base(
        self, device: str = "auto", *, dtype: str | None = None, trust_backbone: bool = False
    ) -> Backbone:
        """Open the model that the run was tuned on, as it was before; arguments as of `load`."""
        if not trust_backbone and _came_along(self.folder, self.config.backbone):
            raise UserError(
                f"The run in {self.folder} names as its model {self.config.backbone}, which may "
                "have come along with it: if you trust whoever made both, add --trust-backbone "
                "(in Python, trust_backbone=True)."
            )
        dtype = dtype or self.config.dtype
        return open_backbone(self.config.backbone, device=device, dtype=dtype)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words that stand for the subjects."""
        return tuple(subject.token for subject in self.config.subjects)

    def prompt(self, text: str) -> str:
        """Return `text` with {S*} (and {S*2}, ...) replaced by the subjects' tokens."""
        return filled(text, self.config)


def _is_folder(source: str) -> bool:
    """Whether a model's name is neither that of an included one nor a hub id."""
    return resolve_source(source) == source and hub_id(source) is None and bool(source.strip())


def _came_along(run: Path, source: str) -> bool:
    """Whether a model is a folder in that of a run, or beside it."""
    if not _is_folder(source):
        return False
    folder, run = Path(source).resolve(), run.resolve()
    # Whole paths are of this machine. What is not whole fits wherever a folder was unpacked.
    beside = folder.parent == run.parent or not Path(source).is_absolute()
    return folder.is_relative_to(run) or (beside and folder.is_relative_to(run.parent))


def picture_name(number: int) -> str:
    """Return the name of the file of subject `number`'s picture: picture.png, picture-2.png, ..."""
    return PICTURE if number == 0 else f"picture-{number + 1}.png"


def filled(text: str, config: TuningConfig) -> str:
    """Return a prompt with the subjects' tokens in place of {S*}, {S*2}, ..."""
    prompt = fill(checked(text), *(s.token for s in config.subjects))
    if unfilled := re.search(r"\{S\*\d*\}", prompt):
        raise UserError(
            f"The prompt {text[:200]!r} asks for {unfilled.group()}, but the run has "
            f"{len(config.subjects)} subject(s): the first is {PLACEHOLDER}."
        )
    return prompt


class Terminated(KeyboardInterrupt):
    """The system asked this process to end (SIGTERM), and its run is ready to be continued."""


@contextmanager
def _until_terminated() -> Iterator[Callable[[], bool]]:
    """Let a step be finished after SIGTERM; yields a function that says whether it came."""
    signals: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def launched(device: str) -> Any:
    """Return the Accelerator of the processes that a launcher started; None without one."""
    marks = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    if not any(name in os.environ for name in marks):
        return None
    from accelerate import Accelerator

    on_cpu = pick_device(device).type == "cpu"
    cure = "change what `accelerate config` or the flags of `accelerate launch` say"
    with explained("accelerate could not set the processes up", cure):
        return Accelerator(cpu=on_cpu)


def _alone(run: _Function) -> _Function:
    """Let one process at a time write a run's folder: of those launched together, the main one."""

    @wraps(run)
    def alone(config: TuningConfig, out: Path | str, **settings: Any) -> Run:
        if settings.get("resume") and not Path(out).exists():
            raise UserError(f"There is no run to resume in {out}: leave --resume out to start one.")
        writes = process_number() == 0 and not (Path(out) / ENVIRONMENT).is_file()
        with sole_writer(out, inside=True) if writes else nullcontext():
            return run(config, out, **settings)

    return cast(_Function, alone)


@_alone
def run_tuning(
    config: TuningConfig,
    out: Path | str,
    *,
    preset: str = "default",
    resume: bool = False,
    checkpoint_every: int = 100,
    keep_at: Sequence[int] = (),
    sample_prompts: str | Sequence[str] | None = None,
    num_samples: int = 4,
    validation_every: int = 0,
    validation_prompts: str | Sequence[str] | None = None,
    report_to: str = "tensorboard",
    backbone: Backbone | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
    label: str = "tuning",
) -> Run:
    """Tune on `config.image` and write the run's folder; with `resume` continue where it stopped.

    A resumed run ends with the same weights as an unbroken one. Under `accelerate launch` each
    process computes `train_batch_size` samples of a larger batch, and the main process alone
    writes, draws and tells.

    The settings are those of `sude-lab tune`, which says what they mean. `backbone` is the model
    that `config.backbone` names, opened; None: it is opened. `on_step` is called after every step,
    in every process; `label` is what the bar says.

    Raises:
        UserError: bad input (nothing is written then), another run in the folder, or a failure
            while tuning (the checkpoint stays).
    """
    check_whole("--checkpoint-every", checkpoint_every, 1)
    check_whole("--num-samples", num_samples, 0, 1000)  # drawn after hours of tuning
    check_whole("--validation-every", validation_every, 0)
    for number in keep_at:
        check_whole("--keep-at", number, 1)
    out = Path(out)
    if _is_folder(config.backbone):  # a run is opened from other working folders, too
        config = replace(config, backbone=os.path.abspath(config.backbone))
    trackers = Trackers(report_to)
    accelerator = launched(config.device)
    main = accelerator is None or accelerator.is_main_process
    processes = 1 if accelerator is None else accelerator.num_processes
    _check_folder(out, resume)
    if (out / ENVIRONMENT).is_file():
        if main:
            tqdm.write(f"The run in {out} is already finished.")
        return Run.open(out)
    # Bad input is found before the model is opened and before anything is written.
    for subject in config.subjects:
        load_picture(subject.image, resolution=64)
    regularizer = load_regularizer(config.regularizer_file)
    if validation_every and not num_samples:
        raise UserError("--validation-every draws --num-samples pictures a prompt: at least 1.")
    if backbone is None:
        backbone = _open_backbone(config, accelerator)
    else:
        _check_backbone(config, backbone)
    config = configure(config, backbone, preset=preset)
    total = config.max_train_steps
    if wrong := [step for step in keep_at if step > total]:
        raise UserError(
            f"--keep-at is {wrong[0]}, and the run has {total} steps: name earlier ones."
        )
    if config.class_images is not None and not config.prior_loss_weight:
        raise UserError("--class-images is of no use where --prior-loss-weight is 0: leave it out.")
    sampled, watched = (listed(p or ()) for p in (sample_prompts, validation_prompts))
    tuned_with = get_method(config.method).prompts(config)
    word = " ".join(["a"] * config.num_vectors)  # as many pieces as the subject's word has
    for prompt in (*tuned_with, *sampled, *watched):
        if rest := backbone.beyond_reach(fill(prompt, *(word for _ in config.subjects))):
            raise UserError(
                f"The prompt {prompt[:80]!r} is too long, the model leaves out {rest[:80]!r}: "
                "shorten it."
            )
    samples = [filled(p, config) for p in sampled or tuned_with]
    validated = [filled(p, config) for p in watched] or samples
    side = side_of(config, backbone)
    pictures = []
    for subject in config.subjects:
        picture = load_picture(subject.image, resolution=side)
        pictures.append(picture.image)
        for note in picture.notes if main else ():
            tqdm.write(note)

    state: dict[str, Any] | None = None
    rows: list[dict[str, float]] = []
    if resume and (out / CONFIG).is_file():
        _check_same(config, pictures, regularizer, out)
        if (out / CHECKPOINT).is_file():
            state = _read_checkpoint(out / CHECKPOINT)
            if not 0 < state["step"] < total:
                raise UserError(
                    f"{out / CHECKPOINT} is of step {state['step']} and the run has {total}: "
                    "delete it, and --resume starts anew."
                )
            rows = state.pop("rows")
            for past in keep_at:
                if past <= state["step"] and not (out / KEPT / f"{past:06d}").is_dir():
                    raise UserError(f"{out} is past step {past}: leave --keep-at {past} out.")
            if (begun := state.pop("processes", processes)) != processes:
                given = f"not {processes}"
                raise UserError(f"It was begun with {begun} process(es), {given}: use {begun}.")

    started = time.time()
    done = state["step"] if state else 0
    handed: dict[str, Any] = {"state": state, "accelerator": accelerator}
    # Before the bar: what is wrong with the settings shows here, and is one sentence then.
    with _naming_the_checkpoint(out):
        steps = prepared_tuning(config, backbone, pictures, regularizer=regularizer, **handed)
        first = next(steps)
    if main:
        remove_partials(out)
        if not done:
            _begin(out, config, pictures, regularizer)
        trackers.begin(out / LOGS, config, first.number)
    hidden = not (progress and main)
    bar = tqdm(total=total, initial=done, desc=label, unit="step", disable=hidden)
    try:
        with _naming_the_checkpoint(out), _until_terminated() as terminated, bar:
            for step in chain([first], steps):
                rows.append(step.row())
                bar.update()
                shown = {"loss": f"{rows[-1]['loss_subject']:.4f}"}
                if step.gate is not None:  # nobody asks in every step of a plain run
                    shown["gates"] = f"{rows[-1]['open_gates']:.2f}"
                bar.set_postfix(shown, refresh=False)
                if on_step:
                    on_step(step)
                last = step.number >= total
                if main:
                    trackers.log(rows[-1])
                    if step.number in keep_at and not last:
                        _keep_weights(out / KEPT / f"{step.number:06d}", step)
                    due = step.number % checkpoint_every == 0 or terminated()
                    if due and not last:
                        kept = {"rows": rows, "processes": processes}
                        with atomic_write(out / CHECKPOINT) as path:
                            torch.save(step.state_dict() | kept, path)
                if terminated() and not last:
                    raise Terminated
                if not main:
                    continue
                if validation_every and step.number % validation_every == 0:
                    file = out / VALIDATION / f"step-{step.number:06d}.png"
                    grid = _draw_grid(file, config, backbone, validated, num_samples)
                    trackers.picture(grid, step.number)
    finally:
        trackers.finish()
    if main:
        _keep_weights(out / WEIGHTS, step)
        with atomic_write(out / METRICS) as path:
            _write_rows(path, rows)
        if (lora := out / WEIGHTS / LORA_FILE).is_file():  # `load_lora_weights(out)` looks there
            write_file(out / LORA_FILE, lora.read_bytes())
        seconds = time.time() - started
        if num_samples:
            _draw_grid(out / SAMPLES, config, backbone, samples, num_samples, progress)
        grid_name = SAMPLES if num_samples else None
        card = model_card(config, backbone, out / WEIGHTS, samples, grid=grid_name)
        write_file(out / CARD, card)
        # Written last: its presence says that the run is finished.
        about = {"processes": processes, "seconds": round(seconds, 2), "steps": len(rows)}
        write_file(out / ENVIRONMENT, json.dumps(_environment(backbone) | about, indent=2))
        (out / CHECKPOINT).unlink(missing_ok=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return Run.open(out)


def _open_backbone(config: TuningConfig, accelerator: Any) -> Backbone:
    """Open the model where the launcher says, in the precision that the launcher says."""
    device, dtype = config.device, str(config.dtype)
    if accelerator is not None:
        if accelerator.num_processes > 1 or device == "auto":
            # accelerate numbers CPUs, too: cpu:0, cpu:1.
            device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
        if dtype == "auto":
            names = {"bf16": "bfloat16", "fp16": "float16"}
            dtype = names.get(accelerator.mixed_precision, "auto")
    return open_backbone(config.backbone, device=device, dtype=dtype)


def _check_backbone(config: TuningConfig, backbone: Backbone) -> None:
    """A run's config.json names its model: it must be the one that is tuned."""
    named, revision = hub_id(config.backbone) or (config.backbone, None)
    opened, at = hub_id(backbone.source) or (backbone.source, None)
    folders = {Path(resolve_source(source)).resolve() for source in (named, opened)}
    if len(folders) > 1 or (revision and revision not in (at, backbone.commit)):
        raise UserError(
            f"The settings name the backbone {config.backbone}, and {backbone.source} was handed "
            "in: set backbone in them to the one that is tuned."
        )


def _check_folder(out: Path, resume: bool) -> None:
    # What a process was killed at before it had written anything whole is no content.
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if any(name != LOCK and not name.startswith(PARTIAL) for name in names):
        if not (out / CONFIG).is_file():
            raise UserError(f"{out} is not empty and holds no run: choose another --out.")
        if not resume and (out / ENVIRONMENT).is_file():
            raise UserError(f"{out} already holds a finished run: choose another --out.")
        if not resume:
            raise UserError(f"{out} holds an unfinished run: continue it with --resume.")


# --- what a run began with -----------------------------------------------------------------------


def read_config(path: Path) -> CompleteConfig:
    """Return the settings in a run's config.json."""
    try:
        settings = read_settings(read_json(path))
        get_method(settings["method"])
        if any("\0" in str(settings.get(name)) for name in fields_of("place")):
            raise ValueError(path)
        return CompleteConfig(**settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path} is damaged, or of another version: {str(error)[:160].rstrip('.')}"
        raise UserError(f"{what}: open it with the version of sude_lab that wrote it.") from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    with explained(f"{path} is damaged", "delete it, and --resume starts anew"):
        state = torch.load(path, weights_only=True, map_location="cpu")
    kinds = {"step": int, "trained": dict, "optimizer": dict, "rows": list}
    whole = isinstance(state, dict) and all(type(state.get(n)) is k for n, k in kinds.items())
    if not whole:
        raise UserError(f"{path} is no checkpoint of this version: delete it, and --resume again.")
    return state


def _check_same(
    new: TuningConfig, pictures: list[Image.Image], own: OwnRegularizer | None, out: Path
) -> None:
    """The files may have moved; the settings and what the files hold must be the same."""
    old = read_config(out / CONFIG)
    for f in fields(TuningConfig):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if f.name == "more_subjects":
            before, now = ([(s.category, s.token) for s in c.subjects[1:]] for c in (old, new))
        if before != now and f.name not in ("image", "device", "regularizer_file"):
            raise UserError(
                f"{out} was started with --{flag(f.name)} {before}, not {now}: use that."
            )
    for number, (picture, subject) in enumerate(zip(pictures, new.subjects, strict=True)):
        kept = out / picture_name(number)  # not there where the run stopped between its first files
        if kept.is_file() and open_picture(kept).tobytes() != picture.tobytes():
            raise UserError(f"{out} was started on another picture than {subject.image}: use that.")
    kept = out / NAME
    other = own and kept.is_file() and kept.read_bytes() != own.source
    if other or (old.regularizer_file is None) != (own is None):
        raise UserError(
            f"The run in {out} was started with another --regularizer-file, or without one: resume "
            "it with the same, or choose another --out."
        )


def _begin(
    out: Path, config: TuningConfig, pictures: list[Image.Image], own: OwnRegularizer | None
) -> None:
    write_file(out / CONFIG, json.dumps(asdict(config), indent=2, default=str))
    for number, picture in enumerate(pictures):
        with atomic_write(out / picture_name(number)) as path:
            picture.save(path)
    if own:
        write_file(out / NAME, own.source)


# --- what is written and drawn -------------------------------------------------------------------


@contextmanager
def _naming_the_checkpoint(out: Path) -> Iterator[None]:
    """Say of what fails after a checkpoint that the run goes on from there."""
    try:
        yield
    except UserError as error:
        if not (out / CHECKPOINT).is_file():
            raise
        kept = f"{out / CHECKPOINT} is kept, so that --resume continues"
        raise UserError(f"{str(error).rstrip('.')}; {kept}.") from error


def _write_rows(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Write rows of numbers as CSV, as pandas does: what is no number is left empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if math.isnan(v) else v for k, v in row.items()} for row in rows)


def _keep_weights(folder: Path, step: Step) -> None:
    # A folder left by a run that was stopped at this very point is of no use: write it anew.
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as unfinished:
        save_weights(step.method, unfinished)


def _draw_grid(
    file: Path,
    config: TuningConfig,
    backbone: Backbone,
    prompts: Sequence[str],
    number: int,
    progress: bool = False,
) -> Image.Image:
    """Draw `number` pictures of every prompt into one file, a row a prompt; return it.

    In the midst of tuning, too: afterwards modes and the state of chance are as before.
    """
    images: list[Image.Image] = []
    bar = tqdm(prompts, desc="drawing samples", unit="prompt", disable=not progress)
    parts = [p for p in backbone.pipeline.components.values() if isinstance(p, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    cards = [backbone.device] if backbone.device.type == "cuda" else []
    failures = machine_failures(f" while {file.name} was drawn", "use a smaller --num-samples")
    with torch.random.fork_rng(devices=cards), failures:
        for part in parts:
            part.eval()
        try:
            for prompt in bar:
                images += generate(backbone, prompt, num_images=number, seed=config.seed)
        finally:
            for module in training:
                module.training = True
    from diffusers.utils import make_image_grid  # here: it takes longer to import than torch

    grid = make_image_grid(images, len(prompts), number)
    with atomic_write(file) as path:
        grid.save(path)
    return grid


def _environment(backbone: Backbone) -> dict[str, Any]:
    names = ("sude-lab", "torch", "diffusers", "transformers", "peft", "accelerate")
    versions = dict.fromkeys((*names, "safetensors", "pillow"), "not installed")
    for name in versions:
        with suppress(metadata.PackageNotFoundError):  # a checkout that was not installed
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **({"backbone_commit": backbone.commit} if backbone.commit else {}),
        "base_version": base_version(backbone),
        "device": str(backbone.device),
        "precision": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
