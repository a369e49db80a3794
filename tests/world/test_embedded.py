"""The embedded model as it ships: a true diffusers pipeline that knows its world."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from studies.embedded.card import held_out_table
from studies.embedded.dataset import RARE_TOKENS, vocabulary
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone
from sude_lab.methods import METHODS, configure
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world
from sude_lab.world.oracle import ALL_ATTRIBUTES, HEADS, Oracle, labels, load_oracle

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "embedded"


@pytest.fixture(scope="module")
def base() -> Backbone:
    return open_backbone(device="cpu")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return load_oracle()


def test_it_is_small_and_safetensors_only() -> None:
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    # Under the names that every transformers reads.
    names = load_file(FOLDER / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)


def test_plain_diffusers_loads_and_draws_without_sude_lab(tmp_path: Path, oracle: Oracle) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(FOLDER)!r})\n"
        "g = torch.Generator().manual_seed(0)\n"
        "images = pipe(['photo of a running dog'] * 8, num_inference_steps=20,\n"
        "              guidance_scale=4.0, generator=g).images\n"
        f"for k, image in enumerate(images): image.save(f'{tmp_path}/{{k}}.png')\n"
        "assert not any(name.startswith('sude_lab') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", str(script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = oracle.read([Image.open(tmp_path / f"{k}.png") for k in range(8)])
    dog, running = HEADS["category"].index("dog"), ALL_ATTRIBUTES.index("running")
    assert seen["category"][:, dog].mean() > 0.8
    assert seen["attribute"][:, running].mean() > 0.8


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_it_draws_every_attribute_of_a_category(
    base: Backbone, oracle: Oracle, category: str
) -> None:
    """The bar of the model card, on four pictures each; the card's table has more."""
    right = []
    for attribute in world.ATTRIBUTES[category]:
        prompt = photo_of(f"{attribute} {category}")
        seen = oracle.read(generate(base, prompt, num_images=4, seed=1))
        right.append(seen["category"][:, HEADS["category"].index(category)])
        right.append(seen["attribute"][:, ALL_ATTRIBUTES.index(attribute)])
    assert torch.cat(right).mean() > 0.85


def test_the_oracle_is_right_on_drawings_it_has_never_seen() -> None:
    table = pd.read_csv(ROOT / "data" / "oracle" / "held_out_accuracy.csv", index_col="head")
    assert set(table.index) == set(HEADS)
    assert table.loc[["category", "attribute", "background"], "drawings"].min() >= 0.98


def test_fresh_drawings_agree_with_the_oracle_s_table(oracle: Oracle) -> None:
    """New drawings, counted here: within four standard errors of what the table promises."""
    table = pd.read_csv(ROOT / "data" / "oracle" / "held_out_accuracy.csv", index_col="head")
    rng = random.Random("fresh drawings")
    drawn = [world.sample_scene(rng) for _ in range(200)]
    seen = oracle.read([world.draw(s) for s in drawn])
    for head, promised in table["drawings"].items():
        truth = torch.tensor([labels(s)[head] for s in drawn])
        shown = truth >= 0
        right = (seen[head].argmax(-1)[shown] == truth[shown]).float().mean().item()
        error = max(promised * (1 - promised), 0.005) ** 0.5 / shown.sum().item() ** 0.5
        assert abs(right - promised) < 4 * error, head


def test_the_tokenizer_knows_every_word_as_one_token(base: Backbone) -> None:
    for word in (*vocabulary(), *RARE_TOKENS):
        ids = base.tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1, word
    assert tuple(base.facts["words"]) == vocabulary()


def test_the_model_card_states_what_it_must() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for heading in ("Data", "Training", "Oracle", "Limits"):
        assert f"## {heading}" in card
    assert held_out_table().to_markdown(index=False) in card


def test_the_tokenizer_s_three_files_agree(tmp_path: Path) -> None:
    """transformers 5 reads tokenizer.json, earlier ones vocab.json and merges.txt."""
    folder = ROOT / "data" / "embedded" / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == model["vocab"]
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert merges == [" ".join(pair) for pair in model["merges"]]


def test_the_facts_suit_every_method(base: Backbone) -> None:
    """Settings found by a search are there for each method, and they are real settings."""
    told = base.facts["tuning"]
    assert set(told) == set(METHODS)
    for method, settings in told.items():
        resolved = configure(TuningConfig(image=Path("x"), category="dog", method=method), base)
        for name, value in settings.items():
            assert getattr(resolved, name) == value, (method, name)
