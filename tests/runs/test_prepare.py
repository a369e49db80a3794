"""What is made before a run starts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.draws import FreshDraws
from sude_lab.runs.prepare import prepared_tuning


def test_pictures_in_memory_get_the_care_of_files(fresh: Callable[[], Backbone]) -> None:
    config = TuningConfig(Path("dog.png"), "dog", weight_sude=0.0, max_train_steps=1)

    def latents(picture: Image.Image) -> Tensor:
        draws = prepared_tuning(config, fresh(), picture).draws
        assert isinstance(draws, FreshDraws)
        return draws.latents[0][0]

    side = fresh().resolution
    grey = Image.new("RGB", (side, side), (128, 128, 128))
    deep = Image.fromarray(np.full((side, side), 128 * 257, np.uint16))
    wide = Image.new("RGB", (2 * side, side), "red")
    wide.paste(grey, (side // 2, 0))
    for picture in (deep, wide):
        assert torch.equal(latents(picture), latents(grey))
    clear = Image.new("RGBA", (side, side), (255, 0, 0, 0))
    assert torch.equal(latents(clear), latents(Image.new("RGB", (side, side), "white")))
    (step,) = prepared_tuning(config, fresh(), clear)
    (expected,) = prepared_tuning(config, fresh(), Image.new("RGB", (side, side), "white"))
    assert torch.equal(step.loss_subject, expected.loss_subject)
