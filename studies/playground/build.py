"""What the page runs, written as static files: networks, weights, prompts, and how noise fades."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor, nn

from studies.playground.models import CATEGORY, Model
from studies.playground.noise import normal
from sude_lab.backbone import Backbone
from sude_lab.classify.implicit import step_weights
from sude_lab.errors import UserError
from sude_lab.generation import sampling_settings
from sude_lab.io.files import atomic_write
from sude_lab.losses import output_weight
from sude_lab.prompts import PLACEHOLDER, fill, photo_of, with_attribute
from sude_lab.runs.folder import Run
from sude_lab.world import drawing as world
from sude_lab.world.subjects import subject

RUNTIME = "onnxruntime-web@1.30.0"
PAGE = Path(__file__).parent / "page"
SCRIPTS = {"ort.wasm.bundle.min.mjs": "ort.js", "ort.webgpu.bundle.min.mjs": "ort.webgpu.js"}
BINARIES = {
    "ort-wasm-simd-threaded.wasm": "ort.bin",
    "ort-wasm-simd-threaded.asyncify.wasm": "ort.webgpu.bin",
}


class Network(nn.Module):
    """One of the backbone's networks as a function of tensors; latents are the denoiser's."""

    def __init__(self, backbone: Backbone, name: str) -> None:
        super().__init__()
        self.unet, self.vae = backbone.unet, backbone.pipeline.vae
        self.name, self.scale = name, self.vae.config.scaling_factor

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        if self.name == "unet":
            t, condition = rest
            return self.unet(x, t, condition).sample
        if self.name == "decoder":
            return self.vae.decode(x / self.scale).sample
        return self.vae.encode(x).latent_dist.mean * self.scale


def export(backbone: Backbone, name: str, path: Path) -> None:
    """Write unet, decoder or encoder as ONNX, any batch size; the UNet's weights are inputs.

    So one network draws with any weights, and what lies between two models, too.
    """
    shape, side = backbone.latent_shape, backbone.resolution
    length, width = backbone.tokenizer.model_max_length, backbone.text_encoder.config.hidden_size
    inputs: dict[str, Tensor] = {
        "x": torch.zeros(2, *(shape if name != "encoder" else (3, side, side)))
    }
    if name == "unet":
        inputs |= {"t": torch.tensor([1, 1]), "condition": torch.zeros(2, length, width)}
    with atomic_write(path) as file, warnings.catch_warnings(), torch.no_grad():
        # The newer exporter takes much longer, and its graph is ten times as large.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Network(backbone, name).eval(),
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=["out"],
            dynamic_axes={key: {0: "batch"} for key in inputs},
            do_constant_folding=name != "unet",
            dynamo=False,
        )
        if name == "unet":
            model = onnx.load(file)
            for weight in model.graph.initializer:
                about = (weight.name, weight.data_type, weight.dims)
                model.graph.input.append(onnx.helper.make_tensor_value_info(*about))
            del model.graph.initializer[:]
            onnx.save(model, file)


def pack(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bytes:
    """Return a tuned network as its difference from `base`: a scale a row, then whole numbers.

    W - W_0 = scale * k, k in -127 ... 127; the rows of a tensor are those of its first dimension,
    a vector is one row. float32 scales of all tensors first, then all k, a byte each.
    """
    scales, numbers = [], []
    for name, start in base.items():
        rows = (weights[name] - start).reshape(len(start) if start.ndim > 1 else 1, -1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        scales.append(scale.flatten().numpy())
        numbers.append((rows / scale.clamp_min(1e-30)).round().flatten().numpy().astype(np.int8))
    return b"".join(
        [np.concatenate(scales).astype("<f4").tobytes(), *(k.tobytes() for k in numbers)]
    )


def unpack(data: bytes, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that `pack` kept, as the page computes them."""
    counts = [len(start) if start.ndim > 1 else 1 for start in base.values()]
    scales = torch.frombuffer(bytearray(data[: 4 * sum(counts)]), dtype=torch.float32)
    numbers = torch.frombuffer(bytearray(data[4 * sum(counts) :]), dtype=torch.int8)
    sizes = [start.numel() for start in base.values()]
    parts = zip(base.items(), scales.split(counts), numbers.split(sizes), strict=True)
    return {
        name: start + (scale[:, None] * k.reshape(len(scale), -1)).reshape(start.shape)
        for (name, start), scale, k in parts
    }


def prompts() -> tuple[list[str], list[str]]:
    """Return every prompt that the page can make: of the classes, and of the subject."""
    classes = [
        photo_of(f"{attribute} {category}".strip())
        for category, attributes in world.ATTRIBUTES.items()
        for attribute in ("", *attributes)
    ]
    template = f"photo of a {PLACEHOLDER} {CATEGORY}"
    return classes, [with_attribute(template, a) for a in (None, *world.ATTRIBUTES[CATEGORY])]


def write_models(out: Path, base: Backbone, models: Sequence[tuple[Model, Run]]) -> dict[str, Any]:
    """Write weights and embedded prompts; return what the page's manifest says of them."""
    start = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    _write(out / "untuned.bin", b"".join(w.numpy().astype("<f4").tobytes() for w in start.values()))
    classes, subjects = prompts()
    texts = ["", *classes]
    conditions = [base.encode_prompts(texts).hidden]
    for model, run in models:
        backbone = run.load(backbone=base.copy())
        _write(out / f"{model.name}.bin", pack(backbone.unet.state_dict(), start))
        texts += [f"{model.name}: {prompt}" for prompt in subjects]
        filled = [fill(prompt, *run.tokens) for prompt in subjects]
        conditions.append(backbone.encode_prompts(filled).hidden)
    _write(out / "prompts.bin", torch.cat(conditions).numpy().astype("<f4").tobytes())
    return {
        "tensors": [[name, list(weight.shape)] for name, weight in start.items()],
        "prompts": texts,
        "models": [{"name": model.name, "label": model.label} for model, _ in models],
    }


def write_facts(out: Path, base: Backbone) -> dict[str, Any]:
    """Write the pictures; return the schedule, the sampler and the world for the manifest."""
    examples = Image.new("RGB", (base.resolution * len(world.CATEGORIES), base.resolution))
    for k in range(len(world.CATEGORIES)):
        scene = subject("demo", len(world.CATEGORIES) + k).scene  # new ones: number 0 is tuned on
        examples.paste(world.draw(scene, base.resolution), (k * base.resolution, 0))
    with atomic_write(out / "examples.png") as path:
        examples.save(path)
    settings, sampler = sampling_settings(base.facts), base.sampler()
    sampler.set_timesteps(settings["num_inference_steps"])
    schedule = base.schedule
    t = torch.arange(schedule.num_timesteps)
    check = normal(0)[None], torch.tensor([500]), base.encode_prompts([photo_of(CATEGORY)])
    return {
        "abar": schedule.alphas_cumprod.tolist(),
        "last": float(sampler.final_alpha_cumprod),
        "times": sampler.timesteps.tolist(),
        "guidance": settings["guidance_scale"],
        "sude": output_weight(t, schedule, "reference").tolist(),
        "elbo": step_weights(schedule).tolist(),
        "shape": list(base.latent_shape),
        "tokens": base.tokenizer.model_max_length,
        "category": CATEGORY,
        "attributes": {name: list(values) for name, values in world.ATTRIBUTES.items()},
        "check": base.predict(*check).flatten()[:64].tolist(),
    }


def write_runtime(out: Path, package: Path | None) -> None:
    """Write what runs ONNX in a browser, from npm; its binaries are packed, for they shrink to 1/4.

    Raises:
        UserError: npm is missing or could not fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        if package is None:
            command = ["npm", "pack", RUNTIME, "--pack-destination", folder]
            try:
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(
                    f"npm could not fetch {RUNTIME}: run `npm pack {RUNTIME}` where there is a "
                    "network, and name the file with --runtime."
                ) from error
            (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name, target in (SCRIPTS | BINARIES).items():
                file = archive.extractfile(f"package/dist/{name}")
                assert file is not None
                data = file.read()
                _write(out / target, gzip.compress(data, 9, mtime=0) if name in BINARIES else data)


def build(
    out: Path, base: Backbone, models: Sequence[tuple[Model, Run]], runtime: Path | None = None
) -> None:
    """Write the folder of the page."""
    for name in ("unet", "decoder", "encoder"):
        export(base, name, out / f"{name}.onnx")
    with torch.no_grad():
        facts = write_facts(out, base) | write_models(out, base, models)
    models[0][1].picture().save(out / "subject.png")
    _write(out / "playground.json", json.dumps(facts).encode())
    write_runtime(out, runtime)
    for file in PAGE.iterdir():
        shutil.copyfile(file, out / file.name)


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
