"""The second embedded model with the ordinary commands; broken folders of its family."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flow_models import build
from PIL import Image
from refusals import content, say

from sude_lab.backbone import Backbone
from sude_lab.classify.implicit import ImplicitClassifier
from sude_lab.classify.probe import decode, latents_of, prompt_errors, thresholds
from sude_lab.generation import generate
from sude_lab.io.opening import is_embedded, open_backbone, resolve_source
from sude_lab.runs.export import export_pipeline
from sude_lab.runs.folder import Run
from sude_lab.world import drawing as world
from sude_lab.world.oracle import judge, load_oracle

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--num-samples", 1, "--report-to", "none", "--device", "cpu")


@pytest.fixture(scope="module")
def flow() -> Backbone:
    return open_backbone("embedded-flow", device="cpu")


def scene(category: str = "dog", attribute: str = "sitting") -> world.Scene:
    return world.Scene(category, attribute, world.Look("brown", "white", "spots", "red"))


def code_of(card: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return str(block)


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.int16(a) - np.int16(b)).max())


def test_it_draws_what_it_is_asked_for(flow: Backbone) -> None:
    assert resolve_source("embedded-flow") == str(ROOT / "data" / "embedded_flow")
    assert is_embedded("embedded-flow") and is_embedded(ROOT / "data" / "embedded")
    assert not is_embedded(ROOT / "data")
    oracle = load_oracle()
    for category, attribute, shown in (
        ("dog", "running", "sitting"),
        ("candle", "burning", "unlit"),
    ):
        images = generate(flow, f"photo of a {attribute} {category}", num_images=4, seed=0)
        reading = judge(oracle, images, scene(category, shown), attribute)
        assert reading.attribute_alignment.mean() > 0.9
        assert reading.category_alignment.mean() > 0.9


def test_its_latents_are_the_pictures(flow: Backbone) -> None:
    picture = world.draw(scene(), 64)
    (back,) = decode(flow, latents_of(flow, [picture]))
    assert np.abs(np.int16(back) - np.int16(picture)).mean() < 6


def test_it_classifies_and_has_thresholds(flow: Backbone) -> None:
    """Also at sigma = 1, where eps says nothing of the picture."""
    pictures = [world.draw(scene("dog", "running"), 64), world.draw(scene("candle", "unlit"), 64)]
    prompts = ["photo of a dog", "photo of a candle"]
    verdicts = ImplicitClassifier(flow, prompts, num_pairs=8).classify(pictures)
    assert [v.best for v in verdicts] == prompts
    tau = thresholds(flow, pictures, "dog", [0, 500, 999], weighting="exact")
    assert tau.isfinite().all() and (tau[:, 1] < 0).all() and not tau[:, 0].any()
    errors = prompt_errors(flow, pictures, prompts, [500, 999])
    assert errors.isfinite().all() and not errors[:, 1].any()
    assert errors[0, 0, 0] < errors[0, 0, 1] and errors[1, 0, 1] < errors[1, 0, 0]


@pytest.mark.parametrize("train", ["attention", "lora"])
def test_the_ordinary_commands(train: str, tmp_path: Path, subject_picture: Path) -> None:
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    tuning = ("--category", "dog", "--backbone", "embedded-flow", "--train", train)
    steps = ("--max-train-steps", 2, "--train-batch-size", 2, "--seed", 4)
    done = say("tune", subject_picture, *tuning, *steps, *FEW, "--out", run)
    assert done.code == 0, done
    config = Run.open(run).config
    assert (config.weighting, config.weight_sude) == ("simple", 2.0)
    prompt = "photo of a running {S*} dog"
    done = say("generate", run, prompt, "--num-images", 2, "--device", "cpu", "--out", drawn)
    assert done.code == 0, done
    done = say("evaluate", run, "--num-images", 1, "--prompts", "plain", "--device", "cpu")
    assert done.code == 0 and "subject_fidelity" in (run / "evaluation/table.md").read_text()

    first = Image.open(run / "samples.png").convert("RGB")
    scope: dict[str, Any] = {}
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "stable-diffusion-3" in card and "`data/embedded_flow`" in card
    with chdir(run):
        exec(code_of(run / "README.md").replace('"data/', f'"{ROOT}/data/'), scope)
    assert distance(scope["image"], first) <= 1

    export_pipeline(Run.open(run), tmp_path / "pipeline")
    again = open_backbone(tmp_path / "pipeline", device="cpu")
    assert distance(generate(again, "photo of a <sks> dog", num_images=1, seed=4)[0], first) <= 2
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(plain).__name__ == "StableDiffusion3Pipeline"


def test_a_lora_of_a_transformer_has_no_names_for_the_web_uis(
    tmp_path: Path, subject_picture: Path
) -> None:
    tuning = ("--category", "dog", "--backbone", "embedded-flow", "--train", "lora")
    few = ("--max-train-steps", 1, "--num-samples", 0, "--report-to", "none", "--device", "cpu")
    run = tmp_path / "run"
    assert say("tune", subject_picture, *tuning, *few, "--out", run).code == 0
    said = say("export", run, "--format", "kohya", "--out", tmp_path / "lora.safetensors")
    assert "not known here for stable-diffusion-3" in said.sentence


# --- broken ---------------------------------------------------------------------------------------


def settings(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        entries = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(entries | values))

    return apply


def no_t5(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    settings("model_index.json", text_encoder_3=[None, None])(folder)


def spoilt(folder: Path) -> None:
    """Weights that cannot be read: whoever reads them before the sentence is found out."""
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(b"nothing")


INDEX = "model_index.json"
BEFORE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no T5": (no_t5, "has no T5"),
    "a VAE without shift": (settings("vae/config.json", shift_factor=None), "has no shift_factor"),
    "unknown": (settings(INDEX, _class_name="AuraFlowPipeline"), "holds a AuraFlowPipeline: it"),
    "FLUX.1": (settings(INDEX, _class_name="FluxPipeline"), "which is distilled"),
    "FLUX.2": (settings(INDEX, _class_name="Flux2Pipeline"), "which is distilled"),
    "another family": (
        settings(INDEX, _class_name="StableDiffusionPipeline"),
        "only the classes that a Stable Diffusion has there",
    ),
    "another transformer": (
        settings(INDEX, transformer=["diffusers", "FluxTransformer2DModel"]),
        "only the classes that a Stable Diffusion 3 has there",
    ),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "lacks the folder transformer"),
    "facts": (settings("sude_lab.json", text={"max_sequence_length": "all"}), "is damaged"),
}
AFTER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a scheduler of diffusion": (
        settings(INDEX, scheduler=["diffusers", "DDIMScheduler"]),
        "no scheduler of flow matching",
    ),
    "a VAE of other channels": (settings("vae/config.json", latent_channels=4), "could not be"),
}


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "sd3"
    build("sd3", folder)
    return folder


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
def test_what_is_not_whole_is_refused_in_a_sentence(
    name: str, sd3_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(sd3_folder, folder)
    change, reason = (BEFORE | AFTER)[name]
    if name in BEFORE and name != "facts":
        spoilt(folder)
    change(folder)
    before = content(tmp_path)
    command = ("tune", subject_picture, "--category", "dog", "--backbone", folder, *FEW)
    sentence = say(*command, "--out", tmp_path / "run").sentence
    assert reason in sentence and str(folder) in sentence
    assert content(tmp_path) == before


def test_a_turbo_is_refused_by_its_name(
    sd3_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stable-diffusion-3.5-large-turbo"
    shutil.copytree(sd3_folder, folder)
    spoilt(folder)
    command = ("tune", subject_picture, "--category", "dog", "--backbone", folder, *FEW)
    assert "eq. 5 has no denominator" in say(*command, "--out", tmp_path / "run").sentence


@pytest.mark.parametrize("method", ["vico", "custom_diffusion"])
def test_methods_for_unets_are_refused(
    method: str, sd3_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    command = ("tune", subject_picture, "--category", "dog", "--backbone", sd3_folder, *FEW)
    said = say(*command, "--method", method, "--out", tmp_path / "run")
    assert f"--method {method} is not made for a" in said.sentence


def test_its_own_copy_is_tuned_alone(flow: Backbone) -> None:
    copy = flow.copy()
    with torch.no_grad():
        next(copy.denoiser.parameters()).add_(1.0)
    pairs = zip(flow.denoiser.parameters(), copy.denoiser.parameters(), strict=True)
    assert not torch.equal(*next(pairs))
    assert type(copy) is type(flow)
