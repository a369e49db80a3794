"""The paper's tables and figures on the embedded world, made of the stored rows of the studies.

`studies.paper` writes each to `data/results/NAME.md`; lessons read that (`stored.table`). Subjects
are those of the held-out study, fixed before anything was seen. Intervals are 95 %, Student's t on
the subjects' means (`statistics`); gains are paired: same subject, same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sude_lab.evaluate.fronts import MARGIN
from sude_lab.evaluate.metrics import MEASURES, gains
from sude_lab.evaluate.statistics import Interval, holm, mean_interval, verdict
from sude_lab.evaluate.stored import edits, read, truncation

ALIGNMENT, FIDELITY, CATEGORY = MEASURES
BACKGROUND = "background_alignment"
WEIGHTS = {"dreambooth": 2.0, "custom_diffusion": 2.0, "vico": 1.5, "textual_inversion": 1.0}
"""w_s of the methods on the embedded model when these studies were made."""


def by_factor(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute, with `factor`: w_s over its default."""
    rows = edits(pd.concat(tables, ignore_index=True))
    factor = rows["weight_sude"] / rows["method"].map(WEIGHTS)
    rows = rows.assign(factor=factor.round(4), variant=factor.map("{:g} w_s".format))
    return rows.drop_duplicates(["method", "subject", "seed", "factor", "attribute", "image"])


def dosed() -> pd.DataFrame:
    """Return the rows of Fig. 4: DreamBooth at every multiple of w_s, two seeds."""
    return by_factor(read("w_s")).sort_values("factor", kind="stable")


def against(
    table: pd.DataFrame,
    base: str,
    measures: Sequence[str],
    *,
    by: Sequence[str] = ("method",),
    digits: int = 2,
) -> pd.DataFrame:
    """Return a row a (`by`, variant) in words: every measure's mean, and its gain over `base`."""
    changes = gains(table, measures, by=by, against=base)
    rows = []
    for names, group in changes.groupby([*by, "variant"], sort=False):
        line = dict(zip([*by, "variant"], names, strict=True))
        for row in group.to_dict("records"):
            gain = Interval(row["gain"], row["low"], row["high"], row["subjects"])
            words = "" if pd.isna(gain.mean) else f" ({gain.words(f'+.{digits}f')})"
            line[str(row["measure"]).replace("_", " ")] = f"{row['mean']:.{digits}f}{words}"
        subjects, runs = group[["subjects", "runs"]].iloc[0]
        rows.append(line | {"runs": f"{subjects} x {runs // subjects}"})
    return pd.DataFrame(rows)


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
    others = pd.concat([read("methods_w_s"), read("w_s").query("seed == 0")])
    held_out = read("held_out").query("seed == 0")
    rows = by_factor(held_out[held_out["method"].isin(others["method"])], others)
    plain = rows[rows["factor"] == 0].groupby("method")[ALIGNMENT].mean()
    lines = []
    for method, group in best_factors(rows).groupby("method", sort=False):
        line = {"method": str(method).replace("_", " "), "plain": f"{plain[method]:.2f}"}
        for name in group.columns[2:]:
            line[name] = str(mean_interval(group[name], group["subject"]))
        lines.append(line)
    return pd.DataFrame(lines)


def fig4() -> pd.DataFrame:
    """Return Fig. 4: alignment, fidelity and category over the multiples of w_s."""
    return against(dosed(), "0 w_s", MEASURES)


def fig5() -> pd.DataFrame:
    """Return Fig. 5: what the truncation is for."""
    return against(truncation(), "plain", MEASURES)


def prompted(*names: str) -> pd.DataFrame:
    """Return the rows of the study of prompts for these asks."""
    rows = read("prompts")
    return rows[rows["ask"].isin(names)]


def table2() -> pd.DataFrame:
    """Return Table 2: three ways to ask for an attribute, plain and with SuDe."""
    return against(prompted("P1", "P2", "P3"), "plain", MEASURES, by=("ask",))


def fig6() -> pd.DataFrame:
    """Return Fig. 6: an attribute and a background asked for at once; `both` multiplies the two."""
    return against(_both(), "plain", (ALIGNMENT, BACKGROUND, "both", FIDELITY), by=("ask",))


def _both() -> pd.DataFrame:
    rows = prompted("attribute and background")
    return rows.assign(both=rows[ALIGNMENT] * rows[BACKGROUND])


def class_images() -> pd.DataFrame:
    """Return the rows of Fig. 8: attributes (P1) and backgrounds, with class images, SuDe, both."""
    names = {
        "prior_loss_weight=1,weight_sude=0": "class images",
        "prior_loss_weight=1": "SuDe and class images",
    }
    others = read("class_images")
    others = others.assign(variant=others["variant"].map(names))
    rows = pd.concat([prompted("P1", "background"), others], ignore_index=True)
    aimed = rows[ALIGNMENT].where(rows["ask"] == "P1", rows[BACKGROUND])
    order = ["plain", "class images", "sude", "SuDe and class images"]
    rows = rows.assign(alignment=aimed, edit=rows["ask"].replace({"P1": "attribute"}))
    return rows.sort_values("variant", key=lambda v: v.map(order.index), kind="stable")


def fig8() -> pd.DataFrame:
    """Return Fig. 8: class-image regularisation (eq. 14) against SuDe, by what is edited."""
    return against(class_images(), "plain", ("alignment", FIDELITY), by=("edit",))


def claims() -> pd.DataFrame:
    """Return what the paper claims, what it reports on Stable Diffusion, and what is seen here.

    `by itself` is what the 95 % interval over subjects says of each claim alone, in the words of
    `statistics.verdict` ("holds" is "no difference" within 0.05); `verdict` is the same after
    Holm's correction of the p-values of Student's t for all claims together. The paper's numbers
    are BLIP-T points of real photographs, ours are probabilities of a drawn world's oracle: only
    signs and order can be compared.
    """
    rows: list[tuple[tuple[str, str, str], bool, Interval, float]] = []

    def claim(
        where: tuple[str, str, str],
        table: pd.DataFrame,
        base: str = "plain",
        other: str = "sude",
        measure: str = ALIGNMENT,
        holds: bool = False,
    ) -> None:
        rows.append((where, holds, *_change(table, base, other, measure)))

    held_out, w_s, kinds = edits(read("held_out")), dosed(), class_images()
    for method, name, reported in (
        ("vico", "ViCo", "+4.2 / +2.6"),
        ("custom_diffusion", "Custom Diffusion", "+0.9 / +2.0"),
        ("dreambooth", "DreamBooth", "+1.2 / +1.5"),
    ):
        runs = held_out[held_out["method"] == method]
        claim(("Table 1", f"SuDe raises alignment: {name}", reported), runs)
        where = ("Table 1", f"fidelity holds: {name}", "slight fluctuation")
        claim(where, runs, measure=FIDELITY, holds=True)
    for text, reported, a, b, measure, holds in (
        ("2 w_s raises alignment over 1 w_s", "more with more", 1, 2, ALIGNMENT, False),
        ("4 w_s raises alignment over 1 w_s", "more with more", 1, 4, ALIGNMENT, False),
        ("fidelity holds at 2 w_s", "holds", 0, 2, FIDELITY, True),
        ("at 4 w_s fidelity is below 1 w_s", "lost for a bowl", 4, 1, FIDELITY, False),
    ):
        claim(("Fig. 4", text, reported), w_s, f"{a} w_s", f"{b} w_s", measure, holds)
    where = ("Fig. 5", "never stopping costs the category", "collapse at epoch 3")
    claim(where, truncation(), "never stops, prior current", "SuDe, stops at rho = 1", CATEGORY)
    for ask in ("P1", "P2", "P3"):
        claim(("Table 2", f"SuDe adds to {ask}", "over +1.5"), prompted(ask))
    plain = prompted("P1", "P3").query("variant == 'plain'")
    where = ("Table 2", "without SuDe P3 is above P1", "41.2, the highest")
    claim(where, plain.assign(variant=plain["ask"]), "P1", "P3")
    claim(("Fig. 6", "attribute and background combine", "pictures"), _both(), measure="both")
    for text, edit, base, other in (
        ("class images raise background edits", "background", "plain", "class images"),
        ("attributes: SuDe above class images", "attribute", "class images", "sude"),
    ):
        of_edit = kinds[kinds["edit"] == edit]
        claim(("Fig. 8", text, "pictures"), of_edit, base, other, "alignment")
    table = pd.DataFrame(
        [where for where, *_ in rows], columns=["paper", "claim", "reported there"]
    )
    corrected = holm([p for *_, p in rows])
    table["seen here"] = [str(change) for _, _, change, _ in rows]
    table["by itself"] = [verdict(c, margin=MARGIN if h else None) for _, h, c, _ in rows]
    table["verdict"] = [
        verdict(change, p=p, margin=MARGIN if holds else None)
        for (_, holds, change, _), p in zip(rows, corrected, strict=True)
    ]
    return table


def _change(table: pd.DataFrame, base: str, other: str, measure: str) -> tuple[Interval, float]:
    """Return the paired change from one variant to another, and the p of Student's t."""
    changes = gains(table[table["variant"].isin([base, other])], [measure], against=base)
    row = changes[changes["variant"] == other].iloc[0]
    return Interval(row["gain"], row["low"], row["high"], row["subjects"]), row["p"]
