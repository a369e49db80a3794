"""The paper's tables on the embedded world, against studies small enough to work out by hand."""

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pytest
import yaml
from PIL import Image

from studies import paper
from sude_lab.backbone import open_backbone
from sude_lab.evaluate import stored
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.tuning import TuningConfig
from sude_lab.world.oracle import load_oracle
from sude_lab.world.subjects import (
    KEYS,
    StudyConfig,
    keep_strip,
    parse_settings,
    parse_variant,
    strip_name,
    subject,
    tune_and_measure,
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    return tmp_path


def test_the_command_runs_its_studies_and_writes_the_table(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[StudyConfig] = []
    monkeypatch.setattr(paper, "run_study", ran.append)
    paper.main(paper.PaperConfig("fig8", workers=3))
    assert ran == [replace(s, workers=3) for s in paper.EXPERIMENTS["fig8"].studies]
    text = (results / "fig8.md").read_text(encoding="utf-8")
    assert text.startswith("Fig. 8") and "class images" in text
    assert "class images" in capsys.readouterr().out
    paper.main(paper.PaperConfig("fig6", run=False))
    assert len(ran) == len(paper.EXPERIMENTS["fig8"].studies)


def test_a_grid_gives_the_rows_and_pictures_that_a_study_gives(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to the same numbers: `sude-lab sweep` and its room, the study's own loop."""
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(paper, "GRIDS", tmp_path)
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(paper, "STEPS", 4)
    grid = {"subjects": ["held-out 0"], "w_s": ["x0", "x1"], "seeds": [1], "pictures": 2}
    grid |= {"prompts": ["plain", "attributes"], "evaluate": {"seed": 500}, "num_gpus": 0}
    grid |= {"settings": {"max_train_steps": 4, "device": "cpu"}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(grid))
    experiment = paper.Experiment("Few", (), ("few",), pd.DataFrame)
    monkeypatch.setitem(paper.EXPERIMENTS, "few", experiment)
    monkeypatch.setattr(paper, "ProcessPoolExecutor", _Here)
    paper.run("few", workers=1, out=tmp_path / "results")
    kept = pd.read_csv(tmp_path / "kept" / "few.csv")
    assert kept["variant"].unique().tolist() == ["weight_sude=0", "weight_sude=1"]
    base, oracle, who = open_backbone("embedded"), load_oracle(), subject("held-out", 0)
    for variant, mine in kept.groupby("variant"):
        grids: dict[str, list[Image.Image]] = {}
        settings = parse_settings(str(variant))
        config = TuningConfig(Path("x.png"), "dog", seed=1, max_train_steps=4, **settings)
        rows = tune_and_measure(base, oracle, who, config, num_images=2, grids=grids)
        other = pd.DataFrame(rows)
        assert mine["prompt"].tolist() == other["prompt"].tolist()
        assert mine["attribute"].fillna("").tolist() == other["attribute"].tolist()
        asked = other["attribute"] != ""  # of its own attribute `evaluate` does not ask
        for measure in stored.MEASURES:
            found = mine.loc[asked.to_numpy(), measure].tolist()
            assert found == pytest.approx(other.loc[asked, measure].tolist(), abs=2e-5)
        name = strip_name(*mine.iloc[0][KEYS].tolist())
        keep_strip(tmp_path / name, grids)
        # The strip that the study would keep of what it drew: the same file.
        assert (tmp_path / "kept" / "few" / name).read_bytes() == (tmp_path / name).read_bytes()


class _Here:
    """A pool that runs what it is given at once, in this process."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, call: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args))
        return future


@pytest.mark.parametrize("name", paper.EXPERIMENTS)
def test_what_is_stored_is_what_its_command_makes(name: str) -> None:
    """The table beside the stored rows follows from them, and no run of the studies is missing."""
    if not (paper.RESULTS / f"{name}.md").is_file():
        pytest.skip(f"Not all runs of {name} are made yet: python -m studies.paper {name}.")
    text = paper.EXPERIMENTS[name].table().to_markdown(index=False, disable_numparse=True)
    assert (paper.RESULTS / f"{name}.md").read_text(encoding="utf-8").endswith(f"\n\n{text}\n")
    for study in paper.EXPERIMENTS[name].studies:
        stored = pd.read_csv(study.out)
        done = set(stored[KEYS].drop_duplicates().itertuples(index=False, name=None))
        for seed in range(study.num_seeds):
            for number in study.numbers:
                for method in study.methods:
                    for variant in study.variants:
                        who = subject(study.subjects, number).name
                        assert (who, method, parse_variant(variant).name, seed) in done
    for grid in paper.EXPERIMENTS[name].grids:
        plan = make_plan(read_grid(paper.GRIDS / f"{grid}.yaml"), "out")
        stored = pd.read_csv(paper.RESULTS / f"{grid}.csv")
        done = set(stored[KEYS].drop_duplicates().itertuples(index=False, name=None))
        assert done == {
            (j.label["subject"], j.config.method, paper._variant(j.config), j.config.seed)
            for j in plan.jobs
        }
