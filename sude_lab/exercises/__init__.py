"""The checks of the exercises in `notebooks/exercises`, shared with pytest, and what they hand out.

A check calls an answer on small random inputs that depend on its seed, and returns None where the
answer is right. Where it is wrong it raises a `Mistake`, whose sentence names the slip if it is a
typical one. Checks print nothing and keep nothing. A module is imported when its first check is
used.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "judging": "Mistake",
    "worlds": "animals short_schedule stable_diffusion_schedule steps things",
    "start_here": (
        "TinyDenoiser check_even_time check_noised check_open_share check_paired_gain "
        "check_training_step"
    ),
    "bayes_classifier": (
        "check_chain check_log_density check_log_posterior check_log_ratio check_noise_errors "
        "check_normaliser"
    ),
    "sude_loss": (
        "check_along check_both_sides check_eps_weight check_push check_same_push check_sude"
    ),
    "truncation": (
        "check_hinge check_rho check_rho_depends check_settle check_threshold check_truncated"
    ),
    "one_shot_tuning": (
        "check_batch_loss check_latent_batch check_lora_count check_must_keep check_smoothed "
        "check_sude_step dog_prior"
    ),
    "ablate_w_s": (
        "check_best_weight check_by_weight check_cluster_interval check_front "
        "check_naive_and_honest check_paired_gains made_up_sweep"
    ),
    "ablate_truncation": (
        "check_at_half check_end_rho check_loss_along check_rest check_shifted check_tuned"
    ),
    "baselines": (
        "TinyUNet check_combined check_given_back check_keys_and_values check_must_know "
        "check_paper_prompt check_plug plug_batch"
    ),
    "evaluating": (
        "check_detects check_fooled check_image_score check_judged_text check_paired_interval "
        "check_spearman"
    ),
    "without_training": (
        "check_after_steps check_at_fidelity check_corrected check_drawn check_hinge_gradient "
        "check_through_guidance my_dog"
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
