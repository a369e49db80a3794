"""How often a step makes the CPU wait for the device: counted on a device that is none.

Its tensors say that they lie on `meta`, and hold their values all the same: the whole step runs,
and each value that the CPU asks for is counted, with the line that asks.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import build
from PIL import Image, ImageOps
from real_configs import REAL, shrink
from real_configs import build as build_unet
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sude_lab import SudeRegularizer
from sude_lab.adapters.family import FlowBackbone
from sude_lab.backbone import Backbone, send
from sude_lab.config import TuningConfig
from sude_lab.io.opening import open_backbone
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.tuning import Tuning

FAR = torch.device("meta")
WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal"),
    *("_unique2", "unique_dim", "repeat_interleave", "bincount"),
)


class Far(Tensor):
    """A tensor that says it lies on another device."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "Far":
        far: Far = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=FAR
        )
        far.value = value.detach()
        return far

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], list):  # lost on the way to `meta`
            args = (args[0], torch.tensor(args[1]))
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called outside of Device().")


class Device(TorchDispatchMode):
    """The device; `waits` are the lines that made the CPU wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        far = {id(x.value): x for x in tree_leaves((args, kwargs)) if isinstance(x, Far)}
        args, kwargs = tree_map_only(Far, lambda x: x.value, (args, kwargs))
        to = kwargs.get("device")
        if to is not None and torch.device(to) == FAR:
            kwargs["device"] = torch.device("cpu")
            far |= {0: None}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        fetched = any(far) and (name in WAITING or (to is not None and 0 not in far))
        # A copy to the device waits for all that it was told before; only `send` does not.
        stack = traceback.extract_stack()
        sent = name == "_to_copy" and 0 in far and not any(far)
        sent = sent and not any(f.name == send.__name__ for f in stack)
        masks = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool and id(x) in far
            for x in tree_leaves(args[1])
        )
        if fetched or sent or masks:
            line = next((f for f in reversed(stack) if "/sude_lab/" in f.filename), stack[0])
            self.waits.append(f"{name} {Path(line.filename).name}: {line.line}")
        if not far or fetched:
            return result
        # What is changed in place stays the tensor that it was.
        return tree_map_only(Tensor, lambda x: far[id(x)] if id(x) in far else Far(x), result)


def far_away(backbone: Backbone) -> Backbone:
    """Return the backbone with its weights on the device."""
    flow = isinstance(backbone, FlowBackbone)
    encoders = {} if flow else backbone.text_encoders
    for encoder, tokenizer in zip(encoders.values(), backbone.tokenizers, strict=not flow):
        # Room for the run's words: transformers would make the table anew, and forget the values.
        encoder.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
        encoder.resize_token_embeddings = lambda *args, **kwargs: None
    for part in (backbone.denoiser, backbone.pipeline.vae, *encoders.values()):
        for module in part.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(Far(p.detach()), p.requires_grad)
            for name, b in module._buffers.items():
                module._buffers[name] = Far(b)
    return replace(backbone, device=FAR)


def test_the_device_counts_what_waits() -> None:
    with Device() as device:
        x = torch.tensor([1.0, 2.0]).to(FAR)
        y = send(torch.ones(2), FAR)
        x.mul_(2).add_(y - 1)
        assert len(device.waits) == 1 and x.device == FAR
        assert bool((x > 1).all()) and x.cpu().tolist() == [2.0, 4.0]
        assert (x[x > 3] * x[x[:1].long() - 1]).tolist() == [16.0]
    names = ["_to_copy", "_local_scalar_dense", "_to_copy", "index", "_to_copy"]
    assert [line.split()[0] for line in device.waits] == names


def test_nobody_waits_for_a_card_to_take_a_tensor() -> None:
    """`Device` lets `send` pass, so this must hold."""
    x, calls = torch.zeros(1), []

    class Seen:
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return x

    for kind in ("cuda", "cpu"):
        assert send(Seen(), torch.device(kind)) is x  # type: ignore[arg-type]
    assert [kwargs for _, kwargs in calls] == [{"non_blocking": True}, {"non_blocking": False}]


def to_far(x: Tensor) -> Tensor:
    return x.to(FAR) if x.is_floating_point() else x


def check_waits(
    settings: dict[str, Any], fresh: Callable[[], Backbone], subject_picture: Path
) -> None:
    # Adam as torch writes it for any device: the fused one is made for those that exist.
    usual: dict[str, Any] = {"optimizer": "adamw", "train_batch_size": 3}
    config = TuningConfig(subject_picture, "dog", **usual | settings)
    picture, backbone = Image.open(subject_picture).convert("RGB"), fresh()
    pictures = [picture, ImageOps.invert(picture)][: 1 + len(config.more_subjects)]
    here = prepared_tuning(config, fresh(), pictures)
    with Device() as device:
        backbone = far_away(backbone)
        if isinstance(backbone, FlowBackbone):  # the text of its runs is encoded once, before
            encode = here.backbone.encode_prompts
            backbone.encode_prompts = lambda *args: encode(*args).map(to_far)  # type: ignore[method-assign]
        there = Tuning(config, backbone, pictures, draws=here.draws)
        next(here), next(there)  # the first step asks for the end of the schedule's table, too
        device.waits.clear()
        step = next(there)
    assert len(device.waits) == 1, device.waits
    expected = next(here)
    assert_close(step.loss_sude, expected.loss_sude, rtol=1e-4, atol=1e-6)
    assert step.loss_own == pytest.approx(expected.loss_own, rel=1e-4)


TWO: dict[str, Any] = {"more_subjects": ("cat=<kit>=cat.png",)}
CLASS_IMAGES: dict[str, Any] = {"prior_loss_weight": 1.0, "num_class_images": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dreambooth"},
        {"method": "dreambooth", "weighting": "exact", "gradient_accumulation_steps": 2},
        {"method": "dreambooth", "prior": "current", "max_grad_norm": 1e-9},
        {"method": "dreambooth", "train": "lora", **CLASS_IMAGES, "prior_preservation": "teacher"},
        {"method": "dreambooth", "train_text_encoder": True, "prior": "current", **TWO},
        {"method": "custom_diffusion", **CLASS_IMAGES},
        {"method": "custom_diffusion", **CLASS_IMAGES, **TWO, "token_learning_rate": 1e-3},
        {"method": "textual_inversion"},
        {"method": "textual_inversion", "num_vectors": 3, **TWO},
        {"method": "vico"},
        {"method": "vico", **CLASS_IMAGES},
        {"method": "vico", **TWO, "prior": "current", "gradient_accumulation_steps": 2},
        {"method": "vico", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_waits_once(
    settings: dict[str, Any], fresh: Callable[[], Backbone], subject_picture: Path
) -> None:
    check_waits(settings, fresh, subject_picture)


def test_a_step_of_sdxl_waits_once(tmp_path: Path, subject_picture: Path) -> None:
    """Its words are trained, so that every step makes its sizes anew."""
    pipeline = build_unet(shrink(REAL["sdxl"])[0], tmp_path)
    opened = Backbone(pipeline, "sdxl", torch.device("cpu"))
    check_waits({"method": "textual_inversion"}, opened.copy, subject_picture)


@pytest.mark.parametrize("name", ["sd3", "klein", "z_image"])
@pytest.mark.parametrize("train", ["attention", "lora"])
def test_a_step_of_flow_waits_once(
    name: str, train: str, tmp_path: Path, subject_picture: Path
) -> None:
    build(name, tmp_path / name)
    opened = open_backbone(tmp_path / name, device="cpu")
    check_waits({"method": "dreambooth", "train": train}, opened.copy, subject_picture)


def test_the_plug_never_waits(tiny: Backbone) -> None:
    scheduler = tiny.pipeline.scheduler
    with Device() as device:
        backbone = far_away(tiny)
        null, dog = backbone.encode_prompts(["", "photo of a dog"]).hidden.detach().split(1)
        sude = SudeRegularizer(backbone.unet, scheduler, dog, null)
        x, t = torch.randn(2, 4, 8, 8).to(FAR), torch.tensor([3, 700]).to(FAR)
        for _ in range(2):  # the first call sends the table
            device.waits.clear()
            sude(x, t, x.clone().requires_grad_()).mean().backward()
    assert device.waits == []
