"""Custom Diffusion trains K, V and the words; what it saves draws the same in plain diffusers."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from studies.embedded.dataset import vocabulary
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import configure
from sude_lab.methods.custom_diffusion import CustomDiffusion
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]

FILES = ["learned_embeds.safetensors", "unet.safetensors"]


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class images are drawn into a folder of the test's own."""
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(**settings: Any) -> TuningConfig:
    """Settings that move a tiny model; no class images unless they are asked for."""
    quick: dict[str, Any] = {
        "method": "custom_diffusion",
        "learning_rate": 1e-2,
        "token_learning_rate": 1e-1,
        "max_train_steps": 2,
        "prior_loss_weight": 0.0,
        "seed": 3,
    }
    return TuningConfig(image=Path("dog.png"), category="dog", **quick | settings)


def run(
    settings: TuningConfig, backbone: Backbone, pictures: Image.Image | list[Image.Image]
) -> Step:
    *_, last = tune(settings, backbone, pictures)
    return last


def tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Copies of every tensor of the pipeline, by part and name."""
    parts = {name: getattr(backbone.pipeline, name) for name in ("unet", "text_encoder", "vae")}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def cross_attentions(backbone: Backbone) -> set[str]:
    """The names of K and V, found by what they are made for: they read vectors of the text."""
    width = backbone.unet.config.cross_attention_dim
    return {
        f"{name}.{part}.weight"
        for name, module in backbone.unet.named_modules()
        if type(module).__name__ == "Attention" and module.is_cross_attention
        for part in ("to_k", "to_v")
        if getattr(module, part).weight.shape[1] == width
    }


# --- what is trained -----------------------------------------------------------------------------


@pytest.mark.quick
def test_keys_values_and_the_word_move_and_nothing_else(fresh: Fresh, picture: Image.Image) -> None:
    backbone = fresh()
    before = tensors(backbone)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([20, 700])
    with torch.no_grad():
        c = backbone.encode_prompts(["photo of a dog", ""])
        old = backbone.predict(x, t, c)
    # Without decay of the weights: what moves has a gradient.
    step = run(config(adam_weight_decay=0.0), backbone, picture)
    after = tensors(backbone)
    expected = cross_attentions(backbone)
    assert len(expected) == 2 * sum(".attn2.to_k." in name for name in before)
    assert set(step.method.parameters) == {f"unet.{n}" for n in expected} | {"token.text_encoder"}

    name = next(name for name in after if name.endswith("token_embedding.weight"))
    table, words = after.pop(name), before.pop(name)
    assert len(table) == len(words) + 1
    assert torch.equal(table[:-1], words)
    start = backbone.tokenizer("ktn", add_special_tokens=False).input_ids
    assert not torch.equal(table[-1], words[start].mean(dim=0))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    assert moved == {f"unet.{name}" for name in expected}

    with torch.no_grad():
        now = backbone.predict(x, t, c)
    assert not torch.equal(now, old)
    assert torch.equal(step.method.predict_pretrained(x, t, c), old)
    with torch.no_grad():
        assert torch.equal(backbone.predict(x, t, c), now)  # asking the old model changes nothing


def test_a_word_without_a_learning_rate_stays_where_it_starts(
    fresh: Fresh, picture: Image.Image
) -> None:
    backbone = fresh()
    step = run(config(token_learning_rate=0.0), backbone, picture)
    start = backbone.tokenizer("ktn", add_special_tokens=False).input_ids
    table = backbone.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(table[-1], table[start].mean(dim=0))
    assert all(name.startswith("unet.") for name in step.method.parameters)


def test_words_start_from_rare_ones_or_from_what_the_user_or_the_models_facts_name(
    fresh: Fresh,
) -> None:
    more = ("stuffed animal=<toy>=toy.png",)

    def starts(backbone: Backbone, words: list[str], **settings: Any) -> bool:
        method = CustomDiffusion(
            backbone, configure(config(more_subjects=more, **settings), backbone)
        )
        table = backbone.text_encoder.get_input_embeddings().weight.detach()
        ids = [backbone.tokenizer(w, add_special_tokens=False).input_ids for w in words]
        expected = torch.stack([table[i].mean(dim=0) for i in ids])
        assert not torch.equal(expected[0], expected[1]) or words[0] == words[1]
        return torch.equal(method.tokens["text_encoder"].vectors, expected)

    assert starts(fresh(), ["ktn", "pll"])
    assert starts(fresh(), ["sks", "sks"], initializer="sks")
    facts = fresh().facts | {"tuning": {"custom_diffusion": {"initializer": "candle"}}}
    assert starts(replace(fresh(), facts=facts), ["candle", "candle"])


def test_two_subjects_share_keys_and_values_and_each_trains_its_own_word(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    predict = CustomDiffusion.predict

    def spy(self: Any, x: Tensor, t: Tensor, c: Any, which: Tensor) -> Tensor:
        drawn.extend(which.tolist())
        return predict(self, x, t, c, which)

    monkeypatch.setattr(CustomDiffusion, "predict", spy)
    pictures = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    before = tensors(fresh())
    seen = set()
    for seed in range(8):
        backbone = fresh()
        settings = config(
            more_subjects=("candle=<wax>=candle.png",),
            max_train_steps=1,
            train_batch_size=1,
            adam_weight_decay=0.0,
            seed=seed,
        )
        starts = []
        for rare in ("ktn", "pll"):
            ids = backbone.tokenizer(rare, add_special_tokens=False).input_ids
            starts.append(backbone.text_encoder.get_input_embeddings().weight[ids].mean(dim=0))
        method = run(settings, backbone, pictures).method
        assert method.subject_prompts() == ["photo of a <sks> dog", "photo of a <wax> candle"]
        moved = [
            not torch.equal(vector, start)
            for vector, start in zip(method.tokens["text_encoder"].vectors, starts, strict=True)
        ]
        assert moved == [drawn[-1] == 0, drawn[-1] == 1]
        for name in cross_attentions(backbone):
            value = backbone.unet.get_parameter(name)
            assert not torch.equal(value, before[f"unet.{name}"]), name
        seen.add(drawn[-1])
        if len(seen) == 2:
            return
    pytest.fail("Eight seeds drew one subject only.")


@pytest.mark.quick
def test_the_gated_loss_of_sude_reaches_every_key_value_and_the_word(
    fresh: Fresh, picture: Image.Image
) -> None:
    """The gradient is linear in w_s, and its part of SuDe is nowhere zero while a gate is open."""
    gradients = []
    settings = config(train_batch_size=8, max_grad_norm=0.0, weight_sude=1.0)
    # Which word opens one hangs on the model's random weights.
    words = ("sks", *vocabulary())
    tried = (replace(settings, initializer=w, seed=k) for k in range(5) for w in words)
    settings = next(s for s in tried if next(tune(s, fresh(), picture)).gate.any())
    for weight in (0.0, 1.0, 2.0):
        step = next(tune(replace(settings, weight_sude=weight), fresh(), picture))
        assert bool(step.gate.any()) == bool(weight)
        gradients.append({n: p.grad.clone() for n, p in step.method.parameters.items()})
    none, once, twice = gradients
    assert len(none) == len(cross_attentions(fresh())) + 1
    for name in none:
        sude = once[name] - none[name]
        assert sude.norm() > 1e-4 * none[name].norm(), name
        torch.testing.assert_close(
            twice[name] - none[name],
            2 * sude,
            rtol=1e-3,
            atol=1e-4 * twice[name].abs().max().item(),
        )


# --- class images --------------------------------------------------------------------------------


def test_the_defaults_tune_with_prior_preservation(
    fresh: Fresh, picture: Image.Image, cache: Path
) -> None:
    """Only the numbers of steps and of class images are smaller than on Stable Diffusion."""
    settings = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        method="custom_diffusion",
        max_train_steps=2,
        num_class_images=2,
    )
    facts = {key: value for key, value in fresh().facts.items() if key != "tuning"}
    backbone = replace(fresh(), facts=facts)
    full = configure(replace(settings, max_train_steps=None, num_class_images=None), backbone)
    told = {name: getattr(full, name) for name in CustomDiffusion.defaults}
    assert told == CustomDiffusion.defaults
    assert (told["weight_sude"], told["prior_loss_weight"], told["num_class_images"]) == (2, 1, 200)
    steps = list(tune(settings, backbone, picture))
    assert [step.number for step in steps] == [1, 2]
    assert all(0 < step.loss_regularizer < float("inf") for step in steps)
    assert all(torch.isfinite(step.loss_sude).all() for step in steps)
    assert len(list(cache.rglob("*.png"))) == 2


def test_the_users_class_images_stand_in_for_drawn_ones(
    fresh: Fresh, picture: Image.Image, cache: Path, tmp_path: Path
) -> None:
    """Two subjects, each with pictures of its own category; nothing is drawn."""
    for category in ("dog", "candle"):
        (tmp_path / "real" / category).mkdir(parents=True)
        picture.rotate(90).save(tmp_path / "real" / category / "one.png")
    settings = config(
        prior_loss_weight=1.0,
        class_images=tmp_path / "real",
        more_subjects=("candle=<wax>=candle.png",),
    )
    steps = list(tune(settings, fresh(), [picture, picture]))
    assert all(0 < step.loss_regularizer < float("inf") for step in steps)
    assert not cache.exists()


# --- saved weights -------------------------------------------------------------------------------


def plain(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing(pipeline: Any, prompt: str) -> Any:
    """One picture in floating point, from a fixed start."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(2)
    return torch.from_numpy(
        pipeline(prompt, latents=x, generator=generator, output_type="np", **settings).images
    )


def test_what_is_saved_draws_the_same_in_a_fresh_backbone_and_in_plain_diffusers(
    fresh: Fresh, picture: Image.Image, tiny_folder: Path, tmp_path: Path
) -> None:
    tuned, weights = fresh(), tmp_path / "weights"
    settings = config(more_subjects=("candle=<wax>=candle.png",))
    save_weights(run(settings, tuned, [picture, picture.rotate(90)]).method, weights)
    assert sorted(p.name for p in weights.iterdir()) == ["learned_embeds-2.safetensors", *FILES]
    assert load_file(weights / "unet.safetensors").keys() == cross_attentions(tuned)
    prompt = "photo of a <sks> dog on the <wax> candle"

    loaded = fresh()
    load_weights("custom_diffusion", loaded, weights)
    for ours, theirs in zip(
        generate(tuned, prompt, num_images=2), generate(loaded, prompt, num_images=2), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()
    expected = drawing(tuned.pipeline, prompt)
    assert torch.equal(drawing(loaded.pipeline, prompt), expected)

    pipe = plain(tiny_folder)
    result = pipe.unet.load_state_dict(load_file(weights / "unet.safetensors"), strict=False)
    assert not result.unexpected_keys
    pipe.load_textual_inversion(weights, weight_name="learned_embeds.safetensors")
    pipe.load_textual_inversion(weights, weight_name="learned_embeds-2.safetensors")
    assert torch.equal(drawing(pipe, prompt), expected)

    # Loading really changed the UNet: with the words alone the picture is another one.
    words = plain(tiny_folder)
    words.load_textual_inversion(weights, weight_name="learned_embeds.safetensors")
    words.load_textual_inversion(weights, weight_name="learned_embeds-2.safetensors")
    assert (drawing(words, prompt) - expected).norm() > 1e-3 * expected.norm()
    category = "photo of a dog"
    assert not torch.equal(drawing(pipe, category), drawing(plain(tiny_folder), category))


@pytest.mark.skipif(
    not version("diffusers").startswith("0.42."), reason="a fact about diffusers 0.42"
)
def test_load_attn_procs_loads_nothing_so_that_no_file_is_written_for_it(
    fresh: Fresh, picture: Image.Image, tiny_folder: Path, tmp_path: Path
) -> None:
    """diffusers issue 9320: a complete set of processors is read, and then not used."""
    save_weights(run(config(), fresh(), picture).method, tmp_path)
    pipe = plain(tiny_folder)
    before = drawing(pipe, "photo of a dog")
    # An empty tensor is how such a file says that an attention keeps its own weights.
    theirs = {name: torch.zeros(0) for name in pipe.unet.attn_processors if ".attn1." in name}
    for name, value in load_file(tmp_path / "unet.safetensors").items():
        attention, part = name.removesuffix(".weight").rsplit(".", 1)
        theirs[f"{attention}.processor.{part}_custom_diffusion.weight"] = value
    save_file(theirs, tmp_path / "theirs.safetensors")
    pipe.unet.load_attn_procs(tmp_path, weight_name="theirs.safetensors")
    assert torch.equal(drawing(pipe, "photo of a dog"), before)
    # The file is not to blame: with an argument that is not for users it does load.
    pipe.unet.load_attn_procs(tmp_path, weight_name="theirs.safetensors", _pipeline=pipe)
    assert not torch.equal(drawing(pipe, "photo of a dog"), before)


def test_weights_of_another_architecture_are_refused_in_one_sentence(
    fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    save_weights(run(config(), fresh(), picture).method, tmp_path)
    other = open_backbone(wider_folder, device="cpu")
    with pytest.raises(UserError, match="backbone it was tuned on") as error:
        load_weights("custom_diffusion", other, tmp_path)
    assert str(error.value).count(". ") == 0 and "\n" not in str(error.value)
    # A token that fits does not open the door for a UNet that does not.
    (tmp_path / "learned_embeds.safetensors").unlink()
    other = open_backbone(wider_folder, device="cpu")
    with pytest.raises(UserError, match="backbone it was tuned on"):
        load_weights("custom_diffusion", other, tmp_path)


def test_weights_that_cover_a_part_of_the_cross_attentions_are_refused_whole(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    """Such as those of a smaller UNet: nothing of them may stay in the model."""
    save_weights(run(config(), fresh(), picture).method, tmp_path)
    weights = load_file(tmp_path / "unet.safetensors")
    weights.pop(next(iter(weights)))
    weights = {name: p.clone() for name, p in weights.items()}  # the file is written over
    save_file(weights, tmp_path / "unet.safetensors")
    backbone = fresh()
    before = tensors(backbone)
    with pytest.raises(UserError, match="backbone it was tuned on"):
        load_weights("custom_diffusion", backbone, tmp_path)
    after = tensors(backbone)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    (tmp_path / "unet.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="damaged"):
        load_weights("custom_diffusion", backbone, tmp_path)
    (tmp_path / "unet.safetensors").unlink()
    with pytest.raises(UserError, match="are not there"):
        load_weights("custom_diffusion", backbone, tmp_path)
