"""A method trains what it names and nothing else, keeps the old model at hand, and saves whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sude_lab.backbone import Backbone, open_backbone
from sude_lab.errors import UserError
from sude_lab.methods import METHODS, get_method
from sude_lab.tuning import Step, TuningConfig, resolve, tune

Fresh = Callable[[], Backbone]

# What is trained -> the settings, and which tensors (by their name in the whole pipeline) may move.
CASES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "unet": ({"train": "unet"}, lambda name: name.startswith("unet.")),
    "attention": (
        {"train": "attention"},
        lambda name: name.startswith("unet.") and (".attn1." in name or ".attn2." in name),
    ),
    "lora": ({"train": "lora"}, lambda name: ".lora_" in name),
    "text encoder": (
        {"train": "attention", "train_text_encoder": True},
        lambda name: name.startswith("text_encoder.") or ".attn1." in name or ".attn2." in name,
    ),
    "textual inversion": ({"method": "textual_inversion"}, lambda name: False),
}
WORD_TABLE = "text_encoder.embeddings.token_embedding.weight"


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    return TuningConfig(
        image=Path("dog.png"), category="dog", **{"max_train_steps": 2, "seed": 3} | settings
    )


def run(settings: TuningConfig, backbone: Backbone, picture: Image.Image) -> Step:
    *_, last = tune(settings, backbone, picture)
    return last


def tensors(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Every tensor of the pipeline, under the names that do not change as adapters are added."""
    parts = {"unet": backbone.unet, "text_encoder": backbone.text_encoder}
    parts["vae"] = backbone.pipeline.vae
    return {
        f"{part}.{name}".replace(".text_model.", ".").replace(".base_layer.", "."): value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


@pytest.fixture
def probe(fresh: Fresh) -> dict[str, torch.Tensor]:
    """A noisy latent, two timesteps, and the answer of the model as it was before tuning."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    t, backbone = torch.tensor([20, 700]), fresh()
    with torch.no_grad():
        condition = backbone.encode_prompts(["photo of a dog", ""])
        return {"x": x, "t": t, "c": condition, "before": backbone.predict(x, t, condition)}


def predict(backbone: Backbone, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return backbone.predict(probe["x"], probe["t"], probe["c"])


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_named_parameters_move_and_the_old_model_still_answers(
    case: str, fresh: Fresh, picture: Image.Image, probe: dict[str, torch.Tensor]
) -> None:
    settings, may_move = CASES[case]
    backbone, before = fresh(), {k: v.clone() for k, v in tensors(fresh()).items()}
    words = len(before[WORD_TABLE])
    step = run(config(**settings), backbone, picture)
    after = tensors(backbone)
    assert set(before) <= set(after)
    for name, value in after.items():
        if name == WORD_TABLE:  # one row longer: the subject's token
            assert len(value) == words + 1
            value = value[:words]
        if name not in before:
            assert case == "lora" and ".lora_" in name
        elif not may_move(name):
            assert torch.equal(value, before[name]), name
        elif name not in (WORD_TABLE, "unet.conv_in.bias"):
            assert not torch.equal(value, before[name]), name

    method = step.method
    told = {name.partition(".")[0] for name in method.parameters}
    assert (
        told
        == {
            "unet": {"unet"},
            "attention": {"unet"},
            "lora": {"unet"},
            "text encoder": {"unet", "text_encoder"},
            "textual inversion": {"token"},
        }[case]
    )
    now = predict(backbone, probe)
    assert torch.equal(now, probe["before"]) == (case == "textual inversion")
    old = method.predict_pretrained(probe["x"], probe["t"], probe["c"])
    assert torch.equal(old, probe["before"])
    assert torch.equal(predict(backbone, probe), now)  # asking the old model changes nothing


def test_the_token_moves_only_where_it_has_a_learning_rate(
    fresh: Fresh, picture: Image.Image
) -> None:
    start = fresh()
    index = start.add_token("<sks>", "cat")
    row = start.text_encoder.get_input_embeddings().weight[index].detach()
    for rate, moved in ((0.0, False), (1e-2, True)):
        backbone = fresh()
        run(config(token_learning_rate=rate, initializer="cat"), backbone, picture)
        seen = backbone.text_encoder.get_input_embeddings().weight[index].detach()
        assert torch.equal(seen, row) != moved


def test_prompts_name_the_token_and_the_category(fresh: Fresh) -> None:
    for name, expected in (
        ("dreambooth", "photo of a <sks> stuffed animal"),
        ("textual_inversion", "photo of a <sks>"),
    ):
        backbone = fresh()
        settings = resolve(replace(config(method=name), category="stuffed animal"), backbone)
        assert METHODS[name](backbone, settings).subject_prompt() == expected
    backbone = fresh()
    settings = resolve(config(prompt="{S*} the {category}", token="<rex>"), backbone)
    assert METHODS["dreambooth"](backbone, settings).subject_prompt() == "<rex> the dog"


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'lora'.*dreambooth, textual_inversion\."):
        get_method("lora")


# --- SuDe and the words of the prompt ------------------------------------------------------------


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion"])
def test_a_token_within_the_categorys_letters_does_not_switch_sude_off(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    """The category must still be read as its own word: "og" must not be cut out of "dog"."""
    seen = {}
    for token in ("og", "<sks>"):
        for weight in (0.0, 1.0):
            backbone = fresh()
            settings = config(
                method=method,
                token=token,
                initializer="cat",
                weight_sude=weight,
                truncate=False,
                prior="current",
                train_text_encoder=method == "dreambooth",
                learning_rate=1e-3 if method == "dreambooth" else None,
            )
            seen[token, weight] = run(settings, backbone, picture)
    for name, value in seen["og", 1.0].state_dict()["trained"].items():
        if "token_embedding" in name:
            continue
        assert torch.equal(value, seen["<sks>", 1.0].state_dict()["trained"][name]), name
        if name.endswith("weight") or name == "token.vector":
            assert not torch.equal(value, seen["og", 0.0].state_dict()["trained"][name]), name
    assert torch.isfinite(seen["og", 1.0].loss_sude).all()


# --- saved weights -------------------------------------------------------------------------------


def plain(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_lora_and_a_token_load_in_a_plain_pipeline(
    fresh: Fresh, picture: Image.Image, tiny_folder: Path, tmp_path: Path
) -> None:
    backbone = fresh()
    settings = config(train="lora", lora_rank=3, learning_rate=1e-2, token_learning_rate=1e-2)
    step = run(settings, backbone, picture)
    step.method.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "learned_embeds.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    assert names and all(name.startswith("unet.") for name in names)

    pipeline = plain(tiny_folder)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings_of_call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    prompt = "photo of a <sks> dog"
    seen = pipeline(prompt, latents=x, **settings_of_call).images
    expected = backbone.pipeline(prompt, latents=x, **settings_of_call).images
    torch.testing.assert_close(seen, expected)
    base = plain(tiny_folder)("photo of a dog", latents=x, **settings_of_call).images
    assert (seen - base).norm() > 1e-3 * base.norm()


def test_a_learned_token_loads_with_load_textual_inversion(
    fresh: Fresh, picture: Image.Image, tiny_folder: Path, tmp_path: Path
) -> None:
    backbone = fresh()
    run(config(method="textual_inversion"), backbone, picture).method.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["learned_embeds.safetensors"]
    pipeline = plain(tiny_folder)
    pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    with torch.no_grad():
        seen, _ = pipeline.encode_prompt("photo of a <sks>", "cpu", 1, False)
        assert torch.equal(seen, backbone.encode_prompts(["photo of a <sks>"]))
        assert not torch.equal(seen, backbone.encode_prompts(["photo of a dog"]))


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_load_into_a_fresh_backbone(
    case: str, fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    tuned, loaded = fresh(), fresh()
    settings = config(**{"token_learning_rate": 1e-2} | CASES[case][0])
    run(settings, tuned, picture).method.save(tmp_path)
    get_method(settings.method).load(loaded, tmp_path)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [
            b.predict(x, torch.tensor([400]), b.encode_prompts(["photo of a <sks> dog"]))
            for b in (tuned, loaded)
        ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["attention", "textual inversion"])
def test_weights_of_another_architecture_are_refused_in_one_sentence(
    case: str, fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    settings = config(**CASES[case][0])
    run(settings, fresh(), picture).method.save(tmp_path)
    with pytest.raises(UserError, match="backbone it was tuned on"):
        get_method(settings.method).load(open_backbone(wider_folder, device="cpu"), tmp_path)


@pytest.mark.parametrize("case", ["attention", "lora"])
def test_weights_of_another_unet_are_refused_in_one_sentence(
    case: str, fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    """The token fits (it is put in place by hand), the UNet's weights do not."""
    settings = config(**CASES[case][0])
    run(settings, fresh(), picture).method.save(tmp_path)
    other = open_backbone(wider_folder, device="cpu")
    from safetensors.torch import save_file

    save_file({"<sks>": torch.zeros(64)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(UserError, match="backbone it was tuned on") as error:
        get_method(settings.method).load(other, tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_weights_is_refused(fresh: Fresh, picture: Image.Image) -> None:
    state = run(config(train="attention"), fresh(), picture).state_dict()
    with pytest.raises(UserError, match="other trained weights"):
        next(tune(config(train="lora"), fresh(), picture, state=state | {"step": 1}))
