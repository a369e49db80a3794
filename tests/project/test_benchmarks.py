"""The benchmarks' own logic, and that each runs at a tiny size. No test here measures time."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from studies import costs
from sude_lab.io.files import atomic_write

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str) -> Any:
    return importlib.import_module(name)


# --- beside diffusers' script ---------------------------------------------------------------------

SCRIPT = """
import argparse, torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torchvision import transforms

p = argparse.ArgumentParser()
p.add_argument("--pretrained_model_name_or_path")
p.add_argument("--learning_rate", type=float)
p.add_argument("--train_batch_size", type=int)
args, _ = p.parse_known_args()
accelerator = Accelerator()
unet = UNet2DConditionModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet")
optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate DECAY)
unet, optimizer = accelerator.prepare(unet, optimizer)
print("what a script prints is no answer")
for step in range(100):
    x = torch.randn(args.train_batch_size, 4, 8, 8)
    t = torch.zeros(len(x), dtype=torch.long)
    loss = unet(x, t, torch.zeros(len(x), 5, 32), return_dict=False)[0].square().mean()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item()}, step=step)
"""


def against(tmp_path: Path, tiny_folder: Path, decay: str, **settings: Any) -> tuple[Any, Any]:
    """Return the module and the settings of a comparison with a script of a few lines."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace(" DECAY", decay), encoding="utf-8")
    module = load("against_diffusers")
    args = module.Benchmark(
        script,
        out=tmp_path,
        backbone=str(tiny_folder),
        train_batch_sizes=(2,),
        blocks=2,
        steps=2,
        sides=("diffusers", "sude_lab"),
        **settings,
    )
    return module, args


def test_a_script_and_ours_take_turns_at_equal_work(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, args = against(tmp_path, tiny_folder, "")
    module.main(args)
    said = capsys.readouterr().out
    assert "## batch 2" in said and "latents [2, 4, 8, 8]" in said and "optimizer AdamW" in said
    assert "max_grad_norm 1.0" in said and "trained weights" in said
    table = [line for line in said.splitlines() if line.startswith(("diffusers  ", "sude_lab  "))]
    assert [line.split()[0] for line in table] == ["diffusers", "sude_lab"]
    assert float(table[0].split()[2]) == 1  # its speed relative to itself
    for part in ("UNet forward", "UNet backward", "clipping", "AdamW", "everything else"):
        (row,) = [line for line in said.splitlines() if line.startswith(part)]
        assert row.count("%") == 2
    assert "VAE encoder" not in said  # this script encodes no picture, and we do it once, before
    rows = pd.read_csv(tmp_path / "against_diffusers.csv").set_index("side")
    assert list(rows.index) == ["diffusers", "sude_lab"] and (rows.batch == 2).all()
    assert (rows.speed_least <= rows.speed).all() and (rows.speed <= rows.speed_most).all()
    assert rows.speed["diffusers"] == 1 and rows["VAE encoder"].eq(0).all()
    parts = rows[["AdamW", "clipping", "UNet forward", "UNet backward"]]
    assert (parts > 0).all(axis=None) and (parts.sum(axis=1) <= 1).all()


def test_unequal_work_is_told_and_nothing_is_compared(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, args = against(tmp_path, tiny_folder, ", weight_decay=0.5")
    with pytest.raises(SystemExit, match=r"weight_decay is 0\.5 in diffusers and 0\.01 in"):
        module.main(args)
    assert "speed" not in capsys.readouterr().out


def test_differences_and_shares() -> None:
    module = load("against_diffusers")
    facts = {"a": {"lr": 1, "eps": 2}, "b": {"lr": 1, "eps": 2}, "c": {"lr": 3, "eps": 2, "x": 0}}
    assert module.differences(facts) == ["lr is 1 in a and 3 in c", "x is None in a and 0 in c"]
    found = module.shares({"UNet": 3.0, "VAE": 0.5}, 4.0)
    assert found == {"UNet": (3.0, 0.75), "VAE": (0.5, 0.125), "everything else": (0.5, 0.125)}


def test_the_stand_in_reads_a_picture_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("against_diffusers")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    transforms = module.stand_in()["torchvision.transforms"]
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    steps = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    for crop in (transforms.CenterCrop, transforms.RandomCrop):
        read = transforms.Compose([transforms.Resize(16, interpolation="x"), crop(16), *steps])
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        torch.testing.assert_close(
            read(image), VaeImageProcessor(do_resize=False).preprocess(image)[0]
        )
        assert read(Image.new("RGB", (48, 32))).shape == (3, 16, 16)
    mirrored = [transforms.RandomHorizontalFlip()(image).getpixel((0, 0)) for _ in range(40)]
    assert set(mirrored) == {image.getpixel((0, 0)), image.getpixel((15, 0))}


def test_a_narrow_stable_diffusion_keeps_every_layer(tmp_path: Path) -> None:
    module = load("against_diffusers")
    module.shrunk_stable_diffusion(16, 64, tmp_path / "sd")
    unet = json.loads((tmp_path / "sd" / "unet" / "config.json").read_text())
    text = json.loads((tmp_path / "sd" / "text_encoder" / "config.json").read_text())
    assert unet["block_out_channels"] == [20, 40, 80, 80] and unet["sample_size"] == 8
    assert unet["layers_per_block"] == 2 and unet["cross_attention_dim"] == 48
    assert text["hidden_size"] == 48 and text["num_hidden_layers"] == 12


# --- growth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    growth = load("growth")
    x = np.array([8, 1, 2, 16, 4])  # in any order
    assert growth.exponent(x, 3 * x**power) == pytest.approx(power)
    fixed_cost = np.where(x < 4, 50, 3 * x**power)  # what is small does not count
    assert growth.exponent(x, fixed_cost) == pytest.approx(power)
    assert math.isnan(growth.exponent(x, np.zeros(5)))


def test_growth_measures_every_point_and_draws_it(tmp_path: Path, tiny_folder: Path) -> None:
    growth = load("growth")
    few: dict[str, Any] = {
        "picture": (32, 64),
        "batch": (1, 4),
        "prompts": (2, 4),
        "drawing": (1, 2),
    }
    few |= {"num_pairs": 2, "num_inference_steps": 1, "rounds": 2, "repeats": 1}
    args = growth.Benchmark(out=tmp_path, backbone=str(tiny_folder), **few)
    growth.main(args)
    table = pd.read_csv(tmp_path / "growth.csv")
    assert list(zip(table["round"], table.panel, table.variant, table.x, strict=True)) == [
        (k, panel, variant, x)
        for k in (1, 2)
        for panel in growth.PANELS
        for variant in growth.variants(panel)
        for x in few[panel]
    ]
    assert table.machine.str.contains("1 thread of").all()
    points = growth.medians(table)
    assert len(points) == len(table) / 2
    first_point = table[(table.panel == "picture") & (table.variant == "plain") & (table.x == 32)]
    assert points.seconds[0] == pytest.approx(first_point.seconds.mean())
    assert (table[["seconds", "processor_seconds", "opened_mib"]] > 0).all(axis=None)
    assert (table.peak_mib >= table.opened_mib).all()
    first = (tmp_path / "growth.png").read_bytes()
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > 800
    (tmp_path / "growth.png").unlink()
    growth.main(growth.Benchmark(redraw=tmp_path))
    assert (tmp_path / "growth.png").read_bytes() == first
    with atomic_write(tmp_path / "growth.csv") as path:
        table.assign(processor_seconds=table.processor_seconds * table.x).to_csv(path, index=False)
    growth.main(growth.Benchmark(redraw=tmp_path))
    assert (tmp_path / "growth.png").read_bytes() != first


def test_prompts_to_classify_differ_and_are_known(tiny_folder: Path) -> None:
    growth = load("growth")
    assert len(set(growth.some_prompts(32))) == 32
    with pytest.raises(SystemExit, match="72 prompts"):
        growth.some_prompts(1000)


# --- cold start -----------------------------------------------------------------------------------


def test_cold_start_prints_ratios(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cold_start = load("cold_start")
    pair = [(0.2, 0.1), (0.4, 0.3)]
    spent = iter([(1.0, 1.0)] * 4 + [*pair, *pair, (0.2, 0.1), (0.8, 0.3)] * 3)
    monkeypatch.setattr(cold_start, "seconds_of", lambda *command: next(spent))
    monkeypatch.setattr(cold_start, "begun", lambda args: [])
    cold_start.main(cold_start.Benchmark(pairs=3, demos=0, out=tmp_path))
    written = pd.read_csv(tmp_path / "cold_start.csv").set_index("what")
    assert list(written.index) == [cold_start.BASE, *cold_start.COMMANDS]
    assert written.ratio.iloc[1:].tolist() == [2.0] * 3 and written.times.iloc[-1] == 3
    _, _, base, *rows = capsys.readouterr().out.splitlines()
    assert base.split()[-4:] == ["0.200", "0.100", "1.00", "1.00"]
    assert [row.split()[:2] for row in rows] == [
        ["import", "sude_lab"],
        ["sude-lab", "--help"],
        ["sude-lab", "tune"],
    ]
    for row in rows:  # the middle ratio of the clock's, least and most, and the processor's
        assert "0.400 0.300 2.00 2.00 to 4.00 3.00" in " ".join(row.split())


def test_a_command_ends_when_the_model_is_asked(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold_start = load("cold_start")
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    what = "sude-lab classify, until it asks"
    monkeypatch.setattr(cold_start, "BEGINNINGS", {what: cold_start.BEGINNINGS[what]})
    (row,) = cold_start.begun(cold_start.Benchmark(starts=1))
    assert row["what"] == what and row["processor_seconds"] > 0


def test_a_command_that_fails_is_not_timed() -> None:
    with pytest.raises(SystemExit, match="no such reason"):
        load("cold_start").seconds_of(["-c", "import sys; sys.exit('no such reason')"])


def test_the_demo_s_own_clock_is_read_from_its_report(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold_start = load("cold_start")
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    few = ["--max-train-steps", "1", "--num-images", "1"]
    monkeypatch.setattr(cold_start, "DEMO", [*cold_start.DEMO, *few])
    whole, inside = cold_start.demo(cold_start.Benchmark(demos=1))
    assert 0 <= inside["seconds"] <= whole["seconds"] + 1
    assert inside["processor_seconds"] <= whole["processor_seconds"] + 1
    assert cold_start.demo(cold_start.Benchmark(demos=0)) == []


# --- a card ---------------------------------------------------------------------------------------


def test_a_card_is_measured_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = gpu.Benchmark(tmp_path, budget=1e6, size="tiny", steps=1, warm_up=1)
    command = ["bash", BENCHMARKS / "gpu.sh", "--out", tmp_path, "--size", "tiny"]
    command += ["--budget", "1000", "--steps", "1", "--warm-up", "1"]
    folder = str(Path(sys.executable).parent)  # the python3 of these tests
    here = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=True)
    assert "no time for: none" in done.stdout
    table = pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False, na_values=[""])
    assert table.error.isna().all(), table.error.dropna().to_list()
    names = [(str(a), b, str(c), d) for _, (a, b, c, d), _ in gpu.Laboratory(args).plan()]
    keys = table[[*gpu.KEYS[1:]]].fillna("")
    assert list(keys.itertuples(index=False, name=None)) == names
    assert (table.seconds > 0).all() and table.peak_gib.isna().all()
    timed = table[table.least.notna()]
    assert ((timed.least <= timed.seconds) & (timed.seconds <= timed.most)).all()
    counted = table[table.share.notna()]
    rate = table.tera_operations[0] / table.seconds[0]
    expected = counted.tera_operations / counted.seconds / rate
    np.testing.assert_allclose(counted.share, expected, rtol=1e-3)

    # A card that has time for little compiles a LoRA's model before it takes larger batches.
    compiled = table[table.variant.fillna("").str.endswith("compile")]
    assert list(zip(compiled.method, compiled.variant, compiled.batch, strict=True)) == [
        (method, f"{variant}, compile", 1)
        for method in ("dreambooth lora", "dreambooth")
        for variant in ("plain", "SuDe")
    ]
    assert compiled.index[1] < table.index[table.batch == 4][0]
    assert compiled.note.str.startswith("its first step, with compiling: ").all()

    # SuDe adds two predictions of the model before tuning, whatever is tuned; what is
    # recomputed counts.
    work = table.fillna({"variant": ""}).set_index(["model", "method", "batch", "variant"])
    work = work.tera_operations["sd15"].unstack()
    added = (work["SuDe"] - work["plain"]).dropna()
    assert set(added.index.get_level_values("method")) == set(gpu.METHODS)
    batch = added.index.get_level_values("batch")
    np.testing.assert_allclose(added / batch, added["dreambooth", 1], rtol=1e-4)
    assert work["SuDe, checkpointing"]["dreambooth lora", 1] > work["SuDe"]["dreambooth lora", 1]
    assert work["diffusers' loop"]["dreambooth", 1] > work["plain"]["dreambooth", 1]

    # Again: what failed is measured, what is there stays as it was.
    written = gpu.written_rows(tmp_path / "gpu.csv")
    (failed,) = [key for key in written if key[1:3] == ("sd15", "drawing") and key[-1] == "4"]
    gpu.write(tmp_path / "gpu.csv", written | {failed: written[failed] | {"error": "of before"}})
    gpu.main(args)
    again = gpu.written_rows(tmp_path / "gpu.csv")
    same = [key for key in written if key != failed and key[2] != "machine"]
    assert len(again) == len(written) and all(again[key] == written[key] for key in same)
    assert [line.split("] ")[1][:17] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "machine 0: second",
        "sd15 drawing 4: s",
    ]


def test_a_card_on_which_nothing_compiles_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("backend='eager' raised:\nRuntimeError: no C compiler\n\nSet this")

    def compile_(module: Any, backend: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=fails)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    only = ("lora plain, compile", "textual inversion plain 1")
    gpu.main(gpu.Benchmark(tmp_path, 1e6, "tiny", steps=1, warm_up=0, only=only))
    rows = pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False).set_index("variant")
    why = rows.loc["plain, compile", "error"]
    assert "RuntimeError: no C compiler" in why and "\n" not in why
    assert f"lora plain, compile 1: failed because {why}" in capsys.readouterr().out
    assert rows.loc["plain", "error"] == "" and float(rows.loc["plain", "seconds"]) > 0


def test_a_card_where_one_measurement_fails_or_time_is_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel\nand many lines more")

    monkeypatch.setattr(gpu, "generate", fails)
    args = gpu.Benchmark(
        tmp_path, budget=1e6, size="tiny", only=("drawing 1", "sd3-medium lora plain 1")
    )
    gpu.main(replace(args, steps=1, warm_up=0))
    table = pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False)
    assert table.error.to_list() == ["", "RuntimeError: no such kernel", ""]
    gpu.main(replace(args, out=tmp_path / "none", budget=-1.0))
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("no time for: machine 0; sd15 drawing 1; sd3-medium lora plain 1")
    )
    with pytest.raises(SystemExit, match="--size tiny"):
        gpu.main(gpu.Benchmark(tmp_path))


# --- what the two questions share -----------------------------------------------------------------


def test_the_guide_says_what_the_two_questions_share(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shared = load("shared")
    shared.main(shared.Benchmark(out=tmp_path))
    stored = BENCHMARKS.parent / "data" / "results" / "shared.csv"
    assert (tmp_path / "shared.csv").read_bytes() == stored.read_bytes()
    full_size, embedded = capsys.readouterr().out.splitlines()
    page = (BENCHMARKS.parent / "notebooks" / "guide" / "costs.md").read_text(encoding="utf-8")
    for line, name in ((full_size, "SD 1.5"), (embedded, "embedded")):
        share, left = re.findall(r"([\d.]+)(?:%| of what)", line)
        assert line.startswith(name)
        assert f"{share}%" in page and left in page, line


# --- a step ---------------------------------------------------------------------------------------


def test_step_costs_are_kept_with_their_spread_and_machine(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_cost = load("step_cost")
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: "100\n")  # memory
    sizes = {"blocks": 2, "steps": 4, "train_batch_size": 1}
    step_cost.main(step_cost.Benchmark(backbone=str(tiny_folder), out=tmp_path, **sizes))
    table = pd.read_csv(tmp_path / "step_cost.csv")
    assert list(table["variant"]) == list(step_cost.VARIANTS)
    assert (table["ratio_least"] <= table["ratio"]).all()
    assert (table["ratio"] <= table["ratio_most"]).all()
    assert table["machine"].str.contains(f"{torch.get_num_threads()} thread").all()
    assert (table["load"] >= 0).all()


# --- a busy machine -------------------------------------------------------------------------------


def test_settings_take_turns_alone_and_beside_others(tiny_folder: Path, tmp_path: Path) -> None:
    busy = load("busy")
    names = ("one thread", "asleep")
    sizes: dict[str, Any] = {"rounds": 2, "steps": 1, "others": (1, 2), "settings": names}
    busy.main(busy.Benchmark(out=tmp_path, backbone=str(tiny_folder), **sizes))
    table = pd.read_csv(tmp_path / "busy.csv")
    expected = [(number, name) for number in (0, 1, 2) for name in names]
    assert list(zip(table.beside, table.setting, strict=True)) == expected
    assert (table.ratio[table.setting == "one thread"] == 1).all()
    assert (table.seconds_least <= table.seconds).all() and (table.seconds > 0).all()


def test_a_setting_reaches_its_process_and_others_end(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = load("busy")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(busy.subprocess, "Popen", lambda *_, env, **__: seen.append(env))
    for name in busy.SETTINGS:
        busy.Worker(busy.Benchmark(), name)
    assert [{k: v for k, v in env.items() if "OMP_" in k} for env in seen] == list(
        busy.SETTINGS.values()
    )
    monkeypatch.undo()
    kept: list[Any] = []
    start = busy.subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda *a: kept.append(start(*a)) or kept[-1])
    with busy.others(2):
        assert [process.poll() for process in kept] == [None, None]
    assert all(process.poll() is not None for process in kept)


# --- all of it ------------------------------------------------------------------------------------


def test_one_command_measures_the_processor(tmp_path: Path) -> None:
    """Every command of cpu.sh is one that its benchmark takes, and all stored files are written."""
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\nprintf "%s\\037" "$@"; echo\n')
    said.chmod(0o755)
    run = ["bash", str(BENCHMARKS / "cpu.sh"), str(tmp_path), "train_dreambooth.py"]
    here = os.environ | {"PYTHON": str(said)}
    lines = subprocess.check_output(run, text=True, env=here).splitlines()
    files = []
    for line in lines:
        path, *words = line.split("\037")[:-1]
        args = tyro.cli(load(Path(path).stem).Benchmark, args=words)
        assert args.out == tmp_path
        files.append(Path(path).stem)
    assert set(files) == {name for name in costs.TABLES if name not in ("gpu", "shared")}
    fewer = subprocess.check_output(run[:-1], text=True, env=here).splitlines()
    assert [line for line in lines if "against" not in line] == fewer
