"""Checks of what trains and draws, the exercises to lessons 00, 04 and 07.

Equations are those of arXiv 2403.06775 unless named.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Call, Draw, Mistake, ask, check
from sude_lab.exercises.worlds import DOG, WORDS, short_schedule, stable_diffusion_schedule, things
from sude_lab.prompts import article


# B = w, so that an abar spread over the wrong axis raises no error and has to be noticed
@check(lambda draw: (*(draw.normal(4, 3, 4, 4) for _ in range(2)), draw.uniform(0.05, 0.95, 4)))
def noised(x_0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Check noised(x_0, eps, abar), eq. 1; x_0, eps: (B, C, h, w), abar: abar_t, (B,)."""
    a = abar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def _table_call(draw: Draw) -> Call:
    table = draw.uniform(0.985, 1.0, 1000).cumprod(0)
    return (table if draw.seed else stable_diffusion_schedule().alphas_cumprod,)


@check(_table_call)
def even_time(alphas_cumprod: Tensor) -> Tensor:
    """Check even_time(alphas_cumprod): the first t with 1 - abar_t > abar_t, from eq. 1."""
    return (alphas_cumprod < 0.5).nonzero()[0, 0]


def _rho_call(draw: Draw) -> Call:
    below, above = draw.uniform(-0.5, 0.9, 5 + draw.seed % 7), draw.uniform(1.1, 2.0, 4)
    rho = torch.cat([below, above, torch.ones(2).double()])
    return (rho[torch.randperm(len(rho), generator=draw.generator)],)


@check(_rho_call)
def open_share(rho: Tensor) -> Tensor:
    """Check open_share(rho): the share of samples whose gate, eq. 9, is open: rho < 1; (B,)."""
    return (rho < 1).double().mean()


class TinyDenoiser(nn.Module):
    """A noise network for a few pixels, eps_theta(x_t, t) of eq. 2; (B, D) -> (B, D), float32."""

    def __init__(self, pixels: int = 4, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inner, outer = nn.Linear(pixels + 1, hidden), nn.Linear(hidden, pixels)
        self.layers = nn.Sequential(inner, nn.SiLU(), outer)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise; t: LongTensor (B,), of 1,000 or fewer."""
        return self.layers(torch.cat([x_t, t[:, None].to(x_t) / 1000], dim=1))


def _three_steps(step: Answer, call: Call, *asked: Any) -> Tensor:
    """Return losses and weights of three step(model, *asked, optimizer, x_0, ..., generator)."""
    seed, x_0, *rest = call
    model = TinyDenoiser(x_0.shape[1], hidden=16, seed=seed)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), Generator()
    taken = partial(step, model, *asked, optimizer, x_0, *rest, generator.manual_seed(seed))
    losses = [torch.as_tensor(ask(taken, ())).detach().reshape(1) for _ in range(3)]
    return torch.cat([nn.utils.parameters_to_vector(model.parameters()).detach(), *losses])


@check(
    lambda draw: (draw.seed, draw.normal(1, 4).float().expand(8, 4), short_schedule()),
    run=_three_steps,
)
def training_step(
    model: nn.Module, optimizer: Optimizer, x_0: Tensor, schedule: Schedule, generator: Generator
) -> Tensor:
    """Check training_step(model, optimizer, x_0, schedule, generator), eq. 3 in eps-space."""
    t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = add_noise(x_0, eps, t, schedule)
    loss = (model(x_t, t) - eps).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


Prior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _layers_call(draw: Draw) -> Call:
    sides = 8 * torch.randint(1, 6, (3, 2), generator=draw.generator) + torch.tensor([0, 48])
    return [tuple(row) for row in sides.tolist()], 3 + draw.seed % 7


@check(_layers_call)
def lora_count(layers: Sequence[tuple[int, int]], rank: int) -> int:
    """Check lora_count(layers, rank): the sum of rank (out + in), arXiv 2106.09685, sec. 4."""
    return sum(rank * (out + into) for out, into in layers)


def _latent_call(draw: Draw) -> Call:
    mean, deviation = draw.normal(2, 3, 3).float(), draw.uniform(0.1, 0.9, 2, 3, 3).float()
    return mean, deviation, 4 + draw.seed // 10, Generator().manual_seed(draw.seed + 1)


@check(_latent_call)
def latent_batch(mean: Tensor, deviation: Tensor, size: int, generator: Generator) -> Tensor:
    """Check latent_batch(mean, deviation, size, generator): mean + deviation z, x_0 of eq. 1."""
    noise = torch.randn(size, *mean.shape, generator=generator)
    return mean + deviation * noise


@check(lambda draw: (1 + draw.normal(7).abs(), draw.number(0.7, 0.9)))
def smoothed(losses: Tensor, decay: float) -> Tensor:
    """Check smoothed(losses, decay): m_k / (1 - decay^k), arXiv 1412.6980, sec. 3; (K,)."""
    mean, curve = torch.zeros(()), []
    for k, loss in enumerate(losses, start=1):
        mean = decay * mean + (1 - decay) * loss
        curve.append(mean / (1 - decay**k))
    return torch.stack(curve)


def _parts_calls(draw: Draw) -> list[Call]:
    eps, eps_null, d, noise = (draw.normal(4, 3, 2) for _ in range(4))
    calls: list[Call] = []
    for rho in ([-0.5, 0.4, 0.8, 1.6], [0.5, 0.9, 2.2, 2.5]):  # the mean's gate: open, shut
        eps_sub = eps_null + torch.tensor(rho).double().reshape(4, 1, 1) * d + 0.1 * noise
        calls.append((eps_sub, eps_null + d, eps_null, eps, draw.number(0.5, 0.9)))
    return calls


@check(_parts_calls, learns=("eps_sub",), fixed=("eps_class", "eps_null"))
def batch_loss(
    eps_sub: Tensor, eps_class: Tensor, eps_null: Tensor, eps: Tensor, weight_sude: float
) -> Tensor:
    """Check batch_loss(eps_sub, eps_class, eps_null, eps, weight_sude), eq. 10 in eps-space."""
    learn = (eps_sub - eps).square().flatten(1).mean(1)
    to_class = (eps_sub - eps_class.detach()).square().flatten(1).mean(1)
    to_null = (eps_sub - eps_null.detach()).square().flatten(1).mean(1)
    tau = -(eps_class - eps_null).detach().square().flatten(1).mean(1)
    sude = to_class - to_null
    return (learn + weight_sude * (sude > tau) * sude).mean()


def dog_prior(schedule: Schedule) -> Prior:
    """Return lesson 02's perfect frozen model, (x_t, t) -> (eps_class, eps_null), (B, 2)."""
    world, _ = things()

    def prior(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_t.double()
        return world.eps(wide, t, schedule, DOG).to(x_t), world.eps(wide, t, schedule).to(x_t)

    return prior


def _dog_call(draw: Draw) -> Call:
    x_0 = torch.tensor([[-1.2, 1.2]]).expand(8, 2)
    return draw.seed, x_0, short_schedule(), draw.number(1.0, 3.0)


@check(_dog_call, run=lambda step, call: _three_steps(step, call, dog_prior(call[2])))
def sude_step(
    model: nn.Module,
    prior: Prior,
    optimizer: Optimizer,
    x_0: Tensor,
    schedule: Schedule,
    weight_sude: float,
    generator: Generator,
) -> Tensor:
    """Check sude_step(model, prior, optimizer, x_0, schedule, weight_sude, generator), eq. 10."""
    t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = add_noise(x_0, eps, t, schedule)
    eps_class, eps_null = prior(x_t, t)
    loss = batch_loss.right(model(x_t, t), eps_class, eps_null, eps, weight_sude)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


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
            sides = {"to_q": width, "to_k": reads, "to_v": reads}
            layers = {name: nn.Linear(side, width, bias=False) for name, side in sides.items()}
            out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
            return nn.ModuleDict(layers | {"to_out": out})

        self.conv_in = nn.Conv2d(4, width, 3)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for blocks in (self.down_blocks, self.up_blocks):
            parts = {"attn1": attention(width), "attn2": attention(words)}
            blocks.append(nn.ModuleDict(parts | {"ff": nn.Linear(width, width)}))


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


@check(lambda draw: (draw.near([0.5, 0.4, 0.02, 0.6]), draw.near([0.3, 0.1, -0.03, 0.5])))
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
    generator, unet, size = Generator().manual_seed(seed), TinyPlugUNet(seed), len(along)
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
