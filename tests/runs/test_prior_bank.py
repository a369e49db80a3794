"""A bank says what the live model would, to the bit where it is kept whole; runs share it."""

import math
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.diffusion import add_noise
from sude_lab.errors import UserError
from sude_lab.methods import METHODS, configure
from sude_lab.runs import prior_bank
from sude_lab.runs.folder import run_tuning
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.runs.prior_bank import Pairs, PriorBank, open_bank
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]
TENSORS = ("t", "loss_subject", "loss_sude", "tau", "gate", "rho")
KEEPING = [name for name, method in METHODS.items() if method.keeps_prior]
CHANGING = [name for name, method in METHODS.items() if not method.keeps_prior]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SUDE_LAB_CACHE", str(folder))
    return folder


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The categories of the banks that were built, one after another."""
    categories: list[str] = []
    build = prior_bank._build

    def watch(config: Any, backbone: Any, category: str, pairs: Any) -> dict[str, Tensor]:
        categories.append(category)
        return build(config, backbone, category, pairs)

    monkeypatch.setattr(prior_bank, "_build", watch)
    return categories


def config(**settings: Any) -> TuningConfig:
    chosen = {"image": Path("dog.png"), "category": "dog", "max_train_steps": 3, "seed": 5}
    chosen |= {"prior_bank": 6, "train_batch_size": 1, "prior_loss_weight": 0.0}
    # Without truncation the prior counts in every step, whatever this random model says.
    return TuningConfig(**chosen | {"truncate": False} | settings)


def run(settings: TuningConfig, backbone: Backbone, *pictures: Image.Image) -> list[Step]:
    return list(tune(settings, backbone, list(pictures)))


def trained(steps: list[Step]) -> dict[str, Tensor]:
    return steps[-1].state_dict()["trained"]


def assert_same(one: list[Step], other: list[Step]) -> None:
    """Bit for bit: what every step computed, and the weights at the end."""
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
        assert (a.loss_regularizer, a.loss_own) == (b.loss_regularizer, b.loss_own)
    ends = (trained(one), trained(other))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def bank_of(settings: TuningConfig, backbone: Backbone, picture: Image.Image) -> PriorBank:
    settings = configure(settings, backbone)
    pictures = [picture, ImageOps.mirror(picture)] if settings.horizontal_flip else [picture]
    latents = backbone.encode_pictures(pictures)
    return open_bank(settings, backbone, settings.category, picture, latents)


# --- what it says --------------------------------------------------------------------------------


CASES: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"train": "lora"},
    {"train": "unet", "train_text_encoder": True, "horizontal_flip": True},
    {"prior_loss_weight": 1.0, "num_class_images": 2, "prior_preservation": "teacher"},
    {"gradient_accumulation_steps": 3},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_bank_in_float32_is_the_live_model_to_the_bit(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    """Batches of one: a prediction's last bits hang on the batch that it is made in."""
    live = run(config(prior_bank_dtype="live", **settings), fresh(), picture)
    kept = run(config(prior_bank_dtype="float32", **settings), fresh(), picture)
    assert_same(kept, live)
    assert all(torch.isfinite(step.loss_sude).all() for step in live)
    afresh = run(config(prior_bank=0, **settings), fresh(), picture)
    assert not torch.equal(afresh[0].loss_sude, live[0].loss_sude)  # other pairs


def test_in_larger_batches_it_is_the_live_model_to_rounding(
    fresh: Fresh, picture: Image.Image
) -> None:
    settings = config(train_batch_size=5, gradient_accumulation_steps=2, max_train_steps=1)
    (live,) = run(replace(settings, prior_bank_dtype="live"), fresh(), picture)
    (kept,) = run(replace(settings, prior_bank_dtype="float32"), fresh(), picture)
    assert torch.equal(kept.t, live.t) and torch.equal(kept.loss_subject, live.loss_subject)
    scale = live.loss_sude.abs().max().item()
    torch.testing.assert_close(kept.loss_sude, live.loss_sude, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(kept.tau, live.tau, rtol=1e-4, atol=1e-5 * scale)


def test_what_is_kept_is_what_the_model_says_of_the_pairs(
    fresh: Fresh, picture: Image.Image
) -> None:
    """Against predictions made one by one, without any code of the bank's but the pairs."""
    backbone = fresh()
    bank = bank_of(config(), backbone, picture)
    kept = bank.outputs(torch.arange(6))
    assert kept is not None and kept.shape == (6, 2, 4, 8, 8) and kept.dtype == torch.float32
    with torch.no_grad():
        for k in range(6):
            x_0, eps, t = bank.pairs.pair(k)
            times = torch.tensor([t])
            x_t = add_noise(x_0[None], eps[None], times, backbone.schedule)
            null, dog = (
                backbone.predict(x_t, times, backbone.encode_prompts([prompt]))[0].double()
                for prompt in ("", "photo of a dog")
            )
            uncond, category = kept[k].double()
            half = 2.0**-11  # half precision rounds to a part of 2048
            assert (uncond - null).abs().max() <= 1.01 * half * null.abs().max()
            direction, expected = category - uncond, dog - null
            assert (direction - expected).norm() <= half * expected.norm()
            # Two rounded predictions would have lost digits of their difference.
            rounded = dog.half().double() - null.half().double()
            assert (rounded - expected).norm() > 2 * (direction - expected).norm()


def test_half_precision_changes_sude_by_a_thousandth(fresh: Fresh, picture: Image.Image) -> None:
    settings = config(train_batch_size=6, max_train_steps=1)
    (half,) = run(settings, fresh(), picture)
    (whole,) = run(replace(settings, prior_bank_dtype="float32"), fresh(), picture)
    assert not torch.equal(half.loss_sude, whole.loss_sude)
    torch.testing.assert_close(half.tau, whole.tau, rtol=1e-3, atol=0.0)
    assert (half.rho - whole.rho).abs().max() < 0.02


# --- the pairs -----------------------------------------------------------------------------------


def test_timesteps_are_spread_and_the_same_on_average() -> None:
    zeros = torch.zeros(1, 2, 3, 3)
    for seed in range(3):
        times = [Pairs(zeros, zeros, 50, 1000, seed).pair(k)[2] for k in range(50)]
        assert [t // 20 for t in times] == list(range(50))
    # Of one pair over many seeds: evenly over its part, both ends included.
    steps = [Pairs(zeros, zeros, 4, 10, seed).pair(1)[2] for seed in range(400)]  # 2.5 to 5
    share = [steps.count(t) / 400 for t in (2, 3, 4)]
    assert sum(share) == 1 and share == pytest.approx([0.2, 0.4, 0.4], abs=0.08)
    more = [Pairs(zeros, zeros, 40, 10, 0).pair(k)[2] for k in range(40)]  # more pairs than times
    assert sorted(more) == [t for t in range(10) for _ in range(4)]


def test_a_pair_is_a_draw_of_the_latent_and_of_noise() -> None:
    mean = torch.stack([torch.full((2, 8, 8), 3.0), torch.full((2, 8, 8), -3.0)])
    pairs = Pairs(mean, torch.full_like(mean, 0.1), 100, 1000, 7)
    before = torch.random.get_rng_state()
    x_0, eps, t = pairs.batch(torch.arange(100))
    assert torch.equal(before, torch.random.get_rng_state())
    assert x_0.shape == eps.shape == (100, 2, 8, 8) and t.dtype == torch.long
    mirrored = x_0.mean((1, 2, 3)) < 0
    assert 30 <= int(mirrored.sum()) <= 70
    noise = (x_0.abs() - 3.0) / 0.1 * x_0.sign()
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert eps.mean().item() == pytest.approx(0.0, abs=0.03)
    assert eps.std().item() == pytest.approx(1.0, abs=0.03)
    both = torch.stack([noise.flatten(), eps.flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.03
    again = pairs.batch(torch.tensor([99, 3]))
    assert torch.equal(again[1], eps[[99, 3]])
    other = replace(pairs, seed=8).batch(torch.arange(100))
    assert not torch.isclose(other[1], eps).flatten(1).all(1).any()


# --- what it saves -------------------------------------------------------------------------------


def calls_of_a_step(
    settings: TuningConfig, backbone: Backbone, picture: Image.Image
) -> list[tuple[int, bool]]:
    """Rows and autograd of every call of the UNet in the second step."""
    calls: list[tuple[int, bool]] = []

    def watch(unet: Any, args: tuple[Any, ...]) -> None:
        calls.append((len(args[0]), torch.is_grad_enabled()))

    backbone.unet.register_forward_pre_hook(watch)
    steps = tune(settings, backbone, picture)
    next(steps)
    calls.clear()
    next(steps)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_sude_is_one_more_call_of_the_unet_and_none_with_a_bank(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    size = 3

    def calls(**settings: Any) -> list[tuple[int, bool]]:
        chosen = config(method=method, train_batch_size=size, **settings)
        return calls_of_a_step(chosen, fresh(), picture)

    subject, both = (size, True), (2 * size, False)
    assert calls(weight_sude=0.0) == [subject]
    assert calls(prior="current", prior_bank=0) == [subject, both]
    assert calls(prior="pretrained", prior_bank=0) == [subject, both]
    assert calls(prior="pretrained") == [subject]
    assert calls(prior="pretrained", prior_bank_dtype="live") == [subject, both]


def test_a_model_in_channels_last_is_kept_as_any_other(fresh: Fresh, picture: Image.Image) -> None:
    for dtype in ("float16", "float32"):
        backbone = fresh()
        backbone.unet.to(memory_format=torch.channels_last)
        bank = bank_of(config(prior_bank_dtype=dtype, seed=7), backbone, picture)
        index = torch.arange(len(bank))
        live = prior_bank.ask_pairs(
            backbone,
            bank.pairs,
            index,
            backbone.null_condition(),
            backbone.encode_prompts(["photo of a dog"]),
        )
        outputs = bank.outputs(index)
        torch.testing.assert_close(outputs, torch.stack(live, dim=1), rtol=1e-2, atol=1e-2)


def test_with_a_bank_no_copy_of_the_model_is_kept(fresh: Fresh, picture: Image.Image) -> None:
    for dtype, kept in (("float16", False), ("float32", False), ("live", True)):
        steps = run(config(prior_bank_dtype=dtype, max_train_steps=1), fresh(), picture)
        assert (steps[0].method.frozen is not None) == kept
    # eq. 14 as it is written asks the model before tuning of other pictures.
    settings = config(prior_loss_weight=1.0, num_class_images=1, prior_preservation="teacher")
    steps = run(replace(settings, max_train_steps=1), fresh(), picture)
    assert steps[0].method.frozen is not None


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_its_size_is_what_is_said(
    dtype: str,
    size: int,
    fresh: Fresh,
    picture: Image.Image,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bank = bank_of(config(prior_bank=50, prior_bank_dtype=dtype), fresh(), picture)
    numbers = 2 * 50 * 4 * 8 * 8
    assert bank.num_bytes == size * numbers
    assert sum(x.untyped_storage().nbytes() for x in bank.kept.values()) == bank.num_bytes
    assert bank.path is not None
    on_disk = bank.path.stat().st_size
    assert bank.num_bytes < on_disk < bank.num_bytes + 8192  # the latents, and what it follows from
    printed = capsys.readouterr().err
    assert f"50 pairs takes {on_disk / 2**20:.1f} MiB on the disk and in memory" in printed
    assert bank_of(config(prior_bank_dtype="live"), fresh(), picture).num_bytes == 0


# --- who shares it -------------------------------------------------------------------------------


def test_runs_on_one_picture_share_a_bank(
    fresh: Fresh, picture: Image.Image, built: list[str], cache: Path
) -> None:
    settings = config(max_train_steps=1)
    changes: list[dict[str, Any]] = [
        *({"method": method} for method in METHODS),
        *({"method": method, "prior": "current"} for method in KEEPING),
        {"weight_sude": 3.0, "learning_rate": 1e-4, "token": "<other>", "lora_rank": 2},
        {"weighting": "exact", "train_batch_size": 4, "max_train_steps": 2},
        {"prior_loss_weight": 1.0, "num_class_images": 2},
        {"image": Path("elsewhere/copy.png")},
    ]
    for change in changes:
        run(replace(settings, **change), fresh(), picture)
    assert built == ["dog"]
    assert len(list((cache / "prior_banks").glob("*.safetensors"))) == 1


def test_another_model_or_picture_or_question_has_another_bank(
    fresh: Fresh, picture: Image.Image, built: list[str]
) -> None:
    first = bank_of(config(), fresh(), picture)
    others: list[tuple[TuningConfig, Image.Image, Callable[[Backbone], object]]] = [
        (config(category="cat"), picture, id),
        (config(seed=6), picture, id),
        (config(prior_bank=7), picture, id),
        (config(prior_bank_dtype="float32"), picture, id),
        (config(horizontal_flip=True), picture, id),
        (config(resolution=24), picture, id),
        (config(), ImageOps.mirror(picture), id),
        (config(), picture, lambda b: setattr(b, "dtype", torch.bfloat16)),
        (config(), picture, lambda b: b.unet.conv_in.bias.data.add_(1e-3)),
        (config(), picture, lambda b: next(b.text_encoder.parameters()).data.add_(1e-3)),
        (config(), picture, lambda b: b.pipeline.vae.quant_conv.bias.data.add_(1e-3)),
        (config(), picture, lambda b: b.pipeline.scheduler.register_to_config(beta_end=0.02)),
        (config(), picture, lambda b: b.unet.register_to_config(attention_head_dim=8)),
        (config(), picture, lambda b: setattr(b.tokenizer, "model_max_length", 12)),
    ]
    paths = {first.path}
    for settings, shown, change in others:
        backbone = fresh()
        change(backbone)
        paths.add(bank_of(settings, backbone, shown).path)
    assert len(paths) == len(built) == len(others) + 1
    # And each of them finds its own again.
    bank_of(config(), fresh(), picture)
    assert len(built) == len(others) + 1


def test_subjects_have_a_bank_each_which_their_own_runs_share(
    fresh: Fresh, picture: Image.Image, built: list[str]
) -> None:
    other = ImageOps.invert(picture)
    several = config(
        more_subjects=("cat=<c>=cat.png",),
        train_batch_size=8,
        token_learning_rate=1e-3,
        prior_bank_dtype="live",
    )
    live = run(several, fresh(), picture, other)
    kept = run(replace(several, prior_bank_dtype="float32"), fresh(), picture, other)
    assert built == ["dog", "cat"]
    # Banks exchanged, or rows of the one subject for the other, would be far off.
    scale = live[0].loss_sude.abs().max().item()
    for a, b in zip(kept, live, strict=True):
        torch.testing.assert_close(a.loss_sude, b.loss_sude, rtol=1e-3, atol=1e-4 * scale)
    alone = config(category="cat", prior_bank_dtype="float32", max_train_steps=1)
    run(alone, fresh(), other)
    assert built == ["dog", "cat"]


def test_who_comes_second_waits_for_the_first(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, built = threading.Event(), threading.Event(), []
    build = prior_bank._build

    def slow(*args: Any) -> dict[str, Tensor]:
        built.append(args)
        begun.set()
        assert go.wait(60)
        return build(*args)

    monkeypatch.setattr(prior_bank, "_build", slow)
    banks: list[PriorBank] = []
    backbones = [fresh(), fresh()]
    threads = [
        threading.Thread(target=lambda b=b: banks.append(bank_of(config(), b, picture)))
        for b in backbones
    ]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and not banks
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(built) == 1 and len(banks) == 2 and banks[0].path == banks[1].path


# --- files that are not as they were -------------------------------------------------------------


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path, other: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def exchanged(path: Path, other: Path) -> None:
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, exchanged])
def test_a_damaged_bank_is_told_and_built_anew(
    damage: Callable[[Path, Path], None],
    fresh: Fresh,
    picture: Image.Image,
    built: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = bank_of(config(seed=6), fresh(), picture).path
    path = bank_of(config(), fresh(), picture).path
    assert path is not None and other is not None
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}  # no views of it
    capsys.readouterr()
    damage(path, other)
    assert bank_of(config(), fresh(), picture).path == path
    assert built == ["dog"] * 3
    assert f"The prior bank {path} is damaged: it is built anew." in capsys.readouterr().err
    after = load_file(path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_cache_that_cannot_be_written_is_one_sentence(
    fresh: Fresh, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be"):
        run(config(), fresh(), picture)


# --- a run's life --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(
    lost: bool, fresh: Fresh, picture: Image.Image, cache: Path, built: list[str]
) -> None:
    """Also where the bank was deleted in between, and is built a second time."""
    settings = config(train_batch_size=2, max_train_steps=4)
    unbroken = run(settings, fresh(), picture)
    state = next(tune(settings, fresh(), picture)).state_dict()
    if lost:
        shutil.rmtree(cache)
    rest = list(tune(settings, fresh(), picture, state=state))
    assert_same(rest, unbroken[1:])
    assert len(built) == 1 + lost


def test_a_run_is_resumed_with_its_own_bank_only(
    fresh: Fresh, subject_picture: Path, tmp_path: Path
) -> None:
    settings = config(image=subject_picture, backbone=fresh().source)
    quick: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}

    class Stop(Exception):
        pass

    def stop(step: Step) -> None:
        if step.number == 2:
            raise Stop

    with pytest.raises(Stop):
        run_tuning(
            settings,
            tmp_path / "run",
            backbone=fresh(),
            checkpoint_every=1,
            on_step=stop,
            **quick,
        )
    with pytest.raises(UserError, match="started with --prior-bank 6, not 5"):
        run_tuning(
            replace(settings, prior_bank=5),
            tmp_path / "run",
            resume=True,
            backbone=fresh(),
            **quick,
        )
    run_tuning(settings, tmp_path / "run", resume=True, backbone=fresh(), **quick)
    run_tuning(settings, tmp_path / "whole", backbone=fresh(), **quick)
    files = [tmp_path / name / "metrics.csv" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    files = [tmp_path / name / "weights" / "unet.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- the priors ----------------------------------------------------------------------------------


def test_the_methods_that_keep_the_prior_are_those_that_change_only_the_subject() -> None:
    assert sorted(KEEPING) == ["textual_inversion", "vico"]


@pytest.mark.parametrize("method", METHODS)
def test_the_two_priors_coincide_where_a_method_says_so(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    """After tuning, the model as it is says of the category and of "" what it said before.

    Textual Inversion trains the vector of one new word, which stands in neither prompt; ViCo's
    blocks are asked by prompts with that word alone.
    """
    backbone = fresh()
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    t = t.expand(2)
    conditions = ["", "photo of a dog"]
    with torch.no_grad():
        before = backbone.predict(x_t, t, backbone.encode_prompts(conditions))
    settings = config(method=method, prior_bank=0, learning_rate=1e-2, token_learning_rate=1e-1)
    steps = run(settings, backbone, picture)
    start = run(replace(settings, max_train_steps=1), fresh(), picture)
    with torch.no_grad():
        after = steps[-1].method.predict_current(x_t, t, backbone.encode_prompts(conditions))
    moved = [n for n, v in trained(steps).items() if not torch.equal(v, trained(start)[n])]
    assert moved  # something was learned
    assert torch.equal(after, before) == (method in KEEPING)


@pytest.mark.parametrize("method", KEEPING)
def test_there_the_bank_is_right_for_both_priors(
    method: str, fresh: Fresh, picture: Image.Image, built: list[str]
) -> None:
    settings = config(method=method, prior_bank_dtype="float32", token_learning_rate=1e-1)
    now = run(replace(settings, prior="current", prior_bank_dtype="live"), fresh(), picture)
    for prior in ("current", "pretrained"):
        assert_same(run(replace(settings, prior=prior), fresh(), picture), now)
    assert built == ["dog"]


@pytest.mark.parametrize("method", CHANGING)
def test_where_the_prior_moves_a_bank_is_refused_before_anything_is_written(
    method: str, fresh: Fresh, subject_picture: Path, tmp_path: Path, cache: Path
) -> None:
    settings = config(image=subject_picture, method=method, prior="current")
    settings = replace(settings, backbone=fresh().source)
    with pytest.raises(UserError, match="use --prior pretrained, or leave --prior-bank out"):
        run_tuning(settings, tmp_path / "run", backbone=fresh(), report_to="none")
    assert not (tmp_path / "run").exists() and not cache.exists()
    plain = replace(settings, weight_sude=0.0, max_train_steps=1)  # has no prior at all
    assert configure(plain, fresh()).prior == "current"


def test_a_number_of_pairs_below_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--prior-bank is -1: it must lie between 0"):
        config(prior_bank=-1)


def test_without_sude_the_pairs_are_the_same_and_nothing_is_kept(
    fresh: Fresh, picture: Image.Image, built: list[str], cache: Path
) -> None:
    """So that a sweep over w_s, its 0 too, tunes on the same samples."""
    plain = run(config(weight_sude=0.0), fresh(), picture)
    assert not built and not cache.exists()
    watched = run(config(weight_sude=0.0, monitor_sude=True), fresh(), picture)
    assert built == ["dog"] and all(math.isfinite(s.row()["rho"]) for s in watched)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a.t, b.t) and torch.equal(a.loss_subject, b.loss_subject)
    anew = run(config(weight_sude=0.0, prior_bank=0), fresh(), picture)
    assert not any(torch.equal(a.t, b.t) for a, b in zip(plain, anew, strict=True))


# --- in a grid -----------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    def of(**keys: Any) -> list[str]:
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump({"subjects": ["held-out 0"]} | keys), encoding="utf-8")
        return [job.key for job in make_plan(read_grid(file), tmp_path / "out").jobs]

    yield of


def test_the_number_of_pairs_is_part_of_a_run_and_their_place_is_not(
    keys: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = keys()
    with_bank = keys(settings={"prior_bank": [0, 8, 16]})
    assert with_bank[:1] == without and len(set(with_bank)) == 3
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path / "elsewhere"))
    assert keys(settings={"prior_bank": [0, 8, 16]}) == with_bank
    # Where there is no bank, or nobody who asks it, its precision says nothing.
    assert keys(settings={"prior_bank_dtype": ["float16", "live"]}) == without
    assert len(keys(w_s=0, settings={"prior_bank": [0, 8]})) == 2  # other samples
    dtypes = {"prior_bank": 8, "prior_bank_dtype": ["float16", "live"]}
    assert len(keys(w_s=0, settings=dtypes)) == 1
    with pytest.raises(UserError, match="leave --prior-bank out"):
        keys(prior="current", settings={"prior_bank": 8})
