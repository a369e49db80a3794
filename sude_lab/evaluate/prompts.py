"""What a tuned model is asked for: prompts for attributes and backgrounds, and files of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sude_lab.errors import UserError
from sude_lab.io.reading import read_text
from sude_lab.prompts import PLACEHOLDER, article, caption, checked, photo_of, with_attribute

STRUCTURES = {
    "P1": "photo of a {S*} {category}",
    "P2": "photo of a {S*} and it is a {category}",
    "P3": "photo of a {S*} and it is a {category}",
}
"""Where the category stands beside the subject: Table 2 of arXiv 2403.06775. The attribute stands
before the subject, in P3 before the category."""


@dataclass(frozen=True)
class Prompt:
    """Something to ask a tuned model for, and how its pictures are judged."""

    text: str
    """What the model is asked, with {S*}."""
    caption: str
    """The same without the subject's word, for encoders that never met it: "photo of a dog"."""
    attribute: str = ""
    background: str = ""
    group: str = ""
    """A name for prompts that belong together; empty: what is asked for gives one."""

    @property
    def kind(self) -> str:
        """What the prompt edits: attribute, background, both, or nothing that is known (plain)."""
        parts = [n for n in ("attribute", "background") if getattr(self, n)]
        return self.group or " x ".join(parts) or "plain"


def structured(structure: str, category: str, attribute: str = "") -> str:
    """Return a prompt of P1, P2 or P3 for a category; without an attribute it is simply left out.

    P3 of ("dog", "running") is "photo of a {S*} and it is a running dog".
    """
    if structure not in STRUCTURES:
        raise UserError(
            f"There is no prompt structure {structure!r}: choose default, {', '.join(STRUCTURES)}."
        )
    if structure == "P3":
        category, attribute = f"{attribute} {category}".strip(), ""
    words = f"{article(category)} {category}"
    text = STRUCTURES[structure].replace("a {category}", words).replace("{category}", category)
    return with_attribute(text, attribute)


def prompt_for(
    template: str,
    category: str,
    attribute: str = "",
    background: str = "",
    *,
    structure: str = "default",
) -> Prompt:
    """Return the prompt for an attribute and a background, each of them optional.

    The attribute stands before {S*} in the template ("photo of a running {S*} dog"), or where
    `structure` (P1, P2, P3) puts it; the background comes last. The caption is the same for every
    template, "photo of a running dog on the beach", so that scores of templates can be compared.
    """
    if structure != "default":
        text = structured(structure, category, attribute)
    else:
        text = with_attribute(template.replace("{category}", category), attribute)
    plain = photo_of(f"{attribute} {category}".strip())
    return Prompt(
        f"{text} {background}".strip(), f"{plain} {background}".strip(), attribute, background
    )


def read_prompts(path: Path, *categories: str) -> list[Prompt]:
    """Return the prompts of a text file, one a line, for a subject of a category.

    `{category}` is filled in, "#" begins a comment line, and equal prompts are asked once.
    """
    words = read_text(path, f"The prompts in {path}", "a text file with a prompt a line")
    prompts: dict[Prompt, None] = {}
    for line in filter(None, map(str.strip, words.splitlines())):
        if line.startswith("#"):
            continue
        text = " ".join(checked(line).replace("{category}", categories[0]).split())
        if PLACEHOLDER not in text:
            raise UserError(
                f"{path}: the prompt {text!r} has no {PLACEHOLDER}, which stands for the subject: "
                f"write for example photo of a {PLACEHOLDER} on the beach."
            )
        prompts[Prompt(text, caption(text, *categories))] = None
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one a line.")
    return list(prompts)
