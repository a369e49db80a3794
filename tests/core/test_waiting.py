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
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sude_lab import SudeRegularizer
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.methods import configure
from sude_lab.runs.prepare import prepare
from sude_lab.tuning import Tuning

FAR = torch.device("meta")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


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
        if any(far) and (name in WAITING or (to is not None and 0 not in far)):
            stack = traceback.extract_stack()
            line = next((f for f in reversed(stack) if "/sude_lab/" in f.filename), stack[0])
            self.waits.append(f"{name} {Path(line.filename).name}: {line.line}")
            return result
        if not far:
            return result
        # What is changed in place stays the tensor that it was.
        return tree_map_only(Tensor, lambda x: far[id(x)] if id(x) in far else Far(x), result)


def send(backbone: Backbone) -> Backbone:
    """Return the backbone with its weights on the device."""
    encoder = backbone.text_encoder
    # Room for the run's words: transformers would make the table anew, and forget the values.
    encoder.resize_token_embeddings(len(backbone.tokenizer) + 4, mean_resizing=False)
    encoder.resize_token_embeddings = lambda *args, **kwargs: None
    for part in (backbone.unet, encoder, backbone.pipeline.vae):
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
        x.mul_(2)
        assert device.waits == [] and x.device == FAR
        assert bool((x > 1).all()) and x.cpu().tolist() == [2.0, 4.0]
    assert [line.split()[0] for line in device.waits] == ["_local_scalar_dense", "_to_copy"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dreambooth"},
        {"method": "dreambooth", "weighting": "exact", "gradient_accumulation_steps": 2},
        {"method": "dreambooth", "prior": "current", "max_grad_norm": 1e-9},
        {"method": "custom_diffusion", "prior_loss_weight": 1.0, "num_class_images": 2},
        {"method": "textual_inversion"},
    ],
    ids=str,
)
def test_a_step_waits_once(
    settings: dict[str, Any], fresh: Callable[[], Backbone], subject_picture: Path
) -> None:
    # Adam as torch writes it for any device: the fused one is made for those that exist.
    config = TuningConfig(subject_picture, "dog", optimizer="adamw", **settings)
    picture, backbone = Image.open(subject_picture).convert("RGB"), fresh()
    draws = prepare(configure(config, backbone), backbone, picture)
    here = Tuning(config, fresh(), picture, draws=draws)
    with Device() as device:
        there = Tuning(config, send(backbone), picture, draws=draws)
        next(here), next(there)  # the first step asks for the end of the schedule's table, too
        device.waits.clear()
        step = next(there)
    assert len(device.waits) == 1, device.waits
    assert_close(step.loss_sude, next(here).loss_sude, rtol=1e-4, atol=1e-6)


def test_the_plug_never_waits(tiny: Backbone) -> None:
    scheduler = tiny.pipeline.scheduler
    with Device() as device:
        backbone = send(tiny)
        null, dog = backbone.encode_prompts(["", "photo of a dog"]).hidden.detach().split(1)
        sude = SudeRegularizer(backbone.unet, scheduler, dog, null)
        x, t = torch.randn(2, 4, 8, 8).to(FAR), torch.tensor([3, 700]).to(FAR)
        for _ in range(2):  # the first call sends the table
            device.waits.clear()
            sude(x, t, x.clone().requires_grad_()).mean().backward()
    assert device.waits == []
