"""Every exercise: its solution passes, its stub fails, typical slips are called by their name.

Answers are tried as a student's are: the source of the notebook's own cell, solved, emptied, or
with a slip put into it, then the notebook's own check with its hidden tests.
"""

import contextlib
import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from wrong_answers import WRONG

from sude_lab import exercises, losses
from sude_lab.classifier import class_log_posterior, class_log_ratio, reverse_log_prob
from sude_lab.cli import main
from sude_lab.evaluate.metrics import image_similarity, per_run
from sude_lab.evaluate.prompts import structured
from sude_lab.exercises import Mistake, check_letter, judging
from sude_lab.exercises.judging import (
    Check,
    ask,
    changed,
    difference,
    made,
    one_change_slips,
    same,
    slips_of,
    source_of,
)
from sude_lab.prompts import caption

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sude_lab" / "exercises"
SOURCES = sorted((ROOT / "notebooks" / "exercises").glob("ex_*.ipynb"))
NAMES = [path.stem for path in SOURCES]
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION\n?", re.M | re.S)
HIDDEN = re.compile(r"^ *### BEGIN HIDDEN TESTS\n.*?^ *### END HIDDEN TESTS\n?", re.M | re.S)
CARD = re.compile(r"## \d+ · .+\n(★+) · (\d+) minutes · (\d+) points?\n")
CHECKED = "# NBVAL_CHECK_OUTPUT"
Notebook = dict[str, Any]

# What a student may slip in, as a change of the solution's source, and what must be said of it.
SLIPS: dict[str, list[tuple[str, str, str]]] = {
    "noised": [
        ("abar.reshape(-1, 1, 1, 1)", "abar", "spread it over the last axis"),
        ("a.sqrt() * x_0 + (1 - a).sqrt() * eps", "a * x_0 + (1 - a) * eps", "square roots"),
        ("(1 - a).sqrt() * eps", "(1 - a.sqrt()) * eps", "not 1 - sqrt"),
        ("a.sqrt() * x_0 + (1 - a).sqrt() * eps", "(1 - a).sqrt() * x_0 + a.sqrt() * eps",
         "You exchanged `x_0` and `eps`."),
    ],
    "even_time": [
        ("alphas_cumprod <", "alphas_cumprod.sqrt() <", "You took the root of `alphas_cumprod`,"),
        ("[0, 0])", "[0, 0]) + 1", "count from 0"),
        ("[0, 0])", "[0, 0]) - 1", "One too early"),
        ("(alphas_cumprod < 0.5).nonzero()[0, 0]", "(alphas_cumprod < 0.5).sum()", "counted"),
    ],
    "open_share": [
        ("rho < 1", "rho >= 1", "The wrong way round: `rho < 1` is asked"),
        ("rho < 1", "rho <= 1", "Where `rho` equals `1` it goes the"),
        ("(rho < 1).double().mean()", "float(rho.mean() < 1)",
         "`rho < 1` is not looked at: here it"),
        (".double().mean()", ".sum()", "You took a sum: a mean is asked for."),
    ],
    "paired_gain": [
        ('table[table["attribute"].notna()]', "table", "Rows without an attribute"),
        ('means["sude"] - means["plain"]', 'means["plain"] - means["sude"]',
         'A sign is turned: `means["sude"]` minus'),
        ('["subject", "variant"]', '["subject", "seed", "variant"]', "Seeds of one subject"),
        ('["attribute_alignment"]', '["subject_fidelity"]', "fidelity"),
        ('["sude"] - means["plain"]', '["sude"].mean()', "A pandas Series is expected"),
    ],
    "training_step": [
        ("return loss.detach()", "return 2 * loss.detach()", "`loss` counts twice"),
        ("    optimizer.zero_grad()\n", "", "optimizer.zero_grad()"),
        ("    optimizer.step()\n", "", "Nothing moved"),
        ("(prediction - eps)", "(prediction - x_0)", "You took `x_0` in the place of `eps`."),
        ("generator=generator)\n    eps", "generator=generator) * 0 + 1\n    eps", "should be"),
        ("(len(x_0),), generator=generator)", "(1,), generator=generator).expand(8)", "its own"),
        ("square().mean()", "square().sum()", "You took a sum: a mean is asked for."),
        ("loss.backward()", "(-loss).backward()", "It climbs"),
    ],
    "log_density": [
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / (2 * variance.sqrt())",
         "You took the root of `variance`, which"),
        ("dims = squares.shape[1]", "dims = 1", "once for each of the D"),
        (" - dims / 2 * torch.log(2 * math.pi * variance)", "",
         "`dims / 2 * torch.log(2 * math.pi *"),
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / variance",
         "The factor `2` is missing."),
        ("squares.sum(1)", "squares.mean(1)", "You took a mean: a sum is asked for."),
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / (2 * variance**2)",
         "You squared `variance`, which stands"),
        ("squares.shape[1]", "squares.shape[0]", "The normaliser counts once for each of"),
        ("squares.shape[1]", "x_prev.shape[1]", "The normaliser counts once for each of"),
        ("return -squares", "return squares", "A minus is missing before"),
        (" - dims / 2", " + dims / 2", "You added `dims / 2 * torch.log(2 *"),
        ("squares.sum(1) / (2", "squares.sum(1).sqrt() / (2",
         "A root too many: squares are asked for,"),
        ("dims / 2 *", "dims *", "It is not divided by `2` yet."),
        ("return -squares", "return 0 * squares.sum(1)  # -squares", "Nothing but zeros"),
    ],
    "log_ratio": [
        ("return under_class - ", "return -under_class + ", "sign is turned"),
        (" - log_density(x_prev, mean_uncond, variance)", "", "`below` is missing: subtract it."),
        ("variance)\n    return", "variance.sqrt())\n    return",
         "You took the root of `variance`, which"),
        ("under_class - ", "under_class / ", "That is the quotient of `above` and"),
        ("under_class - ", "under_class + ", "You added `below`: subtract it."),
        ("return under_class - ", "return 2 * under_class - 2 * ",
         "`variance` counts half: a 2 divides"),
        ("return under_class - ", "return 0 * under_class + ", "denominator alone"),
    ],
    "normaliser": [
        ('"c"', '"a"', "number of dimensions"),
        ('"c"', '"b"', "from t to t"),
        ('"c"', '"d"', "empty prompt"),
        ('"c"', '"e"', "one of the letters a, b, c, d"),
    ],
    "log_posterior": [
        ("dim=1", "dim=0", "`(prior.log() - squares / (2 *"),
        ("prior.log() - ", "prior - ", "`.log(...)` is missing at `prior`."),
        ("prior.log() - squares", "-squares", "`prior.log()` is missing, from which"),
        ("prior.log() - ", "prior.log() + ", "You added `squares / (2 * variance[:,"),
        ("variance[:, None]", "variance", "`[:, None]` is missing at `variance`."),
        ("torch.log_softmax", "torch.softmax", "Take the logarithm: these are the"),
    ],
    "chain": [
        ("news.flip(0).cumsum(0).flip(0)", "news.cumsum(0)", "from the other end"),
        ("last + ", "", "`last` is missing: add it."),
        ("cumsum(0).flip(0)", "cumsum(0)", "`.flip(...)` is missing at"),
        ("news.flip(0).cumsum(0).flip(0)", "news.sum(0)",
         "That is the end of the chain; all of it"),
        (".cumsum(0).flip(0)", ".cumsum(0).flip(0).clamp(max=-last)", "You cut at 0"),
        ("last + news", "last - news", "You subtracted"),
    ],
    "noise_errors": [
        ("(eps - guess)", "(x_0 - guess)", "You took `x_0` in the place of `eps`."),
        ("schedule, c)", "schedule)", "`c` is missing in `world.eps(...)`."),
        ("dim=1)", "dim=0)", "`torch.stack(dim=1)` is asked for: you"),
        ("        guess =",
         "        if c:\n"
         "            eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)\n"
         "            x_t = add_noise(x_0, eps, t, schedule)\n        guess =",
         "noise of its own"),
        (".square().sum(1)", ".square().mean(1)", "You took a mean: a sum is asked for."),
        ("(eps - guess)", "(x_t - guess)", "You took `x_t` in the place of `eps`."),
        ("(x_t, t, schedule, c)", "(x_t, t + 1, schedule, c)", "one too late"),
        ("(x_t, t, schedule, c)", "(x_t, t - 1, schedule, c)", "one too early"),
        (".square().sum(1)", ".norm(dim=1)", "A root too many: squares are asked for,"),
    ],
    "sude": [
        ("to_class - to_uncond", "to_uncond - to_class", "sign is turned"),
        ("mean_class.detach()", "mean_class", "the bar over theta"),
        ("mean_uncond.detach()", "mean_uncond", "the bar over theta"),
        ("x_sub - mean", "x_sub.detach() - mean", "no gradient reaches x_sub"),
        ("(2 * variance)", "(2 * variance.sqrt())", "You took the root of `variance`, which"),
        ("to_class - to_uncond", "to_class + to_uncond", "You added `to_uncond`: subtract it."),
        ("(to_class - to_uncond)", "to_class", "`to_uncond` is missing: subtract it."),
    ],
    "push": [
        ("mean_class - mean_uncond", "mean_uncond - mean_class",
         "A sign is turned: `mean_class` minus"),
        ("mean_class - mean_uncond", "mean_class - x_sub", "x_sub is not in the gradient"),
        ("variance[:, None]", "variance", "`[:, None]` is missing at `variance`."),
        ("variance[:, None]", "variance[:, None].sqrt()", "You took the root of `variance`, which"),
        (" / variance[:, None]", "", "It is not divided by `variance[:,"),
    ],
    "along": [
        ("d.square().sum(1, keepdim=True)", "d.norm(dim=1, keepdim=True)",
         "A root too many: squares are asked for,"),
        (" / d.square().sum(1, keepdim=True)", "", "It is not divided by `d.square().sum(1,"),
        ("d.square().sum(1, keepdim=True)", "a.square().sum(1, keepdim=True)",
         "You took `a` in the place of `d`."),
        ("return number * d", "return number[:, 0]", "the number rho"),
        ("return number * d", "return a - number * d", "what remains"),
        ("(a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)",
         "(a * d).sum() / d.square().sum()",
         "over the whole batch"),
    ],
    "eps_weight": [
        ("(1 - abar_prev)", "(1 - abar)", "You took `abar` in the place of"),
        ("alpha = abar / abar_prev", "alpha = abar", "It is not divided by `abar_prev` yet."),
        ("(2 * alpha", "(alpha", "The factor `2` is missing."),
    ],
    "same_push": [
        ("* before / after", "* after / before", "You exchanged `old` and `new`."),
        ("weight_sude * before / after", "weight_sude", "another w_t"),
        ("weight_sude * before / after", "before / after", "The factor `weight_sude` is missing."),
        ("* before / after", "* before", "It is not divided by `after` yet."),
    ],
    "both_sides": [
        ("judge = -known", "judge = -world", "Left: the judge of eq. 12 knows"),
        ("joint + S_t", "joint - S_t", "A minus is missing before"),
        ("joint = -known", "joint = -world", "Right: the step must know both"),
        ("S_t = -known", "S_t = -world", "Right: S_t = -log p"),
        ("_prev(x_prev", "(x_t", "Left: you asked the judge about x_t"),
        ("return step + judge, joint + S_t", "return step + judge", "two tensors"),
    ],
    "threshold": [
        ("return -", "return ", "A minus is missing before"),
        (" / (2 * variance)", " / variance", "The factor `2` is missing."),
        (".square().sum(1)", ".norm(dim=1)", "A root too many: squares are asked for,"),
        ("sum(1)", "mean(1)", "You took a mean: a sum is asked for."),
        ("(2 * variance)", "(2 * variance**2)", "You squared `variance`, which stands"),
        ("(2 * variance)", "2", "The factor `variance` is missing."),
        (".square().sum(1)", ".sum(1).square()", "First the squares, then their sum: you"),
        (".square().sum(1)", ".abs().sum(1)", "absolute values"),
        ("(2 * variance)", "(2 * variance.sqrt())", "You took the root of `variance`, which"),
    ],
    "truncated": [
        ("(loss > tau)", "(loss.mean() > tau.mean())", "averaged over the batch"),
        ("loss * (loss > tau)", "torch.maximum(loss, tau)", "gives 0, not tau"),
        ("loss > tau", "loss <= tau", "wrong way round"),
        ("loss > tau", "loss >= tau", "Where `loss` equals `tau` it goes the"),
        ("loss * (loss > tau)", "(loss > tau)", "The factor `loss` is missing."),
        ("loss * (loss", "(loss - tau) * (loss", "Eq. 9 has the loss times the gate; you"),
        ("loss * (", "loss.detach() * (", "no gradient reaches loss"),
        ("(loss > tau)", "(loss > 0)", "You compared with 0, and not with `tau`."),
        ("(loss > tau)", "(loss > tau.mean())", "You averaged over the batch before you"),
        ("(loss > tau)", "(loss > -tau)", "The sign of `tau` is turned."),
    ],
    "rho": [
        ("d.square().sum(1)", "(a.norm(dim=1) * d.norm(dim=1))", "cosine"),
        ("d.square().sum(1)", "d.norm(dim=1)", "A root too many: squares are asked for,"),
        ("(x_sub - mean_uncond)", "x_sub", "`mean_uncond` is missing: subtract it."),
        (" / d.square().sum(1)", "", "It is not divided by"),
        ("(x_sub - mean_uncond)", "(x_sub - mean_class)", "measured it from the class"),
        ("(mean_class - mean_uncond)", "(mean_uncond - mean_class)", "reversed"),
        ("d.square().sum(1)", "a.square().sum(1)", "You exchanged `x_sub` and `mean_class`."),
        ("(a * d).sum(1) / d.square().sum(1)", "(a * d).sum() / d.square().sum()", "whole batch"),
    ],
    "rho_depends": [
        ('"d"', '"a"', "both have 1 / (2 sigma_t^2)"),
        ('"d"', '"b"', "multiplies L_sude and tau_t alike"),
        ('"d"', '"c"', "affine map"),
        ('"d"', "4", "one of the letters a, b, c, d"),
    ],
    "hinge": [
        ("-2 * tau", "-tau", "`tau` counts half: a 2 divides that"),
        (".clamp(min=0)", "", "`.clamp(...)` is missing at `(1 - rho)`."),
        ("1 - rho", "rho - 1", "A sign is turned: `1` minus `rho` is"),
        ("-2 * tau", "2 * tau", "A minus is missing before `2`."),
        ("(1 - rho).clamp(min=0)", "(1 - rho).clamp(min=0) ** 2", "You squared it"),
        ("(1 - rho).clamp(min=0)", "(rho < 1)", "how far it is"),
        ("-2 * tau * ", "", "The factor `-2 * tau` is missing."),
    ],
    "settle": [
        ("(loss > tau)[:, None]", "1", "It never stops"),
        ("        loss =",
         "        if _ > 0:\n"
         "            s = s - 0.02 * (2 * (s - eps_target) - 2 * weight_sude * gate * d)\n"
         "            continue\n        loss =",
         "gates were set before the first step"),
        ("(loss > tau)", "(loss <= tau)", "The gate is the wrong way round"),
        ("range(300)", "range(10)", "more steps, or a smaller learning rate"),
        ("- 2 * weight_sude", "+ 2 * weight_sude", "wrong way"),
        ("2 * (s - eps_target) - ", "-", "all the way to rho = 1"),
        ("(s - eps_target)", "(s - eps_class)", "moved across d"),
        ("2 * weight_sude", "2 * 0.8", "`weight_sude` makes no difference: is"),
        ("2 * weight_sude * ", "2 * ", "w_s is not used"),
        ("2 * weight_sude", "4 * weight_sude", "w_s counts twice"),
        ("2 * weight_sude", "weight_sude", "w_s counts half"),
        ("(loss > tau)[:, None]", "loss.mean() > tau.mean()", "averaged over the batch"),
        ("s = s - 0.02", "s = s + 0.02", "It runs away"),
    ],
    "lora_count": [
        ("rank * (out + into)", "out * into", "Those are the layers themselves"),
        ("rank * (out + into)", "rank * out * into", "You multiplied `out` and `into`: add"),
        ("(out + into)", "into", "`out` is missing: add it."),
        ("(out + into)", "out", "`into` is missing: add it."),
        ("rank * (out + into)", "out + into", "The factor `rank` is missing."),
    ],
    "must_keep": [
        ('"b"', '"a"', "running mean of squared gradients"),
        ('"b"', '"c"', "follows from (seed, k) alone"),
        ('"b"', '"d"', "in the weights already"),
    ],
    "latent_batch": [
        ("randn(size, *mean", "randn(*mean", "`size` makes no difference: is it used,"),
        ("size, *mean.shape, g", "1, *mean.shape, g", "`size` is not used."),
        ("torch.randn(size, *mean.shape, generator=generator)",
         "torch.randn(mean.shape, generator=generator).expand(size, -1, -1, -1)",
         "All samples got the same noise"),
        ("deviation * noise", "deviation**2 * noise", "You squared `deviation`, which stands"),
        ("deviation * noise", "deviation.sqrt() * noise",
         "You took the root of `deviation`, which"),
        ("deviation * noise", "noise", "The factor `deviation` is missing."),
        ("mean + deviation * noise", "deviation * noise", "`mean` is missing: add it."),
    ],
    "smoothed": [
        (" / (1 - decay**k)", "", "It is not divided by `1 - decay**k` yet."),
        ("decay * mean + (1 - decay) * loss", "(1 - decay) * mean + decay * loss", "exchanged"),
        ("torch.zeros(())", "losses[0]", "Start at 0, not at the first loss."),
        ("return torch.stack(curve)", "return curve[-1]", "the whole curve"),
        ("mean = decay * mean + (1 - decay) * loss\n        curve.append(mean / (1 - decay**k))",
         "mean = mean + loss\n        curve.append(mean / k)",
         "early ones should fade"),
    ],
    "batch_loss": [
        ("(sude > tau) * sude", "sude", "`sude > tau` is not looked at: here it"),
        ("sude > tau", "sude <= tau", "wrong way round"),
        ("weight_sude * (sude", "(sude", "The factor `weight_sude` is missing."),
        ("square().mean(1)", "square().sum(1)", "You summed over the dimensions: a mean"),
        ("* sude).mean()", "* sude)", "`.mean(...)` is missing at `(learn +"),
        (".detach()", ".clone()", "the bar over theta"),
        ("learn + ", "", "`learn` is missing: add it."),
    ],
    "sude_step": [
        ("return loss.detach()", "return 2 * loss.detach()", "`loss` counts twice"),
        ("prior(x_t, t)", "prior(x_0, t)", "You took `x_0` in the place of `x_t`."),
        ("eps_class, eps_null = prior", "eps_null, eps_class = prior", "you exchanged them"),
        ("eps, weight_sude)", "eps, 0.0)", "SuDe does nothing here"),
        ("    optimizer.zero_grad()\n", "", "optimizer.zero_grad()"),
        ("    optimizer.step()\n", "", "Nothing moved"),
        ("loss.backward()", "(-loss).backward()", "It climbs"),
    ],
    "by_weight": [
        ('table[table["attribute"].notna()]', "table", "Rows without an attribute"),
        (".mean().unstack()", ".sum().unstack()", "You took a sum: a mean is asked for."),
        (".unstack()", ".unstack().T", "Subjects go in rows"),
        ("[measure]", '["attribute_alignment"]', "another column"),
        (".unstack()", "", "A pandas DataFrame is expected"),
        ('["attribute"].notna()', '["seed"] == 0', "should be"),
    ],
    "paired_gains": [
        (".sub(means[0.0], axis=0)", ".rsub(means[0.0], axis=0)", "Plain minus SuDe"),
        ("means[0.0], axis=0", "means[0.0].mean()", "compared with itself"),
        (".drop(columns=0.0)", "", "`.drop(...)` is missing at `means`."),
        (".sub(", ".div(", "Those are ratios"),
    ],
    "cluster_interval": [
        ("pd.factorize(subjects)[0]", "np.arange(len(values))", "You drew single values"),
        ("[0.025, 0.975]", "[0.05, 0.95]", "90 % interval"),
        ("sums[drawn].sum(1) / counts[drawn].sum(1)", "(sums / counts)[drawn].mean(1)",
         "averaged every subject first"),
        ("[0.025, 0.975]", "[0.975, 0.025]", "In the wrong order: `[0.025, 0.975]` is"),
        ("return np.quantile(means, [0.025, 0.975])", "return means", "Return two numbers"),
    ],
    "front": [
        ("~(as_good", "(as_good", "Not these, all but `(as_good &"),
        ("(x[None] > x[:, None]) | ", "(x[None] > x[:, None]) & ", "better in both"),
        (" & better", "", "it does not beat itself"),
        ("y[None] >= y", "y[None] <= y", "The wrong way round: `y[None] >= y[:,"),
        ("(as_good & better)", "(as_good & ~torch.eye(len(x), dtype=torch.bool))",
         "do not beat each other"),
    ],
    "best_weight": [
        (".where(allowed)", "", "The rule is missing"),
        ("fidelity.ge(keep * fidelity[0.0], axis=0)", "fidelity >= keep * fidelity[0.0].mean()",
         "the subject's own fidelity"),
        (".idxmax(axis=1)", ".max(axis=1)", "its w_s is asked for"),
        ("where(allowed).idxmax", "where(allowed).iloc[:, ::-1].idxmax", "take the smallest"),
    ],
    "naive_and_honest": [
        ("gains.mean(2).amax(1)", "gains.amax(1)", "`.mean(...)` is missing at `gains`."),
        ("gains.mean(2).amax(1).mean()", "gains.mean()", "`.amax(...)` is missing at"),
        ("others.argmax(1), k]", "gains.mean(2).argmax(1), k]",
         "`left_out` is missing: subtract it."),
        ("others.argmax(1), k]", "gains[:, :, k].argmax(1), k]",
         "You took `left_out` in the place of"),
        ("gains[subjects, others.argmax(1), k]", "others.amax(1)",
         "You took `others` in the place of"),
        ("others.argmax(1), k]", "others.mean(0).argmax(), k]", "one w_s for all"),
        ("return naive, honest", "return honest, naive", "In the wrong order: `naive,"),
        ("return naive, honest", "return honest", "Return two numbers"),
    ],
    "loss_along": [
        ("2 * s * square", "s * square", "The factor `2` is missing."),
        (" - 2 * s", " + 2 * s", "You added `2 * s * square`: subtract it."),
        ("2 * s * square", "2 * s * square.sqrt()", "You took the root of `square`, which"),
        ("return square - 2", "return -2", "`square` is missing, from which `2 * (a"),
        ("- 2 * s * square", "- 2 * s * square + s**2 * square", "two squares of s cancel"),
    ],
    "shifted": [
        ("(2 * r - 1)", "r", "Not r tau"),
        ("(2 * r - 1)", "(1 - 2 * r)", "A sign is turned: `2 * r` minus `1` is"),
        ("(2 * r - 1)", "2 * r", "`1` is missing: subtract it."),
        ("(2 * r - 1)", "r**2", "not squared"),
        ("(2 * r - 1) * ", "", "The factor `2 * r - 1` is missing."),
    ],
    "at_half": [
        ('"c"', '"a"', "That is r = 1"),
        ('"c"', '"b"', "One half plays no part: eq. 5 compares"),
        ('"c"', '"d"', "That is r = 0"),
    ],
    "end_rho": [
        ("(r - rho)", "(1 - rho)", "You stopped at rho = 1"),
        ("min=0, ", "", "`min=0` is missing."),
        (", max=weight_sude", "", "`max=weight_sude` is missing."),
        ("(r - rho).clamp(min=0, max=weight_sude)", "weight_sude", "without truncation"),
        ("return rho + ", "return ", "`rho` is missing: add it."),
    ],
    "rest": [
        ("torch.where(pull < 1, end, torch.inf)", "end", "Where w_s kappa >= 1 each step makes"),
        ("weight_sude * share", "weight_sude * 0", "`weight_sude` is lost: nothing of it is"),
        ("(1 - share) * class_0", "class_0", "The factor `1 - share` is missing."),
        ("/ (1 - pull)", "/ (1 + pull)", "You added `pull`: subtract it."),
        ("(1 - share) * class_0) / (1 - pull)",
         "(1 - share) ** 2 * class_0)\n"
         "    end = end / (1 + weight_sude * (1 - share) ** 2 - weight_sude)",
         "treats it as a constant"),
    ],
    "tuned": [
        ('prior == "current"', 'prior != "current"', "The wrong way round: `prior =="),
        ("c + share * move", "c", "c stays where it was"),
        ("c + share * move", "c + move", "The factor `share` is missing."),
        (" | (not truncated)", " | True", "gates stand open"),
        ("-d.square()", "-class_0.square()", "You took `class_0` in the place of `d`."),
        ("gate[:, None] * d)", "gate[:, None] * (d - s))", "s^2 cancels"),
    ],
    "paper_prompt": [
        ('{article(attribute)} {attribute}"', 'a {attribute}"', "before a vowel"),
        ('"P2": f"photo of {its} {{S*}} and it is {article(category)} {category}"',
         '"P2": f"photo of {its} {{S*}} {category}"',
         "That is P1, and P2 was asked for"),
        ('"P3": f"photo of a {{S*}} and it is {its} {category}"',
         '"P3": f"photo of {its} {{S*}} and it is a {category}"',
         "That is P2, and P3"),
        ("{{S*}} {category}", "{category}", "The subject is missing"),
    ],
    "combined": [
        ("[(a, b) for a in attributes for b in backgrounds]", "zip(attributes, backgrounds)",
         "You paired them off"),
        ("for a in attributes for b in backgrounds", "for b in backgrounds for a in attributes",
         "another order"),
        ("{article(a)}", "a", "before a vowel"),
        ("{{S*}} ", "", "The subject is missing"),
        ("{category} ", "", "The category is missing"),
    ],
    "must_know": [
        ('"b"', '"a"', "the gradient finds what is trained"),
        ('"b"', '"c"', "with its own prompt"),
        ('"b"', '"d"', "adds the losses"),
    ],
    "keys_and_values": [
        ('"attn2.to_k" in name or "attn2.to_v" in name', '"to_k" in name or "to_v" in name',
         "attn1 is self-attention"),
        ('"attn2.to_k" in name or "attn2.to_v" in name', '"attn2" in name',
         "The whole cross-attention"),
        (' or "attn2.to_v" in name', "", "Only the keys learn"),
        ("p.requires_grad_(", "bool(", "Everything learns"),
        (" if p.requires_grad", "", "counts the whole UNet"),
        ("p.numel()", "1", "how many tensors"),
    ],
    "given_back": [
        ("gained.sum() / lost.sum()", "(gained / lost).mean()", "You averaged ratios"),
        ("gained.sum() / lost.sum()", "lost.sum() / gained.sum()", "Upside down"),
        ("gained.sum() / lost.sum()", "gained.mean()", "relative to what was lost"),
        ("gained.sum() / lost.sum()", "gained / lost", "One number for the method"),
    ],
    "plug": [
        (" * (loss > tau)", "", "The gate is missing"),
        ("loss > tau", "loss <= tau", "wrong way round"),
        ("with torch.no_grad()", "with torch.enable_grad()", "flows through the predictions"),
        (".mean(1)", ".sum(1)", "You summed over the dimensions: a mean"),
        ("return loss *", "return (loss - tau) *", "That is the hinge"),
        ("(x_t, t, class_embeds)", "(x_t, t, uncond_embeds + 0 * class_embeds)",
         "You asked without a prompt twice: once"),
    ],
    "judged_text": [
        ('.replace("{S*}", category)', "", "{S*} is still there"),
        ('.replace(f"{{S*}} {category}", category)', "", "stands there twice"),
        ('prompt.replace(f"{{S*}} {category}", category).replace("{S*}", category)',
         'prompt.replace("{S*} ", "")',
         "nobody says what it is"),
        ('prompt.replace(f"{{S*}} {category}", category).replace("{S*}", category)',
         'prompt.replace("{S*}", "")',
         "Two spaces"),
    ],
    "image_score": [
        ("axis=1", "axis=0", "You normalised the columns"),
        (" / np.linalg.norm(references, axis=1, keepdims=True)", "", "It is not divided by"),
        (".mean(1)", ".max(1)", "nearest reference"),
        (".mean(1)", "", "`.mean(...)` is missing at `(p @ r.T)`."),
        (".mean(1)", ".mean()", "You took `.mean` of the whole batch at"),
        ("(p @ r.T).mean(1)", "(pictures @ references.T).mean(1)", "inner products"),
    ],
    "fooled": [
        ('"b"', '"a"', "compares with the prompt"),
        ('"b"', '"c"', "notice small things"),
        ('"b"', '"d"', "fooled completely"),
    ],
    "paired_interval": [
        ("a - b", "b - a", "A sign is turned: `a` minus `b` is"),
        ("a - b", "a", "`b` is missing: subtract it."),
        ("[0.025, 0.975]", "[0.975, 0.025]", "In the wrong order: `[0.025, 0.975]` is"),
        ("gains[drawn].mean(1)",
         "a[drawn].mean(1) - b[rng.integers(len(b), size=drawn.shape)].mean(1)",
         "draw pairs, both of a subject at once"),
    ],
    "spearman": [
        ("pd.Series(x).rank()", "x", "correlation of the values"),
        ("pd.Series(x).rank()", 'x.argsort(kind="stable")', "not yet the rank"),
        ("pd.Series(x).rank()", 'pd.Series(x).rank(method="first")',
         "Equal values must share a rank: their"),
    ],
    "detects": [
        ("ddof=1", "ddof=0", "`ddof=1` is missing."),
        ("runs.mean(2)", "runs[:, :, 0]", "one seed of each subject"),
        (" / np.sqrt(subjects)", "", "It is not divided by"),
        ("of_subjects = runs.mean(2)", "of_subjects = runs.reshape(400, -1)\n    subjects *= seeds",
         "runs for independent"),
        ("> 0).mean()", "> 0).sum()", "You took a sum: a mean is asked for."),
    ],
    "hinge_gradient": [
        ("return -d", "return d", "A minus is missing before `d`."),
        (" * (rho < 1)[:, None]", "", "`rho < 1` is not looked at: here it"),
        (" / variance[:, None]", "", "It is not divided by `variance[:,"),
        ("variance[:, None]", "variance[:, None].sqrt()", "You took the root of `variance`, which"),
        ("variance[:, None]", "variance", "`[:, None]` is missing at `variance`."),
        ("(rho < 1)", "(1 - rho).clamp(min=0)", "a straight line"),
        ("rho < 1", "rho >= 1", "wrong way round"),
    ],
    "corrected": [
        ("(1 - rho).clamp(min=0) * d", "d", "The factor `(1 - rho).clamp(min=0)` is"),
        (".clamp(min=0)", "", "`.clamp(...)` is missing at `(1 - rho)`."),
        ("strength * ", "", "The factor `strength` is missing."),
        ("clamp(min=0) * d", "clamp(min=0) * d / d.norm(dim=1, keepdim=True)",
         "The value at [0, 0] is -2.3162 and"),
        ("return a + ", "return ", "`a` is missing: add it."),
        ("strength * (1 - rho).clamp(min=0) * d", "strength * (rho < 1) * (d - a)",
         "You walked towards the point d"),
    ],
    "through_guidance": [
        ('"b"', '"a"', "Guidance multiplies"),
        ('"b"', '"c"', "only u_sub is corrected"),
        ('"b"', '"d"', "the *change* of the result"),
    ],
    "after_steps": [
        ("(1 - strength) ** n", "(1 - n * strength)", "a share of what is *left*"),
        ("(1 - strength) ** n", "strength**n", "What is left after a step is 1 - g of"),
        (" ** n", "", "The exponent `n` is missing."),
        ("torch.where(rho < 1, 1 - left, rho)", "1 - (1 - strength) ** n * (1 - rho)",
         "`rho < 1` is not looked at: here it"),
        ("1 - left, rho", "left, rho", "what is left to the gate"),
    ],
    "at_fidelity": [
        ("fidelity[::-1], alignment[::-1]", "fidelity, alignment", "needs growing x"),
        ("np.interp(goal, fidelity[::-1], alignment[::-1])",
         "alignment[abs(fidelity - goal).argmin()]",
         "nearest strength"),
        ("np.interp(goal, fidelity[::-1], alignment[::-1])", "alignment.max()",
         "whatever it costs"),
        ("fidelity[::-1], alignment[::-1]", "fidelity[[-1, 0]], alignment[[-1, 0]]",
         "one line through first and last"),
    ],
    "drawn": [
        ("to_x_0(eps, x", "to_x_0(eps_sub, x", "You took `eps_sub` in the place of `eps`."),
        ("add_noise(x_0, eps, ", "add_noise(x_0, eps_sub, ",
         "You took `eps_sub` in the place of `eps`."),
        ("eps = eps_null + corrected", "eps = corrected", "`eps_null` is missing: add it."),
        (", strength)\n", ", 0.0)\n", "plain sampling"),
        ("t - 1, schedule)", "t, schedule)", "`1` is missing: subtract it."),
    ],
    "best_kept": [
        ("alignment[fidelity >= goal].max()", "alignment[abs(fidelity - goal).argmin()]",
         "nearest to `goal`"),
        (".max()", "[-1]", "a weaker one may align better"),
        ("alignment[fidelity >= goal].max()", "alignment.max()", "whatever it keeps"),
        (">= goal", "<= goal", "The wrong way round"),
    ],
    "registered": [
        ('"c"', '"a"', "What is help"),
        ('"c"', '"b"', "chosen after looking"),
        ('"c"', '"d"', "have been looked at"),
    ],
    "area": [
        ("fidelity[::-1], alignment[::-1]", "fidelity, alignment", "growing x"),
        (".mean()", ".mean() * (high - low)", "divided by its width"),
        ("    return np.interp", "    return 0.5 * np.interp", "counts half"),
    ],
    "covers": [
        (" / np.sqrt(studies.shape[1])", "", "s / sqrt(n)"),
        ("ddof=1", "ddof=0", "divides by n - 1"),
        ("<= half).mean()", "> half).mean()", "how often it misses"),
        (" - truth", "", "holds 0"),
    ],
    "decided": [
        ("if low > 0", "if gains.mean() > 0", "The mean alone decides nothing"),
        ('"no difference" if -margin < low and high < margin else "cannot tell"',
         '"no difference"', "no proof of no difference"),
        ("-margin < low and high < margin", "abs(gains.mean()) < margin", "is not enough"),
        (" / np.sqrt(len(gains))", "", "s / sqrt(N)"),
    ],
    "sign_flip": [
        ("abs((signs * gains).mean(1))", "(signs * gains).mean(1)", "Both directions count"),
        (">= abs(gains.mean()) - 1e-12", "> abs(gains.mean()) + 1e-12", "As far counts, too"),
        ("- 1e-12).mean()", "- 1e-12).sum()", "how many"),
    ],
    "as_ddpm": [
        (".sqrt()", "", "a root is missing"),
        ("x_s / length", "x_s * length", "You multiplied by"),
        ("length[:, None]", "(1 - s)[:, None]", "the length of both parts"),
        ("length[:, None]", "length", "`[:, None]` is missing"),
    ],
    "velocity": [
        ("(eps - x_s)", "(x_s - eps)", "A sign is turned: `eps` minus `x_s`"),
        (" / (1 - s)[:, None]", "", "x_s is not x_0"),
        ("(1 - s)[:, None]", "s[:, None]", "Divide by what is left of the picture"),
        ("return (eps - x_s)", "return (x_s - s[:, None] * eps)", "That is x_0 itself"),
    ],
    "same_number": [
        ('"b"', '"a"', "smaller by just that"),
        ('"b"', '"c"', "(1 - s)^2 in v"),
        ('"b"', '"d"', "rho is the same"),
    ],
    "flow_weight": [
        ("(there - here)", "(here - there)", "A sign is turned: the SNR"),
        ("s**2 / 2", "near**2 / 2", "you squared `near`"),
        ("s**2 / 2 *", "0.5 *", "a network that says x_0"),
        ("s**2 / 2 * (there - here)", "(there / here - 1) / 2", "the weight in noises"),
    ],
    "noisy_step": [
        ("eta**2", "eta", "its square the variance"),
        ("(near**2 - variance) ** 0.5", "near", "less of the old may stay"),
        ("(near**2 - variance) ** 0.5", "(near - variance**0.5)", "not deviations"),
        (" + variance**0.5 * z", "", "z"),
        ("(1 - near) * x_0", "(1 - s) * x_0", "You took `s` in the place of `near`."),
    ],
    "euler": [
        ("(near - s)", "(s - near)", "the wrong way"),
        ("field(x, s)", "field(x, near)", "where the step begins"),
        ("pairwise(times)", "pairwise(times[:-1])", "The last step is missing"),
        ("x = x +", "x =", "Each step is added"),
    ],
}  # fmt: skip


def source(cell: Notebook) -> str:
    return "".join(cell["source"])


def read(name: str) -> list[Notebook]:
    return json.loads(SOURCES[NAMES.index(name)].read_text(encoding="utf-8"))["cells"]


def info(cell: Notebook) -> dict[str, Any]:
    return cell["metadata"].get("nbgrader", {})


def emptied(text: str) -> str:
    """A student's copy of a cell, by rules of our own."""
    stub = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()\n"
    return HIDDEN.sub("", SOLUTION.sub(stub, text)).rstrip("\n")


def tasks(cells: list[Notebook]) -> Iterator[tuple[Notebook, Notebook, Notebook]]:
    """Every task's card, answer and check, which follow each other."""
    for place, cell in enumerate(cells):
        if info(cell).get("solution"):
            yield cells[place - 1], cell, cells[place + 1]


TASKS = {info(a)["grade_id"]: name for name in NAMES for _, a, _ in tasks(read(name))}


@pytest.fixture(scope="module")
def before() -> dict[str, tuple[dict[str, Any], str, str]]:
    """Every task's names so far, with the tasks before it solved; its answer; its check."""
    found = {}
    for name in NAMES:
        cells = read(name)
        names: dict[str, Any] = {"__name__": "notebook"}
        exec(next(source(c) for c in cells if info(c).get("grade_id") == "setup"), names)
        for _, answer, check in tasks(cells):
            found[info(answer)["grade_id"]] = dict(names), source(answer), source(check)
            exec(source(answer), names)
    return found


def hand_in(
    task: tuple[dict[str, Any], str, str],
    change: Callable[[str], str] = str,
    *,
    graded: bool = True,
) -> None:
    """Run an answer and its check, with the hidden tests or as a student runs it."""
    names, answer, check = task
    names = dict(names)
    exec(change(answer), names)
    exec(check if graded else HIDDEN.sub("", check), names)


def message(task: tuple[dict[str, Any], str, str], old: str, new: str, **how: bool) -> str:
    """What is said of a changed answer, which must be wrong."""
    assert old in task[1]
    with pytest.raises(Mistake) as caught:
        hand_in(task, lambda text: text.replace(old, new), **how)
    return str(caught.value)


# --- every task ----------------------------------------------------------------------------------


CHOICES = {
    task
    for task, slips in SLIPS.items()
    if all(re.fullmatch('"[a-d]"', old) for old, _, _ in slips)
}
CHECKS: dict[str, Check] = {
    task: getattr(exercises, f"check_{task}") for task in TASKS.keys() - CHOICES
}


def test_every_task_has_slips_and_every_check_a_task() -> None:
    assert set(SLIPS) == set(TASKS)
    assert all(len(slips) >= 2 for slips in SLIPS.values())
    checks = {name.removeprefix("check_") for name in dir(exercises) if "check_" in name}
    assert checks == set(CHECKS) | {"letter"}
    table = (PACKAGE / "slips.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^\[(\w+)\]$", table, re.M)) <= set(CHECKS)


@pytest.mark.parametrize("task", TASKS)
def test_the_solution_passes(task: str, before: dict[str, Any]) -> None:
    hand_in(before[task])


@pytest.mark.parametrize("task", TASKS)
def test_the_stub_fails(task: str, before: dict[str, Any]) -> None:
    with pytest.raises((Mistake, NotImplementedError)) as caught:
        hand_in(before[task], emptied)
    if caught.type is Mistake:
        assert "Still to be written" in str(caught.value)
    else:
        assert f'# {task} = "the letter"' in emptied(before[task][1])


@pytest.mark.parametrize(
    ("task", "old", "new", "says"),
    [(task, *slip) for task, slips in SLIPS.items() for slip in slips],
    ids=[f"{task}-{number}" for task, slips in SLIPS.items() for number in range(len(slips))],
)
def test_a_slip_is_called_by_its_name(
    task: str, old: str, new: str, says: str, before: dict[str, Any]
) -> None:
    """At once, where the student sees it; the letter of a choice when it is graded."""
    assert says in message(before[task], old, new, graded=task in CHOICES)


@pytest.mark.parametrize("name", NAMES)
def test_of_fifteen_typical_wrong_answers_twelve_are_named(
    name: str, before: dict[str, Any]
) -> None:
    """All are found wrong by the check that the student sees; see `wrong_answers`."""
    assert len(WRONG[name]) == 15
    said = [
        (message(before[task], old, new, graded=False), pattern)
        for task, old, new, pattern in WRONG[name]
    ]
    unnamed = [(words, want) for words, want in said if not re.search(want, words, re.I)]
    assert len(unnamed) <= 3, unnamed


@pytest.mark.parametrize("task", sorted(CHECKS))
def test_every_row_of_the_table_is_told_apart(task: str) -> None:
    """What is listed is wrong, and no other sentence comes before its own."""
    check = CHECKS[task]
    for change, says in slips_of(task):
        if "->" in change:
            with pytest.raises(Mistake) as caught:
                check(made(check.right, changed(source_of(check.right), change)))
            assert str(caught.value) == says


@pytest.mark.parametrize("task", sorted(CHECKS))
def test_no_number_of_ones_own_passes(task: str) -> None:
    """No argument may stand in the answer as the number that a first try happened to have."""
    check = CHECKS[task]
    calls = check.calls()
    if task == "keys_and_values" or len(calls[0]) != len(inspect.signature(check.right).parameters):
        pytest.skip("its check makes the arguments itself")
    for k, value in enumerate(calls[0]):
        if not isinstance(value, int | float | str):
            continue

        def answer(*call: Any, k: int = k, value: Any = value) -> Any:
            return check.right(*call[:k], value, *call[k + 1 :])

        with pytest.raises(Mistake):
            check(answer)


OTHER_WORDS: list[tuple[str, str]] = [
    ("noised", "lambda x, e, a: (torch.einsum('b,bchw->bchw', a**0.5, x)"
     " + torch.einsum('b,bchw->bchw', (1 - a) ** 0.5, e)).float()"),
    ("even_time", "lambda a: int(torch.argmax((1 - a > a).int()))"),
    ("open_share", "lambda rho: sum(float(r) < 1 for r in rho) / len(rho)"),
    ("log_density", "lambda x, m, v: torch.distributions.Normal(m.flatten(1), v[:, None].sqrt())"
     ".log_prob(x.flatten(1)).sum(1)"),
    ("log_ratio", "lambda x, c, u, v: (((x - u) ** 2).sum(1) - ((x - c) ** 2).sum(1)) / v / 2"),
    ("chain", "lambda last, news: torch.stack([last + news[k:].sum(0) for k in range(len(news))])"),
    ("sude", "lambda x, c, u, v: ((u.detach() - c.detach()) * (2 * x - c.detach() - u.detach()))"
     ".flatten(1).sum(1) / (2 * v)"),
    ("along", "lambda a, d: (torch.einsum('bi,bi->b', a, d) / d.norm(dim=1) ** 2)[:, None] * d"),
    ("truncated", "lambda loss, tau: torch.where(loss > tau, loss, 0.0)"),
    ("truncated", "lambda loss, tau: loss * (loss.detach() > tau.detach()).double()"),
    ("hinge", "lambda tau, rho: 2 * tau.abs() * torch.relu(1 - rho)"),
    ("settle", "lambda t, c, u, w: t + (1 - ((t - u) * (c - u)).sum(1) / ((c - u) ** 2).sum(1))"
     ".clamp(0, w)[:, None] * (c - u)"),
    ("lora_count", "lambda layers, rank: rank * torch.tensor(layers).sum()"),
    ("smoothed", "lambda x, d: torch.stack([sum(d ** (k - j) * (1 - d) * x[j] for j in range(k + 1)"
     ") / (1 - d ** (k + 1)) for k in range(len(x))])"),
    ("by_weight", "lambda t, m: t.dropna(subset='attribute').pivot_table(index='subject',"
     " columns='weight_sude', values=m).iloc[::-1, ::-1]"),
    ("front", "lambda x, y: [not any(bool((p >= a) & (q >= b) & ((p > a) | (q > b)))"
     " for p, q in zip(x, y)) for a, b in zip(x, y)]"),
    ("cluster_interval", "lambda v, s, rng: sorted(np.quantile([np.concatenate([v[s == c] for c in"
     " rng.choice(np.unique(s), len(np.unique(s)))]).mean() for _ in range(10_000)],"
     " [0.025, 0.975]))"),
    ("shifted", "lambda tau, r: tau - 2 * tau * (1 - r)"),
    ("end_rho", "lambda rho, w, r: torch.maximum(rho, torch.minimum(rho + w, torch.tensor(r)))"),
    ("given_back", "lambda lost, gained: float(gained.mean() / lost.mean())"),
    ("image_score", "lambda p, r: np.array([np.mean([x @ y / np.sqrt(x @ x) / np.sqrt(y @ y)"
     " for y in r]) for x in p])"),
    ("spearman", "lambda a, b: pd.DataFrame({'a': a, 'b': b}).rank().corr().iloc[0, 1]"),
    ("after_steps", "lambda rho, g, n: torch.stack([r if r >= 1 else 1 - (1 - r) * (1 - g) ** n"
     " for r in rho])"),
    ("at_fidelity", "lambda a, f, goal: np.interp(-goal, -f, a)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "words"), OTHER_WORDS, ids=[f"{t}-{n}" for n, (t, _) in enumerate(OTHER_WORDS)]
)
def test_a_right_answer_in_other_words_passes(
    task: str, words: str, before: dict[str, Any]
) -> None:
    names = "import numpy as np\nimport pandas as pd\nimport torch\n"
    hand_in(before[task], lambda _: f"{names}{task} = {words}")


def _bayes(x_prev: Any, means: Any, variance: Any, prior: Any) -> Any:
    return class_log_posterior(x_prev, means, variance, prior.log())


def _hinged(tau: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """The library's hinge of one number whose d is 1, so that tau is -1 / (2 sigma^2)."""
    one, null = torch.ones(len(rho), 1).double(), torch.zeros(len(rho), 1).double()
    return losses.hinge_loss(rho[:, None], one, null, -1 / (2 * tau))


def _slope(of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def slope(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        leaf = first.clone().requires_grad_()
        return torch.autograd.grad(of(leaf, *rest).sum(), leaf)[0]

    return slope


LIBRARY: dict[str, Callable[..., Any]] = {
    "log_density": reverse_log_prob,
    "log_ratio": class_log_ratio,
    "log_posterior": _bayes,
    "sude": losses.sude_loss,
    "push": lambda *means: -_slope(losses.sude_loss)(*means),
    "threshold": losses.sude_threshold,
    "truncated": losses.truncate,
    "rho": losses.guidance_projection,
    "hinge": _hinged,
    "hinge_gradient": _slope(
        lambda a, d, variance: losses.hinge_loss(a, d, torch.zeros_like(d), variance)
    ),
    "loss_along": lambda a, d, s: losses.sude_loss(
        a + s[:, None] * d, d, torch.zeros_like(d), torch.full_like(s, 0.5)
    ),
    "paper_prompt": lambda structure, attribute, category: structured(
        structure, category, attribute
    ),
    "judged_text": caption,
    "image_score": image_similarity,
}


@pytest.mark.parametrize("task", LIBRARY)
def test_what_counts_as_right_is_what_the_library_says(task: str) -> None:
    CHECKS[task](LIBRARY[task])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_right_plug_is_the_library_s_regulariser(seed: int) -> None:
    from sude_lab.sude import SudeRegularizer

    def plug(unet: Any, x_t: Any, t: Any, prediction: Any, dog: Any, nothing: Any) -> Any:
        schedule, how = exercises.short_schedule(), {"prior": "current", "weighting": "simple"}
        regularizer = SudeRegularizer(unet, schedule, dog[:1], nothing[:1], **how)
        return regularizer.terms(x_t, t, prediction).gated

    CHECKS["plug"](plug, seed=seed)


@pytest.mark.parametrize("task", sorted(CHOICES))
def test_trying_all_letters_wins_nothing(task: str, before: dict[str, Any]) -> None:
    """A student's copy takes any letter, and neither it nor the package knows which is right."""
    names, answer, check = before[task]
    for letter in "abcd":
        hand_in((names, f"{task} = {letter!r}", check), graded=False)
    with pytest.raises(Mistake, match="one of the letters a, b, c, d"):
        hand_in((names, f"{task} = 4", check), graded=False)
    assert "Right" not in HIDDEN.sub("", check)
    right = re.search('"([a-d])"', answer)[1]
    passed = []
    for letter in "abcd":
        with contextlib.suppress(Mistake):
            hand_in((names, f"{task} = {letter!r}", check))
            passed.append(letter)
    assert passed == [right]
    package = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.*"))
    for sentence in re.findall('"([^"]{20,})"', HIDDEN.search(check)[0]):
        assert sentence not in package


# --- what judges ---------------------------------------------------------------------------------


def test_a_mistake_is_shown_without_a_traceback() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.append((kind, lines))
    result = shell.run_cell("from sude_lab.exercises import Mistake\nraise Mistake('Look again.')")
    assert not result.success
    assert [kind for kind, _ in shown] == [Mistake]
    assert shown[0][1] == ["\x1b[31mNot yet.\x1b[0m Look again."]


def test_an_error_in_an_answer_keeps_its_traceback() -> None:
    def answer(x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(7)

    with pytest.raises(RuntimeError, match="size"):
        ask(answer, (torch.ones(3),))


def test_an_answer_cannot_spoil_what_it_is_given() -> None:
    x = torch.ones(3)
    assert ask(lambda y: y.mul_(2), (x,)).tolist() == [2, 2, 2]
    assert x.tolist() == [1, 1, 1]


def thirds(x: torch.Tensor) -> torch.Tensor:
    """A right answer to be asked for."""
    return x / 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: None, "returns nothing"),
        (3, "the function itself"),
        (lambda x: "three", "a str"),
        (lambda x: x[:2] / 3, "The shape (3,) is expected, yours is (2,)"),
        (lambda x: x.sum() / 3, "You summed over the batch"),
        (lambda x: x * 3, "You multiplied by `3`: divide."),
        (lambda x: x, "It is not divided by `3` yet."),
        (lambda x: -x / 3, "The sign of `x` is turned."),
        (
            lambda x: x / 3 + torch.tensor([0.0, 0.0, 0.5]),
            "at [2] is 0.83333 and should be 0.33333",
        ),
        (lambda x: x * float("nan"), "at [0] is nan"),
    ],
)
def test_what_is_said_of_a_wrong_answer(answer: Any, says: str) -> None:
    check = Check(right=thirds, draws=lambda _: (torch.ones(3),))
    check(lambda x: x.float() / 3)
    with pytest.raises(Mistake) as caught:
        check(answer)
    assert says in str(caught.value)


def test_a_slip_must_fit_every_call() -> None:
    """A wrong answer that is like a slip by chance, in one call, is not called by its name."""
    check = Check(right=thirds, draws=lambda draw: (torch.full((3,), 1.0 + draw.seed),))
    with pytest.raises(Mistake, match="should be"):
        check(lambda x: torch.ones(3))  # of ones that is `x`, not divided yet


def summed(x):
    """Return the sum of every row."""
    return x.sum(1)


def test_measures_are_tried_in_the_order_of_the_table() -> None:
    """A wrong answer may be two of them at once: what is said must be the same in every run."""
    order = [says for _, says in slips_of("a measure")]
    assert order[:3] == ["a sum", "a mean", "a median"]
    said = [says for says, _ in one_change_slips(summed)]
    tried = [says for says in said if re.fullmatch(r"You took .*: a sum is asked for\.", says)]
    assert tried == [f"You took {that}: a sum is asked for." for that in order[1:]]


def test_a_table_may_come_in_any_order_and_must_be_a_table() -> None:
    right = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}, index=["a", "b"])
    value = judging.read(right, right)
    assert same(judging.read(right.loc[["b", "a"], ["y", "x"]], right), value)
    with pytest.raises(Mistake, match="A pandas DataFrame is expected, not a Series"):
        judging.read(right["x"], right)
    assert "The shape (2, 2) is expected, yours is (2, 1)" in difference(
        judging.read(right.drop(columns="y"), right), value
    )
    other = judging.read(right + right.eq(4), right)
    assert "at [1, 1] is 5 and should be 4" in difference(other, value)


def test_words_are_compared_as_they_are() -> None:
    assert same(judging.read("a dog", "a dog"), ["a dog"]) and same(
        judging.read(("a", "b"), ["a", "b"]), ["a", "b"]
    )
    assert difference(["a fox"], ["a dog"]) == "You gave “a fox”; it should be “a dog”."
    assert difference(["a"], ["a", "b"]) == "2 texts are expected, you gave 1."
    with pytest.raises(Mistake, match="A list of texts is expected, your answer is a str"):
        judging.read("a dog", ["a dog"])
    with pytest.raises(Mistake, match="A text is expected"):
        judging.read(3, "a dog")


def test_chance_is_given_room_and_no_more() -> None:
    right = torch.tensor([1.0, 2.0])
    assert same(torch.tensor([1.04, 1.96]), right, tolerance=0.05)
    assert not same(torch.tensor([1.0, 2.06]), right, tolerance=0.05)


def test_a_letter_is_judged_by_whoever_knows_it() -> None:
    check_letter(" B ")
    check_letter("b", "b")
    with pytest.raises(Mistake, match="because"):
        check_letter("a", "b", a="because", c="", d="")


def test_the_given_schedule_is_stable_diffusions() -> None:
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = exercises.stable_diffusion_schedule().alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_given_steps_have_the_moments_of_eq_1() -> None:
    world, schedule = exercises.animals(), exercises.short_schedule()
    x_prev, x_t, t = exercises.steps(world, 20_000, 40, schedule, torch.Generator().manual_seed(0))
    assert t.tolist() == [40] * 20_000
    clean = world.weights @ (world.means[:, 0] ** 2 + world.variances)
    for x, row in ((x_prev, 39), (x_t, 40)):
        abar = schedule.alphas_cumprod[row]
        assert float(x.square().mean()) == pytest.approx(float(abar * clean + 1 - abar), rel=0.05)
    slope = (x_prev * x_t).mean() / x_prev.square().mean()
    alpha = schedule.alphas_cumprod[40] / schedule.alphas_cumprod[39]
    assert float(slope) == pytest.approx(float(alpha.sqrt()), rel=0.02)


def test_answers_to_lesson_05_work_on_a_study(before: dict[str, Any]) -> None:
    """The made-up sweep has a study's columns, and what is written for it reads one."""
    study = pd.read_csv(ROOT / "data" / "results" / "held_out.csv")
    study = study[study["method"] == "dreambooth"]
    assert set(exercises.made_up_sweep()) - {"truncate_at"} <= set(study)
    names, answer, _ = before["by_weight"]
    names = dict(names)
    exec(answer, names)
    means = names["by_weight"](study, "attribute_alignment")
    assert means.columns.tolist() == [0.0, 2.0]
    runs = per_run(study).groupby(["subject", "variant"])["attribute_alignment"].mean().unstack()
    torch.testing.assert_close(torch.tensor(means.to_numpy()), torch.tensor(runs.to_numpy()))


# --- the notebooks -------------------------------------------------------------------------------


def problems(notebook: Notebook) -> list[str]:
    """Return what is wrong with an exercise's source, a sentence each."""
    found, minutes, ids = [], 0, []
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        text, data = source(cell), info(cell)
        if any(data.get(kind) for kind in ("grade", "solution", "locked")):
            ids.append(data["grade_id"])
            if data.get("schema_version") != 3:
                found.append(f"cell {number} is not in nbgrader's third schema")
        if bool(SOLUTION.search(text)) != bool(data.get("solution")):
            found.append(f"cell {number}: a solution and its mark must come together")
        if "HIDDEN TESTS" in text and not (data.get("grade") and HIDDEN.search(text)):
            found.append(f"cell {number} hides tests and is not graded")
        if cell["cell_type"] == "code" and len(text.splitlines()) > 20:
            found.append(f"cell {number} has more than 20 lines")
        if cell["cell_type"] == "code":
            kinds = [output["output_type"] for output in cell["outputs"]]
            if "error" in kinds or any(o.get("name") == "stderr" for o in cell["outputs"]):
                found.append(f"cell {number} stores an error, or writes to stderr")
            if CHECKED in text and (cell["execution_count"] is None or not cell["outputs"]):
                found.append(f"cell {number} is to be compared and has no count or output")
    for card, answer, check in tasks(cells):
        task = info(answer)["grade_id"]
        described = CARD.match(source(card))
        if not described or not re.search(
            r"<details><summary>Hint</summary>\n\n.+\n\n</details>", source(card), re.S
        ):
            found.append(f"{task} has no card with stars, minutes, points and a folded hint")
            continue
        minutes += int(described[2])
        if (info(check).get("grade"), info(check).get("grade_id")) != (True, f"{task}-check"):
            found.append(f"{task} has no check below it")
        elif info(check)["points"] != int(described[3]):
            found.append(f"{task} promises other points than its check gives")
        if "def " in source(answer) and "HIDDEN TESTS" not in source(check):
            found.append(f"{task} has no hidden tests")
    if len(set(ids)) < len(ids):
        found.append("a grade_id is used twice")
    if not 4 <= sum(1 for _ in tasks(cells)) <= 6:
        found.append("there are not four to six tasks")
    if f"*Time*: {minutes} minutes" not in source(cells[0]):
        found.append(f"the first cell does not say that the tasks take {minutes} minutes")
    if "hidden checks" not in source(cells[0]):
        found.append("the first cell does not tell of hidden checks")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells were not executed once, from top to bottom")
    if not any(CHECKED in source(cell) for cell in code):
        found.append("no cell is compared")
    if sum(len(re.findall(r"^SEED = \d+", source(cell), re.M)) for cell in code) != 1:
        found.append("SEED is not set once")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_source_has_no_problem(path: Path) -> None:
    assert path.stat().st_size < 200_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert problems(notebook) == []
    stars = [len(CARD.match(source(card))[1]) for card, _, _ in tasks(notebook["cells"])]
    assert stars[0] == 1 and stars[-1] == 3 and set(stars) == {1, 2, 3}


BREAKS: dict[str, Callable[[list[Notebook]], Any]] = {
    "must come together": lambda cells: cells[3]["metadata"]["nbgrader"].update(solution=False),
    "third schema": lambda cells: cells[3]["metadata"]["nbgrader"].update(schema_version=1),
    "is not graded": lambda cells: cells[4]["metadata"]["nbgrader"].update(grade=False),
    "more than 20 lines": lambda cells: cells[1].update(source=["SEED = 0\n"] + ["x = 1\n"] * 20),
    "stores an error": lambda cells: cells[4].update(outputs=[{"output_type": "error"}]),
    "no count or output": lambda cells: cells[1].update(source=[CHECKED], outputs=[]),
    "folded hint": lambda cells: cells[2].update(source=["## 1 · A\n★ · 5 minutes · 1 point\n"]),
    "no check below": lambda cells: cells[4]["metadata"]["nbgrader"].update(grade_id="else"),
    "other points": lambda cells: cells[4]["metadata"]["nbgrader"].update(points=7),
    "no hidden tests": lambda cells: cells[4].update(source=["print(1)"]),
    "used twice": lambda cells: cells[3]["metadata"]["nbgrader"].update(grade_id="setup"),
    "four to six": lambda cells: cells.__delitem__(slice(5, None)),
    "does not say": lambda cells: cells[0].update(source=["# Exercises"]),
    "tell of hidden checks": lambda cells: cells[0].update(source=["# Exercises"]),
    "executed once": lambda cells: cells[1].update(execution_count=5),
    "SEED is not set": lambda cells: cells[1].update(source=["seed = 0"]),
}


@pytest.mark.parametrize("sentence", BREAKS)
def test_a_broken_source_is_found_broken(sentence: str) -> None:
    notebook = {"cells": copy.deepcopy(read(NAMES[0]))}
    BREAKS[sentence](notebook["cells"])
    assert any(sentence in problem for problem in problems(notebook)), problems(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_says_how_long_and_for_how_many_points(name: str) -> None:
    found = [(card, check) for card, _, check in tasks(read(name))]
    minutes = sum(int(CARD.match(source(card))[2]) for card, _ in found)
    points = sum(info(check)["points"] for _, check in found)
    row = f"| `{name}` | {len(found)} | {points} | {minutes} | "
    assert row in (ROOT / "notebooks/guide/teaching.md").read_text(encoding="utf-8")


# --- the students' copies ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_emptied_source_holds_no_solution(name: str) -> None:
    """Our own rules, which need no nbgrader; the test below holds nbgrader to the same."""
    cells = read(name)
    left = "\n".join(emptied(source(cell)) for cell in cells)
    assert "SOLUTION" not in left and "HIDDEN" not in left
    for _, answer, _ in tasks(cells):
        for line in SOLUTION.search(source(answer))[2].splitlines():
            assert line.strip() and line.strip() not in left, line


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["release", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.quick
def test_without_nbgrader_one_sentence_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [name for name in sys.modules if name.startswith("nbgrader.")]  # of a test before
    for module in ("nbgrader", "nbgrader.apps", *parts):
        monkeypatch.setitem(sys.modules, module, None)
    said = refused(capsys, tmp_path / "a", "--course", tmp_path / "b")
    assert 'pip install -e ".[teach]"' in said
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_a_folder_that_is_not_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("keep me")
    assert "not empty" in refused(capsys, tmp_path / "full")
    assert "not empty" in refused(capsys, tmp_path / "new", "--course", tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "note.txt"]


@pytest.mark.parametrize(("copies", "course"), [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_a_course_inside_the_copies_is_refused(
    copies: str, course: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, tmp_path / copies, "--course", tmp_path / course)
    assert "neither inside the other" in said
    assert not list(tmp_path.iterdir())


def test_a_wheel_without_notebooks_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDE_LAB_DATA", str(tmp_path / "data"))
    assert "run from a clone" in refused(capsys, tmp_path / "a")


@pytest.mark.quick
def test_lessons_for_a_class_are_the_lessons_without_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["release", "--lessons", str(tmp_path / "class")]) == 0
    number = len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert f"{number} lessons" in capsys.readouterr().out
    copies = sorted((tmp_path / "class").iterdir())
    assert [c.name for c in copies] == sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    for copy_, original in zip(copies, sorted((ROOT / "notebooks").glob("*.ipynb")), strict=True):
        ours, theirs = (json.loads(p.read_text(encoding="utf-8")) for p in (original, copy_))
        back = Path(os.path.relpath(ROOT / "notebooks", tmp_path / "class")).as_posix() + "/"
        assert [source(c).replace(f"]({back}", "](") for c in theirs["cells"]] == [
            source(c) for c in ours["cells"]
        ]
        words = "".join(source(c) for c in theirs["cells"] if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", words):
            assert (tmp_path / "class" / link).exists(), link
        for cell in theirs["cells"]:
            assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert "not empty" in refused(capsys, "--lessons", tmp_path / "class")
    assert "Name the folder" in refused(capsys)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The students' copies and a course, by the command."""
    pytest.importorskip("nbgrader", reason='needs pip install -e ".[teach]"')
    room = tmp_path_factory.mktemp("released")
    copies, course = room / "copies", room / "course"
    assert main(["release", str(copies), "--course", str(course)]) == 0
    return copies, course


def test_released_copies_are_the_sources_emptied(released: tuple[Path, Path]) -> None:
    copies, _ = released
    assert sorted(path.name for path in copies.iterdir()) == [path.name for path in SOURCES]
    for name in NAMES:
        theirs = json.loads((copies / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        ours = read(name)
        assert [source(c).rstrip("\n") for c in theirs] == [emptied(source(c)) for c in ours]
        for cell in theirs:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None
            if info(cell).get("grade") or info(cell).get("locked"):
                assert cell["metadata"]["editable"] is False


def test_nbgrader_grades_what_is_handed_in(
    released: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points for what is right, none for tricks; copies and downloads stop nobody's grading."""
    from nbgrader.api import Gradebook

    (copies, course), name = released, "ex_03_truncation_thresholds"
    fresh = json.loads((copies / f"{name}.ipynb").read_text(encoding="utf-8"))
    points = sum(info(check)["points"] for _, _, check in tasks(read(name)))
    solved = copy.deepcopy(fresh)
    for cell, original in zip(solved["cells"], read(name), strict=True):
        if info(cell).get("solution"):
            cell["source"] = source(original)

    def cell_of(notebook: Notebook, grade_id: str) -> Notebook:
        return next(c for c in notebook["cells"] if info(c).get("grade_id") == grade_id)

    def spoil(book: Notebook, grade_id: str, trick: str = "") -> None:
        cell = cell_of(book, grade_id)
        cell["source"] += f"\n{grade_id} = lambda *_: torch.zeros(())\n{trick}"

    def ben(book: Notebook) -> None:
        cell = cell_of(book, "threshold")
        cell["source"] = cell["source"].replace("(2 * variance)", "variance")
        book["cells"].remove(cell_of(book, "rho_depends-check"))

    def copies_cells(book: Notebook) -> None:
        book["cells"].insert(4, copy.deepcopy(cell_of(book, "rho")))
        book["cells"].append(copy.deepcopy(cell_of(book, "rho-check")))
        info(cell_of(book, "threshold")).update(schema_version=1)

    def tricks(book: Notebook) -> None:
        spoil(book, "threshold", "exercises.check_threshold = lambda *_, **__: None")
        spoil(book, "truncated", "import sude_lab.exercises.judging as j\nj.same = lambda *_: True")
        cell_of(book, "truncated-check")["source"] = "print('Right.')"
        spoil(book, "rho")
        cell_of(book, "rho-check")["source"] = ""
        info(cell_of(book, "rho-check")).update(locked=False, solution=True, points=99)
        spoil(book, "hinge")
        cell_of(book, "hinge-check")["metadata"]["tags"] = ["skip-execution"]

    hand_ins: dict[str, tuple[Callable[[Notebook], Any], float]] = {
        "ben": (ben, points - 2),
        "copy": (copies_cells, points),
        "fresh": (lambda book: book.update(copy.deepcopy(fresh)), 0),
        "tricks": (tricks, points - 6),
    }
    for student, (change, _) in hand_ins.items():
        place, book = course / "submitted" / student / name, copy.deepcopy(solved)
        change(book)
        place.mkdir(parents=True)
        file = f"{name} (1).ipynb" if student == "copy" else f"{name}.ipynb"
        (place / file).write_text(json.dumps(book), encoding="utf-8")
    # As in a shell with the environment activated, where nbgrader finds its own programs.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    autograde = [sys.executable, "-m", "nbgrader", "autograde", name]
    done = subprocess.run(autograde, cwd=course, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    scores = {}
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "sude_lab") as book:
        for student in hand_ins:
            submission = book.find_submission(name, student)
            scores[student] = submission.score
            assert submission.max_score == points
    assert scores == {student: score for student, (_, score) in hand_ins.items()}
