"""The checks of the exercises in `notebooks/exercises`, shared with pytest, and what they hand out.

A check calls an answer on small random inputs that depend on its seed, and returns None where the
answer is right; a wrong one gets a `Mistake`, whose sentence names the slip if it is a typical one.
Checks print nothing and keep nothing. A module is imported when its first check is used.
"""

from importlib import import_module
from typing import Any

_TASKS = {
    "start_here": "noised even_time open_share training_step paired_gain",
    "bayes_classifier": "log_density log_ratio log_posterior chain noise_errors",
    "sude_loss": "sude push along eps_weight same_push both_sides",
    "truncation": "threshold truncated rho hinge settle",
    "one_shot_tuning": "lora_count latent_batch smoothed batch_loss sude_step",
    "ablate_w_s": "by_weight paired_gains cluster_interval front best_weight naive_and_honest",
    "ablate_truncation": "loss_along shifted end_rho rest tuned",
    "baselines": "paper_prompt combined keys_and_values given_back plug",
    "evaluating": "judged_text image_score paired_interval spearman detects",
    "without_training": "hinge_gradient corrected after_steps at_fidelity drawn",
    "less_tuning": "best_kept area covers decided sign_flip",
    "two_languages": "as_ddpm velocity flow_weight noisy_step euler",
}
_GIVEN = {
    "judging": "Mistake check_letter",
    "worlds": "animals short_schedule stable_diffusion_schedule steps things",
    "start_here": "TinyDenoiser",
    "one_shot_tuning": "dog_prior",
    "ablate_w_s": "made_up_sweep",
    "baselines": "TinyUNet plug_batch",
    "without_training": "my_dog",
    "less_tuning": "made_up_lines",
}
_MODULES = {name: module for module, names in _GIVEN.items() for name in names.split()}
_MODULES |= {f"check_{task}": module for module, tasks in _TASKS.items() for task in tasks.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name if name in vars(module) else name.removeprefix("check_"))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
