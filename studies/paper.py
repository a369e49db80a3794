"""The paper's tables and figures, repeated on the embedded world: one command each.

    python -m studies.paper fig4

runs what is still missing of its grids (on every core; it may be stopped and given again), keeps
the rows in `data/results/*.csv` with strips of pictures beside them (`studies.runs`), and writes
`fig4.md`. With `--no-run` it only writes the table anew; `--help` lists the names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro

from studies import runs, tables
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper: the studies it needs, and the table made of them."""

    title: str
    studies: tuple[str, ...]
    table: Callable[[], pd.DataFrame]


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: methods, with SuDe at 0.5, 1, 2 w_s and the best of them (gain in alignment)",
        ("held_out", "methods_w_s", "w_s"),
        tables.table1,
    ),
    "table2": Experiment("Table 2: prompts P1, P2, P3", ("prompts",), tables.table2),
    "fig4": Experiment("Fig. 4: w_s", ("w_s",), tables.fig4),
    "fig5": Experiment("Fig. 5: truncation", ("truncation", "collapse"), tables.fig5),
    "fig6": Experiment("Fig. 6: attribute and background", ("prompts",), tables.fig6),
    "fig8": Experiment(
        "Fig. 8: class images against SuDe", ("prompts", "class_images"), tables.fig8
    ),
    "claims": Experiment(
        "What the paper claims, and what these studies say of it (`studies.tables.claims`)",
        ("held_out", "w_s", "truncation", "prompts", "class_images"),
        tables.claims,
    ),
}


@dataclass(frozen=True)
class PaperConfig:
    """Which table or figure of the paper to repeat on the embedded world."""

    name: Annotated[
        Literal["table1", "table2", "fig4", "fig5", "fig6", "fig8", "claims"], tyro.conf.Positional
    ]
    run: bool = True
    """Run what is missing of its grids first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""
    out: Path = runs.SWEEPS
    """Folder in which its grids are swept."""


def main(config: PaperConfig) -> None:
    """Run what is missing, write the table beside the results and print it."""
    experiment = EXPERIMENTS[config.name]
    for study in experiment.studies if config.run else ():
        runs.main(runs.RunsConfig(study, workers=config.workers, out=config.out))
    text = experiment.table().to_markdown(index=False, disable_numparse=True)
    with atomic_write(RESULTS / f"{config.name}.md") as path:
        path.write_text(f"{experiment.title}\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(PaperConfig))
