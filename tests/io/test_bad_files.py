"""Grids, lists of prompts and the small files of a folder: read right, or refused in a sentence."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import content, generated, say

from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.evaluate.dreambench import load_dreambench
from sude_lab.evaluate.prompts import read_prompts
from sude_lab.generation import sampling_settings
from sude_lab.io.opening import FACTS_FILE, read_facts
from sude_lab.io.reading import MOST_BYTES, read_yaml
from sude_lab.methods import configure
from sude_lab.prompts import PLACEHOLDER
from sude_lab.sweep.grid import make_plan, read_grid

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "laughs": (LAUGHS, "expansion exceeds"),
    "merged": (MERGED, "expansion exceeds"),
    "snake": ("&a [*a]", "recursive aliases"),
    "merged with itself": ("&a {<<: *a, b: 1}", ""),
    "deep": ("[" * 10_000, "maximum nesting depth"),
    "deep aliases": ("- &a0 [x]\n" + "".join(f"- &a{k + 1} [*a{k}]\n" for k in range(400)), ""),
    "long": ("# " + "x" * MOST_BYTES, "more than 262,144 bytes"),
    "object": ("!!python/object/apply:os.system ['true']", "not readable YAML"),
    "module": ("!!python/module:os", "not readable YAML"),
    "no date": ("seeds: 2001-99-99", ""),
    "no whole number": ("seeds: !!int x", "not readable YAML"),
    "an empty number": ("seeds: !!int ''", "not readable YAML"),
    "no truth": ("seeds: !!bool perhaps", "not readable YAML"),
    "a long number": (f"seeds: {'1' * 5000}", "not readable YAML"),
    "a list as a key": ("? [a]\n: 1", ""),
    "said twice": ("seeds: [0]\nw_s: 1\nseeds: [1]", "line 3: found duplicate key seeds"),
    "said twice within": (
        "- {prompt: a, caption: b}\n- {prompt: a, prompt: b}",
        "duplicate key prompt",
    ),
    "two documents": ("a: 1\n--- \nb: 2", "not readable YAML"),
    "control": (b"a: \x00\x1b", "not readable YAML"),
    "latin": (b"a: \xe4", "not UTF-8"),
    "utf-16": ("a: 1".encode("utf-16"), "not UTF-8"),
    "empty": ("", ""),
    "text": ("just words", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    text, reason = HOSTILE[name]
    file = tmp_path / "file.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(tmp_path)
    for flags in ((), ("--dry-run",)):
        sentence = say("sweep", file, "--out", tmp_path / "new", *flags).sentence
        assert reason in sentence and "file.yaml" in sentence
    assert content(tmp_path) == before


def test_aliases_are_understood_and_never_written_out() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 3}}", "It") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 3},
    }
    tracemalloc.start()
    for text in (LAUGHS, MERGED):
        with pytest.raises(UserError, match="expansion exceeds"):
            read_yaml(text, "It")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "nul\0", "a" * 300])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # who reads it waits for ever
    for read in (read_grid, lambda p: read_prompts(p, "dog")):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)
    assert say("sweep", path, "--out", tmp_path / "new").sentence


# --- generated -----------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**301)
    | st.floats()
    | st.dates()
    | st.sampled_from(["x1", "x", "xnan", "held-out 0", "held-out 9999999999", "demo ²", "../x"])
    | st.sampled_from(["attributes", "{S*}", "dreambooth", "nul\0", "a" * 400, "1e-4", "inf", ""])
    | st.text(max_size=8)
)
CONTENT = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["picture", "category", "dreambench", "names", "prompt", "w_s"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
GRID: dict[str, Any] = {
    "subjects": ["held-out 0"],
    "methods": ["dreambooth"],
    "w_s": ["x0", "x1"],
    "truncation": [True, 0.5],
    "prior": ["current"],
    "weighting": ["exact"],
    "seeds": [0],
    "backbone": "embedded",
    "settings": {"max_train_steps": 3, "learning_rate": 1e-4},
    "also": [{"w_s": [2]}],
    "prompts": ["attributes"],
    "pictures": 2,
    "evaluate": {"seed": 1, "guidance_scale": 2.0, "metrics": ["oracle"]},
    "num_gpus": 0,
}
PLACES = [(k,) for k in GRID] + [
    (k, inner) for k in ("settings", "evaluate") for inner in GRID[k]
] + [
    ("settings", name) for name in sorted(TuningConfig.__dataclass_fields__)
]  # fmt: skip


def planned(room: Path) -> None:
    """Read and plan room/grid.yaml, as a dry run does; a sentence is as good as a plan."""
    try:
        plan = make_plan(read_grid(room / "grid.yaml"), room / "out")
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert plan.jobs and all(set(job.key) <= set("0123456789abcdef") for job in plan.jobs)
    assert [p.name for p in room.iterdir()] == ["grid.yaml"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@generated(50)
@given(place=st.sampled_from(PLACES), value=CONTENT)
@example(place=("settings",), value={"lora_rank": [1] * 400, "num_vectors": [1] * 400})
@example(place=("settings", "class_images"), value="/")
@example(place=("num_gpus",), value=float("nan"))
@example(place=("pictures",), value=10**300)
def test_a_grid_with_one_wrong_value(place: tuple[str, ...], value: Any, room: Path) -> None:
    grid = json.loads(json.dumps(GRID))
    inner = grid
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (room / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    planned(room)


@generated(150)
@given(data=st.binary(max_size=80) | st.text("&*[]{}:-,!<>|'\" \n\tab1.~?%@", max_size=80))
def test_bytes_and_letters_as_a_grid_and_as_prompts(data: bytes | str, room: Path) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    (room / "grid.yaml").write_bytes(raw)
    planned(room)
    try:
        prompts = read_prompts(room / "grid.yaml", "dog")
    except UserError as error:
        assert "grid.yaml" in str(error) or "is no text" in str(error)
    else:
        assert all(PLACEHOLDER in prompt.text for prompt in prompts)


@generated(150)
@given(lines=st.lists(st.text() | st.just("a {S*} {category}"), max_size=3))
def test_prompts_of_any_lines(lines: list[str], room: Path) -> None:
    path = room / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        prompts = read_prompts(path, "dog")
    except UserError as error:
        assert path.name in str(error) or "is no text" in str(error)
    else:
        assert prompts and all(PLACEHOLDER in p.text and p.caption for p in prompts)


FACTS = ("words", "categories", "tuning", "generation", "other")


@generated(120)
@given(
    facts=st.dictionaries(st.sampled_from(FACTS), CONTENT, max_size=3)
    | st.fixed_dictionaries(
        {"tuning": st.fixed_dictionaries({"dreambooth": st.dictionaries(
            st.sampled_from(sorted(TuningConfig.__dataclass_fields__)), SCALARS, max_size=3)})}
    )
    | st.fixed_dictionaries({"generation": st.dictionaries(
        st.sampled_from(["num_inference_steps", "guidance_scale", "eta"]), SCALARS, max_size=2)}),
)  # fmt: skip
def test_facts_of_any_content(facts: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a model's folder says of itself: settings that work, or a sentence."""
    folder = tmp_path_factory.getbasetemp() / "facts"
    folder.mkdir(exist_ok=True)
    (folder / FACTS_FILE).write_text(json.dumps(facts, default=str), encoding="utf-8")
    try:
        facts = read_facts(folder)
        config = configure(TuningConfig(Path("x.png"), "dog"), facts)
        drawing = sampling_settings(facts)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert config.learning_rate is None or config.learning_rate >= 0
        assert drawing["num_inference_steps"] >= 1 and set(drawing) == {
            "num_inference_steps",
            "guidance_scale",
        }


def test_a_mark_that_some_editors_begin_with_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("# ours\na {S*} here\n".encode("utf-8-sig"))
    assert [prompt.text for prompt in read_prompts(file, "dog")] == ["a {S*} here"]


def test_a_data_set_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts_and_classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_dreambench(tmp_path)
