"""Prompts read as English, and {S*} is replaced wherever it stands."""

from pathlib import Path

import pytest
from tokenizers import AddedToken

from sude_lab.errors import UserError
from sude_lab.evaluate.prompts import (
    Prompt,
    prompt_for,
    read_prompts,
    structured,
    with_attribute,
)
from sude_lab.io.opening import open_backbone
from sude_lab.methods import METHODS
from sude_lab.prompts import PLACEHOLDER, article, caption, fill, photo_of, placeholder

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("words", "expected"),
    [("dog", "a"), ("apple", "an"), ("Orange", "an"), ("stuffed animal", "a"), ("", "a")],
)
def test_article_follows_the_first_letter(words: str, expected: str) -> None:
    assert article(words) == expected


def test_photo_of_takes_the_right_article() -> None:
    assert photo_of("dog") == "photo of a dog"
    assert photo_of("open mouth dog") == "photo of an open mouth dog"


def test_fill_replaces_every_placeholder_and_nothing_else() -> None:
    assert fill("a {S*} dog beside a {S*}", "<sks>") == "a <sks> dog beside a <sks>"
    assert fill("photo of a {category}", "<sks>") == "photo of a {category}"


def test_every_subject_has_a_placeholder_of_its_own() -> None:
    assert [placeholder(k) for k in (0, 1, 10)] == ["{S*}", "{S*2}", "{S*11}"]
    tokens = [f"<{letter}>" for letter in "abcdefghijkl"]
    text = "a {S*} beside a {S*2}, a {S*12}, and the {S*2}"
    assert fill(text, *tokens) == "a <a> beside a <b> , a <l> , and the <b>"
    assert fill(text, "<a>") == "a <a> beside a {S*2}, a {S*12}, and the {S*2}"


def test_fill_takes_a_token_with_signs_that_mean_something_to_regular_expressions() -> None:
    assert fill("a {S*}", r"\1$*") == r"a \1$*"


@pytest.mark.parametrize(
    ("template", "attribute", "expected"),
    [
        ("photo of a {S*} dog", "running", "photo of a running {S*} dog"),
        ("photo of a {S*}", "open mouth", "photo of an open mouth {S*}"),
        ("photo of an {S*}", "running", "photo of a running {S*}"),
        ("{S*} at night", "running", "running {S*} at night"),
        ("photo of a {S*} dog", None, "photo of a {S*} dog"),
        ("photo of a {S*} dog", "", "photo of a {S*} dog"),
        ("a photo of the {S*}", "open mouth", "a photo of the open mouth {S*}"),
    ],
)
def test_an_attribute_stands_before_the_subject_with_its_article(
    template: str, attribute: str | None, expected: str
) -> None:
    assert with_attribute(template, attribute) == expected


@pytest.mark.parametrize(
    ("structure", "attribute", "expected"),
    [
        ("P1", "running", "photo of a running {S*} dog"),
        ("P2", "running", "photo of a running {S*} and it is a dog"),
        ("P3", "running", "photo of a {S*} and it is a running dog"),
        ("P1", "", "photo of a {S*} dog"),
        ("P2", "", "photo of a {S*} and it is a dog"),
        ("P3", "", "photo of a {S*} and it is a dog"),
        ("P1", "open mouth", "photo of an open mouth {S*} dog"),
        ("P3", "open mouth", "photo of a {S*} and it is an open mouth dog"),
    ],
)
def test_structures_are_those_of_table_2(structure: str, attribute: str, expected: str) -> None:
    assert structured(structure, "dog", attribute) == expected


def test_structures_take_the_categorys_article() -> None:
    assert structured("P2", "animal", "tall") == "photo of a tall {S*} and it is an animal"
    assert structured("P3", "animal") == "photo of a {S*} and it is an animal"
    with pytest.raises(UserError, match="'P4'"):
        structured("P4", "dog")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("photo of a running {S*} dog", "photo of a running dog"),
        ("photo of a running {S*}", "photo of a running dog"),
        ("a {S*} dog in the jungle", "a dog in the jungle"),
        ("a {S*} beside a dog", "a dog beside a dog"),
        ("{S*} dogs at night", "dog dogs at night"),
        ("a painting of the {S*}", "a painting of the dog"),
        ("an owl", "an owl"),
    ],
)
def test_a_caption_has_no_subject_token(prompt: str, expected: str) -> None:
    assert caption(prompt, "dog") == expected


def test_a_captions_article_suits_its_category() -> None:
    assert caption("a {S*} animal at night", "animal") == "an animal at night"
    assert caption("A {S*} and an {S*2}", "animal", "dog") == "An animal and a dog"
    assert caption("a {S*} stuffed animal", "stuffed animal") == "a stuffed animal"


def test_every_method_asks_for_the_same_in_its_own_words() -> None:
    prompts = {
        name: prompt_for(method.template, "dog", "running", "on the beach")
        for name, method in METHODS.items()
    }
    assert prompts["dreambooth"].text == "photo of a running {S*} dog on the beach"
    assert prompts["custom_diffusion"].text == "photo of a running {S*} dog on the beach"
    assert prompts["vico"].text == "photo of a running {S*} on the beach"
    assert prompts["textual_inversion"].text == "photo of a running {S*} on the beach"
    p3 = prompt_for("ignored {S*}", "dog", "running", "on the beach", structure="P3")
    assert p3.text == "photo of a {S*} and it is a running dog on the beach"
    # One caption, so that the scores of templates can be compared.
    captions = {p.caption for p in (*prompts.values(), p3)}
    assert captions == {"photo of a running dog on the beach"}


@pytest.mark.parametrize(
    ("attribute", "background", "kind", "expected"),
    [
        ("", "", "plain", "photo of a {S*} dog"),
        ("open mouth", "", "attribute", "photo of an open mouth {S*} dog"),
        ("", "in the snow", "background", "photo of a {S*} dog in the snow"),
        ("wet", "in the snow", "attribute x background", "photo of a wet {S*} dog in the snow"),
    ],
)
def test_what_a_prompt_edits_is_its_kind(
    attribute: str, background: str, kind: str, expected: str
) -> None:
    prompt = prompt_for("photo of a {S*} {category}", "dog", attribute, background)
    assert (prompt.text, prompt.kind) == (expected, kind)


def test_prompts_are_read_from_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    lines = [
        "# mine",
        "",
        " a {S*} {category} on the  beach ",
        "a {S*} at night",
        "a {S*} at night",
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(file, "dog") == [
        Prompt("a {S*} dog on the beach", "a dog on the beach"),
        Prompt("a {S*} at night", "a dog at night"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "photo of a dog", "'photo of a dog' has no {S*}"),
        ("a.txt", "# nothing\n", "holds no prompts"),
        ("a.txt", "a {S*}\n{caption: a dog}", "has no {S*}"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name, "dog")
    assert expected in str(error.value) and name in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_file_of_prompts_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("missing.txt", "bytes.txt", "."):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(tmp_path / name, "dog")


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("photo of a {S*} dog", "photo of a <sks> dog"),
        ("一张{S*}的照片", "一张 <sks> 的照片"),
        ("two {S*}s, my{S*}", "two <sks> s, my <sks>"),
        ("{S*}'s ball (a {S*})", "<sks> 's ball (a <sks> )"),
        ("photo of\n{S*}, asleep", "photo of\n <sks> , asleep"),
        ("{S*}{S*2}_x{S*2}", "<sks> <cat> _x <cat>"),
        ("{S*3}{S*}", "{S*3} <sks>"),
        ("", ""),
    ],
)
def test_a_subject_s_word_stands_alone(prompt: str, filled: str) -> None:
    """Within a word a tokenizer would not see it."""
    assert fill(prompt, "<sks>", "<cat>") == filled


@pytest.mark.parametrize("prompt", ["({S*}, asleep)", "the {S*}'s ball", "{S*}!!! {S*}", "-{S*}-"])
def test_a_space_beside_the_subject_s_word_says_nothing(prompt: str) -> None:
    """The pieces are those of the texts around it, with the word between."""
    tokenizer = open_backbone().tokenizer
    tokenizer.add_tokens(AddedToken("<sks>", single_word=True))
    parts = [tokenizer(p, add_special_tokens=False).input_ids for p in prompt.split(PLACEHOLDER)]
    expected = parts[0]
    for part in parts[1:]:
        expected = [*expected, tokenizer.convert_tokens_to_ids("<sks>"), *part]
    assert tokenizer(fill(prompt, "<sks>"), add_special_tokens=False).input_ids == expected
