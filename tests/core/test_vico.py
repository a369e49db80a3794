"""ViCo: the subject is found, noisy rows attend to it, and nothing else of the model changes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from real_configs import REAL, build, build_parts, shrink
from safetensors.torch import load_file, save_file
from torch import Tensor

from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import configure
from sude_lab.methods.vico import (
    ImageAttention,
    ViCo,
    attention_loss,
    decoder_layers,
    image_block,
    otsu_threshold,
    subject_mask,
)
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.sude import sude_terms
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]
PROMPT = "photo of a <sks>"
TWO = {"more_subjects": ("cat=<my-cat>=cat.png",)}


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    quick: dict[str, Any] = {
        "method": "vico",
        "learning_rate": 1e-2,
        "token_learning_rate": 1e-1,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "seed": 3,
    }
    return TuningConfig(image=Path("dog.png"), category="dog", **quick | settings)


def run(settings: TuningConfig, backbone: Backbone, *pictures: Image.Image) -> Step:
    *_, last = tune(settings, backbone, list(pictures))
    return last


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def method(backbone: Backbone, *, stirred: bool = True, **settings: Any) -> ViCo:
    """The method with a reference a subject; stirred: as if blocks and words had learned."""
    vico = ViCo(backbone, configure(config(**settings), backbone))
    vico.start([normal(50 + k, 1, 4, 8, 8) for k in range(len(vico.subjects))])
    if stirred:
        stir(vico.images)
        with torch.no_grad():
            vico.tokens["text_encoder"].vectors += normal(99, len(vico.subjects), 32)
    return vico


def stir(images: ImageAttention) -> None:
    with torch.no_grad():
        for k, p in enumerate(images.weights().values()):
            p += 0.3 * normal(100 + k, *p.shape)


def attention_of(backbone: Backbone) -> ImageAttention:
    """The image attention that hangs on a backbone's UNet."""
    (hook,) = backbone.unet._forward_hooks.values()
    return hook.__self__


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the rounding of float32 in batches of another shape."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def differ(a: Tensor, b: Tensor) -> bool:
    """Far more than by rounding."""
    return bool((a - b).norm() > 1e-2 * b.norm())


# --- Otsu's threshold and the mask ----------------------------------------------------------------


def between(values: np.ndarray, threshold: float) -> float:
    low, high = values[values <= threshold], values[values > threshold]
    return len(low) * len(high) * (high.mean() - low.mean()) ** 2 / len(values) ** 2


def brute_force(values: np.ndarray) -> float:
    candidates = np.unique(values)[:-1]
    return candidates[np.argmax([between(values, c) for c in candidates])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_otsus_threshold_is_that_of_a_search_over_all_splits(dtype: torch.dtype) -> None:
    rows = [normal(k, 40).to(dtype) for k in range(6)]
    rows += [normal(k, 40).abs().to(dtype).pow(3) for k in range(6, 9)]  # few high ones
    two = normal(9, 40).to(dtype)
    two[:13] += 20
    values = torch.stack([*rows, two, 1e-6 * rows[0], 100 + rows[1], rows[2].sort().values])
    found = otsu_threshold(values)
    assert found.shape == (len(values),) and found.dtype == dtype
    expected = [brute_force(row.double().numpy()) for row in values]
    np.testing.assert_array_equal(found.double().numpy(), expected)
    assert torch.equal(values[9] > found[9], torch.arange(40) < 13)
    assert torch.equal(otsu_threshold(values[3:4]), found[3:4])  # a row by itself


def test_otsus_threshold_keeps_equal_values_together() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (50, 12), generator=generator).double()
    for row, threshold in zip(values.numpy(), otsu_threshold(values).tolist(), strict=True):
        if len(np.unique(row)) == 1:
            assert threshold == row[0]
            continue
        assert threshold in np.unique(row)[:-1]
        best = between(row, brute_force(row))  # two splits may be equally good
        assert between(row, threshold) == pytest.approx(best, rel=1e-9)
    halves = values[:5].to(torch.bfloat16)
    assert torch.equal(otsu_threshold(halves).double(), otsu_threshold(values[:5]))


def test_where_nothing_stands_out_the_mask_is_everything() -> None:
    flat = torch.full((1, 7), 0.25)
    assert otsu_threshold(flat).tolist() == [0.25] and subject_mask(flat).all()
    assert otsu_threshold(torch.tensor([[3.0]])).tolist() == [3.0]
    mixed = torch.tensor([[0.1, 0.1, 0.9], [0.2, 0.2, 0.2], [0.8, 0.9, 0.1]])
    assert subject_mask(mixed).tolist() == [[0, 0, 1], [1, 1, 1], [1, 1, 0]]
    for wrong in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(1, 2, 3)):
        with pytest.raises(ValueError, match=r"\(B, N\)"):
            otsu_threshold(wrong)


# --- The regulariser ------------------------------------------------------------------------------


def test_the_attention_loss_compares_maps_by_their_shape_alone() -> None:
    subject, end = normal(1, 3, 9).abs().requires_grad_(), normal(2, 3, 9).abs().requires_grad_()
    loss = attention_loss(subject, end)
    a, e = subject.detach().double().numpy(), end.detach().double().numpy()
    expected = [np.mean((a[k] / a[k].max() - e[k] / e[k].max()) ** 2) for k in range(3)]
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    loss.sum().backward()
    assert end.grad is None and subject.grad is not None and bool(subject.grad.any())
    close(attention_loss(7 * subject, 0.2 * end), loss)
    close(attention_loss(0.3 * end, end), torch.zeros(3))


def attention_by_hand(attn: Any, hidden: Tensor, context: Tensor) -> np.ndarray:
    """softmax(Q K^T / sqrt(d)) head by head, in numpy, float64; the mean over the heads."""
    query, key = (
        x.detach().double().numpy() @ layer.weight.detach().double().numpy().T
        for x, layer in ((hidden, attn.to_q), (context, attn.to_k))
    )
    maps = []
    for q, k in zip(
        np.split(query, attn.heads, axis=-1), np.split(key, attn.heads, axis=-1), strict=True
    ):
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(weights / weights.sum(-1, keepdims=True))
    return np.mean(maps, axis=0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("prompt", "places", "end"), [(None, [4], 5), ("{S*} and a dog on {S*}", [1, 6], 7)]
)
def test_its_own_loss_is_that_of_maps_computed_by_hand(
    prompt: str | None, places: list[int], end: int, tiny: Backbone
) -> None:
    vico = method(tiny, prompt=prompt)
    (host,) = decoder_layers(tiny.unet).values()
    seen: dict[str, Tensor] = {}

    def watch(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.update(hidden=args[0], context=kwargs["encoder_hidden_states"])

    host.attn2.register_forward_pre_hook(watch, with_kwargs=True)
    condition = tiny.encode_prompts(vico.subject_prompts()).expand(3)
    assert vico.own_loss() is None  # before the first prediction
    vico.predict(
        normal(0, 3, 4, 8, 8), torch.tensor([5, 400, 900]), condition, torch.zeros(3).long()
    )
    loss = vico.own_loss()
    assert loss is not None and loss.shape == (3,) and loss.requires_grad
    # References are the lower half; their map to S* and to the end of the text, by their places.
    maps = attention_by_hand(host.attn2, seen["hidden"][3:], seen["context"][3:])
    subject, last = maps[..., places].mean(-1), maps[..., end]
    scaled = [x / x.max(1, keepdims=True) for x in (subject, last)]
    expected = 5e-4 * ((scaled[0] - scaled[1]) ** 2).mean(1)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    assert len(set(expected.round(12))) == 3  # every t sees the picture differently


# --- Where the blocks are, and how they begin -----------------------------------------------------


def test_every_second_transformer_block_of_the_up_path_is_chosen(tiny: Backbone) -> None:
    assert list(decoder_layers(tiny.unet)) == ["up_blocks.0.attentions.1.transformer_blocks.0"]
    for name in ("sd14", "sd21"):
        unet = build_parts(REAL[name], device="meta")["unet"]
        assert list(decoder_layers(unet)) == [
            f"up_blocks.{block}.attentions.{k}.transformer_blocks.0"
            for block, k in ((1, 1), (2, 0), (2, 2), (3, 1))  # 2nd, 4th, 6th, 8th of 9
        ]


def test_a_single_block_is_chosen_and_none_is_refused() -> None:
    small: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
    }
    with torch.random.fork_rng():
        none = UNet2DConditionModel(**small, up_block_types=("UpBlock2D", "UpBlock2D"))
        two = UNet2DConditionModel(**small, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(UserError, match=r"up path.*choose another --method\.$"):
        decoder_layers(none)
    del two.up_blocks[0].attentions[1]
    assert list(decoder_layers(two)) == ["up_blocks.0.attentions.0.transformer_blocks.0"]


def test_a_block_begins_as_its_host_and_changes_nothing(tiny: Backbone) -> None:
    (host,) = decoder_layers(tiny.unet).values()
    block, x, reference = image_block(host), normal(1, 2, 16, 32), normal(2, 2, 16, 32)
    assert torch.equal(block(x, encoder_hidden_states=reference), x)
    state, of_host = block.state_dict(), host.state_dict()
    zero = {name for name, value in state.items() if not value.any() and of_host[name].any()}
    ends = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
    assert zero >= {f"{name}.weight" for name in ends}
    assert zero <= {f"{name}.{kind}" for name in ends for kind in ("weight", "bias")}
    for name in ("attn1.to_q", "attn1.to_v", "ff.net.0.proj"):
        assert torch.equal(state[f"{name}.weight"], of_host[f"{name}.weight"])
    for name in ("to_q", "to_k", "to_v"):
        assert torch.equal(state[f"attn2.{name}.weight"], of_host[f"attn1.{name}.weight"])
    with torch.no_grad():  # its weights are its own
        for p in block.parameters():
            p.fill_(7.0)
    assert all(torch.equal(value, host.state_dict()[name]) for name, value in of_host.items())
    assert all(bool((p != 7).any()) for p in host.parameters())


@pytest.mark.quick
def test_at_step_0_the_model_answers_as_it_did(tiny: Backbone, fresh: Fresh) -> None:
    vico, plain = method(tiny, stirred=False), fresh()
    x, t = normal(0, 3, 4, 8, 8), torch.tensor([5, 400, 900])
    condition = tiny.encode_prompts([PROMPT]).expand(3)
    with torch.no_grad():
        close(vico.predict(x, t, condition, torch.zeros(3).long()), plain.predict(x, t, condition))
    own = vico.own_loss()
    assert own is not None and bool((own > 0).all())


# --- The two streams ------------------------------------------------------------------------------


def test_references_pass_clean_with_the_same_t_and_the_same_prompt(tiny: Backbone) -> None:
    vico = method(tiny, **TWO)
    seen: dict[str, Tensor] = {}
    unet = tiny.unet
    unet.conv_in.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    unet.time_proj.register_forward_pre_hook(lambda m, args: seen.update(t=args[0]))
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(c=kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    x, t, which = normal(0, 3, 4, 8, 8), torch.tensor([5, 400, 900]), torch.tensor([1, 0, 1])
    condition = tiny.encode_prompts(vico.subject_prompts())[which]
    output = vico.predict(x, t, condition, which)
    assert output.shape == x.shape
    clean = torch.cat([normal(50, 1, 4, 8, 8), normal(51, 1, 4, 8, 8)])
    assert torch.equal(seen["x"], torch.cat([x, clean[which]]))
    assert seen["t"].tolist() == [5, 400, 900] * 2
    assert torch.equal(seen["c"], torch.cat([condition.hidden, condition.hidden]))


def test_a_flipped_picture_is_no_reference(tiny: Backbone, picture: Image.Image) -> None:
    small = picture.resize((32, 32), Image.Resampling.LANCZOS)
    means = [tiny.encode_pictures([p])[0] for p in (small, ImageOps.mirror(small))]
    assert differ(means[1], means[0])
    step = run(config(horizontal_flip=True, max_train_steps=1), tiny, picture)
    close(step.method.images.references, means[0])


def test_a_sample_is_the_same_in_any_batch(tiny: Backbone) -> None:
    """References, masks and losses are of each sample alone."""
    vico = method(tiny, **TWO)
    x, t, which = normal(0, 4, 4, 8, 8), torch.tensor([5, 400, 900, 7]), torch.tensor([1, 0, 0, 1])
    condition = tiny.encode_prompts(vico.subject_prompts())[which]
    with torch.no_grad():
        whole, own = vico.predict(x, t, condition, which), vico.own_loss()
        assert own is not None
        for k in range(4):
            one = slice(k, k + 1)
            close(vico.predict(x[one], t[one], condition[one], which[one]), whole[one])
            alone = vico.own_loss()
            assert alone is not None
            close(alone, own[one])
        # It is the reference that makes the difference.
        vico.images.references = vico.images.references.flip(0)
        other = vico.predict(x, t, condition, which)
        assert all(differ(a, b) for a, b in zip(other, whole, strict=True))


def test_only_the_subject_of_the_reference_is_attended_to(tiny: Backbone) -> None:
    vico = method(tiny, **TWO)
    (block,) = vico.images.blocks
    seen: dict[str, Any] = {}
    block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True
    )
    condition = tiny.encode_prompts(vico.subject_prompts())
    x, t = normal(0, 2, 4, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        vico.predict(x, t, condition, torch.tensor([0, 1]))
    (maps,) = vico.maps
    values = maps.subject.double().numpy()
    masks = torch.tensor(np.stack([row > brute_force(row) for row in values]))
    assert not torch.equal(masks[0], masks[1]) and masks.any(1).all() and not masks.all()
    assert torch.equal(seen["encoder_attention_mask"].squeeze(1) == 0, masks)

    # What lies outside the mask may be anything; what lies inside may not.
    query, reference = seen.pop("x"), seen["encoder_hidden_states"]
    with torch.no_grad():
        before = block(query, **seen)
        seen["encoder_hidden_states"] = torch.where(masks[..., None], reference, 100.0)
        seen.pop("x")
        close(block(query, **seen), before)
        seen["encoder_hidden_states"] = torch.where(masks[..., None], 100.0, reference)
        seen.pop("x")
        assert differ(block(query, **seen), before)


def test_the_prompt_must_name_the_sample_s_subject(tiny: Backbone) -> None:
    vico = method(tiny, **TWO)
    x, t = normal(0, 2, 4, 8, 8), torch.tensor([5, 900])
    condition = tiny.encode_prompts(["photo of a <sks>", "photo of a <my-cat>"])
    with pytest.raises(ValueError, match="sample 1 does not name subject 0"):
        vico.predict(x, t, condition, torch.tensor([0, 0]))
    foreign = condition.map(lambda c: c + 1e-3)
    with pytest.raises(ValueError, match="not encoded by this backbone"):
        vico.predict(x, t, foreign, torch.tensor([0, 1]))
    vico.predict(x, t, condition, torch.tensor([0, 1]))


# --- Prompts without the subject ------------------------------------------------------------------


def test_a_prompt_without_the_subject_is_answered_by_the_plain_model(
    tiny: Backbone, fresh: Fresh
) -> None:
    method(tiny)
    plain = fresh()
    x, t = normal(0, 3, 4, 8, 8), torch.tensor([5, 400, 900])
    with torch.no_grad():
        condition = tiny.encode_prompts(["photo of a dog", PROMPT, ""])
        seen, expected = tiny.predict(x, t, condition), plain.predict(x, t, condition)
        close(seen[[0, 2]], expected[[0, 2]])
        assert differ(seen[1], expected[1])
        none = condition[[0, 2]]
        assert torch.equal(tiny.predict(x[:2], t[:2], none), plain.predict(x[:2], t[:2], none))


def test_the_models_before_and_now_have_no_image_attention(tiny: Backbone, fresh: Fresh) -> None:
    """Even of a prompt with S*: what is asked is the UNet's own opinion."""
    vico, plain = method(tiny), fresh()
    x, t = normal(0, 2, 4, 8, 8), torch.tensor([5, 900])
    condition = tiny.encode_prompts([PROMPT, "photo of a dog"])
    with torch.no_grad():
        expected = plain.predict(x, t, condition)
    before = vico.predict_pretrained(x, t, condition)
    assert torch.equal(before, expected) and not before.requires_grad
    assert torch.equal(vico.predict_current(x, t, condition), expected)
    with torch.no_grad():  # and it is on again
        assert differ(tiny.predict(x, t, condition)[0], expected[0])


# --- Tuning ---------------------------------------------------------------------------------------


def frozen(backbone: Backbone) -> dict[str, Tensor]:
    modules = {"unet": backbone.unet, "text": backbone.text_encoder, "vae": backbone.pipeline.vae}
    return {
        f"{part}.{name}": value.clone()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


@pytest.mark.quick
def test_exactly_the_blocks_and_the_word_move(
    tiny: Backbone, fresh: Fresh, picture: Image.Image
) -> None:
    before, start = frozen(tiny), method(fresh(), stirred=False).state_dict()
    step = run(config(), tiny, picture)
    now = step.method.state_dict()
    host = "image.up_blocks.0.attentions.1.transformer_blocks.0."
    assert {name for name in now if not name.startswith(host)} == {"token.text_encoder"}
    assert now.keys() == start.keys()
    for name, value in now.items():
        assert not torch.equal(value, start[name]), name
    for name, value in frozen(tiny).items():
        if name.endswith("token_embedding.weight"):
            assert torch.equal(value[:-1], before[name])
            assert torch.equal(value[-1], now["token.text_encoder"][0])
        else:
            assert torch.equal(value, before[name]), name


def test_each_group_has_its_own_rate(tiny: Backbone) -> None:
    settings = TuningConfig(image=Path("dog.png"), category="dog", method="vico")
    vico = ViCo(tiny, configure(settings, tiny))
    assert [group["lr"] for group in vico.groups()] == [1e-5, 5e-3]
    assert [len(group["params"]) for group in vico.groups()] == [len(vico.images.weights()), 1]
    assert (vico.config.weight_sude, vico.config.max_train_steps) == (1.5, 400)
    assert vico.subject_prompts() == [PROMPT]


def test_sude_reaches_every_block_and_the_word(tiny: Backbone) -> None:
    vico = method(tiny)
    x, t = normal(0, 2, 4, 8, 8), torch.tensor([300, 700])
    output = vico.predict(x, t, tiny.encode_prompts([PROMPT]).expand(2), torch.zeros(2).long())
    null, category = (
        vico.predict_pretrained(x, t, tiny.encode_prompts([text]).expand(2))
        for text in ("", "photo of a dog")
    )
    terms = sude_terms(output, category, null, x, t, tiny.schedule, truncated=False)
    terms.gated.mean().backward()
    for name, p in vico.parameters.items():
        assert p.grad is not None and bool(p.grad.any()), name
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_its_own_loss_is_in_the_gradient_and_told(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5e-4 is little: with the weight of 5 the same loss moves the word elsewhere."""
    steps = [run(config(max_train_steps=1), fresh(), picture)]
    monkeypatch.setattr("sude_lab.methods.vico.ATTENTION_WEIGHT", 5.0)
    steps.append(run(config(max_train_steps=1), fresh(), picture))
    assert 0 < steps[0].loss_own < 5e-4
    assert steps[1].loss_own == pytest.approx(1e4 * steps[0].loss_own, rel=1e-4)
    words = [step.method.parameters["token.text_encoder"].grad for step in steps]
    assert differ(words[1] / words[1].norm(), words[0] / words[0].norm())


def gradients(vico: ViCo) -> dict[str, Tensor]:
    """Of the subject's loss and the method's own, with other calls before the backward pass."""
    backbone = vico.backbone
    x, t = normal(0, 2, 4, 8, 8), torch.tensor([300, 700])
    condition = backbone.encode_prompts([PROMPT]).expand(2)
    which = torch.zeros(2).long()
    output = vico.predict(x, t, condition, which)
    own = vico.own_loss()
    assert own is not None
    with torch.no_grad():
        vico.predict_current(x, t, backbone.encode_prompts(["photo of a dog"]).expand(2))
        backbone.predict(2 * x, t + 9, backbone.encode_prompts(["a <sks>"]).expand(2))
    (output.square().mean((1, 2, 3)) + 100 * own).mean().backward()
    assert len(vico.maps) == 1
    return {name: p.grad for name, p in vico.parameters.items() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(fresh: Fresh) -> None:
    plain, saved = (
        gradients(method(fresh(), gradient_checkpointing=choice)) for choice in (False, True)
    )
    assert plain.keys() == saved.keys() and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-7)


def test_checkpointing_does_compute_the_layer_anew(tiny: Backbone) -> None:
    """Else the test above would prove nothing."""
    calls: list[bool] = []
    vico = method(tiny, gradient_checkpointing=True)
    (host,) = decoder_layers(tiny.unet).values()
    host.attn1.register_forward_hook(lambda *_: calls.append(True))
    gradients(vico)
    assert len(calls) == 4  # predict, predict_current, the other prompt; and once more


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(fresh: Fresh, picture: Image.Image) -> None:
    settings = config(max_train_steps=4)
    states = [step.state_dict() for step in tune(settings, fresh(), picture)]
    *_, resumed = tune(settings, fresh(), picture, state=states[1])
    for name, value in resumed.state_dict()["trained"].items():
        assert torch.equal(value, states[3]["trained"][name]), name
        assert not torch.equal(value, states[1]["trained"][name]), name


def test_two_subjects_are_tuned_with_their_own_references(
    tiny: Backbone, picture: Image.Image
) -> None:
    other = ImageOps.invert(picture)
    step = run(config(train_batch_size=6, **TWO), tiny, picture, other)
    assert math.isfinite(step.row()["loss_subject"]) and step.loss_own > 0
    small = [p.resize((32, 32), Image.Resampling.LANCZOS) for p in (picture, other)]
    expected = torch.cat([tiny.encode_pictures([p])[0] for p in small])
    close(step.method.images.references, expected)
    assert differ(expected[0], expected[1])


# --- Drawing --------------------------------------------------------------------------------------


def draw(backbone: Backbone, prompts: list[str], x: Tensor, **settings: Any) -> Tensor:
    backbone.pipeline.scheduler = DDIMScheduler.from_config(backbone.pipeline.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0} | settings
    return backbone.pipeline(prompts, latents=x, output_type="latent", **options).images


@pytest.mark.parametrize("negative", [None, "photo of a cat", "photo of a <my-cat>"])
def test_guided_sampling_is_that_of_a_loop_written_out(
    negative: str | None, tiny: Backbone, fresh: Fresh
) -> None:
    """The unconditional half is the plain model's, unless the negative prompt names a subject."""
    vico, plain, x = method(tiny, **TWO), fresh(), normal(0, 2, 4, 8, 8)
    seen = draw(
        tiny, [PROMPT, "photo of a <my-cat>"], x, negative_prompt=negative and [negative] * 2
    )
    scheduler = DDIMScheduler.from_config(tiny.pipeline.scheduler.config)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        condition = tiny.encode_prompts([PROMPT, "photo of a <my-cat>"])
        null = tiny.encode_prompts([negative or ""]).expand(2)
        for t in scheduler.timesteps:
            batch = t.expand(2)
            told = vico.predict(x, batch, condition, torch.tensor([0, 1]))
            if negative and "<my-cat>" in negative:
                untold = vico.predict(x, batch, null, torch.tensor([1, 1]))
            else:
                untold = plain.predict(x, batch, null)
            x = scheduler.step(untold + 3.0 * (told - untold), t, x).prev_sample
    torch.testing.assert_close(seen, x, rtol=1e-3, atol=1e-4)
    assert differ(draw(plain, ["photo of a dog"] * 2, normal(0, 2, 4, 8, 8)), x)


def test_a_picture_is_the_same_in_any_batch_and_every_time(tiny: Backbone) -> None:
    method(tiny)
    x = normal(0, 4, 4, 8, 8)
    whole = draw(tiny, [PROMPT] * 4, x)
    assert torch.equal(draw(tiny, [PROMPT] * 4, x), whole)
    for k in range(4):
        one = draw(tiny, [PROMPT], x[k : k + 1])
        torch.testing.assert_close(one, whole[k : k + 1], rtol=1e-3, atol=1e-4)
    # One prompt, several pictures; a prompt beside others; without guidance.
    many = draw(tiny, [PROMPT], x, num_images_per_prompt=4)
    torch.testing.assert_close(many, whole, rtol=1e-3, atol=1e-4)
    mixed = draw(tiny, ["photo of a dog", PROMPT, "", "a <sks> on a dog"], x)
    torch.testing.assert_close(mixed[1], whole[1], rtol=1e-3, atol=1e-4)
    assert draw(tiny, [PROMPT] * 4, x, guidance_scale=1.0).shape == x.shape


def test_generate_draws_the_subject_with_its_reference(tiny: Backbone) -> None:
    vico = method(tiny)
    first = generate(tiny, PROMPT, num_images=3, batch_size=2, negative_prompt="photo of a cat")
    again = generate(tiny, PROMPT, num_images=3, batch_size=2, negative_prompt="photo of a cat")
    assert [a.tobytes() for a in first] == [b.tobytes() for b in again]
    with vico.images.off():
        without = generate(tiny, PROMPT, num_images=3, batch_size=2)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, without, strict=True))


def test_a_prompt_of_two_subjects_uses_the_first_ones_reference(tiny: Backbone) -> None:
    vico = method(tiny, **TWO)
    x, t = normal(0, 1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        condition = tiny.encode_prompts(["a <my-cat> and a <sks>"])
        cat, dog = (vico.predict(x, t, condition, torch.tensor([k])) for k in (1, 0))
        assert torch.equal(tiny.predict(x, t, condition), cat)
        assert differ(dog, cat)


def test_another_size_than_the_references_can_be_drawn(tiny: Backbone) -> None:
    vico = method(tiny)
    x, t = normal(0, 2, 4, 16, 12), torch.tensor([300, 300])
    with torch.no_grad():
        condition = tiny.encode_prompts([PROMPT]).expand(2)
        output = tiny.predict(x, t, condition)
        assert output.shape == x.shape and bool(torch.isfinite(output).all())
        with vico.images.off():
            assert differ(output, tiny.predict(x, t, condition))


def test_all_ways_to_call_the_unet_are_one(tiny: Backbone) -> None:
    method(tiny)
    x, c = normal(0, 2, 4, 8, 8), tiny.encode_prompts([PROMPT, ""]).hidden
    unet = tiny.unet
    with torch.no_grad():
        expected = unet(x, torch.tensor([300, 300]), c).sample
        close(unet(x, 300, encoder_hidden_states=c, return_dict=False)[0], expected)
        close(unet(sample=x, timestep=torch.tensor(300), encoder_hidden_states=c).sample, expected)
        close(unet(x, torch.tensor([300]), c, None).sample, expected)


def test_many_prompts_do_not_fill_the_memory(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    vico = method(tiny)
    monkeypatch.setattr("sude_lab.methods.vico.PROMPTS_KEPT", 3)
    x, t = normal(0, 1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        conditions = [
            tiny.encode_prompts([f"{words} <sks>"]) for words in ("a", "the", "a dog", "on a")
        ]
        assert len(vico.images._prompts) == 3
        for condition in conditions:
            kept, told = (
                tiny.predict(x, t, condition),
                vico.predict(x, t, condition, torch.tensor([0])),
            )
            assert torch.equal(kept, told) == (condition is not conditions[0])


def test_tuning_fills_no_memory_with_its_prompts(tiny: Backbone, picture: Image.Image) -> None:
    """It knows its rows without asking for bits; what is encoded between its steps is read."""
    steps = tune(config(), tiny, picture)
    step = next(steps)
    assert not step.method.images._prompts
    assert tiny.encode_prompts([PROMPT]) and len(step.method.images._prompts) == 1
    next(steps)
    assert len(step.method.images._prompts) == 1


def test_mixed_conditions_find_their_rows(tiny: Backbone) -> None:
    vico = method(tiny)
    x, t = normal(0, 4, 4, 8, 8), torch.full((4,), 300)
    with torch.no_grad():
        parts: list[Condition] = [
            tiny.encode_prompts([text]) for text in ("", PROMPT, "photo of a dog", "a <sks>")
        ]
        whole = tiny.predict(x, t, concatenate(parts))
        for k, part in enumerate(parts):
            close(tiny.predict(x[k : k + 1], t[:1], part), whole[k : k + 1])
        with vico.images.off():
            off = tiny.predict(x, t, concatenate(parts))
    assert [differ(a, b) for a, b in zip(whole, off, strict=True)] == [False, True, False, True]


def test_a_copy_has_image_attention_of_its_own(tiny: Backbone, picture: Image.Image) -> None:
    step = run(config(), tiny, picture)
    x = normal(0, 2, 4, 8, 8)
    before = draw(tiny, [PROMPT] * 2, x)
    copied = tiny.copy()
    assert torch.equal(draw(copied, [PROMPT] * 2, x), before)
    assert attention_of(tiny) is step.method.images is not attention_of(copied)
    stir(attention_of(copied))
    assert differ(draw(copied, [PROMPT] * 2, x), before)
    assert torch.equal(draw(tiny, [PROMPT] * 2, x), before)


# --- Saved weights --------------------------------------------------------------------------------


def test_what_is_saved_draws_the_same(fresh: Fresh, picture: Image.Image, tmp_path: Path) -> None:
    tuned, loaded, x = fresh(), fresh(), normal(0, 2, 4, 8, 8)
    step = run(config(**TWO), tuned, picture, ImageOps.invert(picture))
    save_weights(step.method, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "learned_embeds-2.safetensors",
        "learned_embeds.safetensors",
        "vico.safetensors",
    ]
    load_weights("vico", loaded, tmp_path)
    prompts = [PROMPT, "photo of a <my-cat>"]
    assert torch.equal(draw(loaded, prompts, x), draw(tuned, prompts, x))
    assert differ(draw(loaded, prompts, x), draw(fresh(), ["photo of a dog", "photo of a cat"], x))
    # Each word has the reference of its own picture.
    with torch.no_grad():
        attention_of(loaded).references.copy_(attention_of(loaded).references.flip(0))
    assert not torch.equal(draw(loaded, prompts, x), draw(tuned, prompts, x))


def test_a_plain_pipeline_reads_the_word(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    backbone, plain = fresh(), fresh()
    save_weights(run(config(), backbone, picture).method, tmp_path)
    plain.pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    with torch.no_grad():
        seen = plain.encode_prompts([PROMPT]).hidden
        assert torch.equal(seen, backbone.encode_prompts([PROMPT]).hidden)


def test_foreign_weights_are_refused_in_one_sentence(
    fresh: Fresh, picture: Image.Image, wider_folder: Path, tmp_path: Path
) -> None:
    save_weights(run(config(), fresh(), picture).method, tmp_path)
    with pytest.raises(UserError, match="backbone it was tuned on"):
        load_weights("vico", open_backbone(wider_folder, device="cpu"), tmp_path)
    file, about = tmp_path / "vico.safetensors", {"tokens": '["<sks>"]'}
    tensors = {name: p.clone() for name, p in load_file(file).items()}  # it is written over
    damaged: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        ({k: v for k, v in tensors.items() if "attn1" not in k}, about, "another image attention"),
        (
            {k: v[..., :1] if v.ndim == 2 else v for k, v in tensors.items()},
            about,
            "another image attention",
        ),
        ({k: v for k, v in tensors.items() if k != "references"}, about, "references of the shape"),
        (tensors | {"references": torch.zeros(1, 3, 8, 8)}, about, "references of the shape"),
        (tensors, {}, "references of the shape"),
        (tensors, {"tokens": '["<other>"]'}, "KeyError: '<other>'"),
    ]
    for changed, told, message in damaged:
        save_file({k: v.contiguous() for k, v in changed.items()}, file, told)
        with pytest.raises(UserError, match=message) as error:
            load_weights("vico", fresh(), tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "vico.safetensors").write_bytes(b"not a file of weights")
    with pytest.raises(UserError, match="damaged"):
        load_weights("vico", fresh(), tmp_path)
    (tmp_path / "vico.safetensors").unlink()
    with pytest.raises(UserError, match=r"are not there: tune it anew\."):
        load_weights("vico", fresh(), tmp_path)


def test_sdxl_is_refused_in_one_sentence(tmp_path: Path, picture: Image.Image) -> None:
    pipeline = build(shrink(REAL["sdxl"])[0], tmp_path)
    backbone = Backbone(pipeline, "sdxl", torch.device("cpu"))
    with pytest.raises(UserError, match=r"not for SDXL: choose.*another --method\."):
        ViCo(backbone, configure(config(), backbone))
    with pytest.raises(UserError, match="not for SDXL"):
        load_weights("vico", Backbone(pipeline, "sdxl", torch.device("cpu")), tmp_path)


def test_a_word_that_has_learned_nothing_is_told_from_its_first_word(
    tiny: Backbone, fresh: Fresh
) -> None:
    """Their prompts are one condition: the one that was read last counts."""
    vico, plain = method(tiny, stirred=False), fresh()
    stir(vico.images)
    x, t, which = normal(0, 1, 4, 8, 8), torch.tensor([300]), torch.tensor([0])
    with torch.no_grad():
        named = tiny.encode_prompts([PROMPT])
        output = tiny.predict(x, t, named)
        category = tiny.encode_prompts(["photo of a dog"])
        assert torch.equal(named.hidden, category.hidden)
        assert torch.equal(tiny.predict(x, t, category), plain.predict(x, t, category))
        assert torch.equal(vico.predict(x, t, named, which), output)  # who says S* is heard
        assert torch.equal(tiny.predict(x, t, tiny.encode_prompts([PROMPT])), output)
        assert differ(output, plain.predict(x, t, category))


def test_after_tuning_the_category_is_drawn_as_before(
    tiny: Backbone, fresh: Fresh, picture: Image.Image
) -> None:
    """Although at the first step S* was the category's own word."""
    run(config(), tiny, picture)
    x = normal(0, 2, 4, 8, 8)
    for prompt in ("photo of a dog", "photo of a cat"):
        assert torch.equal(draw(tiny, [prompt] * 2, x), draw(fresh(), [prompt] * 2, x))


# --- In lower precision ---------------------------------------------------------------------------


def test_it_is_tuned_and_draws_in_bfloat16(tiny: Backbone, picture: Image.Image) -> None:
    backbone = replace(tiny, dtype=torch.bfloat16)
    step = run(config(gradient_checkpointing=True), backbone, picture)
    assert math.isfinite(step.row()["loss_subject"]) and step.loss_own > 0
    assert all(p.dtype == torch.float32 for p in step.method.parameters.values())
    with_picture = generate(backbone, PROMPT, num_images=2)
    with step.method.images.off():
        without = generate(backbone, PROMPT, num_images=2)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(with_picture, without, strict=True))
