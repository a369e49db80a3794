"""What a run leaves for other programs is loaded by them, and draws what the run itself draws."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from real_configs import REAL, build, build_parts, shrink
from refusals import say
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.opening import FACTS_FILE, open_backbone
from sude_lab.io.weights import LORA_FILE
from sude_lab.runs.export import (
    CARD,
    XL,
    base_version,
    export_pipeline,
    is_plain,
    kohya_weights,
    model_card,
    share,
    write_kohya,
)
from sude_lab.runs.folder import SAMPLES, Run, run_tuning

Tuned = Callable[..., Run]

SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "unet and text encoder": {"train": "unet", "train_text_encoder": True},
    "lora": {"train": "lora", "learning_rate": 1e-2},
    "textual inversion": {"method": "textual_inversion"},
    "custom diffusion": {
        "method": "custom_diffusion",
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "num_class_images": 1,
    },
    "vico": {"method": "vico", "learning_rate": 1e-2, "max_train_steps": 4},
}
PLAIN = [name for name in SETTINGS if name != "vico"]


@pytest.fixture(scope="module")
def tuned(
    tiny_folder: Path, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tuned:
    """A finished run of the named settings, tuned once; do not write in it."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            config = TuningConfig(
                image=subject_picture,
                category="dog",
                backbone=str(tiny_folder),
                seed=3,
                device="cpu",
                **{"token_learning_rate": 1e-2} | SETTINGS[name],
            )
            out = tmp_path_factory.mktemp("runs") / "my dog"
            done[name] = run_tuning(config, out, num_samples=2, progress=False, report_to="none")
        return done[name]

    return run


PROMPT = "photo of a running <sks> dog"


def answers(backbone: Backbone, prompt: str = PROMPT) -> Tensor:
    """What a model says of two noisy latents: finer than any picture."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        condition = backbone.encode_prompts([prompt, ""])
        return backbone.predict(x, torch.tensor([20, 700]), condition)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.concatenate([np.int16(image) for image in images])


# --- the model card ------------------------------------------------------------------------------


def code(card: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.mark.parametrize("name", PLAIN)
def test_the_lines_of_the_card_draw_the_grids_first_picture_in_plain_diffusers(
    name: str, tuned: Tuned, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuned(name)
    lines = code(run.folder / CARD)
    assert "sude_lab" not in lines
    monkeypatch.chdir(run.folder)
    scope: dict[str, Any] = {}
    exec(lines, scope)
    first = np.int16(Image.open(run.folder / SAMPLES).crop((0, 0, 32, 32)))
    assert np.abs(first - np.int16(scope["image"])).max() <= 1
    # Silence is no proof: the lines must have changed what the model says.
    loaded = replace(tiny, pipeline=scope["pipeline"])
    assert torch.equal(answers(loaded), answers(run.load("cpu")))
    untuned = open_backbone(run.config.backbone, device="cpu")
    untuned.add_token("<sks>", "sks" if name != "textual inversion" else "dog")
    assert not torch.allclose(answers(loaded), answers(untuned), rtol=1e-3)


def test_the_card_tells_what_the_run_is(tuned: Tuned, tiny: Backbone) -> None:
    run = tuned("lora")
    card = (run.folder / CARD).read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "diffusers" and "lora" in about["tags"]
    assert about["instance_prompt"] == "photo of a <sks> dog"
    assert {"text-to-image", "diffusers", "diffusers-training", "stable-diffusion"} < {
        *about["tags"]
    }
    assert about["widget"] == [{"text": "photo of a <sks> dog", "output": {"url": SAMPLES}}]
    assert "base_model" not in about and "license" not in about  # a folder: neither is known
    assert "DreamBooth (arXiv 2208.12242), with SuDe (arXiv 2403.06775), w_s = 1," in text
    assert "![the subject, drawn](samples.png)" in text
    for name in ("seed", "learning_rate", "weight_sude", "prior", "max_train_steps"):
        assert f"| {name} | {getattr(run.config, name)} |" in text
    assert f"derives from `{run.config.backbone}`: the licence of that model applies." in text
    assert str(run.folder) not in text  # a run that is moved or renamed keeps its card

    def card_of(**settings: Any) -> str:
        config = replace(run.config, **settings)
        return model_card(config, tiny, run.folder / "weights", ["photo of a <sks>"], grid=None)

    hub = yaml.safe_load(card_of(backbone="someone/model").split("---\n")[1])
    assert hub["base_model"] == "someone/model"
    embedded = card_of(backbone="embedded")
    assert yaml.safe_load(embedded.split("---\n")[1])["license"] == "apache-2.0"
    assert 'from_pretrained("data/embedded")' in embedded
    assert "without SuDe (w_s = 0)" in card_of(weight_sude=0.0)
    assert "samples.png" not in embedded


def test_every_subject_has_its_line_in_the_card(
    tuned: Tuned, tiny: Backbone, tmp_path: Path
) -> None:
    run = tuned("attention")
    config = replace(run.config, more_subjects=("candle=<wax>=candle.png",))
    for name in ("learned_embeds.safetensors", "learned_embeds-2.safetensors"):
        save_file({name: torch.zeros(32)}, tmp_path / name)
    card = model_card(config, tiny, tmp_path, ["photo of a <sks> dog"], grid=None)
    assert "`<sks>` (a dog), `<wax>` (a candle)" in card
    for name in ("learned_embeds.safetensors", "learned_embeds-2.safetensors"):
        assert f'load_textual_inversion("weights", weight_name="{name}")' in card


def test_what_plain_diffusers_cannot_hold_is_loaded_with_sude_lab(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuned("vico")
    assert is_plain(tuned("lora").weights) and not is_plain(run.weights)
    lines = code(run.folder / CARD)
    assert "from_pretrained" not in lines
    monkeypatch.chdir(run.folder)
    scope: dict[str, Any] = {}
    exec(lines, scope)
    first = np.int16(Image.open(run.folder / SAMPLES).crop((0, 0, 32, 32)))
    assert np.abs(first - np.int16(scope["image"])).max() <= 1
    with pytest.raises(UserError, match="has no place for what vico adds"):
        export_pipeline(run, tmp_path / "pipeline", trust_backbone=True)
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("settings", [{"train": "lora"}, {"train_text_encoder": True}])
@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_everything_a_run_writes_is_loaded_into_models_of_the_published_make(
    name: str,
    settings: dict[str, Any],
    subject_picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    build(shrink(REAL[name])[0], tmp_path).save_pretrained(folder, safe_serialization=True)
    sampling = {"num_inference_steps": 3, "guidance_scale": 4.0}
    (folder / FACTS_FILE).write_text(json.dumps({"generation": sampling}))
    config = TuningConfig(
        image=subject_picture,
        category="dog",
        backbone=str(folder),
        learning_rate=1e-2,
        token_learning_rate=1e-1,
        max_train_steps=2,
        device="cpu",
        **settings,
    )
    lora = settings.get("train") == "lora"
    out = tmp_path / "run"
    run = run_tuning(config, out, num_samples=1, progress=False, report_to="none")
    if lora:
        write_kohya(run, out / "run_kohya.safetensors", "float32")
    samples = np.int16(Image.open(out / SAMPLES))
    lines = code(out / CARD)
    monkeypatch.chdir(out)
    ways = [lines]
    if lora:
        ways.append(lines.replace(LORA_FILE, "run_kohya.safetensors"))
    for way in ways:
        scope: dict[str, Any] = {}
        exec(way, scope)
        assert np.abs(samples - np.int16(scope["image"])).max() <= 1
    assert len(set(ways)) == len(ways)
    export_pipeline(run, tmp_path / "pipeline", trust_backbone=True)
    monkeypatch.chdir(tmp_path / "pipeline")
    scope = {}
    exec(code(tmp_path / "pipeline" / CARD), scope)
    assert np.abs(samples - np.int16(scope["image"])).max() <= 1
    # The picture is the subject's: with the word that its token started from, it is another one.
    plain = open_backbone(folder, device="cpu")
    plain.add_token("<sks>", "sks")
    (untuned,) = generate(plain, "photo of a <sks> dog", num_images=1, seed=0)
    assert np.abs(samples - np.int16(untuned)).max() > 8


def test_the_words_after_the_subjects_have_a_say_in_the_whole_prompt(
    subject_picture: Path, tmp_path: Path
) -> None:
    """SDXL's pooled condition is read at the first end mark, in plain diffusers and here alike."""
    folder = tmp_path / "model"
    build(shrink(REAL["sdxl"])[0], tmp_path).save_pretrained(folder, safe_serialization=True)
    config = TuningConfig(
        subject_picture, "dog", str(folder), "textual_inversion", max_train_steps=1,
        weight_sude=0.0, device="cpu",
    )  # fmt: skip
    quiet: dict[str, Any] = {"num_samples": 0, "progress": False, "report_to": "none"}
    run = run_tuning(config, tmp_path / "run", **quiet)
    export_pipeline(run, tmp_path / "pipeline", trust_backbone=True)
    prompts = ["photo of a <sks> dog", "photo of a <sks> cat on the beach"]
    backbone = run.load("cpu", trust_backbone=True)
    with torch.no_grad():
        ours = backbone.encode_prompts(prompts).pooled
        ids = backbone.tokenize(prompts, backbone.tokenizers[1])
        encoder = backbone.text_encoders["text_encoder_2"]
        end = (ids == backbone.tokenizers[1].eos_token_id).int().argmax(dim=1)
        hidden = encoder(ids).last_hidden_state[[0, 1], end]
        assert (ids.max(dim=1).values > backbone.tokenizers[1].eos_token_id).all()
        torch.testing.assert_close(ours, encoder.text_projection(hidden))
    assert ours is not None and (ours[0] - ours[1]).abs().max() > 0.1
    exported = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    scope: dict[str, Any] = {"pipeline": DiffusionPipeline.from_pretrained(folder)}
    _, loading = code(run.folder / CARD).split("pipeline = DiffusionPipeline.from_pretrained(")
    lines = loading.split("\n", 1)[1].split("pipeline.scheduler = ")[0]
    exec(lines.replace('"weights/', f'"{run.weights}/'), scope | {"load_file": load_file})
    for pipeline in (exported, scope["pipeline"]):
        _, _, pooled, _ = pipeline.encode_prompt(prompts, negative_prompt=["", ""])
        torch.testing.assert_close(pooled, ours)


# --- LoRA for the web UIs ------------------------------------------------------------------------

MODULE = re.compile(
    r"lora_unet_(down_blocks|mid_block|up_blocks)_(\d_)?attentions_\d_"
    r"transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)"
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_kohya_file_has_the_web_uis_names(dtype: str, tuned: Tuned, tmp_path: Path) -> None:
    run = tuned("lora")
    path = write_kohya(run, tmp_path / "dog.safetensors", dtype)  # type: ignore[arg-type]
    tensors = load_file(path)
    modules = {name.split(".")[0] for name in tensors}
    assert all(MODULE.fullmatch(module) for module in modules)
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{module}.{ending}" for module in modules for ending in endings}
    # As many as there are attention projections in the UNet.
    unet = open_backbone(run.config.backbone, device="cpu").unet
    projections = [n for n, _ in unet.named_modules() if re.search(r"to_([qkv]|out\.0)$", n)]
    assert len(modules) == len(projections) > 0
    rank = run.config.lora_rank
    for module in modules:
        down, up, alpha = (tensors[f"{module}.{ending}"] for ending in endings)
        assert down.dtype == up.dtype == alpha.dtype == getattr(torch, dtype)
        assert down.shape[0] == up.shape[1] == rank and alpha.item() == rank
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["ss_network_module"] == "networks.lora"
    assert about["ss_network_dim"] == about["ss_network_alpha"] == str(rank)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kohya_file_draws_in_plain_diffusers_what_the_run_draws(
    dtype: str, tuned: Tuned, tmp_path: Path
) -> None:
    run = tuned("lora")
    path = write_kohya(run, tmp_path / "dog.safetensors", dtype)  # type: ignore[arg-type]
    pipeline = DiffusionPipeline.from_pretrained(run.config.backbone)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(run.weights, weight_name="learned_embeds.safetensors")
    own = run.load("cpu")
    plain = replace(own, pipeline=pipeline)
    before = answers(plain)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    expected = answers(own)
    assert not torch.allclose(before, expected, rtol=1e-2)
    drawn = [pixels(generate(b, PROMPT, num_images=2, seed=1)) for b in (own, plain)]
    if dtype == "float32":
        assert torch.equal(answers(plain), expected)
        assert np.array_equal(*drawn)
    else:
        torch.testing.assert_close(answers(plain), expected, rtol=1e-3, atol=1e-3)
        assert np.abs(drawn[0] - drawn[1]).max() <= 2


SD_SCRIPTS = {  # blocks of SDXL's UNet with attention, and how deep it is there
    **{f"input_blocks_{k}_1": 2 for k in (4, 5)},
    **{f"input_blocks_{k}_1": 10 for k in (7, 8)},
    "middle_block_1": 10,
    **{f"output_blocks_{k}_1": 10 for k in (0, 1, 2)},
    **{f"output_blocks_{k}_1": 2 for k in (3, 4, 5)},
}
"""sd-scripts makes these modules, and reads no others."""


def test_a_kohya_file_for_sdxl_has_the_names_of_sd_scripts() -> None:
    unet = build_parts(REAL["sdxl"], (8, 8), device="meta")["unet"]
    names = [n for n, _ in unet.named_modules() if re.search(r"attn[12]\.to_([qkv]|out\.0)$", n)]
    lora = {
        f"unet.{n}.{end}.weight": torch.zeros(4, 4) for n in names for end in ("lora_A", "lora_B")
    }
    modules = {name.split(".")[0] for name in kohya_weights(lora, torch.float32, XL)}
    assert modules == {
        f"lora_unet_{block}_transformer_blocks_{k}_attn{a}_to_{x}"
        for block, depth in SD_SCRIPTS.items()
        for k in range(depth)
        for a in (1, 2)
        for x in ("q", "k", "v", "out_0")
    }


@pytest.mark.parametrize(
    ("version", "v2", "architecture"),
    [
        ("sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_web_uis_are_told_the_kind_of_the_model(
    version: str, v2: str, architecture: str, tuned: Tuned, tmp_path: Path
) -> None:
    run: Any = SimpleNamespace(weights=tuned("lora").weights, environment={"base_version": version})
    path = write_kohya(run, tmp_path / "a.safetensors", "float32")
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["ss_base_model_version"] == version and about["ss_v2"] == v2
    assert about["modelspec.architecture"] == architecture


@pytest.mark.parametrize(
    ("name", "version"), [("sd15", "sd_v1"), ("sd21", "sd_v2_v"), ("sdxl", "sdxl_base_v1-0")]
)
def test_the_kind_of_a_published_model(name: str, version: str) -> None:
    real, pipeline = REAL[name], SimpleNamespace()
    parts = build_parts(real, (8, 8), device="meta")
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=real.scheduler), **parts)
    assert base_version(Backbone(pipeline, name, torch.device("meta"))) == version


def test_plain_diffusers_finds_a_lora_in_the_runs_folder(tuned: Tuned, fresh: Any) -> None:
    run = tuned("lora")
    assert not (run.folder / LORA_FILE).is_symlink()
    plain, own = fresh(), run.load("cpu")
    plain.pipeline.load_textual_inversion(run.weights, weight_name="learned_embeds.safetensors")
    before = answers(plain)
    plain.pipeline.load_lora_weights(run.folder)
    assert torch.equal(answers(plain), answers(own)) and not torch.equal(answers(plain), before)
    assert not (tuned("attention").folder / LORA_FILE).exists()


def test_names_without_the_unets_prefix_become_the_same(tuned: Tuned) -> None:
    """diffusers' converter leaves such names as they are: silently, and no program knows them."""
    lora = load_file(tuned("lora").weights / LORA_FILE)
    bare = {name.removeprefix("unet."): value for name, value in lora.items()}
    expected = kohya_weights(lora, torch.float32)
    tensors = kohya_weights(bare, torch.float32)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_what_is_no_lora_is_not_written_as_one(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no LoRA"):
        write_kohya(tuned("attention"), tmp_path / "dog.safetensors")
    run = tuned("lora")
    weights = run.weights
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        write_kohya(run, tmp_path / "dog.bin")
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_kohya(run, tmp_path / "mine.safetensors")
    both = tmp_path / "both"
    both.mkdir()
    (both / LORA_FILE).write_bytes((weights / LORA_FILE).read_bytes())
    save_file({"x": torch.zeros(1)}, both / "text_encoder.safetensors")
    with pytest.raises(UserError, match="text encoder was trained"):
        write_kohya(SimpleNamespace(weights=both), tmp_path / "dog.safetensors")  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == {"mine.safetensors", "both"}
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


# --- a whole pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_an_exported_pipeline_is_the_run_in_plain_diffusers(
    name: str, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tuned(name), tmp_path / "new" / "pipeline"
    export_pipeline(run, out)
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    own = run.load("cpu")
    plain = replace(own, pipeline=pipeline)
    ids = pipeline.tokenizer(PROMPT).input_ids
    assert ids == own.tokenizer(PROMPT).input_ids
    token = pipeline.tokenizer.convert_tokens_to_ids("<sks>")
    assert token in ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, own.text_encoder.get_input_embeddings().weight)
    assert pipeline.text_encoder.config.vocab_size == len(table)
    drawn = [pixels(generate(b, PROMPT, num_images=2, seed=1)) for b in (own, plain)]
    if name == "lora":  # merged: the same sum in another order
        assert not any("lora" in key for key in pipeline.unet.state_dict())
        torch.testing.assert_close(answers(plain), answers(own), rtol=1e-4, atol=1e-5)
        assert np.abs(drawn[0] - drawn[1]).max() <= 1
    else:
        assert torch.equal(answers(plain), answers(own))
        assert np.array_equal(*drawn)
    untuned = open_backbone(run.config.backbone, device="cpu")
    untuned.add_token("<sks>", "sks" if name != "textual inversion" else "dog")
    assert not torch.allclose(answers(plain), answers(untuned), rtol=1e-3)

    # transformers 4 finds the words and the tensors, too.
    vocab = json.loads((out / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    merges = (out / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert vocab == {k: i for k, i in pipeline.tokenizer.get_vocab().items() if k != "<sks>"}
    assert all(left + right in vocab for left, right in (pair.split(" ") for pair in merges))
    names = load_file(out / "text_encoder" / "model.safetensors").keys()
    assert all(n.startswith("text_model.") for n in names)

    # It is a backbone like any other, with what is known of its words, and its card works.
    assert open_backbone(out, device="cpu").facts == own.facts
    monkeypatch.chdir(out)
    scope: dict[str, Any] = {}
    exec(code(out / CARD), scope)
    assert scope["image"].size == (32, 32)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        export_pipeline(run, out)


def test_a_pipeline_is_exported_in_half_precision(tuned: Tuned, tmp_path: Path) -> None:
    export_pipeline(tuned("attention"), tmp_path / "half", "float16")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (tmp_path / "half" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


# --- a folder to share ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "attention"])
def test_what_is_shared_draws_and_shows_no_photo(
    name: str, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tuned(name), tmp_path / "for-you"
    result = say("export", run.folder, "--share", out)
    assert result.code == 0 and str(out) in result.out
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    weights = {f"weights/{p.name}" for p in run.weights.iterdir()}
    lora = {LORA_FILE} if name == "lora" else set()
    expected = {CARD, "config.json", "environment.json", SAMPLES, *weights, *lora}
    assert files == expected  # no picture.png, nothing of validation/ or logs/
    assert not any(p.is_symlink() for p in out.rglob("*"))
    source = run.config.backbone
    for file in (CARD, "config.json", "environment.json"):  # nothing names a folder from here
        text = (out / file).read_text(encoding="utf-8")
        assert source not in text and str(run.config.image.parent) not in text
    backbone = open_backbone(source, device="cpu")
    assert torch.equal(answers(Run.open(out).load(backbone=backbone)), answers(run.load("cpu")))
    (tmp_path / Path(source).name).symlink_to(source)
    monkeypatch.chdir(out)
    lines, scope = code(out / CARD), {}
    exec(lines.replace(f'"{Path(source).name}"', f'"../{Path(source).name}"'), scope)
    first = np.int16(Image.open(SAMPLES).crop((0, 0, 32, 32)))
    assert np.abs(first - np.int16(scope["image"])).max() <= 1
    monkeypatch.chdir(tmp_path)
    assert "not empty" in say("export", run.folder, "--share", out).sentence


def test_a_photo_within_the_weights_is_not_shared(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="photo itself"):
        share(tuned("vico"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "--out, --share or" in say("export", tuned("lora").folder).sentence


class Hub:
    """The Hub's client, without a Hub."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id} | options))
        name = repo_id if "/" in repo_id else f"someone/{repo_id}"
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
        files = {p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*")}
        self.calls.append(("upload", options | {"files": files}))


def test_a_run_is_uploaded_on_request_alone(
    tuned: Tuned, subject_picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    run = tuned("lora")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert say("export", run.folder, "--share", tmp_path / "a").code == 0 and Hub.calls == []
    result = say("export", run.folder, "--push-to-hub")
    assert result.code == 0 and "someone/my-dog" in result.out
    (_, made), (_, sent) = Hub.calls
    assert made == {"repo_id": "my-dog", "exist_ok": True, "private": True}
    assert sent["repo_id"] == "someone/my-dog"
    assert {CARD, LORA_FILE, SAMPLES} < sent["files"] and "picture.png" not in sent["files"]
    words = ["tune", subject_picture, "--category", "dog", "--backbone", run.config.backbone]
    words += ["--max-train-steps", 1, "--num-samples", 0, "--device", "cpu"]
    assert "owner/name" in say(*words, "--out", tmp_path / "b", "--push-to-hub", "a b").sentence
    assert not (tmp_path / "b").exists()
    assert say(*words, "--out", tmp_path / "b", "--push-to-hub", "me/rex").code == 0
    assert Hub.calls[-1][1]["repo_id"] == "me/rex"

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Token is required, but no token found")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert "hf auth login" in say("export", run.folder, "--push-to-hub", "me/rex").sentence
