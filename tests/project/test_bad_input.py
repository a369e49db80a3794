"""Whatever a person gives, the answer is right, or one sentence and exit code 2; nothing is spoilt.

Pictures, prompts and settings; models and weights are in test_bad_models.py, grids and other files
in test_bad_files.py.
"""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from refusals import Said, content, generated, say

from sude_lab import cli
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError, one_line
from sude_lab.evaluate.prompts import prompt_for
from sude_lab.io.pictures import load_picture
from sude_lab.prompts import PLACEHOLDER, caption, checked, fill
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run, run_tuning

FEW = ("--max-train-steps", 1, "--num-samples", 0, "--device", "cpu", "--report-to", "none")


# --- pictures ------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (80, 60), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says what one likes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


WHOLE = {kind: encoded(noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}
REFUSED: dict[str, tuple[bytes, str]] = {
    **{f"cut.{k.lower()}": (WHOLE[k][: len(WHOLE[k]) // 2], "damaged") for k in ("JPEG", "PNG")},
    "cut.webp": (WHOLE["WEBP"][: len(WHOLE["WEBP"]) // 2], "damaged"),
    "header.png": (WHOLE["PNG"][:8], "can be read here"),
    "letter.png": (b"Dear diary, today I met a dog. " * 100, "can be read here"),
    "empty.png": (b"", "is not a picture"),
    "bomb.png": (png(50_000, 50_000), "pixels, the most that is read"),
    "bomb.bmp": (b"BM" + struct.pack("<IIIIiiHHII16x", 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0),
                 "pixels, the most that is read"),
    "dot.png": (encoded(noise((1, 1)), "PNG"), "single pixel"),
    "line.png": (encoded(noise((20_000, 1)), "PNG"), "strip of 20000 x 1"),
    "strip.png": (encoded(noise((2_000, 10)), "PNG"), "strip of 2000 x 10"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "can be read here"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64"/>', "can be read here"),
    "paper.pdf": (b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n", "can be read here"),
    "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n",
                   "can be read here"),
    "zero.png": (png(0, 0), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_picture_is_refused(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    data, expected = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    refuse_picture(tmp_path / name, expected, tiny_folder, tmp_path)


def refuse_picture(path: Path, expected: str, backbone: Path, room: Path) -> None:
    """It is refused by every command that takes a picture, and in every place."""
    before = content(room)
    where = ("--backbone", backbone)
    tune = ("tune", "--category", "dog", "--out", room / "new" / "run", *where, *FEW)
    classes = ("--prompt", "photo of a dog", "--prompt", "photo of a cat")
    for said in (
        say(*tune, path),
        say("classify", path, *classes, *where, "--device", "cpu"),
    ):
        assert expected in said.sentence and path.name in said.sentence
    assert content(room) == before


def test_what_is_no_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, expected in (
        ("folder.png", "is a folder"),
        ("pipe.png", "not a regular file"),
        ("missing.png", "does not exist"),
        ("loop.png", ""),
        ("a" * 300 + ".png", "cannot be opened (File name too long)"),
    ):
        command = ("tune", tmp_path / name, "--category", "dog", "--out", tmp_path / "run")
        assert expected in say(*command, "--backbone", tiny_folder, *FEW).sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_picture_that_may_not_be_read_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(WHOLE["PNG"])
    (tmp_path / "mine.png").chmod(0)
    refuse_picture(tmp_path / "mine.png", "may not be read", tiny_folder, tmp_path)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (0, 32, 64, 64))
    return image.convert(mode)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of what is stored is below
    return encoded(halves().rotate(90), "PNG", exif=exif)


def animated(kind: str) -> bytes:
    more = [Image.new("RGB", (64, 64), c) for c in ("lime", "white")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(halves(), kind, save_all=True, append_images=more, duration=50, **lossless)


def deep_rgb() -> bytes:
    """A PNG with 16 bits a colour, which Pillow cannot write."""
    row = [
        struct.pack(">B", 0) + struct.pack(">3H", *(257 * v for v in c)) * 64 for c in (RED, BLUE)
    ]

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    data = zlib.compress(row[0] * 32 + row[1] * 32)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GREY = Image.fromarray(np.repeat(np.array([[65535], [0]], np.uint16), 32, 0).repeat(64, 1))
HIDDEN = halves("RGBA")
HIDDEN.putalpha(Image.fromarray(np.repeat(np.array([[255], [0]], np.uint8), 32, 0).repeat(64, 1)))

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
READ: dict[str, tuple[Callable[[], bytes], tuple[int, ...], tuple[int, ...]]] = {
    "wrong-suffix.jpg": (lambda: encoded(halves(), "PNG"), RED, BLUE),
    "no-suffix": (lambda: encoded(halves(), "BMP"), RED, BLUE),
    "print.jpg": (lambda: encoded(halves("CMYK"), "JPEG", quality=95), RED, BLUE),
    "deep-grey.png": (lambda: encoded(GREY, "PNG"), WHITE, BLACK),
    "deep-colour.png": (deep_rgb, RED, BLUE),
    "palette.png": (lambda: encoded(HIDDEN.quantize(4), "PNG"), RED, WHITE),
    "alpha.webp": (lambda: encoded(HIDDEN, "WEBP", lossless=True), RED, WHITE),
    "moving.gif": (lambda: animated("GIF"), RED, BLUE),
    "moving.webp": (lambda: animated("WEBP"), RED, BLUE),
    "moving.png": (lambda: animated("PNG"), RED, BLUE),
    "turned.png": (turned, RED, BLUE),
    "<script>alert(1)</script>'\".png".replace("/", ""): (lambda: WHOLE["PNG"], (), ()),
    "bild ä 猫 🐕\u202e.png": (lambda: WHOLE["PNG"], (), ()),
}


@pytest.mark.parametrize("name", READ)
def test_an_odd_picture_is_read_right(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    make, above, below = READ[name]
    (tmp_path / name).write_bytes(make())
    before = (tmp_path / name).read_bytes()
    out = tmp_path / "run"
    command = ("tune", tmp_path / name, "--category", "dog", "--out", out)
    assert say(*command, "--backbone", tiny_folder, *FEW).code == 0
    assert (tmp_path / name).read_bytes() == before
    picture = Run.open(out).picture()
    assert picture.size == (32, 32) and picture.mode == "RGB"
    for colour, at in ((above, (16, 4)), (below, (16, 28))):
        if colour:
            seen = picture.getpixel(at)
            assert isinstance(seen, tuple)
            assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) < 8


@generated(150)
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    tail=st.binary(max_size=40),
)
def test_a_damaged_file_is_a_picture_or_a_sentence(
    kind: str,
    keep: float,
    changes: list[tuple[float, int]],
    tail: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = bytearray(WHOLE[kind])
    for where, value in changes:
        # Most of what can go wrong is in the first bytes: squared, so that they are hit often.
        data[int(where**3 * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(bytes(data[: int(keep * len(data)) or len(data)]) + tail)
    try:
        picture = load_picture(path, resolution=32)
    except UserError as error:
        assert str(error).endswith(".") and path.name in str(error)
    else:
        assert picture.image.size == (32, 32) and picture.image.mode == "RGB"


# --- prompts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(
    tiny_folder: Path, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; do not write in it."""
    config = TuningConfig(
        subject_picture, "dog", str(tiny_folder), "textual_inversion", max_train_steps=1,
        device="cpu",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("bad") / "run"
    quiet: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}
    return run_tuning(config, out, **quiet).folder


LONG = "a dog on the beach " * 600
DRAWN = {
    "no placeholder": ("photo of a dog", "no {S*}"),
    "twice": ("photo of a {S*} beside a {S*}", ""),
    "nested": ("photo of a {S*{S*}}", ""),
    "10,000 characters": (f"photo of a {{S*}} {LONG}"[:10_000], "leaves out"),
    "emoji": ("photo of a {S*} 🐕‍🦺🏖️", ""),
    "right to left": ("صورة {S*} כלב", ""),
    "Chinese": ("一张{S*}的照片", ""),
    "touching": ("photo of two {S*}s and my{S*}{S*}_1 e\u0301{S*}", ""),
    "lines": ("photo\nof\ta\r\n{S*}", ""),
    "format": ("{0.__class__} {S*} {} %s %(x)s $HOME ${HOME} `id`", ""),
    "flag": ("photo of --a {S*}", ""),
    "markup": ("<script>alert(1)</script> {S*} \"'&", ""),
    "punctuation": ("?!... {S*}", ""),
}
NOT_DRAWN = {
    "empty": ("", "prompt is empty"),
    "spaces": (" \t \n ", "prompt is empty"),
    "NUL": ("photo of a {S*}\0", "has the character '\\x00'"),
    "escape": ("photo of a \x1b[2J{S*}", "has the character '\\x1b'"),
    "half a pair": ("photo of a {S*} \udc80", "has the character '\\udc80'"),
    "another subject": ("photo of a {S*2}", "asks for {S*2}"),
    "out of reach": (f"{LONG} photo of a {{S*}}", "stands behind them"),
    "a token within a word": ("photo of two <sks>s", "without <sks>: put spaces around it"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_an_odd_prompt_is_drawn(name: str, tiny_run: Path, tmp_path: Path) -> None:
    prompt, told = DRAWN[name]
    before = content(tiny_run)
    command = ("generate", tiny_run, prompt, "--num-images", 1, "--device", "cpu")
    said = say(*command, "--out", tmp_path / "drawn")
    assert said.code == 0 and told in said.err and "Traceback" not in said.err
    assert list(content(tmp_path)) == ["drawn", "drawn/000.png"] and content(tiny_run) == before
    run = Run.open(tiny_run)
    backbone = run.load("cpu")
    index = backbone.tokenizer.convert_tokens_to_ids("<sks>")
    ids = backbone.tokenize([run.prompt(prompt)])[0].tolist()
    assert ids.count(index) == prompt.count("{S*}"), "the model reads the subject's word"


@pytest.mark.parametrize("name", NOT_DRAWN)
def test_a_prompt_that_cannot_be_meant_is_refused(
    name: str, tiny_run: Path, tmp_path: Path
) -> None:
    prompt, told = NOT_DRAWN[name]
    before = content(tiny_run)
    command = ("generate", tiny_run, prompt, "--num-images", 1, "--device", "cpu")
    assert told in say(*command, "--out", tmp_path / "new" / "drawn").sentence
    assert not list(tmp_path.iterdir()) and content(tiny_run) == before


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("photo of a dog", "must contain {S*}"),
        ("", "must contain {S*}"),
        ("{S*}\0", "has the character '\\x00'"),
        (f"{LONG} {{S*}}", "is too long, the model leaves out"),
    ],
)
def test_a_tuning_prompt_that_cannot_be_meant_is_refused(
    prompt: str, told: str, tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    command = ("tune", subject_picture, "--category", "dog", "--backbone", tiny_folder, *FEW)
    said = say(*command, "--prompt", prompt, "--out", tmp_path / "run")
    assert told in said.sentence and not list(tmp_path.iterdir())


@generated(120)
@given(text=st.text(max_size=60), token=st.text(max_size=8), words=st.text(max_size=12))
def test_a_prompt_is_filled_in_and_never_run(text: str, token: str, words: str) -> None:
    """{S*} gives way to the token, and nothing else is understood: no format, no pattern."""
    prompt = f"{text}{PLACEHOLDER}{words}"
    # A space may be put where it touches a letter.
    between = f" ?{re.escape(token)} ?"
    pattern = between.join(map(re.escape, prompt.split(PLACEHOLDER)))
    assert re.fullmatch(pattern, fill(prompt, token), re.DOTALL)
    asked = prompt_for("photo of a {S*} {category}", "dog", words.strip(), text)
    assert PLACEHOLDER in asked.text and "dog" in asked.caption
    if words.strip():
        assert PLACEHOLDER not in caption(prompt, words)
    try:
        assert checked(text) is text
    except UserError as error:
        assert str(error).isprintable()


@generated(60)
@given(text=st.text())
def test_a_message_is_one_line_that_a_terminal_only_shows(text: str) -> None:
    assert one_line(text).isprintable()
    assert one_line(one_line(text)) == one_line(text)
    if text.isprintable() and len(text) < 2000:
        assert one_line(text) == " ".join(text.split())


def test_a_long_message_is_cut_in_the_middle() -> None:
    assert len(one_line("x" * 10**6)) < 2100 and one_line("x" * 10**6 + " end.").endswith("end.")


# --- settings ------------------------------------------------------------------------------------

NUMBERS = (
    *("weight-sude", "truncate-at", "prior-loss-weight", "learning-rate", "token-learning-rate"),
    *("max-grad-norm", "adam-weight-decay", "max-train-steps", "train-batch-size", "resolution"),
    *("num-class-images", "gradient-accumulation-steps", "lora-rank", "num-vectors", "seed"),
    *("lr-warmup-steps", "checkpoint-every", "num-samples", "validation-every"),
)
NEVER = ("nan", "-inf", "-1", "-1e9", "", " ", "x", "1;2", "0x", "[]", "None!", "1" * 400, "½")


@pytest.mark.parametrize("flag", NUMBERS)
def test_a_number_that_cannot_be_meant_is_refused(
    flag: str, tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    where = ("tune", subject_picture, "--category", "dog", "--backbone", tiny_folder)
    for value in NEVER:
        if value == "1" * 400 and flag in ("max-grad-norm", "checkpoint-every", "validation-every"):
            continue  # these mean: never
        said = say(*where, "--device", "cpu", "--out", tmp_path / "run", f"--{flag}={value}")
        assert flag in said.sentence, value
    assert not list(tmp_path.iterdir())


NASTY = st.one_of(
    st.sampled_from(
        [
            *("nan", "inf", "-inf", "0", "-0.0", "1e400", "1e-400", "-1", "2147483648", "1" * 400),
            *("true", "null", "[]", "{}", "..", "/", "~", "-", "--", "=", "%s", "{S*}", "\n"),
            *("cuda:99", "meta", "mps", "cpu:7", "float64", "auto", "none", "all", "a" * 5000),
        ]
    ),
    st.floats().map(str),
    st.integers().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=20),  # no process is given a NUL
)
COMMANDS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "tune": (
        ("tune", "missing.png", "--category", "dog", "--out", "new"),
        (
            *NUMBERS,
            *("category", "token", "prompt", "initializer", "more-subjects", "dtype", "device"),
            *(
                "method",
                "prior",
                "weighting",
                "train",
                "prior-preservation",
                "optimizer",
                "class-images",
            ),
            *("backbone", "preset", "report-to", "sample-prompts", "out"),
        ),
    ),
    "generate": (
        ("generate", "missing", "photo of a {S*}", "--out", "new"),
        (
            *("num-images", "seed", "num-inference-steps", "guidance-scale", "sude-guidance"),
            *("negative-prompt", "device", "out"),
        ),
    ),
    "evaluate": (
        ("evaluate", "missing", "--out", "new"),
        (
            *("references", "prompts", "structure", "num-images", "seed", "metrics"),
            *("encoders", "num-inference-steps", "guidance-scale", "device", "out"),
        ),
    ),
    "classify": (
        ("classify", "missing.png", "--prompt", "a dog", "--prompt", "a cat"),
        (
            *("prompt", "prior", "num-pairs", "weighting", "caution", "batch-size", "seed"),
            *("backbone", "dtype", "device"),
        ),
    ),
    "sweep": (
        ("sweep", "missing.yaml", "--out", "new", "--dry-run"),
        ("out", "runs", "cluster", "checkpoint-every"),
    ),
    "export": (("export", "missing", "--out", "new"), ("format", "dtype", "out")),
    "demo": (
        ("demo", "--category", "horse", "--out", "new"),
        ("seed", "method", "num-images", "max-train-steps", "truncation", "out"),
    ),
    "release": (("release", "/dev/null"), ("course", "lessons")),
}


@generated(150)
@given(data=st.data())
def test_no_argument_makes_a_traceback(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any flag with any value, of commands that lack a file: always one sentence, nothing written.

    A flag may make the parser take the file's name for something else: that is a sentence, too.
    """
    words, flags = COMMANDS[data.draw(st.sampled_from(sorted(COMMANDS)))]
    many = st.lists(st.tuples(st.sampled_from(flags), NASTY), min_size=1, max_size=3)
    given_flags = [f"--{flag}={value}" for flag, value in data.draw(many)]
    room = tmp_path_factory.getbasetemp() / "arguments"
    room.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        assert say(*words, *given_flags).sentence
    assert not list(room.iterdir())


@generated(30)
@given(words=st.lists(NASTY, max_size=6))
def test_no_words_make_a_traceback(
    words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    room = tmp_path_factory.getbasetemp() / "words"
    room.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        assert say(*words).sentence
    assert not list(room.iterdir())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--num-images", "0"), "--num-images"),
        (("--num-images", "100001"), "at most 100,000"),
        (("--seed", "-1"), "seed is -1"),
        (("--metrics", "beauty"), "no metric 'beauty'"),
        (("--structure", "P9"), "'P9'"),
        (("--encoders", "clip"), "NAME=FOLDER"),
        (("--prompts", "photo of a {S*} " * 40), "There is no file"),
        (("--prompts", "nul\0"), "There is no file"),
        (("--references", "nowhere"), "no folder nowhere"),
        (("--num-inference-steps", "0"), "steps is 0"),
        (("--guidance-scale", "nan"), "guidance scale is nan"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    flags: tuple[str, ...], told: str, tiny_run: Path, tmp_path: Path
) -> None:
    before = content(tiny_run)
    base = ("evaluate", tiny_run, "--out", tmp_path / "new", "--device", "cpu")
    prompts = () if "--prompts" in flags else ("--prompts", "plain")
    metrics = () if "--metrics" in flags else ("--metrics", "CLIP-I")
    assert told in say(*base, *prompts, *metrics, *flags).sentence
    assert content(tiny_run) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["meta", "cuda:99", "cpu:x", "", "tpu", "vulkan"])
def test_a_device_that_computes_nothing_is_refused(device: str, tiny_run: Path) -> None:
    command = ("generate", tiny_run, "photo of a {S*}", "--out", tiny_run / "new")
    assert "is not available here" in say(*command, f"--device={device}").sentence


# --- what a run's folder says --------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**20, 10**30)
    | st.floats()
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@generated(100)
@given(
    name=st.sampled_from(sorted(TuningConfig.__dataclass_fields__)) | st.text(max_size=8),
    value=VALUES,
)
def test_a_configuration_of_any_content_is_read_or_refused(
    name: str, value: Any, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is read has the type that the code counts on; the rest is a sentence with the file."""
    room = tmp_path_factory.getbasetemp() / "configured"
    room.mkdir(exist_ok=True)
    values = json.loads((tiny_run / CONFIG).read_text())
    (room / CONFIG).write_text(json.dumps(values | {name: value}))
    (room / ENVIRONMENT).write_text("{}")
    try:
        config = Run.open(room).config
    except UserError as error:
        assert CONFIG in str(error) or "no method" in str(error)
    else:
        assert isinstance(config.image, Path) and isinstance(config.category, str)
        assert config.weight_sude is None or 0 <= config.weight_sude <= 1e6
        assert isinstance(config.truncate, bool) and isinstance(config.token, str)
        assert all(isinstance(x, str) for x in config.more_subjects)
    said = say("export", room, "--format", "kohya", "--out", room / "new.safetensors")
    assert said.sentence  # it has no weights in any case
    assert sorted(p.name for p in room.iterdir()) == [CONFIG, ENVIRONMENT]


@generated(60)
@given(data=st.binary(max_size=60) | st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"NaN"]))
def test_a_configuration_of_any_bytes_is_refused(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    room = tmp_path_factory.getbasetemp() / "bytes"
    room.mkdir(exist_ok=True)
    (room / CONFIG).write_bytes(data)
    (room / ENVIRONMENT).write_text("{}")
    said = say("generate", room, "photo of a {S*}", "--out", room / "new")
    assert CONFIG in said.sentence and not (room / "new").exists()


def test_pictures_and_metrics_of_a_run_that_are_damaged_are_told(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = Run.open(tiny_run)
    for name in (CONFIG, ENVIRONMENT):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    (tmp_path / "picture.png").write_bytes(WHOLE["PNG"][:200])
    (tmp_path / "metrics.csv").write_bytes(b"")
    damaged = Run.open(tmp_path)
    for read, name in ((damaged.picture, "picture.png"), (damaged.metrics, "metrics.csv")):
        with pytest.raises(UserError, match=name):
            read()
    (tmp_path / "metrics.csv").unlink()
    with pytest.raises(UserError, match=r"metrics\.csv"):
        damaged.metrics()


# --- names of folders ----------------------------------------------------------------------------


@generated(60)
@given(name=st.text(min_size=1, max_size=300))
def test_any_name_of_a_folder_is_taken_or_refused(
    name: str, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One picture is drawn into a folder of that name, or there is a sentence and nothing more."""
    room = tmp_path_factory.getbasetemp() / "names"
    room.mkdir(exist_ok=True)
    name = name.replace("/", "_")
    if name.strip() in ("", ".", ".."):
        name = "x"
    from sude_lab.io.files import atomic_folder

    try:
        (room / name).exists()
        with atomic_folder(room / name) as folder:
            (folder / "000.png").write_bytes(WHOLE["PNG"])
    except (UserError, OSError, ValueError):  # the two last are what the command line asks first
        assert not list(room.iterdir())
        assert say("generate", tiny_run, "a {S*}", f"--out={room / name}").sentence
        assert not list(room.iterdir())
    else:
        assert [p.name for p in (room / name).iterdir()] == ["000.png"]
        (room / name / "000.png").unlink()
        (room / name).rmdir()


def test_files_and_folders_of_the_longest_names_are_written(tmp_path: Path) -> None:
    from sude_lab.io.files import atomic_folder, atomic_write

    folder, file = tmp_path / ("a" * 255), tmp_path / ("猫" * 83 + ".csv")
    with atomic_folder(folder) as inside:
        (inside / "x").touch()
    with atomic_write(file) as path:
        path.touch()
        assert path.suffix == ".csv"
    assert sorted(content(tmp_path)) == sorted([folder.name, f"{folder.name}/x", file.name])


# --- the command line itself ---------------------------------------------------------------------


def broken(error: BaseException) -> Callable[[Any], int]:
    def fail(args: Any) -> int:
        raise error

    return fail


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`sude-lab lab` whose work raises an error."""

    def give(error: BaseException, *flags: str) -> Said:
        monkeypatch.setattr(cli.Lab, "execute", broken(error))
        return say(*flags[:1], "lab", *flags[1:])

    return give


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("it\nbroke."), ZeroDivisionError()])
def test_a_bug_is_one_sentence_and_says_how_to_report_it(
    error: Exception, fails: Callable[..., Said]
) -> None:
    said = fails(error)
    assert said.code == 1 and said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith(f"sude-lab: {type(error).__name__}")
    assert "this is a bug: run again with --debug and report it." in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("error", "code"), [(KeyError("x"), 1), (UserError("No."), 2), (KeyboardInterrupt(), 130)]
)
def test_debug_shows_the_traceback_and_changes_no_code(
    error: BaseException, code: int, fails: Callable[..., Said]
) -> None:
    plain, before, behind = fails(error), fails(error, "--debug"), fails(error, "", "--debug")
    assert plain.code == before.code == code
    assert "Traceback" not in plain.err and "Traceback" in before.err
    assert before.err.endswith(plain.err) and "in fail" in before.err
    assert behind.code == 2  # the empty word is no command; --debug itself may stand behind
    assert "Traceback" in behind.err


def test_what_the_system_refuses_is_no_bug(fails: Callable[..., Said]) -> None:
    said = fails(PermissionError(13, "Permission denied", "/some/file"))
    assert said.sentence == "sude-lab: /some/file cannot be read or written (Permission denied)."


def test_ctrl_c_says_what_is_kept(
    tiny_folder: Path, subject_picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sude_lab.runs import folder as runs

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    command = ("tune", subject_picture, "--category", "dog", "--backbone", tiny_folder, *FEW[2:])
    few = ("--max-train-steps", 3, "--out", tmp_path / "run")
    begin = runs._begin
    monkeypatch.setattr(runs, "_begin", stop)
    said = say(*command, *few)
    assert said.code == 130 and "nothing was written" in said.err and "Traceback" not in said.err
    monkeypatch.setattr(runs, "_begin", begin)
    monkeypatch.setattr(runs, "_keep_weights", stop)
    said = say(*command, *few)
    assert said.code == 130 and "no checkpoint was due" in said.err.splitlines()[-1]
    said = say(*command, *few[:2], "--out", tmp_path / "other", "--checkpoint-every", 1)
    assert said.code == 130 and "with --resume" in said.err.splitlines()[-1]
    assert f"checkpoint in {tmp_path / 'other'} is kept" in said.err


def test_help_names_debug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0 and "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--class-images", "."), "--class-images is of no use where --prior-loss-weight is 0"),
        (("--backbone", " "), "There is no pipeline folder"),
        (("--out", "/proc/new"), "The folder /proc/new cannot be made"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(
    flags: tuple[str, ...], told: str, tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    before = ("tune", subject_picture, "--category", "dog", "--backbone", tiny_folder, *FEW)
    assert told in say(*before, "--out", tmp_path / "run", *flags).sentence
    assert not list(tmp_path.iterdir())


def test_a_picture_of_no_numbers_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    """diffusers makes a black one of it."""
    command = ("generate", tiny_run, "a {S*}", "--num-images", 1, "--device", "cpu")
    said = say(*command, "--guidance-scale", "1e38", "--out", tmp_path / "drawn")
    assert said.code == 2 and "lower the guidance scale" in said.err
    assert not list(tmp_path.iterdir())
