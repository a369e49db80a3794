"""Runs in lockstep are the separate runs: step by step, but for float32 rounding."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import configure
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.sweep import lockstep
from sude_lab.sweep.lockstep import check_together, sharing_copy, tune_together
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]

# One vector that starts from the category's own word would have rho = 1 at the first step: a tie.
WORDS = {"method": "textual_inversion", "num_vectors": 2, "initializer": "candle"}
METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": WORDS,
    "lora": {"method": "dreambooth", "train": "lora", "lora_rank": 3},
    "lora and word": {"method": "dreambooth", "train": "lora", "token_learning_rate": 1e-2},
    "lora, current": {"method": "dreambooth", "train": "lora", "prior": "current"},
}


def uses_of_sude(
    settings: dict[str, Any], backbone: Backbone, picture: Image.Image
) -> tuple[dict[str, Any], ...]:
    """Five uses, two of them with gates amid the rhos that plain tuning has here."""
    watched = config(**settings, weight_sude=0.0, monitor_sude=True)
    rhos = torch.cat([step.rho for step in tune(watched, backbone, picture)]).sort().values
    amid = []
    for middle in (len(rhos) // 2, 3 * len(rhos) // 4):
        near = rhos[middle - 2 : middle + 2]  # in the widest gap, where rounding opens no gate
        amid.append(near[near.diff().argmax() :][:2].mean().item())
    return (
        {"weight_sude": 0.0},
        {"weight_sude": 2.0, "truncate_at": amid[0]},
        {"weight_sude": 4.0, "truncate": False},
        {"weight_sude": 2.0, "truncate_at": amid[1], "weighting": "simple"},
        {"weight_sude": 0.0, "monitor_sude": True},
    )


# Of numbers of the size of 1, after four steps. AdamW divides by the root of a mean square: where a
# gradient is nearly 0, rounding decides its direction, hence not 1e-7.
WEIGHTS, LOSSES = 1e-4, 1e-5


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    chosen: dict[str, Any] = {
        "image": Path("dog.png"),
        "category": "dog",
        "method": "textual_inversion",
        "max_train_steps": 4,
        "train_batch_size": 3,
        "learning_rate": 1e-3,
        "seed": 5,
    }
    return TuningConfig(**chosen | settings)


def seen(step: Step) -> tuple[Step, dict[str, Tensor]]:
    return step, step.method.state_dict()


Rows = list[tuple[Step, dict[str, Tensor]]]


Pictures = Image.Image | list[Image.Image]


def together(members: list[TuningConfig], backbone: Backbone, picture: Pictures) -> list[Rows]:
    """Every member's steps, with the weights after each."""
    rows: list[Rows] = [[] for _ in members]
    for steps in tune_together(members, backbone, picture):
        for row, step in zip(rows, steps, strict=True):
            assert isinstance(step, Step)
            row.append(seen(step))
    return rows


def assert_same(ours: Rows, theirs: Rows) -> None:
    assert [step.number for step, _ in ours] == [step.number for step, _ in theirs]
    for (mine, my_weights), (other, weights) in zip(ours, theirs, strict=True):
        assert torch.equal(mine.t, other.t)
        for name in ("loss_subject", "loss_sude", "tau", "rho"):
            a, b = getattr(mine, name), getattr(other, name)
            assert a.shape == b.shape and not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-3, atol=LOSSES, equal_nan=True, msg=name)
        assert torch.equal(mine.gate, other.gate)
        assert mine.learning_rate == other.learning_rate
        assert mine.row().keys() == other.row().keys()
        assert my_weights.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(my_weights[name], value, rtol=0, atol=WEIGHTS, msg=name)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_every_member_takes_the_steps_of_its_separate_run(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    # A clipped gradient, a warm-up and several batches a step: each member has its own norm.
    how = {"max_grad_norm": 0.02, "lr_warmup_steps": 3, "gradient_accumulation_steps": 2}
    uses = uses_of_sude(settings | how, fresh(), picture)
    members = [config(**settings, **how, **own) for own in uses]
    rows = together(members, fresh(), picture)
    for member, ours in zip(members, rows, strict=True):
        assert_same(ours, [seen(step) for step in tune(member, fresh(), picture)])
    # The comparison could tell them apart: SuDe moved weights, and gates differ between members.
    plain, gated, untruncated, simple, watched = (ours[-1] for ours in rows)
    for other in (gated, untruncated, simple):
        assert max((other[1][k] - v).abs().max() for k, v in plain[1].items()) > 10 * WEIGHTS
    for name, value in plain[1].items():
        assert torch.equal(watched[1][name], value)
    gates = [torch.cat([step.gate for step, _ in ours]) for ours in rows]
    assert gates[1].any() and not gates[1].all() and not torch.equal(gates[1], gates[3])
    assert torch.isfinite(watched[0].rho).all() and torch.isnan(plain[0].rho).all()


def test_it_works_with_gradient_checkpointing_and_a_mirrored_picture(
    fresh: Fresh, picture: Image.Image
) -> None:
    how = METHODS["lora"] | {"gradient_checkpointing": True, "horizontal_flip": True}
    members = [config(**how, weight_sude=w, max_train_steps=2) for w in (0.0, 2.0)]
    for member, ours in zip(members, together(members, fresh(), picture), strict=True):
        assert_same(ours, [seen(step) for step in tune(member, fresh(), picture)])


BANKS: dict[str, dict[str, Any]] = {
    "half": METHODS["lora"] | {"prior_bank": 6},
    "whole": METHODS["textual_inversion"] | {"prior_bank": 6, "prior_bank_dtype": "float32"},
    "live": METHODS["lora and word"] | {"prior_bank": 6, "prior_bank_dtype": "live"},
    "moving": METHODS["textual_inversion"] | {"prior_bank": 6, "prior": "current"},
}


@pytest.mark.parametrize("settings", BANKS.values(), ids=BANKS)
def test_they_take_their_samples_and_the_prior_from_a_bank(
    settings: dict[str, Any],
    fresh: Fresh,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path))
    how = settings | {"gradient_accumulation_steps": 2}
    members = [config(**how, **own) for own in uses_of_sude(how, fresh(), picture)]
    rows = together(members, fresh(), picture)
    for member, ours in zip(members, rows, strict=True):
        assert_same(ours, [seen(step) for step in tune(member, fresh(), picture)])
    # The one without SuDe sees the samples of the others.
    assert all(torch.equal(a.t, b.t) for (a, _), (b, _) in zip(rows[0], rows[1], strict=True))


def test_several_subjects_are_one_run_each(fresh: Fresh, picture: Image.Image) -> None:
    both = [picture, picture.transpose(Image.Transpose.ROTATE_90)]
    more = config(
        more_subjects=("candle=<my-candle>=c.png",), initializer="sitting", max_train_steps=2
    )
    members = [replace(more, weight_sude=w) for w in (0.0, 2.0)]
    for member, ours in zip(members, together(members, fresh(), both), strict=True):
        assert_same(ours, [seen(step) for step in tune(member, fresh(), both)])


@pytest.mark.parametrize("pairs", [0, 6])
def test_the_frozen_model_is_asked_once_and_the_first_layers_run_once(
    pairs: int, fresh: Fresh, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path))
    calls: list[tuple[int, bool]] = []
    first: list[int] = []
    original = lockstep._JointModel.predict

    def predict(self: Any, condition: Any, members: list[int]) -> Tensor:
        calls.append((len(condition), torch.is_grad_enabled()))
        if not first:
            convolution = self.backbone.unet.conv_in
            forward = convolution.forward._forward

            def counted(x: Tensor) -> Tensor:
                first.append(len(x))
                return forward(x)

            convolution.forward._forward = counted
        return original(self, condition, members)

    monkeypatch.setattr(lockstep._JointModel, "predict", predict)
    usual = config(prior_bank=pairs, max_train_steps=2)
    members = [replace(usual, weight_sude=w) for w in (0.0, 0.5, 1.0, 2.0, 4.0)]
    together(members, fresh(), picture)
    asked = [] if pairs else [(2 * 3, False)]  # a bank has been asked before
    assert calls == [*asked, (5 * 3, True)] * 2
    assert first == [3, 3]


# --- what a member leaves ------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [METHODS["lora and word"], METHODS["textual_inversion"]])
def test_a_member_is_saved_and_drawn_with_as_a_separate_run(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    backbone = fresh()
    before = copy.deepcopy(backbone.unet.state_dict())
    words = backbone.text_encoder.get_input_embeddings().weight.clone()
    members = [config(**settings, weight_sude=w) for w in (0.0, 3.0)]
    (*_, last) = tune_together(members, backbone, picture)
    # What was given stays as it was.
    assert backbone.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in backbone.unet.state_dict().items())
    assert torch.equal(backbone.text_encoder.get_input_embeddings().weight, words)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn((1, 4, 8, 8), generator=generator), torch.tensor([500])
    for number, (member, step) in enumerate(zip(members, last, strict=True)):
        assert isinstance(step, Step)
        folder = tmp_path / str(number)
        save_weights(step.method, folder)
        (*_, alone) = tune(member, fresh(), picture)
        loaded = fresh()
        load_weights(step.method.name, loaded, folder)
        answers = []
        for model in (step.method.backbone, loaded, alone.method.backbone):
            with torch.no_grad():
                condition = model.encode_prompts(["photo of a <sks> dog"])
                answers.append(model.predict(x, t, condition))
        torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-3)


def test_a_copy_shares_what_is_frozen_and_has_its_own_words(tiny: Backbone) -> None:
    copied = sharing_copy(tiny)
    assert copied.unet is not tiny.unet
    for a, b in zip(copied.unet.parameters(), tiny.unet.parameters(), strict=True):
        assert a is b
    mine, theirs = (x.text_encoder.get_input_embeddings().weight for x in (copied, tiny))
    assert mine.data_ptr() != theirs.data_ptr() and torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [METHODS["lora"], METHODS["textual_inversion"]])
def test_a_checkpoint_continues_here_and_there(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    members = [config(**settings, weight_sude=w) for w in (0.0, 2.0)]
    whole = together(members, fresh(), picture)
    run = tune_together(members, fresh(), picture)
    next(run)
    half = [step.state_dict() for step in next(run) if isinstance(step, Step)]
    again: list[Rows] = [[], []]
    for steps in tune_together(members, fresh(), picture, states=half):
        for row, step in zip(again, steps, strict=True):
            assert isinstance(step, Step)
            row.append(seen(step))
    for ours, theirs in zip(again, whole, strict=True):
        assert_same(ours, theirs[2:])
    alone = [seen(s) for s in tune(members[1], fresh(), picture, state=half[1])]
    assert_same(alone, whole[1][2:])
    with pytest.raises(UserError, match="one checkpoint for each"):
        next(tune_together(members, fresh(), picture, states=half[:1]))
    with pytest.raises(UserError, match="one checkpoint for each"):
        states = [half[0], half[1] | {"step": 3}]
        next(tune_together(members, fresh(), picture, states=states))


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("settings", [METHODS["lora"], METHODS["textual_inversion"]])
def test_a_member_that_goes_nan_stops_alone(
    settings: dict[str, Any],
    where: str,
    fresh: Fresh,
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = [config(**settings, weight_sude=w) for w in (0.0, 1.0, 2.0)]
    apart = [[seen(step) for step in tune(m, fresh(), picture)] for m in members]
    total, clip, calls = lockstep.total_loss, lockstep._Stack.clip, 0

    def spoilt_loss(subject: Tensor, gated: Tensor, none: Tensor, w_s: float, w_r: float) -> Tensor:
        nonlocal calls
        calls += w_s == 1.0
        found = total(subject, gated, none, w_s, w_r)
        return found * torch.nan if w_s == 1.0 and calls == 3 else found

    def spoilt_gradient(self: Any, max_norm: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            for p in self.parameters.values():
                p.grad[1] = torch.nan
        return clip(self, max_norm)

    if where == "loss":
        monkeypatch.setattr(lockstep, "total_loss", spoilt_loss)
    else:
        monkeypatch.setattr(lockstep._Stack, "clip", spoilt_gradient)
    rows: list[Rows] = [[], [], []]
    failed = []
    methods = {}
    for steps in tune_together(members, fresh(), picture):
        for row, step in zip(rows, steps, strict=True):
            if isinstance(step, Step):
                row.append(seen(step))
        if isinstance(steps[1], Step):
            methods[1] = steps[1].method
        failed.append([isinstance(step, UserError) for step in steps])
    assert failed == [[False] * 3] * 2 + [[False, True, False]] * 2
    assert isinstance(steps[1], UserError)
    assert f"The {where} became nan at step 3" in str(steps[1])
    assert "lower --learning-rate" in str(steps[1])
    assert_same(rows[0], apart[0])
    assert_same(rows[2], apart[2])
    assert_same(rows[1], apart[1][:2])
    # Its weights are those of its last finished step, whatever the others did since.
    left = methods[1].state_dict()
    assert all(torch.equal(left[name], value) for name, value in rows[1][-1][1].items())


def test_where_all_go_nan_the_error_is_raised(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: Any, max_norm: float) -> Tensor:
        return torch.full((len(self.members),), torch.nan)

    monkeypatch.setattr(lockstep._Stack, "clip", spoilt)
    members = [config(weight_sude=w) for w in (0.0, 1.0)]
    with pytest.raises(UserError, match="The gradient became nan at step 1"):
        next(tune_together(members, fresh(), picture))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "custom_diffusion"}, "works for textual_inversion, and for dreambooth"),
        ({"method": "vico"}, "does not work for vico"),
        ({"method": "dreambooth", "train": "unet"}, "--train lora"),
        (METHODS["lora"] | {"train_text_encoder": True}, "without --train-text-encoder"),
        ({"prior_loss_weight": 1.0}, "--prior-loss-weight above 0"),
        ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit"),
        ({"token_learning_rate": 0.0}, "Nothing would be trained"),
    ],
)
def test_what_does_not_work_in_lockstep_says_what_does(
    settings: dict[str, Any], told: str, fresh: Fresh, picture: Image.Image
) -> None:
    members = [config(**settings, weight_sude=w) for w in (0.0, 1.0)]
    with pytest.raises(UserError, match=told):
        next(tune_together(members, fresh(), picture))


def test_members_differ_in_their_use_of_sude_alone(tiny: Backbone) -> None:
    one = configure(config(), tiny)
    for name, value in {"seed": 6, "learning_rate": 1e-2, "prior": "current"}.items():
        with pytest.raises(UserError, match=f"differ in {name}"):
            check_together([one, replace(one, **{name: value})])
    check_together([one, replace(one, weight_sude=3.0, truncate=False, weighting="simple")])
    with pytest.raises(UserError, match="differ in prior_bank_dtype"):
        check_together([one, replace(one, prior_bank_dtype="float32")])
    nobody = replace(one, weight_sude=0.0, prior="current", prior_bank_dtype="float32")
    check_together([one, nobody])
    with pytest.raises(UserError, match="nothing to tune together"):
        check_together([])
