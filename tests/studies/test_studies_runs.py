"""Grids into stored results: the same numbers as tuning, drawing and judging by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

from studies import compare_guidance, gallery, guidance_tables, paper, runs
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.evaluate import stored
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.io.opening import open_backbone
from sude_lab.methods import configure
from sude_lab.tuning import tune
from sude_lab.world import drawing as world
from sude_lab.world.oracle import load_oracle
from sude_lab.world.subjects import KEYS, measure, strip_name, subject


@pytest.fixture
def few(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study "few" of two runs, whose grid is in this folder; return the folder of its sweeps."""
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runs, "GRIDS", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(runs, "STEPS", 4)
    monkeypatch.setitem(runs.STUDIES, "few", runs.Study(("few",)))
    grid = {"subjects": ["held-out 0"], "w_s": ["x0", "x1"], "seeds": [1], "pictures": 2}
    grid |= {"prompts": ["plain", "attributes"], "evaluate": {"seed": 500}, "num_gpus": 0}
    grid |= {"settings": {"max_train_steps": 4, "device": "cpu"}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(grid))
    return tmp_path / "results"


def test_a_grid_gives_the_rows_and_pictures_of_tuning_and_measuring(
    few: Path, tmp_path: Path
) -> None:
    kept = runs.main(runs.RunsConfig("few", workers=1, out=few))
    read = pd.read_csv(tmp_path / "kept" / "few.csv")
    assert len(read) == len(kept) and list(read) == list(kept)
    assert kept["variant"].unique().tolist() == ["weight_sude=0", "weight_sude=1"]
    base, oracle, who = open_backbone("embedded"), load_oracle(), subject("held-out", 0)
    for variant, rows in kept.groupby("variant"):
        weight = float(str(variant).partition("=")[2])
        config = TuningConfig(Path("x.png"), "dog", seed=1, max_train_steps=4, weight_sude=weight)
        backbone = base.copy()
        config = configure(config, backbone)
        for _ in tune(config, backbone, who.picture):
            pass
        grids: dict[str, list[Image.Image]] = {}
        measured = measure(backbone, oracle, who, config, seed=501, num_images=2, grids=grids)
        other = pd.DataFrame(measured)
        for column in ("prompt", "attribute", "image"):
            assert rows[column].tolist() == other[column].tolist()
        asked = other["attribute"] != ""  # of its own attribute `evaluate` does not ask
        for name in MEASURES:
            values = rows.loc[asked.to_numpy(), name].tolist()
            assert values == pytest.approx(other.loc[asked, name].tolist(), abs=2e-5)
        name = strip_name(*rows.iloc[0][KEYS].tolist())
        runs.keep_strip(tmp_path / name, grids)
        # The strip of what was drawn by hand: the same file.
        assert (tmp_path / "kept" / "few" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_asks_of_several_grids_are_kept_together(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = yaml.safe_load((tmp_path / "few.yaml").read_text()) | {"w_s": [0], "pictures": 1}
    for name, sets in {
        "P1": ["attributes", "backgrounds", "combinations"],
        "P3": ["attributes"],
    }.items():
        asked = grid | {"prompts": sets, "evaluate": {"structure": name, "seed": 500}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(asked))
    monkeypatch.setitem(runs.STUDIES, "asks", runs.Study(("P1", "P3"), named=True))
    table = runs.main(runs.RunsConfig("asks", workers=1, out=few))
    counts = table.groupby("ask", sort=False).size().to_dict()
    assert counts == {"P1": 4, "background": 4, "attribute and background": 16, "P3": 4}
    assert table["variant"].unique().tolist() == ["plain"]
    background = table[table["ask"] == "background"]
    assert set(background["background"]) == set(world.BACKGROUNDS)
    assert background["background_alignment"].between(0, 1).all()
    assert len(list((few / "runs").glob("[0-9a-f]*"))) == 1  # tuned once
    assert len(list((tmp_path / "kept" / "asks").iterdir())) == 1


def test_rules_are_compared_on_the_models_of_a_grid_and_go_on(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compare_guidance.CompareConfig(
        out=tmp_path / "guidance.csv", grid="few", strengths=(0.0, 1.0), workers=1, sweeps=few
    )
    table = compare_guidance.compare(config)
    assert set(table["variant"]) == {"plain", "guidance 1", "composition 1", "sude-tuned 1"}
    # As tuned, and four poses it does not show.
    assert (table.groupby("variant").size() == 5 * 2).all()
    weights = table.groupby("variant")["weight_sude"].first()
    assert weights["plain"] == weights["guidance 1"] == 0 and weights["sude-tuned 1"] == 1
    assert table[table["rule"] == "guidance"]["rho"].notna().all()
    equal = guidance_tables.at_equal_fidelity(table)
    assert list(equal["rule"]) == ["guidance", "composition"] and equal["subjects"].eq(1).all()

    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compare_guidance, "_draw", lambda *args: drawn.append(args[3:]) or [])
    more = compare_guidance.CompareConfig(
        out=config.out, grid="few", strengths=(0.0, 1.0, 2.0), run=False, sweeps=few
    )
    assert len(compare_guidance.compare(more)) == len(table)
    assert drawn == [("guidance", 2.0), ("composition", 2.0)]


def test_the_gallery_shows_the_pictures_of_the_runs(few: Path, tmp_path: Path) -> None:
    config = gallery.GalleryConfig(out=Path("x.png"), grid="few", seed=1, sweeps=few)
    (ax,) = gallery.gallery(config).axes
    rows = [text.get_text().split(":")[0] for text in ax.get_yticklabels()]
    assert rows == ["dreambooth\nplain", "dreambooth\nsude"]
    columns = [text.get_text() for text in ax.get_xticklabels()]
    assert columns == ["as tuned", *subject("held-out", 0).other_attributes]


@pytest.mark.parametrize("name", runs.STUDIES)
def test_what_is_stored_is_what_its_grids_name(name: str) -> None:
    """No run of the grids is missing in the stored rows, and none is there besides."""
    table = stored.read(name)
    keys = {
        tuple(runs.run_key(job, runs.STUDIES[name].named).values()): job.config
        for plan in runs.plans(name)
        for job in plan.jobs
    }
    groups = dict(iter(table.groupby(KEYS)))
    assert set(groups) == set(keys)
    for key, rows in groups.items():
        row, config = rows.iloc[0], keys[key]
        assert (row["weight_sude"], row["steps"]) == (config.weight_sude, config.max_train_steps)
        assert (row["prior"], row["weighting"]) == (config.prior, config.weighting)


@pytest.mark.parametrize("name", paper.EXPERIMENTS)
def test_the_stored_table_follows_from_the_stored_rows(name: str) -> None:
    text = paper.EXPERIMENTS[name].table().to_markdown(index=False, disable_numparse=True)
    kept = (stored.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert kept.endswith(f"\n\n{text}\n")


def test_the_paper_s_command_makes_its_studies_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[runs.RunsConfig] = []
    monkeypatch.setattr(runs, "main", made.append)
    table = paper.EXPERIMENTS["fig8"].table()
    experiment = paper.Experiment("Fig. 8", ("prompts", "class_images"), lambda: table)
    monkeypatch.setitem(paper.EXPERIMENTS, "fig8", experiment)
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    paper.main(paper.PaperConfig("fig8", workers=3))
    assert made == [runs.RunsConfig(s, workers=3) for s in ("prompts", "class_images")]
    assert (tmp_path / "fig8.md").read_text(encoding="utf-8").startswith("Fig. 8")
    assert "class images" in capsys.readouterr().out
    paper.main(paper.PaperConfig("fig8", run=False))
    assert len(made) == 2
    with pytest.raises(UserError, match="There is no study 'nothing': choose held_out"):
        monkeypatch.undo()
        runs.main(runs.RunsConfig("nothing"))
