"""The data set is read as its authors lay it out; what is missing or misnamed is one sentence."""

import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.evaluate.dreambench import (
    FILE,
    DreamBench,
    attributes_of,
    backgrounds,
    find_dreambench,
    load_dreambench,
    pictures_in,
)
from sude_lab.prompts import PLACEHOLDER, photo_of

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("SUDE_LAB_DREAMBENCH", ROOT.parent / "shared" / "dreambench"))
needs_real = pytest.mark.skipif(
    find_dreambench(REAL) is None,
    reason="the DreamBooth data set is not here: name a clone of it in SUDE_LAB_DREAMBENCH",
)
CLASSES = {
    *("backpack", "boot", "bowl", "can", "candle", "cartoon", "cat", "clock", "dog", "glasses"),
    *("sneaker", "stuffed animal", "teapot", "toy", "vase"),
}


# --- the data set itself -------------------------------------------------------------------------


@needs_real
def test_the_real_data_set_is_read_whole() -> None:
    bench = load_dreambench(REAL)
    assert len(bench.subjects) == 30
    assert {s.category for s in bench.subjects.values()} == CLASSES
    wearing = [any("wearing" in p.text for p in s.prompts) for s in bench.subjects.values()]
    assert sum(wearing) == 9  # the live ones: seven dogs, two cats
    assert all(4 <= len(s.images) <= 6 for s in bench.subjects.values())
    assert bench.subject("wolf_plushie").category == "stuffed animal"
    # Every folder of the data set is a subject, and every subject has one.
    assert {p.name for p in bench.folder.iterdir() if p.is_dir()} == set(bench.subjects)


@needs_real
def test_real_pictures_open_and_the_first_is_the_one_to_tune_on() -> None:
    for subject in load_dreambench(REAL).subjects.values():
        assert subject.picture == subject.images[0] and subject.picture.name == "00.jpg"
        assert min(Image.open(subject.picture).size) >= 512


@needs_real
def test_real_prompts_have_the_subject_and_its_class() -> None:
    bench = load_dreambench(REAL)
    for subject in bench.subjects.values():
        assert len({p.text for p in subject.prompts}) == 25
        for prompt in subject.prompts:
            assert f"{PLACEHOLDER} {subject.category}" in prompt.text
            assert PLACEHOLDER not in prompt.caption and "{" not in prompt.caption
            assert prompt.kind == "dreambench"
    dog = bench.subject("dog").prompts
    assert dog[0].text == "a {S*} dog in the jungle" and dog[0].caption == "a dog in the jungle"
    assert any("wearing a santa hat" in p.text for p in dog)
    teapot = bench.subject("teapot").prompts
    assert any("with the Eiffel Tower in the background" in p.text for p in teapot)
    assert not any("wearing" in p.text for p in teapot)
    assert "cube shaped {S*} teapot" in teapot[-1].text


@needs_real
def test_a_clone_and_the_folder_in_it_are_the_same() -> None:
    folder = find_dreambench(REAL)
    assert folder is not None and load_dreambench(folder) == load_dreambench(REAL)


@needs_real
def test_our_attributes_are_not_among_the_data_sets_prompts() -> None:
    bench = load_dreambench(REAL)
    theirs = {w for s in bench.subjects.values() for p in s.prompts for w in p.text.split()}
    ours = {a for c in CLASSES for a in attributes_of(c)}
    assert ours & theirs <= {"wooden"}  # theirs is a floor


# --- our own prompts -----------------------------------------------------------------------------


def test_every_class_has_five_attributes_of_its_own() -> None:
    known = yaml.safe_load((ROOT / "data" / "attribute_prompts.yaml").read_text())["attributes"]
    assert set(known) == CLASSES
    for category in CLASSES:
        attributes = attributes_of(category)
        assert len(set(attributes)) == 5
        for attribute in attributes:
            assert isinstance(attribute, str)  # YAML reads some words as booleans
            assert attribute == attribute.strip().lower() and attribute not in category
            assert photo_of(f"{attribute} {category}").split()[2] in ("a", "an")
    assert "running" in attributes_of("dog") and "burning" in attributes_of("candle")
    assert len(set(backgrounds())) == 5


def test_a_class_without_attributes_is_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"'okapi'.*backpack.*--prompts"):
        attributes_of("okapi")


def test_without_a_clone_our_prompts_are_missed_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDE_LAB_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no attribute_prompts\.yaml"):
        attributes_of("dog")


# --- a small one of the same layout --------------------------------------------------------------

WORDS = """Classes

subject_name,class
rex,dog
old-bowl,bowl
bear,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
"a {0} {1} in the giant's house".format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name in ("rex", "old-bowl", "bear"):
        folder = tmp_path / "dataset" / name
        folder.mkdir(parents=True)
        for k in (0, 1, 10):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k:02d}.jpg")
    (tmp_path / "dataset" / "rex" / "notes.txt").write_text("mine")
    (tmp_path / "dataset" / "rex" / ".00.jpg").touch()
    (tmp_path / "dataset" / FILE).write_text(WORDS, encoding="utf-8")
    return tmp_path


def test_the_layout_is_all_that_counts(small: Path) -> None:
    bench = load_dreambench(small)
    assert list(bench.subjects) == ["rex", "old-bowl", "bear"]
    rex = bench.subject("rex")
    assert [p.name for p in rex.images] == ["00.jpg", "01.jpg", "10.jpg"]
    assert [p.text for p in rex.prompts] == ["a {S*} dog wearing a hat"]
    texts = [p.text for p in bench.subject("old-bowl").prompts]
    assert texts == ["a {S*} bowl in the snow", "a {S*} bowl in the giant's house"]
    assert bench.subject("bear").prompts[0].text == "a {S*} stuffed animal in the snow"


def test_line_ends_of_windows_are_read(small: Path) -> None:
    expected = load_dreambench(small)
    (small / "dataset" / FILE).write_bytes(WORDS.replace("\n", "\r\n").encode())
    assert load_dreambench(small) == expected


def spoiled(small: Path, old: str, new: str) -> Path:
    file = small / "dataset" / FILE
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return small


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_dreambench(folder)
    said = str(error.value)
    assert (said.endswith(".") or said.endswith("?")) and "\n" not in said
    return said


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert FILE in refused(folder)


def test_a_missing_or_misnamed_folder_is_named(small: Path) -> None:
    (small / "dataset" / "rex").rename(small / "dataset" / "rexx")
    assert "rex has no 00.jpg" in refused(small)


def test_a_subject_named_twice_is_refused(small: Path) -> None:
    assert "the subject rex twice" in refused(spoiled(small, "bear,stuffed", "rex,stuffed"))


def test_a_subject_without_its_first_picture_is_refused(small: Path) -> None:
    (small / "dataset" / "bear" / "00.jpg").unlink()
    assert "bear has no 00.jpg" in refused(small)


@pytest.mark.parametrize("old", ["Live Subject Prompts", "Object Prompts"])
def test_a_file_of_another_kind_is_refused(old: str, small: Path) -> None:
    assert "two prompt lists" in refused(spoiled(small, old, "Verses"))


def test_a_file_without_prompts_is_refused(small: Path) -> None:
    assert "no prompts" in refused(spoiled(small, "wearing a hat'.format", "wearing a hat'.read"))


def test_a_subject_that_is_not_there_gets_the_closest_names(small: Path) -> None:
    bench = load_dreambench(small)
    assert isinstance(bench, DreamBench)
    with pytest.raises(UserError, match="no subject 'old_bowl': choose among old-bowl"):
        bench.subject("old_bowl")
    with pytest.raises(UserError, match="choose among bear, old-bowl, rex"):
        bench.subject("zzz")


def test_pictures_of_a_folder_come_by_name_and_alone(small: Path) -> None:
    assert [p.name for p in pictures_in(small / "dataset" / "rex")] == [
        "00.jpg",
        "01.jpg",
        "10.jpg",
    ]
