"""What SuDe costs on a CUDA card: models of full size with random weights, nothing from a network.

    bash benchmarks/gpu.sh --out data/results --budget 420   # again: continues, no row twice
    bash benchmarks/gpu.sh --out try --size tiny             # does it run? without a card, too

Rows of `gpu.csv`, written as soon as each is measured, in the order of their value. One that would
not fit into what is left of the budget is left out; one that fails has its error in its row, and is
tried again next time. Random weights cost what trained ones cost.

`seconds` is the median of a step after warm-up, the device awaited (of a picture, where pictures
are drawn), `least` and `most` beside it; `start_seconds` is the first step with all that comes
before it (encoding). `peak_gib` is the most that the run held on the device, weights
and optimiser included, `step_gib` the same of its timed steps alone; what the benchmark itself
keeps there is subtracted. `share` is the part of the card's own bf16 matrix rate that a step
reaches: its matrix products and convolutions, as torch.utils.flop_counter counts them in one step
(recomputed ones count), a second, over the rate of a product of two large square matrices.

"diffusers' loop" does by hand what a step of diffusers' train_dreambooth.py does (VAE and text
encoder in bf16 asked in every step, UNet in autocast, AdamW as torch chooses, clipping), without
its data loader and accelerate; against_diffusers.py runs the script itself. The flow models are
plain diffusers transformers with LoRA, with w_s 1 and no truncation.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import diffusers
import torch
import tyro
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from real_configs import REAL, build, shrink

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.generation import generate
from sude_lab.runs.prepare import prepared_tuning

BEGAN = float(os.environ.get("GPU_BEGAN", time.time()))
"""When gpu.sh began: what it installs, and the imports above, are part of the budget."""
KEYS = ("card", "model", "method", "variant", "batch")
"""What names a row."""
NUMBERS = ("seconds", "least", "most", "steps", "start_seconds", "total_seconds", "peak_gib")
NUMBERS += ("step_gib", "tera_operations", "share")
COLUMNS = (*KEYS, *NUMBERS, "note", "error")
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {"train": "unet"},
    "dreambooth lora": {"train": "lora"},
    "vico": {"method": "vico"},
    "textual inversion": {"method": "textual_inversion"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"weight_sude": 0.0},
    "SuDe": {"prior": "pretrained"},
    "SuDe, checkpointing": {"prior": "pretrained", "gradient_checkpointing": True},
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    out: Path
    """Folder of gpu.csv."""
    budget: float = 420.0
    """Seconds for all, from the start of the program; begin nothing that would not fit."""
    size: Literal["full", "tiny"] = "full"
    """tiny: small models of the same make, on whatever device there is."""
    only: tuple[str, ...] = ()
    """Only rows in whose name (model, method, variant, batch) one of these words stands."""
    model: Literal["sd15", "sd21", "sdxl"] = "sd15"
    steps: int = 12
    """Steps that are timed."""
    warm_up: int = 3
    """Steps before them."""


@dataclass(frozen=True)
class Flow:
    """A flow-matching transformer as published, of about 512 x 512 pixels."""

    kind: str
    config: dict[str, Any]
    small: dict[str, Any]
    """What is other in a small one."""
    words: int
    """Tokens of a prompt."""
    targets: list[str]


FLOWS = {
    "sd3-medium": Flow(
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32},
        77 + 77,  # CLIP's and T5's, as the training script cuts them
        [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    ),
    "flux2-klein-4b": Flow(
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
        | {"joint_attention_dim": 32},
        512,
        [*ATTENTION, "to_qkv_mlp_proj"],
    ),
}


class Laboratory:
    """The device, and what is measured on it; every measurement returns numbers of its row."""

    def __init__(self, args: Benchmark) -> None:
        self.args, self.tiny = args, args.size == "tiny"
        self.cuda = torch.cuda.is_available()
        if not self.cuda and not self.tiny:
            sys.exit(
                "There is no CUDA card here, and full-size models are measured on one: "
                "use --size tiny to try the script."
            )
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = torch.bfloat16
        self.card = torch.cuda.get_device_name() if self.cuda else platform.machine()
        self.card += ", small models" if self.tiny else ""
        self.rate = 0.0
        self.until = 0.0
        """When the measurement should end: no further step is then timed."""

    def now(self) -> float:
        """Return the time in seconds, once the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Forget what was: from here on memory counts."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated()

    def peak(self) -> float:
        """Return the GiB that were held at most since this was asked last; NaN without a card."""
        if not self.cuda:
            return math.nan
        found = (torch.cuda.max_memory_allocated() - self.idle) / 2**30
        torch.cuda.reset_peak_memory_stats()
        return found

    def clock(self, step: Callable[[], Any], *, count: bool = True) -> dict[str, float]:
        """Return a step's seconds, operations and memory, after some steps to warm up."""
        found: dict[str, float] = {}
        if count:
            with FlopCounterMode(display=False) as counted:
                step()
            found["tera_operations"] = counted.get_total_flops() / 1e12
        for _ in range(self.args.warm_up):
            step()
        before = self.peak()
        times: list[float] = []
        while len(times) < self.args.steps and (len(times) < 5 or time.time() < self.until):
            began = self.now()
            step()
            times.append(self.now() - began)
        last = self.peak()
        found |= {"step_gib": last, "peak_gib": max(before, last)}
        found |= {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
        if count and self.rate:
            found["share"] = found["tera_operations"] * 1e12 / found["seconds"] / self.rate
        return found | {"steps": len(times)}

    # --- what is measured -------------------------------------------------------------------------

    def machine(self) -> dict[str, Any]:
        """Measure the rate of a product of two large square matrices, and say what is here."""
        side = 8192 if not self.tiny else 256
        a = torch.randn(side, side, device=self.device, dtype=self.dtype)
        self.start()
        found = self.clock(lambda: [a @ a for _ in range(5)], count=False)
        found |= {name: found[name] / 5 for name in ("seconds", "least", "most")}
        self.rate = 2 * side**3 / found["seconds"]
        facts = f"{2 * side**3 / found['seconds'] / 1e12:.1f} Tflop/s of {self.dtype} products"
        driver = ""
        if self.cuda:
            ask = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
            told = subprocess.run(ask, capture_output=True, text=True, check=False)
            driver = f", driver {told.stdout.strip() or 'unknown'}, CUDA {torch.version.cuda}"
        facts += f"{driver}, torch {torch.__version__}, diffusers {diffusers.__version__}, Python "
        facts += f"{platform.python_version()}, {os.cpu_count()} processors"
        return found | {"tera_operations": 2 * side**3 / 1e12, "note": facts}

    @cached_property
    def opened(self) -> Backbone:
        """The model with random weights, made on the device itself; kept, and copied for a run."""
        config = REAL[self.args.model]
        config = shrink(config)[0] if self.tiny else config
        with tempfile.TemporaryDirectory() as folder:
            pipeline = build(config, Path(folder), device=str(self.device), full=not self.tiny)
        pipeline.to(self.device).set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        return Backbone(pipeline, f"{self.args.model}, random", self.device, self.dtype)

    def opening(self) -> dict[str, float]:
        """Measure how long that takes, the device's own start included."""
        began = self.now()
        self.start()
        _ = self.opened
        return {"seconds": self.now() - began, "peak_gib": self.peak()}

    @cached_property
    def picture(self) -> Image.Image:
        """A picture of the model's size."""
        side = self.opened.resolution
        return Image.linear_gradient("L").convert("RGB").resize((side, side))

    def tuned(self, method: str, variant: str, batch: int, setting: str = "") -> dict[str, Any]:
        """Measure steps of our own tuning."""
        backbone, picture = self.opened, self.picture
        self.start()
        backbone = backbone.copy()
        if "channels_last" in setting:
            backbone.unet.to(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, SUDE_LAB_CACHE=cache):
            began = self.now()
            run = prepared_tuning(self.config(method, variant, batch), backbone, picture)
            next(run)
            found: dict[str, Any] = {"start_seconds": self.now() - began}
        if "compile" not in setting:
            return found | self.clock(lambda: next(run))
        try:
            backbone.unet.compile(backend="eager" if self.tiny else "inductor")
            began = self.now()
            next(run)
            found["note"] = f"its first step, with compiling: {self.now() - began:.0f} s"
            return found | self.clock(lambda: next(run), count=False)
        finally:
            torch.compiler.reset()

    def config(self, method: str, variant: str, batch: int, steps: int = 10_000) -> TuningConfig:
        """Return the settings of a run."""
        return TuningConfig(
            image=Path("dog.png"),
            category="dog",
            train_batch_size=batch,
            max_train_steps=steps,
            **METHODS[method] | VARIANTS[variant],
        )

    def whole_run(self, method: str, variant: str) -> dict[str, Any]:
        """Measure a run from its picture to its last step; the model is open."""
        steps = 400 if not self.tiny else 3
        backbone, picture = self.opened, self.picture
        self.start()
        backbone, done = backbone.copy(), 0
        began = self.now()
        for _ in prepared_tuning(self.config(method, variant, 1, steps), backbone, picture):
            done += 1
            if time.time() > self.until:
                break
        spent = self.now() - began
        found: dict[str, Any] = {"steps": done, "total_seconds": spent, "seconds": spent / done}
        found["note"] = "" if done == steps else f"stopped after {done} of {steps} steps"
        return found | {"peak_gib": self.peak()}

    def script(self, batch: int) -> dict[str, float]:
        """Measure steps as diffusers' train_dreambooth.py takes them, written out."""
        backbone, picture = self.opened, self.picture
        self.start()
        pipeline = backbone.copy().pipeline
        vae, text_encoder = (x.to(self.dtype) for x in (pipeline.vae, pipeline.text_encoder))
        unet = pipeline.unet.requires_grad_(True).train()
        scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-6, weight_decay=1e-2)
        pixels = (
            VaeImageProcessor(do_resize=False)
            .preprocess(picture)
            .to(self.device, self.dtype)
            .repeat(batch, 1, 1, 1)
        )
        words = pipeline.tokenizer(
            ["photo of a sks dog"] * batch, padding="max_length", return_tensors="pt"
        ).input_ids.to(self.device)
        scale, last = vae.config.scaling_factor, scheduler.config.num_train_timesteps

        def step() -> None:
            with torch.no_grad():  # the script leaves it on, where nothing requires gradients
                latents = vae.encode(pixels).latent_dist.sample() * scale
                hidden = text_encoder(words)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, last, (batch,), device=self.device)
            with torch.autocast(self.device.type, self.dtype):
                output = unet(scheduler.add_noise(latents, noise, t), t, hidden).sample
            loss = F.mse_loss(output.float(), noise.float())
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # it logs every step

        return self.clock(step)

    def drawing(self, batch: int) -> dict[str, Any]:
        """Measure pictures of 50 steps with guidance 7.5, `batch` at once."""
        steps = 50 if not self.tiny else 2
        backbone = self.opened
        self.start()
        draw = partial(
            generate,
            backbone,
            "photo of a dog",
            num_images=batch,
            batch_size=batch,
            guidance_scale=7.5,
        )
        draw(num_inference_steps=2)
        times = []
        while len(times) < 3 and (not times or time.time() < self.until):
            began = self.now()
            draw(num_inference_steps=steps)
            times.append((self.now() - began) / batch)
        found: dict[str, Any] = {"seconds": statistics.median(times), "least": min(times)}
        found |= {"most": max(times), "note": f"a picture of {steps} steps, guidance 7.5"}
        return found | {"peak_gib": self.peak()}

    def flow(self, name: str, sude: bool, batch: int) -> dict[str, Any]:
        """Measure steps of LoRA on a flow-matching transformer, with SuDe's two predictions or not.

        The plain loss of x_s = (1 - s) x_0 + s eps is |v - (eps - x_0)|^2; SuDe adds
        |v - v_cate|^2 - |v - v_null|^2, of the transformer without its adapters, in one call.
        """
        flow = FLOWS[name]
        config = flow.config | (flow.small if self.tiny else {})
        self.start()
        with torch.device(self.device):
            model = getattr(diffusers, flow.kind).from_config(config)
        model = model.to(self.device, self.dtype).requires_grad_(False)
        model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=flow.targets))
        cast_training_params(model, torch.float32)
        weights = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.peak()  # it was made in float32
        words = flow.words if not self.tiny else 8
        side = 64 if not self.tiny else 8
        random = partial(torch.randn, device=self.device)
        prompts = random(3, words, config["joint_attention_dim"])  # subject, null, category
        if name == "sd3-medium":
            shape: tuple[int, ...] = (batch, 16, side, side)
            pooled = random(3, config["pooled_projection_dim"])
        else:  # patches of 2 x 2 of 32 channels in a row, with their places
            shape = (batch, side * side // 4, 128)
            one, row, word = (torch.arange(k, device=self.device) for k in (1, side // 2, words))
            places = {
                "img_ids": torch.cartesian_prod(one, row, row, one),
                "txt_ids": torch.cartesian_prod(one, one, one, word),
            }

        def predict(x: Tensor, s: Tensor, which: list[int]) -> Tensor:
            index = torch.tensor(which, device=self.device)
            told: dict[str, Any] = {"encoder_hidden_states": prompts[index]}
            if name == "sd3-medium":
                told |= {"timestep": 1000 * s, "pooled_projections": pooled[index]}
            else:
                told |= {"timestep": s} | places
            with torch.autocast(self.device.type, self.dtype):
                return model(hidden_states=x, **told).sample.float()

        def step() -> None:
            x_0, eps, s = random(shape), random(shape), torch.rand(batch, device=self.device)
            t = s.view(-1, *[1] * (len(shape) - 1))
            x_s = (1 - t) * x_0 + t * eps
            v = predict(x_s, s, [0] * batch)
            loss = F.mse_loss(v, eps - x_0)
            if sude:
                model.disable_adapters()
                with torch.no_grad():
                    both = predict(
                        torch.cat([x_s, x_s]), torch.cat([s, s]), [1] * batch + [2] * batch
                    )
                model.enable_adapters()
                null, category = both.chunk(2)
                loss = loss + F.mse_loss(v, category) - F.mse_loss(v, null)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return self.clock(step) | {"note": f"{weights / 1e9:.2f}e9 weights, {words} words"}

    def plan(self) -> list[tuple[float, tuple[str, str, str, int], Callable[[], dict[str, Any]]]]:
        """Return (seconds it may take on a large card, what names it, how it is measured)."""
        name = self.args.model
        plan: list[Any] = [
            (10.0, ("", "machine", "", 0), self.machine),
            (20.0, (name, "opening", "", 0), self.opening),
        ]

        def tuned(method: str, variant: str, batch: int, seconds: float, setting: str = "") -> None:
            key = (name, method, ", ".join(filter(None, (variant, setting))), batch)
            plan.append((seconds, key, partial(self.tuned, method, variant, batch, setting)))

        for method in METHODS:
            for variant in ("plain", "SuDe"):
                tuned(method, variant, 1, 12)
        key = (name, "vico", "SuDe, 400 steps", 1)
        plan.append((100, key, partial(self.whole_run, "vico", "SuDe")))
        for variant in ("plain", "SuDe"):  # one that fails says why in its row, and so soon enough
            tuned("dreambooth lora", variant, 1, 90, "compile")
        tuned("dreambooth lora", "SuDe, checkpointing", 1, 12)
        for method in METHODS:
            for variant in ("plain", "SuDe"):
                tuned(method, variant, 4, 15)
        for batch in (1, 4):
            key = (name, "dreambooth", "diffusers' loop", batch)
            plan.append((12, key, partial(self.script, batch)))
        for batch in (1, 4):
            plan.append((15, (name, "drawing", "", batch), partial(self.drawing, batch)))
        for batch in (1, 4):
            for flow in FLOWS:
                for sude in (False, True):
                    key = (flow, "lora", "SuDe" if sude else "plain", batch)
                    plan.append((15, key, partial(self.flow, flow, sude, batch)))
        for variant in ("plain", "SuDe"):
            tuned("dreambooth", variant, 4, 15, "channels_last")
        for variant in ("plain", "SuDe"):
            tuned("dreambooth", variant, 1, 90, "compile")
        return plan


def written_rows(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the rows of an earlier call by what names them, without those that failed."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    return {tuple(row[key] for key in KEYS): row for row in rows}


def write(path: Path, rows: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """Write all rows; whoever is killed meanwhile leaves the rows of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows.values())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def reason(error: Exception) -> str:
    """Return why a measurement failed, in a line: torch.compile says that on its second one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    last = next((k for k, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return f"{type(error).__name__}: {' '.join(lines[: last + 1])[:300]}"


def too_long(*_: Any) -> None:
    """Stop a measurement that takes far longer than it may."""
    raise TimeoutError("took too long")


def main(args: Benchmark) -> None:
    """Measure one row after another, as long as the budget lasts."""
    lab, path = Laboratory(args), args.out / "gpu.csv"
    rows = written_rows(path)
    left_out = []
    signal.signal(signal.SIGALRM, too_long)
    for expected, names, measure in lab.plan():
        key = (lab.card, *map(str, names))
        text = " ".join(filter(None, map(str, names)))
        wanted = not args.only or any(word in text for word in args.only)
        left = args.budget - (time.time() - BEGAN)
        if names[1] == "machine":  # in every call: shares need its rate
            wanted = True
        elif key in rows or not wanted:
            continue
        if left < (expected if not lab.tiny else 0):
            left_out.append(text)
            continue
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        found: dict[str, Any] = {}
        lab.until = time.time() + min(left, expected) * 0.9
        began = time.time()
        signal.setitimer(signal.ITIMER_REAL, max(1.0, min(left + 10, 2 * expected + 20)))
        try:
            found = measure()
        except Exception as error:  # whatever it is, the next one may do
            row["error"] = reason(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        row["note"] = found.pop("note", "")
        row |= {name: f"{value:.6g}" for name, value in found.items() if not math.isnan(value)}
        rows[key] = row
        write(path, rows)
        numbers = ", ".join(f"{k} {row[k]}" for k in (*NUMBERS, "note") if row.get(k))
        numbers += f"failed because {row['error']}" if row.get("error") else ""
        spent = time.time() - began
        print(f"[{time.time() - BEGAN:5.0f} s, {spent:.0f}] {text}: {numbers}", flush=True)
    print(f"{path}: {len(rows)} rows; no time for: {'; '.join(left_out) or 'none'}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
