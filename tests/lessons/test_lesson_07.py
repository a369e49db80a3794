"""The code that lesson 07 shows, taken from its cells: the fifth method, and the plugged loop."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor

from studies.embedded.dataset import vocabulary
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.draws import step_generator
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import METHODS, Method, configure
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.sude import SudeRegularizer
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]
LESSON = Path(__file__).parents[2] / "notebooks" / "07_baselines_and_prompts.ipynb"
CELLS = {
    cell["id"]: "".join(cell["source"])
    for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
}


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


# --- a fifth method ------------------------------------------------------------------------------


@pytest.fixture
def fifth(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The class of the cell, registered as the lesson does it."""
    names: dict[str, Any] = {"Method": Method, "ClassVar": ClassVar}
    exec(CELLS["fifth-method"], names)
    monkeypatch.setitem(METHODS, names["CrossAttentionOutput"].name, names["CrossAttentionOutput"])
    return names["CrossAttentionOutput"]


def settings(**chosen: Any) -> TuningConfig:
    chosen = {"max_train_steps": 2, "train_batch_size": 2, "seed": 3} | chosen
    return TuningConfig(
        image=Path("dog.png"), category="dog", method="cross_attention_output", **chosen
    )


def last_step(config: TuningConfig, backbone: Backbone, picture: Image.Image) -> Step:
    *_, last = tune(config, backbone, picture)
    return last


def test_the_fifth_method_is_short_and_says_nothing_of_sude() -> None:
    assert CELLS["fifth-method"].count("\n") < 39
    code = CELLS["fifth-method"].replace('"weight_sude"', "")  # its default is its own to say
    assert "sude" not in code.lower()


def test_the_fifth_method_takes_its_own_defaults(fifth: type[Method], tiny: Backbone) -> None:
    config = configure(settings(max_train_steps=None), tiny)
    assert config.max_train_steps == fifth.defaults["max_train_steps"]
    assert config.weight_sude == fifth.defaults["weight_sude"] > 0


def test_the_fifth_method_trains_what_it_says_and_the_word_alone(
    fifth: type[Method], fresh: Fresh, picture: Image.Image
) -> None:
    backbone, before = fresh(), dict(fresh().unet.named_parameters())
    expected = {
        f"{name}.to_out.0.{part}"
        for name, module in backbone.unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
        for part in ("weight", "bias")
    }
    step = last_step(settings(), backbone, picture)
    assert set(step.method.parameters) == {"token.text_encoder"} | {f"unet.{n}" for n in expected}
    moved = {
        name for name, p in backbone.unet.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == expected and len(expected) == 8  # four cross-attentions


def test_sude_reaches_the_fifth_method(
    fifth: type[Method], fresh: Fresh, picture: Image.Image
) -> None:
    plain, sude = (
        last_step(settings(weight_sude=w, truncate=False), fresh(), picture).method.state_dict()
        for w in (0.0, 2.0)
    )
    assert any(not torch.equal(plain[name], sude[name]) for name in plain)


def test_what_the_fifth_method_saves_comes_back(
    fifth: type[Method], fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    tuned, loaded = fresh(), fresh()
    save_weights(last_step(settings(learning_rate=0.1), tuned, picture).method, tmp_path)
    load_weights(fifth.name, loaded, tmp_path)
    x_t, t = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([30, 700]),
    )
    with torch.no_grad():
        of_tuned, of_loaded = (
            b.predict(x_t, t, b.encode_prompts(["photo of a <sks> dog"]).expand(2))
            for b in (tuned, loaded)
        )
        untuned = fresh().predict(x_t, t, fresh().encode_prompts(["photo of a dog"]).expand(2))
    torch.testing.assert_close(of_loaded, of_tuned)
    assert (of_tuned - untuned).norm() > 0.01 * untuned.norm()


# --- the plug in a loop of one's own -------------------------------------------------------------

W_S = 2.0
Loop = Callable[..., None]


@pytest.fixture
def loops() -> tuple[Loop, Loop]:
    """The two loops of the lesson's cells, for the tiny model's pictures."""
    names: dict[str, Any] = {
        "F": F,
        "SudeRegularizer": SudeRegularizer,
        "torch": torch,
    }
    opened = re.search(r"^def embed.*", CELLS["open-pipeline"], re.S | re.M)
    assert opened
    exec(opened[0], names)
    for cell in ("loop", "loop-with-sude"):
        exec(CELLS[cell], names)
    names |= {"RESOLUTION": 32, "LEARNING_RATE": 1e-3, "W_S": W_S}
    return names["train"], names["train_with_sude"]


@pytest.fixture
def listening(fresh: Fresh) -> Callable[..., Backbone]:
    """Gives backbones that listen to words, as the tiny model hardly does when it is made.

    Its subject's word stands where some of the gates are open and some are shut.
    """

    def make(against: str = "dog") -> Backbone:
        backbone = fresh()
        table = backbone.text_encoder.get_input_embeddings().weight
        sks, word = backbone.tokenizer(f"sks {against}", add_special_tokens=False).input_ids
        with torch.no_grad():
            table[sks] = -8 * table[word]
            for name, p in backbone.unet.named_parameters():
                if name.endswith("attn2.to_out.0.weight"):
                    p.mul_(3)
        return backbone

    return make


def test_four_lines_and_the_import_are_all_that_is_added() -> None:
    theirs, plugged = CELLS["loop"], CELLS["loop-with-sude"]
    assert "sude" not in theirs.lower()
    added = [line for line in plugged.splitlines() if re.search(r"# [2-5]$", line)]
    assert [line[-1] for line in added] == ["2", "3", "4", "5"]
    kept = [line for line in plugged.splitlines() if line not in added]
    assert "\n".join(kept).replace("train_with_sude", "train") == theirs
    # The first added line is the import, among the others of the lesson.
    assert re.search(r"^from sude_lab import SudeRegularizer\b", CELLS["imports-07"], re.M)


def gradient_of_loop(
    loop: Loop, backbone: Backbone, picture: Image.Image, size: int, seed: int
) -> Tensor:
    backbone.unet.requires_grad_(True)
    generator = step_generator(seed, 1)
    torch.randint(1, (size,), generator=generator)
    loop(backbone.pipeline, picture, 1, generator, batch_size=size)
    return torch.cat([p.grad.flatten() for p in backbone.unet.parameters()])


def test_the_plugged_loop_has_the_gradient_of_tune(
    loops: tuple[Loop, Loop], listening: Callable[..., Backbone], picture: Image.Image
) -> None:
    size = 16
    config = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        train="unet",
        weight_sude=W_S,
        train_batch_size=size,
        max_train_steps=1,
        max_grad_norm=0.0,
        token_learning_rate=0.0,
    )
    # A draw in which eq. 9 lets some samples through and stops others.
    for word, seed in product(("dog", *vocabulary()), range(5)):
        step = next(tune(replace(config, seed=seed), listening(word), picture))
        if 0 < step.gate.sum() < size:
            break
    else:
        pytest.fail("no draw has gates that are open and gates that are shut")
    expected = torch.cat([p.grad.flatten() for p in step.method.parameters.values()])  # type: ignore[union-attr]
    without, seen = (gradient_of_loop(loop, listening(word), picture, size, seed) for loop in loops)
    assert (seen - expected).norm() < 1e-4 * expected.norm()
    assert (without - expected).norm() > 1e-2 * expected.norm()


def test_both_loops_learn_the_picture(
    loops: tuple[Loop, Loop], fresh: Fresh, picture: Image.Image
) -> None:
    for loop in loops:
        backbone, before = fresh(), dict(fresh().unet.named_parameters())
        backbone.unet.requires_grad_(True)
        loop(backbone.pipeline, picture, 2, torch.Generator().manual_seed(0), batch_size=2)
        after = dict(backbone.unet.named_parameters())
        assert sum(not torch.equal(after[n], before[n]) for n in before) > 0.8 * len(before)
