"""Grid files mean what they say, runs are named by what they are, and forecasts add up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sude_lab.errors import UserError
from sude_lab.sweep import grid
from sude_lab.sweep.grid import Plan, make_plan, read_grid
from sude_lab.sweep.sweep import describe
from sude_lab.world import drawing as world
from sude_lab.world import subjects as study

ROOT = Path(__file__).resolve().parents[2]
GRIDS = ROOT / "data" / "grids"
BENCH = Path(os.environ.get("SUDE_LAB_DREAMBENCH", ROOT.parent / "shared" / "dreambench"))

Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The plan of a grid with one drawn dog and these keys."""

    def plan(**keys: Any) -> Plan:
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump({"subjects": ["held-out 0"]} | keys), encoding="utf-8")
        return make_plan(read_grid(file), tmp_path / "out")

    return plan


def test_the_lists_are_multiplied_in_the_order_that_is_told(planned: Planned) -> None:
    plan = planned(
        subjects=["held-out 0 1"],
        methods=["dreambooth", "vico"],
        w_s=["x1", 3],
        prior=["current", "pretrained"],
        seeds=[0, 7],
        also=[{"w_s": 0}],
        settings={"max_train_steps": [5, 6], "learning_rate": "1e-4"},
    )
    dog, cat = (study.subject("held-out", n).name for n in (0, 1))
    expected = [
        (seed, who, method, steps, *variant)
        for seed in (0, 7)
        for who in (dog, cat)
        for method, own in (("dreambooth", 2.0), ("vico", 1.5))
        for steps in (5, 6)
        for variant in [
            *((w, prior) for w in (own, 3.0) for prior in ("current", "pretrained")),
            (0.0, "pretrained"),
        ]
    ]
    found = [
        (c.seed, c.image.stem, c.method, c.max_train_steps, c.weight_sude, c.prior)
        for c in (job.config for job in plan.jobs)
    ]
    assert found == expected and plan.num_equal == 0
    assert {job.config.learning_rate for job in plan.jobs} == {1e-4}
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    assert plan.jobs[0].label["w_s_factor"] == 1.0
    assert plan.jobs[0].label["variant"] == "SuDe, weight_sude 2.0, prior current"
    assert plan.jobs[4].label["variant"] == "plain"
    file = "data/bench/semantic.py"
    (job,) = planned(subjects=["held-out 0"], w_s=[1], settings={"regularizer_file": file}).jobs
    assert job.label["variant"] == "semantic.py"  # not SuDe
    # Drawn subjects are asked the attributes that their picture does not show.
    assert {j.pictures for j in plan.jobs} == {4 * (len(world.POSES) - 1)}


def test_equal_runs_are_one(planned: Planned) -> None:
    plan = planned(w_s=["x0", 2, "x1"], truncation=[True, False, 1.0])
    # Without SuDe nothing of it counts, 2 is the method's own w_s, and rho = 1 is the paper's.
    found = [(c.weight_sude, c.truncate) for c in (j.config for j in plan.jobs)]
    assert found == [(0.0, True), (2.0, True), (2.0, False)] and plan.num_equal == 6
    assert planned(w_s=0, prior=["current", "pretrained"]).num_equal == 1
    watched = {"settings": {"monitor_sude": True}, "w_s": 0}
    assert planned(prior=["current", "pretrained"], **watched).num_equal == 0


def test_settings_that_belong_together_stand_in_one_mapping_of_a_list(planned: Planned) -> None:
    pairs = [{"train": "lora", "learning_rate": [1e-3, 1e-4]}, {"train": "unet"}]
    configs = [job.config for job in planned(settings=pairs).jobs]
    found = [(c.train, c.learning_rate) for c in configs]
    assert found[:2] == [("lora", 1e-3), ("lora", 1e-4)] and found[2][0] == "unet"


def test_truncation_is_on_off_or_a_threshold(planned: Planned) -> None:
    configs = [j.config for j in planned(truncation=[True, False, 0.5]).jobs]
    found = [(c.truncate, c.truncate_at) for c in configs]
    assert found == [(True, 1.0), (False, 1.0), (True, 0.5)]


def test_a_run_is_named_by_its_content(
    subject_picture: Path, tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(picture: Path = subject_picture, **keys: Any) -> str:
        entry = {"picture": str(picture), "category": "dog"}
        (job,) = planned(subjects=[entry], **{"prompts": ["plain"]} | keys).jobs
        return job.key

    here = key()
    moved = tmp_path / "elsewhere" / subject_picture.name
    moved.parent.mkdir()
    moved.write_bytes(subject_picture.read_bytes())
    # Neither where the picture lies, nor the device, nor what is asked of it makes another run.
    assert key(moved) == key(settings={"device": "cpu"}) == key(pictures=7) == here
    assert key(settings={"learning_rate": 3e-4}) == here  # what the model's facts say anyway
    moved.write_bytes(subject_picture.read_bytes() + b"\0")
    settings = [{"max_train_steps": 9}, {"dtype": "bfloat16"}, {"prior_loss_weight": 1.0}]
    others = [key(moved), key(seeds=1), key(w_s=1), *(key(settings=s) for s in settings)]
    assert len({here, *others}) == 7
    # The same model elsewhere is the same; another one is not.
    data = tmp_path / "data"
    data.mkdir()
    (data / "oracle").symlink_to(ROOT / "data" / "oracle")
    (data / "embedded").mkdir()
    for file in (ROOT / "data" / "embedded").iterdir():
        (data / "embedded" / file.name).symlink_to(file)
    monkeypatch.setenv("SUDE_LAB_DATA", str(data))
    config = data / "embedded" / "scheduler.json"
    config.write_text("{}", encoding="utf-8")
    assert key() != here


def test_a_changed_default_leaves_older_runs_their_names(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name means one thing forever: what was the default first says nothing, now as then."""

    def said(**settings: Any) -> dict[str, Any]:
        seen: list[Any] = []
        own = grid.hash_of
        monkeypatch.setattr(grid, "hash_of", lambda content: seen.append(content) or own(content))
        planned(settings={"max_train_steps": 9} | settings, prompts=["plain"])
        monkeypatch.setattr(grid, "hash_of", own)
        (about,) = [content[0] for content in seen if isinstance(content[0], dict) and content[2:]]
        return about

    assert "optimizer" not in said(optimizer="adamw") and said()["optimizer"] == "adamw_fused"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"subject": ["held-out 0"]},
            "'subject' not in 'GridFile'. Did you mean: 'subjects'?",
        ),
        ({"truncate": True}, "Did you mean: 'truncation'?"),
        ({"foo": True}, "Key 'foo' not in 'GridFile'"),
        ({"evaluate": {"metric": "oracle"}}, "Did you mean: 'metrics'?"),
        ({"settings": {"max_steps": 3}}, "Did you mean: 'max_train_steps'?"),
        ({"also": [{"ws": 0}]}, "Did you mean: 'w_s'?"),
        ({"settings": {"weight_sude": 1}}, "the grid's key w_s says"),
        (
            {"settings": {"max_train_steps": "many"}},
            "settings.max_train_steps[0]: Value 'many'",
        ),
        ({"prior": "curent"}, "it takes current, pretrained"),
        ({"w_s": "2x"}, "w_s cannot be '2x'"),
        ({"w_s": []}, "w_s: the list is empty"),
        ({"truncation": "yes please"}, "write on, off"),
        ({"pictures": 0}, "pictures cannot be 0"),
        ({"num_gpus": "all"}, "num_gpus: Value 'all' of type 'str'"),
        ({"methods": ["dreamboth"]}, "There is no method 'dreamboth'"),
        ({"subjects": ["held-in 0"]}, "is no drawn subject"),
        ({"subjects": ["held-out"]}, "is no drawn subject"),
        ({"subjects": ["held-out 0 0"]}, "two subjects are named held-out-0-dog"),
        ({"subjects": [{"picture": "no.jpg", "category": "dog"}]}, "does not exist"),
        ({"subjects": [{"picture": "no.jpg"}]}, "needs a picture and a category"),
        ({"subjects": [{"dreambench": "nowhere"}]}, "does not hold"),
        ({"prompts": ["atributes"]}, "no prompts of that name"),
        ({"settings": {"lora_rank": 0}}, "--lora-rank is 0"),
    ],
)
def test_a_mistake_is_one_sentence(keys: dict[str, Any], expected: str, planned: Planned) -> None:
    with pytest.raises(UserError) as error:
        planned(**keys)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_value_is_read_as_its_field_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        "{subjects: held-out 0, truncation: [off, 1e-1], w_s: [1e-1, x2], seeds: 3, settings: "
        "{learning_rate: 1e-4, horizontal_flip: on, more_subjects: [a=<a>=a.png, b=<b>=b.png]}}"
    )
    grid = read_grid(file)
    variants = list(grid.variants())
    assert grid.seeds == [3] and [v.get("truncate_at") for v in variants[:2]] == [
        None,
        0.1,
    ]
    assert [variants[k].get("weight_sude") for k in (0, 2)] == [0.1, None]
    (settings,) = grid.settings
    assert settings["learning_rate"] == 1e-4 and settings["horizontal_flip"] is True
    assert settings["more_subjects"] == ("a=<a>=a.png", "b=<b>=b.png")


def test_a_grid_reads_nothing_of_the_environment(planned: Planned) -> None:
    for keys in ({"backbone": "${oc.env:HOME}"}, {"settings": {"prompt": ["{S*} ${oc.env:HOME}"]}}):
        with pytest.raises(UserError, match="write the value out"):
            planned(**keys)


def test_files_that_are_no_grids(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    for text, expected in [
        ("- a\n- b", "must be a mapping"),
        ("seeds: [1", "not readable YAML"),
        ("seeds: !!python/object/apply:os.getcwd []", "not readable YAML"),
        ("seeds: [1]", "names no `subjects`"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=expected):
            read_grid(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")


# --- forecasts -----------------------------------------------------------------------------------


def test_a_forecast_adds_up_what_finished_runs_took(planned: Planned) -> None:
    plan = planned(w_s=[0, 1], settings={"max_train_steps": 1000}, seeds=[0, 1], pictures=5)
    assert "Unknown are 4 of the runs" in describe(plan) and not plan.out.exists()
    plain, sude = plan.jobs[:2]
    for k, (job, seconds) in enumerate(((plain, 0.5), (sude, 1.0), (sude, 2.0), (sude, 9.0))):
        took = {"seconds_per_step": seconds, "seconds_per_picture": 3.0}
        took |= {"megabytes_per_run": 100, "megabytes_per_picture": 0.5}
        write_timing(plan.runs / f"run-{k}", {"kind": grid.kind_of(job.config), **took})
    write_timing(
        plan.runs / "damaged", {"kind": grid.kind_of(sude.config), "seconds_per_step": "a"}
    )
    text = describe(plan)
    # 2 plain runs of 1000 steps of 0.5 s, 2 of 2 s; 4 runs of 4 prompts x 5 pictures of 3 s.
    hours = (2 * 1000 * 0.5 + 2 * 1000 * 2.0 + 4 * 20 * 3.0) / 3600
    assert "4 runs, 0 of them finished. To do: 4 runs, 80 pictures." in text
    size = (4 * 100 + 80 * 0.5) / 1000
    assert f"About {hours:,.1f} hours one after another, {size:.2f} GB" in text
    assert "| 1 runs " in text and "| 3 runs " in text and "Unknown" not in text
    plain.scores(plan.runs).parent.mkdir(parents=True)
    plain.scores(plan.runs).touch()
    assert "4 runs, 1 of them finished. To do: 3 runs, 60 pictures." in describe(plan)


def write_timing(folder: Path, about: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "timing.json").write_text(json.dumps(about), encoding="utf-8")


# --- the grids of this repository ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runs", "pictures"),
    # Four attributes of the three animals, two of the candle, three of the teapot.
    [("smoke", 2, 16), ("w_s", 50, 1760), ("truncation", 35, 1232), ("collapse", 8, 320)],
)
def test_stored_grids(name: str, runs: int, pictures: int, tmp_path: Path) -> None:
    plan = make_plan(read_grid(GRIDS / f"{name}.yaml"), tmp_path)
    assert len(plan.jobs) == runs
    assert sum(job.pictures for job in plan.jobs) == pictures
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not BENCH.is_dir(), reason=f"DreamBench is not in {BENCH}")
def test_the_full_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dreambooth").symlink_to(BENCH)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(read_grid(GRIDS / "full_study.yaml"), tmp_path / "out")
    # Truncation says nothing of the runs without SuDe: 4 w_s x 2 + 1.
    assert len(plan.jobs) == 30 * 4 * (4 * 2 + 1) * 3 * 2 and plan.num_equal == 720
    assert {job.pictures for job in plan.jobs} == {30 * 4}
    assert {Path(job.asked["references"]) for job in plan.jobs} == {tmp_path / "dreambooth/dataset"}
    # The guide shows what the dry run says.
    page = (ROOT / "notebooks" / "guide" / "grids-and-clusters.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    for line in (x for x in describe(plan).splitlines() if x and not x.startswith("|:")):
        assert " ".join(line.split()) in page, line
