"""What is made before a run starts, and handed to its `Tuning`: what it draws from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.config import CompleteConfig, TuningConfig
from sude_lab.draws import Draws, FreshDraws, one_of_each, picture_latents, side_of
from sude_lab.io.pictures import load_picture
from sude_lab.methods import configure
from sude_lab.runs.class_images import WithClassImages, class_latents
from sude_lab.runs.regularizer import load_regularizer
from sude_lab.tuning import Processes, Regularizer, Tuning

Pictures = Image.Image | Sequence[Image.Image]


def prepare(
    config: TuningConfig, backbone: Backbone, pictures: Pictures, *, accelerator: Any = None
) -> Draws:
    """Return what a run draws from, with class images beside where `prior_loss_weight` is above 0.

    They are drawn, or found in the cache; of an accelerator's processes the first one draws.
    """
    backbone.use()
    config, processes = configure(config, backbone), Processes(accelerator)
    images = _squares(config, backbone, pictures)
    latents = [picture_latents(config, backbone, image) for image in images]
    draws: Draws = FreshDraws(latents, backbone.schedule.num_timesteps, backbone.density)
    if config.prior_loss_weight:
        with processes.in_turn():
            class_images = [class_latents(config, backbone, s.category) for s in config.subjects]
        draws = WithClassImages(draws, class_images)
    return draws


def prepared_tuning(
    config: TuningConfig,
    backbone: Backbone,
    pictures: Pictures,
    *,
    regularizer: Regularizer | None = None,
    state: dict[str, Any] | None = None,
    accelerator: Any = None,
) -> Tuning:
    """Return a run with all that `prepare` makes for it; arguments and errors are `Tuning`'s.

    Without a `regularizer` the settings' own file is run, where they name one.
    """
    regularizer = regularizer or load_regularizer(config.regularizer_file)
    return Tuning(
        config,
        backbone,
        _squares(configure(config, backbone), backbone, pictures),
        draws=prepare(config, backbone, pictures, accelerator=accelerator),
        regularizer=regularizer,
        state=state,
        accelerator=accelerator,
    )


def _squares(config: CompleteConfig, backbone: Backbone, pictures: Pictures) -> list[Image.Image]:
    """Return the subjects' pictures with the care that files get: upright, RGB, cut to squares."""
    side = side_of(config, backbone)
    return [load_picture(p, resolution=side).image for p in one_of_each(config, pictures)]
