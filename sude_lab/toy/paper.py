"""The paper's tables and figures, repeated on the embedded world: one command each.

    python -m sude_lab.toy.paper fig4

runs what is still missing of its studies (on every core; it may be stopped and given again), keeps
the rows in `data/results/*.csv` with strips of pictures beside them, and writes `fig4.md`. With
`--no-run` it only writes the table anew. `python -m sude_lab.toy.paper --help` lists them.

The subjects are those of the held-out study, fixed before anything was seen. Intervals are 95 %
bootstrap intervals over subjects; gains are paired (same subject, same seed).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pandas as pd
import tyro

from sude_lab.backbone import data_folder
from sude_lab.errors import UserError
from sude_lab.files import atomic_write
from sude_lab.metrics import MEASURES, bootstrap_interval, gains
from sude_lab.toy.study import StudyConfig, run_study

RESULTS = data_folder() / "results"
SUBJECTS = (0, 1, 2, 5, 7)
ALIGNMENT, FIDELITY, CATEGORY = MEASURES
BACKGROUND = "background_alignment"
FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""The paper's multiples of w_s."""
WEIGHTS = {"dreambooth": 2.0, "custom_diffusion": 2.0, "vico": 1.5, "textual_inversion": 1.0}
"""w_s of the methods on the embedded model when these studies were made."""


def _study(out: str, *methods: str, **settings: Any) -> StudyConfig:
    given: dict[str, Any] = {"subjects": "held-out", "numbers": SUBJECTS} | settings
    return StudyConfig(out=RESULTS / f"{out}.csv", pictures=RESULTS / out, methods=methods, **given)


def _weights(method: str, factors: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"weight_sude={factor * WEIGHTS[method]:g}" for factor in factors)


_W_S = _study("w_s", "dreambooth", variants=_weights("dreambooth", FACTORS))
# The second seed of 0 and 1 w_s is that of the held-out study: the same runs, number by number.
_W_S_AGAIN = replace(_W_S, variants=_weights("dreambooth", (0.5, 2.0, 4.0)), num_seeds=2)
_OTHERS = tuple(
    _study("methods_w_s", method, variants=_weights(method, (0.5, 2.0)))
    for method in ("custom_diffusion", "vico")
)
_HELD_OUT = replace(
    _study("held_out", *WEIGHTS, variants=("plain", "sude"), num_seeds=3), pictures=None
)
_PROMPTS = _study(
    "prompts",
    "dreambooth",
    variants=("plain", "sude"),
    num_images=4,
    asks=("P1", "P2", "P3", "background", "attribute and background"),
)
_CLASS_IMAGES = _study(
    "class_images",
    "dreambooth",
    variants=("prior_loss_weight=1,weight_sude=0", "prior_loss_weight=1"),
    num_images=4,
    asks=("P1", "background"),
)
UNTRUNCATED = ("truncate=false", "prior=current,truncate=false")
_TRUNCATION = _study(
    "truncation",
    "dreambooth",
    variants=(*UNTRUNCATED, "prior=current", "truncate_at=0.5", "truncate_at=1.5"),
)
_COLLAPSE = replace(
    _TRUNCATION,
    numbers=(0, 1),
    variants=tuple(
        f"{settings}max_train_steps={steps}"
        for settings in ("", "prior=current,truncate=false,")
        for steps in (50, 100)
    ),
)


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper: what to run, and the table that comes of it."""

    title: str
    studies: tuple[StudyConfig, ...]
    table: Callable[[], pd.DataFrame]


def read(name: str) -> pd.DataFrame:
    """Return the stored rows of a study.

    Raises:
        UserError: it has not been run.
    """
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run its experiment without --no-run.")
    table = pd.read_csv(path)
    return table[table["error"].isna()] if "error" in table else table


def by_factor(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute, with `factor`: w_s over its default."""
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[rows["attribute"].fillna("") != ""]
    factor = rows["weight_sude"] / rows["method"].map(WEIGHTS)
    rows = rows.assign(factor=factor.round(4), variant=factor.map("{:g} w_s".format))
    return rows.drop_duplicates(["method", "subject", "seed", "factor", "attribute", "image"])


def dosed() -> pd.DataFrame:
    """Return the rows of Fig. 4: DreamBooth at every multiple of w_s, two seeds."""
    held_out = read("held_out")
    held_out = held_out[(held_out["method"] == "dreambooth") & (held_out["seed"] < 2)]
    return by_factor(read("w_s"), held_out).sort_values("factor", kind="stable")


def against(
    table: pd.DataFrame, base: str, measures: Sequence[str], *, by: Sequence[str] = ("method",)
) -> pd.DataFrame:
    """Return a row a (`by`, variant) in words: every measure's mean, and its gain over `base`."""
    told = gains(table, measures, by=by, against=base)
    rows = []
    for names, group in told.groupby([*by, "variant"], sort=False):
        line = dict(zip([*by, "variant"], names, strict=True))
        for row in group.to_dict("records"):
            text = f"{row['mean']:.2f}"
            if row["gain"] == row["gain"]:
                text += f" ({row['gain']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}])"
            line[str(row["measure"]).replace("_", " ")] = text
        rows.append(line | {"runs": f"{group['subjects'].iloc[0]} x {_seeds(group)}"})
    return pd.DataFrame(rows)


def _seeds(group: pd.DataFrame) -> int:
    return int(group["runs"].iloc[0] // group["subjects"].iloc[0])


def best_factors(table: pd.DataFrame, measure: str = ALIGNMENT) -> pd.DataFrame:
    """Return a row a (method, subject): the gain at each factor, at the best, at the others' best.

    `best` is the largest gain of 0.5, 1 and 2 w_s, chosen on the very pictures that it is measured
    on: it flatters. `chosen by the others` takes the factor with the highest mean gain over the
    *other* subjects.
    """
    runs = table.groupby(["method", "subject", "factor"])[measure].mean().unstack("factor")
    gain = runs[[0.5, 1.0, 2.0]].sub(runs[0.0], axis=0)
    rows = []
    for (method, subject), line in gain.iterrows():
        others = gain.loc[method].drop(subject).mean()
        rows.append(
            {"method": method, "subject": subject}
            | {f"{factor:g} w_s": line[factor] for factor in gain.columns}
            | {"best": line.max(), "chosen by the others": line[others.idxmax()]}
        )
    return pd.DataFrame(rows)


def table1() -> pd.DataFrame:
    """Return Table 1: its methods, plain, and the gain of SuDe at 0.5, 1, 2 w_s and their best."""
    others = [read("methods_w_s"), _first_seed("w_s")]
    held_out = read("held_out")
    swept = held_out["method"].isin(pd.concat(others)["method"])
    rows = by_factor(held_out[swept & (held_out["seed"] == 0)], *others)
    plain = rows[rows["factor"] == 0].groupby("method")[ALIGNMENT].mean()
    lines = []
    for method, group in best_factors(rows).groupby("method", sort=False):
        line = {"method": str(method).replace("_", " "), "plain": f"{plain[method]:.2f}"}
        for name in group.columns[2:]:
            low, high = bootstrap_interval(group[name].to_numpy())
            line[name] = f"{group[name].mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    return pd.DataFrame(lines)


def fig4() -> pd.DataFrame:
    """Return Fig. 4: alignment, fidelity and category over the multiples of w_s."""
    return against(dosed(), "0 w_s", MEASURES)


def truncation() -> pd.DataFrame:
    """Return the rows of Fig. 5: with, without and with other thresholds, plain tuning as well."""
    w_s = _first_seed("w_s")
    names = {0.0: "plain", WEIGHTS["dreambooth"]: "SuDe, stops at rho = 1"}
    rows = w_s[w_s["weight_sude"].isin(names)]
    rows = rows.assign(variant=rows["weight_sude"].map(names))
    told = {
        "truncate_at=0.5": "SuDe, stops at rho = 0.5",
        "truncate_at=1.5": "SuDe, stops at rho = 1.5",
        "truncate=false": "never stops",
        "prior=current": "stops at rho = 1, prior current",
        "prior=current,truncate=false": "never stops, prior current",
    }
    others = read("truncation")
    others = others[others["variant"].isin(told)]
    rows = pd.concat([rows, others.assign(variant=others["variant"].map(told))], ignore_index=True)
    order = {name: k for k, name in enumerate(["plain", *names.values(), *told.values()])}
    rows = rows[rows["attribute"].fillna("") != ""]
    return rows.sort_values("variant", key=lambda v: v.map(order), kind="stable")


def fig5() -> pd.DataFrame:
    """Return Fig. 5: what the truncation is for."""
    return against(truncation(), "plain", MEASURES)


def collapse() -> pd.DataFrame:
    """Return the pictures of new attributes after 50, 100 and 200 steps, truncated and not."""
    w_s, others = _first_seed("w_s"), read("truncation")
    rows = pd.concat(
        [
            w_s[w_s["weight_sude"] == WEIGHTS["dreambooth"]].assign(run="stops at rho = 1"),
            others[others["variant"].str.startswith("max_train_steps")].assign(
                run="stops at rho = 1"
            ),
            others[others["variant"].str.startswith("prior=current,truncate=false")].assign(
                run="never stops, prior current"
            ),
        ],
        ignore_index=True,
    )
    few = set(others.loc[others["steps"] == 50, "subject"])
    return rows[rows["subject"].isin(few) & (rows["attribute"].fillna("") != "")]


def asked(*names: str) -> pd.DataFrame:
    """Return the rows of the study of prompts for these asks."""
    rows = read("prompts")
    return rows[rows["ask"].isin(names)]


def table2() -> pd.DataFrame:
    """Return Table 2: three ways to ask for an attribute, plain and with SuDe."""
    return against(asked("P1", "P2", "P3"), "plain", MEASURES, by=("ask",))


def fig6() -> pd.DataFrame:
    """Return Fig. 6: an attribute and a background asked for at once; `both` multiplies the two."""
    rows = asked("attribute and background")
    rows = rows.assign(both=rows[ALIGNMENT] * rows[BACKGROUND])
    return against(rows, "plain", (ALIGNMENT, BACKGROUND, "both", FIDELITY), by=("ask",))


def class_images() -> pd.DataFrame:
    """Return the rows of Fig. 8: attributes (P1) and backgrounds, with class images, SuDe, both."""
    told = {
        "prior_loss_weight=1,weight_sude=0": "class images",
        "prior_loss_weight=1": "SuDe and class images",
    }
    others = read("class_images")
    rows = asked("P1", "background")
    rows = pd.concat([rows, others.assign(variant=others["variant"].map(told))], ignore_index=True)
    aimed = rows[ALIGNMENT].where(rows["ask"] == "P1", rows[BACKGROUND])
    order = ["plain", "class images", "sude", "SuDe and class images"]
    rows = rows.assign(alignment=aimed, edit=rows["ask"].replace({"P1": "attribute"}))
    return rows.sort_values("variant", key=lambda v: v.map(order.index), kind="stable")


def fig8() -> pd.DataFrame:
    """Return Fig. 8: class-image regularisation (eq. 14) against SuDe, by what is edited."""
    return against(class_images(), "plain", ("alignment", FIDELITY), by=("edit",))


def claims() -> pd.DataFrame:
    """Return what the paper claims, what it reports on Stable Diffusion, and what is seen here.

    `agrees` is yes or no where the 95 % interval over subjects lies on one side of 0 (for "holds",
    within 0.05 of 0, or below 0), and "cannot tell" elsewhere. The paper's numbers are BLIP-T
    points of real photographs, ours are probabilities of a drawn world's oracle: only signs and
    order can be compared.
    """
    held_out = read("held_out")
    held_out = held_out[held_out["attribute"].fillna("") != ""]
    rows = []
    for method, name, reported in (
        ("vico", "ViCo", "+4.2 / +2.6"),
        ("custom_diffusion", "Custom Diffusion", "+0.9 / +2.0"),
        ("dreambooth", "DreamBooth", "+1.2 / +1.5"),
    ):
        mine = held_out[held_out["method"] == method]
        change = _change(mine, "plain", "sude", ALIGNMENT)
        rows.append(("Table 1", f"SuDe raises alignment: {name}", reported, *change))
        change = _change(mine, "plain", "sude", FIDELITY, holds=True)
        rows.append(("Table 1", f"fidelity holds: {name}", "slight fluctuation", *change))
    w_s = dosed()
    for claim, reported, a, b, measure, holds in (
        ("2 w_s raises alignment over 1 w_s", "more with more", 1, 2, ALIGNMENT, False),
        ("4 w_s raises alignment over 1 w_s", "more with more", 1, 4, ALIGNMENT, False),
        ("fidelity holds at 2 w_s", "holds", 0, 2, FIDELITY, True),
    ):
        change = _change(w_s, f"{a} w_s", f"{b} w_s", measure, holds=holds)
        rows.append(("Fig. 4", claim, reported, *change))
    change = _change(w_s, "4 w_s", "1 w_s", FIDELITY)
    rows.append(("Fig. 4", "at 4 w_s fidelity is below 1 w_s", "lost for a bowl", *change))
    stops, never = "SuDe, stops at rho = 1", "never stops, prior current"
    change = _change(truncation(), never, stops, CATEGORY)
    rows.append(("Fig. 5", "never stopping costs the category", "collapse at epoch 3", *change))
    for ask in ("P1", "P2", "P3"):
        change = _change(asked(ask), "plain", "sude", ALIGNMENT)
        rows.append(("Table 2", f"SuDe adds to {ask}", "over +1.5", *change))
    plain = asked("P1", "P3")
    plain = plain[plain["variant"] == "plain"]
    plain = plain.assign(variant=plain["ask"])
    change = _change(plain, "P1", "P3", ALIGNMENT)
    rows.append(("Table 2", "without SuDe P3 is above P1", "41.2, the highest", *change))
    both = asked("attribute and background")
    both = both.assign(both=both[ALIGNMENT] * both[BACKGROUND])
    change = _change(both, "plain", "sude", "both")
    rows.append(("Fig. 6", "attribute and background combine", "pictures", *change))
    edits = class_images()
    background = edits[edits["edit"] == "background"]
    change = _change(background, "plain", "class images", "alignment")
    rows.append(("Fig. 8", "class images raise background edits", "pictures", *change))
    attribute = edits[edits["edit"] == "attribute"]
    change = _change(attribute, "class images", "sude", "alignment")
    rows.append(("Fig. 8", "attributes: SuDe above class images", "pictures", *change))
    columns = ["paper", "claim", "reported there", "seen here", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def _change(
    table: pd.DataFrame, base: str, other: str, measure: str, *, holds: bool = False
) -> tuple[str, str]:
    """Return the paired change from one variant to another in words, and what it says."""
    told = gains(table[table["variant"].isin([base, other])], [measure], against=base)
    gain, low, high = told[told["variant"] == other].iloc[0][["gain", "low", "high"]]
    if holds:
        verdict = "no" if high < 0 else "yes" if low > -0.05 and high < 0.05 else "cannot tell"
    else:
        verdict = "no" if high < 0 else "yes" if low > 0 else "cannot tell"
    return f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]", verdict


def _first_seed(name: str) -> pd.DataFrame:
    rows = read(name)
    return rows[rows["seed"] == 0]


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: methods, with SuDe at 0.5, 1, 2 w_s and the best of them (gain in alignment)",
        (replace(_HELD_OUT, num_seeds=1), *_OTHERS, _W_S),
        table1,
    ),
    "table2": Experiment("Table 2: prompts P1, P2, P3", (_PROMPTS,), table2),
    "fig4": Experiment(
        "Fig. 4: w_s",
        (_W_S, replace(_HELD_OUT, methods=("dreambooth",), num_seeds=2), _W_S_AGAIN),
        fig4,
    ),
    "fig5": Experiment("Fig. 5: truncation", (_W_S, _TRUNCATION, _COLLAPSE), fig5),
    "fig6": Experiment("Fig. 6: attribute and background", (_PROMPTS,), fig6),
    "fig8": Experiment("Fig. 8: class images against SuDe", (_PROMPTS, _CLASS_IMAGES), fig8),
}


@dataclass(frozen=True)
class PaperConfig:
    """Which table or figure of the paper to repeat on the embedded world."""

    name: Annotated[
        Literal["table1", "table2", "fig4", "fig5", "fig6", "fig8"], tyro.conf.Positional
    ]
    run: bool = True
    """Run what is missing of its studies first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""


def main(config: PaperConfig) -> None:
    """Run what is missing, write the table beside the results and print it."""
    experiment = EXPERIMENTS[config.name]
    if config.run:
        for study in experiment.studies:
            run_study(replace(study, workers=config.workers))
    text = experiment.table().to_markdown(index=False, disable_numparse=True)
    with atomic_write(RESULTS / f"{config.name}.md") as path:
        path.write_text(f"{experiment.title}\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(PaperConfig))
