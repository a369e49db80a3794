"""A bench: a file through a tiny grid, beside stored rows; what it says, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sude_lab.cli import main
from sude_lab.errors import UserError
from sude_lab.evaluate import stored
from sude_lab.sweep import bench as module
from sude_lab.sweep.bench import SIZES, Size, bench
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.world import subjects as study

ROOT = Path(__file__).resolve().parents[2]
SUDE = ROOT / "data" / "bench" / "sude.py"
SIZE = "def regularizer(x_t, t, output, frozen):\n    return output.square().flatten(1).mean(1)\n"
WHO = [study.subject("development", n).name for n in (100, 104)]
Benched = Callable[..., str]


@pytest.fixture
def benched(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benched:
    """`bench` on the tiny model: one picture a prompt, three steps, made-up lines beside."""
    grids = tmp_path / "data" / "grids" / "fair"
    grids.mkdir(parents=True)
    for path in tiny_data.iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    grid = (ROOT / "data/grids/fair/sude.yaml").read_text()
    (grids / "sude.yaml").write_text(grid.replace("pictures: 4", "pictures: 1"))
    monkeypatch.setenv("SUDE_LAB_DATA", str(tmp_path / "data"))
    rows = [
        {
            **{"subject": who, "category": "cat", "settings": "dreambooth", "rho": 1.0},
            **{"arm": arm, "variant": variant, "w_s": w_s, "strength": strength, "steps": 200},
            **{"open_gates": 0.5, "category_alignment": 0.9, "subject_fidelity": 0.01 * k},
            "attribute_alignment": 1 - 0.01 * k,
        }
        for arm, variant, w_s in (("plain", "plain", 0.0), ("sude", "weight_sude=1", 1.0))
        for strength, k in (("25", 1), ("scale=0.5", 2), ("", 3))
        for who in WHO
    ]
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    pd.DataFrame(rows).to_csv(tmp_path / "fair_development.csv", index=False)
    tiny = Size("development 100 104", "fair_development", 3, (2,))
    monkeypatch.setattr(module, "SIZES", {"minutes": tiny})

    def run(file: Path = SUDE, **settings: object) -> str:
        asked = {"weights": (1.0,), "progress": False} | settings
        return bench(file, tmp_path / "out", **asked)  # type: ignore[arg-type]

    return run


def test_a_bench_says_what_a_file_gives_beside_the_stored_lines(
    benched: Benched, tmp_path: Path
) -> None:
    text, out = benched(), tmp_path / "out"
    assert text == (out / "bench.md").read_text()
    assert "2 subjects. This decides nothing" in text and "| says" not in text
    assert "| yours | less tuning | 0.75 to 0.95 |" in text and "| yours | SuDe " in text
    assert re.search(
        r"bench, size minutes, w_s 1, seed 0; sude.py, SHA-256 [0-9a-f]{64}$", text.strip()
    )
    table = pd.read_csv(out / "bench.csv", keep_default_na=False)
    own = table[table["arm"] == "own"]
    assert sorted(own["subject"].unique()) == WHO and set(own["strength"]) == {"2", ""}
    assert dict(zip(table["arm"], table["asks"], strict=True)) == {"plain": 1, "sude": 3, "own": 3}
    assert (out / "bench.png").stat().st_size > 10_000
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("rows-*.parquet")}
    assert len(finished) == 2 and benched() == text  # nothing is run again
    assert finished == {path: path.stat().st_mtime_ns for path in out.rglob("rows-*.parquet")}


@pytest.mark.quick
def test_the_command_names_the_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path / "none.py"), "--out", str(tmp_path / "out")]) == 2
    assert "none.py cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bench_is_of_one_file(benched: Benched, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(SIZE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regularizer.py").write_text(SIZE + "# another\n")
    with pytest.raises(UserError, match=r"was begun with another file than .*own\.py"):
        benched(own)
    (tmp_path / "out" / "regularizer.py").rename(tmp_path / "out" / "bench.md")
    with pytest.raises(UserError, match=r"bench\.md is not from this command"):
        benched(own)


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        (SIZE, {"weights": (1.0, 0.0)}, "--weights are numbers above 0"),
        (SIZE, {"weights": ()}, "--weights are numbers above 0"),
        (SIZE.replace("output", "x_t", 2).replace("x_t, frozen", "output, frozen"), {},
         "have no gradient, so that no weight would change anything"),
        ("x = 1", {}, "own.py defines no function named regularizer"),
        (SIZE.replace(".mean(1)", ""), {}, "own.py returned the shape"),
        (SIZE.replace("(1)\n", "(1) / (t * 0)\n"), {}, r"own.py returned \["),
    ],
)  # fmt: skip
def test_what_cannot_serve_is_said_before_anything_is_written(
    text: str, settings: dict[str, object], sentence: str, benched: Benched, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        benched(tmp_path / "own.py", **settings)
    assert not (tmp_path / "out").exists()


def test_the_text_is_trained_where_that_is_asked_for(benched: Benched, tmp_path: Path) -> None:
    semantic = ROOT / "data" / "bench" / "semantic.py"
    with pytest.raises(UserError, match=r"frozen\.subject with --token-learning-rate"):
        benched(semantic)
    text = benched(semantic, token_learning_rate=1e-2)
    assert "seed 0, token_learning_rate 0.01; semantic.py" in text
    table = pd.read_csv(tmp_path / "out" / "bench.csv")
    assert table[table["arm"] == "own"]["asks"].eq(1).all()  # it asks the UNet nothing


def test_the_whole_is_the_registered_grid(tmp_path: Path) -> None:
    """Subjects, strengths and pictures are those of the stored lines."""
    grid = (ROOT / "data/grids/fair/sude.yaml").read_text()
    for size in SIZES.values():
        (tmp_path / "grid.yaml").write_text(f"{grid}\nsubjects: [{size.subjects}]\n")
        plan = make_plan(read_grid(tmp_path / "grid.yaml"), tmp_path)
        there = set(stored.read(size.stored)["subject"])
        assert {job.label["subject"] for job in plan.jobs} <= there
        if size.stored == "fair":
            assert {job.label["subject"] for job in plan.jobs} == there and len(there) == 36
        if size.steps == 200:
            kept = {strength.step or size.steps for strength in plan.jobs[0].strengths}
            assert kept == {*size.kept, size.steps}


@pytest.mark.parametrize(
    ("bonus", "steps", "says"),
    [(0.1, 4, "better"), (0.0, 4, "no difference"), (-0.1, 4, "worse"), (0.1, 2, "not reached")],
)
def test_the_whole_gives_the_verdicts_of_the_comparison(
    bonus: float, steps: int, says: str
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            **{"subject": f"s{i}", "arm": arm, "settings": "dreambooth", "variant": variant},
            **{"w_s": 0.0, "strength": "" if k == 4 else str(k), "steps": 200, "asks": 1},
            **{"subject_fidelity": 0.1 * k, "category_alignment": 0.9},
            "attribute_alignment": 1 - 0.1 * k + added + rng.normal(0, 0.02),
        }
        for arm, variant, added, last in (
            *(("plain", "plain", 0.0, 4), ("sude", "weight_sude=1", 0.0, 4)),
            ("own", "weight_sude=1", bonus, steps),
        )
        for k in range(1, last + 1)
        for i in range(36)
    ]
    text = module._page(pd.DataFrame(rows), SIZES["whole"], "cited")
    table = text.split("## Beside SuDe")[0]
    last_columns = [line.split("|")[-2].strip() for line in table.splitlines() if "| yours" in line]
    assert last_columns == [says] * 3 + [""]
    assert "36 subjects. Whoever has looked at these 36 subjects" in text
