"""The baselines that SuDe regularises: what each one trains, how it prompts; and `configure`.

A method knows nothing of SuDe, and SuDe knows nothing of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from sude_lab.backbone import Backbone
from sude_lab.config import PRESETS, CompleteConfig, TuningConfig, read_settings
from sude_lab.errors import UserError, check_tokens
from sude_lab.methods.base import Method
from sude_lab.methods.custom_diffusion import CustomDiffusion
from sude_lab.methods.dreambooth import DreamBooth
from sude_lab.methods.textual_inversion import TextualInversion
from sude_lab.methods.vico import ViCo

METHODS: dict[str, type[Method]] = {
    "dreambooth": DreamBooth,
    "custom_diffusion": CustomDiffusion,
    "vico": ViCo,
    "textual_inversion": TextualInversion,
}


def get_method(name: str) -> type[Method]:
    """Return the class of a method by its name."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def configure(
    settings: TuningConfig | Mapping[str, Any],
    model: Backbone | Mapping[str, Any],
    *,
    preset: str = "default",
    method: type[Method] | None = None,
) -> CompleteConfig:
    """Return settings with every field filled in: the one place where that is done.

    What is None comes from the preset, else from what the model's folder says of itself, else from
    the method. With an open model its categories are checked, and a hub id gets the commit that was
    opened: the run stays that model's when the hub has a newer one.

    Args:
        settings: The settings, or fields of `TuningConfig` by their names.
        model: The model, opened; or `Backbone.facts`, or what `sude_lab.io.opening.read_facts`
            returns, where none is open.
        preset: paper, reference, or default for none.
        method: A method that is not in `METHODS`.
    """
    if isinstance(settings, Mapping):
        settings = TuningConfig(**read_settings(settings))
    if preset != "default" and preset not in PRESETS:
        raise UserError(f"There is no preset {preset!r}: choose default, {' or '.join(PRESETS)}.")
    method = method or get_method(settings.method)
    facts = model.facts if isinstance(model, Backbone) else model
    usual: dict[str, Any] = {f.name: f.metadata.get("usual") for f in fields(TuningConfig)}
    usual |= method.defaults
    usual |= facts.get("tuning", {}).get(settings.method, {})
    usual |= PRESETS.get(preset, {})
    values = {f.name: getattr(settings, f.name) for f in fields(TuningConfig)}
    values = {name: usual[name] if value is None else value for name, value in values.items()}
    config = CompleteConfig(**values)
    check_tokens([subject.token for subject in config.subjects], config.num_vectors)
    return _on_model(config, model) if isinstance(model, Backbone) else config


def _on_model(config: CompleteConfig, backbone: Backbone) -> CompleteConfig:
    """Check categories and method, and name the model by the commit that was opened."""
    more = tuple(
        f"{backbone.check_category(s.category)}={s.token}={s.image}" for s in config.subjects[1:]
    )
    source, (name, *_) = config.backbone, config.backbone.split("@")
    if backbone.commit and name == backbone.source.split("@")[0]:
        source = f"{name}@{backbone.commit}"
    category = backbone.check_category(config.category)
    backbone.check_method(config)
    schedule, no_eps = backbone.schedule, backbone.schedule.prediction_type == "epsilon"
    if config.with_sude and config.weighting != "simple" and no_eps and schedule.reaches_zero:
        why = "The model predicts noise, and its last step is nothing else (zero terminal SNR)"
        raise UserError(f"{why}, so that eq. 7 has no value there: use --weighting simple.")
    return replace(config, backbone=source, category=category, more_subjects=more)
