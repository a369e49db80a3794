"""The trackers of a run: TensorBoard, wandb and whatever else accelerate knows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sude_lab.config import TuningConfig
from sude_lab.errors import UserError, explained


class Trackers:
    """The trackers of a run, by accelerate's names and classes; nothing is imported for none."""

    def __init__(self, report_to: str) -> None:
        self.kinds: list[Any] = []
        self.begun: list[Any] = []
        if report_to == "none":
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType

        if report_to not in (choices := ("none", "all", *LOGGER_TYPE_TO_CLASS)):
            choose = f"choose --report-to among {', '.join(choices)}"
            raise UserError(f"There is no tracker {report_to!r}: {choose}.")
        # Not accelerate's `filter_trackers`: of a missing one it tells an Accelerator, if there is.
        here = [str(name) for name in get_available_trackers()]
        names = here if report_to == "all" else [report_to]
        if not names or report_to in {*map(str, LoggerType)} - {*here, "all"}:
            cure = f"pip install {report_to}, or use --report-to none"
            raise UserError(f"No {report_to} here: {cure}.")
        self.kinds = [LOGGER_TYPE_TO_CLASS[name] for name in names]

    def begin(self, folder: Path, config: TuningConfig, first: int) -> None:
        """Start the trackers; what they write on this machine goes into `folder`."""
        own: dict[str, dict[str, Any]] = {
            # What was logged after the checkpoint of a run that is resumed is hidden.
            "tensorboard": {"purge_step": first},
            "wandb": {"dir": str(folder), "name": folder.parent.name},
        }
        plain = (bool, int, float, str)
        settings = {k: v if isinstance(v, plain) else str(v) for k, v in asdict(config).items()}
        for kind in self.kinds:
            folder.mkdir(exist_ok=True)
            where = [str(folder)] if kind.requires_logging_directory else []
            cure = "set it up, or --resume with --report-to none"
            with explained(f"The tracker {kind.name} could not be started", cure):
                tracker = kind("sude_lab", *where, **own.get(kind.name, {}))
                tracker.start()
                tracker.store_init_configuration(settings)
            self.begun.append(tracker)

    def log(self, row: dict[str, float]) -> None:
        """Log one step."""
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker in self.begun:
            tracker.log(values, step=int(row["step"]))

    def picture(self, grid: Image.Image, step: int) -> None:
        """Show a validation grid, where the tracker can."""
        for tracker in self.begun:
            if tracker.name == "tensorboard":
                batch = np.asarray(grid)[None]
                tracker.log_images({"validation": batch}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [grid]}, step=step)

    def finish(self) -> None:
        """Let the trackers write what they still hold."""
        for tracker in self.begun:
            tracker.finish()
