"""Prompts: the subject's placeholder, the category's sentence, a prompt as the model reads it."""

from __future__ import annotations

import re
import unicodedata

from sude_lab.errors import UserError

PLACEHOLDER = "{S*}"
"""Stands for the subject in every prompt; a run knows the token that replaces it."""


def article(words: str) -> str:
    """Return 'an' before a vowel letter, else 'a'."""
    return "an" if words[:1].lower() in ("a", "e", "i", "o", "u") else "a"


def checked(text: str) -> str:
    """Return a prompt as it is, if it is a text that can be read, with white space of any kind."""
    for ch in text:
        if unicodedata.category(ch) in ("Cc", "Cs") and not ch.isspace():
            what = f"The prompt {text[:60]!r} has the character {ch!r}, which is no text"
            raise UserError(f"{what}: leave it out.")
    return text


def photo_of(words: str) -> str:
    """Return "photo of a dog" for "dog": the condition c_cate of a category."""
    return f"photo of {article(words)} {words}"


def placeholder(number: int) -> str:
    """Return the placeholder of subject `number`: {S*}, {S*2}, {S*3}, ..."""
    return PLACEHOLDER if number == 0 else f"{{S*{number + 1}}}"


def fill(prompt: str, *tokens: str) -> str:
    """Return `prompt` with the subjects' tokens in place of {S*}, {S*2}, ...

    Where one touches something else ("{S*}, asleep", or languages without spaces), a space is put
    between: within a word no tokenizer sees the subject's word, and those of transformers 4 do not
    see it beside a comma either. A space says nothing to a CLIP tokenizer.
    """
    names = {placeholder(number): token for number, token in enumerate(tokens)}
    parts = re.split(f"({'|'.join(map(re.escape, names))})", prompt) if names else [prompt]
    filled, before = "", ""
    for part in filter(None, parts):
        apart = not before or before[-1] == " " or part[0] == " "
        if not apart and (part in names or before in names):
            filled += " "
        filled += names.get(part, part)
        before = part
    return filled


def by_itself(token: str) -> re.Pattern[str]:
    """Return the pattern of a token where it stands by itself: og is not in dog."""
    return re.compile(rf"(?<!\w(?=\w)){re.escape(token)}(?!(?<=\w)\w)")


def with_attribute(template: str, attribute: str | None) -> str:
    """Return the template with an attribute before {S*}: "photo of a running {S*} dog"."""
    if not attribute:
        return template
    named = re.sub(r"\b(?:an?) (?=\{S\*\})", f"{article(attribute)} ", template, count=1)
    return named.replace(PLACEHOLDER, f"{attribute} {PLACEHOLDER}", 1)


def caption(prompt: str, *categories: str) -> str:
    """Return a prompt in words that everyone knows: "photo of a running dog".

    A subject's {S*} is dropped where its category stands behind it, and gives way to the category
    where it does not ("a {S*} on the beach" of a dog: "a dog on the beach").
    """
    for number, category in enumerate(categories):
        name, word = re.escape(placeholder(number)), rf"{re.escape(category)}\b"
        # Split and joined: re.sub would read backslashes in the text that it puts in.
        prompt = category.join(re.split(rf"{name}(?:\s+{word})?", prompt, flags=re.IGNORECASE))
        prompt = re.sub(rf"\b([Aa])n? (?={word})", rf"\g<1>{article(category)[1:]} ", prompt)
    return " ".join(prompt.split())
