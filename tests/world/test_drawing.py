"""The drawn world: truth, words and pictures belong together."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from studies.embedded.dataset import RARE_TOKENS, caption, render, scenes, vocabulary
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, LOOK, labels, to_tensor
from sude_lab.world.subjects import subject


def test_a_scene_is_drawn_the_same_twice() -> None:
    scene = world.sample_scene(random.Random(3))
    assert np.array_equal(np.asarray(world.draw(scene)), np.asarray(world.draw(scene)))


def test_longer_sets_extend_shorter_ones() -> None:
    assert scenes(7, seed=5)[:4] == scenes(4, seed=5)
    assert scenes(4, seed=5) != scenes(4, seed=6)


def changed_pixels(category: str, one: str, other: str) -> float:
    """The share of pixels that change visibly between two attributes of one subject."""
    look = world.Look("brown", "white", "spots", "red")
    a, b = (np.asarray(world.draw(world.Scene(category, x, look))) for x in (one, other))
    return float((np.abs(a.astype(int) - b).max(-1) > 24).mean())


PAIRS = [
    (c, one, other)
    for c, attributes in world.ATTRIBUTES.items()
    for i, one in enumerate(attributes)
    for other in attributes[i + 1 :]
]


@pytest.mark.parametrize(("category", "one", "other"), PAIRS)
def test_no_attribute_is_a_shade_of_another(category: str, one: str, other: str) -> None:
    assert changed_pixels(category, one, other) > 0.03


def test_one_attribute_word_draws_differently_for_each_animal() -> None:
    look = world.Look("grey", "white", "plain", None)
    drawn = [np.asarray(world.draw(world.Scene(c, "running", look))) for c in world.ANIMALS]
    for i, a in enumerate(drawn):
        for b in drawn[i + 1 :]:
            assert (np.abs(a.astype(int) - b).max(-1) > 24).mean() > 0.02


@pytest.mark.parametrize("part", ["colour", "second", "pattern", "accent"])
def test_every_part_of_the_private_look_shows(part: str) -> None:
    look = world.Look("brown", "white", "spots", "red")
    other = {"colour": "blue", "second": "black", "pattern": "stripes", "accent": "teal"}[part]
    for category in world.CATEGORIES:
        attribute = world.ATTRIBUTES[category][0]
        a = np.asarray(world.draw(world.Scene(category, attribute, look)))
        changed = world.replace(look, **{part: other})
        b = np.asarray(world.draw(world.Scene(category, attribute, changed)))
        assert (a != b).any(), (category, part)


def test_captions_use_the_vocabulary_alone_and_never_a_rare_token() -> None:
    rng = random.Random(0)
    words = set(vocabulary())
    assert not words & set(RARE_TOKENS)
    for _ in range(2000):
        text = caption(world.sample_scene(rng), rng)
        assert set(text.split()) <= words, text


def test_captions_say_what_is_there_and_drop_parts_at_the_stated_rates() -> None:
    rng = random.Random(1)
    drawn = [world.sample_scene(rng) for _ in range(4000)]
    said = [caption(scene, rng) for scene in drawn]
    empty = np.mean([text == "" for text in said])
    assert 0.085 < empty < 0.115  # 10 %, three standard errors
    for scene, text in zip(drawn, said, strict=True):
        for other in world.CATEGORIES:
            if other != scene.category:
                assert not re.search(rf"\b{other}\b", text)
        for background, words in world.BACKGROUNDS.items():
            if background != scene.background:
                assert words not in text
    full = caption(
        world.Scene(
            "dog", "open mouth", world.Look("orange", "blue", "patch", "red"), "beach", "ball"
        )
    )
    assert full == (
        "photo of an open mouth orange dog with a blue patch and a red collar with a ball "
        "on the beach"
    )


def test_prompts_name_the_attribute_with_the_right_article() -> None:
    assert photo_of("running dog") == "photo of a running dog"
    assert photo_of("open mouth dog") == "photo of an open mouth dog"
    assert photo_of("plain bowl") == "photo of a plain bowl"


def test_unknown_words_are_refused() -> None:
    look = world.Look("brown", "white", "spots", None)
    with pytest.raises(ValueError, match="Unknown category 'horse'"):
        world.Scene("horse", "running", look)
    with pytest.raises(ValueError, match="cannot be 'burning'"):
        world.Scene("dog", "burning", look)


def test_labels_name_only_what_a_picture_shows() -> None:
    look = world.Look("brown", "white", "plain", None)
    truth = labels(world.Scene("teapot", "golden", look))
    assert truth["colour"] == -1 and truth["second"] == -1
    assert HEADS["accent"][truth["accent"]] == "none"
    spotted = labels(world.Scene("dog", "running", world.replace(look, pattern="spots")))
    assert HEADS["second"][spotted["second"]] == "white"
    assert all(spotted[part] >= 0 for part in LOOK)


def test_subjects_follow_from_their_group_and_number() -> None:
    assert subject("held-out", 3) == subject("held-out", 3)
    looks = {subject(g, 0).scene.look for g in ("development", "held-out", "demo")}
    assert len(looks) == 3
    who = subject("held-out", 0)
    assert who.scene.attribute not in who.other_attributes
    assert who.picture.size == (256, 256)


def test_rendered_pictures_are_kept_and_read_again(tmp_path) -> None:
    chosen = scenes(3, seed=0)
    first = render(chosen, tmp_path / "pictures.npy", workers=1)
    again = render(chosen, tmp_path / "pictures.npy", workers=1)
    assert first.shape == (3, 64, 64, 3) and np.array_equal(first, again)
    x = to_tensor(first)
    assert x.min() >= -1 and x.max() <= 1 and x.shape == (3, 3, 64, 64)


def test_the_tokenizer_is_the_same_every_time_it_is_built(tmp_path: Path) -> None:
    from studies.embedded.train import build_tokenizer

    built = [build_tokenizer(tmp_path / str(k)) for k in range(4)]
    files = [
        [(tmp_path / str(k) / n).read_bytes() for n in ("vocab.json", "merges.txt")]
        for k in range(4)
    ]
    assert all(f == files[0] for f in files)
    for word in (*vocabulary(), *RARE_TOKENS):
        assert len(built[0](word, add_special_tokens=False).input_ids) == 1
