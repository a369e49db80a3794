"""Classify a picture with a text-to-image model: p(c | x) over K prompts, with standard errors.

Up to a constant that is the same for all prompts, -log p(x_0 | c) is at most

    L(c) = sum_t w_t E_eps ||eps - eps_theta(x_t, c, t)||^2,

with x_t of eq. 1 of arXiv 2403.06775 and w_t = k_t = (d mean / d eps)^2 / (2 sigma_t^2): the
evidence lower bound (DDPM, arXiv 2006.11239, eq. 8). For a model that outputs x_0, v or flow,
errors and weights are those of its own output, which is the same sum, and finite where abar_t = 0.
Bayes' rule with these bounds in place of the likelihoods is the Diffusion Classifier of
arXiv 2303.16203, p(c_k | x) = softmax_k [ -L(c_k) ] for prompts that are equally likely beforehand
(where they are not, multiply by p(c_k) and normalise). Its term at t is eq. 5 with eq. 6 of
arXiv 2403.06775 (`sude_lab.classifier.class_log_posterior`) at x_{t-1} = mean of
q(x_{t-1} | x_t, x_0): what one step tells of the prompt.

The sum is estimated with pairs (t, eps), t drawn in proportion to w_t, so that all count alike.
||eps - eps_theta||^2 differs far more between two pairs than between two prompts: all prompts are
asked the same pairs, and only *paired differences* count. That makes it safe to drop prompts early
(`still_in`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone, Condition
from sude_lab.classifier import squared_distance
from sude_lab.classify.probe import encode_all, latents_of, noise_generator, predictions
from sude_lab.diffusion import Schedule, training_target
from sude_lab.errors import UserError, check_whole, listed
from sude_lab.losses import output_weight
from sude_lab.prompts import PLACEHOLDER, checked

WEIGHTINGS = ("elbo", "simple")
MOST_PAIRS = 10_000


def step_weights(schedule: Schedule, weighting: str = "elbo") -> Tensor:
    """Return w_t of L(c) for every t: what a squared error of the output counts in nats; (T,).

    - elbo: k_t of `sude_lab.losses.output_weight` (exact), arXiv 2006.11239, eq. 8. 0 at t = 0 with
      fixed_small: no density.
    - simple: 1 / T for eps, as in DDPM's simple loss and in arXiv 2303.16203. Then L(c) is no
      bound, and the probabilities are scores: their order is what counts.

    Raises:
        ValueError: as `output_weight`, or the weighting is unknown.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    t = torch.arange(schedule.num_timesteps)
    if weighting == "simple":
        return output_weight(t, schedule, "simple") / schedule.num_timesteps
    return output_weight(t, schedule, "exact")


def spread_times(number: int, weights: Tensor, shift: float) -> Tensor:
    """Return stratified timesteps in proportion to w_t, the telling ones first; long (number,).

    t = F^-1((i + shift) / number), i = 0 ... number - 1, with F(t) = sum_{s <= t} w_s / sum_s w_s:
    one in each of `number` equal parts of F. With a shift uniform in [0, 1) the mean of any f over
    all of them has the expectation sum_t w_t f(t) / sum_t w_t.

    The parts come in the order in which they hold 3/4, 1/2, 1/4, 7/8, 5/8, 3/8, 1/8, 15/16, ...:
    every beginning is spread, and starts at much noise, where the category is decided.
    """
    places = [k / 4 for k in (3, 2, 1)]
    for level in range(3, number.bit_length() + 3):
        places += [k / 2**level for k in range(2**level - 1, 0, -2)]
    order = list(dict.fromkeys(int(place * number) for place in places))
    place = (torch.tensor(order, dtype=torch.float64) + shift) / number
    cumulative = weights.double().cumsum(0)
    times = torch.searchsorted(cumulative, place * cumulative[-1], right=True)
    return times.clamp_max(len(weights) - 1)


def compare(losses: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how prompts compare over the pairs that they share: D (K,), u (M, K) and v ().

    D_k = mean_i (l_ik - l_ir) with l_ik = (sum_t w_t) ||eps_i - eps_theta(c_k)||^2, over the pairs
    that k was asked, estimates L(c_k) - L(c_r); the leader r is the best of the prompts that were
    asked all pairs. With independent standard normal z_i, D_k + sum_i z_i u_ik is what other pairs
    might have given, for all prompts together: u_ik is a pair's difference less its neighbours' in
    t (which is stratified: what changes smoothly with t is certain), scaled to keep the variance,
    over M. The variance of l_ik - l_ir, like its mean, is in proportion to ||eps_theta(c_k) -
    eps_theta(c_r)||^2: their ratio v is pooled over the prompts, and stands in where one was asked
    once, u_k = sqrt(v |D_k|).

    Args: losses l (M, K), nan where a prompt was not asked: it was asked the first few pairs, or
    all; times (M,).
    """
    losses = losses.double()
    counts = (~losses.isnan()).sum(0)
    means = losses.nanmean(0).masked_fill(counts < counts.max(), torch.inf)
    each = losses - losses[:, means.argmin()].unsqueeze(1)
    differences = each.nanmean(0)
    parts = torch.zeros_like(each)
    for count in counts.unique().tolist():
        if count > 1:
            columns = (counts == count).nonzero().squeeze(1)
            order = times[:count].argsort(stable=True)
            rows = _less_neighbours(each[order][:, columns]) / count
            parts[order.unsqueeze(1), columns] = rows
    often = counts > 1
    size = differences[often].abs().sum()
    variance = (parts.square().sum(0) * counts)[often].sum()
    noise = variance / size if size > 0 else torch.zeros((), dtype=torch.float64)
    parts[0] = torch.where(often, parts[0], (noise * differences.abs()).sqrt())
    return differences, parts, noise


def _less_neighbours(x: Tensor) -> Tensor:
    """x_i - (x_{i-1} + x_{i+1}) / 2, at the ends x_i - x_{i+-1}; of the variance of x, (M, K)."""
    inner = (x[1:-1] - (x[:-2] + x[2:]) / 2) * (2 / 3) ** 0.5
    ends = (x[:1] - x[1:2]) * 0.5**0.5, (x[-1:] - x[-2:-1]) * 0.5**0.5
    return torch.cat([ends[0], inner, ends[1]])


def still_in(losses: Tensor, times: Tensor, *, caution: float, keep: int) -> Tensor:
    """Say which prompts may still be the best; the others are hopeless; bool (K,).

    Hopeless is what is more than `caution` standard errors behind the best, D_k > caution
    sqrt(v D_k / m_k) with v of `compare` and m_k pairs, and what is not among the best `keep`.

    Args: as `compare`.
    """
    differences, _, noise = compare(losses, times)
    behind, counts = differences - differences.min(), (~losses.isnan()).sum(0)
    near = (counts.max() < 2) | (behind <= caution**2 * noise / counts)
    return near & (behind <= behind.kthvalue(min(keep, len(behind))).values)


def posterior(losses: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return p(c_k | x) and its standard error, (K,) each, from what every prompt was asked.

    p = softmax_k [-D_k], the classifier of arXiv 2303.16203. The error is the root mean
    square distance from p of 1,000 p of a multiplier bootstrap: every pair's part in D times a
    standard normal number, the same for all prompts.

    Args: as `compare`.
    """
    differences, parts, _ = compare(losses, times)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((1000, len(losses)), generator=generator, dtype=torch.float64)
    p, drawn = (-differences).softmax(0), (-differences - z @ parts).softmax(1)
    return p, (drawn - p).square().mean(0).sqrt()


_SHARES = (2, 3, 5, 8)  # chosen on drawings that are not among the reported ones


def ask_in_rounds(
    losses_of: Callable[[Tensor], Tensor],
    times: Tensor,
    num_prompts: int,
    *,
    prune: bool = True,
    caution: float = 2.5,
) -> Tensor:
    """Ask N pictures about K prompts at M pairs each, and return the losses (N, M, K).

    With `prune` this goes in rounds: four of one pair, then of a tenth of the pairs. After each the
    hopeless prompts of `still_in` are dropped, and after the first four all but the best half,
    third, fifth and eighth (three at least): nan stands where they are not asked.

    Args: losses_of: rows (R, 3) of (picture, pair, prompt) -> (R,); times (N, M).
    """
    number, pairs = times.shape
    losses = torch.full((number, pairs, num_prompts), torch.nan, dtype=torch.float64)
    left = torch.ones((number, num_prompts), dtype=torch.bool)
    starts = [*range(min(4, pairs)), *range(4, pairs, max(1, pairs // 10))] if prune else [0]
    ends = [min(end, pairs) for end in (*starts[1:], pairs)]
    for turn, (start, end) in enumerate(zip(starts, ends, strict=True)):
        unsettled = left & (left.sum(1, keepdim=True) > 1)
        rows = unsettled.unsqueeze(1).expand(-1, end - start, -1).nonzero()
        if not len(rows):
            break
        rows[:, 1] += start
        losses[rows.unbind(1)] = of_rows = losses_of(rows).double().cpu()
        if not bool(of_rows.isfinite().all()):
            raise UserError("The model's predictions are not finite: compute with --dtype float32.")
        keep = max(3, -(-num_prompts // _SHARES[turn])) if turn < len(_SHARES) else num_prompts
        for n in rows[:, 0].unique().tolist() if prune else ():
            left[n] &= still_in(losses[n, :end], times[n, :end], caution=caution, keep=keep)
    return losses


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a model says of one picture, by prompt, in the order in which they were given."""

    prompts: tuple[str, ...]
    probability: Tensor
    """p(c_k | x), (K,)."""
    standard_error: Tensor
    """Of the probability, over the draw of the pairs, (K,)."""
    pairs: Tensor
    """How many pairs (t, eps) each prompt was asked, (K,)."""

    @property
    def order(self) -> list[int]:
        """The prompts' numbers, most likely first."""
        return self.probability.argsort(descending=True, stable=True).tolist()

    @property
    def best(self) -> str:
        """The most likely prompt."""
        return self.prompts[self.order[0]]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a prompt, most likely first."""
        values = {name: getattr(self, name) for name in ("probability", "standard_error", "pairs")}
        return [
            {"prompt": self.prompts[k]} | {name: v[k].item() for name, v in values.items()}
            for k in self.order
        ]


def checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts to choose from, in their plain form."""
    plain = tuple(" ".join(checked(prompt).split()) for prompt in listed(prompts))
    if len(plain) < 2:
        example = '--prompt "photo of a dog" --prompt "photo of a cat"'
        raise UserError(f"Give at least two prompts to choose from: {example}.")
    for prompt in plain:
        if plain.count(prompt) > 1:
            raise UserError(f"The prompt {prompt!r} is given twice: every prompt must differ.")
        if PLACEHOLDER[:-1] in prompt:
            text = f"The prompt {prompt!r} asks for a subject, which this model has not"
            raise UserError(f"{text}: say in plain words what there is to see.")
    return plain


@dataclass(frozen=True, eq=False)
class ImplicitClassifier:
    """p(c_k | x) for K prompts by Monte Carlo over shared noise, as the module says."""

    backbone: Backbone
    prompts: Sequence[str]
    """The K prompts; "" is no prompt."""
    num_pairs: int = 32
    """How many pairs (t, eps) a prompt is asked at most."""
    weighting: str = "elbo"
    """w_t: elbo or simple, see `step_weights`."""
    prune: bool = True
    caution: float = 2.5
    """How many standard errors behind the leader a prompt must be to be dropped."""
    batch_size: int = 64
    """Evaluations of the UNet at once, over pictures, times and prompts."""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", checked_prompts(self.prompts))
        # A standard error needs two pairs; all of a picture's noise is in memory.
        check_whole("--num-pairs", self.num_pairs, 2, MOST_PAIRS)
        check_whole("--batch-size", self.batch_size, 1)
        check_whole("--seed", self.seed, 0)
        if not self.caution > 0:
            raise UserError(f"--caution is {self.caution}: it must be more than 0.")
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"There is no weighting {self.weighting!r}: use elbo or simple.")

    @cached_property
    def condition(self) -> Condition:
        """The prompts as the UNet reads them, encoded once."""
        condition = encode_all(self.backbone, self.prompts)
        if len(condition.hidden.unique(dim=0)) < len(condition):
            raise UserError("Two prompts are the same as far as the model reads them: change one.")
        return condition

    def pairs(self, shape: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
        """Return times (N, M) and noise (N, M, ...); those of n follow from (seed, n) alone."""
        times, noise = [], []
        for n in range(number):
            generator = noise_generator(self.seed, n)
            shift = torch.rand((), generator=generator, dtype=torch.float64).item()
            times.append(spread_times(self.num_pairs, self.weights, shift))
            noise.append(torch.randn((self.num_pairs, *shape), generator=generator))
        return torch.stack(times), torch.stack(noise)

    @cached_property
    def weights(self) -> Tensor:
        """w_t for every t, (T,)."""
        try:
            return step_weights(self.backbone.schedule, self.weighting)
        except ValueError as error:
            raise UserError(str(error)) from error

    def losses(
        self, pictures: Sequence[Image.Image], *, progress: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return (sum_t w_t) ||u - u_theta(x_t, c_k, t)||^2, nan where not asked, and t.

        u is the model's output; (N, M, K) and (N, M) for N pictures, of the model's resolution.
        """
        if not len(pictures):
            raise UserError("Give at least one picture.")
        condition = self.condition
        x_0 = latents_of(self.backbone, pictures, self.batch_size)
        times, noise = self.pairs(x_0.shape[1:], len(pictures))
        about = (self.backbone, x_0, times, noise, condition)

        def losses_of(rows: Tensor) -> Tensor:
            parts = []
            for part in rows.split(self.batch_size):
                batch = predictions(*about, part)
                picture = x_0[part[:, 0].to(x_0.device)]
                target = training_target(picture, batch.eps, batch.t, batch.schedule)
                parts.append(squared_distance(batch.output, target).cpu())
                bar.update(len(part))
            return self.weights.sum() * torch.cat(parts)

        rule: dict[str, Any] = {"prune": self.prune, "caution": self.caution}
        with tqdm(desc="asking", unit="evaluation", disable=not progress) as bar:
            losses = ask_in_rounds(losses_of, times, len(self.prompts), **rule)
        return losses, times

    def classify(self, pictures: Sequence[Image.Image], *, progress: bool = False) -> list[Verdict]:
        """Return what the model says of each picture; settings and errors as `losses`."""
        losses, times = self.losses(pictures, progress=progress)
        return [
            Verdict(tuple(self.prompts), *posterior(own, t), (~own.isnan()).sum(0))
            for own, t in zip(losses, times, strict=True)
        ]
