"""Write the repository's address into the lessons, or take it out: `make address`.

The address stands in one place, pyproject.toml, [project.urls], Repository. With it each lesson has
a link that opens it on Colab, and its first cell fetches the repository there. Without it there is
no link, and the first cell has room for an address. Where [project.urls] names Errata, each lesson
says where mistakes are reported. Giving the command twice changes nothing.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from sude_lab.io.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LINK = "[Open in Colab](https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb)\n\n"
ERRATA = "[A mistake? Report it here]({errata})\n\n"
SETUP = """\
# On Colab this fetches the repository from its address and installs it.
import sys

REPOSITORY = "{address}"
if "google.colab" in sys.modules:
    !git clone -q --depth 1 {{REPOSITORY}} /content/sude_lab
    %pip install -q -e "/content/sude_lab[lab]"
    sys.path.insert(0, "/content/sude_lab")

from sude_lab.cli import wait_asleep

wait_asleep()  # before torch is loaded: where others keep the cores busy, threads sleep"""


def address(name: str = "Repository") -> str:
    """Return the address that the maintainers have set; "" where they have set none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get(name, ""))


def addressed(notebook: str, name: str, home: str, errata: str = "") -> str:
    """Return a lesson's text with the links below its title and the setup cell of this address."""
    content = json.loads(notebook)
    title, setup = content["cells"][:2]
    links = r"^\[(Open in Colab|A mistake\? Report it here)\].*\n\n"
    heading, rest = re.sub(links, "", "".join(title["source"]), flags=re.M).split("\n\n", 1)
    place = home.removeprefix("https://github.com/")
    text = LINK.format(place=place, name=name) if home else ""
    text += ERRATA.format(errata=errata) if errata else ""
    text = f"{heading}\n\n{text}{rest}"
    title["source"] = text.splitlines(keepends=True)
    setup["source"] = SETUP.format(address=home).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Rewrite the lessons whose address is another."""
    home = address()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = addressed(before, path.stem, home, address("Errata"))
        if after != before:
            with atomic_write(path) as new:
                new.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {home or 'no address'}")


if __name__ == "__main__":
    main()
