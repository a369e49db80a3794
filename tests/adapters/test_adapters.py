"""Transformers of flow matching, small, of the published make: tuned, drawn, saved and loaded.

The oracles are diffusers' pipelines, opened from the same folder, and its training scripts' loops,
written out.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_models import MODELS, build
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone, Condition
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import LORA_FILE, load_weights, save_weights
from sude_lab.methods import configure
from sude_lab.runs.export import _drawing_code
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.runs.strength import Strength, guidance_for
from sude_lab.sude import SudeRegularizer
from sude_lab.tuning import Step

SUBJECT = "photo of a running <sks> dog"
CASES: dict[str, dict[str, Any]] = {
    "all": {"train": "unet"},
    "attention": {"train": "attention"},
    "lora": {"train": "lora", "lora_rank": 4},
    "token and text encoder": {
        "train": "attention",
        "train_text_encoder": True,
        "token_learning_rate": 1e-2,
    },
    "textual_inversion": {"method": "textual_inversion", "token_learning_rate": 1e-2},
}
ALL, CLIPS = tuple(MODELS), tuple(name for name in MODELS if name.startswith("sd3"))


@dataclass
class Model:
    """A small model as a user has it on the disk."""

    name: str
    folder: Path
    opened: Backbone

    def fresh(self) -> Backbone:
        return self.opened.copy()

    def plain(self) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / name
            build(name, folder)
            made[name] = Model(name, folder, open_backbone(folder, device="cpu"))
        return made[name]

    return get


@pytest.fixture(scope="module")
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def settings(**values: Any) -> TuningConfig:
    usual: dict[str, Any] = {
        "image": Path("dog.png"),
        "category": "dog",
        "max_train_steps": 2,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_sude": 2.0,
        "weighting": "simple",
        "prior_loss_weight": 0.0,
        "seed": 3,
    }
    return TuningConfig(**usual | values)


def tuned(model: Model, picture: Image.Image, **values: Any) -> tuple[Backbone, list[Step]]:
    backbone = model.fresh()
    return backbone, list(prepared_tuning(settings(**values), backbone, picture))


def plain_picture(model: Model, pipeline: Any, prompt: str) -> Image.Image:
    arguments = model.opened.call_arguments(
        prompt=[prompt], num_inference_steps=2, guidance_scale=3.0, output_type="pil"
    )
    return pipeline(**arguments, generator=torch.Generator().manual_seed(7 * 100_003)).images[0]


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.int16(a) - np.int16(b)).max())


def draw(backbone: Backbone, prompt: str) -> Image.Image:
    return generate(
        backbone, prompt, num_images=1, seed=7, num_inference_steps=2, guidance_scale=3.0
    )[0]


@pytest.mark.parametrize("name", ALL)
def test_untuned_it_draws_what_plain_diffusers_draws(
    name: str, model_of: Callable[[str], Model]
) -> None:
    model = model_of(name)
    dog = draw(model.opened, "photo of a dog")
    assert distance(dog, plain_picture(model, model.plain(), "photo of a dog")) <= 1
    assert distance(dog, draw(model.opened, "photo of a burning candle")) > 1


@pytest.mark.parametrize(
    ("name", "case"),
    [(n, c) for n in ALL for c in ("all", "attention", "lora")]
    + [(n, c) for n in CLIPS[:1] for c in ("token and text encoder", "textual_inversion")],
)
def test_it_is_tuned_saved_and_loaded_by_plain_diffusers(
    name: str,
    case: str,
    model_of: Callable[[str], Model],
    picture: Image.Image,
    tmp_path: Path,
) -> None:
    model = model_of(name)
    values = {"learning_rate": 1e-3 if name in CLIPS else 5e-2} | CASES[case]
    for w_s in (0.0, 2.0):
        backbone, steps = tuned(model, picture, weight_sude=w_s, monitor_sude=True, **values)
        assert len(steps) == 2
        for step in steps:
            assert all(math.isfinite(value) for value in step.row().values())
            assert (step.tau < 0).all()
    method = steps[-1].method
    weights = tmp_path / "weights"
    save_weights(method, weights)
    config = configure(settings(**CASES[case]), model.opened)
    expected = draw(backbone, SUBJECT)
    assert distance(expected, draw(model.opened, SUBJECT.replace("<sks>", "sks"))) > 1

    loaded = model.fresh()
    load_weights(config.method, loaded, weights)
    assert distance(draw(loaded, SUBJECT), expected) <= 1

    if (weights / LORA_FILE).is_file():
        (tmp_path / LORA_FILE).write_bytes((weights / LORA_FILE).read_bytes())
    pipeline = model.plain()
    code = _drawing_code(config, model.opened, weights, SUBJECT, False)
    code = code.partition("from_pretrained")[2].partition("\n")[2].partition("image = ")[0]
    names: dict[str, Any] = {"pipeline": pipeline}
    exec("from safetensors.torch import load_file\nfrom tokenizers import AddedToken", names)
    with chdir(tmp_path):
        exec(code, names)
    assert distance(plain_picture(model, pipeline, SUBJECT), expected) <= 1


@pytest.mark.parametrize("name", ALL)
def test_a_lora_is_loaded_at_another_strength(
    name: str, model_of: Callable[[str], Model], picture: Image.Image, tmp_path: Path
) -> None:
    model = model_of(name)
    _, steps = tuned(model, picture, train="lora", lora_rank=4, learning_rate=5e-2)
    save_weights(steps[-1].method, tmp_path)
    drawn = {}
    for scale in (0.0, 1.0):
        loaded = model.fresh()
        load_weights("dreambooth", loaded, tmp_path, scale=scale)
        drawn[scale] = draw(loaded, "photo of a dog")
    assert distance(drawn[0.0], draw(model.opened, "photo of a dog")) <= 1
    assert distance(drawn[1.0], drawn[0.0]) > 1


# --- the scripts' loops ---------------------------------------------------------------------------


def sd3_script(pipeline: Any, x: Tensor, noise: Tensor, index: Tensor, words: Condition) -> Any:
    """The heart of train_dreambooth_lora_sd3.py with its defaults, and what it says."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * x + sigmas * noise
    output = pipeline.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=words.hidden,
        pooled_projections=words.pooled,
        return_dict=False,
    )[0]
    picture = output * (-sigmas) + noisy
    losses = (picture.float() - x.float()).square().flatten(1).mean(1)
    return noisy, timesteps, output, losses, sigmas.flatten().square()


def klein_script(pipeline: Any, x: Tensor, noise: Tensor, index: Tensor, words: Condition) -> Any:
    """The heart of train_dreambooth_lora_flux2_klein.py with its defaults."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * x + sigmas * noise
    ids, packed = pipeline._prepare_latent_ids(noisy), pipeline._pack_latents(noisy)
    output = pipeline.transformer(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=words.hidden,
        txt_ids=pipeline._prepare_text_ids(words.hidden),
        img_ids=ids,
        return_dict=False,
    )[0]
    output = pipeline._unpack_latents_with_ids(output[:, : packed.size(1)], ids)
    losses = (output.float() - (noise - x).float()).square().flatten(1).mean(1)
    return noisy, timesteps, output, losses, torch.ones(len(x))


def z_image_script(pipeline: Any, x: Tensor, noise: Tensor, index: Tensor, words: Condition) -> Any:
    """The heart of train_dreambooth_lora_z_image.py with its defaults; it encodes by itself."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * x + sigmas * noise
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(
            ["photo of a <sks> dog"] * len(x),
            do_classifier_free_guidance=False,
            max_sequence_length=64,
        )
    pictures = list(noisy.unsqueeze(2).unbind(dim=0))
    outputs = pipeline.transformer(pictures, (1000 - timesteps) / 1000, embeds, return_dict=False)
    output = -torch.stack(outputs[0], dim=0).squeeze(2)
    losses = (output.float() - (noise - x).float()).square().flatten(1).mean(1)
    return noisy, timesteps, output, losses, torch.ones(len(x))


SCRIPTS = {
    "sd3": sd3_script,
    "sd35": sd3_script,
    "klein": klein_script,
    "z_image": z_image_script,
}


@pytest.mark.parametrize("name", ALL)
def test_a_step_is_that_of_diffusers_script_with_the_plug(
    name: str, model_of: Callable[[str], Model], picture: Image.Image
) -> None:
    """The gradient of `Tuning` at its first step, by the script's own loop and three lines more."""
    model, w_s = model_of(name), 2.0
    config = settings(train="attention", weight_sude=w_s, max_grad_norm=0.0, max_train_steps=1)
    seen: list[Any] = []
    backbone = model.fresh()
    run = prepared_tuning(config, backbone, picture)
    draws = run.draws

    class Watched:
        def draw(self, size: int, generator: torch.Generator) -> Any:
            seen.append(draws.draw(size, generator))
            return seen[-1]

    run.draws = Watched()
    (step,) = run
    gradients = {n: p.grad for n, p in step.method.parameters.items()}

    batch, pipeline = seen[0], model.plain()
    pipeline.transformer.requires_grad_(False)
    for n, p in pipeline.transformer.named_parameters():
        p.requires_grad_(f"transformer.{n}" in gradients)
    adapter = type(backbone)
    with torch.no_grad():
        sude = SudeRegularizer(
            pipeline.transformer,
            pipeline.scheduler,
            model.opened.encode_prompts(["photo of a dog"]),
            model.opened.null_condition(),
            weighting="simple",
            call=adapter.ask,
        )
    index = 999 - batch.t  # the script's table begins with noise
    with torch.no_grad():
        words = backbone.encode_prompts(["photo of a <sks> dog"] * len(index))
    script = SCRIPTS[name](pipeline, batch.x_0, batch.eps, index, words)
    noisy, timesteps, output, losses, weight = script
    weighted = model.opened.loss_weight(batch.t)
    torch.testing.assert_close(step.loss_subject * weighted, losses.detach(), rtol=1e-4, atol=1e-6)
    loss = losses.mean() + w_s * (weight * sude(noisy, timesteps, output)).mean()
    loss.backward()
    for n, p in pipeline.transformer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            size = p.grad.abs().max()
            assert (gradients[f"transformer.{n}"] - p.grad).abs().max() < 1e-3 * size + 1e-8
    terms = sude.terms(noisy, timesteps, output)
    torch.testing.assert_close(step.rho, terms.rho.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.tau, terms.threshold, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", CLIPS[:1])
def test_times_are_drawn_as_the_script_draws_them(
    name: str, model_of: Callable[[str], Model], picture: Image.Image
) -> None:
    """compute_density_for_timestep_sampling, logit_normal with mean 0 and deviation 1."""
    run = prepared_tuning(settings(), model_of(name).fresh(), picture)
    t = run.draws.draw(20_000, torch.Generator().manual_seed(0)).t
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    theirs = (z.sigmoid() * 1000).long()
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(t.double().quantile(share) - theirs[:20_000].double().quantile(share)) < 15
    assert t.min() >= 0 and t.max() <= 999


@pytest.mark.parametrize("name", ["klein", "z_image"])
def test_a_chat_has_a_null_prompt_that_is_not_empty(
    name: str, model_of: Callable[[str], Model]
) -> None:
    """No condition is what the pipeline itself makes of "" for its guidance."""
    model = model_of(name)
    null, pipeline = model.opened.null_condition(), model.plain()
    if name == "klein":
        hidden, _ = pipeline.encode_prompt("", max_sequence_length=64)
        assert torch.equal(null.hidden, hidden)
    else:
        _, rows = pipeline.encode_prompt("a", max_sequence_length=64)
        assert null.sizes is not None and len(rows[0]) == int(null.sizes)
        torch.testing.assert_close(null.hidden[0, : len(rows[0])], rows[0])


@pytest.mark.parametrize(
    ("name", "file", "entry"),
    [
        ("klein", "model_index.json", {"is_distilled": True}),
        ("klein", "transformer/config.json", {"guidance_embeds": True}),
        ("z_image", "", {}),
    ],
)
def test_what_is_distilled_is_refused_before_its_weights_are_read(
    name: str, file: str, entry: Any, model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    folder = tmp_path / ("Z-Image-Turbo" if name == "z_image" else "klein-4B")
    shutil.copytree(model_of(name).folder, folder)
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(b"nothing")
    if file:
        entries = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(entries | entry))
    with pytest.raises(UserError, match="has no denominator"):
        open_backbone(folder, device="cpu")


# --- more of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS[:1])
@pytest.mark.parametrize(
    "values",
    [
        {"prior": "current", "train": "lora"},
        {"prior_loss_weight": 1.0, "num_class_images": 2, "prior_preservation": "teacher"},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"horizontal_flip": True, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_what_else_a_run_can_have(
    name: str, values: dict[str, Any], model_of: Callable[[str], Model], picture: Image.Image
) -> None:
    _, steps = tuned(model_of(name), picture, **{"train": "attention"} | values)
    assert all(math.isfinite(value) for step in steps for value in step.row().values())


def test_what_follows_the_subjects_word_is_in_the_pooled_condition(
    model_of: Callable[[str], Model],
) -> None:
    """SD3's CLIPs pool at the first end mark, not at the highest id, which an added word has."""
    backbone = model_of("sd3").fresh()
    backbone.add_token("<sks>", "dog")
    both = backbone.encode_prompts(["photo of a <sks> dog", "photo of a <sks> cat"])
    assert both.pooled is not None
    assert (both.pooled[0] - both.pooled[1]).abs().max() > 1e-3


def test_guidance_without_training_moves_a_lora_to_its_category(
    model_of: Callable[[str], Model], picture: Image.Image
) -> None:
    backbone, _ = tuned(model_of("sd3"), picture, train="lora", weight_sude=0.0)
    config = settings(train="lora")
    alone = draw(backbone, SUBJECT)
    with guidance_for(
        config, backbone, "photo of a running {S*} dog", Strength(sude_guidance=1)
    ) as rho:
        guided = draw(backbone, SUBJECT)
    assert len(rho) == 2 and all(value.isfinite().all() for value in rho)
    assert distance(alone, guided) > 0
    with guidance_for(config, backbone, "photo of a running {S*} dog", Strength()):
        assert distance(alone, draw(backbone, SUBJECT)) == 0


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("sd3", {"method": "custom_diffusion"}, "custom_diffusion is not made for a"),
        ("sd3", {"method": "vico"}, "vico is not made for a"),
        ("sd3", {"method": "textual_inversion", "num_vectors": 2}, "no words of several vectors"),
        ("klein", {"method": "textual_inversion"}, "textual_inversion is not made for"),
        ("klein", {"train_text_encoder": True}, "is not trained"),
        ("z_image", {"token_learning_rate": 1e-3}, "is not trained"),
    ],
)
def test_methods_that_are_not_made_for_it_are_refused(
    name: str,
    values: dict[str, Any],
    words: str,
    model_of: Callable[[str], Model],
    picture: Image.Image,
) -> None:
    backbone = model_of(name).fresh()
    state = copy.deepcopy(backbone.denoiser.state_dict())
    with pytest.raises(UserError, match=words):
        prepared_tuning(settings(**values), backbone, picture)
    assert all(torch.equal(state[n], p) for n, p in backbone.denoiser.state_dict().items())
