"""The families of models that are opened: where each one's conventions meet those of the core.

A family is a class, a `Backbone`: it says what its pipeline does in its own way (sign, time,
packing, the prompt of no condition, what guidance means), and what a folder of it must hold. The
core imports none of them; `sude_lab.io.opening` finds a pipeline's family in `FAMILIES`.
"""

from sude_lab.adapters import klein, sd3, unet, z_image
from sude_lab.adapters.family import Family

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": unet.StableDiffusion,
    "StableDiffusionXLPipeline": unet.StableDiffusionXL,
    "StableDiffusion3Pipeline": sd3.StableDiffusion3,
    "Flux2KleinPipeline": klein.Klein,
    "ZImagePipeline": z_image.ZImage,
}
"""By the class that a pipeline's `model_index.json` names."""
