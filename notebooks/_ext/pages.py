"""What the site does beyond Jupyter Book: the reference, exercises without solutions, the address.

- `.. modules:: diffusion io.*` (in an `eval-rst` block) is the reference of these modules, made
  from their docstrings.
- Docstrings are plain text: what reStructuredText would read as a command is escaped.
- The pages of the exercises show the students' copies: no solutions, no hidden tests, no outputs
  of tasks; and they lead back to their lessons.
- A figure's description is its cell's metadata `alt`, as nbconvert has it.
- Links to the repository are those of pyproject.toml, [project.urls]; none where none is set.
  Links to modules lead to their source, which is on the site (sphinx.ext.viewcode).
"""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
OPTIONAL = (
    *("pandas", "pyarrow", "matplotlib", "ipywidgets", "IPython", "tyro", "yaml", "omegaconf"),
    *("ray", "tabulate", "nbgrader", "nbconvert", "traitlets"),
)
"""What some rooms import, and the site is built without where it is not installed."""
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?### END SOLUTION", re.S | re.M)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS\n?", re.S | re.M)


class Modules(SphinxDirective):
    """The reference of some modules of sude_lab, a section each: `runs.*` are all below a room."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        names: list[str] = []
        for entry in " ".join(self.content).split():
            room, star, _ = entry.partition(".*")
            found = importlib.import_module(f"sude_lab.{room}")
            below = [m.name for m in pkgutil.iter_modules(found.__path__)] if star else []
            names += [f"sude_lab.{room}.{name}" for name in below] if star else [f"sude_lab.{room}"]
        lines = []
        for name in names:
            lines += [name, "-" * len(name), "", f".. automodule:: {name}", "   :members:", ""]
        node = nodes.section()
        node.document = self.state.document
        nested_parse_with_titles(self.state, StringList(lines, source="reference"), node)
        return node.children


def as_written(text: str) -> str:
    """Return prose in which `code` is code, and nothing else is a command of reStructuredText."""
    parts = re.split(r"(``.+?``|`[^`]+`|\*\*[^*]+\*\*)", text, flags=re.S)
    for k, part in enumerate(parts):
        if k % 2 == 0:
            parts[k] = re.sub(r"([*|`\\]|(?<=\w)_(?!\w))", r"\\\1", part)
        elif part.startswith("`") and not part.startswith("``"):
            parts[k] = f"`{part}`"
    return "".join(parts)


def plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show a docstring as it was written: indented lines (formulas, examples) stay as they are."""
    done: list[str] = []
    prose: list[str] = []
    markup = literal = False

    def flush() -> None:
        done.extend(as_written("\n".join(prose)).split("\n") if prose else [])
        prose.clear()

    for line in lines:
        indented = line.startswith(" ")
        if line.strip() and not indented:
            if literal:
                flush()
                done.append("")
            literal = False
            markup = bool(re.match(r":[^:]+:|- |\.\. |\d+\. ", line))
        if indented and not markup and not literal:
            flush()
            done += ["", "::", ""]
            literal = True
        if literal:
            done.append(line)
        else:
            field = re.match(r":[^:]+:|\.\. .*", line)
            if field:
                flush()
                done.append(field[0] + as_written(line[field.end() :]))
            else:
                prose.append(line)
    flush()
    lines[:] = done


def outside(app: Any, name: str, source: list[str]) -> None:
    """Link to the repository's other pages by its address; where none is set, name them."""

    def link(match: re.Match[str]) -> str:
        path = (Path(app.srcdir) / name).parent.joinpath(match[2]).resolve()
        place = path.relative_to(PYPROJECT.parent).as_posix()
        return (
            f"[{match[1]}]({address()}/blob/main/{place})"
            if address()
            else f"{match[1]} (`{place}`)"
        )

    source[0] = re.sub(
        r"(?<!!)\[([^\[\]]+)\]\(((?:\.\./)+(?:data|CHANGELOG)[^)]*\.md)\)", link, source[0]
    )
    module = r"<a href='" + "../" * name.count("/") + r"_modules/\2.html'>\1</a>"
    source[0] = re.sub(r"\[([^\[\]]+)\]\((?:\.\./)+(sude_lab/[^)]*)\.py\)", module, source[0])


def without_solutions(app: Any, name: str, source: list[str]) -> None:
    """Take solutions and hidden tests out of an exercise, as nbgrader does for the students."""
    if not name.startswith("exercises/"):
        return
    notebook, lesson = json.loads(source[0]), name.removeprefix("exercises/ex_")
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        text = re.sub(r"^To (lesson \d\d)\.", rf"To [\1](../{lesson}.ipynb).", text, flags=re.M)
        bare = HIDDEN.sub("", SOLUTION.sub(r"\1# YOUR CODE HERE", text))
        if cell["cell_type"] == "code" and "nbgrader" in cell["metadata"]:  # it may tell the answer
            cell["outputs"], cell["execution_count"] = [], None
        cell["source"] = bare
    source[0] = json.dumps(notebook)


def described(app: Any, name: str, source: list[str]) -> None:
    """Give the figures of a notebook the descriptions that stand in their cells' metadata."""
    if not app.env.doc2path(name).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for metadata in (cell["metadata"] for cell in notebook["cells"]):
        if "alt" in metadata:
            metadata["mystnb"] = {"image": {"alt": metadata["alt"]}}
    source[0] = json.dumps(notebook)


def address() -> str:
    """Return the address that the maintainers have set; "" where they have set none."""
    urls = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"].get("urls", {})
    return str(urls.get("Repository", ""))


def set_address(app: Any, config: Any) -> None:
    """Link pages to their sources, and lessons to Colab, where there is an address."""
    home = address()
    config.html_theme_options = {
        **config.html_theme_options,
        "repository_url": home,
        "use_repository_button": bool(home),
        "launch_buttons": {"colab_url": "https://colab.research.google.com"} if home else {},
    }


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.add_directive("modules", Modules)
    app.connect("config-inited", set_address, priority=100)
    app.connect("source-read", without_solutions, priority=100)
    app.connect("source-read", described, priority=100)
    app.connect("source-read", outside, priority=100)
    app.connect("autodoc-process-docstring", plain_text, priority=900)  # after napoleon's fields
    app.config.autodoc_mock_imports = [n for n in OPTIONAL if importlib.util.find_spec(n) is None]
    return {"parallel_read_safe": True}
