"""SuDe itself, arXiv 2403.06775, eq. 7-9: bit for bit what `sude-lab tune` does without a file."""

from sude_lab import sude_terms


def regularizer(x_t, t, output, frozen):
    uncond, category = frozen.ask(x_t, t)
    return sude_terms(output, category, uncond, x_t, t, frozen.schedule).gated
