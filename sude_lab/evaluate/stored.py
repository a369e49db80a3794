"""Stored results, `data/results/*`, as lessons read them; `studies/` makes them.

read("w_s")     the rows of a study, a row a picture
table("fig4")   a table of the paper on the embedded world, as `studies.tables` makes it of them
"""

from __future__ import annotations

import pandas as pd

from sude_lab.errors import UserError
from sude_lab.io.opening import data_folder

RESULTS = data_folder() / "results"


def read(name: str) -> pd.DataFrame:
    """Return the stored rows of a study."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run its experiment without --no-run.")
    return pd.read_csv(path)


def table(name: str) -> pd.DataFrame:
    """Return the first table of `data/results/NAME.md`, whose cells are words."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("\n\n") if part.startswith("|"))
    names, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
    )
    return pd.DataFrame(rows, columns=names)


def edits(table: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute."""
    return table[table["attribute"].fillna("") != ""]


def truncation() -> pd.DataFrame:
    """Return the rows of Fig. 5: with, without and with other thresholds, plain tuning as well."""
    names = {
        "weight_sude=0": "plain",
        "weight_sude=2": "SuDe, stops at rho = 1",
        "truncate_at=0.5": "SuDe, stops at rho = 0.5",
        "truncate_at=1.5": "SuDe, stops at rho = 1.5",
        "truncate=false": "never stops",
        "prior=current": "stops at rho = 1, prior current",
        "prior=current,truncate=false": "never stops, prior current",
    }
    rows = edits(read("truncation")).groupby("variant")
    return pd.concat([rows.get_group(v).assign(variant=name) for v, name in names.items()])
