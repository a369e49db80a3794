"""SuDe's hinge with a margin: pull until rho = 1 + MARGIN, and ever less on the way there."""

from sude_lab import losses

MARGIN = 0.25


def regularizer(x_t, t, output, frozen):
    uncond, category = frozen.ask(x_t, t)
    rho = losses.guidance_projection(output, category, uncond)
    length = (category - uncond).square().flatten(1).mean(1)
    return length * (1 + MARGIN - rho).relu()
