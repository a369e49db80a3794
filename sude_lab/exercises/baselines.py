"""Checks of the exercises to lesson 07; equations of arXiv 2403.06775 unless named."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sude_lab.exercises.judging import Answer, Call, Draw, Mistake, ask, check
from sude_lab.prompts import article

WORDS = (("dog", "running"), ("candle", "unlit"), ("cat", "open mouth"))


@check(
    lambda draw: [
        (structure, attribute, WORDS[draw.seed % 3][0])
        for structure in ("P1", "P2", "P3")
        for attribute in ("running", "open mouth")
    ],
)
def paper_prompt(structure: str, attribute: str, category: str) -> str:
    """Check paper_prompt(structure, attribute, category): P1-P3 of Table 2."""
    its = f"{article(attribute)} {attribute}"
    return {
        "P1": f"photo of {its} {{S*}} {category}",
        "P2": f"photo of {its} {{S*}} and it is {article(category)} {category}",
        "P3": f"photo of a {{S*}} and it is {its} {category}",
    }[structure]


def _words_call(draw: Draw) -> Call:
    category, own = WORDS[draw.seed % 3]
    return [own, "open", "golden"], ["on the beach", "in the snow", "with a ball"], category


@check(_words_call)
def combined(attributes: Sequence[str], backgrounds: Sequence[str], category: str) -> list[str]:
    """Check combined(attributes, backgrounds, category): each attribute on each background."""
    pairs = [(a, b) for a in attributes for b in backgrounds]
    return [f"photo of {article(a)} {a} {{S*}} {category} {b}" for a, b in pairs]


class TinyUNet(nn.Module):
    """A diffusers UNet's names, to choose from: `attn1` self-, `attn2` cross-attention (words)."""

    def __init__(self, width: int = 4, words: int = 6) -> None:
        super().__init__()

        def attention(reads: int) -> nn.ModuleDict:
            sides = {"to_q": (width, width), "to_k": (reads, width), "to_v": (reads, width)}
            layers = {name: nn.Linear(*side, bias=False) for name, side in sides.items()}
            out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
            return nn.ModuleDict(layers | {"to_out": out})

        def block() -> nn.ModuleDict:
            parts = {"attn1": attention(width), "attn2": attention(words)}
            return nn.ModuleDict(parts | {"ff": nn.Linear(width, width)})

        self.conv_in = nn.Conv2d(4, width, 3)
        self.down_blocks = nn.ModuleList([block()])
        self.up_blocks = nn.ModuleList([block()])


def _learning(answer: Answer, call: Call) -> Tensor:
    """Return which parameters an answer lets learn, and the number that it returns."""
    unet = TinyUNet(*call)
    given = torch.as_tensor(ask(lambda: answer(unet), ())).double().reshape(1)
    return torch.cat([torch.tensor([p.requires_grad for p in unet.parameters()]).double(), given])


@check(lambda draw: (4 + draw.seed,), run=_learning)
def keys_and_values(unet: nn.Module) -> int:
    """Check keys_and_values(unet): train K and V of `attn2` alone, arXiv 2212.04488, sec. 3.1."""
    for name, p in unet.named_parameters():
        p.requires_grad_("attn2.to_k" in name or "attn2.to_v" in name)
    return sum(p.numel() for p in unet.parameters() if p.requires_grad)


def _lost_call(draw: Draw) -> Call:
    lost = torch.tensor([0.5, 0.4, 0.02, 0.6]).double() + 0.05 * draw.uniform(0, 1, 4)
    return lost, torch.tensor([0.3, 0.1, -0.03, 0.5]).double() + 0.05 * draw.uniform(0, 1, 4)


@check(_lost_call)
def given_back(lost: Tensor, gained: Tensor) -> Tensor:
    """Check given_back(lost, gained): sum gained / sum lost over subjects, (S,) -> (), no unit."""
    return gained.sum() / lost.sum()


class TinyPlugUNet(nn.Module):
    """A noise network called as a diffusers UNet, (B, C, h, w), (B,), (B, L, D) -> `.sample`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.picture = nn.Conv2d(2, 2, 3, padding=1)
            self.words = nn.Linear(3, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> object:
        """Return an object whose `sample` is the predicted noise, as diffusers' UNets do."""
        words = self.words(encoder_hidden_states).mean(1)[..., None, None]
        time = 1 + timestep[:, None, None, None] / 100
        return SimpleNamespace(sample=self.picture(sample) * (1 + words) + words * time)


def plug_batch(
    seed: int = 0, along: Tensor | None = None
) -> tuple[TinyPlugUNet, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return a tiny UNet and (x_t, t, model_pred, class_embeds, uncond_embeds) to try a plug on.

    along: (B,), where the subjects lie between "nothing", 0, and "dog", 1.
    """
    along = torch.linspace(-0.5, 2, 5) if along is None else along
    generator, unet, size = torch.Generator().manual_seed(seed), TinyPlugUNet(seed), len(along)
    dog, nothing = (2 * torch.randn(1, 4, 3, generator=generator) for _ in range(2))
    x_t = torch.randn(size, 2, 4, 4, generator=generator)
    t = torch.randint(100, (size,), generator=generator)
    prediction = unet(x_t, t, nothing + along[:, None, None] * (dog - nothing)).sample
    return unet, (x_t, t, prediction, dog.expand(size, -1, -1), nothing.expand(size, -1, -1))


def _plugged(answer: Answer, call: Call) -> Tensor:
    """Return an answer's values, (B,), then the gradients of the UNet's weights by their mean."""
    unet, inputs = plug_batch(*call)
    given = ask(lambda: answer(unet, *inputs), ())
    if not isinstance(given, Tensor) or not given.requires_grad:
        raise Mistake("No gradient reaches the UNet by `model_pred`: leave that one its gradient.")
    if given.shape != (6,):
        raise Mistake(f"One number a sample is asked for, (6,): yours is {tuple(given.shape)}.")
    slopes = torch.autograd.grad(given.mean(), list(unet.parameters()), materialize_grads=True)
    return torch.cat([given.detach(), nn.utils.parameters_to_vector(slopes)])


@check(
    lambda draw: [
        (draw.seed, torch.tensor(rho))  # the gate of the batch's means is once open, once shut
        for rho in ([-0.4, 0.1, 0.5, 0.8, 1.3, 1.9], [0.1, 0.9, 1.9, 2.0, 2.2, 0.7])
    ],
    run=_plugged,
    tolerance=1e-5,
    hint="Places from 6 on are gradients of the UNet's weights: they flow by `model_pred` alone.",
)
def plug(
    unet: Any,
    x_t: Tensor,
    t: Tensor,
    model_pred: Tensor,
    class_embeds: Tensor,
    uncond_embeds: Tensor,
) -> Tensor:
    """Check plug(unet, x_t, t, model_pred, class_embeds, uncond_embeds), eq. 7-9; (B,)."""
    with torch.no_grad():
        eps_class = unet(x_t, t, class_embeds).sample
        eps_uncond = unet(x_t, t, uncond_embeds).sample
    to_class = (model_pred - eps_class).square().flatten(1).mean(1)
    to_uncond = (model_pred - eps_uncond).square().flatten(1).mean(1)
    tau = -(eps_class - eps_uncond).square().flatten(1).mean(1)
    loss = to_class - to_uncond
    return loss * (loss > tau)
