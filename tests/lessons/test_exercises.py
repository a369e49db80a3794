"""Every exercise: its solution passes, its stub fails, typical slips are called by their name.

Answers are tried as a student's are: the source of the notebook's own cell, solved, emptied, or
with a slip put into it, then the notebook's own check with its hidden tests.
"""

import copy
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

from sude_lab import exercises
from sude_lab.cli import main
from sude_lab.evaluate.metrics import per_run
from sude_lab.exercises import Mistake, judging
from sude_lab.exercises.judging import ask, judge, judge_table, judge_words

ROOT = Path(__file__).resolve().parents[2]
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
        ("a.sqrt() * x_0 + (1 - a).sqrt() * eps", "(1 - a).sqrt() * x_0 + a.sqrt() * eps", "gave"),
    ],
    "even_time": [
        ("alphas_cumprod <", "alphas_cumprod.sqrt() <", "power is their square"),
        ("[0, 0])", "[0, 0]) + 1", "count from 0"),
        ("[0, 0])", "[0, 0]) - 1", "One too early"),
        ("(alphas_cumprod < 0.5).nonzero()[0, 0]", "(alphas_cumprod < 0.5).sum()", "counted"),
    ],
    "open_share": [
        ("rho < 1", "rho >= 1", "share of shut gates"),
        ("rho < 1", "rho <= 1", "At rho = 1 the gate is shut"),
        ("(rho < 1).double().mean()", "float(rho.mean() < 1)", "averaged rho first"),
        (".double().mean()", ".sum()", "how many gates"),
    ],
    "paired_gain": [
        ('table[table["attribute"].notna()]', "table", "Rows without an attribute"),
        ('means["sude"] - means["plain"]', 'means["plain"] - means["sude"]', "Plain minus SuDe"),
        ('["subject", "variant"]', '["subject", "seed", "variant"]', "Seeds of one subject"),
        ('["attribute_alignment"]', '["subject_fidelity"]', "fidelity"),
        ('["sude"] - means["plain"]', '["sude"].mean()', "A pandas Series is expected"),
    ],
    "training_step": [
        ("    optimizer.zero_grad()\n", "", "optimizer.zero_grad()"),
        ("    optimizer.step()\n", "", "Nothing moved"),
        ("(prediction - eps)", "(prediction - x_0)", "learns x_0"),
        ("generator=generator)\n    eps", "generator=generator) * 0 + 1\n    eps", "should be"),
        ("(len(x_0),), generator=generator)", "(1,), generator=generator).expand(8)", "its own"),
        ("square().mean()", "square().sum()", "summed the squares"),
        ("loss.backward()", "(-loss).backward()", "It climbs"),
    ],
    "log_density": [
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / (2 * variance.sqrt())", "its square"),
        ("dims = squares.shape[1]", "dims = 1", "once for each of the D"),
        (" - dims / 2 * torch.log(2 * math.pi * variance)", "", "normaliser is missing"),
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / variance", "your 2 is missing"),
        ("squares.sum(1)", "squares.mean(1)", "averaged the squares"),
        ("squares.sum(1) / (2 * variance)", "squares.sum(1) / (2 * variance**2)", "once more"),
        ("squares.shape[1]", "squares.shape[0]", "you took it B times"),
        ("squares.shape[1]", "x_prev.shape[1]", "each of the C channels"),
        ("return -squares", "return squares", "less likely: its sign"),
        (" - dims / 2", " + dims / 2", "a wide density lower"),
        ("squares.sum(1) / (2", "squares.sum(1).sqrt() / (2", "not the distance"),
        ("dims / 2 *", "dims *", "-D/2, not -D"),
        ("return -squares", "return 0 * squares.sum(1)  # -squares", "Nothing but zeros"),
    ],
    "log_ratio": [
        ("return under_class - ", "return -under_class + ", "sign is turned"),
        (" - log_density(x_prev, mean_uncond, variance)", "", "numerator alone"),
        ("variance)\n    return", "variance.sqrt())\n    return", "should be"),
        ("under_class - ", "under_class / ", "You divided the logarithms"),
        ("under_class - ", "under_class + ", "You added the logarithms"),
        ("return under_class - ", "return 2 * under_class - 2 * ", "your 2 is missing"),
        ("return under_class - ", "return 0 * under_class + ", "denominator alone"),
    ],
    "normaliser": [
        ('"c"', '"a"', "number of dimensions"),
        ('"c"', '"b"', "from t to t"),
        ('"c"', '"d"', "empty prompt"),
        ('"c"', '"e"', "one of the letters a, b, c, d"),
    ],
    "log_posterior": [
        ("dim=1", "dim=0", "over the batch"),
        ("prior.log() - ", "prior - ", "to a logarithm"),
        ("prior.log() - squares", "-squares", "prior C_t is missing"),
        ("prior.log() - ", "prior.log() + ", "nearest mean"),
        ("variance[:, None]", "variance", "(B, 1)"),
        ("torch.log_softmax", "torch.softmax", "logarithms are asked for"),
    ],
    "chain": [
        ("news.flip(0).cumsum(0).flip(0)", "news.cumsum(0)", "from the other end"),
        ("last + ", "", "add what was known of x_T"),
        ("cumsum(0).flip(0)", "cumsum(0)", "wrong order"),
        ("news.flip(0).cumsum(0).flip(0)", "news.sum(0)", "the whole way"),
        (".cumsum(0).flip(0)", ".cumsum(0).flip(0).clamp(max=-last)", "You cut at 0"),
        ("last + news", "last - news", "The news is turned"),
    ],
    "noise_errors": [
        ("(eps - guess)", "(x_0 - guess)", "compared with x_0"),
        ("schedule, c)", "schedule)", "The model gets no class"),
        ("dim=1)", "dim=0)", "stand in the rows"),
        (
            "        guess =",
            "        if c:\n"
            "            eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)\n"
            "            x_t = add_noise(x_0, eps, t, schedule)\n"
            "        guess =",
            "noise of its own",
        ),
        (".square().sum(1)", ".square().mean(1)", "averaged over the dimensions"),
        ("(eps - guess)", "(x_t - guess)", "compared with x_t"),
        ("(x_t, t, schedule, c)", "(x_t, t + 1, schedule, c)", "one too late"),
        ("(x_t, t, schedule, c)", "(x_t, t - 1, schedule, c)", "one too early"),
        (".square().sum(1)", ".norm(dim=1)", "squared length"),
    ],
    "sude": [
        ("to_class - to_uncond", "to_uncond - to_class", "sign is turned"),
        ("mean_class.detach()", "mean_class", "the bar over theta"),
        ("mean_uncond.detach()", "mean_uncond", "the bar over theta"),
        ("x_sub - mean", "x_sub.detach() - mean", "no gradient reaches x_sub"),
        ("(2 * variance)", "(2 * variance.sqrt())", "its square"),
        ("to_class - to_uncond", "to_class + to_uncond", "subtracts the second square"),
        ("(to_class - to_uncond)", "to_class", "towards the class alone"),
    ],
    "push": [
        ("mean_class - mean_uncond", "mean_uncond - mean_class", "descent moves against it"),
        ("mean_class - mean_uncond", "mean_class - x_sub", "x_sub is not in the gradient"),
        ("variance[:, None]", "variance", "(B, 1)"),
        ("variance[:, None]", "variance[:, None].sqrt()", "its square"),
        (" / variance[:, None]", "", "Divide by sigma^2"),
    ],
    "along": [
        ("d.square().sum(1, keepdim=True)", "d.norm(dim=1, keepdim=True)", "square of d's length"),
        (" / d.square().sum(1, keepdim=True)", "", "Not divided by anything"),
        ("d.square().sum(1, keepdim=True)", "a.square().sum(1, keepdim=True)", "should be"),
        ("return number * d", "return number[:, 0]", "the number rho"),
        ("return number * d", "return a - number * d", "what remains"),
        (
            "(a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)",
            "(a * d).sum() / d.square().sum()",
            "over the whole batch",
        ),
    ],
    "eps_weight": [
        ("(1 - abar_prev)", "(1 - abar)", "sigma_t^2 = beta_t"),
        ("alpha = abar / abar_prev", "alpha = abar", "belongs to one step"),
        ("(2 * alpha", "(alpha", "The 2 of 2 sigma_t^2"),
    ],
    "same_push": [
        ("* before / after", "* after / before", "Upside down"),
        ("weight_sude * before / after", "weight_sude", "another w_t"),
        ("weight_sude * before / after", "before / after", "multiply it with the old"),
        ("* before / after", "* before", "That is the push"),
    ],
    "both_sides": [
        ("judge = -known", "judge = -world", "Left: the judge of eq. 12 knows"),
        ("joint + S_t", "joint - S_t", "Right: S_t is minus"),
        ("joint = -known", "joint = -world", "Right: the step must know both"),
        ("S_t = -known", "S_t = -world", "Right: S_t = -log p"),
        ("_prev(x_prev", "(x_t", "Left: you asked the judge about x_t"),
        ("return step + judge, joint + S_t", "return step + judge", "two tensors"),
    ],
    "threshold": [
        ("return -", "return ", "sign is turned"),
        (" / (2 * variance)", " / variance", "your 2 is missing"),
        (".square().sum(1)", ".norm(dim=1)", "squared length"),
        ("sum(1)", "mean(1)", "averaged over the dimensions"),
        ("(2 * variance)", "(2 * variance**2)", "squared it once more"),
        ("(2 * variance)", "2", "Divide by sigma^2"),
        (".square().sum(1)", ".sum(1).square()", "squares first"),
        (".square().sum(1)", ".abs().sum(1)", "absolute values"),
        ("(2 * variance)", "(2 * variance.sqrt())", "divided by sigma"),
    ],
    "truncated": [
        ("(loss > tau)", "(loss.mean() > tau.mean())", "averaged over the batch"),
        ("loss * (loss > tau)", "torch.maximum(loss, tau)", "gives 0, not tau"),
        ("loss > tau", "loss <= tau", "wrong way round"),
        ("loss > tau", "loss >= tau", "eq. 9 says <="),
        ("loss * (loss > tau)", "(loss > tau)", "That is the gate"),
        ("loss * (loss", "(loss - tau) * (loss", "you also subtracted tau"),
        ("loss * (", "loss.detach() * (", "no gradient reaches loss"),
        ("(loss > tau)", "(loss > 0)", "not with 0"),
        ("(loss > tau)", "(loss > tau.mean())", "averaged tau"),
        ("(loss > tau)", "(loss > -tau)", "turned its sign"),
    ],
    "rho": [
        ("d.square().sum(1)", "(a.norm(dim=1) * d.norm(dim=1))", "cosine"),
        ("d.square().sum(1)", "d.norm(dim=1)", "not by its length"),
        ("(x_sub - mean_uncond)", "x_sub", "Subtract mean_uncond from x_sub"),
        (" / d.square().sum(1)", "", "Not divided yet"),
        ("(x_sub - mean_uncond)", "(x_sub - mean_class)", "measured it from the class"),
        ("(mean_class - mean_uncond)", "(mean_uncond - mean_class)", "reversed"),
        ("d.square().sum(1)", "a.square().sum(1)", "the ruler is d"),
        ("(a * d).sum(1) / d.square().sum(1)", "(a * d).sum() / d.square().sum()", "whole batch"),
    ],
    "rho_depends": [
        ('"d"', '"a"', "both have 1 / (2 sigma_t^2)"),
        ('"d"', '"b"', "multiplies L_sude and tau_t alike"),
        ('"d"', '"c"', "affine map"),
        ('"d"', "4", "one of the letters a, b, c, d"),
    ],
    "hinge": [
        ("-2 * tau", "-tau", "Half as steep"),
        (".clamp(min=0)", "", "Without max"),
        ("1 - rho", "rho - 1", "wrong side"),
        ("-2 * tau", "2 * tau", "sign is turned"),
        ("(1 - rho).clamp(min=0)", "(1 - rho).clamp(min=0) ** 2", "You squared it"),
        ("(1 - rho).clamp(min=0)", "(rho < 1)", "how far it is"),
        ("-2 * tau * ", "", "tau is lost"),
    ],
    "settle": [
        ("(loss > tau)[:, None]", "1", "It never stops"),
        (
            "        loss =",
            "        if _ > 0:\n"
            "            s = s - 0.02 * (2 * (s - eps_target) - 2 * weight_sude * gate * d)\n"
            "            continue\n"
            "        loss =",
            "gates were set before the first step",
        ),
        ("(loss > tau)", "(loss <= tau)", "The gate is the wrong way round"),
        ("range(300)", "range(10)", "more steps, or a smaller learning rate"),
        ("- 2 * weight_sude", "+ 2 * weight_sude", "wrong way"),
        ("2 * (s - eps_target) - ", "-", "all the way to rho = 1"),
        ("(s - eps_target)", "(s - eps_class)", "moved across d"),
        ("2 * weight_sude", "2 * 0.8", "your number stands"),
        ("2 * weight_sude * ", "2 * ", "w_s is not used"),
        ("2 * weight_sude", "4 * weight_sude", "w_s counts twice"),
        ("2 * weight_sude", "weight_sude", "w_s counts half"),
        ("(loss > tau)[:, None]", "loss.mean() > tau.mean()", "averaged over the batch"),
        ("s = s - 0.02", "s = s + 0.02", "It runs away"),
    ],
    "lora_count": [
        ("rank * (out + into)", "out * into", "Those are the layers themselves"),
        ("rank * (out + into)", "rank * out * into", "added, not multiplied"),
        ("(out + into)", "into", "B is missing"),
        ("(out + into)", "out", "A is missing"),
        ("rank * (out + into)", "out + into", "have `rank` as a side"),
    ],
    "must_keep": [
        ('"b"', '"a"', "running mean of squared gradients"),
        ('"b"', '"c"', "follows from (seed, k) alone"),
        ('"b"', '"d"', "in the weights already"),
    ],
    "latent_batch": [
        ("randn(size, *mean", "randn(*mean", "expected"),
        ("size, *mean.shape, g", "1, *mean.shape, g", "expected"),
        ("torch.randn(size, *mean.shape, generator=generator)",
         "torch.randn(mean.shape, generator=generator).expand(size, -1, -1, -1)",
         "All samples got the same noise"),
        ("deviation * noise", "deviation**2 * noise", "do not square it"),
        ("deviation * noise", "deviation.sqrt() * noise", "no root"),
        ("deviation * noise", "noise", "multiply it with `deviation`"),
        ("mean + deviation * noise", "deviation * noise", "The mean is missing"),
    ],
    "smoothed": [
        (" / (1 - decay**k)", "", "It starts near 0"),
        ("decay * mean + (1 - decay) * loss", "(1 - decay) * mean + decay * loss", "exchanged"),
        ("torch.zeros(())", "losses[0]", "should be"),
        ("return torch.stack(curve)", "return curve[-1]", "the whole curve"),
        ("mean = decay * mean + (1 - decay) * loss\n        curve.append(mean / (1 - decay**k))",
         "mean = mean + loss\n        curve.append(mean / k)", "early ones should fade"),
    ],
    "batch_loss": [
        ("(sude > tau) * sude", "sude", "All gates stood open"),
        ("sude > tau", "sude <= tau", "wrong way round"),
        ("weight_sude * (sude", "(sude", "w_s is lost"),
        ("square().mean(1)", "square().sum(1)", "You summed the squares"),
        ("* sude).mean()", "* sude)", "ends with the mean over the batch"),
        (".detach()", ".clone()", "the bar over theta"),
        ("learn + ", "", "L_sub is missing"),
    ],
    "sude_step": [
        ("prior(x_t, t)", "prior(x_0, t)", "SuDe does nothing here"),
        ("eps_class, eps_null = prior", "eps_null, eps_class = prior", "you exchanged them"),
        ("eps, weight_sude)", "eps, 0.0)", "SuDe does nothing here"),
        ("    optimizer.zero_grad()\n", "", "optimizer.zero_grad()"),
        ("    optimizer.step()\n", "", "Nothing moved"),
        ("loss.backward()", "(-loss).backward()", "It climbs"),
    ],
    "by_weight": [
        ('table[table["attribute"].notna()]', "table", "Rows without an attribute"),
        (".mean().unstack()", ".sum().unstack()", "Those are sums"),
        (".unstack()", ".unstack().T", "Subjects go in rows"),
        ("[measure]", '["attribute_alignment"]', "another column"),
        (".unstack()", "", "A pandas DataFrame is expected"),
        ('["attribute"].notna()', '["seed"] == 0', "should be"),
    ],
    "paired_gains": [
        (".sub(means[0.0], axis=0)", ".rsub(means[0.0], axis=0)", "Plain minus SuDe"),
        ("means[0.0], axis=0", "means[0.0].mean()", "compared with itself"),
        (".drop(columns=0.0)", "", "Leave the column"),
        (".sub(", ".div(", "Those are ratios"),
    ],
    "cluster_interval": [
        ("pd.factorize(subjects)[0]", "np.arange(len(values))", "You drew single values"),
        ("[0.025, 0.975]", "[0.05, 0.95]", "90 % interval"),
        ("sums[drawn].sum(1) / counts[drawn].sum(1)", "(sums / counts)[drawn].mean(1)",
         "averaged every subject first"),
        ("[0.025, 0.975]", "[0.975, 0.025]", "Lower end first"),
        ("return np.quantile(means, [0.025, 0.975])", "return means", "Return two numbers"),
    ],
    "front": [
        ("~(as_good", "(as_good", "Those are the ones that are beaten"),
        ("(x[None] > x[:, None]) | ", "(x[None] > x[:, None]) & ", "better in both"),
        (" & better", "", "it does not beat itself"),
        ("y[None] >= y", "y[None] <= y", "Larger is better in both"),
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
        ("gains.mean(2).amax(1)", "gains.amax(1)", "average over the seeds before you choose"),
        ("gains.mean(2).amax(1).mean()", "gains.mean()", "nothing was chosen"),
        ("others.argmax(1), k]", "gains.mean(2).argmax(1), k]", "you chose with all seeds"),
        ("others.argmax(1), k]", "gains[:, :, k].argmax(1), k]", "by the seed that is left out"),
        ("gains[subjects, others.argmax(1), k]", "others.amax(1)", "off the seed left out"),
        ("others.argmax(1), k]", "others.mean(0).argmax(), k]", "one w_s for all"),
        ("return naive, honest", "return honest, naive", "exchanged"),
        ("return naive, honest", "return honest", "Return two numbers"),
    ],
    "loss_along": [
        ("2 * s * square", "s * square", "your 2 is missing"),
        (" - 2 * s", " + 2 * s", "sign of the slope"),
        ("2 * s * square", "2 * s * square.sqrt()", "squared length"),
        ("return square - 2", "return -2", "your ||d||^2 is missing"),
        ("- 2 * s * square", "- 2 * s * square + s**2 * square", "two squares of s cancel"),
    ],
    "shifted": [
        ("(2 * r - 1)", "r", "Not r tau"),
        ("(2 * r - 1)", "(1 - 2 * r)", "The sign is turned"),
        ("(2 * r - 1)", "2 * r", "this is 2 tau"),
        ("(2 * r - 1)", "r**2", "not squared"),
        ("(2 * r - 1) * ", "", "It must move with r"),
    ],
    "at_half": [
        ('"c"', '"a"', "That is r = 1"),
        ('"c"', '"b"', "probability of one half"),
        ('"c"', '"d"', "That is r = 0"),
    ],
    "end_rho": [
        ("(r - rho)", "(1 - rho)", "You stopped at rho = 1"),
        ("min=0, ", "", "not pulled back"),
        (", max=weight_sude", "", "by w_s at most"),
        ("(r - rho).clamp(min=0, max=weight_sude)", "weight_sude", "without truncation"),
        ("return rho + ", "return ", "add where it started"),
    ],
    "rest": [
        ("torch.where(pull < 1, end, torch.inf)", "end", "Return inf"),
        ("weight_sude * share", "weight_sude * 0", "should be"),
        ("(1 - share) * class_0", "class_0", "the share 1 - kappa stays"),
        ("/ (1 - pull)", "/ (1 + pull)", "Check the sign"),
        (
            "(1 - share) * class_0) / (1 - pull)",
            "(1 - share) ** 2 * class_0)\n    end = end / (1 + weight_sude * (1 - share) ** 2"
            " - weight_sude)",
            "treats it as a constant",
        ),
    ],
    "tuned": [
        ('prior == "current"', 'prior != "current"', "`prior` is the wrong way round"),
        ("c + share * move", "c", "c stays where it was"),
        ("c + share * move", "c + move", "c moves as far as s"),
        (" | (not truncated)", " | True", "gates stand open"),
        ("-d.square()", "-class_0.square()", "tau is that of class_0"),
        ("gate[:, None] * d)", "gate[:, None] * (d - s))", "s^2 cancels"),
    ],
    "paper_prompt": [
        ('{article(attribute)} {attribute}"', 'a {attribute}"', "before a vowel"),
        ('"P2": f"photo of {its} {{S*}} and it is {article(category)} {category}"',
         '"P2": f"photo of {its} {{S*}} {category}"', "That is P1, and P2 was asked for"),
        ('"P3": f"photo of a {{S*}} and it is {its} {category}"',
         '"P3": f"photo of {its} {{S*}} and it is a {category}"', "That is P2, and P3"),
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
        (".mean(1)", ".sum(1)", "You summed the squares"),
        ("return loss *", "return (loss - tau) *", "That is the hinge"),
        ("(x_t, t, class_embeds)", "(x_t, t, uncond_embeds + 0 * class_embeds)", "but zeros"),
    ],
    "judged_text": [
        ('.replace("{S*}", category)', "", "{S*} is still there"),
        ('.replace(f"{{S*}} {category}", category)', "", "stands there twice"),
        ('prompt.replace(f"{{S*}} {category}", category).replace("{S*}", category)',
         'prompt.replace("{S*} ", "")', "nobody says what it is"),
        ('prompt.replace(f"{{S*}} {category}", category).replace("{S*}", category)',
         'prompt.replace("{S*}", "")', "Two spaces"),
    ],
    "image_score": [
        ("axis=1", "axis=0", "You normalised the columns"),
        (" / np.linalg.norm(references, axis=1, keepdims=True)", "", "references are not norm"),
        (".mean(1)", ".max(1)", "nearest reference"),
        (".mean(1)", "", "the whole table"),
        (".mean(1)", ".mean()", "One number a picture"),
        ("(p @ r.T).mean(1)", "(pictures @ references.T).mean(1)", "inner products"),
    ],
    "fooled": [
        ('"b"', '"a"', "compares with the prompt"),
        ('"b"', '"c"', "notice small things"),
        ('"b"', '"d"', "fooled completely"),
    ],
    "paired_interval": [
        ("a - b", "b - a", "b minus a"),
        ("a - b", "a", "the interval of a alone"),
        ("[0.025, 0.975]", "[0.975, 0.025]", "Lower end first"),
        ("gains[drawn].mean(1)",
         "a[drawn].mean(1) - b[rng.integers(len(b), size=drawn.shape)].mean(1)",
         "draw pairs, both of a subject at once"),
    ],
    "spearman": [
        ("pd.Series(x).rank()", "x", "correlation of the values"),
        ("pd.Series(x).rank()", 'x.argsort(kind="stable")', "not yet the rank"),
        ("pd.Series(x).rank()", 'pd.Series(x).rank(method="first")', "must have equal ranks"),
    ],
    "detects": [
        ("ddof=1", "ddof=0", "divides by n - 1"),
        ("runs.mean(2)", "runs[:, :, 0]", "one seed of each subject"),
        (" / np.sqrt(subjects)", "", "the mean's is s / sqrt(subjects)"),
        ("of_subjects = runs.mean(2)",
         "of_subjects = runs.reshape(400, -1)\n    subjects *= seeds", "runs for independent"),
        ("> 0).mean()", "> 0).sum()", "their share is asked for"),
    ],
    "hinge_gradient": [
        ("return -d", "return d", "where descent goes"),
        (" * (rho < 1)[:, None]", "", "its gradient is 0 there"),
        (" / variance[:, None]", "", "Divide by sigma^2"),
        ("variance[:, None]", "variance[:, None].sqrt()", "You divided by sigma"),
        ("variance[:, None]", "variance", "spread it over the last axis"),
        ("(rho < 1)", "(1 - rho).clamp(min=0)", "a straight line"),
        ("rho < 1", "rho >= 1", "wrong way round"),
    ],
    "corrected": [
        ("(1 - rho).clamp(min=0) * d", "d", "plain composition"),
        (".clamp(min=0)", "", "pulled back"),
        ("strength * ", "", "The strength is lost"),
        ("clamp(min=0) * d", "clamp(min=0) * d / d.norm(dim=1, keepdim=True)", "lengths of d"),
        ("return a + ", "return ", "add it to a"),
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
        ("(1 - strength) ** n", "strength**n", "1 - g of it, not g"),
        (" ** n", "", "one correction"),
        ("torch.where(rho < 1, 1 - left, rho)", "1 - (1 - strength) ** n * (1 - rho)",
         "not corrected at all"),
        ("1 - left, rho", "left, rho", "what is left to the gate"),
    ],
    "at_fidelity": [
        ("fidelity[::-1], alignment[::-1]", "fidelity, alignment", "needs growing x"),
        ("np.interp(goal, fidelity[::-1], alignment[::-1])",
         "alignment[abs(fidelity - goal).argmin()]", "nearest strength"),
        ("np.interp(goal, fidelity[::-1], alignment[::-1])", "alignment.max()",
         "whatever it costs"),
        ("fidelity[::-1], alignment[::-1]", "fidelity[[-1, 0]], alignment[[-1, 0]]",
         "one line through first and last"),
    ],
    "drawn": [
        ("to_x_0(eps, x", "to_x_0(eps_sub, x", "before its correction"),
        ("add_noise(x_0, eps, ", "add_noise(x_0, eps_sub, ", "The way back"),
        ("eps = eps_null + corrected", "eps = corrected", "eps_null to be added again"),
        (", strength)\n", ", 0.0)\n", "plain sampling"),
        ("t - 1, schedule)", "t, schedule)", "The noise stays"),
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


def hand_in(task: tuple[dict[str, Any], str, str], change: Callable[[str], str] = str) -> None:
    names, answer, check = task
    names = dict(names)
    exec(change(answer), names)
    exec(check, names)


# --- every task ----------------------------------------------------------------------------------


def test_every_task_has_slips_and_every_check_a_task() -> None:
    assert set(SLIPS) == set(TASKS)
    assert all(len(slips) >= 2 for slips in SLIPS.values())
    checks = {name.removeprefix("check_") for name in exercises.__all__ if "check_" in name}
    assert checks == set(TASKS)


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
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    with pytest.raises(Mistake) as caught:
        hand_in(before[task], change)
    assert says in str(caught.value)


CHOICES = {
    task
    for task, slips in SLIPS.items()
    if all(re.fullmatch('"[a-d]"', old) for old, _, _ in slips)
}


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("settle", *CHOICES)])
def test_slips_are_told_apart(
    task: str, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No slip has the values of the right answer, nor those of another slip, on any seed."""
    seen = []

    def record(
        given: Any, right: Any, slips: dict[str, Any], tolerance: float = 1e-6, hint: str = ""
    ) -> None:
        seen.append(([right, *slips.values()], max(tolerance, 1e-8)))
        judge(given, right, slips, tolerance, hint)

    def record_words(given: Any, right: Any, slips: dict[str, Any]) -> None:
        texts = [text for text in slips.values() if text != right]
        assert texts and all(texts.count(text) == 1 for text in texts), texts
        judge_words(given, right, slips)
        seen.append(([], 0.0))

    monkeypatch.setattr(judging, "judge", record)
    monkeypatch.setattr(judging, "judge_words", record_words)
    hand_in(before[task])
    for values, tolerance in seen:
        values = [torch.as_tensor(value).double() for value in values]
        for i, one in enumerate(values):
            for k, other in enumerate(values[i + 1 :], start=i + 1):
                same = one.shape == other.shape and torch.allclose(
                    one, other, rtol=1e-3, atol=tolerance
                )
                assert not same, (i, k)
    assert seen


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
        ask(answer, torch.ones(3))


def test_an_answer_cannot_spoil_what_it_is_given() -> None:
    x = torch.ones(3)
    assert ask(lambda y: y.mul_(2), x).tolist() == [2, 2, 2]
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: None, "returns nothing"),
        (3, "the function itself"),
        (lambda x: "three", "a str"),
        (lambda x: x[:2], "The shape (3,) is expected, yours is (2,)"),
        (lambda x: x.sum(), "You summed over the batch"),
        (lambda x: x + torch.tensor([0.0, 0.0, 0.5]), "at [2] is 1.5 and should be 1"),
        (lambda x: x * float("nan"), "at [0] is nan"),
    ],
)
def test_what_is_said_of_an_answer_that_is_no_known_slip(answer: Any, says: str) -> None:
    with pytest.raises(Mistake) as caught:
        judge(ask(answer, torch.ones(3)), torch.ones(3), {"a slip": torch.zeros(3)})
    assert says in str(caught.value)


def test_a_table_may_come_in_any_order_and_must_be_a_table() -> None:
    right = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}, index=["a", "b"])
    judge_table(right.loc[["b", "a"], ["y", "x"]], right, {})
    for given, says in (
        (right * 2, "twice"),
        (right["x"], "A pandas DataFrame is expected, not a Series"),
        (right.drop(columns="y"), "The shape (2, 2) is expected, yours is (2, 1)"),
        (right + right.eq(4), "at [1, 1] is 5 and should be 4"),
    ):
        with pytest.raises(Mistake) as caught:
            judge_table(given, right, {"twice": 2 * right})
        assert says in str(caught.value)


def test_words_are_compared_as_they_are() -> None:
    judge_words("a dog", "a dog", {})
    judge_words(("a", "b"), ["a", "b"], {})
    for given, right, says in (
        ("a cat", "a dog", "that is a cat"),
        ("a fox", "a dog", "You gave “a fox”; it should be “a dog”."),
        ("a dog", ["a dog"], "A list of texts is expected, your answer is a str."),
        (["a"], ["a", "b"], "2 texts are expected, you gave 1."),
        (["a", "c"], ["a", "b"], "You gave “c”; it should be “b”."),
        (3, "a dog", "A text is expected"),
    ):
        with pytest.raises(Mistake) as caught:
            judge_words(given, right, {"that is a cat": "a cat"})
        assert says in str(caught.value)


def test_chance_is_given_room_and_no_more() -> None:
    right = torch.tensor([1.0, 2.0])
    judge([1.04, 1.96], right, {}, tolerance=0.05)
    with pytest.raises(Mistake, match="should be 2"):
        judge([1.0, 2.06], right, {}, tolerance=0.05)


def test_single_precision_is_welcome() -> None:
    right = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    judge(right.float(), right, {})
    judge([0.25, 0.5], torch.tensor([0.25, 0.5]), {})


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
    for module in ("nbgrader", "nbgrader.apps"):
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
    assert "10 lessons" in capsys.readouterr().out
    copies = sorted((tmp_path / "class").iterdir())
    assert [c.name for c in copies] == sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    for copy_, original in zip(copies, sorted((ROOT / "notebooks").glob("*.ipynb")), strict=True):
        ours, theirs = (json.loads(p.read_text(encoding="utf-8")) for p in (original, copy_))
        assert [source(c) for c in theirs["cells"]] == [source(c) for c in ours["cells"]]
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
        for part in ("exercises.judging", "sude_lab.exercises.truncation"):
            trick = f"import sude_lab.exercises.truncation\n{part}.judge = lambda *_, **__: None"
            spoil(book, "truncated", trick)
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
