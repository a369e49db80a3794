"""The embedded model can be trained again from nothing: stage by stage, across an interruption."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from studies.embedded import card, train
from sude_lab.io.opening import FACTS_FILE, data_folder, open_backbone
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, LOOK, OracleConfig, load_oracle, train_oracle

CONFIG = train.TrainConfig(
    num_pictures=48,
    vae_steps=6,
    vae_batch_size=4,
    unet_steps=6,
    unet_batch_size=4,
    unet_decay_steps=3,
    checkpoint_every=2,
    picture_every=6,
    seed=5,
    device="cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> train.TrainConfig:
    folder = tmp_path_factory.mktemp("trained")
    config = replace(CONFIG, work=folder / "work", out=folder / "model")
    before = torch.get_rng_state()
    train.main(config)
    assert torch.equal(torch.get_rng_state(), before), "training moved torch's global generator"
    return config


def test_training_writes_a_pipeline_and_shows_its_progress(trained: train.TrainConfig) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained.out, use_safetensors=True)
    # Latents of deviation 1, whatever the autoencoder has learnt in six steps.
    assert pipeline.vae.config.scaling_factor > 0
    latents = torch.load(trained.work / "latents.pt", weights_only=True)
    assert latents.shape == (48, train.LATENT_CHANNELS, 16, 16)
    assert latents.std() == pytest.approx(1.0, abs=1e-3)
    facts = json.loads((trained.out / FACTS_FILE).read_text())
    assert facts["categories"] == list(world.CATEGORIES)
    shown = {path.name for path in (trained.work / "progress").iterdir()}
    assert shown == {"vae-000006.png", "unet-000006.png"}
    # Earlier versions of transformers find its tensors, too.
    names = load_file(trained.out / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    # It opens as any backbone does, and every word it was trained on is one token.
    tokenizer = open_backbone(str(trained.out)).tokenizer
    assert all(len(tokenizer.tokenize(word)) == 1 for word in facts["words"])


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_an_interrupted_training_ends_with_the_same_weights(
    trained: train.TrainConfig, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without pictures of the progress, which must change nothing.
    config = replace(trained, work=tmp_path / "work", out=tmp_path / "model", picture_every=1_000)
    real = train.train_loop

    def stops(*args, **kwargs):  # type: ignore[no-untyped-def]
        for state in real(*args, **kwargs):
            yield state
            if kwargs["name"] == stage and state[0] == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop", stops)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    assert not config.out.exists()
    train.main(config)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        first, again = load_file(trained.out / name), load_file(config.out / name)
        assert all(torch.equal(first[key], again[key]) for key in first), part


def test_a_changed_world_goes_on_from_a_trained_pipeline(
    trained: train.TrainConfig, tmp_path: Path
) -> None:
    """Its autoencoder stays, and what a person wrote into the folder too."""
    out = shutil.copytree(trained.out, tmp_path / "model")
    (out / "training.md").write_text("Six steps.")
    changes = {"init": trained.out, "work": tmp_path / "work", "out": out, "seed": 6}
    config = replace(trained, picture_every=1_000, **changes)
    train.main(config)
    name = "diffusion_pytorch_model.safetensors"
    vae = load_file(trained.out / "vae" / name), load_file(out / "vae" / name)
    assert all(torch.equal(vae[0][key], vae[1][key]) for key in vae[0])
    unet = load_file(trained.out / "unet" / name), load_file(out / "unet" / name)
    assert any(not torch.equal(unet[0][key], unet[1][key]) for key in unet[0])
    assert (out / "training.md").read_text() == "Six steps."
    assert not list(tmp_path.glob("model.*")), "a half-written or an old folder was left"


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)

    def loss(step: int) -> torch.Tensor:
        return model(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0)

    steps = train.train_loop(
        {"model": model},
        loss,
        lambda step: 1.0,
        steps=5,
        learning_rate=1e-3,
        checkpoint=tmp_path / "model.pt",
        checkpoint_every=2,
        ema_decay=0.9,
        name="line",
    )
    with pytest.raises(RuntimeError, match=r"The line loss became nan at step 3\."):
        list(steps)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 2


def test_the_oracle_is_trained_on_drawings_and_on_what_the_autoencoder_makes_of_them(
    trained: train.TrainConfig, tmp_path: Path
) -> None:
    config = OracleConfig(
        work=trained.work,
        pipeline=trained.out,
        out=tmp_path / "oracle",
        num_pictures=trained.num_pictures,
        steps=12,
        batch_size=16,
        seed=trained.seed,
        held_out=40,
    )
    before = torch.get_rng_state()
    table = train_oracle(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(table.index) == list(HEADS)
    assert list(table.columns) == ["drawings", "decoded"]
    assert table.to_numpy().min() >= 0
    assert table.to_numpy().max() <= 1
    stored = pd.read_csv(config.out / "held_out_accuracy.csv", index_col="head")
    assert (stored - table).abs().to_numpy().max() <= 5e-5
    drawing = world.draw(world.sample_scene(random.Random(0)))
    probabilities = load_oracle(config.out).read([drawing])
    assert all(probabilities[part].sum().item() == pytest.approx(1, abs=1e-5) for part in LOOK)
    again = train_oracle(replace(config, out=tmp_path / "again"))
    assert again.equals(table)


def test_the_card_says_what_the_oracle_sees_in_the_models_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture a prompt, of two categories, in a copy: the stored card has sixteen, of all."""
    for name in ("embedded", "oracle"):
        shutil.copytree(data_folder() / name, tmp_path / name)
    monkeypatch.setattr(card, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(world, "CATEGORIES", ("dog", "bowl"))
    card.main(card.CardConfig(num_images=1, seed=3, notes=tmp_path / "embedded" / "training.md"))
    table = pd.read_csv(tmp_path / "embedded" / "alignment.csv")
    assert len(table) == len(world.ATTRIBUTES["dog"]) + len(world.ATTRIBUTES["bowl"])
    assert (table["pictures"] == 1).all()
    text = (tmp_path / "embedded" / "README.md").read_text()
    assert f"mean\n{table['attribute_alignment'].mean():.3f}" in text
    # One picture is enough to see that it draws what it is asked for, most of the time.
    assert table["attribute_alignment"].mean() > 0.8
    assert table["category_alignment"].mean() > 0.9
