"""Does a subject's own run say when to stop? A rule without an oracle (exploration, fair.md).

    python -m studies.stopping      data/results/stopping.csv

Runs of `python -m studies.fair --on development` kept their weights on the way. A rule stops a
subject's run where the running mean of a signal that the run sees (L_sub, the share of open gates)
first lies below a level. What that gives is compared with one number of steps for all subjects,
the best aligned one whose mean fidelity is at least the same: is there a gain of alignment in
stopping each subject by its own signal?
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro

from studies.runs import STEPS, SWEEPS
from sude_lab.evaluate.fronts import ALIGNMENT, FIDELITY
from sude_lab.evaluate.statistics import mean_interval
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.sweep.bench import subject_rows
from sude_lab.sweep.sweep import RESULTS as TABLE

PLAIN, SUDE = ("plain", "rate"), ("sude", "sude_rate")
SIGNALS = [*product(("loss_subject",), PLAIN + SUDE), *product(("open_gates",), SUDE)]
LEVELS = (0.8, 0.6, 0.4, 0.2)
"""Quantiles of the signal over all runs of the arm, so that every level stops some of them."""
SPAN = 20
"""Steps of the running (exponential) mean."""


class Way(NamedTuple):
    """One subject's way through its steps."""

    steps: np.ndarray
    """(K,) kept steps, rising."""
    values: np.ndarray
    """(K, 2) fidelity and alignment there."""
    signal: np.ndarray
    """(T,) the running mean after every step."""

    def at(self, step: int) -> np.ndarray:
        """Return fidelity and alignment after a step, linear in its logarithm."""
        kept = np.log(self.steps)
        return np.array([np.interp(np.log(step), kept, column) for column in self.values.T])

    def stop(self, level: float) -> int:
        """Return the first step, from the first kept one on, whose signal lies below the level."""
        first = int(self.steps[0])
        below = np.flatnonzero(self.signal[first - 1 :] < level)
        return first + int(below[0]) if len(below) else len(self.signal)


def ways(arm: str, signal: str, out: Path) -> list[Way]:
    """Return every subject's way in an arm: plain tuning's, or SuDe's with w_s 1."""
    folder = out / "fair" / "development" / arm
    rows = subject_rows(arm, folder).query("w_s in (0, 1)")
    rows = rows[rows["strength"].eq("") | rows["strength"].str.isdigit()]
    rows = rows.assign(step=rows["strength"].replace("", str(STEPS)).astype(int))
    named = pd.read_parquet(folder / TABLE, columns=["subject", "w_s", "run"]).drop_duplicates()
    keys = named.set_index(["subject", "w_s"])["run"].to_dict()
    found = []
    for key, points in rows.sort_values("step").groupby(["subject", "w_s"]):
        metrics = pd.read_csv(out / "fair" / "runs" / keys[key] / "metrics.csv")
        running = metrics[signal].ewm(span=SPAN).mean().to_numpy()
        values = points[[FIDELITY, ALIGNMENT]].to_numpy()
        found.append(Way(points["step"].to_numpy(), values, running))
    return found


def compared(one_each: list[Way], level: float) -> dict[str, object]:
    """Return what the rule gives, what one number of steps gives, and the gain of alignment."""
    stops = [way.stop(level) for way in one_each]
    ruled = np.stack([way.at(step) for way, step in zip(one_each, stops, strict=True)])
    steps = np.arange(one_each[0].steps[0], STEPS + 1)
    common = np.stack([[way.at(step) for way in one_each] for step in steps])
    means = common.mean(1)
    enough = means[:, 0] >= ruled[:, 0].mean() - 1e-9
    row: dict[str, object] = {"stops": f"{min(stops)} to {max(stops)}"}
    row |= {"fidelity": ruled[:, 0].mean(), "alignment": ruled[:, 1].mean()}
    if not enough.any():  # no number of steps keeps as much
        return row
    best = int(np.where(enough, means[:, 1], -1).argmax())
    gain = mean_interval(ruled[:, 1] - common[best, :, 1])
    row |= {"steps": steps[best], "their fidelity": means[best, 0]}
    return row | {"their alignment": means[best, 1], "gain": gain.words("+.3f")}


@dataclass(frozen=True)
class StoppingConfig:
    """Where the sweeps are."""

    out: Path = SWEEPS


def main(config: StoppingConfig) -> pd.DataFrame:
    """Keep a row a signal, arm and level."""
    rows = []
    for signal, arm in SIGNALS:
        found = ways(arm, signal, config.out)
        seen = np.concatenate([way.signal[way.steps[0] - 1 :] for way in found])
        for quantile in LEVELS:
            level = float(np.quantile(seen, quantile))
            row = {"arm": arm, "signal": signal, "level": level, "subjects": len(found)}
            rows.append(row | compared(found, level))
    table = pd.DataFrame(rows).round(4)
    with atomic_write(RESULTS / "stopping.csv") as path:
        table.to_csv(path, index=False)
    return table


if __name__ == "__main__":
    print(main(tyro.cli(StoppingConfig)).to_string(index=False))
