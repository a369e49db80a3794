"""A backbone opens any Stable Diffusion pipeline, agrees with it, and says what is wrong."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sude_lab import backbone as module
from sude_lab.adapters import FAMILIES
from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.errors import UserError
from sude_lab.io.opening import FACTS_FILE, data_folder, open_backbone, pick_device

ROOT = Path(module.__file__).parent


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be one line that ends as a sentence does."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


# --- opening -------------------------------------------------------------------------------------


def test_a_folder_opens_frozen_with_its_facts(tiny: Backbone, tiny_folder: Path) -> None:
    assert tiny.source == str(tiny_folder)
    assert tiny.device == torch.device("cpu") and tiny.dtype == torch.float32
    assert tiny.resolution == 32
    assert tiny.facts == json.loads((tiny_folder / FACTS_FILE).read_text())
    assert "dog" in tiny.facts["words"]
    for part in (tiny.unet, tiny.text_encoder, tiny.pipeline.vae):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_the_schedule_is_the_schedulers_own(tiny: Backbone) -> None:
    table = tiny.pipeline.scheduler.alphas_cumprod.double()
    assert torch.equal(tiny.schedule.alphas_cumprod, table)
    assert tiny.schedule.prediction_type == "epsilon"


def test_a_folder_without_facts_opens_and_knows_no_words(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "bare")
    (tmp_path / "bare" / FACTS_FILE).unlink()
    bare = open_backbone(tmp_path / "bare", device="cpu")
    assert bare.facts == {} and bare.unknown_words("a zebra") == []
    assert bare.check_category("okapi") == "okapi"


def test_embedded_is_only_another_name_of_a_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded").symlink_to(tiny_folder)
    monkeypatch.setenv("SUDE_LAB_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    named = open_backbone("embedded", device="cpu")
    assert named.source == "embedded"
    path = open_backbone(tiny_folder, device="cpu")
    assert named.facts == path.facts
    for a, b in zip(named.unet.parameters(), path.unet.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    ["backbone", "tuning", "generation", "runs/folder", "methods/base", "methods/dreambooth"],
)
def test_no_room_below_the_door_treats_the_embedded_model_specially(name: str) -> None:
    """`EMBEDDED` may name a default, and `resolve_source` may compare with it; nothing else."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("sude_lab.world")
        if isinstance(node, ast.FunctionDef) and node.name != "resolve_source":
            for inner in ast.walk(node):
                if isinstance(inner, ast.Compare | ast.If | ast.IfExp):
                    assert "EMBEDDED" not in ast.unparse(inner)
                    assert "'embedded'" not in ast.unparse(inner)


def test_device_auto_takes_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device().type == "cpu"
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["no such device", "cuda:97", "meta:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError) as error:
        pick_device(name)
    assert name in sentence(error)


def test_bfloat16_computes_forward_passes_and_keeps_weights_in_float32(tiny_folder: Path) -> None:
    half = open_backbone(tiny_folder, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.unet.parameters()} == {torch.float32}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = half.encode_prompts(["photo of a dog"])
    assert condition.hidden.dtype in (torch.bfloat16, torch.float32)
    seen = half.predict(x, torch.tensor([500]), condition)
    full = open_backbone(tiny_folder, device="cpu", dtype="float32")
    expected = full.predict(x, torch.tensor([500]), full.encode_prompts(["photo of a dog"]))
    assert seen.dtype == torch.float32
    error = ((seen - expected).norm() / expected.norm()).item()
    assert 0 < error < 0.05  # rounded, and close


def test_copies_share_no_weights(tiny: Backbone) -> None:
    other = tiny.copy()
    before = tiny.unet.conv_in.weight.clone()
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1)
    other.add_token("<new>", "dog")
    assert torch.equal(tiny.unet.conv_in.weight, before)
    assert "<new>" not in tiny.tokenizer.get_vocab()
    assert other.facts == tiny.facts


# --- sentences -----------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path / "missing", device="cpu")
    assert "There is no pipeline folder" in sentence(error)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path / "model.ckpt", device="cpu")
    assert "There is no pipeline folder" in sentence(error)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path, device="cpu")
    assert "model_index.json" in sentence(error)


def test_a_pipeline_of_another_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path, device="cpu")
    assert "PixArtAlphaPipeline" in sentence(error)
    assert all(name in sentence(error) for name in FAMILIES)


@pytest.mark.parametrize("content", [b"", b"{half", b"[1, 2]", b"\xff\xfe\x00"])
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path, device="cpu")
    assert "damaged" in sentence(error)


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer"])
def test_a_folder_that_lacks_a_part_is_refused(
    tiny_folder: Path, tmp_path: Path, part: str
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "part", ignore=shutil.ignore_patterns(part))
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path / "part", device="cpu")
    assert f"lacks the folder {part}" in sentence(error)


def test_weights_cut_short_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        open_backbone(folder, device="cpu")
    assert "could not be opened" in sentence(error)


@pytest.mark.parametrize("content", ["{half", "[1, 2]", '{"words": 3}'])
def test_damaged_facts_are_refused(tiny_folder: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "facts")
    (tmp_path / "facts" / FACTS_FILE).write_text(content)
    with pytest.raises(UserError) as error:
        open_backbone(tmp_path / "facts", device="cpu")
    assert FACTS_FILE in sentence(error)


def test_a_hub_id_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(UserError) as error:
        open_backbone("nobody/no-such-pipeline", device="cpu")
    assert "nobody/no-such-pipeline" in sentence(error)


def test_an_error_of_the_hubs_client_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network it is of a class of the client's own, no `OSError`."""

    class ConnectError(Exception):
        pass

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectError("no route\nto host")

    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(UserError) as error:
        open_backbone("nobody/no-such-pipeline", device="cpu")
    assert "ConnectError: no route to host" in sentence(error)


def test_an_unknown_precision_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError) as error:
        open_backbone(tiny_folder, device="cpu", dtype="float31")
    assert "float31" in sentence(error)


# --- categories and tokens -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "plain"),
    [("dog", "dog"), (" stuffed \n animal ", "stuffed animal"), ("Dog", "Dog")],
)
def test_a_known_category_is_taken(tiny: Backbone, given: str, plain: str) -> None:
    assert tiny.check_category(given) == plain


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("?!", "empty"),
        ("{S*} dog", "has the character"),
        ("dog " * 20, "too long"),
        ("okapi", "never met the word 'okapi': choose a category among dog, cat, stuffed animal"),
        ("running okapi", "okapi"),
    ],
)
def test_a_category_that_cannot_work_is_refused(tiny: Backbone, given: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        tiny.check_category(given)
    assert expected in sentence(error)


def test_unknown_words_are_told_once_and_leave_the_placeholder_out(tiny: Backbone) -> None:
    text = "photo of a {S*} dog on the moon, moon's Photo"
    assert tiny.unknown_words(text) == ["moon", "s"]
    assert tiny.unknown_words("photo of a {S*} dog on the {S*2} cat and {S*13}") == ["and"]


def test_a_token_becomes_one_word_that_starts_at_its_initializer(tiny: Backbone) -> None:
    table = tiny.text_encoder.get_input_embeddings().weight.detach().clone()
    (index,) = tiny.add_token("<sks>", "stuffed animal")
    ids = tiny.tokenizer("photo of a <sks> dog", add_special_tokens=False).input_ids
    assert ids.count(index) == 1 and len(ids) == 5
    words = tiny.tokenizer("stuffed animal", add_special_tokens=False).input_ids
    after = tiny.text_encoder.get_input_embeddings().weight
    assert torch.equal(after[index], table[words].mean(dim=0))
    assert torch.equal(after[: len(table)], table)
    assert len(after) == len(table) + 1


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("", "one word"),
        (" ", "one word"),
        ("my dog", "one word"),
        (" <sks>", "one word"),
        ("dog", "already"),
        ("Dog", "already"),
        ("sks", "already"),
        ("<|endoftext|>", "already"),
    ],
)
def test_a_token_that_cannot_work_is_refused(tiny: Backbone, token: str, expected: str) -> None:
    size = len(tiny.tokenizer)
    with pytest.raises(UserError) as error:
        tiny.add_token(token, "dog")
    assert expected in sentence(error)
    assert len(tiny.tokenizer) == size


def test_a_token_cannot_be_added_twice(tiny: Backbone) -> None:
    tiny.add_token("<sks>", "dog")
    with pytest.raises(UserError, match="already"):
        tiny.add_token("<sks>", "dog")


@pytest.mark.parametrize("initializer", ["", "  "])
def test_a_token_that_starts_from_nothing_is_refused(tiny: Backbone, initializer: str) -> None:
    size = len(tiny.tokenizer)
    with pytest.raises(UserError) as error:
        tiny.add_token("<sks>", initializer)
    assert "--initializer is empty" in sentence(error)
    assert len(tiny.tokenizer) == size


def test_a_token_whose_letters_stand_in_other_words_leaves_them_alone(tiny: Backbone) -> None:
    prompts = ["photo of a dog", "photo of a stuffed animal"]
    before = tiny.tokenize(prompts)
    (index,) = tiny.add_token("og", "cat")
    assert torch.equal(tiny.tokenize(prompts), before)
    ids = tiny.tokenizer("photo of a og dog", add_special_tokens=False).input_ids
    assert ids.count(index) == 1 and len(ids) == 5
    # Nor is it missed there: the prompt does not ask for it.
    assert not tiny.beyond_reach(prompts[0], "og")
    with pytest.raises(UserError, match="stands behind them"):
        tiny.beyond_reach(f"a {'dog ' * 40} og", "og")


# --- encoding ------------------------------------------------------------------------------------


@torch.no_grad()
def test_prompts_encode_as_the_pipeline_encodes_them(tiny: Backbone) -> None:
    prompts = ["photo of a running dog", ""]
    expected, null = tiny.pipeline.encode_prompt(
        prompts[0], "cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    seen = tiny.encode_prompts(prompts)
    torch.testing.assert_close(seen.hidden, torch.cat([expected, null]))
    assert (seen.hidden[0] - seen.hidden[1]).norm() > 0.1 * seen.hidden[0].norm()
    assert seen.pooled is None and seen.sizes is None
    assert len(seen) == 2
    alone = tiny.null_condition()
    assert len(alone) == 1
    torch.testing.assert_close(alone.hidden, null)


@torch.no_grad()
def test_pictures_encode_as_the_vae_encodes_them(tiny: Backbone) -> None:
    pictures = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "navy")]
    mean, std = tiny.encode_pictures(pictures)
    pixels = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)
    expected = tiny.pipeline.vae.encode(2 * (pixels / 255) - 1).latent_dist
    torch.testing.assert_close(mean, expected.mean * 0.7)
    torch.testing.assert_close(std, expected.std * 0.7)
    assert mean.shape == std.shape == (2, 4, 8, 8)


@torch.no_grad()
def test_predict_is_the_unets_own_output(tiny: Backbone) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, condition = torch.tensor([10, 900]), tiny.encode_prompts(["", "photo of a dog"])
    expected = tiny.unet(x, t, encoder_hidden_states=condition.hidden).sample
    assert torch.equal(tiny.predict(x, t, condition), expected)


@pytest.mark.parametrize("xl", [False, True])
def test_a_condition_is_indexed_expanded_and_joined_by_rows(xl: bool) -> None:
    def condition(rows: int, start: float) -> Condition:
        hidden = start + torch.arange(rows * 6.0).reshape(rows, 2, 3)
        return Condition(hidden, hidden[:, 0], hidden[:, 1]) if xl else Condition(hidden)

    def parts(c: Condition) -> list[torch.Tensor]:
        found = [c.hidden, c.pooled, c.sizes]
        assert all((x is None) == (not xl) for x in found[1:])
        return [x for x in found if x is not None]

    some, one = condition(3, 0.0), condition(1, 100.0)
    for whole, row in zip(parts(some), parts(some[torch.tensor([2, 0, 2])]), strict=True):
        assert torch.equal(row, torch.stack([whole[2], whole[0], whole[2]]))
    for whole, row in zip(parts(some), parts(some[1:2]), strict=True):
        assert torch.equal(row, whole[1:2])
    for alone, many in zip(parts(one), parts(one.expand(4)), strict=True):
        assert torch.equal(many, torch.cat([alone] * 4))
    joined = concatenate([one, some, one])
    assert len(joined) == 5
    for a, b, both in zip(parts(one), parts(some), parts(joined), strict=True):
        assert torch.equal(both, torch.cat([a, b, a]))
    told = some.arguments
    assert told.pop("encoder_hidden_states") is some.hidden
    added = told.pop("added_cond_kwargs", {})
    assert not told
    assert added == ({"text_embeds": some.pooled, "time_ids": some.sizes} if xl else {})


@pytest.mark.parametrize("shown", [True, False])
def test_opening_a_model_leaves_the_loaders_bars_as_the_user_set_them(
    shown: bool, tiny_folder: Path
) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    before = [(m, m.is_progress_bar_enabled(), m.get_verbosity()) for m in modules]
    try:
        for module in modules:
            module.enable_progress_bar() if shown else module.disable_progress_bar()
        open_backbone(tiny_folder, device="cpu")
        assert [m.is_progress_bar_enabled() for m in modules] == [shown, shown]
        assert [m.get_verbosity() for m in modules] == [level for *_, level in before]
    finally:
        for module, enabled, _ in before:
            module.enable_progress_bar() if enabled else module.disable_progress_bar()
