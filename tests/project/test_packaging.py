"""The repository installs from one list of dependencies and holds what the README promises."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sude_lab

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_environment_installs_the_package_and_nothing_of_its_own() -> None:
    dependencies = read_yaml("environment.yml")["dependencies"]
    conda = {Requirement(entry.replace("=", "==", 1)).name for entry in dependencies[:-1]}
    assert conda == {"python", "pip"}
    assert dependencies[-1] == {"pip": ["-e .[test]"]}


def test_environment_has_a_python_that_the_package_accepts() -> None:
    python = next(e for e in read_yaml("environment.yml")["dependencies"] if "python" in e)
    version = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)


def test_torch_is_capped_where_a_cpu_build_exists() -> None:
    requirements = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    assert requirements["torch"].specifier.contains("2.13.0")
    assert not requirements["torch"].specifier.contains("2.14.0")
    assert "torchvision" not in requirements


def test_every_dependency_has_a_lower_bound_and_a_cap() -> None:
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    for requirement in map(Requirement, listed):
        if canonicalize_name(requirement.name) != PROJECT["name"]:
            assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement


def test_extras() -> None:
    extras = {"lab", "sweep", "test", "dev", "browser", "teach", "cluster", "site"}
    assert set(PROJECT["optional-dependencies"]) == extras
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy",
        "pillow", "tqdm", "filelock", "jinja2", "huggingface_hub",
    }  # fmt: skip


def test_command_line_entry() -> None:
    assert PROJECT["scripts"] == {"sude-lab": "sude_lab.__main__:main"}


@pytest.mark.parametrize("name", ["tyro", "sude_lab.errors"])
def test_without_the_extras_the_command_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sude_lab.__main__ import main

    monkeypatch.delitem(sys.modules, "sude_lab.cli", raising=False)
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    if name == "tyro":
        assert main() == 2
        assert '".[lab]"' in capsys.readouterr().err
    else:  # a fault of ours is no missing package
        with pytest.raises(ModuleNotFoundError):
            main()


def test_without_an_extra_a_command_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['pyarrow'] = None; from sude_lab.cli import main; "
    grid, out = str(ROOT / "data" / "grids" / "smoke.yaml"), str(tmp_path / "sweep")
    program = f"{hidden}sys.exit(main(['sweep', {grid!r}, '--out', {out!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and '".[lab,sweep]"' in done.stderr, done.stderr
    assert not (tmp_path / "sweep").exists()


def test_importing_the_package_is_a_blink() -> None:
    program = (
        "import time; t = time.perf_counter(); import sude_lab; print(time.perf_counter() - t)"
    )
    taken = min(
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        )
        for _ in range(3)  # of a busy machine, the quietest moment
    )
    assert taken < 0.3


@pytest.mark.parametrize("folder", ["notebooks", "sude_lab", "data", "tests"])
def test_top_level_folder(folder: str) -> None:
    assert (ROOT / folder).is_dir()


def test_package_is_typed() -> None:
    assert (ROOT / "sude_lab" / "py.typed").is_file()


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    for section in range(1, 10):
        assert f"\n   {section}. " in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_citation_names_the_paper_and_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == sude_lab.__version__
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("FaceChain-SuDe: Building Derived Class")
    assert [author["family-names"] for author in paper["authors"]] == [
        "Qiao", "Shang", "Liu", "Sun", "Ji", "Chen",
    ]  # fmt: skip
    assert paper["year"] == 2024
    assert any("2403.06775" in entry["value"] for entry in paper["identifiers"])
