"""Every odd picture a person may bring becomes an upright RGB square, or one clear sentence."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from sude_lab.errors import UserError
from sude_lab.io.pictures import Picture, load_picture, open_picture

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / ".." / "shared" / "dreambench" / "dataset" / "dog" / "00.jpg"

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def quadrants(size: int = 64) -> Image.Image:
    """Red top left, green top right, blue bottom left, yellow bottom right."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, YELLOW])
    return image.resize((size, size), Image.Resampling.NEAREST)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quadrants, in reading order."""
    near, far = image.width // 4, 3 * image.width // 4
    pixels = [image.getpixel(at) for at in [(near, near), (far, near), (near, far), (far, far)]]
    return [pixel if isinstance(pixel, tuple) else () for pixel in pixels]


def distance(colour: tuple[int, ...], expected: tuple[int, ...]) -> int:
    return max(abs(a - b) for a, b in zip(colour, expected, strict=True))


def assert_square(picture: Picture, resolution: int) -> None:
    assert picture.image.mode == "RGB"
    assert picture.image.size == (resolution, resolution)
    for note in picture.notes:
        assert "\n" not in note
        assert note.endswith(".")
        assert picture.source.name in note


# --- what is read --------------------------------------------------------------------------------


def test_a_picture_may_be_opened_whole(tmp_path: Path) -> None:
    image = quadrants().resize((90, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    image.save(tmp_path / "turned.png", exif=exif)
    whole = open_picture(tmp_path / "turned.png")
    assert whole.mode == "RGB" and whole.size == (40, 90)
    assert whole.tobytes() == image.rotate(-90, expand=True).tobytes()
    with pytest.raises(UserError, match="does not exist"):
        open_picture(tmp_path / "missing.png")


def test_plain_picture(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "plain.png")
    picture = load_picture(tmp_path / "plain.png", resolution=64)
    assert_square(picture, 64)
    assert picture.notes == ()
    assert picture.source == tmp_path / "plain.png"
    assert picture.image.tobytes() == quadrants().tobytes()


UPRIGHT_BY_ORIENTATION = {
    1: [RED, GREEN, BLUE, YELLOW],
    2: [GREEN, RED, YELLOW, BLUE],  # mirrored
    3: [YELLOW, BLUE, GREEN, RED],  # upside down
    4: [BLUE, YELLOW, RED, GREEN],
    5: [RED, BLUE, GREEN, YELLOW],
    6: [BLUE, RED, YELLOW, GREEN],  # a phone held upright: turn clockwise
    7: [YELLOW, GREEN, BLUE, RED],
    8: [GREEN, YELLOW, RED, BLUE],
}


@pytest.mark.parametrize(("orientation", "expected"), UPRIGHT_BY_ORIENTATION.items())
def test_exif_orientation(
    tmp_path: Path, orientation: int, expected: list[tuple[int, ...]]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    quadrants().save(tmp_path / "phone.jpg", exif=exif, quality=95)
    picture = load_picture(tmp_path / "phone.jpg", resolution=64)
    assert_square(picture, 64)
    for corner, colour in zip(corners(picture.image), expected, strict=True):
        assert distance(corner, colour) < 8


def test_exif_orientation_comes_before_the_crop(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(GREEN, (100, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    picture = load_picture(tmp_path / "phone.jpg", resolution=80)
    assert all(distance(corner, GREEN) < 8 for corner in corners(picture.image))


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_centre_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    left, top = (size[0] - 100) // 2, (size[1] - 100) // 2
    image.paste(quadrants(100), (left, top))
    image.save(tmp_path / "long.png")
    picture = load_picture(tmp_path / "long.png", resolution=100)
    assert picture.image.tobytes() == quadrants(100).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (64, 64), (0,) * len(mode))  # transparent black
    image.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 32, 32))
    image.paste((0,) * (len(mode) - 1) + (128,), (32, 0, 64, 32))
    image.save(tmp_path / "alpha.png")
    picture = load_picture(tmp_path / "alpha.png", resolution=64)
    assert_square(picture, 64)
    assert corners(picture.image) == [(0,) * 3, (127,) * 3, (255,) * 3, (255,) * 3]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(tmp_path: Path, suffix: str) -> None:
    image = quadrants().quantize(4)
    image.save(tmp_path / f"palette.{suffix}", transparency=image.getpixel((16, 16)))
    assert Image.open(tmp_path / f"palette.{suffix}").mode == "P"
    picture = load_picture(tmp_path / f"palette.{suffix}", resolution=64)
    assert corners(picture.image) == [(255, 255, 255), GREEN, BLUE, YELLOW]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "key.png", transparency=BLUE)
    picture = load_picture(tmp_path / "key.png", resolution=64)
    assert corners(picture.image) == [RED, GREEN, (255, 255, 255), YELLOW]


def ramp() -> np.ndarray:
    return np.tile(np.linspace(0, 1, 256), (256, 1))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grey16.png", (ramp() * 65535).astype(np.uint16)),
        ("grey16.tif", (ramp() * 65535).astype(np.uint16)),
        ("grey32.tif", (ramp() * 65535).astype(np.int32)),
        ("float.tif", ramp().astype(np.float32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_grey_is_scaled_and_not_clipped(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode in {"I;16", "I", "F"}
    picture = load_picture(tmp_path / name, resolution=256)
    assert_square(picture, 256)
    assert picture.notes == ()
    grey = np.asarray(picture.image)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_allclose(grey[128, :, 0], np.arange(256), atol=1)


def test_deep_grey_outside_the_usual_range_is_stretched_and_noted(tmp_path: Path) -> None:
    Image.fromarray((ramp() * 3e6 - 1e6).astype(np.int32)).save(tmp_path / "scan.tif")
    picture = load_picture(tmp_path / "scan.tif", resolution=256)
    assert_square(picture, 256)
    assert len(picture.notes) == 1
    assert "from -1e+06 to 2e+06" in picture.notes[0]
    np.testing.assert_allclose(np.asarray(picture.image)[128, :, 0], np.arange(256), atol=1)


def test_cmyk_without_a_profile(tmp_path: Path) -> None:
    quadrants().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert Image.open(tmp_path / "print.jpg").mode == "CMYK"
    picture = load_picture(tmp_path / "print.jpg", resolution=64)
    assert_square(picture, 64)
    expected = [RED, GREEN, BLUE, YELLOW]
    for corner, colour in zip(corners(picture.image), expected, strict=True):
        assert distance(corner, colour) < 8


def cmyk_profile(lab: tuple[int, int, int]) -> bytes:
    """A minimal ICC profile of a press whose coloured inks all print as one 8-bit Lab colour.

    Header, tag table and one `A2B0` table of type lut8 (ICC.1:2001-04, 6.1, 6.2 and 6.5.8) with
    four inputs, three outputs and two grid points. Paper is white and the fourth ink black, as the
    black point compensation of the conversion expects.
    """
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4
    paper, ink, black = bytes([255, 128, 128]), bytes(lab), bytes([0, 128, 128])
    lut += paper + black + (ink + black) * 7 + identity * 3
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78), b"A2B0": lut}
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4s4s4s4s4s12x4s", offset + len(body), b"\0\0\0\0", b"\2\x40\0\0", b"prtr", b"CMYK",
        b"Lab ", b"acsp",
    )  # fmt: skip
    header += bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)  # the D50 white
    return header.ljust(128, b"\0") + table + body


def test_cmyk_with_a_profile(tmp_path: Path) -> None:
    profile = cmyk_profile((138, 209, 195))  # the Lab colour of sRGB red
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(tmp_path / "press.tif", icc_profile=profile)
    picture = load_picture(tmp_path / "press.tif", resolution=64)
    assert_square(picture, 64)
    assert picture.notes == ()
    # Without the profile the ink is cyan.
    assert all(distance(corner, RED) < 12 for corner in corners(picture.image))


def display_p3() -> bytes:
    """The profile of a phone's camera: Pillow's sRGB with the primaries of Display P3 (D50)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    (count,) = struct.unpack_from(">I", data, 128)
    for k in range(count):
        name, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * k)
        if name in primaries:
            values = (round(v * 65536) for v in primaries[name])
            struct.pack_into(">3i", data, offset + 8, *values)
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_colours_of_a_phone_become_those_of_the_model(mode: str, tmp_path: Path) -> None:
    colour = (220, 110, 40, 255)[: len(mode)]
    Image.new(mode, (64, 64), colour).save(tmp_path / "phone.png", icc_profile=display_p3())
    picture = load_picture(tmp_path / "phone.png", resolution=32)
    pixel = picture.image.getpixel((5, 5))
    assert isinstance(pixel, tuple)
    assert np.abs(np.subtract(pixel, (237, 102, 0))).max() <= 2 and not picture.notes


def test_a_profile_of_srgb_changes_no_bit(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "a.png", resolution=64).image), values)


def test_a_picture_in_memory_gets_the_care_of_one_in_a_file(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    hidden = np.zeros((64, 64, 4), np.uint8)
    hidden[..., 0] = 200  # red that nobody sees
    wide = Image.linear_gradient("L").resize((320, 64))
    for name, source in {"grey": grey, "hidden": hidden, "wide": np.asarray(wide)}.items():
        image = Image.fromarray(source)
        image.save(tmp_path / f"{name}.png")
        expected = load_picture(tmp_path / f"{name}.png", resolution=64).image
        for given in (source, image):
            assert load_picture(given, resolution=64).image.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    "values",
    [
        *(np.zeros(shape, np.uint8) for shape in ((3, 64, 64), (64,), (0, 64), (1, 64, 64, 3))),
        np.full((64, 64), np.nan, np.float32),
        np.full((64, 64, 3), 0.5, np.float32),
        np.zeros((64, 64), np.int64),
    ],
    ids=lambda values: f"{values.shape} {values.dtype}",
)
def test_an_array_that_is_no_picture_is_refused(values: np.ndarray) -> None:
    with pytest.raises(UserError) as error:
        load_picture(values, resolution=32)
    assert str(error.value).startswith("The picture") and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "profile", [b"nonsense", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_cmyk_with_a_useless_profile(tmp_path: Path, profile: bytes) -> None:
    image = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    image.save(tmp_path / "press.tif", icc_profile=profile)
    picture = load_picture(tmp_path / "press.tif", resolution=64)
    assert_square(picture, 64)
    assert "profile" in picture.notes[0]
    assert corners(picture.image) == [(0, 255, 255)] * 4


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"moving.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = load_picture(path, resolution=64)
    assert_square(picture, 64)
    assert picture.notes == (f"moving.{suffix} holds 3 pictures: only the first is used.",)
    assert corners(picture.image) == [RED] * 4


def test_pages_give_the_first(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    picture = load_picture(tmp_path / "pages.tif", resolution=64)
    assert picture.notes == ("pages.tif holds 2 pictures: only the first is used.",)
    assert corners(picture.image) == [RED] * 4


def test_preview_inside_a_phone_picture_needs_no_note(tmp_path: Path) -> None:
    image, preview = quadrants(), quadrants(16)
    image.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "phone.jpg").format == "MPO"
    assert load_picture(tmp_path / "phone.jpg", resolution=64).notes == ()


@pytest.mark.parametrize("size", [(20, 30), (2, 2)])
def test_small_picture_is_enlarged_and_noted(tmp_path: Path, size: tuple[int, int]) -> None:
    quadrants().resize(size).save(tmp_path / "tiny.png")
    picture = load_picture(tmp_path / "tiny.png", resolution=64)
    assert_square(picture, 64)
    assert len(picture.notes) == 1
    assert f"{size[0]} x {size[1]}" in picture.notes[0]


def test_two_notes(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "icon.gif", save_all=True, append_images=frames[1:])
    assert len(load_picture(tmp_path / "icon.gif", resolution=64).notes) == 2


def test_wrong_extension(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "really_a_png.jpg", format="PNG")
    picture = load_picture(tmp_path / "really_a_png.jpg", resolution=64)
    assert corners(picture.image) == [RED, GREEN, BLUE, YELLOW]


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "YCbCr packed", "PA", "LAB"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("before 13, Pillow reads a TIFF of this mode only where it is packed")
    mode, packed, _ = mode.partition(" packed")
    image = Image.new("RGB", (64, 64), "white").convert(mode)
    image.save(tmp_path / "mode.tif", compression="tiff_lzw" if packed else None)
    picture = load_picture(tmp_path / "mode.tif", resolution=64)
    # LAB holds whole numbers: its white is one step off.
    assert all(distance(corner, (255, 255, 255)) <= 1 for corner in corners(picture.image))


@pytest.mark.skipif(not PHOTO.exists(), reason=f"the DreamBench photo {PHOTO} is not here")
def test_dreambench_photo() -> None:
    picture = load_picture(PHOTO, resolution=64)
    assert_square(picture, 64)
    assert picture.notes == ()
    assert np.asarray(picture.image).std() > 10


# --- what is refused -----------------------------------------------------------------------------


def missing(path: Path) -> None:
    pass


def folder(path: Path) -> None:
    path.mkdir()


def zero_bytes(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("not a picture\n" * 100)


def truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_alone(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


def strip(path: Path) -> None:
    Image.new("RGB", (20_000, 1)).save(path, format="PNG")


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1)).save(path, format="PNG")


def not_finite(path: Path) -> None:
    Image.fromarray(np.full((64, 64), np.nan, dtype=np.float32)).save(path, format="TIFF")


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (missing, "does not exist"),
        (folder, "folder"),
        (zero_bytes, "not a picture"),
        (text, "not a picture"),
        (truncated_jpeg, "cut short"),
        (truncated_png, "cut short"),
        (header_alone, "not a picture"),
        (strip, "20000 x 1"),
        (one_pixel, "single pixel"),
        (not_finite, "finite"),
        pytest.param(
            pipe,
            "regular",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system"),
        ),
    ],
)
def test_refusal(tmp_path: Path, make: Callable[[Path], None], word: str) -> None:
    path = tmp_path / "broken picture.jpg"
    make(path)
    with pytest.raises(UserError) as error:
        load_picture(path, resolution=64)
    assert_one_sentence(error, path)
    assert word in str(error.value)


def assert_one_sentence(error: pytest.ExceptionInfo[UserError], path: Path) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message.replace(str(path), "")
    assert path.name in message


@pytest.mark.parametrize("limit", [5000, 1000], ids=["Pillow warns", "Pillow raises"])
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (80, 80)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError) as error:
        load_picture(path, resolution=64)
    assert_one_sentence(error, path)
    assert f"{limit:,} pixels" in str(error.value)


def test_name_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300 + ".png")
    with pytest.raises(UserError) as error:
        load_picture(path, resolution=64)
    assert_one_sentence(error, path)


def test_resolution_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        load_picture(tmp_path / "any.png", resolution=0)
