"""Stable Diffusion 1.4, 1.5, 2.1 and SDXL, small, of the published make: every method on each.

The oracle is diffusers: a plain pipeline opened from the same folder, and numpy.
"""

import copy
import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from real_configs import (
    PARAMETERS,
    PICTURE_SIDE,
    REAL,
    RealConfig,
    build,
    build_parts,
    shrink,
    words,
)
from safetensors.torch import load_file
from torch import Tensor

from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.config import TuningConfig
from sude_lab.diffusion import add_noise
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone, pool_at_the_end
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import METHODS, Method
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.sude import SudeRegularizer, sude_terms
from sude_lab.tuning import Step

PROMPT = "photo of a running dog"
SUBJECT = "photo of a running <sks> dog"

CASES: dict[str, dict[str, Any]] = {
    "dreambooth, whole unet": {"method": "dreambooth", "train": "unet"},
    "dreambooth, attention": {"method": "dreambooth", "train": "attention"},
    "dreambooth, lora": {"method": "dreambooth", "train": "lora"},
    "dreambooth, text encoder and token": {
        "method": "dreambooth",
        "train": "attention",
        "train_text_encoder": True,
        "token_learning_rate": 1e-2,
    },
    "textual_inversion": {"method": "textual_inversion", "token_learning_rate": 1e-2},
    "custom_diffusion": {"method": "custom_diffusion", "token_learning_rate": 1e-2},
    "vico": {"method": "vico", "token_learning_rate": 1e-2},
}


@dataclass
class Model:
    """One of the four, as a user has it on the disk."""

    name: str
    real: RealConfig
    folder: Path
    backbone: Backbone
    plain: Any
    """The folder in plain diffusers, with the sampler that `generate` promises."""
    runs: dict[tuple[str, str], "Tuned"] = field(default_factory=dict)
    """What `run` has tuned so far."""

    def open_plain(self) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        # Written out, and not made from the folder's own scheduler: an oracle of its own.
        pipeline.scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type="v_prediction" if self.name == "sd21" else "epsilon",
        )
        return pipeline

    def fresh(self) -> Backbone:
        """A copy to be tuned; what no method touches is shared, since copies take the longest."""
        pipeline = self.backbone.pipeline
        shared = {id(part): part for part in (pipeline.vae, pipeline.scheduler)}
        return replace(self.backbone, pipeline=copy.deepcopy(pipeline, shared))

    @property
    def is_xl(self) -> bool:
        return self.name == "sdxl"


@pytest.fixture(scope="module", params=REAL)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name = request.param
    work = tmp_path_factory.mktemp(name)
    build(shrink(REAL[name])[0], work).save_pretrained(work / name, safe_serialization=True)
    opened = open_backbone(work / name, device="cpu")
    found = Model(name, REAL[name], work / name, opened, None)
    found.plain = found.open_plain()
    return found


@pytest.fixture(scope="module")
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


@pytest.fixture(scope="module")
def class_images(subject_picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with one picture of the category, for methods that want some."""
    folder = tmp_path_factory.mktemp("dogs")
    shutil.copy(subject_picture, folder / "a dog.png")
    return folder


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(a: list[Image.Image], b: list[Image.Image]) -> int:
    """The largest difference of a pixel, of 255."""
    pairs = zip(a, b, strict=True)
    return max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in pairs)


def alike(a: list[Image.Image], b: list[Image.Image]) -> bool:
    """Equal but for the last bit of float32, which turns a few values of 8 bit by one."""
    differ = np.mean([np.not_equal(x, y).mean() for x, y in zip(a, b, strict=True)])
    return distance(a, b) <= 1 and bool(differ < 1e-3)


def plain_condition(model: Model, prompt: str, negative: str | None = None) -> list[Condition]:
    """What diffusers' pipeline gives its UNet for a prompt, and for no prompt."""
    pipeline = model.plain
    if not model.is_xl:
        embeds = pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
        return [Condition(e) for e in embeds]
    found, null, pooled, null_pooled = pipeline.encode_prompt(
        prompt,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative,
    )
    side = (PICTURE_SIDE, PICTURE_SIDE)
    width = pipeline.text_encoder_2.config.projection_dim
    sizes = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, width)
    return [Condition(found, pooled, sizes), Condition(null, null_pooled, sizes)]


def plain_output(model: Model, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output of the plain UNet, called as diffusers' pipelines call it."""
    added = {}
    if model.is_xl:
        added = {"text_embeds": condition.pooled, "time_ids": condition.sizes}
    return model.plain.unet(
        x_t,
        t,
        encoder_hidden_states=condition.hidden,
        added_cond_kwargs=added or None,
    ).sample


def parts_of(condition: Condition) -> list[Tensor]:
    parts = (condition.hidden, condition.pooled, condition.sizes)
    return [part for part in parts if part is not None]


# --- the configurations themselves ---------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_the_configurations_make_models_of_the_published_size(name: str) -> None:
    parts = build_parts(REAL[name], device="meta")
    counts = {part: sum(p.numel() for p in net.parameters()) for part, net in parts.items()}
    assert counts == PARAMETERS[name]


@pytest.mark.parametrize("name", REAL)
def test_shrinking_says_what_it_changed_and_changes_sizes_only(name: str) -> None:
    real = REAL[name]
    tiny, changed = shrink(real)
    assert (tiny.scheduler, tiny.options) == (real.scheduler, real.options)
    assert (tiny.pad_token, tiny.pad_token_2) == (real.pad_token, real.pad_token_2)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(real, part), getattr(tiny, part)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert changed.get(f"{part}.{key}", (value, value)) == (value, after[key])
    sizes = {
        *("attention_head_dim", "block_out_channels", "cross_attention_dim", "hidden_size"),
        *("intermediate_size", "layers_per_block", "norm_num_groups", "num_attention_heads"),
        *("num_hidden_layers", "projection_dim", "sample_size"),
    }
    if name == "sdxl":
        sizes |= {"addition_time_embed_dim", "projection_class_embeddings_input_dim"}
        sizes |= {"transformer_layers_per_block"}
    assert {key.split(".")[1] for key in changed} == sizes


# --- opening -------------------------------------------------------------------------------------


def test_the_backbone_is_what_the_folder_says(model: Model) -> None:
    backbone, scheduler = model.backbone, model.real.scheduler
    assert type(backbone.pipeline.scheduler).__name__ == scheduler["_class_name"]
    assert backbone.is_xl == model.is_xl
    assert backbone.resolution == PICTURE_SIDE and backbone.facts == {}
    schedule = backbone.schedule
    assert schedule.prediction_type == ("v_prediction" if model.name == "sd21" else "epsilon")
    betas = np.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, 1000) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=2e-5)
    lengths = [
        tokenizer("dog", padding="max_length").input_ids for tokenizer in backbone.tokenizers
    ]
    assert {len(ids) for ids in lengths} == {77}
    pads = [tokenizer.pad_token for tokenizer in backbone.tokenizers]
    assert pads == [p for p in (model.real.pad_token, model.real.pad_token_2) if p]
    for ids, pad in zip(lengths, pads, strict=True):
        assert (ids[-1] == 0) == (pad == "!")  # "!" is the first word of CLIP's vocabulary


def test_prompts_are_encoded_as_diffusers_does(model: Model) -> None:
    expected, null = plain_condition(model, PROMPT)
    with torch.no_grad():
        seen = model.backbone.encode_prompts([PROMPT, "photo of a cat"])
        seen_null = model.backbone.null_condition()
    assert len(seen) == 2 and len(seen_null) == 1
    assert len(parts_of(seen)) == (3 if model.is_xl else 1)
    for a, b in zip(parts_of(seen[:1]), parts_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(parts_of(seen_null), parts_of(null), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen.hidden[0], seen.hidden[1], atol=1e-2)
    if model.is_xl:
        assert seen_null.pooled is not None and seen_null.sizes is not None
        assert not seen_null.hidden.any() and not seen_null.pooled.any()
        assert seen_null.sizes.tolist() == [[128, 128, 0, 0, 128, 128]]
    else:
        assert seen_null.hidden.any()


def test_without_forced_zeros_the_empty_prompt_is_encoded(model: Model) -> None:
    backbone = model.fresh()
    if model.is_xl:
        backbone.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    expected = plain_condition(model, PROMPT, negative="")[1]
    for a, b in zip(parts_of(backbone.null_condition()), parts_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_unet_is_called_as_diffusers_does(model: Model) -> None:
    x_t, t = noise(3, 4, 16, 16), torch.tensor([7, 500, 981])
    condition, null = plain_condition(model, PROMPT)
    outputs = []
    for row in (condition, null):
        seen = model.backbone.predict(x_t, t, row.expand(3))
        one_by_one = [plain_output(model, x_t[k : k + 1], t[k], row) for k in range(3)]
        torch.testing.assert_close(seen, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)
        outputs.append(seen)
    assert not torch.allclose(*outputs, atol=1e-3)  # the words matter


@torch.no_grad()
def test_pictures_are_encoded_at_the_scale_of_the_model(model: Model, picture: Image.Image) -> None:
    image = picture.resize((PICTURE_SIDE, PICTURE_SIDE))
    mean, std = model.backbone.encode_pictures([image])
    posterior = model.plain.vae.encode(
        VaeImageProcessor(do_resize=False).preprocess(image)
    ).latent_dist
    scale = 0.13025 if model.is_xl else 0.18215
    assert mean.shape == (1, 4, 16, 16)
    torch.testing.assert_close(mean, posterior.mean * scale)
    torch.testing.assert_close(std, posterior.std * scale)


@pytest.mark.parametrize("negative", [None, "cat"])
def test_pictures_are_those_of_a_plain_call_of_diffusers(
    model: Model, negative: str | None
) -> None:
    before = model.backbone.pipeline.scheduler
    seen = generate(
        model.backbone,
        PROMPT,
        num_images=2,
        seed=7,
        num_inference_steps=3,
        guidance_scale=5.0,
        negative_prompt=negative,
    )
    assert model.backbone.pipeline.scheduler is before
    expected = plain_pictures(model.plain, PROMPT, steps=3, negative=negative)
    assert alike(seen, expected)
    assert distance(seen[:1], seen[1:]) > 8


def plain_pictures(
    pipeline: Any, prompt: str, *, steps: int, negative: str | None = None
) -> list[Image.Image]:
    """What diffusers draws of seed 7."""
    start = torch.cat([noise(1, 4, 16, 16, seed=7 * 100_003 + k) for k in range(2)])
    return pipeline(
        [prompt] * 2,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=5.0,
        negative_prompt=negative and [negative] * 2,
    ).images


@pytest.mark.parametrize("model", ["sdxl"], indirect=True)
@pytest.mark.parametrize("force", [True, False])
def test_a_vae_that_overflows_in_float16_decodes_in_float32(model: Model, force: bool) -> None:
    """SDXL's does, and says so: then pictures are those of float32, and else there are none."""
    backbone = replace(model.backbone.copy(), dtype=torch.float16)
    vae = backbone.pipeline.vae
    vae.register_to_config(force_upcast=force)
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(1e6)
    about: dict[str, Any] = {"num_images": 1, "seed": 7, "num_inference_steps": 2}
    assert torch.isfinite(backbone.encode_pictures([Image.new("RGB", (128, 128))])[0]).all()
    if not force:
        with pytest.raises(UserError, match="numbers that are none"):
            generate(backbone, PROMPT, **about)
        return
    drawn = generate(backbone, PROMPT, **about)
    assert distance(drawn, generate(replace(backbone, dtype=torch.float32), PROMPT, **about)) < 24
    assert "decode" not in vars(vae)


@pytest.mark.parametrize("model", ["sdxl"], indirect=True)
def test_sdxl_is_told_the_size_that_it_is_tuned_at(
    model: Model, picture: Image.Image, class_images: Path
) -> None:
    """As diffusers' scripts tell it: original size, crop, target size of the picture used."""
    backbone = model.fresh()
    settings = TuningConfig(
        Path("dog.png"),
        "dog",
        resolution=64,
        train="attention",
        train_text_encoder=True,
        max_train_steps=1,
        train_batch_size=1,
        prior_loss_weight=1.0,
        class_images=class_images,
    )
    sizes: list[list[float]] = []
    forward = backbone.unet.forward

    def listen(*args: Any, added_cond_kwargs: dict[str, Tensor], **kwargs: Any) -> Any:
        sizes.extend(added_cond_kwargs["time_ids"].tolist())
        return forward(*args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    backbone.unet.forward = listen
    list(tune(settings, backbone, picture))
    assert len(sizes) >= 4 and all(row == [64, 64, 0, 0, 64, 64] for row in sizes)
    sizes.clear()
    generate(backbone, PROMPT, num_images=1, num_inference_steps=1)
    assert all(row == [128, 128, 0, 0, 128, 128] for row in sizes)


# --- SuDe ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_rho_and_gates_are_those_of_the_models_own_outputs(model: Model) -> None:
    """In float64, against numpy: rho from eps or v as it comes, eq. 7 and 8 from eps."""
    t = torch.tensor([3, 250, 700, 999])
    condition, null = plain_condition(model, "photo of a dog")
    x_t = noise(4, 4, 16, 16)
    category = model.backbone.predict(x_t, t, condition.expand(4)).double()
    uncond = model.backbone.predict(x_t, t, null.expand(4)).double()
    d = category - uncond
    rho = torch.tensor([-0.5, 0.75, 1.25, 3.0], dtype=torch.float64)
    aside = noise(4, 4, 16, 16, seed=1).double() * d.std()
    aside -= d * ((aside * d).sum((1, 2, 3)) / (d * d).sum((1, 2, 3))).view(-1, 1, 1, 1)
    subject = uncond + rho.view(-1, 1, 1, 1) * d + aside

    terms = sude_terms(
        subject, category, uncond, x_t.double(), t, model.backbone.schedule, weighting="simple"
    )
    np.testing.assert_allclose(terms.rho, rho, rtol=1e-6)
    assert terms.gate.tolist() == [True, True, False, False]
    abar = model.backbone.schedule.alphas_cumprod[t].numpy()[:, None, None, None]

    def eps(output: Tensor) -> np.ndarray:
        if model.name == "sd21":  # v = sqrt(abar) eps - sqrt(1 - abar) x_0, solved with eq. 1
            return np.sqrt(abar) * output.numpy() + np.sqrt(1 - abar) * x_t.double().numpy()
        return output.numpy()

    def mean_square(a: Tensor, b: Tensor) -> np.ndarray:
        return ((eps(a) - eps(b)) ** 2).mean((1, 2, 3))

    loss = mean_square(subject, category) - mean_square(subject, uncond)
    np.testing.assert_allclose(terms.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(terms.threshold, -mean_square(category, uncond), rtol=1e-6)
    np.testing.assert_allclose(terms.gated, loss * [1, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("prior", ["current", "pretrained"])
@torch.no_grad()
def test_the_plug_takes_every_models_condition(model: Model, prior: Any) -> None:
    t = torch.tensor([20, 900])
    backbone = model.backbone
    condition, null = plain_condition(model, "photo of a dog")
    x_t = add_noise(noise(2, 4, 16, 16), noise(2, 4, 16, 16, seed=1), t, backbone.schedule)
    subject = backbone.predict(x_t, t, backbone.encode_prompts([PROMPT]).expand(2))
    both = concatenate([null.expand(2), condition.expand(2)])
    uncond, category = backbone.predict(torch.cat([x_t] * 2), t.repeat(2), both).chunk(2)
    expected = sude_terms(subject, category, uncond, x_t, t, backbone.schedule)

    scheduler = model.plain.scheduler
    plug = SudeRegularizer(model.plain.unet, scheduler, condition, null, prior=prior)
    seen = plug.terms(x_t, t, subject)
    torch.testing.assert_close(seen.rho, expected.rho)
    torch.testing.assert_close(seen.loss, expected.loss)
    torch.testing.assert_close(seen.threshold, expected.threshold)
    assert torch.equal(seen.gate, expected.gate)


# --- every method --------------------------------------------------------------------------------


def test_every_method_has_a_case() -> None:
    assert set(METHODS) <= {case["method"] for case in CASES.values()}


@dataclass
class Tuned:
    """A run of two steps."""

    backbone: Backbone
    steps: list[Step]
    states: list[dict[str, Tensor]]

    @property
    def method(self) -> Method:
        return self.steps[-1].method


def run(model: Model, case: str, prior: Any, picture: Image.Image, class_images: Path) -> Tuned:
    if CASES[case]["method"] not in METHODS:
        pytest.skip(f"the method {CASES[case]['method']} is not there yet")
    if (case, prior) in model.runs:
        return model.runs[case, prior]
    chosen = {"learning_rate": 1e-2, "weight_sude": 0.4} | CASES[case]
    config = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        prior=prior,
        max_train_steps=2,
        train_batch_size=2,
        class_images=class_images,
        seed=5,
        **chosen,
    )
    tuned = Tuned(model.fresh(), [], [])
    for step in tune(config, tuned.backbone, picture):
        tuned.steps.append(step)
        tuned.states.append(step.method.state_dict())
    return model.runs.setdefault((case, prior), tuned)


def without_gradient(model: Model, names: set[str]) -> set[str]:
    """What of the text encoders has no say: SDXL reads the first one before its last layer."""
    if not model.is_xl:
        return set()
    last = f"encoder.layers.{model.backbone.text_encoder.config.num_hidden_layers - 1}."
    return {
        name
        for name in names
        if name.startswith("text_encoder.") and (last in name or "final_layer_norm" in name)
    }


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_tuned_saved_loaded_and_sampled(
    model: Model, case: str, picture: Image.Image, class_images: Path, tmp_path: Path
) -> None:
    if CASES[case]["method"] == "vico" and model.is_xl:
        with pytest.raises(UserError, match="SDXL"):
            run(model, case, "current", picture, class_images)
        return
    runs = {p: run(model, case, p, picture, class_images) for p in ("current", "pretrained")}
    for tuned in runs.values():
        assert len(tuned.steps) == 2
        for step in tuned.steps:
            assert all(math.isfinite(value) for value in step.row().values())
            assert (step.tau < 0).all() and len(step.rho) == 2
        first, second = tuned.states
        still = {name for name in first if torch.equal(first[name], second[name])}
        assert first and still == without_gradient(model, set(first))
    # Before the first step the two priors are one; then they part, if the model itself is trained.
    current, pretrained = (tuned.steps for tuned in runs.values())
    torch.testing.assert_close(current[0].tau, pretrained[0].tau)
    moves = any(name.startswith(("unet.", "text_encoder")) for name in runs["current"].states[0])
    assert torch.allclose(current[1].tau, pretrained[1].tau, rtol=1e-4) != moves

    tuned = runs["pretrained"]
    save_weights(tuned.method, tmp_path / "weights")
    loaded = model.fresh()
    load_weights(CASES[case]["method"], loaded, tmp_path / "weights")
    x_t, t = noise(2, 4, 16, 16), torch.tensor([100, 900])
    start = SUBJECT.replace(
        "<sks>", tuned.method.initializer(tuned.method.config, 0)
    )  # what the token began as
    outputs = []
    with torch.no_grad():
        for backbone, prompt in (
            (tuned.backbone, SUBJECT),
            (loaded, SUBJECT),
            (model.backbone, start),
        ):
            condition = backbone.encode_prompts([prompt])
            outputs.append(backbone.predict(x_t, t, condition.expand(2)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)

    images = generate(loaded, SUBJECT, num_images=2, seed=7, num_inference_steps=2)
    assert [image.size for image in images] == [(PICTURE_SIDE, PICTURE_SIDE)] * 2
    assert distance(images[:1], images[1:]) > 8


def test_a_lora_draws_the_same_pictures_in_plain_diffusers(
    model: Model, picture: Image.Image, class_images: Path, tmp_path: Path
) -> None:
    tuned = run(model, "dreambooth, lora", "pretrained", picture, class_images)
    save_weights(tuned.method, tmp_path)
    pipeline = model.open_plain()
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    if model.is_xl:
        pool_at_the_end(
            Backbone(pipeline, "", torch.device("cpu"))
        )  # as the card's lines do: plain diffusers reads at an added word
        vectors = load_file(tmp_path / "learned_embeds.safetensors")
        for key, ending in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                vectors[key],
                token="<sks>",
                text_encoder=getattr(pipeline, f"text_encoder{ending}"),
                tokenizer=getattr(pipeline, f"tokenizer{ending}"),
            )
    else:
        pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    seen = plain_pictures(pipeline, SUBJECT, steps=2)
    expected = generate(
        tuned.backbone,
        SUBJECT,
        num_images=2,
        seed=7,
        num_inference_steps=2,
        guidance_scale=5.0,
    )
    assert alike(seen, expected)
    pipeline.unload_lora_weights()
    assert not alike(plain_pictures(pipeline, SUBJECT, steps=2), expected)


def test_full_size_tokenizers_have_the_published_ends(tmp_path: Path) -> None:
    tokenizer = words(tmp_path, "!", 49408)
    ids = tokenizer("photo of a dog", padding="max_length").input_ids
    assert len(tokenizer) == 49408 and len(ids) == 77
    assert (ids[0], ids[5], ids[6], ids[-1]) == (49406, 49407, 0, 0)


def test_an_sdxl_whose_index_names_no_tokenizer_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """diffusers opens it, since an SDXL may do without one of its text encoders."""
    build(shrink(REAL["sdxl"])[0], tmp_path / "parts").save_pretrained(tmp_path / "sdxl")
    index = tmp_path / "sdxl" / "model_index.json"
    about = json.loads(index.read_text()) | {"tokenizer": [None, None]}
    index.write_text(json.dumps(about))
    with pytest.raises(UserError, match="names no tokenizer"):
        open_backbone(tmp_path / "sdxl", device="cpu")
