"""SuDe at sampling time: the algebra in float64, then what a pipeline's scheduler is handed.

Expected predictions are computed here, from the models' outputs and the definition of rho alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from real_configs import REAL, build, shrink
from torch import Tensor

from sude_lab.backbone import Backbone, Condition
from sude_lab.cli import main
from sude_lab.config import TuningConfig
from sude_lab.diffusion import Schedule, to_eps
from sude_lab.errors import UserError
from sude_lab.frozen import FrozenUNet
from sude_lab.generation import generate
from sude_lab.guidance import sude_correction, sude_guidance
from sude_lab.losses import guidance_projection, hinge_loss
from sude_lab.prompts import caption
from sude_lab.runs import strength
from sude_lab.runs.folder import Run
from sude_lab.runs.strength import Strength

B, SHAPE = 6, (3, 4, 5)
PROMPT, CLASS = "photo of a burning candle", "photo of a running dog"
Fresh = Callable[[], Backbone]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def outputs() -> tuple[Tensor, Tensor, Tensor]:
    """Subject, class and null predictions; rho of the rows is below 0, between, 1 and above."""
    uncond, d = normal(0, B, *SHAPE), normal(1, B, *SHAPE)
    across = normal(2, B, *SHAPE)
    share = (across * d).sum((1, 2, 3)) / (d * d).sum((1, 2, 3))
    across = across - share[:, None, None, None] * d
    rho = torch.tensor([-0.7, 0.0, 0.4, 0.9, 1.2, 3.0], dtype=torch.float64)
    return uncond + rho[:, None, None, None] * d + across, uncond + d, uncond


# --- the algebra ---------------------------------------------------------------------------------


@pytest.mark.quick
def test_full_strength_lands_on_the_gate_and_touches_nothing_behind_it(
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    subject, category, uncond = outputs
    corrected = subject + sude_correction(subject, category, uncond)
    rho = guidance_projection(corrected, category, uncond)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.2, 3.0], dtype=torch.float64)
    assert torch.allclose(rho, expected, rtol=0, atol=1e-13)
    assert torch.equal(corrected[4:], subject[4:])


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
def test_rho_moves_by_the_strengths_share_of_what_is_missing(
    strength: float, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    subject, category, uncond = outputs
    before = guidance_projection(subject, category, uncond)[:4]
    corrected = subject + sude_correction(subject, category, uncond, strength)
    after = guidance_projection(corrected, category, uncond)[:4]
    assert torch.allclose(after, before + strength * (1 - before), rtol=0, atol=1e-13)


@pytest.mark.quick
def test_it_is_the_smallest_change_that_shuts_the_gate(
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    subject, category, uncond = outputs
    correction = sude_correction(subject, category, uncond)
    for k in range(4):
        d = (category - uncond)[k].flatten().numpy()
        a = (subject - uncond)[k].flatten().numpy()
        # numpy's least-norm solution of <change, d> = ||d||^2 - <a, d>, by SVD.
        least, *_ = np.linalg.lstsq(d[None], np.array([d @ d - a @ d]), rcond=None)
        assert np.allclose(correction[k].flatten().numpy(), least, rtol=0, atol=1e-12)


def test_it_is_one_step_down_the_hinge(outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    subject, category, uncond = outputs
    variance = torch.linspace(0.1, 2.0, B, dtype=torch.float64)
    x = subject.clone().requires_grad_()
    hinge_loss(x, category, uncond, variance).sum().backward()
    assert x.grad is not None
    missing = torch.relu(1 - guidance_projection(subject, category, uncond))
    stepped = subject - (variance * missing)[:, None, None, None] * x.grad
    expected = subject + sude_correction(subject, category, uncond)
    assert torch.allclose(stepped, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_parametrisation_makes_the_same_correction(
    prediction_type: str, hinge: bool, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    schedule = Schedule.from_scheduler(scheduler)
    t = torch.tensor([0, 3, 250, 500, 900, 999])
    x_t, w, negative = normal(5, B, *SHAPE), 7.5, normal(6, B, *SHAPE)

    def eps(output: Tensor) -> Tensor:
        return to_eps(output, x_t, t, schedule)

    subject = outputs[0]
    guided = negative + w * (subject - negative)
    own = guided + w * sude_correction(*outputs, 0.8, hinge=hinge)
    # The same in eps, of which the outputs are an affine map (x_0: with a negative slope).
    in_eps = eps(guided) + w * sude_correction(*map(eps, outputs), 0.8, hinge=hinge)
    assert torch.allclose(eps(own), in_eps, rtol=1e-9, atol=1e-9)
    rho = [guidance_projection(*o) for o in (outputs, tuple(map(eps, outputs)))]
    assert torch.allclose(*rho, rtol=0, atol=1e-9)


def test_correcting_the_conditional_half_is_correcting_the_guided_prediction(
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    subject, category, uncond = outputs
    negative, w = normal(7, B, *SHAPE), 4.0
    half = subject + sude_correction(subject, category, uncond, 1.5)
    guided = negative + w * (subject - negative)
    whole = guided + w * sude_correction(subject, category, uncond, 1.5)
    assert torch.allclose(negative + w * (half - negative), whole, rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other(outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    together = sude_correction(*outputs)
    for k in range(B):
        alone = sude_correction(*(x[k : k + 1] for x in outputs))
        assert torch.allclose(alone[0], together[k], rtol=0, atol=1e-14)


def test_without_the_hinge_it_is_composition(outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    subject, category, uncond = outputs
    added = sude_correction(subject, category, uncond, 0.3, hinge=False)
    assert torch.allclose(added, 0.3 * (category - uncond), rtol=0, atol=1e-14)


def test_strength_zero_and_a_class_without_direction_change_nothing(
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    subject, _, uncond = outputs
    assert torch.count_nonzero(sude_correction(*outputs, 0.0)) == 0
    assert torch.count_nonzero(sude_correction(subject, uncond, uncond)) == 0


def test_half_precision_stays_and_does_not_overflow(
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    # ||d||^2 is above 65,504, where float16 ends.
    halves = [(40 * x).half() for x in outputs]
    assert (halves[1] - halves[2]).double().square().sum((1, 2, 3)).min() > 65_504
    added = sude_correction(*halves)
    assert added.dtype == torch.float16
    exact = sude_correction(*(x.double() for x in halves))
    assert torch.allclose(added.double(), exact, rtol=2e-3, atol=0.05)


def test_shapes_must_agree(outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    subject, category, uncond = outputs
    with pytest.raises(ValueError, match="Shapes"):
        sude_correction(subject[:1], category, uncond)


@pytest.mark.parametrize(
    ("prompt", "categories", "expected"),
    [
        ("photo of a running {S*} dog", ["dog"], "photo of a running dog"),
        ("photo of a running {S*}", ["dog"], "photo of a running dog"),
        ("photo of a {S*}", ["owl"], "photo of an owl"),
        ("photo of an {S*} on the beach", ["dog"], "photo of a dog on the beach"),
        ("photo of a {S*} stuffed animal", ["stuffed animal"], "photo of a stuffed animal"),
        ("photo of a {S*} dogma", ["dog"], "photo of a dog dogma"),
        ("a {S*2} on a {S*} cat", ["cat", "candle"], "a candle on a cat"),
        (
            "photo of a running {S*} and it is a dog",
            ["dog"],
            "photo of a running dog and it is a dog",
        ),
        ("photo of a dog", ["dog"], "photo of a dog"),
    ],
)
def test_the_class_prompt_says_the_category_once(
    prompt: str, categories: list[str], expected: str
) -> None:
    assert caption(prompt, *categories) == expected


def test_the_class_prompt_is_the_same_where_the_prompt_has_the_token_itself(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes: list[Condition] = []
    monkeypatch.setattr(strength, "sude_guidance", lambda *about, **_: classes.append(about[2]))
    monkeypatch.setattr(strength, "has_adapters", lambda unet: True)  # its own frozen base
    config = TuningConfig(Path("dog.png"), "dog", token="og")
    for prompt in ("photo of a running {S*} dog", "photo of a running og dog"):
        strength.guidance_for(config, tiny, prompt, Strength(sude_guidance=1))
    expected = tiny.encode_prompts(["photo of a running dog"]).hidden
    assert [torch.equal(condition.hidden, expected) for condition in classes] == [True] * 2


# --- in a pipeline -------------------------------------------------------------------------------


@torch.no_grad()
def perturb(module: torch.nn.Module, amount: float = 0.05, only: str = "") -> None:
    """Stands for tuning: the weights move a little, every run the same way."""
    generator = torch.Generator().manual_seed(3)
    for name, p in module.named_parameters():
        if only in name:
            p.add_(amount * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A small SDXL; copy it."""
    pipeline = build(shrink(REAL["sdxl"])[0], tmp_path_factory.mktemp("xl"))
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).eval()
    return Backbone(pipeline, "", torch.device("cpu"))


def pair(kind: str, fresh: Fresh, request: pytest.FixtureRequest) -> tuple[Backbone, Backbone]:
    """A tuned backbone and its frozen base."""
    if kind.startswith("xl"):
        base = request.getfixturevalue("xl")
        tuned = base.copy()
        assert isinstance(tuned.pipeline.scheduler, EulerDiscreteScheduler)
    else:
        base, tuned = fresh(), fresh()
        config = dict(tuned.pipeline.scheduler.config)
        kind_of = {"prediction_type": "v_prediction" if kind == "v" else "epsilon"}
        tuned.pipeline.scheduler = DDIMScheduler.from_config(config | kind_of)
    perturb(tuned.unet)
    return tuned, base


Step = tuple[Tensor, Tensor, Tensor]


@contextmanager
def watched(pipeline: Any) -> Iterator[list[Step]]:
    """Collect (input of the UNet, t, guided prediction) of every step the scheduler takes."""
    steps: list[Step] = []
    scheduler = pipeline.scheduler
    take = scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        steps.append((scheduler.scale_model_input(sample, t).clone(), t, output.clone()))
        return take(output, t, sample, **kwargs)

    scheduler.step = spy
    try:
        yield steps
    finally:
        del scheduler.step


def latents(backbone: Backbone, number: int = 2) -> Tensor:
    side = backbone.unet.config.sample_size
    return normal(11, number, 4, side, side, dtype=torch.float32)


def draw(backbone: Backbone, guidance_scale: float = 4.0, number: int = 2, **more: Any) -> Tensor:
    settings = {"num_inference_steps": 3, "output_type": "latent"} | more
    return backbone.pipeline(
        [PROMPT] * number,
        latents=latents(backbone, number),
        guidance_scale=guidance_scale,
        **settings,
    ).images


@torch.no_grad()
def predict(unet: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return unet(x, t, **condition.expand(len(x)).arguments).sample


def by_hand(
    tuned: Any, frozen: Any, step: Step, conditions: dict[str, Condition], w: float, g: float
) -> tuple[Tensor, np.ndarray]:
    """The guided prediction of equation (*), and rho, in numpy."""
    x, t, _ = step
    subject = predict(tuned, x, t, conditions["subject"])
    guided = subject
    if w > 1:
        negative = predict(tuned, x, t, conditions["negative"])
        guided = negative + w * (subject - negative)
    null = predict(frozen, x, t, conditions["null"])
    d = (predict(frozen, x, t, conditions["class"]) - null).double().numpy()
    a = (subject - null).double().numpy()
    rho = np.einsum("bchw,bchw->b", a, d) / np.einsum("bchw,bchw->b", d, d)
    added = g * max(w, 1.0) * np.maximum(0, 1 - rho)[:, None, None, None] * d
    return guided + torch.from_numpy(added).float(), rho


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v", "xl", "xl, other sizes"])
def test_the_scheduler_is_handed_the_corrected_prediction(
    kind: str, guidance_scale: float, fresh: Fresh, request: pytest.FixtureRequest
) -> None:
    tuned, base = pair(kind, fresh, request)
    more: dict[str, Any] = {}
    with torch.no_grad():
        conditions = {
            "subject": tuned.encode_prompts([PROMPT]),
            "negative": tuned.null_condition(),
            "class": base.encode_prompts([CLASS]),
            "null": base.null_condition(),
        }
    if "sizes" in kind:
        more = {"original_size": (64, 32), "crops_coords_top_left": (8, 4)}
        side = tuned.resolution
        sizes = torch.tensor([[64.0, 32, 8, 4, side, side]])
        conditions = {k: replace(c, sizes=sizes) for k, c in conditions.items()}
        more |= {  # SDXL's negative half has sizes of its own
            "negative_original_size": (64, 32),
            "negative_crops_coords_top_left": (8, 4),
            "negative_target_size": (side, side),
        }
    with (
        watched(tuned.pipeline) as steps,
        sude_guidance(tuned.pipeline, base.unet, CLASS, 0.7) as seen,
    ):
        draw(tuned, guidance_scale, **more)
    assert len(steps) == len(seen) == 3
    largest = 0.0
    for step, rho in zip(steps, seen, strict=True):
        expected, rho_by_hand = by_hand(
            tuned.unet, base.unet, step, conditions, guidance_scale, 0.7
        )
        uncorrected, _ = by_hand(tuned.unet, base.unet, step, conditions, guidance_scale, 0.0)
        largest = max(largest, float((expected - uncorrected).abs().max()))
        assert np.allclose(rho.numpy(), rho_by_hand, rtol=1e-3, atol=1e-4)
        assert torch.allclose(step[2], expected, rtol=1e-4, atol=1e-4)
    assert largest > 5e-3, "the correction is too small to be seen"


def test_the_unet_is_put_back_also_after_an_error(
    fresh: Fresh, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base = pair("epsilon", fresh, request)
    before = draw(tuned)
    with sude_guidance(tuned.pipeline, base.unet, CLASS):
        during = draw(tuned)
    assert not torch.equal(during, before)
    assert torch.equal(draw(tuned), before)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base.unet, "forward", fail)
    with pytest.raises(KeyboardInterrupt), sude_guidance(tuned.pipeline, base.unet, CLASS):
        draw(tuned)
    assert torch.equal(draw(tuned), before)


def test_strength_zero_leaves_the_pipeline_alone(
    fresh: Fresh, request: pytest.FixtureRequest
) -> None:
    tuned, _ = pair("epsilon", fresh, request)
    before = draw(tuned)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the frozen model was asked")

    with sude_guidance(tuned.pipeline, never, CLASS, 0.0) as seen:
        assert torch.equal(draw(tuned), before)
    assert seen == []


def test_an_untuned_model_with_the_class_prompt_stays_as_it_is(fresh: Fresh) -> None:
    """rho is 1 then: the hinge adds nothing, where composition adds d."""
    base = fresh()
    alone = draw(base)
    with sude_guidance(base.pipeline, base.unet, PROMPT) as seen:
        hinged = draw(base)
    assert all(torch.allclose(rho, torch.ones(2), atol=1e-5) for rho in seen)
    assert torch.allclose(hinged, alone, atol=1e-4)
    with sude_guidance(base.pipeline, base.unet, PROMPT, hinge=False):
        composed = draw(base, guidance_scale=4.0)
    # u_null + w (u_c - u_null) + w d is guidance of scale 2 w.
    assert torch.allclose(composed, draw(base, guidance_scale=8.0), atol=1e-3)
    assert not torch.allclose(composed, alone, atol=1e-2)


def test_one_class_condition_serves_all_pictures_or_each_has_its_own(
    fresh: Fresh, request: pytest.FixtureRequest
) -> None:
    tuned, base = pair("epsilon", fresh, request)
    with torch.no_grad():
        both = base.encode_prompts([CLASS, "photo of a cat"])
    with sude_guidance(tuned.pipeline, base.unet, both):
        together = draw(tuned)
    with sude_guidance(tuned.pipeline, base.unet, CLASS):
        dogs = draw(tuned)
    with sude_guidance(tuned.pipeline, base.unet, "photo of a cat"):
        cats = draw(tuned)
    assert torch.allclose(together, torch.cat([dogs[:1], cats[1:]]), atol=1e-4)
    assert not torch.allclose(dogs, cats, atol=1e-3)
    with (
        pytest.raises(UserError, match="2 class conditions for 3 pictures"),
        sude_guidance(tuned.pipeline, base.unet, both),
    ):
        draw(tuned, number=3)


def test_hooks_of_the_tuned_model_itself_are_outside_of_it(
    fresh: Fresh, request: pytest.FixtureRequest
) -> None:
    """As ViCo does: rows of its own go through the UNet, below the batch, and are dropped."""
    tuned, base = pair("epsilon", fresh, request)
    with sude_guidance(tuned.pipeline, base.unet, CLASS):
        expected = draw(tuned)
    rows = []

    def add(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = kwargs["encoder_hidden_states"]
        kwargs["encoder_hidden_states"] = torch.cat([hidden, hidden[-1:]])
        rows.append(len(args[0]))
        return (torch.cat([args[0], torch.zeros_like(args[0][-1:])]), args[1]), kwargs

    def drop(module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        return (output[0][: rows[-1]],)

    tuned.unet.register_forward_pre_hook(add, with_kwargs=True)
    tuned.unet.register_forward_hook(drop)
    with sude_guidance(tuned.pipeline, base.unet, CLASS):
        seen = draw(tuned)
    assert rows == [4, 4, 4]
    assert torch.allclose(seen, expected, atol=1e-5)


def test_the_kept_copy_of_a_unet_is_a_frozen_base(fresh: Fresh) -> None:
    tuned, base = fresh(), fresh()
    for name, p in tuned.unet.named_parameters():
        p.requires_grad_("attn" in name)
    frozen = FrozenUNet(tuned.unet)
    perturb(tuned.unet, only="attn")
    with sude_guidance(tuned.pipeline, base.unet, CLASS):
        expected = draw(tuned)
    with sude_guidance(tuned.pipeline, frozen, CLASS):
        seen = draw(tuned)
    assert torch.allclose(seen, expected, atol=1e-5)
    assert not torch.allclose(seen, draw(tuned), atol=1e-3)


def test_a_loaded_lora_is_its_own_base(fresh: Fresh, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    made, base, tuned = fresh(), fresh(), fresh()
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    made.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    perturb(made.unet, 0.3, "lora_")
    perturb(made.text_encoder, 0.3, "lora_")
    made.pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(made.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(made.text_encoder),
    )
    tuned.pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    for p in tuned.unet.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        words, null = base.encode_prompts([CLASS]), base.null_condition()
        assert not torch.allclose(tuned.encode_prompts([CLASS]).hidden, words.hidden, atol=1e-2)
    before = draw(tuned)
    with sude_guidance(tuned.pipeline, base.unet, words, null=null):
        expected = draw(tuned)
    with sude_guidance(tuned.pipeline, None, CLASS):
        seen = draw(tuned)
    assert torch.allclose(seen, expected, atol=1e-5)
    assert not torch.allclose(seen, before, atol=1e-3)
    assert torch.equal(draw(tuned), before), "the adapters were not switched on again"
    assert not any(p.requires_grad for p in tuned.unet.parameters())

    tuned.pipeline.fuse_lora()
    with (
        pytest.raises(UserError, match="unfuse_lora"),
        sude_guidance(tuned.pipeline, None, CLASS),
    ):
        pass


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused(strength: float, tiny: Backbone) -> None:
    with (
        pytest.raises(UserError, match="at least 0"),
        sude_guidance(tiny.pipeline, tiny.unet, CLASS, strength),
    ):
        pass


def test_without_a_lora_the_frozen_model_must_be_given(tiny: Backbone) -> None:
    with pytest.raises(UserError, match="no LoRA"), sude_guidance(tiny.pipeline, None, CLASS):
        pass
    with pytest.raises(UserError, match="no UNet"), sude_guidance(object(), tiny.unet, CLASS):
        pass


# --- the command line ----------------------------------------------------------------------------


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("train", ["attention", "lora"])
def test_generate_with_sude_guidance(
    train: str,
    fresh: Fresh,
    tiny_folder: Path,
    subject_picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["--max-train-steps", "2", "--learning-rate", "0.05", "--num-samples", "0"]
    where = ["--backbone", str(tiny_folder), "--category", "dog", "--train", train]
    where += ["--device", "cpu"]
    out = ["--out", str(tmp_path / "run")]
    assert main(["tune", str(subject_picture), *where, *few, *out]) == 0

    words = "photo of a running {S*} dog"
    drawn = ["generate", str(tmp_path / "run"), words, "--num-images", "2", "--device", "cpu"]
    for g in ("0", "3"):
        assert main([*drawn, "--sude-guidance", g, "--out", str(tmp_path / g)]) == 0
    assert not np.array_equal(pixels(tmp_path / "0"), pixels(tmp_path / "3"))

    run, base = Run.open(tmp_path / "run"), fresh()
    backbone = run.load("cpu")
    with sude_guidance(backbone.pipeline, base.unet, "photo of a running dog", 3.0):
        expected = generate(backbone, run.prompt(words), num_images=2)
    for a, b in zip(pixels(tmp_path / "3"), expected, strict=True):
        assert np.abs(a.astype(int) - np.asarray(b).astype(int)).max() <= 1

    capsys.readouterr()
    assert main([*drawn, "--sude-guidance", "-1", "--out", str(tmp_path / "no")]) == 2
    assert "at least 0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
