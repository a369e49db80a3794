"""Prompts read as English, and {S*} is replaced wherever it stands."""

import pytest

from sude_lab.prompts import article, fill, photo_of, placeholder, with_attribute


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
    assert fill(text, *tokens) == "a <a> beside a <b>, a <l>, and the <b>"
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
