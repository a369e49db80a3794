"""A method trains what it names and nothing else, keeps the old model at hand, and saves whole."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import METHODS, configure, get_method
from sude_lab.methods.base import token_words
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.tuning import Step, Tuning

pytestmark = pytest.mark.quick

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


def run(
    settings: TuningConfig, backbone: Backbone, picture: Image.Image | list[Image.Image]
) -> Step:
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
def probe(fresh: Fresh) -> dict[str, Any]:
    """A noisy latent, two timesteps, and the answer of the model as it was before tuning."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    t, backbone = torch.tensor([20, 700]), fresh()
    with torch.no_grad():
        condition = backbone.encode_prompts(["photo of a dog", ""])
        return {"x": x, "t": t, "c": condition, "before": backbone.predict(x, t, condition)}


def predict(backbone: Backbone, probe: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return backbone.predict(probe["x"], probe["t"], probe["c"])


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_named_parameters_move_and_the_old_model_still_answers(
    case: str, fresh: Fresh, picture: Image.Image, probe: dict[str, Any]
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
        settings = configure(replace(config(method=name), category="stuffed animal"), backbone)
        assert METHODS[name](backbone, settings).subject_prompts() == [expected]
    backbone = fresh()
    settings = configure(config(prompt="{S*} the {category}", token="<rex>"), backbone)
    assert METHODS["dreambooth"](backbone, settings).subject_prompts() == ["<rex> the dog"]


def test_every_subject_has_a_prompt_with_its_own_token_and_category(fresh: Fresh) -> None:
    more = ("stuffed animal=<bear>=bear.png", "candle=<wax>=wax.png")
    for name, prompt, expected in (
        (
            "dreambooth",
            None,
            ["photo of a <sks> dog", "photo of a <bear> stuffed animal", "photo of a <wax> candle"],
        ),
        ("textual_inversion", None, ["photo of a <sks>", "photo of a <bear>", "photo of a <wax>"]),
        ("dreambooth", "{S*}, a {category}", ["<sks> , a dog", "<bear> , a stuffed animal"]),
    ):
        backbone = fresh()
        chosen = config(method=name, more_subjects=more[: len(expected) - 1], prompt=prompt)
        assert METHODS[name](backbone, configure(chosen, backbone)).subject_prompts() == expected


def test_dreambooths_tokens_start_from_a_rare_word_each_and_inversions_from_the_category(
    fresh: Fresh,
) -> None:
    more = ("cat=<cat-1>=cat.png", "candle=<wax>=wax.png")
    rare = METHODS["dreambooth"].initializers
    assert len(set(rare)) == len(rare) >= 3
    for name, expected in (
        ("dreambooth", rare[:3]),
        ("textual_inversion", ("dog", "cat", "candle")),
    ):
        backbone = fresh()
        table = backbone.text_encoder.get_input_embeddings().weight.detach().clone()
        method = METHODS[name](
            backbone, configure(config(method=name, more_subjects=more), backbone)
        )
        rows = [
            table[backbone.tokenizer(word, add_special_tokens=False).input_ids].mean(dim=0)
            for word in expected
        ]
        assert torch.equal(method.tokens["text_encoder"].vectors, torch.stack(rows))
        assert len(torch.stack(rows).unique(dim=0)) == 3


def test_several_subjects_with_the_same_word_for_good_are_refused(fresh: Fresh) -> None:
    more = ("cat=<cat-1>=cat.png",)
    chosen = config(more_subjects=more, initializer="cat")
    with pytest.raises(UserError, match="--token-learning-rate"):
        METHODS["dreambooth"](fresh(), configure(chosen, fresh()))
    trained = configure(replace(chosen, token_learning_rate=1e-3), fresh())
    METHODS["dreambooth"](fresh(), trained)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=rf"'lora'.*{re.escape(', '.join(METHODS))}\."):
        get_method("lora")
    assert {"dreambooth", "textual_inversion"} <= set(METHODS)


# --- the model before tuning ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"weight_sude": 1.0, "prior": "pretrained"}, True),
        ({"weight_sude": 0.0, "monitor_sude": True, "prior": "pretrained"}, True),
        ({"weight_sude": 0.0, "prior_loss_weight": 1.0, "prior_preservation": "teacher"}, True),
        ({"weight_sude": 1.0, "prior": "current"}, False),
        ({"weight_sude": 0.0, "prior": "pretrained"}, False),
        ({"weight_sude": 0.0, "prior_loss_weight": 1.0}, False),
    ],
)
def test_the_old_weights_are_kept_only_where_the_run_asks_for_them(
    settings: dict[str, Any],
    kept: bool,
    fresh: Fresh,
    probe: dict[str, Any],
    picture: Image.Image,
) -> None:
    method = tune(config(**settings), fresh(), picture).method
    assert (method.frozen is not None) == kept
    if kept:
        seen = method.predict_pretrained(probe["x"], probe["t"], probe["c"])
        assert torch.equal(seen, probe["before"])
    else:
        with pytest.raises(ValueError, match="not kept"):
            method.predict_pretrained(probe["x"], probe["t"], probe["c"])


# --- two text encoders ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _tiny_xl(tiny_folder: Path) -> Backbone:
    """SDXL's way of building, in small: two text encoders, and a UNet that is told sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = plain(tiny_folder)
        config_2 = replace_config(base.text_encoder.config, hidden_size=48, projection_dim=24)
        unet = UNet2DConditionModel.from_config(
            base.unet.config,
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        )
        pipeline = StableDiffusionXLPipeline(
            base.vae,
            base.text_encoder,
            CLIPTextModelWithProjection(config_2),
            base.tokenizer,
            copy.deepcopy(base.tokenizer),
            unet,
            base.scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, *(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet)):
        part.requires_grad_(False).eval()
    return Backbone(pipeline, "xl", torch.device("cpu"))


def replace_config(config: Any, **changed: Any) -> CLIPTextConfig:
    return CLIPTextConfig(**config.to_dict() | changed)


def test_dreambooth_trains_every_text_encoder_and_their_words(
    _tiny_xl: Backbone, picture: Image.Image, tmp_path: Path
) -> None:
    tuned = _tiny_xl.copy()
    settings = config(
        train="attention",
        train_text_encoder=True,
        learning_rate=1e-3,
        token_learning_rate=1e-2,
        prior="current",
        more_subjects=("cat=<cat-1>=cat.png",),
        train_batch_size=2,
        max_train_steps=3,
    )
    *_, step = tune(settings, tuned, [picture, Image.new("RGB", (32, 32), "teal")])
    assert {name.partition(".")[0] for name in step.method.parameters} == {
        "unet",
        "text_encoder",
        "text_encoder_2",
        "token",
    }
    for name in ("text_encoder", "text_encoder_2"):
        old, new = (dict(b.text_encoders[name].named_parameters()) for b in (_tiny_xl, tuned))
        # SDXL reads the hidden states before the last layer, and of the first encoder nothing else.
        unread = ("layers.1.", "final_layer_norm") if name == "text_encoder" else ()
        for key, value in old.items():
            if "token_embedding" in key:
                assert len(new[key]) == len(value) + 2
            elif not any(part in key for part in unread):
                assert not torch.equal(new[key], value), (name, key)
    save_weights(step.method, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "learned_embeds-2.safetensors",
        "learned_embeds.safetensors",
        "text_encoder.safetensors",
        "text_encoder_2.safetensors",
        "unet.safetensors",
    ]
    for name in ("text_encoder", "text_encoder_2"):  # as the files of every pipeline name them
        names = load_file(tmp_path / f"{name}.safetensors").keys()
        assert all(n.startswith(("text_model.", "text_projection.")) for n in names)
    loaded = _tiny_xl.copy()
    load_weights("dreambooth", loaded, tmp_path)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["photo of a <sks> dog", "photo of a <cat-1> cat"]
    with torch.no_grad():
        before, seen, expected = (
            b.predict(x, torch.tensor([400, 40]), b.encode_prompts(texts))
            for b, texts in (
                (_tiny_xl, ["photo of a dog", "photo of a cat"]),
                (loaded, prompts),
                (tuned, prompts),
            )
        )
    assert torch.equal(seen, expected)
    assert (seen - before).norm() > 1e-3 * before.norm()


def test_a_text_encoder_is_read_under_the_names_of_every_transformers(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    """4 has "text_model." before the names, 5 has not; the weights are the same."""
    tuned, bare = fresh(), fresh()
    save_weights(run(config(train_text_encoder=True), tuned, picture).method, tmp_path)
    path = tmp_path / "text_encoder.safetensors"
    with_prefix = {name: p.clone() for name, p in load_file(path).items()}  # it is written over
    assert all(name.startswith("text_model.") for name in with_prefix)
    save_file({n.removeprefix("text_model."): p for n, p in with_prefix.items()}, path)
    load_weights("dreambooth", bare, tmp_path)
    expected = tuned.text_encoder.state_dict()
    assert all(torch.equal(p, expected[n]) for n, p in bare.text_encoder.state_dict().items())
    untuned = fresh().text_encoder.get_input_embeddings().weight
    assert not torch.equal(bare.text_encoder.get_input_embeddings().weight[: len(untuned)], untuned)
    with_prefix["text_model.odd"] = torch.zeros(1)
    save_file(with_prefix, path)
    with pytest.raises(UserError, match="KeyError: 'odd'"):
        load_weights("dreambooth", fresh(), tmp_path)


def test_a_token_of_two_encoders_does_not_fit_one_and_the_other_way_round(
    _tiny_xl: Backbone, fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    settings = config(method="textual_inversion", max_train_steps=1)
    for backbone, other in ((_tiny_xl.copy(), fresh()), (fresh(), _tiny_xl.copy())):
        folder = tmp_path / str(backbone.is_xl)
        save_weights(
            run(replace(settings, token_learning_rate=1e-2), backbone, picture).method, folder
        )
        with pytest.raises(UserError, match="backbone it was tuned on"):
            load_weights("textual_inversion", other, folder)


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
        if name.endswith("weight") or name == "token.text_encoder":
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
    save_weights(step.method, tmp_path)
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
    save_weights(run(config(method="textual_inversion"), backbone, picture).method, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["learned_embeds.safetensors"]
    pipeline = plain(tiny_folder)
    pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    with torch.no_grad():
        seen, _ = pipeline.encode_prompt("photo of a <sks>", "cpu", 1, False)
        assert torch.equal(seen, backbone.encode_prompts(["photo of a <sks>"]).hidden)
        assert not torch.equal(seen, backbone.encode_prompts(["photo of a dog"]).hidden)


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_load_into_a_fresh_backbone(
    case: str, fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    tuned, loaded = fresh(), fresh()
    settings = config(**{"token_learning_rate": 1e-2} | CASES[case][0])
    save_weights(run(settings, tuned, picture).method, tmp_path)
    load_weights(settings.method, loaded, tmp_path)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [
            b.predict(x, torch.tensor([400]), b.encode_prompts(["photo of a <sks> dog"]))
            for b in (tuned, loaded)
        ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


def test_many_subjects_load_into_a_fresh_backbone_each_with_its_own_token(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    """Twelve, because a sort by name would put the tenth before the second."""
    tuned, loaded = fresh(), fresh()
    settings = config(
        train="attention",
        train_text_encoder=True,  # its table holds a row for each token, in their order
        token_learning_rate=1e-2,
        max_train_steps=1,
        more_subjects=tuple(f"dog=<dog-{k}>=dog.png" for k in range(2, 13)),
    )
    save_weights(run(settings, tuned, [picture] * 12).method, tmp_path)
    load_weights(settings.method, loaded, tmp_path)
    prompts = [f"photo of a {s.token} dog" for s in settings.subjects]
    assert len(prompts) == 12
    with torch.no_grad():
        seen, expected = (b.encode_prompts(prompts).hidden for b in (loaded, tuned))
    assert torch.equal(loaded.tokenize(prompts), tuned.tokenize(prompts))
    assert torch.equal(seen, expected)


def test_weights_saved_in_the_middle_of_a_run_have_the_tokens_of_that_moment(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    """The text encoder's own table gets the tokens only as the run ends."""
    backbone, loaded = fresh(), fresh()
    settings = config(train_text_encoder=True, token_learning_rate=1e-2, max_train_steps=3)
    for step in tune(settings, backbone, picture):
        if step.number == 2:
            save_weights(step.method, tmp_path)
            with torch.no_grad():
                expected = backbone.encode_prompts(["photo of a <sks> dog"]).hidden
    load_weights(settings.method, loaded, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode_prompts(["photo of a <sks> dog"]).hidden, expected)


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "unet.safetensors"])
def test_damaged_weights_are_refused_in_one_sentence(
    name: str, fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    save_weights(run(config(), fresh(), picture).method, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged") as error:
        load_weights("dreambooth", fresh(), tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["attention", "textual inversion"])
def test_weights_of_another_architecture_are_refused_in_one_sentence(
    case: str, fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    settings = config(**CASES[case][0])
    save_weights(run(settings, fresh(), picture).method, tmp_path)
    with pytest.raises(UserError, match="backbone it was tuned on"):
        load_weights(settings.method, open_backbone(wider_folder, device="cpu"), tmp_path)


@pytest.mark.parametrize("case", ["attention", "lora"])
def test_weights_of_another_unet_are_refused_in_one_sentence(
    case: str, fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    """The token fits (it is put in place by hand), the UNet's weights do not."""
    settings = config(**CASES[case][0])
    save_weights(run(settings, fresh(), picture).method, tmp_path)
    other = open_backbone(wider_folder, device="cpu")
    from safetensors.torch import save_file

    save_file({"<sks>": torch.zeros(64)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(UserError, match="backbone it was tuned on") as error:
        load_weights(settings.method, other, tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_weights_is_refused(fresh: Fresh, picture: Image.Image) -> None:
    state = run(config(train="attention"), fresh(), picture).state_dict()
    with pytest.raises(UserError, match="other trained weights"):
        next(tune(config(train="lora"), fresh(), picture, state=state | {"step": 1}))


# --- a word of several vectors -------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_word_of_several_vectors_is_trained_saved_and_read_by_plain_diffusers(
    name: str, fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    """A prompt says the word once; all its vectors are read, here and by the pipeline itself."""
    backbone = fresh()
    settings = config(
        method=name,
        num_vectors=3,
        initializer="dog",
        token_learning_rate=1e-2,
        prior_loss_weight=0.0,
        more_subjects=("cat=<tom>=cat.png",),
    )
    steps = list(tune(settings, backbone, [picture, picture]))
    words = ["<sks>", "<sks>_1", "<sks>_2"]
    ids = backbone.tokenizer.convert_tokens_to_ids(words)
    line = backbone.tokenize(["photo of a <sks> dog"])[0].tolist()
    place = line.index(ids[0])
    assert line[place : place + 3] == ids
    assert line[place + 3] == backbone.tokenizer("dog", add_special_tokens=False).input_ids[0]
    table = backbone.text_encoder.get_input_embeddings().weight
    assert len(table[ids].unique(dim=0)) == 3, "the vectors are trained alike"

    save_weights(steps[-1].method, tmp_path)
    again, plain = fresh(), fresh()
    load_weights(name, again, tmp_path)
    for ending in ("", "-2"):
        file = f"learned_embeds{ending}.safetensors"
        plain.pipeline.load_textual_inversion(tmp_path, weight_name=file)
    prompts = ["photo of a running <sks> dog", "a <tom> on the <sks>"]
    with torch.no_grad():
        expected = backbone.encode_prompts(prompts).hidden
        assert torch.equal(again.encode_prompts(prompts).hidden, expected)
        assert torch.equal(plain.encode_prompts(prompts).hidden, expected)
        drawn = backbone.pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("token", ["<sks>", "<a-b.c>", "«é»"])
def test_every_vector_of_a_word_is_read_once_by_every_tokenizer(
    token: str, _tiny_xl: Backbone
) -> None:
    backbone = _tiny_xl.copy()
    settings = config(token=token, num_vectors=8, method="textual_inversion", train="attention")
    get_method(settings.method)(backbone, configure(settings, backbone))
    prompts = [f"photo of a {token} dog", f"a {token}, asleep", f"{token}"]
    for tokenizer in backbone.tokenizers:
        ids = tokenizer.convert_tokens_to_ids(token_words(token, 8))
        for line in backbone.tokenize(prompts, tokenizer).tolist():
            assert [line.count(index) for index in ids] == [1] * 8


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("token", ["<Rex>", "og", "zwx", "<x", "Ⅷ", "e\u0301>"])
def test_a_word_that_cannot_hold_its_vectors_is_refused(
    name: str, token: str, tiny: Backbone, picture: Image.Image
) -> None:
    settings = config(method=name, token=token, num_vectors=8, prior_loss_weight=0.0)
    with pytest.raises(UserError, match="cannot stand for 8 vectors: write it in small letters"):
        Tuning(settings, tiny, picture)
    assert not tiny.used
    configure(replace(settings, num_vectors=1), {})  # one vector is put in place of nothing


@pytest.mark.parametrize(("token", "number"), [("<sks>_1", 1), ("<<sks>>", 2)])
def test_a_word_that_would_be_read_as_a_part_of_another_is_refused(token: str, number: int) -> None:
    settings = config(more_subjects=(f"cat={token}=cat.png",), num_vectors=number)
    with pytest.raises(UserError, match="would be read as a part of"):
        configure(settings, {})


def test_the_number_of_vectors_must_be_one_or_more() -> None:
    with pytest.raises(UserError, match="--num-vectors is 0"):
        config(num_vectors=0)
