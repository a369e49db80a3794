"""The baselines that SuDe regularises: what each one trains, how it prompts, how it is saved.

A method knows nothing of SuDe, and SuDe knows nothing of the method.
"""

from __future__ import annotations

from sude_lab.errors import UserError
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

__all__ = [
    "METHODS",
    "CustomDiffusion",
    "DreamBooth",
    "Method",
    "TextualInversion",
    "ViCo",
    "get_method",
]


def get_method(name: str) -> type[Method]:
    """Return the class of a method by its name.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]
