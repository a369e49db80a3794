"""SuDe's hinge with a margin: pull until rho = 1 + MARGIN.

Its gradient is that of `--weighting simple --truncate-at 1.25`; start here to change its form.
"""

from sude_lab import losses

MARGIN = 0.25


def regularizer(x_t, t, output, frozen):
    uncond, category = frozen.ask(x_t, t)
    rho = losses.guidance_projection(output, category, uncond)
    length = (category - uncond).square().flatten(1).mean(1)
    return 2 * length * (1 + MARGIN - rho).relu()
