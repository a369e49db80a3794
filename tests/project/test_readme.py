"""README and guide name what is really there: commands, flags, links, functions, examples."""

import ast
import functools
import importlib
import importlib.util
import pkgutil
import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest

import studies.embedded
from sude_lab import cli, world

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "notebooks" / "guide").glob("*.md"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (README, ROOT / "notebooks" / "index.md", *GUIDE)
}
LESSONS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/**/*.ipynb"))
OTHERS = r"tensorboard --logdir|^(?:#SBATCH|srun|helm|kubectl|conda) .*$"
"""Other programs' commands, whose flags are not ours."""
RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.+?)^```$", re.S | re.M)


def commands(text: str) -> list[str]:
    """Return the lines of the page's shell blocks, those that go on put together."""
    blocks = re.findall(r"^```bash\n(.+?)^```$", text, re.S | re.M)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def of_ours(name: str) -> list[tuple[str, list[str]]]:
    """Return (page, arguments) of every command of `name` on the pages."""
    return [
        (page, words[words.index(name) + 1 :])
        for page, text in PAGES.items()
        for line in commands(re.sub(OTHERS, "", text, flags=re.M))
        if name in (words := shlex.split(line.split(" &")[0], comments=True))
    ]


@pytest.mark.parametrize("name", ["demo", "test"])
def test_ci_runs_the_readme_command(name: str) -> None:
    block = re.search(rf"<!-- ci: {name} -->\n```bash\n(.+?)```", PAGES["README.md"], re.S)
    assert block and "pip install -e" in block[1]
    assert f" {name}" in (ROOT / ".ci" / "run").read_text()


def test_the_guide_is_listed() -> None:
    for path in GUIDE:
        assert f"(notebooks/guide/{path.name})" in PAGES["README.md"], path.name


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_and_link_is_there(page: str) -> None:
    prose = re.sub(r"^```.+?^```$", "", PAGES[page], flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        # The site makes the pages of reference/ from the docstrings.
        if not target.startswith(("http", "reference/", "../reference/")):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_map_names_real_functions_and_tests() -> None:
    tests = (ROOT / "tests" / "core" / "test_equations.py").read_text(encoding="utf-8")
    rows = [line for line in PAGES["README.md"].splitlines() if "`test_" in line]
    assert len(rows) >= 9
    for row in rows:
        module = None
        for place, name in re.findall(r"`([a-z_.]+\.)?([A-Za-z_]+)`", row.split("|")[2]):
            if place:
                module = importlib.import_module(f"sude_lab.{place.rstrip('.')}")
            assert hasattr(module, name), name
        for number in re.findall(r"test_eq_(\d\d)\*", row):
            assert f"def test_eq_{number}_" in tests


@pytest.mark.parametrize("page", [*PAGES, *LESSONS])
def test_every_dotted_name_and_path_is_there(page: str) -> None:
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`(sude_lab(?:\.\w+)+)", text):
        if name == "sude_lab.json":
            continue
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            place, _, last = name.rpartition(".")
            file = ROOT / f"{place.replace('.', '/')}.py"
            # What needs an extra cannot be imported without it.
            extra = place == "sude_lab.exercises.grading" and not importlib.util.find_spec(
                "nbgrader"
            )
            if not (extra and f"def {last}(" in file.read_text(encoding="utf-8")):
                raise AssertionError(name) from error
    for name in re.findall(r"`((?:tests|data|notebooks|studies|sude_lab|\.ci)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_command_can_be_read() -> None:
    found = of_ours("sude-lab")
    assert len(found) >= 20 and {page for page, _ in found} >= {"README.md"}
    for page, words in found:
        words = [word for word in words if word != "--debug"]
        assert isinstance(cli._parse(words), cli.Command), (page, words)
    for _, (module, *_) in of_ours("-m"):
        if not module.startswith("venv"):
            assert importlib.util.find_spec(module), module
    for _, (script, *_) in of_ours("python"):
        assert script == "-m" or (ROOT / script).is_file(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for _, (target,) in of_ours("make"):
        assert target in targets


@functools.cache
def options() -> set[str]:
    """What may be said to `sude-lab`, to every study, to every benchmark."""
    names = {"help", "debug"}  # of every command: debug is taken out before they are parsed
    names |= {name for command in get_args(cli.Command) for name in command.__dataclass_fields__}
    packages = (studies, studies.embedded, world)
    modules = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, f"{p.__name__}.")]
    for module in modules:
        if module == "studies.embedded":
            continue
        types = [c for c in vars(importlib.import_module(module)).values() if isinstance(c, type)]
        configs = [c for c in types if c.__module__.startswith(("sude_lab.", "studies."))]
        names |= {field.name for c in configs if is_dataclass(c) for field in fields(c)}
    for path in (ROOT / "benchmarks").glob("*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        benchmarks = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == "Benchmark"]
        assert len(benchmarks) == (path.stem != "rows"), path  # what the others share
        names |= {f.target.id for b in benchmarks for f in b.body if isinstance(f, ast.AnnAssign)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page: str) -> None:
    text = re.sub(OTHERS, "", PAGES[page], flags=re.M)
    flags = {flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z][a-z-]+)", text)}
    assert flags <= options()


def test_every_extra_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page, text in PAGES.items():
        for extras in re.findall(r'pip install -e "\.\[([a-z,]+)\]"', text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), page
        assert not re.search(r"pip install -e \.\[", text), f"{page}: zsh reads the brackets"


@pytest.mark.parametrize("page", [page for page in PAGES if RUNNABLE.search(PAGES[page])])
def test_the_examples_run(
    page: str,
    tmp_path: Path,
    tiny_data: Path,
    subject_picture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my_dog.jpg").write_bytes(subject_picture.read_bytes())
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    names: dict[str, object] = {}
    for block in RUNNABLE.findall(PAGES[page]):
        exec(compile(block, page, "exec"), names)
