"""Encoders give the features of transformers' own models, from pictures prepared as those want.

No weights can be had here: tiny models of the real classes stand for the pinned ones, and the
published preprocessing is compared with transformers' own processors on fixed pictures.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import SIDE, build_encoder
from torch import Tensor

from sude_lab.errors import UserError
from sude_lab.evaluate import encoders
from sude_lab.evaluate.encoders import ENCODERS, Encoder, Preprocessing, open_encoder

TEXTS = ["photo of a running dog", "photo of a dog", "a burning candle on the beach at night"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: build_encoder(name, root / name) for name in ("clip", "dino", "dinov2", "blip")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path / "cache"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth colours, an edge and noise: what resizing treats differently."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(float)
    waves = [np.sin(x / 9 + seed), np.cos(y / 7), np.sin((x + y) / 11)]
    values = 120 + 70 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    values[: height // 3, : width // 2] = (250, 20, 90)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


PICTURES = [
    picture(*size, seed=k) for k, size in enumerate([(64, 64), (90, 50), (41, 77), (30, 30)])
]


# --- preprocessing -------------------------------------------------------------------------------


def processor(name: str, **options: Any) -> Any:
    """transformers' own processor on Pillow, as it is called before and after version 5."""
    return getattr(transformers, f"{name}Pil", getattr(transformers, name, None))(**options)


def own(name: str) -> Any:
    """What the published preprocessor_config.json of each encoder makes; DINO: its evaluation's."""
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if name == "blip":
        return processor("BlipImageProcessor")
    if name.startswith("clip"):
        return processor("CLIPImageProcessor")
    return processor("BitImageProcessor", size={"shortest_edge": 256}, **imagenet)


@pytest.mark.parametrize("size", [(512, 512), (640, 427), (333, 500), (257, 256), (120, 150)])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_pictures_are_prepared_as_the_encoders_own_processor_does(
    name: str, size: tuple[int, int]
) -> None:
    image = picture(*size)
    expected = own(name)(image, return_tensors="np")["pixel_values"][0]
    seen = ENCODERS[name].preprocessing(image)
    assert seen.dtype == torch.float32
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-5)


def test_dino_sees_the_centre_of_a_picture_in_imagenets_units() -> None:
    """By hand: resize to 256, then a crop of 224 leaves out a border of 16 of 256."""
    image = Image.new("RGB", (512, 512), (255, 0, 0))
    image.paste((51, 102, 204), (16, 16, 496, 496))  # 8 of 256 at each side are red
    expected = (np.array([0.2, 0.4, 0.8]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    seen = ENCODERS["dino"].preprocessing(image)
    assert seen.shape == (3, 224, 224)
    np.testing.assert_allclose(
        seen.numpy(), expected[:, None, None] * np.ones((1, 224, 224)), atol=1e-5
    )


def test_blip_squeezes_where_the_others_crop() -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (0, 0, 60, 100))  # a fifth of the width, outside the centre square
    assert (ENCODERS["clip"].preprocessing(image)[0] > 1).all()
    black = (ENCODERS["blip"].preprocessing(image)[0] < 0).float().mean().item()
    assert black == pytest.approx(0.2, abs=0.01)


def test_colour_modes_are_brought_to_rgb() -> None:
    grey = picture(64, 64).convert("L")
    for name in ENCODERS:
        prepared = ENCODERS[name].preprocessing
        torch.testing.assert_close(prepared(grey), prepared(grey.convert("RGB")))


def test_a_smaller_model_sees_smaller_squares() -> None:
    smaller = ENCODERS["dino"].preprocessing.at(112)
    assert (smaller.side, smaller.resize) == (112, 128)
    assert smaller(picture(300, 200)).shape == (3, 112, 112)


# --- features ------------------------------------------------------------------------------------


def expected_features(name: str, folder: Path) -> tuple[Tensor, Tensor | None]:
    """Features of `PICTURES` and `TEXTS` by transformers' own forward passes, one by one."""
    prepared = ENCODERS[name].preprocessing.at(SIDE)
    pixels = [prepared(p)[None] for p in PICTURES]
    if name.startswith("dino"):
        model = transformers.ViTModel if name == "dino" else transformers.Dinov2Model
        states = [model.from_pretrained(folder)(x).last_hidden_state[0, 0] for x in pixels]
        return torch.stack(states), None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    if name == "clip":
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        outputs = [model(input_ids=tokens[0].input_ids, pixel_values=x) for x in pixels]
        texts = [model(input_ids=t.input_ids, pixel_values=pixels[0]) for t in tokens]
        return (
            torch.cat([o.image_embeds for o in outputs]),
            torch.cat([o.text_embeds for o in texts]),
        )
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["clip", "dino", "dinov2"])
@torch.no_grad()
def test_features_are_those_of_the_models_own_forward_pass(
    name: str, folders: dict[str, Path]
) -> None:
    encoder = open_encoder(name, folders[name], device="cpu")
    images, texts = expected_features(name, folders[name])
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(encoder.images(PICTURES), unit(images), atol=2e-6, rtol=1e-4)
    # Not all the same picture to a model of random weights: the comparison says something.
    assert (encoder.images(PICTURES) @ encoder.images(PICTURES).T).min() < 0.999
    assert bool(encoder.pinned.max_words) == (texts is not None)
    if texts is not None:
        torch.testing.assert_close(encoder.texts(TEXTS), unit(texts), atol=2e-6, rtol=1e-4)


@torch.no_grad()
def test_blips_cosine_is_its_own_retrieval_score(folders: dict[str, Path]) -> None:
    encoder = open_encoder("blip", folders["blip"], device="cpu")
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folders["blip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["blip"])
    prepared = ENCODERS["blip"].preprocessing.at(SIDE)
    cosines = encoder.images(PICTURES) @ encoder.texts(TEXTS).T
    for i, image in enumerate(PICTURES):
        for j, text in enumerate(TEXTS):
            score = model(
                input_ids=tokenizer(text, return_tensors="pt").input_ids,
                pixel_values=prepared(image)[None],
                use_itm_head=False,
            )[0]
            assert score.item() == pytest.approx(cosines[i, j].item(), abs=2e-6)
    # Pictures and texts both count, or the comparison would say nothing.
    assert cosines.std(0).max() > 1e-3 and cosines.std(1).max() > 1e-3


def test_texts_longer_than_the_encoder_reads_are_cut(folders: dict[str, Path]) -> None:
    for name in ("clip", "blip"):
        encoder = open_encoder(name, folders[name], device="cpu")
        long = encoder.texts(["dog " * 100, "dog " * 200])
        torch.testing.assert_close(long[0], long[1])


def test_batches_repetitions_and_order_do_not_matter(folders: dict[str, Path]) -> None:
    encoder = open_encoder("clip", folders["clip"], device="cpu")
    whole = encoder.images(PICTURES)
    assert whole.shape == (4, 16) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    texts = encoder.texts([TEXTS[1], TEXTS[0], TEXTS[1]])
    torch.testing.assert_close(texts, encoder.texts(TEXTS, batch_size=1)[[1, 0, 1]])
    again = open_encoder("clip", folders["clip"], device="cpu")
    order = [2, 0, 0, 3, 1]
    seen = again.images([PICTURES[k] for k in order], batch_size=2)
    torch.testing.assert_close(seen, whole[order], atol=1e-6, rtol=1e-5)


def test_encoders_and_shapes_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    other = build_encoder("dino", tmp_path / "dino", seed=1)  # of the same name
    a, b = (open_encoder("dino", f, device="cpu") for f in (folders["dino"], other))
    assert a.identity != b.identity
    assert not torch.allclose(a.images(PICTURES), b.images(PICTURES))
    turned = Image.frombytes("RGB", (50, 90), PICTURES[1].tobytes())  # the same bytes, 90 x 50
    assert not torch.allclose(a.images([turned]), a.images([PICTURES[1]]))


# --- refusals ------------------------------------------------------------------------------------


def refused(name: str, source: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_encoder(name, source, device="cpu")
    said = str(error.value)
    assert said.endswith(".") and "\n" not in said
    return said


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_that_cannot_be_downloaded_is_one_sentence(name: str) -> None:
    said = refused(name)
    assert ENCODERS[name].source in said and ENCODERS[name].revision in said
    assert f"--encoders {name}=FOLDER" in said


def test_revisions_are_pinned_to_commits() -> None:
    for pinned in ENCODERS.values():
        assert re.fullmatch(r"[0-9a-f]{40}", pinned.revision)


def test_what_is_no_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "choose one of clip, clip-large" in refused("siglip")
    assert "no clip encoder" in refused("clip", tmp_path)
    assert "no clip encoder" in refused("clip", tmp_path / "missing")
    assert "holds a vit model" in refused("clip", folders["dino"])
    assert "this encoder is a vit" in refused("dino", folders["dinov2"])


def test_a_model_with_missing_or_damaged_weights_is_refused(tmp_path: Path) -> None:
    folder = build_encoder("dino", tmp_path / "dino")
    weights = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(weights).items()}  # the file is written over
    name = next(n for n in tensors if n.endswith("norm.weight") or "layernorm.weight" in n)
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    assert "lacks 1 of the encoder's tensors" in refused("dino", folder)
    weights.write_bytes(b"not safetensors")
    assert "could not be opened" in refused("dino", folder)
    weights.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # a pickle is never opened
    assert "could not be opened" in refused("dino", folder)


def test_memory_that_runs_out_is_not_called_damage(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any, **how: Any) -> Encoder:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(encoders, "Encoder", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        open_encoder("dino", folders["dino"], device="cpu")


def test_an_encoder_of_pictures_alone_reads_no_texts(folders: dict[str, Path]) -> None:
    encoder = open_encoder("dino", folders["dino"], device="cpu")
    assert isinstance(encoder, Encoder) and isinstance(encoder.preprocessing, Preprocessing)
    with pytest.raises(ValueError, match="reads no texts"):
        encoder.texts(TEXTS)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_folder_brings_is_not_run_whoever_says_yes(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks at the terminal, unless it is told beforehand."""
    folder, ran = build_encoder("clip", tmp_path / "clip"), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    about = json.loads((folder / file).read_text())
    kinds = {"AutoConfig": "code.C", "AutoTokenizer": ["code.C", "code.C"]}
    about |= {"auto_map": kinds, "model_type": "new", "tokenizer_class": "C"}
    (folder / file).write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(UserError):  # a tokenizer of a known kind is opened without the code
        open_encoder("clip", folder, device="cpu")
    assert not ran.exists()


def test_an_encoder_fetches_no_code_from_elsewhere(tmp_path: Path) -> None:
    folder = build_encoder("clip", tmp_path / "clip")
    about = json.loads((folder / "config.json").read_text())
    about["vision_config"]["_attn_implementation"] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(about))
    assert "someone/kernel" in refused("clip", folder)


def test_a_size_of_pictures_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = build_encoder("dino", tmp_path / "dino")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"image_size": [32, 32]}))
    said = refused("dino", folder)
    assert "image_size" in said or "could not be opened" in said
