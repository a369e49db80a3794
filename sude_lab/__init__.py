"""sude_lab: SuDe, derived-class regularisation for one-shot subject-driven generation, in the open.

Every equation of "FaceChain-SuDe: Building Derived Class to Inherit Category Attributes for
One-shot Subject-Driven Generation" (CVPR 2024, arXiv 2403.06775) is one function here, with one
test against an independent oracle. Nothing heavy is imported until a submodule is.
"""

__version__ = "0.1.0"
