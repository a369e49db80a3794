"""sude_lab: SuDe, derived-class regularisation for one-shot subject-driven generation, in the open.

Every equation of "FaceChain-SuDe: Building Derived Class to Inherit Category Attributes for
One-shot Subject-Driven Generation" (CVPR 2024, arXiv 2403.06775) is one function here, with one
test against an independent oracle. Nothing heavy is imported until a name is used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sude_lab import classifier, diffusion, losses
    from sude_lab.generation import generate
    from sude_lab.guidance import sude_guidance
    from sude_lab.implicit import ImplicitClassifier
    from sude_lab.io.opening import open_backbone
    from sude_lab.methods import configure
    from sude_lab.runs.folder import Run, run_tuning
    from sude_lab.sude import SudeRegularizer, SudeTerms, sude_terms
    from sude_lab.tuning import Tuning, tune

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("SudeRegularizer", "SudeTerms", "sude_terms"), "sude"),
    **dict.fromkeys(("Run", "run_tuning"), "runs.folder"),
    **dict.fromkeys(("Tuning", "tune"), "tuning"),
    "ImplicitClassifier": "implicit",
    "configure": "methods",
    "generate": "generation",
    "open_backbone": "io.opening",
    "sude_guidance": "guidance",
}

__all__ = [
    "ImplicitClassifier",
    "Run",
    "SudeRegularizer",
    "SudeTerms",
    "Tuning",
    "__version__",
    "classifier",
    "configure",
    "diffusion",
    "generate",
    "losses",
    "open_backbone",
    "run_tuning",
    "sude_guidance",
    "sude_terms",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sude_lab.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"sude_lab.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
