"""Prompts: the subject's placeholder, the category's sentence, and a word's article."""

from __future__ import annotations

import re

PLACEHOLDER = "{S*}"
"""Stands for the subject in every prompt; a run knows the token that replaces it."""


def article(words: str) -> str:
    """Return 'an' before a vowel letter, else 'a'."""
    return "an" if words[:1].lower() in ("a", "e", "i", "o", "u") else "a"


def photo_of(words: str) -> str:
    """Return "photo of a dog" for "dog": the condition c_cate of a category."""
    return f"photo of {article(words)} {words}"


def placeholder(number: int) -> str:
    """Return the placeholder of subject `number`: {S*}, {S*2}, {S*3}, ..."""
    return PLACEHOLDER if number == 0 else f"{{S*{number + 1}}}"


def fill(prompt: str, *tokens: str) -> str:
    """Return `prompt` with the subjects' tokens in place of {S*}, {S*2}, ..."""
    for number, token in enumerate(tokens):
        prompt = prompt.replace(placeholder(number), token)
    return prompt


def with_attribute(template: str, attribute: str | None) -> str:
    """Return the template with an attribute before {S*}: "photo of a running {S*} dog"."""
    if not attribute:
        return template
    named = re.sub(
        r"\b(?:an?) (?=\{S\*\})",
        f"{article(attribute)} ",
        template,
        count=1,
    )
    return named.replace(PLACEHOLDER, f"{attribute} {PLACEHOLDER}", 1)
