"""One picture of the user: from any file that Pillow can read to the square the model sees.

Grids of pictures come from `diffusers.utils.make_image_grid`.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from sude_lab.errors import UserError, check_whole
from sude_lab.io.reading import no_file

MAX_ASPECT = 20
"""Longest over shortest side beyond which a centre square says nothing of the picture."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "AVIF", "JPEG2000", "PPM", "TGA")
"""What is opened, whatever a file's name says: Pillow's others are rare, and some start programs
(EPS, Ghostscript)."""
AnyPicture = Path | str | Image.Image | np.ndarray


@dataclass(frozen=True)
class Picture:
    """A picture ready for the model: square, RGB, 8 bit, upright."""

    image: Image.Image
    notes: tuple[str, ...]
    """One sentence for each liberty that was taken with the file."""
    source: Path


def load_picture(path: AnyPicture, *, resolution: int) -> Picture:
    """Read one picture as an upright RGB square of `resolution` pixels.

    In this order: the first frame (a note says so), EXIF orientation, 16-bit and floating-point
    values scaled to 8 bit, colours to sRGB by the embedded ICC profile where there is one,
    transparency over white, centre crop, Lanczos resize (a note says so where it enlarges).
    `path`: a file, or a picture in memory, of Pillow or as an array.

    Raises:
        UserError: it is no file, no picture, damaged, larger than `PIL.Image.MAX_IMAGE_PIXELS`,
            a single pixel, or a thin strip.
    """
    check_whole("The resolution", resolution, 1)
    notes: list[str] = []
    image, path = _read(path, notes)
    width, height = image.size
    if max(image.size) == 1:
        raise UserError(f"{path} is a single pixel: use a larger picture.")
    if min(image.size) == 1 or max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(f"{path} is a strip of {width} x {height} pixels: crop it to a square.")
    if min(image.size) < resolution:
        notes.append(
            f"{path.name} is {width} x {height} pixels, smaller than the model's "
            f"{resolution} x {resolution}: it is enlarged and will look soft."
        )
    square = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)
    return Picture(square, tuple(notes), path)


def open_picture(path: AnyPicture) -> Image.Image:
    """Read one picture as `load_picture` does, upright and RGB, but whole and in its own size.

    Errors: those of `load_picture`, but for the shape.
    """
    return _read(path, [])[0]


def _read(source: AnyPicture, notes: list[str]) -> tuple[Image.Image, Path]:
    """Return a picture as RGB, and the name by which sentences speak of it."""
    if isinstance(source, np.ndarray):
        try:
            source = Image.fromarray(source)
        except (TypeError, ValueError) as error:
            raise UserError(f"The picture is an array that is none ({error}).") from error
    if isinstance(source, Image.Image):
        path = Path(getattr(source, "filename", "") or "The picture")
        return _to_rgb(ImageOps.exif_transpose(source), path, notes), path
    path = Path(source)
    if wrong := no_file(path):  # a pipe or a device may never end
        raise UserError(f"{path} {wrong}: name one picture file.")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit: the limit is the limit here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
            with Image.open(path, formats=formats) as file:
                frames = getattr(file, "n_frames", 1)
                if frames > 1 and file.format != "MPO":  # a phone's, with a preview or a depth map
                    notes.append(f"{path.name} holds {frames} pictures: only the first is used.")
                # A frame counter may have moved on through the file.
                file.seek(0)
                return _to_rgb(ImageOps.exif_transpose(file), path, notes), path
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"{Image.MAX_IMAGE_PIXELS:,} pixels, the most that is read"
        raise UserError(f"{path} has more than {most}: make it smaller first.") from error
    except UnidentifiedImageError as error:
        what = "is not a picture that can be read here (HEIC and SVG are not, for example)"
        raise UserError(f"{path} {what}: save it as JPEG or PNG.") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read: change its permissions.") from error
    except Exception as error:  # decoders meet damaged bytes with errors of every class
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again.") from error


def _to_rgb(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image, path, notes)
    profile = image.info.get("icc_profile", b"")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colours = _to_srgb(image.convert("RGB"), profile, path, notes)
        colours.putalpha(image.getchannel("A"))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    if image.mode not in ("CMYK", "L", "RGB"):
        image = image.convert("RGB")
    image = _to_srgb(image, profile, path, notes)
    image.info.clear()  # what it says of colours and turns has been done
    return image


def _to_8_bit(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point grey to 8 bit; Pillow's own `convert` clips."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise UserError(f"{path} has values that are not finite: save it as 8-bit PNG.")
    white = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > white:  # neither format says what white is
        notes.append(
            f"{path.name} has values from {low:g} to {high:g}: they become black to white."
        )
        values, white = values - low, max(high - low, 1.0)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes, path: Path, notes: list[str]) -> Image.Image:
    """Turn the colours of a picture into those of sRGB, by the profile that came with it."""
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            notes.append(f"{path.name} has a colour profile that cannot be used: it is ignored.")
        else:
            assert converted is not None  # it is None only when converting in place
            plain = image.convert("RGB")
            # A profile that says sRGB changes nothing but its rounding.
            difference = ImageChops.difference(plain, converted).getextrema()
            return converted if max(high for _, high in difference) > 1 else plain  # type: ignore[misc]
    return image.convert("RGB")
