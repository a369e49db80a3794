"""The checks of the exercises in `notebooks/exercises`, shared with pytest, and what they hand out.

A check calls an answer on small random inputs that depend on its seed, and returns None where the
answer is right; a wrong one gets a `Mistake`, whose sentence names the slip if it is a typical one.
Checks print nothing and keep nothing. A module is imported when its first check is used.
"""

from importlib import import_module
from typing import Any

_TASKS = {
    "formulas": """log_density log_ratio log_posterior chain noise_errors sude push along eps_weight
        same_push both_sides threshold truncated rho hinge settle loss_along shifted end_rho rest
        tuned hinge_gradient corrected after_steps at_fidelity drawn as_ddpm velocity flow_weight
        noisy_step euler""",
    "statistics": """by_weight paired_gains cluster_interval front best_weight naive_and_honest
        judged_text image_score paired_interval spearman detects best_kept area covers decided
        sign_flip""",
    "training": """noised even_time open_share training_step paired_gain lora_count latent_batch
        smoothed batch_loss sude_step paper_prompt combined keys_and_values given_back plug""",
}
_GIVEN = {
    "formulas": "my_dog",
    "judging": "Mistake check_letter",
    "statistics": "made_up_lines made_up_sweep",
    "training": "TinyDenoiser TinyUNet dog_prior plug_batch",
    "worlds": "animals short_schedule stable_diffusion_schedule steps things",
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
