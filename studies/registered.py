"""What was registered of the comparisons, in code: subjects, arms, lines, and what is contrasted.

The words stand in data/grids (fair.md, confirm.md, flow.md, others.md); each was committed before
its first run. `studies.fair` runs the arms, `studies.fair_report` reads the lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from sude_lab.evaluate.fronts import SHARES
from sude_lab.sweep.bench import SIZES

# --- who is tuned, and how

On = Literal[
    "held-out",
    "development",
    "confirm",
    "flow",
    "flow-development",
    "others",
    "others-development",
    "preservation",
]


@dataclass(frozen=True)
class Group:
    """Subjects, and the arms that are run on them."""

    subjects: str
    table: str
    """Name of the stored table."""
    page: str = "fair"
    """The page in `data/grids` that says what was fixed beforehand, and the folder of the arms."""
    arms: tuple[str, ...] = ("plain", "sude", "drawn", "rate", "sude_rate")
    """The first stage, which decides the question, and the second one."""
    shares: tuple[float, ...] = SHARES
    """Of plain tuning's own fidelity: where the lines are read."""
    hull: bool = False
    """Whether they are read on their hull; else on their front, and the hull is exploration."""


BACKGROUNDS = "_backgrounds"
"""Ends the name of an arm that draws what another one tuned, on backgrounds."""
SAME = ["subject", "variant", "w_s", "strength"]
TRIED = (
    *("plain", "sude", "rate", "rate_half", "sude_rate", "lora", "lazy"),
    *("margin", "weighting", "class_images", "sude_class_images", "semantic"),
)
FLOW = "flow", ("plain", "sude", "lora_plain", "lora_sude")
METHODS = "custom_diffusion", "textual_inversion", "vico"
ARMS = tuple(f"{method}_{arm}" for method in METHODS for arm in ("plain", "sude"))
OTHERS = "others", ARMS, (0.7, 0.8, 0.9), True
GROUPS: dict[On, Group] = {
    "held-out": Group(SIZES["whole"].subjects, "fair"),
    "development": Group(SIZES["hour"].subjects, "fair_development", "fair", TRIED),
    "confirm": Group(
        "held-out " + " ".join(map(str, range(300, 372))),
        *("confirm", "confirm"),
        arms=("plain", "sude", "plain_backgrounds", "sude_backgrounds"),
        shares=(0.85, 0.9, 0.95),
    ),
    "flow": Group("held-out 200 201 202 203 204 205 206 207 208", "flow", *FLOW),
    "flow-development": Group("development 200 206", "flow_development", *FLOW),
    "others": Group("held-out 400 401 402 403 404 405 406 407 408", "others", *OTHERS),
    "others-development": Group("development 100 104", "others_development", *OTHERS),
    "preservation": Group(
        "held-out " + " ".join(map(str, range(300, 318))),
        *("preservation", "others"),
        arms=("plain", "sude", "rate_class_images", "rate_semantic"),
        shares=(0.75, 0.85, 0.95),
        hull=True,
    ),
}
"""Held-out: four subjects a category (to confirm eight, of flow and others one), whom nobody had
looked at before the page was committed; preservation: two of confirm's eight, whose plain and SuDe
runs are there. Development: others, who chose everything in it."""

# --- the lines, and what is contrasted

_END = "strength == ''"
_PLAIN_END = f"(arm == 'plain' and {_END})"
_STEPS = f"({_END} or strength.str.isdigit())"
LINES = {
    "less tuning": "arm == 'plain'",
    "SuDe": "arm == 'sude'",
    "plain, steps": f"arm == 'plain' and {_STEPS}",
    "plain, scale": f"arm == 'plain' and ({_END} or strength.str.startswith('scale'))",
    "SuDe 1, steps": "arm == 'sude' and w_s == 1",
    "SuDe 2, steps": "arm == 'sude' and w_s == 2",
    "SuDe 50, w_s": "arm == 'sude' and strength == '50'",
    "plain, composition": f"{_PLAIN_END} or strength.str.startswith('compose')",
    "plain, lower rate": "arm == 'rate'",
    "SuDe, lower rate": "arm == 'sude_rate'",
    "best plain": "arm in ('plain', 'rate')",
    "SuDe without training": f"{_PLAIN_END} or strength.str.startswith('sude_guidance')",
    "class images": "arm == 'rate_class_images'",
    "semantic preservation": "arm == 'rate_semantic'",
    **{
        f"SuDe every {k}": f"arm == 'lazy' and variant.str.endswith('every {k}')"
        for k in (1, 2, 4, 8)
    },
}
"""Every way of tuning, over its strengths: rows of the table."""

PRIMARY = [("SuDe", "less tuning")]
SECONDARY = [
    *product(("SuDe 1, steps", "SuDe 2, steps"), ("plain, steps", "plain, scale")),
    ("SuDe 50, w_s", "plain, steps"),
    ("SuDe", "plain, composition"),
    ("SuDe without training", "less tuning"),
]
LOWER = [("SuDe, lower rate", "best plain")]
SECOND = [
    ("SuDe, lower rate", "plain, lower rate"),
    ("SuDe, lower rate", "SuDe"),
    ("plain, lower rate", "less tuning"),
]
LAZY = [(f"SuDe every {k}", "SuDe every 1") for k in (2, 4, 8)]
HIGHER = (0.85, 0.95, 1.05)
"""Shares of the second stage."""


class Family(NamedTuple):
    """Contrasts that are corrected together, with those of category and background for some."""

    title: str
    pairs: Sequence[tuple[str, str]]
    shares: Sequence[float] = ()
    """None: those of the group."""
    of_others: Sequence[tuple[str, str]] = ()


FAMILIES = (
    Family("Primary", PRIMARY),
    Family("Secondary", SECONDARY, of_others=PRIMARY),
    Family("Second stage, primary", LOWER, HIGHER),
    Family("Second stage, secondary", SECOND, HIGHER, LOWER),
    Family("Lazy SuDe", LAZY),
)
KEPT = "class images", "semantic preservation"
FAMILIES_OF: dict[str, Sequence[Family]] = {
    "others": (Family("Primary", PRIMARY), Family("Secondary", (), of_others=PRIMARY)),
    "preservation": (
        Family("Primary", [*product(KEPT, ("less tuning", "SuDe"))]),
        Family("Secondary", (), of_others=[(one, "less tuning") for one in KEPT]),
    ),
}
"""By the table: of what is not `FAMILIES`; of others, all methods are one family."""
PARTS = {"lora_": "LoRA: ", **{f"{m}_": f"{m.replace('_', ' ')}: " for m in METHODS}}
"""How arms begin that are read for themselves, and what their titles begin with."""
