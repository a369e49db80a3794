"""A run's folder: configuration, picture, metrics, weights, sample grid; written whole; resumed.

    DIR/config.json        every setting, defaults filled in
    DIR/picture.png        the picture as the model saw it
    DIR/metrics.csv        one row a step
    DIR/samples.png        rows: prompts, columns: seeds
    DIR/weights/           safetensors
    DIR/environment.json   versions, device, seconds
While a run is under way the folder holds `config.json`, `picture.png` and `checkpoint.pt` alone.
"""

from __future__ import annotations

import json
import pickle
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone, open_backbone
from sude_lab.errors import UserError
from sude_lab.files import atomic_folder, atomic_write
from sude_lab.generation import generate
from sude_lab.methods import get_method
from sude_lab.pictures import load_picture
from sude_lab.prompts import fill
from sude_lab.tuning import Step, TuningConfig, resolve, tune

CONFIG, PICTURE, METRICS = "config.json", "picture.png", "metrics.csv"
SAMPLES, WEIGHTS, ENVIRONMENT, CHECKPOINT = (
    "samples.png",
    "weights",
    "environment.json",
    "checkpoint.pt",
)


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it."""

    folder: Path
    config: TuningConfig

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Read a run's folder.

        Raises:
            UserError: it is not a run's folder, or the run is not finished.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{folder} is not a run's folder: give the --out folder of `sude-lab tune`."
            )
        if not (folder / ENVIRONMENT).is_file():
            raise UserError(f"The run in {folder} is not finished: continue it with --resume.")
        return cls(folder, _read_config(folder / CONFIG))

    def metrics(self) -> pd.DataFrame:
        """Return the steps, one row each."""
        return pd.read_csv(self.folder / METRICS)

    def picture(self) -> Image.Image:
        """Return the picture the run was tuned on, as the model saw it."""
        return Image.open(self.folder / PICTURE).convert("RGB")

    def load(self, device: str = "auto") -> Backbone:
        """Open the backbone with the run's weights in it."""
        backbone = open_backbone(self.config.backbone, device=device, dtype=self.config.dtype)
        get_method(self.config.method).load(backbone, self.folder / WEIGHTS)
        return backbone

    def prompt(self, text: str) -> str:
        """Return `text` with {S*} replaced by the subject's token."""
        return fill(text, self.config.token)


def default_prompts(config: TuningConfig) -> list[str]:
    """Return the prompts of a run's sample grid: the one it was tuned with."""
    template = config.prompt or get_method(config.method).template
    return [template.replace("{category}", config.category)]


def run_tuning(
    config: TuningConfig,
    out: Path | str,
    *,
    resume: bool = False,
    checkpoint_every: int = 100,
    sample_prompts: list[str] | None = None,
    num_samples: int = 4,
    backbone: Backbone | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
    label: str = "tuning",
) -> Run:
    """Tune on `config.image` and write the run's folder; with `resume` continue where it stopped.

    A resumed run ends with the same weights as an unbroken one: what step k draws follows from
    (seed, k), and the checkpoint holds the trained tensors and the optimiser.

    Raises:
        UserError: bad input (nothing is written then), another run in the folder, or a failure
            while tuning (the checkpoint stays).
    """
    out = Path(out)
    _check_folder(out, resume)
    if (out / ENVIRONMENT).is_file():
        if resume:
            tqdm.write(f"The run in {out} is already finished.")
            return Run.open(out)
        raise UserError(f"{out} already holds a finished run: choose another --out.")
    # Bad input is found before the model is opened and before anything is written.
    load_picture(config.image, resolution=64)
    backbone = backbone or open_backbone(config.backbone, device=config.device, dtype=config.dtype)
    config = resolve(config, backbone)
    assert config.resolution is not None and config.max_train_steps is not None
    picture = load_picture(config.image, resolution=config.resolution)
    for note in picture.notes:
        tqdm.write(note)

    state, rows = None, []
    if resume and (out / CONFIG).is_file():
        _check_same(_read_config(out / CONFIG), config, out)
        _check_same_picture(picture.image, config.image, out)
        if (out / CHECKPOINT).is_file():
            state = _read_checkpoint(out / CHECKPOINT)
            rows = state.pop("rows")

    started = time.time()
    done = state["step"] if state else 0
    steps = tune(config, backbone, picture.image, state=state)
    # Before the bar: what is wrong with the settings shows here, and is one sentence then.
    first = next(steps)
    with tqdm(
        total=config.max_train_steps, initial=done, desc=label, unit="step", disable=not progress
    ) as bar:
        for step in chain([first], steps):
            if step.number == 1:
                _begin(out, config, picture.image)
            rows.append(step.row())
            bar.update()
            bar.set_postfix(
                loss=f"{rows[-1]['loss_subject']:.4f}",
                gates=f"{rows[-1]['open_gates']:.2f}",
                refresh=False,
            )
            if on_step:
                on_step(step)
            if step.number % checkpoint_every == 0 and step.number < config.max_train_steps:
                with atomic_write(out / CHECKPOINT) as path:
                    torch.save(step.state_dict() | {"rows": rows}, path)
    _keep_weights(out, step)
    with atomic_write(out / METRICS) as path:
        pd.DataFrame(rows).to_csv(path, index=False)
    seconds = time.time() - started
    _draw_samples(out, config, backbone, sample_prompts, num_samples, progress)
    # Written last: its presence says that the run is finished.
    with atomic_write(out / ENVIRONMENT) as path:
        path.write_text(json.dumps(_environment(backbone, seconds, rows), indent=2))
    (out / CHECKPOINT).unlink(missing_ok=True)
    return Run.open(out)


def _check_folder(out: Path, resume: bool) -> None:
    if out.is_file():
        raise UserError(f"{out} is a file: --out takes a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / CONFIG).is_file():
            raise UserError(
                f"The folder {out} is not empty and holds no run: choose another --out."
            )
        if not resume and not (out / ENVIRONMENT).is_file():
            raise UserError(f"{out} holds an unfinished run: continue it with --resume.")
    elif resume and not out.exists():
        raise UserError(f"There is no run to resume in {out}: leave --resume out to start one.")


def _read_config(path: Path) -> TuningConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(TuningConfig)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UserError(f"{path} has the unknown setting {unknown[0]!r}.")
        return TuningConfig(**values | {"image": Path(values["image"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a run's configuration: the file is damaged.") from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged: delete it, and --resume starts anew.") from error


def _check_same(old: TuningConfig, new: TuningConfig, out: Path) -> None:
    for f in fields(TuningConfig):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if before != now and f.name not in ("image", "device"):
            flag = f.name.replace("_", "-")
            raise UserError(
                f"The run in {out} was started with --{flag} {before}, not {now}: resume it with "
                "the same settings, or choose another --out."
            )


def _check_same_picture(picture: Image.Image, source: Path, out: Path) -> None:
    """The file may have moved; what it shows must be what the run began with."""
    if not (out / PICTURE).is_file():  # stopped between the first two files
        return
    with Image.open(out / PICTURE) as begun:
        same = begun.convert("RGB").tobytes() == picture.tobytes()
    if not same:
        raise UserError(
            f"The run in {out} was started on another picture than {source}: resume it with that "
            "one, or choose another --out."
        )


def _begin(out: Path, config: TuningConfig, picture: Image.Image) -> None:
    with atomic_write(out / CONFIG) as path:
        path.write_text(json.dumps(asdict(config), indent=2, default=str), encoding="utf-8")
    with atomic_write(out / PICTURE) as path:
        picture.save(path)


def _keep_weights(out: Path, step: Step) -> None:
    # A folder left by a run that was stopped at this very point is of no use: write it anew.
    shutil.rmtree(out / WEIGHTS, ignore_errors=True)
    with atomic_folder(out / WEIGHTS) as folder:
        step.method.save(folder)


def _draw_samples(
    out: Path,
    config: TuningConfig,
    backbone: Backbone,
    prompts: list[str] | None,
    number: int,
    progress: bool,
) -> None:
    if not number:
        return
    rows = prompts if prompts is not None else default_prompts(config)
    images = [
        image
        for prompt in tqdm(rows, desc="drawing samples", unit="prompt", disable=not progress)
        for image in generate(
            backbone, fill(prompt, config.token), num_images=number, seed=config.seed
        )
    ]
    with atomic_write(out / SAMPLES) as path:
        make_image_grid(images, len(rows), number).save(path)


def _environment(
    backbone: Backbone, seconds: float, rows: list[dict[str, float]]
) -> dict[str, Any]:
    names = ("sude-lab", "torch", "diffusers", "transformers", "peft", "safetensors", "pillow")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that was not installed
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(backbone.device),
        "precision": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "steps": len(rows),
        "versions": versions,
    }
