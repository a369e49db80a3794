"""The model as it was before tuning, without a second one in memory: the pretrained prior."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from sude_lab.errors import UserError

CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start a LoRA (peft's `init_lora_weights`) that change the frozen weights beside it."""


def adapter_layers(module: nn.Module) -> list[Any]:
    """Return the layers that carry an adapter of peft (LoRA and its kin)."""
    return [m for m in module.modules() if hasattr(m, "adapter_layer_names")]


@contextmanager
def without_adapters(unet: nn.Module) -> Iterator[None]:
    """Switch the LoRA adapters (peft) of a UNet off for a moment, where it has any."""
    layers = [layer for layer in adapter_layers(unet) if not layer.disable_adapters]
    # peft stops the gradients of what it switches off, and lets them all flow when it is back on.
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, needed in flags:
            p.requires_grad_(needed)


class FrozenUNet:
    """A UNet as it is now, whatever is done to its weights later; called like the UNet.

    Only the tensors that require gradients now are copied. Adapters of peft leave the original
    weights in place: they are switched off for the call.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        _check_adapters(unet)
        adapters = _adapter_parameters(unet)
        self._names = {_plain(name) for name, _ in unet.named_parameters()}
        self._kept = {
            name: p.detach().clone()
            for name, p in unet.named_parameters()
            if p.requires_grad and id(p) not in adapters
        }

    @property
    def num_bytes(self) -> int:
        """How much memory the copy takes, in bytes."""
        return sum(p.numel() * p.element_size() for p in self._kept.values())

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the UNet returned before."""
        with without_adapters(self.unet):
            if self._kept:
                return functional_call(self.unet, self._kept, args, kwargs)
            return self.unet(*args, **kwargs)

    def check(self) -> None:
        """Check that all that has been trained, or was added since, is what was kept or is off."""
        _check_adapters(self.unet)
        adapters = _adapter_parameters(self.unet)
        here = dict(self.unet.named_parameters())
        for name, p in here.items():
            if id(p) in adapters:
                continue
            if name in self._kept:  # made before .to(device) or .to(dtype)
                self._kept[name] = self._kept[name].to(p)
            new = _plain(name) not in self._names
            if new or (p.requires_grad and name not in self._kept):
                raise UserError(
                    f"{name} {'was added' if new else 'is trained'} and was not kept: make this "
                    "after parts are frozen and opened, adapters added and accelerator.prepare "
                    "called, and before a checkpoint is loaded."
                )
        if lost := self._kept.keys() - here.keys():
            raise UserError(f"{min(lost)} was kept and is gone: make this after the last adapter.")


def require_silent(unet: nn.Module) -> None:
    """Check that no adapter of a UNet says anything yet: it is about to be left out."""
    for layer in adapter_layers(unet):
        for name in layer.active_adapters if not layer.disable_adapters else ():
            if _speaks(layer, name):
                speaks = f"The UNet carries the adapter {name!r}, which already changes its answers"
                cure = "make this before it is loaded, fuse it, or give a callable as the prior"
                raise UserError(f"{speaks} and would be left out: {cure}.")


def _speaks(layer: Any, name: str) -> bool:
    """Return whether an adapter changes what its layer answers."""
    if not any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names):
        return False
    if hasattr(layer, "get_delta_weight"):  # LoRA, LoHa, LoKr
        return bool(layer.get_delta_weight(name).any())
    return True  # IA3 and others: nothing tells


def _plain(name: str) -> str:
    """Return a parameter's name as it was before an adapter was put around its layer."""
    return name.replace(".base_layer.", ".")


def _adapter_parameters(unet: nn.Module) -> set[int]:
    """Return the ids of the parameters that belong to adapters."""
    parts = [getattr(m, n, None) for m in adapter_layers(unet) for n in m.adapter_layer_names]
    return {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


def _check_adapters(unet: nn.Module) -> None:
    for name, config in (getattr(unet, "peft_config", None) or {}).items():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(CHANGING):
            starts = f"The LoRA {name!r} starts by {start}, which changes the frozen weights"
            cure = "use init_lora_weights=True, or give a callable as the prior"
            raise UserError(f"{starts}: {cure}.")
    for name, module in unet.named_modules():
        owner = getattr(module.__dict__.get("forward"), "__self__", module)
        if name and owner is not module and isinstance(owner, nn.Module):
            other = f"{name} answers through a {type(owner).__name__} put in its place"
            raise UserError(f"{other}: give a callable as the prior that switches it off.")
