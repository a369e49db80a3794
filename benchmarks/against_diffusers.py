"""Our plain DreamBooth beside the script that people use, step by step, at equal work.

    python benchmarks/against_diffusers.py train_dreambooth.py                # the included model
    python benchmarks/against_diffusers.py train_dreambooth.py --shrunk 4 --resolution 256
    python benchmarks/against_diffusers.py train_dreambooth.py --backbone FOLDER --device cuda \
        --dtype bfloat16                                                      # not measured yet

SCRIPT is `examples/dreambooth/train_dreambooth.py` of https://github.com/huggingface/diffusers at
the tag of the installed version (v0.42.1 for 0.42.1). It runs as it is, in a process of its own,
and so does ours; they take turns, a block of steps each, one asleep while the other works. So
whatever else the machine does hits both alike; the ratio is the median of the paired ratios.

Equal work: pipeline, picture (at its final size already, so nobody crops or mirrors), batch,
precision, trained weights (the whole UNet, no text encoder), AdamW, learning rate, decay, clipping.
What each did is taken down while it does it, and compared: where it differs, this stops. Neither
logs, saves or draws pictures. There an epoch of one picture is one example, so the script's folder
holds as many copies of it as the batch is large.

"text kept" is the script with its --pre_compute_text_embeddings; "as torch chooses" is ours with
--optimizer adamw, which on a CPU is the script's loop over the tensors. "speed" is steps a second
relative to the first side. "busy" counts the processor's time alone, which other programs on the
machine disturb less. Shares are clocked around the parts in a block of their own, after the timed
ones. """

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal

import accelerate
import diffusers
import numpy as np
import torch
import tqdm.auto
import transformers
import tyro
from PIL import Image
from rows import machine, spread, write
from torch import Tensor
from torch.utils.data import DataLoader, dataloader

from sude_lab.config import EMBEDDED, TuningConfig
from sude_lab.io.opening import open_backbone, resolve_source
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.world import subjects as study

PARTS = ("VAE encoder", "text encoder", "AdamW", "clipping", "UNet forward", "UNet backward")
"""Of whose clocked share of a step a row tells."""
SIDES = ("diffusers", "diffusers, text kept", "sude_lab", "sude_lab, AdamW as torch chooses")


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    script: tyro.conf.Positional[Path]
    """train_dreambooth.py, from examples/dreambooth of diffusers at the installed version's tag."""
    backbone: str = EMBEDDED
    """embedded, or a pipeline folder."""
    shrunk: int = 0
    """In its place, Stable Diffusion 1.5 with random weights and all widths divided by this."""
    resolution: int | None = None
    """Side of the picture; none: the model's own."""
    train_batch_sizes: tuple[int, ...] = (1, 4)
    blocks: int = 9
    steps: int = 5
    """Steps in a block."""
    learning_rate: float = 1e-6
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Path | None = None
    """Folder for against_diffusers.csv, where rows of other models and batches stay."""
    sides: tuple[str, ...] = SIDES
    """Fewer of them need less memory: each holds a model with its optimiser."""
    worker: str = ""
    """Internal: the side that this process is."""
    folder: Path = Path()
    """Internal: where pipeline and pictures are."""


# --- one side, in a process of its own ------------------------------------------------------------


class Ended(BaseException):
    """Stops a side between two steps."""


class Turns:
    """Takes a side's steps when the parent says so, and tells it what they cost and did.

    A line of JSON in, {"steps": 5, "clocks": false}; a line out when these steps are done.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.facts: dict[str, Any] = {}
        self._losses: list[float] = []
        self._seconds: dict[str, float] = {}
        self._inside = False
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the script prints is not an answer
        self._next()

    def _next(self) -> None:
        asked = json.loads(sys.stdin.readline() or '{"steps": 0}')
        if not asked["steps"]:
            raise Ended
        self._left, self._clocks = asked["steps"], asked["clocks"]
        self._losses, self._seconds = [], {}
        self._began, self._busy = self.now(), time.process_time()

    def now(self) -> float:
        """Return the time in seconds, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, loss: float) -> None:
        """Be told of a step's end; at the end of a block wait for the next one."""
        self._losses.append(loss)
        self._left -= 1
        if self._left:
            return
        spent, busy = self.now() - self._began, time.process_time() - self._busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        answer = {"seconds": spent, "busy": busy, "peak_mib": peak, "facts": self.facts}
        answer |= {"losses": self._losses, "parts": self._seconds}
        print(json.dumps(answer), file=self._out)
        self._out.flush()
        self._next()

    def watch(
        self, owner: Any, name: str, part: str, note: Callable[..., dict[str, Any]] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Clock every call of `owner.name` as `part`, and note what its first call tells."""
        original = getattr(owner, name)
        noted = note is None

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal noted
            if not noted:
                assert note is not None
                self.facts |= note(*args, **kwargs)
                noted = True
            if not self._clocks or self._inside:
                return original(*args, **kwargs)
            self._inside = True
            began = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self._seconds[part] = self._seconds.get(part, 0.0) + self.now() - began
                self._inside = False

        return replaced(owner, name, watched)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another value in the place of an attribute for a moment."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def note_unet(unet: Any, sample: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tell the batch, what of the UNet is trained, and in which precision it runs."""
    trained = [p for p in unet.parameters() if p.requires_grad]
    mixed = torch.is_autocast_enabled(sample.device.type)
    forward = torch.get_autocast_dtype(sample.device.type) if mixed else trained[0].dtype
    return {
        "latents": list(sample.shape),
        "trained weights": sum(p.numel() for p in trained),
        "weights in": str(trained[0].dtype),
        "forward in": str(forward),
        "device": sample.device.type,
    }


def note_step(optimizer: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tell the optimiser's class and settings, and what it changes."""
    group = optimizer.param_groups[0]
    settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    changed = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    kind = next(c.__name__ for c in type(optimizer).__mro__ if c.__module__.startswith("torch."))
    return {"optimizer": kind, "changed weights": changed} | settings


def note_clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tell where gradients are clipped."""
    return {"max_grad_norm": float(max_norm)}


@contextlib.contextmanager
def watched(turns: Turns) -> Iterator[None]:
    """Clock and note the parts that the table of shares names."""
    loader = "picture, data loader"
    unet = diffusers.UNet2DConditionModel
    with contextlib.ExitStack() as stack:
        for owner, name, part, note in (
            (DataLoader, "__iter__", loader, None),
            (dataloader._BaseDataLoaderIter, "__next__", loader, None),
            (diffusers.AutoencoderKL, "encode", "VAE encoder", None),
            (transformers.CLIPTextModel, "forward", "text encoder", None),
            (unet, "train", "unet.train()", None),
            (unet, "forward", "UNet forward", note_unet),
            (Tensor, "backward", "UNet backward", None),
            (torch.nn.utils, "clip_grad_norm_", "clipping", note_clip),
            (torch.nn.utils, "get_total_norm", "clipping", None),  # ours: the same in two calls
            (torch.nn.utils, "clip_grads_with_norm_", "clipping", None),
            (torch.optim.AdamW, "step", "AdamW", note_step),
        ):
            stack.enter_context(turns.watch(owner, name, part, note))
        yield


def their_arguments(args: Benchmark, batch: int, text_kept: bool) -> list[str]:
    """Return the script's command line."""
    found = {
        "pretrained_model_name_or_path": args.folder / "pipeline",
        "instance_data_dir": args.folder / f"pictures-{batch}",
        "instance_prompt": "photo of a sks dog",
        "resolution": args.resolution,
        "train_batch_size": batch,
        "learning_rate": args.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": 10_000_000,
        "checkpointing_steps": 10_000_000,
        "mixed_precision": "bf16" if args.dtype == "bfloat16" else "no",
        "output_dir": args.folder / "output",
    }
    words = [word for key, value in found.items() for word in (f"--{key}", str(value))]
    return words + ["--pre_compute_text_embeddings"] * text_kept


def run_theirs(args: Benchmark, batch: int, turns: Turns, text_kept: bool) -> None:
    """Run the script; it hands every step's loss to `Accelerator.log`, where it waits."""

    def log(accelerator: Any, values: dict[str, Any], *_: Any, **__: Any) -> None:
        turns.step(float(values["loss"]))

    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.modules |= stand_in()
    with (
        replaced(accelerate.Accelerator, "log", log),
        replaced(accelerate.Accelerator, "init_trackers", lambda *_, **__: None),
        replaced(tqdm.auto, "tqdm", partial(tqdm.auto.tqdm, disable=True)),
        replaced(sys, "argv", [str(args.script), *their_arguments(args, batch, text_kept)]),
    ):
        runpy.run_path(str(args.script), run_name="__main__")


def run_ours(args: Benchmark, batch: int, turns: Turns, side: str) -> None:
    """Run `tune` on the same pipeline and picture."""
    path = args.folder / "pictures-1" / "0.png"
    config = TuningConfig(
        image=path,
        category="dog",
        train="unet",
        weight_sude=0.0,
        prior_loss_weight=0.0,
        learning_rate=args.learning_rate,
        token_learning_rate=0.0,
        resolution=args.resolution,
        train_batch_size=batch,
        max_train_steps=10_000_000,
        optimizer="adamw" if "as torch" in side else "adamw_fused",
    )
    turns.facts["max_grad_norm"] = config.max_grad_norm
    backbone = open_backbone(args.folder / "pipeline", device=args.device, dtype=args.dtype)
    for step in tune(config, backbone, Image.open(path).convert("RGB")):
        turns.step(step.loss_subject.mean().item())


def work(args: Benchmark) -> None:
    """Be one side of one batch size."""
    side, batch = args.worker, args.train_batch_sizes[0]
    logging.disable(logging.WARNING)
    torch.set_num_threads(torch.get_num_threads())
    with contextlib.suppress(Ended):
        turns = Turns(args.device)
        with watched(turns):
            if side.startswith("diffusers"):
                run_theirs(args, batch, turns, side != "diffusers")
            else:
                run_ours(args, batch, turns, side)


def stand_in() -> dict[str, types.ModuleType]:
    """Return what the script takes from torchvision, in PIL and torch; nothing where it is there.

    Pictures of the final size pass these as they pass torchvision's own: unchanged, then as a
    tensor from -1 to 1.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return {}

    class Step:
        def __init__(self, *settings: Any, **more: Any) -> None:
            self.settings = settings

    class Resize(Step):
        def __call__(self, image: Image.Image) -> Image.Image:
            scale = self.settings[0] / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            resize = image.resize(size, Image.Resampling.BILINEAR) if scale != 1 else image
            return resize

    class CenterCrop(Step):
        def corner(self, free: int) -> int:
            return free // 2

        def __call__(self, image: Image.Image) -> Image.Image:
            side = self.settings[0]
            left, top = self.corner(image.width - side), self.corner(image.height - side)
            return image.crop((left, top, left + side, top + side))

    class RandomCrop(CenterCrop):
        def corner(self, free: int) -> int:
            return int(torch.randint(free + 1, ())) if free else 0

    class RandomHorizontalFlip(Step):
        def __call__(self, image: Image.Image) -> Image.Image:
            left_right = Image.Transpose.FLIP_LEFT_RIGHT
            return image.transpose(left_right) if torch.rand(()) < 0.5 else image

    class ToTensor(Step):
        def __call__(self, image: Image.Image) -> Tensor:
            pixels = torch.from_numpy(np.array(image, copy=True))
            return pixels.permute(2, 0, 1).contiguous().float().div(255)

    class Normalize(Step):
        def __call__(self, x: Tensor) -> Tensor:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in self.settings)
            return x.sub(mean).div(std)

    class Compose(Step):
        def __call__(self, x: Any) -> Any:
            for step in self.settings[0]:
                x = step(x)
            return x

    torchvision, transforms = (
        types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")
    )
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR="bilinear")  # type: ignore[attr-defined]
    for kind in (
        *(Resize, CenterCrop, RandomCrop, RandomHorizontalFlip),
        *(ToTensor, Normalize, Compose),
    ):
        setattr(transforms, kind.__name__, kind)
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    found = {"torchvision": torchvision, "torchvision.transforms": transforms}
    for name, module in found.items():
        module.__spec__ = ModuleSpec(name, None)
    return found


# --- the parent -----------------------------------------------------------------------------------


class Side:
    """One side's process, as the parent sees it."""

    def __init__(self, args: Benchmark, name: str, batch: int) -> None:
        self.name = name
        command = [sys.executable, __file__, str(args.script), "--worker", name]
        command += ["--folder", str(args.folder), "--train-batch-sizes", str(batch)]
        command += ["--resolution", str(args.resolution), "--device", args.device]
        command += ["--dtype", args.dtype, "--learning-rate", str(args.learning_rate)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the side)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def block(self, steps: int, clocks: bool = False) -> dict[str, Any]:
        """Let it take a block of steps and return what it tells; the others are asleep."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"steps": steps, "clocks": clocks}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._said.seek(0)
            sys.exit(f"{self.name} stopped:\n{self._said.read()[-2000:]}")
        return json.loads(answer)

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()
        self._said.close()


def differences(facts: dict[str, dict[str, Any]]) -> list[str]:
    """Return in which points the sides did other work, each as a phrase; none is what we want."""
    first, *others = facts
    found = []
    for name in others:
        for key in sorted(facts[first].keys() | facts[name].keys()):
            a, b = facts[first].get(key), facts[name].get(key)
            if a != b:
                found.append(f"{key} is {a} in {first} and {b} in {name}")
    return found


def shares(parts: dict[str, float], seconds: float) -> dict[str, tuple[float, float]]:
    """Return {part: (seconds, share)} of a step, with the rest that no clock saw."""
    whole = dict(parts) | {"everything else": seconds - sum(parts.values())}
    return {part: (spent, spent / seconds) for part, spent in whole.items()}


def shrunk_stable_diffusion(divisor: int, side: int, folder: Path) -> None:
    """Write Stable Diffusion 1.5 with random weights: every width divided, no layer left out."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from real_configs import REAL, build

    real = REAL["sd15"]

    def narrow(config: dict[str, Any], *keys: str) -> dict[str, Any]:
        divide = lambda v: [x // divisor for x in v] if isinstance(v, list) else v // divisor  # noqa: E731
        return config | {key: divide(config[key]) for key in keys}

    unet = narrow(real.unet, "block_out_channels", "cross_attention_dim")
    vae = narrow(real.vae, "block_out_channels")
    for config in (unet, vae):
        config["norm_num_groups"] = math.gcd(32, config["block_out_channels"][0])
    unet["sample_size"], vae["sample_size"] = side // 8, side
    text = narrow(real.text_encoder, "hidden_size", "intermediate_size", "projection_dim")
    with tempfile.TemporaryDirectory() as words:
        pipeline = build(replace(real, unet=unet, vae=vae, text_encoder=text), Path(words))
        pipeline.save_pretrained(folder, safe_serialization=True)


def read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(args: Benchmark, folder: Path) -> Benchmark:
    """Write pipeline and pictures, and return the settings with nothing left open."""
    pipeline = folder / "pipeline"
    if args.shrunk:
        shrunk_stable_diffusion(args.shrunk, args.resolution or 512, pipeline)
    else:
        pipeline.symlink_to(Path(resolve_source(args.backbone)).resolve())
    side = args.resolution
    if side is None:
        unet, vae = (read(pipeline / part / "config.json") for part in ("unet", "vae"))
        side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    picture = study.subject("demo", 0, "dog").picture.resize((side, side), Image.Resampling.LANCZOS)
    for batch in {1, *args.train_batch_sizes}:
        (folder / f"pictures-{batch}").mkdir()
        for k in range(batch):
            picture.save(folder / f"pictures-{batch}" / f"{k}.png")
    return replace(args, folder=folder, resolution=side, script=args.script.resolve())


def version(script: Path) -> str:
    """Return the version of diffusers that the script asks for."""
    asked = re.search(r'check_min_version\("(.+?)"\)', script.read_text(encoding="utf-8"))
    return asked[1] if asked else ""


def model_of(args: Benchmark) -> str:
    """Return the name of the model that both sides tune."""
    return f"Stable Diffusion 1.5 / {args.shrunk}" if args.shrunk else args.backbone


def compare(args: Benchmark, batch: int) -> None:
    """Measure all sides at one batch size and print two tables."""
    sides = [Side(args, name, batch) for name in args.sides]
    for side in sides:
        side.block(2)  # opens the model, and warms up
    seen: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(args.blocks):
        for side in sides:
            seen[side.name].append(side.block(args.steps))
    clocked = {side.name: side.block(2 * args.steps, clocks=True) for side in sides}
    for side in sides:
        side.end()

    facts = {name: told["facts"] for name, told in clocked.items()}
    different = differences(facts)
    if different:
        sys.exit(f"The work is not equal: {'; '.join(different)}.")
    print(f"\n## batch {batch}\n")
    target = read(args.folder / "pipeline" / "scheduler" / "scheduler_config.json").get(
        "prediction_type", "epsilon"
    )
    agreed = {"target": target} | facts[args.sides[0]]
    print(f"all sides: {', '.join(f'{k} {v}' for k, v in agreed.items())}\n")
    print(
        f"{'':22}{'s/step':>9}{'speed':>8}{'of blocks':>16}{'busy s':>9}{'speed':>8}{'loss':>18}"
        f"{'peak MiB':>10}"
    )
    lines = []
    for name in seen:
        pairs, busy_pairs = (
            [a[key] / b[key] for a, b in zip(seen[args.sides[0]], seen[name], strict=True)]
            for key in ("seconds", "busy")
        )
        seconds, busy = (
            statistics.median(told[key] / args.steps for told in seen[name])
            for key in ("seconds", "busy")
        )
        part = clocked[name]["parts"]
        lines.append(
            machine(device=args.device)
            | {"script": version(args.script), "model": model_of(args), "pixels": args.resolution}
            | {"batch": batch, "side": name, "blocks": args.blocks, "steps": args.steps}
            | spread("seconds", [told["seconds"] / args.steps for told in seen[name]])
            | spread("speed", pairs)
            | spread("processor_speed", busy_pairs)
            | {p: round(part.get(p, 0.0) / clocked[name]["seconds"], 4) for p in PARTS}
        )
        losses = [loss for told in seen[name] for loss in told["losses"]]
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        print(
            f"{name:22}{seconds:9.4f}{statistics.median(pairs):8.2f}"
            f"{f'{min(pairs):.2f} to {max(pairs):.2f}':>16}"
            f"{busy:9.4f}{statistics.median(busy_pairs):8.2f}"
            f"{f'{statistics.mean(losses):.3f} +/- {error:.3f}':>18}"
            f"{seen[name][-1]['peak_mib']:10.0f}"
        )
    if args.out is not None:
        write(args.out / "against_diffusers.csv", lines, ("model", "batch", "side"))
    table = {
        name: shares(
            {part: spent / len(told["losses"]) for part, spent in told["parts"].items()},
            told["seconds"] / len(told["losses"]),
        )
        for name, told in clocked.items()
    }
    rows = dict.fromkeys(part for found in table.values() for part in found)
    print(f"\n{'ms a step (share)':22}" + "".join(f"{name:>22}" for name in table))
    for part in [*(r for r in rows if r != "everything else"), "everything else"]:
        cells = []
        for found in table.values():
            spent, share = found.get(part, (0.0, 0.0))
            cells.append(f"{1e3 * spent:.1f} ({100 * share:.0f} %)" if part in found else "-")
        print(f"{part:22}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def main(args: Benchmark) -> None:
    """Print, for every batch size, speeds relative to the script and where the time goes."""
    if args.worker:
        work(args)
        return
    if not args.script.is_file():
        sys.exit(f"There is no script {args.script}: --help says where to get it.")
    unknown = [name for name in args.sides if name not in SIDES]
    if unknown or not args.sides:
        sys.exit(f"The sides are {', '.join(map(repr, SIDES))}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA card here: use --device cpu.")
    with tempfile.TemporaryDirectory() as folder:
        args = prepare(args, Path(folder))
        print(
            f"{model_of(args)}, {args.resolution} pixels, {args.dtype}, "
            f"{machine(device=args.device)}, diffusers {diffusers.__version__}; "
            f"medians of {args.blocks} blocks of {args.steps} steps that take turns"
        )
        if stand_in():
            print(
                "torchvision is not installed: the script reads the picture by a stand-in of PIL "
                "and torch"
            )
        for batch in args.train_batch_sizes:
            compare(args, batch)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
