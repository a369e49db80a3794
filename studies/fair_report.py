"""What the comparisons registered in data/grids (fair.md and others) say, and their figures.

    python -m studies.fair_report                      data/results/fair.md and fair.png
    python -m studies.fair_report --on development     of the subjects that chose the settings
    python -m studies.fair_report --on confirm         of the new ones that decide
    python -m studies.fair_report --on flow            flow.md and flow.png: all weights, then LoRA
    python -m studies.fair_report --on others          three more methods
    python -m studies.fair_report --on preservation    class images, and ClassDiffusion's term

It reads what `python -m studies.fair` kept. Lines, fidelities and contrasts are those of
`studies.registered`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import tyro

from studies.registered import FAMILIES, FAMILIES_OF, GROUPS, HIGHER, LINES, PARTS, On
from sude_lab.evaluate import fronts
from sude_lab.evaluate.fronts import POINT, Line
from sude_lab.evaluate.stored import RESULTS, read
from sude_lab.io.files import atomic_write


def lines_of(table: pd.DataFrame, hull: bool = False) -> dict[str, Line]:
    """Return the lines of a table of `studies.fair`, as far as their runs are there."""
    table = table.assign(point=fronts.points(table))
    rows = {name: table.query(asked, engine="python") for name, asked in LINES.items()}
    made = {n: fronts.line(n, r, "point") for n, r in rows.items() if r["point"].nunique() > 1}
    return {n: fronts.hull_of(one) if hull else one for n, one in made.items()}


def asks(table: pd.DataFrame) -> pd.Series:
    """Return the passes of a picture through the UNet in a step of each row.

    One in a plain step, two more where SuDe asks (ClassDiffusion's term asks text alone), one more
    with class images; the drawing of either is not in it.
    """
    every = table["variant"].str.extract(r"sude_every (\d+)")[0].astype(float).fillna(1)
    asks_sude = table["variant"].str.startswith("SuDe")
    return 1 + 2 / every * asks_sude + table["arm"].str.contains("class_images")


def other_rows(
    lines: dict[str, Line],
    other: dict[str, Line],
    pairs: Sequence[tuple[str, str]],
    shares: Sequence[float],
    what: str = "category",
) -> list[dict[str, Any]]:
    """Return contrasts of the alignment with something else, at the same strengths."""
    rows = []
    for a, b in pairs if all(name in lines for pair in pairs for name in pair) else ():
        end = lines[b].fidelity[:, lines[b].strengths.index(fronts.END)]
        of = other[a].alignment, other[b].alignment
        for share in shares:
            gain = fronts.gain_at(lines[a], lines[b], share * end, of=of)
            about = {"arm": f"{a}: {what}", "against": b, "fidelity": f"{share:g}"}
            rows.append(about | {"gain": gain, "p": gain.p, "sign flip": math.nan})
    return rows


def parts_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of every part that is there, all weights first, with points named alike."""
    start = table["arm"].str.extract(f"^({'|'.join(PARTS)})")[0].fillna("")
    return {
        ({"": ""} | PARTS)[key]: rows.assign(
            arm=rows["arm"].str.removeprefix(key),
            settings=rows["settings"].str.replace(r"^\w+", "dreambooth", regex=True),  # as of END
        )
        for key, rows in table.groupby(start, sort=False)
    }


@dataclass(frozen=True)
class ReportConfig:
    """Whose table to read."""

    on: On = "held-out"


def main(config: ReportConfig) -> str:
    """Write the contrasts as Markdown, and the figure; return the text."""
    group = GROUPS[config.on]
    table = read(group.table).fillna({"strength": ""})
    command, number = f"python -m studies.fair_report --on {config.on}", table["subject"].nunique()
    texts = [f"Made by `{command}` as data/grids/{group.page}.md says; {number} subjects."]
    families = FAMILIES_OF.get(config.on.removesuffix("-development"), FAMILIES)
    parts: dict[str, dict[str, Line]] = {}
    contrasts: dict[str, list[dict[str, Any]]] = {}
    sections: dict[str, pd.DataFrame] = {}
    for part, rows in parts_of(table).items():
        lines = parts[part] = lines_of(rows, group.hull)
        other_way = ", read on the " + ("front" if group.hull else "hull") + " (exploration)"
        others = {
            what: lines_of(rows.assign(attribute_alignment=rows[f"{what}_alignment"]))
            for what in ("category", "background")
            if f"{what}_alignment" in rows
        }
        readings = [("", one, lines) for one in families]
        again = lines_of(rows, not group.hull)
        readings += [(other_way, one, again) for one in families if one.title.endswith("rimary")]
        for how, (title, pairs, shares, of_others), here in readings:
            shares = shares or group.shares
            there = [(here[a], here[b]) for a, b in pairs if a in here and b in here]
            whole = here["less tuning"]
            found = [row for a, b in there for row in fronts.contrast(a, b, whole, shares)]
            for what, other in others.items():
                found += other_rows(here, other, of_others, shares, what)
            together = families is not FAMILIES
            title, arm = (title, part) if together else (f"{part}{title}", "")
            of_title = contrasts.setdefault(title := f"## {title} contrasts{how}", [])
            of_title += [row | {"arm": f"{arm}{row['arm']}"} for row in found]
            sections[title] = fronts.family(here, [], of_title)
        read_at = sorted({*group.shares, *HIGHER})
        at = fronts.places(lines, others["category"], rows, asks(rows), read_at)
        sections[f"## {part}Where the lines are read"] = at
    for title, shown in sections.items():
        texts += [] if shown.empty else [title, fronts.as_markdown(shown)]
    groups = table.groupby(POINT, sort=False)
    means = groups[["subject_fidelity", "attribute_alignment", "category_alignment"]].mean()
    means["subjects"] = groups["subject"].nunique()
    texts += [
        "## Every point, means over the subjects",
        means.round(3).reset_index().to_markdown(index=False),
    ]
    text = "\n\n".join(texts) + "\n"
    with atomic_write(RESULTS / f"{group.table}.md") as path:
        path.write_text(text, encoding="utf-8")
    shown_as = {"": "all weights"} if len(parts) > 1 else {}
    named = {shown_as.get(part, part): lines for part, lines in parts.items()}
    fronts.draw(RESULTS / f"{group.table}.png", named, group.shares)
    return text


if __name__ == "__main__":
    print(main(tyro.cli(ReportConfig)))
