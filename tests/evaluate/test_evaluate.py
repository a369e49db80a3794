"""Evaluations draw what is missing, measure what is there, and compare runs in pairs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from refusals import content
from tiny_encoders import SIDE, build_encoder

from sude_lab.cli import main
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.evaluate import evaluate as room
from sude_lab.evaluate.encoders import ENCODERS
from sude_lab.evaluate.evaluate import evaluate, subject_name
from sude_lab.evaluate.metrics import PAIR, compare
from sude_lab.generation import generate
from sude_lab.runs.folder import Run, run_tuning
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, drawn_judge, judge, load_oracle, read_scene

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("CLIP-I", "CLIP-T", "DINO-I")
PROMPTS = ["a running {S*} dog", "a {S*} dog on the bed"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluators")
    return {name: build_encoder(name, root / name) for name in ("clip", "dino")}


@pytest.fixture(scope="session")
def tuned(
    tiny_folder: Path, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Gives the folder of a run with these settings; do not write in it."""
    root = tmp_path_factory.mktemp("runs")
    known: dict[str, Path] = {}

    def run(**settings: Any) -> Path:
        name = "-".join(f"{k}={v}" for k, v in settings.items()).replace("/", "_") or "plain"
        if name not in known:
            given = {"image": subject_picture, "category": "dog", "backbone": str(tiny_folder)}
            config = TuningConfig(
                **given | {"weight_sude": 0.0, "max_train_steps": 1, "device": "cpu"} | settings
            )
            known[name] = root / f"run-{len(known)}"
            run_tuning(config, known[name], num_samples=0, report_to="none", progress=False)
        return known[name]

    return run


@pytest.fixture
def pair(tuned: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A plain run and one with SuDe, to be written in."""
    # Without its gate, and heavy: one step alone must leave its trace in the pictures.
    found = [tuned(), tuned(weight_sude=50.0, truncate=False)]
    return [Path(shutil.copytree(f, tmp_path / n)) for f, n in zip(found, "ps", strict=True)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return file


@pytest.fixture
def measure(prompts: Path, encoders: dict[str, Path]) -> Callable[..., room.Evaluation]:
    """`evaluate` with tiny encoders, our two prompts and two pictures; later settings win."""

    def run(runs: Path | list[Path], **settings: Any) -> room.Evaluation:
        usual: dict[str, Any] = {
            "prompts": [str(prompts)],
            "num_images": 2,
            "metrics": METRICS,
            "encoders": [f"{name}={folder}" for name, folder in encoders.items()],
            "device": "cpu",
            "progress": False,
        }
        return evaluate([runs] if isinstance(runs, Path) else runs, **usual | settings)

    return run


Measure = Callable[..., room.Evaluation]


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Every call of the sampler from now on: prompt, seed, first number, number of pictures."""
    calls: list[tuple[str, int, int, int]] = []

    def watched(backbone: Any, prompt: str, **settings: Any) -> list[Image.Image]:
        calls.append((prompt, settings["seed"], settings["first"], settings["num_images"]))
        return generate(backbone, prompt, **settings)

    monkeypatch.setattr(room, "generate", watched)
    return calls


def pictures(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("seed-*/*.png"))}


# --- what is written -----------------------------------------------------------------------------


def test_the_table_is_tidy_and_whole(pair: list[Path], measure: Measure, tmp_path: Path) -> None:
    found = measure(pair, out=tmp_path / "out", seed=1)
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert len(scores) == 2 * len(PROMPTS) * 2 * len(METRICS)
    keys = ["run", "metric", *PAIR]
    assert not scores.duplicated(keys).any() and not scores[[*keys, "value"]].isna().any(axis=None)
    assert scores["value"].between(-1, 1).all() and scores["value"].nunique() > 20
    assert set(scores["prompt"]) == set(PROMPTS) and set(scores["seed"]) == {1}
    assert set(scores["caption"]) == {"a running dog", "a dog on the bed"}
    assert set(scores["variant"]) == {"plain", "SuDe"}
    for run, mine in scores.groupby("run"):
        own = pd.read_csv(Path(str(run)) / "evaluation" / "scores.csv")
        pd.testing.assert_frame_equal(own, mine.reset_index(drop=True), check_dtype=False)
        assert all((Path(str(run)) / file).is_file() for file in mine["file"])
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert len(table) == 2 * len(METRICS)
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == found.text
    for words in ("| dreambooth", "SuDe", "without the subject's word", "clip@", "95 %"):
        assert words in found.text
    assert set((tmp_path / "out").iterdir()) == {
        tmp_path / "out" / n for n in ("scores.csv", "table.csv", "table.md")
    }


@pytest.mark.parametrize("name", ["scores.csv", "table.csv", "table.md"])
def test_somebody_elses_file_is_left_alone(
    name: str, pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{name} is not from this command"):
        measure(pair, out=out)
    assert content(tmp_path) == before


def test_scores_are_those_of_the_pictures_on_the_disk(
    pair: list[Path], measure: Measure, encoders: dict[str, Path], tmp_path: Path
) -> None:
    """Once more with transformers' own models, Pillow and numpy: no function of the room."""
    references = tmp_path / "references"
    references.mkdir()
    for k, attribute in enumerate(("sitting", "standing")):
        scene = world.Scene("dog", attribute, world.Look("brown", "white", "spots", "red"))
        world.draw(scene, 48).save(references / f"{k}.png")
    scores = measure(pair[0], references=references).scores
    clip = transformers.CLIPModel.from_pretrained(encoders["clip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders["clip"])
    dino = transformers.ViTModel.from_pretrained(encoders["dino"]).eval()

    @torch.no_grad()
    def features(path: Path, metric: str) -> np.ndarray:
        name = metric.split("-")[0].lower()
        pixels = ENCODERS[name].preprocessing.at(SIDE)(Image.open(path))[None]
        if name == "dino":
            return dino(pixels).last_hidden_state[0, 0].double().numpy()
        return clip.visual_projection(clip.vision_model(pixels)[1])[0].double().numpy()

    @torch.no_grad()
    def words(text: str) -> np.ndarray:
        ids = tokenizer(text, return_tensors="pt").input_ids
        return clip.text_projection(clip.text_model(ids)[1])[0].double().numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))

    for row in scores.to_dict("records"):
        seen = features(pair[0] / row["file"], row["metric"])
        if row["metric"] == "CLIP-T":
            expected = cosine(seen, words(row["prompt"].replace("{S*} ", "")))
        else:
            theirs = [features(p, row["metric"]) for p in sorted(references.iterdir())]
            expected = np.mean([cosine(seen, r) for r in theirs])
        assert row["value"] == pytest.approx(expected, abs=2e-5)


def test_pictures_are_what_the_run_draws_and_the_table_what_they_say(
    pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    found = measure(pair, out=tmp_path / "out", seed=5, guidance_scale=3.0, negative_prompt="a cat")
    run = Run.open(pair[1])
    expected = generate(
        run.load("cpu"),
        "a running <sks> dog",
        num_images=2,
        seed=5,
        guidance_scale=3.0,
        negative_prompt="a cat",
    )
    mine = found.scores[found.scores["run"] == str(pair[1])]
    mine = mine[(mine["metric"] == "DINO-I") & (mine["prompt"] == PROMPTS[0])]
    for image, row in zip(expected, mine.to_dict("records"), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(pair[1] / row["file"])))
    pd.testing.assert_frame_equal(found.table, compare(found.scores))
    wide = found.scores.pivot(index=[*PAIR, "metric"], columns="variant", values="value")
    difference = (wide["SuDe"] - wide["plain"]).groupby("metric").mean()
    table = found.table[found.table["variant"] == "SuDe"].set_index("metric")
    for metric in METRICS:
        assert table.loc[metric, "difference"] == pytest.approx(difference[metric])
        assert table.loc[metric, "pairs"] == 4
        low, high = table.loc[metric, ["difference_low", "difference_high"]]
        assert low <= difference[metric] <= high
    # The comparison is not of equal things.
    assert (wide["SuDe"] != wide["plain"]).any()


def test_one_run_is_its_own_table(pair: list[Path], measure: Measure) -> None:
    found = measure(pair[0])
    assert found.out == pair[0] / "evaluation"
    names = {p.name for p in found.out.iterdir()}
    assert names == {"pictures", "scores.csv", "table.csv", "table.md"}
    assert "difference" not in found.table and "In parentheses" not in found.text


# --- going on ------------------------------------------------------------------------------------


def test_finished_pictures_are_never_drawn_again(
    pair: list[Path], measure: Measure, drawings: list[Any]
) -> None:
    first = measure(pair[0]).scores
    kept = pictures(pair[0])
    assert len(kept) == 4
    drawings.clear()
    again = measure(pair[0]).scores
    pd.testing.assert_frame_equal(again, first)
    # The model's own settings, said aloud, are no other settings.
    measure(pair[0], num_inference_steps=2, guidance_scale=2.0)
    assert drawings == [] and pictures(pair[0]) == kept

    more = measure(pair[0], num_images=3).scores
    assert [call[1:] for call in drawings] == [(0, 0, 3)] * 2
    assert kept.items() <= pictures(pair[0]).items()
    keys = ["metric", "number", "seed", "picture"]
    both = more.merge(first, on=keys, suffixes=("", "_first"))
    assert len(both) == len(first) and (both["value"] == both["value_first"]).all()

    drawings.clear()
    measure(pair[0], guidance_scale=5.0)
    assert len(drawings) == 2  # other pictures, beside the first


def test_lost_and_damaged_pictures_alone_are_drawn_again(
    pair: list[Path], measure: Measure, drawings: list[Any]
) -> None:
    measure(pair[0], num_images=4)
    kept = pictures(pair[0])
    lost, damaged = (pair[0] / list(kept)[k] for k in (1, 3))
    lost.unlink()
    damaged.write_bytes(kept[str(damaged.relative_to(pair[0]))][:100])
    drawings.clear()
    measure(pair[0], num_images=4)
    assert [call[1:] for call in drawings] == [(0, 0, 4)]  # with those it was drawn with: last bits
    assert pictures(pair[0]) == kept and len(kept) == 8


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    pair: list[Path], measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(pair[0], tmp_path / "whole"))
    expected = measure(whole).scores
    calls = 0

    def stopped(*args: Any, **settings: Any) -> list[Image.Image]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return generate(*args, **settings)

    monkeypatch.setattr(room, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(pair[0])
    assert len(pictures(pair[0])) == 2
    assert not (pair[0] / "evaluation" / "scores.csv").exists()
    kept = pictures(pair[0])
    found = measure(pair[0]).scores
    assert kept.items() <= pictures(pair[0]).items() and calls == 3
    pd.testing.assert_frame_equal(found.drop(columns="run"), expected.drop(columns="run"))


def test_a_new_run_in_an_old_folder_is_drawn_anew(
    pair: list[Path], measure: Measure, drawings: list[Any], tuned: Callable[..., Path]
) -> None:
    measure(pair[0])
    drawings.clear()
    shutil.copytree(tuned(seed=3), pair[0], dirs_exist_ok=True)
    scores = measure(pair[0]).scores
    assert len(drawings) == 2 and set(scores["tuning_seed"]) == {3}


def test_a_run_that_cannot_be_opened_leaves_what_was_computed_before(
    pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    for file in (pair[1] / "weights").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        measure(pair, out=tmp_path / "out")
    assert len(pictures(pair[0])) == 4 and (pair[0] / "evaluation" / "scores.csv").is_file()
    assert not (tmp_path / "out").exists()


# --- names, prompts, references ------------------------------------------------------------------


def labels(folders: list[Path]) -> list[tuple[str, str]]:
    found = room._labels([Run.open(f) for f in folders])
    return [(label["settings"], label["variant"]) for label in found]


def test_runs_are_named_by_what_sets_them_apart(tuned: Callable[..., Path]) -> None:
    plain, sude = tuned(), tuned(weight_sude=1.0, learning_rate=1e-3)
    same = {"learning_rate": 1e-3}
    assert labels([plain, sude]) == [("dreambooth", "plain"), ("dreambooth", "SuDe")]
    twice, loose = tuned(weight_sude=2.0, **same), tuned(weight_sude=1.0, truncate=False, **same)
    assert labels([sude, plain, twice, loose]) == [
        ("dreambooth", "SuDe, weight_sude 1.0, truncate True"),
        ("dreambooth", "plain"),
        ("dreambooth", "SuDe, weight_sude 2.0, truncate True"),
        ("dreambooth", "SuDe, weight_sude 1.0, truncate False"),
    ]
    faster, other = tuned(learning_rate=1e-2), tuned(method="textual_inversion")
    assert labels([plain, faster, other]) == [
        ("dreambooth, learning_rate 0.001", "plain"),
        ("dreambooth, learning_rate 0.01", "plain"),
        ("textual_inversion", "plain"),
    ]
    # Seeds and subjects are no settings: they are what is averaged over.
    assert labels([plain, tuned(seed=1)]) == [("dreambooth", "plain")] * 2


def test_a_run_given_twice_is_refused(pair: list[Path], measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="same settings, subject and seed"):
        measure([pair[0], pair[0]], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("image", "name"),
    [("dogs/rex.jpg", "rex"), ("dataset/dog/00.jpg", "dog"), ("00.jpg", "00"), ("a/b1.png", "b1")],
)
def test_a_subject_is_named_by_its_picture_or_its_folder(image: str, name: str) -> None:
    assert subject_name(TuningConfig(image=Path(image), category="dog")) == name


def test_two_pictures_of_one_name_are_two_subjects(
    tuned: Callable[..., Path], subject_picture: Path, tmp_path: Path
) -> None:
    image = tmp_path / "other" / subject_picture.name
    image.parent.mkdir()
    Image.open(subject_picture).rotate(90).save(image)
    runs = [Run.open(f) for f in (tuned(), tuned(image=image), tuned(seed=1))]
    names = [label["subject"] for label in room._labels(runs)]
    assert names[0] == names[2] == "dog" and names[1].startswith("dog-")


def test_our_prompts_are_asked_in_the_methods_words(
    tuned: Callable[..., Path], tmp_path: Path
) -> None:
    def asked(name: str, structure: str = "default", **settings: Any) -> list[str]:
        run = Run.open(tuned(**settings))
        return [p.text for p in room.prompts_of(run.config, [name], None, structure=structure)]

    found = asked("attributes")
    assert found[0] == "photo of a running {S*} dog" and len(found) == 5
    assert asked("attributes", method="textual_inversion")[0] == "photo of a running {S*}"
    assert asked("attributes", "P3")[0] == "photo of a {S*} and it is a running dog"
    assert asked("plain") == ["photo of a {S*} dog"]
    assert "photo of a {S*} dog on the beach" in asked("backgrounds")
    both = asked("combinations")
    assert len(both) == 25 and "photo of a jumping {S*} dog in the snow" in both
    assert asked("attributes", prompt="a {S*} toy")[0] == "a running {S*} toy"


def data_set(folder: Path, subject: str) -> Path:
    words = "\n".join(
        [
            *("Classes", "", "subject_name,class", f"{subject},dog", "", "Prompts", ""),
            *("Object Prompts", "'a {0} {1} in the snow'.format(unique_token, class_token)"),
            *("Live Subject Prompts", "'a {0} {1} in a hat'.format(unique_token, class_token)"),
        ]
    )
    (folder / "dataset" / subject).mkdir(parents=True)
    (folder / "dataset" / "prompts_and_classes.txt").write_text(words)
    for k in range(3):
        Image.new("RGB", (40, 50), (k * 90, 80, 10)).save(
            folder / "dataset" / subject / f"{k:02d}.jpg"
        )
    return folder


def test_dreambench_gives_references_and_prompts(
    pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    bench = data_set(tmp_path / "bench", "dog")  # as the subject's picture, dog.png
    found = measure(pair[0], references=bench, prompts=["dreambench", "plain"]).scores
    assert set(found["prompt"]) == {"a {S*} dog in a hat", "photo of a {S*} dog"}
    assert set(found["kind"]) == {"dreambench", "plain"}
    folder = bench / "dataset" / "dog"
    assert (
        measure(pair[0], references=folder)
        .scores["value"]
        .equals(measure(pair[0], references=folder.parent.parent).scores["value"])
    )


def test_references_may_lie_in_a_folder_of_the_subjects_name(
    pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    root = tmp_path / "all"
    (root / "dog").mkdir(parents=True)
    Image.new("RGB", (40, 50), "green").save(root / "dog" / "green.png")
    there = measure(pair[0], references=root).scores
    assert there["value"].equals(measure(pair[0], references=root / "dog").scores["value"])
    assert not there["value"].equals(measure(pair[0]).scores["value"])


# --- the drawn world -----------------------------------------------------------------------------


@pytest.fixture
def drawn_world(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder whose embedded model is the tiny one, with the real oracle."""
    data = tmp_path / "data"
    shutil.copytree(tiny_folder, data / "embedded")
    shutil.copytree(ROOT / "data" / "oracle", data / "oracle")
    monkeypatch.setenv("SUDE_LAB_DATA", str(data))
    return data


def test_the_oracle_judges_runs_of_the_drawn_world(
    drawn_world: Path, subject_picture: Path, tmp_path: Path
) -> None:
    config = TuningConfig(
        image=subject_picture, category="dog", weight_sude=0.0, max_train_steps=1, device="cpu"
    )
    run = run_tuning(config, tmp_path / "run", num_samples=0, report_to="none", progress=False)
    usual: dict[str, Any] = {
        "references": subject_picture.parent,  # at the size of the world, not the tiny model's
        "judges": drawn_judge,
        "device": "cpu",
        "progress": False,
    }
    found = evaluate([run.folder], num_images=2, **usual)
    scores = found.scores
    # The picture shows a sitting dog: all its other attributes are asked for.
    assert set(scores["attribute"]) == set(world.POSES) - {"sitting"}
    assert set(scores["metric"]) == {
        "attribute_alignment",
        "category_alignment",
        "subject_fidelity",
    }
    oracle = load_oracle()
    scene = world.Scene("dog", "sitting", world.Look("brown", "white", "spots", "red"))
    for row in scores.to_dict("records"):
        seen = judge(oracle, [Image.open(run.folder / row["file"])], scene, row["attribute"])
        assert row["value"] == pytest.approx(getattr(seen, row["metric"])[0].item(), abs=2e-5)
    assert "oracle's" in found.text and "Encoders:" not in found.text

    mine = tmp_path / "mine.txt"
    mine.write_text("photo of a running {S*} dog on the beach\nphoto of a {S*} with a ball\na {S*}")
    scores = evaluate([run.folder], prompts=[str(mine)], num_images=1, **usual).scores
    for head, name, number in (("background", "beach", 0), ("companion", "ball", 1)):
        row = scores[(scores["number"] == number) & (scores["metric"] == "background_alignment")]
        picture = Image.open(run.folder / row["file"].iloc[0])
        seen = oracle.read([picture])[head][0, HEADS[head].index(name)].item()
        assert row["value"].iloc[0] == pytest.approx(seen, abs=2e-5)
    asked = scores[scores["metric"] == "attribute_alignment"]["number"]
    assert list(asked) == [0]  # what was not asked for is not judged
    assert set(scores[scores["number"] == 2]["metric"]) == {
        "category_alignment",
        "subject_fidelity",
    }


def test_the_oracle_reads_a_subject_from_its_picture() -> None:
    look = world.Look("orange", "black", "stripes", "teal")
    for category, attribute in (("dog", "running"), ("candle", "melted"), ("teapot", "plain")):
        scene = world.Scene(category, attribute, look)
        assert read_scene(load_oracle(), [world.draw(scene, 256)] * 2, category) == scene


def test_learned_metrics_join_the_oracle_where_encoders_are_named(
    drawn_world: Path, encoders: dict[str, Path]
) -> None:
    config = TuningConfig(image=Path("dog.png"), category="dog")
    chosen = room._chosen_metrics
    pictures = [Image.new("RGB", (64, 64))]
    oracle = drawn_judge(config, pictures)
    assert chosen((), config, {}, oracle) == ("oracle",)
    assert chosen((), config, {"clip": "x"}, oracle) == ("oracle", "CLIP-I", "CLIP-T")
    assert chosen(("dino-i", "ORACLE"), config, {}, oracle) == ("DINO-I", "oracle")
    elsewhere = TuningConfig(image=Path("dog.png"), category="dog", backbone="org/model")
    assert drawn_judge(elsewhere, pictures) is None
    assert chosen((), elsewhere, {}, None) == ("CLIP-I", "CLIP-T", "DINO-I", "BLIP-T")
    scene = world.Scene("dog", "sitting", world.Look("brown", "white", "spots", "red"))
    drawn = drawn_judge(elsewhere, pictures, scene=scene)  # knows the subject, not the pictures
    assert drawn is not None and "sitting" not in drawn.attributes and not drawn.measures
    for nobody in (None, drawn):
        with pytest.raises(UserError, match="drawn world alone"):
            chosen(("oracle",), elsewhere, {}, nobody)
    with pytest.raises(UserError, match="does not know the category 'lamp'"):
        drawn_judge(TuningConfig(image=Path("lamp.png"), category="lamp"), pictures)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"metrics": ["FID"]}, "no metric 'FID'"),
        ({"encoders": ["clip"]}, "NAME=FOLDER"),
        ({"encoders": ["vgg=folder"]}, "NAME=FOLDER"),
        ({"encoders": ["clip=missing"]}, "no clip encoder in missing"),
        ({"encoders": []}, "could not be had from the hub"),
        ({"prompts": []}, "Name prompts"),
        ({"prompts": ["verses"]}, "no file 'verses'"),
        ({"prompts": ["dreambench"]}, "--references"),
        ({"structure": "P4", "prompts": ["plain"]}, "'P4'"),
        ({"references": "missing"}, "no folder missing"),
        ({"guidance_scale": float("nan")}, "must be a finite number"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any], expected: str, pair: list[Path], measure: Measure
) -> None:
    with pytest.raises(UserError) as error:
        measure(pair[0], **settings)
    said = str(error.value)
    assert expected in said and said.endswith(".")
    assert not (pair[0] / "evaluation").exists()


def test_bad_references_are_told_one_by_one(
    pair: list[Path], measure: Measure, tmp_path: Path, tuned: Callable[..., Path]
) -> None:
    folder = tmp_path / "references"
    (folder / "dogs").mkdir(parents=True)

    def refused(expected: str, **settings: Any) -> None:
        with pytest.raises(UserError) as error:
            measure(pair[0], **{"references": folder} | settings)
        assert expected in str(error.value)
        assert not (pair[0] / "evaluation").exists()

    refused(f"no pictures in {folder}: put some there.")
    (folder / "dogs").rename(folder / "dog")
    refused(f"no pictures in {folder / 'dog'}: put some there.")
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (9, 9)).save(folder / "dog" / name)
    (folder / "dog" / "b.jpg").write_bytes(b"\xff\xd8 broken")
    refused("b.jpg")  # one among many, by its name
    refused("no subject 'dog'", references=data_set(tmp_path / "bench", "cat"))


def test_prompts_without_the_subject_are_refused(
    pair: list[Path], measure: Measure, prompts: Path
) -> None:
    for text, expected in (("a dog", "has no {S*}"), ("a {S*} and a {S*2}", "asks for {S*2}")):
        prompts.write_text(text)
        with pytest.raises(UserError, match=expected.replace("{S*", r"\{S\*")):
            measure(pair[0])
    assert not (pair[0] / "evaluation").exists()


def test_several_runs_need_a_folder_and_no_run_is_no_job(
    pair: list[Path], measure: Measure, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--out"):
        measure(pair)
    with pytest.raises(UserError, match="at least one run"):
        measure([])
    with pytest.raises(UserError, match="not a run's folder"):
        measure(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        measure(pair[0], out=tmp_path / "file")


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_command_does_the_same(
    pair: list[Path],
    prompts: Path,
    encoders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [f"{name}={folder}" for name, folder in encoders.items()]
    words = ["evaluate", *map(str, pair), "--out", str(tmp_path / "out"), "--prompts", str(prompts)]
    words += ["--num-images", "1", "--device", "cpu", "--metrics", "CLIP-T", "DINO-I"]
    assert main([*words, "--encoders", *named]) == 0
    said = capsys.readouterr()
    assert "| dreambooth" in said.out and str(tmp_path / "out" / "scores.csv") in said.out
    assert "drawing" in said.err
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 2 * 2 * 2

    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("sude-lab: ") and said.err.count("\n") == 1
    assert "openai/clip-vit-base-patch32" in said.err and "--encoders clip=FOLDER" in said.err


def test_the_negative_prompt_may_name_the_subject_and_what_is_not_read_is_told(
    pair: list[Path], measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"num_images": 1, "prompts": ["plain"], "metrics": ["CLIP-I"]}
    with pytest.raises(UserError, match=r"asks for \{S\*2\}"):
        measure(pair[0], out=tmp_path / "no", negative_prompt="a {S*2}", **said)
    by_mark = measure(pair[0], out=tmp_path / "a", negative_prompt="a {S*}", **said)
    by_word = measure(pair[0], out=tmp_path / "b", negative_prompt="a <sks>", **said)
    assert by_mark.scores["file"].tolist() == by_word.scores["file"].tolist()
    assert "leaves out" not in capsys.readouterr().err
    measure(pair[0], out=tmp_path / "c", negative_prompt=f"a {'running ' * 40}cat", **said)
    assert "The prompt 'a running" in (err := capsys.readouterr().err) and "leaves out" in err


@pytest.mark.parametrize("number", [0, 1.5, "2", True])
def test_numbers_of_pictures_are_whole(number: Any, pair: list[Path], measure: Measure) -> None:
    with pytest.raises(UserError, match=r"--num-images is .*: it must be a whole"):
        measure(pair[0], num_images=number)


def test_texts_reach_tables_as_texts(pair: list[Path], measure: Measure, tmp_path: Path) -> None:
    """A spreadsheet takes what begins with = for a formula, Markdown what has | for two cells."""
    nasty = tmp_path / "nasty.txt"
    nasty.write_text("=1+1 {S*}\n", encoding="utf-8")
    found = measure(str(pair[0]), prompts=str(nasty), num_images=1, metrics="CLIP-I")
    assert found.scores["prompt"].tolist() == ["=1+1 {S*}"]
    assert pd.read_csv(found.out / room.SCORES)["prompt"].tolist() == ["'=1+1 {S*}"]
    table = found.table.assign(settings="a | b")
    lines = room.report(table, found.scores).splitlines()
    assert lines[2].startswith("| a \\| b")
    assert lines[0].count("|") == lines[2].count("|") - 1


def test_a_picture_whose_name_is_not_utf_8_is_evaluated(pair: list[Path], measure: Measure) -> None:
    config = pair[0] / "config.json"
    settings = json.loads(config.read_text()) | {"image": "dog-\udcff.png"}
    config.write_text(json.dumps(settings))
    found = measure(pair[0], prompts="plain", num_images=1, metrics="CLIP-I")
    table = pd.read_csv(found.out / room.SCORES)
    assert table["subject"].tolist() == ["dog-\\udcff"] and found.text.encode()


def test_drawing_begins_before_tables_are_imported() -> None:
    code = "import sys, sude_lab.evaluate.evaluate; print(set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "'torch'" in said.stdout and "'pandas'" not in said.stdout
