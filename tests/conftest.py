"""What the tests share: a tiny pipeline of the real classes, and a drawn picture of a subject.

No test here reaches a network: a hub id must fail at once, and be told in one sentence.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once

import pytest

FACTS: dict[str, Any] = {
    "categories": ["dog", "cat", "stuffed animal", "candle"],
    "words": [
        *("a", "an", "animal", "burning", "candle", "cat", "dog", "of", "on", "photo"),
        *("running", "sitting", "stuffed", "the"),
    ],
    "tuning": {
        "dreambooth": {
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "weight_sude": 1.0,
        },
        "textual_inversion": {
            "token_learning_rate": 1e-2,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "weight_sude": 1.0,
        },
    },
    "generation": {"num_inference_steps": 2, "guidance_scale": 2.0},
}


def build_pipeline(folder: Path, *, text_width: int = 32) -> None:
    """Write a random Stable Diffusion pipeline for pictures of 32 pixels, in safetensors."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from studies.embedded.train import MAX_TOKENS, build_scheduler, build_tokenizer
    from sude_lab.io.opening import FACTS_FILE

    tokenizer = build_tokenizer(folder.with_name(f"{folder.name}-words"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=32,
            scaling_factor=0.7,
        )
        # More rows than any vocabulary of the drawn world: how many random numbers are drawn, and
        # with them every weight below, must not hang on its size.
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=2048,
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                projection_dim=text_width,
            )
        )
        # Random words differ by 0.02 as they are made: too alike to tell two conditions apart. And
        # what a word means must not hang on its number, which is another after every training of
        # the tokenizer.
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for word, index in tokenizer.get_vocab().items():
            meaning = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            row = 0.4 * torch.randn(text_width, generator=meaning)
            text_encoder.get_input_embeddings().weight.data[index] = row
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        build_scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / FACTS_FILE).write_text(json.dumps(FACTS), encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is computed once is kept here for these tests, and never where the user's lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUDE_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder, as a user has it on the disk; do not write in it."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    build_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For SUDE_LAB_DATA: the tiny model in the place of the embedded one, with the real oracle.

    And the second embedded model as it is.
    """
    data = tmp_path_factory.mktemp("data")
    (data / "embedded").symlink_to(tiny_folder)
    for name in ("oracle", "embedded_flow"):
        (data / name).symlink_to(Path(__file__).resolve().parent.parent / "data" / name)
    return data


@pytest.fixture(scope="session")
def wider_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of another architecture: weights of `tiny_folder` do not fit it."""
    folder = tmp_path_factory.mktemp("backbone") / "wider"
    build_pipeline(folder, text_width=64)
    return folder


@pytest.fixture(scope="session")
def _opened(tiny_folder: Path) -> Any:
    from sude_lab.io.opening import open_backbone

    return open_backbone(tiny_folder, device="cpu")


@pytest.fixture
def fresh(_opened: Any) -> Callable[[], Any]:
    """Gives a freshly opened backbone at every call."""
    return lambda: _opened.copy()


@pytest.fixture
def tiny(fresh: Callable[[], Any]) -> Any:
    """One freshly opened backbone on the CPU."""
    return fresh()


@pytest.fixture(scope="session")
def subject_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one picture of a subject: a brown dog with a red collar, which is not symmetric."""
    from sude_lab.world.drawing import Look, Scene, draw

    path = tmp_path_factory.mktemp("subject") / "dog.png"
    draw(Scene("dog", "sitting", Look("brown", "white", "spots", "red")), 64).save(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own, else the system's."""
    reason = "playwright is missing: pip install -e '.[browser]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        places = (driver.chromium.executable_path, *map(shutil.which, names))
        found = next((place for place in places if place and Path(place).exists()), None)
        if found is None:
            pytest.skip("no Chromium: install the system's, or run `playwright install chromium`")
        # In a container Chromium's own sandbox has no rights; the only page is ours.
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
