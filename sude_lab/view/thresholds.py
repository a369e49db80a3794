"""Explorers: move a slider, and pictures and numbers of a lesson follow at once.

The models are called once, on a grid (`ask`); a move of a slider only looks up their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.classifier import checked_variance
from sude_lab.classify.probe import answers, decode
from sude_lab.diffusion import to_x_0
from sude_lab.errors import UserError
from sude_lab.losses import guidance_projection, sude_weight
from sude_lab.prompts import photo_of
from sude_lab.sude import sude_terms
from sude_lab.view import plots
from sude_lab.view.shown import SCALE, Shown, slider


def sude_move(
    x_prev: Tensor,
    mean_class: Tensor,
    mean_uncond: Tensor,
    variance: Tensor,
    weight_sude: float,
    *,
    truncated: bool = True,
) -> Tensor:
    """How far SuDe moves a prediction along d = mean_class - mean_uncond, when moving has a price.

    argmin_s ||s d||^2 + w_s hinge(x_prev + s d) = min(w_s / (2 sigma_t^2), max(0, 1 - rho)),
    derived from arXiv 2403.06775, eq. 3 and 7-10: the price is what eq. 3 charges for leaving
    x_prev. In eps-space: min(w_s w_t, max(0, 1 - rho)). Without truncation s = w_s / (2 sigma_t^2).

    Args: as `sude_loss`; weight_sude: w_s. Returns s, (B,), in lengths of d, without a gradient.

    Raises:
        ValueError: shapes disagree, or the variance is not positive (fixed_small at t = 0).
    """
    rho = guidance_projection(x_prev.detach(), mean_class, mean_uncond)
    far = weight_sude / (2 * checked_variance(variance, x_prev)).to(rho.dtype)
    return torch.minimum(far, torch.relu(1 - rho)) if truncated else far


@dataclass(frozen=True)
class Grid:
    """The answers of two models about one picture under N noises at M timesteps, and K categories.

    `x_t`, `subject`, `uncond`: (N, M, C, h, w); `category`: (N, M, K, C, h, w). All but x_t are
    predicted noise.
    """

    times: tuple[int, ...]
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    x_t: Tensor
    subject: Tensor
    uncond: Tensor
    category: Tensor


def ask(
    judge: Backbone,
    tuned: Backbone,
    picture: Image.Image,
    subject_prompt: str,
    categories: Sequence[str],
    times: Sequence[int],
    seeds: Sequence[int],
) -> Grid:
    """Ask `tuned` for the subject and `judge` for every category and for no prompt.

    Both see the same x_t. N x M x (K + 2) evaluations of the UNet; the picture must have the
    model's resolution.
    """
    if not categories or not seeds:
        raise UserError("Give at least one category and one seed.")

    def predicted(model: Backbone, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """x_t and eps_theta, (N, M, K, C, h, w) each."""
        batches = [b for s in seeds for b in answers(model, [picture], prompts, times, seed=s)]
        x_t = torch.cat([batch.x_t for batch in batches]).cpu()
        eps = torch.cat([batch.noise for batch in batches]).cpu()
        sizes = (len(seeds), len(times), len(prompts))
        return x_t.unflatten(0, sizes), eps.unflatten(0, sizes)

    x_t, by_judge = predicted(judge, ["", *map(photo_of, categories)])
    _, by_tuned = predicted(tuned, [subject_prompt])
    eps = (by_tuned[:, :, 0], by_judge[:, :, 0], by_judge[:, :, 1:])
    return Grid(tuple(times), tuple(categories), tuple(seeds), x_t[:, :, 0], *eps)


@dataclass(frozen=True)
class Reading:
    """The numbers at one position of the sliders: L_sude, tau_t and lambda_tau of eq. 7-9, and rho.

    Losses are means over the latent's dimensions; `move` is how far SuDe moves the answer, in
    lengths of d: `sude_move`.
    """

    t: int
    category: str
    seed: int
    weight_sude: float
    loss: float
    threshold: float
    open: bool
    rho: float
    move: float

    def __str__(self) -> str:
        gate = f"OPEN: moves by {self.move:.2f} d" if self.open else "shut: moves nothing"
        losses = f"L_sude = {1000 * self.loss:.2f}, τ_t = {1000 * self.threshold:.2f} (thousandths)"
        where = f"t = {self.t}, judged as: {self.category}.   {losses},  ρ = {self.rho:.2f}."
        return f"{where}   w_s = {self.weight_sude:g}, gate {gate}"


class ThresholdExplorer(Shown):
    """Sliders for t, category, noise and w_s over x_t, the push, and L_sude against tau_t.

    The push is where SuDe, arXiv 2403.06775, eq. 7-10, moves the tuned model's answer when moving
    costs what eq. 3 charges for it: e_sub + s d with s of `sude_move`.

    Args:
        judge: the model whose autoencoder shows latents as pictures.
        grid: what `ask` gave.
    """

    def __init__(self, judge: Backbone, grid: Grid) -> None:
        self.judge, self.grid = judge, grid
        # The grid holds eps, whatever the model predicts.
        self._schedule = replace(judge.schedule, prediction_type="epsilon")
        shape = grid.category.shape[:3]
        n, m, k = torch.cartesian_prod(*map(torch.arange, shape)).T
        self._t = torch.tensor(grid.times)
        eps = (grid.subject[n, m], grid.category[n, m, k], grid.uncond[n, m])
        at = (grid.x_t[n, m], self._t[m], self._schedule)
        terms = sude_terms(*eps, *at, weighting="reference")
        self.loss, self.threshold, self.gate, self.rho = (
            x.reshape(shape) for x in (terms.loss, terms.threshold, terms.gate, terms.rho)
        )
        self._pictures = {(n, m): self._drawn(n, m) for n, m in np.ndindex(shape[:2])}
        self.figure = Figure(figsize=(plots.WIDTH, 4.6), dpi=SCALE * plots.DPI)
        edges = {"left": 0.1, "right": 0.98, "bottom": 0.11, "top": 0.86, "hspace": 0.05}
        places = self.figure.add_gridspec(2, 1, height_ratios=(1, 1.7), **edges)
        pictures, self._curves = places.subplots(squeeze=False).ravel()
        plots.picture_table(pictures, self._cells(0, 0, 0, 0.0), per_cell=1)
        (self._strip,) = pictures.get_images()
        self._title = self.figure.text(0.02, 0.91, "", fontsize=10)
        widest = grid.times[int(self.rho[0, :, 0].argmin())]  # where there is most to see
        rows = {
            "t": ("t", grid.times, widest),
            "category": ("category", grid.categories, grid.categories[0]),
            "seed": ("noise", grid.seeds, grid.seeds[0]),
            "weight_sude": ("w_s", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), 1.0),
        }
        self.sliders = {name: slider(*row, self._follow, "300px") for name, row in rows.items()}
        self.controls = list(self.sliders.values())
        self._follow()

    def update(self, t: int, category: str, seed: int, weight_sude: float) -> Reading:
        """Redraw the figure for one position and return its numbers."""
        n, m, k = at = self._index(t, category, seed)
        loss, threshold, rho = (x[at].item() for x in (self.loss, self.threshold, self.rho))
        is_open, move = bool(self.gate[at]), self._move(n, m, k, weight_sude).item()
        reading = Reading(t, category, seed, weight_sude, loss, threshold, is_open, rho, move)
        self._strip.set_data(plots.tile(self._cells(n, m, k, weight_sude), per_cell=1)[0])
        self._title.set_text(str(reading).replace("   w_s", "\nw_s"))
        self._curves.clear()
        curves = (x[n, :, k].numpy() for x in (self.loss, self.threshold))
        plots.gate_over_time(self._curves, self.grid.times, *curves, now=t)
        return reading

    def __str__(self) -> str:
        return str(self._reading)

    def _follow(self, _: Any = None) -> None:
        """Bring the figure to where the sliders are."""
        self._reading = self.update(**{name: slider.value for name, slider in self.sliders.items()})
        self.publish()

    def _index(self, t: int, category: str, seed: int) -> tuple[int, int, int]:
        grid = self.grid
        try:
            return grid.seeds.index(seed), grid.times.index(t), grid.categories.index(category)
        except ValueError as error:
            raise UserError(
                f"The grid holds no t = {t}, {category!r}, noise {seed}: choose t among "
                f"{grid.times}, the category among {grid.categories}, the noise among {grid.seeds}."
            ) from error

    def _cells(self, n: int, m: int, k: int, weight_sude: float) -> Any:
        """Return the row of pictures of one position."""
        noisy, before, *categories = self._pictures[n, m]
        move, after = self._move(n, m, k, weight_sude), before
        if move > 0:
            d = self.grid.category[n, m, k] - self.grid.uncond[n, m]
            eps = self.grid.subject[n, m] + move.to(d) * d
            (after,) = decode(self.judge, self._believed(eps[None], n, m))
        cells = {
            "$x_t$": noisy,
            "tuned model": before,
            "judge": categories[k],
            "after the push": after,
            "the push, × 2": plots.difference(before, after),
        }
        return {"": {name: [picture] for name, picture in cells.items()}}

    def _move(self, n: int, m: int, k: int, weight_sude: float) -> Tensor:
        t = self._t[m : m + 1]
        variance = 0.5 / sude_weight(t, self._schedule, "reference")
        category, uncond = self.grid.category[n, m, k : k + 1], self.grid.uncond[n, m : m + 1]
        return sude_move(self.grid.subject[n, m : m + 1], category, uncond, variance, weight_sude)

    def _believed(self, eps: Tensor, n: int, m: int) -> Tensor:
        """Return x_0, what predicted noises (B, ...) say is under the noise."""
        t = self._t[m].expand(len(eps))
        return to_x_0(eps, self.grid.x_t[n, m].expand_as(eps), t, self._schedule)

    def _drawn(self, n: int, m: int) -> list[Image.Image]:
        """Return x_t, and what the tuned model and the judge for each category see in it."""
        eps = torch.cat([self.grid.subject[n, m : m + 1], self.grid.category[n, m]])
        x_t = self.grid.x_t[n, m : m + 1]
        return decode(self.judge, torch.cat([x_t, self._believed(eps, n, m)]))
