"""The oracle as a judge of runs: what `evaluate` is handed for runs of the drawn world."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from sude_lab.errors import UserError
from sude_lab.io.opening import is_embedded
from sude_lab.tuning import TuningConfig
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, Oracle, judge, load_oracle, read_scene

Values = list[float | None]


@dataclass(frozen=True)
class DrawnJudge:
    """What a drawn subject can be asked for, and, with an oracle, what pictures of it show."""

    scene: world.Scene
    """What the subject's one picture shows."""
    oracle: Oracle | None = None

    @property
    def measures(self) -> bool:
        """Whether it can say anything of pictures: it has an oracle."""
        return self.oracle is not None

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that the one picture does not show: what it shows is no test."""
        of_category = world.ATTRIBUTES[self.scene.category]
        return tuple(a for a in of_category if a != self.scene.attribute)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """The phrases of all backgrounds."""
        return tuple(world.BACKGROUNDS.values())

    def measure(
        self, images: Sequence[Image.Image], text: str, attribute: str, background: str
    ) -> dict[str, Values]:
        """Return the oracle's measures of pictures of one prompt; None where nothing was asked."""
        assert self.oracle is not None
        of_category, pictures = world.ATTRIBUTES[self.scene.category], list(images)
        name = attribute or _mentioned(text, of_category)
        is_known = name in of_category
        reading = judge(self.oracle, pictures, self.scene, name if is_known else None)
        nothing: Values = [None] * len(pictures)
        measures = {
            "attribute_alignment": reading.attribute_alignment.tolist() if is_known else nothing,
            "background_alignment": nothing,
            "category_alignment": reading.category_alignment.tolist(),
            "subject_fidelity": reading.subject_fidelity.tolist(),
        }
        for head, phrases in (("companion", world.COMPANIONS), ("background", world.BACKGROUNDS)):
            phrase = _mentioned(f"{text} {background}", tuple(phrases.values()))
            if phrase:  # a background goes before a companion
                index = HEADS[head].index(next(k for k, v in phrases.items() if v == phrase))
                probabilities = self.oracle.read(pictures)[head][:, index]
                measures["background_alignment"] = probabilities.tolist()
        return measures


def drawn_judge(
    config: TuningConfig, references: Iterable[Image.Image], *, scene: world.Scene | None = None
) -> DrawnJudge | None:
    """Return the judge of a run; None where neither its model nor its subject is of this world.

    The oracle judges runs of the embedded models. Without a known `scene` it reads it from the
    references.
    """
    if not is_embedded(config.backbone):
        return DrawnJudge(scene) if scene else None
    oracle = load_oracle()
    if scene is None:
        if config.category not in world.ATTRIBUTES:
            raise UserError(
                f"The oracle does not know the category {config.category!r}: it knows "
                f"{', '.join(world.CATEGORIES)}."
            )
        scene = read_scene(oracle, list(references), config.category)
    return DrawnJudge(scene, oracle)


def _mentioned(text: str, phrases: Sequence[str]) -> str | None:
    return next((p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)), None)
