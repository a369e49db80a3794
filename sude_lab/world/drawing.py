"""Pictures whose category, public attribute and private look are known exactly, and their captions.

A `Scene` says everything about a picture; `draw` paints it, `caption` describes it. The words fall
into three groups: the category ("dog"), its public attributes ("running", shared by all dogs) and
the private look (two colours, a pattern, a collar) that makes one dog *your* dog.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from sude_lab.prompts import photo_of

ANIMALS = ("dog", "cat", "rabbit", "fox", "stuffed animal")
POSES = ("sitting", "standing", "running", "jumping", "open mouth")
MATERIALS = ("plain", "metal", "golden", "glass")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ANIMALS, POSES),
    "candle": ("unlit", "burning", "melted"),
    "bowl": MATERIALS,
    "teapot": MATERIALS,
    "vase": MATERIALS,
}
CATEGORIES = tuple(ATTRIBUTES)
BACKGROUNDS = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
}
COMPANIONS = {"ball": "with a ball", "cherries": "with cherries"}
PATTERNS = ("plain", "spots", "stripes", "patch")
COLOURS: dict[str, tuple[int, int, int]] = {
    "brown": (142, 92, 48),
    "white": (246, 244, 238),
    "black": (52, 50, 56),
    "grey": (148, 150, 156),
    "orange": (238, 138, 52),
    "blue": (86, 128, 222),
    "pink": (242, 152, 190),
    "green": (98, 176, 98),
}
ACCENTS: dict[str, tuple[int, int, int]] = {
    "red": (212, 48, 48),
    "yellow": (248, 210, 62),
    "purple": (142, 84, 196),
    "teal": (42, 168, 172),
}
RARE_TOKENS = ("sks", "zwx", "xqv", "olis", "pll", "ohwx")
"""Words in the vocabulary that no caption ever uses: free names for a subject."""

RESOLUTION = 64
_SUPERSAMPLE = 4
_OUTLINE = (40, 36, 44)


@dataclass(frozen=True)
class Look:
    """The private look of one subject: what a single picture of it has to teach."""

    colour: str
    second: str
    pattern: str
    accent: str | None
    shift: float = 0.0

    def words(self) -> str:
        """Return the look in words, for labels: 'brown, white spots, red accent'."""
        parts = [self.colour]
        if self.pattern != "plain":
            parts.append(f"{self.second} {self.pattern}")
        if self.accent:
            parts.append(f"{self.accent} accent")
        return ", ".join(parts)


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows; offsets are fractions of its side."""

    category: str
    attribute: str
    look: Look
    background: str | None = None
    companion: str | None = None
    size: float = 1.0
    dx: float = 0.0
    dy: float = 0.0
    stretch: float = 1.0
    tint: float = 0.5

    def __post_init__(self) -> None:
        if self.category not in ATTRIBUTES:
            raise ValueError(
                f"Unknown category {self.category!r}: choose one of {', '.join(CATEGORIES)}."
            )
        if self.attribute not in ATTRIBUTES[self.category]:
            raise ValueError(
                f"A {self.category} cannot be {self.attribute!r}: "
                f"choose one of {', '.join(ATTRIBUTES[self.category])}."
            )


def sample_look(rng: random.Random) -> Look:
    """Draw a private look; the second colour always differs from the first."""
    colour, second = rng.sample(tuple(COLOURS), 2)
    return Look(
        colour,
        second,
        rng.choice(PATTERNS),
        rng.choice((None, *ACCENTS)),
        shift=rng.uniform(-0.03, 0.03),
    )


def sample_scene(rng: random.Random, category: str | None = None) -> Scene:
    """Draw a scene of one category (or of any), with the free variation of the training set."""
    category = category or rng.choice(CATEGORIES)
    companion = None
    if rng.random() < 0.15:
        companion = "ball" if category in ANIMALS else "cherries"
    return vary(
        Scene(
            category,
            rng.choice(ATTRIBUTES[category]),
            sample_look(rng),
            background=rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.5 else None,
            companion=companion,
        ),
        rng,
    )


def vary(scene: Scene, rng: random.Random) -> Scene:
    """Return the same scene with fresh size, place, proportion and background tint."""
    return replace(
        scene,
        size=rng.uniform(0.92, 1.08),
        dx=rng.uniform(-0.04, 0.04),
        dy=rng.uniform(-0.025, 0.025),
        stretch=rng.uniform(0.94, 1.06),
        tint=rng.random(),
    )


# --- words -------------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene; with `rng` every part is dropped at random and 10 % of captions are empty.

    Without `rng` the caption is complete. The private look is named half of the time, so that the
    text space can hold a subject's look.
    """

    def keep(probability: float) -> bool:
        return rng is None or rng.random() < probability

    if not keep(0.9):
        return ""
    look, named = scene.look, keep(0.55)
    words = []
    if keep(0.75):
        words.append(scene.attribute)
    if named and keep(0.85):
        words.append(look.colour)
    words.append(scene.category)
    text = " ".join(words)
    text = photo_of(text)
    private = []
    if named and look.pattern != "plain" and keep(0.85):
        noun = {"patch": f"a {look.second} patch"}
        private.append(noun.get(look.pattern, f"{look.second} {look.pattern}"))
    if named and look.accent and keep(0.85):
        private.append(f"a {look.accent} {'collar' if scene.category in ANIMALS else 'base'}")
    if private:
        text += " with " + " and ".join(private)
    if scene.companion and keep(0.85):
        text += f" {COMPANIONS[scene.companion]}"
    if scene.background and keep(0.8):
        text += f" {BACKGROUNDS[scene.background]}"
    return text


def attribute_prompt(attribute: str, subject: str) -> str:
    """Return 'photo of a running sks dog' for an attribute and the words that name a subject."""
    return photo_of(f"{attribute} {subject}")


def vocabulary() -> tuple[str, ...]:
    """Return every word that captions use, in a fixed order (rare tokens not included)."""
    text = ["photo of a an with and collar base spots stripes patch", *COLOURS, *ACCENTS]
    text += [*BACKGROUNDS.values(), *COMPANIONS.values(), *CATEGORIES]
    text += [attribute for values in ATTRIBUTES.values() for attribute in values]
    return tuple(dict.fromkeys(" ".join(text).split()))


# --- pictures ----------------------------------------------------------------------------------


class _Canvas:
    """A supersampled picture with shapes in the unit coordinates of a moved, scaled subject."""

    def __init__(self, scene: Scene, resolution: int) -> None:
        self.side = resolution * _SUPERSAMPLE
        self.scene = scene
        self.image = Image.new("RGB", (self.side, self.side))

    def xy(self, x: float, y: float) -> tuple[float, float]:
        s = self.scene
        return (
            (0.5 + (x - 0.5) * s.size * s.stretch + s.dx) * self.side,
            (0.84 + (y - 0.84) * s.size / s.stretch + s.dy) * self.side,
        )

    def length(self, r: float) -> float:
        return r * self.scene.size * self.side

    def mask(self) -> Image.Image:
        return Image.new("L", (self.side, self.side), 0)

    def paste(self, fill: tuple[int, int, int] | Image.Image, mask: Image.Image) -> None:
        self.image.paste(
            fill, (0, 0, self.side, self.side) if isinstance(fill, tuple) else None, mask
        )


Part = Callable[[_Canvas, ImageDraw.ImageDraw, float], None]
"""A shape that draws itself into a mask, grown by a margin (for the outline)."""


def _ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Part:
    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        points = []
        for k in range(28):
            u = (rx + grow) * math.cos(2 * math.pi * k / 28)
            v = (ry + grow) * math.sin(2 * math.pi * k / 28)
            points.append(c.xy(x + u * cos - v * sin, y + u * sin + v * cos))
        d.polygon(points, fill=255)

    return part


def _line(points: list[tuple[float, float]], width: float) -> Part:
    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        w = c.length(width + 2 * grow)
        xy = [c.xy(*p) for p in points]
        d.line(xy, fill=255, width=max(1, round(w)), joint="curve")
        for px, py in (xy[0], xy[-1]):
            d.ellipse((px - w / 2, py - w / 2, px + w / 2, py + w / 2), fill=255)

    return part


def _polygon(points: list[tuple[float, float]]) -> Part:
    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        cx = sum(p[0] for p in points) / len(points)
        cy = sum(p[1] for p in points) / len(points)
        grown = []
        for px, py in points:
            r = math.hypot(px - cx, py - cy) or 1.0
            grown.append(c.xy(px + (px - cx) / r * grow, py + (py - cy) / r * grow))
        d.polygon(grown, fill=255)

    return part


def _mask(c: _Canvas, parts: list[Part], grow: float = 0.0) -> Image.Image:
    mask = c.mask()
    d = ImageDraw.Draw(mask)
    for part in parts:
        part(c, d, grow)
    return mask


def _paint(c: _Canvas, parts: list[Part], fill: tuple[int, int, int]) -> None:
    c.paste(fill, _mask(c, parts))


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], w: float) -> tuple[int, int, int]:
    return tuple(round(p * (1 - w) + q * w) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _pattern(c: _Canvas, body: list[Part], look: Look, cx: float, cy: float) -> None:
    """Paint the second colour over the body only: spots, stripes or one big patch."""
    if look.pattern == "plain":
        return
    s = look.shift
    if look.pattern == "spots":
        offsets = ((-0.15, -0.04), (-0.03, 0.05), (0.08, -0.05), (0.18, 0.05), (-0.06, -0.13))
        parts = [_ellipse(cx + x + s, cy + y - s, 0.04, 0.04) for x, y in offsets]
        parts += [
            _ellipse(cx + x + s, cy + y, 0.035, 0.035) for x, y in ((-0.13, 0.13), (0.08, 0.16))
        ]
    elif look.pattern == "stripes":
        parts = [
            _line([(cx + x + s - 0.02, cy - 0.3), (cx + x + s + 0.02, cy + 0.3)], 0.034)
            for x in (-0.26, -0.17, -0.08, 0.01, 0.10, 0.19, 0.28)
        ]
    else:
        parts = [_ellipse(cx + 0.03 + s, cy + s, 0.10, 0.10)]
    overlay = Image.composite(_mask(c, parts), c.mask(), _mask(c, body))
    c.paste(COLOURS[look.second], overlay)


def _background(c: _Canvas) -> None:
    n, tint = c.side, c.scene.tint
    d = ImageDraw.Draw(c.image)
    horizon = round((0.60 + 0.04 * (tint - 0.5)) * n)
    name = c.scene.background

    def bands(sky: tuple[int, int, int], ground: tuple[int, int, int]) -> None:
        d.rectangle((0, 0, n, horizon), fill=sky)
        d.rectangle((0, horizon, n, n), fill=ground)

    if name is None:
        tone = _mix((228, 224, 216), (212, 222, 230), tint)
        bands(tone, _mix(tone, (160, 160, 160), 0.22))
    elif name == "beach":
        bands((142, 206, 240), (242, 218, 158))
        d.rectangle((0, round(0.46 * n), n, horizon), fill=(44, 130, 190))
    elif name == "snow":
        bands((186, 198, 214), (250, 252, 255))
        for k in range(14):
            x, y = (k * 0.37 + tint) % 1.0, (k * 0.23 + tint * 0.5) % 0.6
            d.ellipse((x * n, y * n, (x + 0.03) * n, (y + 0.03) * n), fill=(255, 255, 255))
    elif name == "grass":
        bands((170, 220, 250), (104, 178, 70))
        for k in range(12):
            x = (k * 0.083 + tint * 0.08) % 1.0
            d.polygon(
                [
                    (x * n, horizon + 1),
                    ((x + 0.02) * n, horizon - 0.05 * n),
                    ((x + 0.04) * n, horizon + 1),
                ],
                fill=(104, 178, 70),
            )
    else:
        bands((28, 34, 78), (48, 58, 66))
        d.ellipse((0.08 * n, 0.06 * n, 0.24 * n, 0.22 * n), fill=(250, 240, 190))
        for k in range(9):
            x, y = (0.35 + k * 0.29 + tint * 0.2) % 1.0, (0.05 + k * 0.17) % 0.5
            d.ellipse((x * n, y * n, (x + 0.015) * n, (y + 0.015) * n), fill=(250, 250, 230))


def _shadow(c: _Canvas, x: float, width: float) -> None:
    shade = _mask(c, [_ellipse(x, 0.855, width, 0.025)]).point(lambda v: v * 90 // 255)
    c.paste((30, 30, 40), shade)


@dataclass(frozen=True)
class _Species:
    ears: str
    tail: str
    leg: float
    body: float
    snout: float


_SPECIES = {
    "dog": _Species("floppy", "up", 1.0, 1.0, 0.06),
    "cat": _Species("pointed", "curl", 0.95, 0.86, 0.015),
    "rabbit": _Species("long", "stub", 0.75, 0.90, 0.0),
    "fox": _Species("tall", "bushy", 0.9, 0.88, 0.085),
    "stuffed animal": _Species("round", "none", 0.62, 1.15, 0.03),
}


def _pose(
    attribute: str, kind: _Species
) -> tuple[list[Part], list[Part], tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Return body parts, leg parts, head centre, tail root and tail direction of a pose."""
    thick = 0.062 if kind.leg > 0.7 else 0.085
    if kind.ears == "long":
        thick = 0.07
    ry = 0.118 * kind.body
    ground = 0.83
    if attribute in ("standing", "open mouth"):
        y = ground - 0.13 - 0.16 * kind.leg
        legs = [_line([(x, y + 0.05), (x, ground)], thick) for x in (0.31, 0.40, 0.55, 0.63)]
        return (
            [_ellipse(0.47, y, 0.225, ry)],
            legs,
            (0.69, y - 0.16),
            (0.27, y - 0.03),
            (-0.6, -0.8),
        )
    if attribute == "sitting":
        body = [
            _ellipse(0.46, 0.62, 0.135 * kind.body, 0.20, 14),
            _ellipse(0.41, 0.755, 0.16, 0.085),
        ]
        legs = [_line([(x, 0.60), (x + 0.02, ground)], thick) for x in (0.53, 0.60)]
        legs.append(_line([(0.40, 0.815), (0.50, 0.82)], thick * 0.9))
        return body, legs, (0.55, 0.345), (0.28, 0.78), (-0.9, -0.25)
    if attribute == "running":
        y = ground - 0.12 - 0.12 * kind.leg
        reach = 0.17 + 0.06 * kind.leg
        legs = [
            _line([(0.62, y + 0.03), (0.62 + reach, y + 0.13)], thick),
            _line([(0.58, y + 0.04), (0.60 + reach * 0.6, y + 0.20)], thick),
            _line([(0.31, y + 0.03), (0.30 - reach, y + 0.14)], thick),
            _line([(0.35, y + 0.04), (0.33 - reach * 0.6, y + 0.20)], thick),
        ]
        body = [_ellipse(0.46, y, 0.245, ry * 0.86)]
        return body, legs, (0.74, y - 0.10), (0.23, y - 0.04), (-1.0, -0.15)
    y = 0.475
    reach = 0.15 + 0.07 * kind.leg
    legs = [
        _line([(0.60, y - 0.04), (0.60 + reach, y - 0.02)], thick),
        _line([(0.57, y), (0.56 + reach, y + 0.08)], thick),
        _line([(0.36, y + 0.12), (0.36 - reach * 0.8, y + 0.25)], thick),
        _line([(0.41, y + 0.13), (0.40 - reach * 0.4, y + 0.30)], thick),
    ]
    body = [_ellipse(0.475, y + 0.03, 0.215, ry * 0.95, -38)]
    return body, legs, (0.67, y - 0.21), (0.31, y + 0.16), (-0.85, 0.5)


def _draw_animal(c: _Canvas) -> None:
    scene, look = c.scene, c.scene.look
    kind = _SPECIES[scene.category]
    main = COLOURS[look.colour]
    body, legs, (hx, hy), (tx, ty), (ux, uy) = _pose(scene.attribute, kind)
    moving = scene.attribute in ("running", "jumping")
    r = 0.118 if kind.ears != "round" else 0.135
    head = [_ellipse(hx, hy, r, r * 0.92)]
    if kind.snout:
        head.append(_ellipse(hx + r * 0.75, hy + r * 0.32, kind.snout + 0.035, 0.048))
    tail: list[Part] = []
    tip: list[Part] = []
    if kind.tail == "up":
        tail = [_line([(tx, ty), (tx + 0.13 * ux, ty + 0.15 * uy)], 0.045)]
    elif kind.tail == "curl":
        a = (tx + 0.12 * ux, ty + 0.10 * uy)
        tail = [_line([(tx, ty), a, (a[0] - 0.01, a[1] - 0.13)], 0.034)]
    elif kind.tail == "bushy":
        a = (tx + 0.14 * ux, ty + 0.13 * uy)
        tail = [_line([(tx, ty), a], 0.095)]
        tip = [_ellipse(*a, 0.045, 0.045)]
    elif kind.tail == "stub":
        tail = [_ellipse(tx - 0.01, ty, 0.05, 0.05)]
    ears: list[Part] = []
    lean = -0.10 if moving else 0.0
    if kind.ears == "floppy":
        ears = [
            _ellipse(hx - r * 0.85 + lean * 0.5, hy + 0.01, 0.045, 0.09, 12 if not moving else 60)
        ]
    elif kind.ears in ("pointed", "tall"):
        h = 0.10 if kind.ears == "pointed" else 0.15
        for x in (-0.065, 0.05):
            ears.append(
                _polygon(
                    [
                        (hx + x - 0.045, hy - 0.05),
                        (hx + x + 0.05, hy - 0.06),
                        (hx + x + lean * 0.3, hy - 0.08 - h),
                    ]
                )
            )
    elif kind.ears == "long":
        for x in (-0.05, 0.03):
            ears.append(
                _line(
                    [
                        (hx + x, hy - 0.06),
                        (hx + x + 1.5 * lean, hy - (0.27 if not moving else 0.20)),
                    ],
                    0.055,
                )
            )
    else:
        ears = [_ellipse(hx + x, hy - 0.105, 0.052, 0.052) for x in (-0.09, 0.075)]

    far, near = legs[1::2], legs[0::2]
    _shadow(c, 0.47, 0.26 if scene.attribute != "jumping" else 0.18)
    silhouette = tail + legs + body + ears + head
    c.paste(_OUTLINE, _mask(c, silhouette, grow=0.013))
    _paint(c, far, _mix(main, _OUTLINE, 0.25))
    _paint(c, tail + near + body, main)
    if tip:
        _paint(c, tip, COLOURS["white"] if look.colour != "white" else COLOURS["black"])
    pattern_centre = (
        (0.46, 0.62)
        if scene.attribute == "sitting"
        else (0.47, 0.505 if scene.attribute == "jumping" else 0.56)
    )
    _pattern(c, body, look, *pattern_centre)
    dark_ear = _mix(main, _OUTLINE, 0.35)
    _paint(c, ears, dark_ear if kind.ears == "floppy" else main)
    if look.accent:
        if scene.attribute == "running":  # between ear and leg, across the body
            band = _ellipse(hx - 0.115, hy + 0.07, 0.115, 0.055, 62)
            collar = Image.composite(_mask(c, [band]), c.mask(), _mask(c, body))
        else:
            near_head = 0.56 if kind.ears == "round" else 0.66
            x = hx * near_head + (pattern_centre[0] + 0.06) * (1 - near_head)
            y = hy * (near_head - 0.06) + pattern_centre[1] * (1.06 - near_head)
            collar = _mask(
                c, [_ellipse(x, y, 0.125, 0.062, 5 if scene.attribute == "sitting" else 28)]
            )
        c.paste(ACCENTS[look.accent], collar)
    _paint(c, head, main)
    if kind.ears == "floppy":
        _paint(c, ears, dark_ear)
    if look.pattern == "patch":
        eye_patch = Image.composite(
            _mask(c, [_ellipse(hx + 0.04, hy - 0.03, 0.058, 0.058)]), c.mask(), _mask(c, head)
        )
        c.paste(COLOURS[look.second], eye_patch)
    _face(c, kind, hx, hy, r)
    if kind.ears == "round":
        stitch = [
            _line([(x, y), (x + 0.025, y + 0.025)], 0.012)
            for x, y in ((hx - 0.09, hy + 0.03), (hx - 0.07, hy + 0.06))
        ]
        _paint(c, stitch, (250, 240, 220))


def _face(c: _Canvas, kind: _Species, hx: float, hy: float, r: float) -> None:
    dark = c.scene.look.colour == "black"
    eye, glint = ((250, 246, 220), _OUTLINE) if dark else (_OUTLINE, (255, 255, 255))
    size = 0.026 if kind.ears != "round" else 0.034
    for x in (-0.02, 0.06):
        _paint(c, [_ellipse(hx + x, hy - 0.025, size, size)], eye)
        _paint(c, [_ellipse(hx + x + 0.006, hy - 0.032, 0.009, 0.009)], glint)
    nose_x = hx + (r * 0.75 + kind.snout if kind.snout else 0.05)
    nose_y = hy + (0.03 if kind.snout else 0.035)
    _paint(c, [_ellipse(nose_x, nose_y, 0.022, 0.017)], (230, 120, 140) if dark else (60, 40, 44))
    if c.scene.attribute == "open mouth":
        x, y = hx + 0.045 + kind.snout * 0.6, hy + 0.115
        mouth = [_ellipse(x, y, 0.085, 0.085)]
        c.paste(_OUTLINE, _mask(c, mouth, grow=0.014))
        _paint(c, mouth, (160, 24, 40))
        tongue = [_ellipse(x + 0.008, y + 0.062, 0.052, 0.068)]
        c.paste(_OUTLINE, _mask(c, tongue, grow=0.008))
        _paint(c, tongue, (248, 120, 140))


def _material(c: _Canvas, parts: list[Part], colour: tuple[int, int, int], attribute: str) -> None:
    """Fill an object: flat, or with the bands of light that read as metal, gold or glass."""
    mask = _mask(c, parts)
    if attribute == "glass":
        c.paste((255, 255, 255), _mask(c, parts, grow=0.012).point(lambda v: v * 150 // 255))
        c.paste(_mix((196, 232, 244), colour, 0.25), mask.point(lambda v: v * 165 // 255))
        shine = [
            _line([(0.36, 0.40), (0.33, 0.72)], 0.03),
            _line([(0.64, 0.46), (0.66, 0.60)], 0.018),
        ]
        c.paste((255, 255, 255), Image.composite(_mask(c, shine), c.mask(), mask))
        return
    c.paste(_OUTLINE, _mask(c, parts, grow=0.013))
    if attribute == "plain":
        c.paste(colour, mask)
        return
    base, light, deep = {
        "golden": ((232, 178, 32), (255, 240, 150), (160, 108, 10)),
        "metal": ((146, 158, 178), (248, 251, 255), (66, 76, 98)),
    }[attribute]
    c.paste(base, mask)
    for x, w, tone in (
        (0.30, 0.07, deep),
        (0.40, 0.06, light),
        (0.62, 0.035, light),
        (0.72, 0.09, deep),
    ):
        band = [_line([(x + 0.03, 0.1), (x - 0.03, 0.9)], w)]
        c.paste(tone, Image.composite(_mask(c, band), c.mask(), mask))


def _cherries(c: _Canvas, x: float, y: float) -> None:
    _paint(
        c,
        [
            _line([(x, y), (x + 0.04, y - 0.10)], 0.014),
            _line([(x + 0.08, y), (x + 0.04, y - 0.10)], 0.014),
        ],
        (60, 120, 50),
    )
    fruit = [_ellipse(x, y, 0.048, 0.048), _ellipse(x + 0.085, y + 0.01, 0.048, 0.048)]
    c.paste(_OUTLINE, _mask(c, fruit, grow=0.01))
    _paint(c, fruit, (206, 22, 52))
    _paint(c, [_ellipse(x - 0.012, y - 0.014, 0.013, 0.013)], (255, 220, 225))


def _draw_object(c: _Canvas) -> None:
    scene, look, name = c.scene, c.scene.look, c.scene.category
    colour = COLOURS[look.colour]
    accent = ACCENTS[look.accent] if look.accent else _mix(colour, _OUTLINE, 0.4)
    _shadow(c, 0.5, 0.27)
    if name == "candle":
        _draw_candle(c, colour, accent)
        return
    if name == "bowl":
        angles = [math.pi * k / 16 for k in range(17)]
        bulb = [(0.5 + 0.31 * math.cos(a), 0.52 + 0.27 * math.sin(a)) for a in angles]
        body, centre = [_polygon(bulb)], (0.5, 0.63)
        base = [_polygon([(0.40, 0.77), (0.60, 0.77), (0.63, 0.845), (0.37, 0.845)])]
        extra: list[Part] = [_ellipse(0.5, 0.52, 0.31, 0.055)]
    elif name == "teapot":
        body, centre = [_ellipse(0.48, 0.62, 0.22, 0.185)], (0.48, 0.62)
        spout = _line([(0.66, 0.66), (0.76, 0.56), (0.84, 0.46)], 0.066)
        handle = _line([(0.30, 0.53), (0.17, 0.54), (0.17, 0.70), (0.30, 0.72)], 0.042)
        lid = [_ellipse(0.48, 0.445, 0.11, 0.035), _ellipse(0.48, 0.395, 0.035, 0.035)]
        body, extra = [*body, spout, handle], lid
        base = [_polygon([(0.38, 0.785), (0.58, 0.785), (0.60, 0.845), (0.36, 0.845)])]
    else:
        body = [
            _ellipse(0.5, 0.60, 0.165, 0.20),
            _polygon([(0.43, 0.50), (0.57, 0.50), (0.56, 0.26), (0.44, 0.26)]),
        ]
        centre = (0.5, 0.60)
        extra = [_ellipse(0.5, 0.255, 0.10, 0.032)]
        base = [_polygon([(0.42, 0.775), (0.58, 0.775), (0.61, 0.845), (0.39, 0.845)])]
    fill = scene.attribute
    c.paste(_OUTLINE, _mask(c, base, grow=0.013))
    _paint(c, base, accent)
    if name == "bowl" and scene.companion == "cherries":
        _cherries(c, 0.40, 0.47)
        _cherries(c, 0.54, 0.45)
    _material(c, body, colour, fill)
    _pattern(c, body[:1], look, *centre)
    if name != "bowl":
        _material(c, extra, colour, fill)
    else:
        c.paste(_OUTLINE, _mask(c, [_line([(0.20, 0.52), (0.80, 0.52)], 0.03)], grow=0.004))
        tone = {"golden": (255, 226, 110), "metal": (226, 232, 240), "glass": (236, 248, 252)}
        _paint(
            c,
            [_line([(0.20, 0.52), (0.80, 0.52)], 0.026)],
            tone.get(fill, _mix(colour, (255, 255, 255), 0.35)),
        )
    if scene.companion == "cherries" and name != "bowl":
        _cherries(c, 0.78, 0.80)


def _draw_candle(c: _Canvas, colour: tuple[int, int, int], accent: tuple[int, int, int]) -> None:
    scene = c.scene
    top = 0.60 if scene.attribute == "melted" else 0.36
    base = [_ellipse(0.5, 0.825, 0.21, 0.038)]
    body = [_polygon([(0.39, top), (0.61, top), (0.61, 0.81), (0.39, 0.81)])]
    if scene.attribute == "melted":
        body += [
            _ellipse(0.5, 0.80, 0.19, 0.05),
            _ellipse(0.42, 0.63, 0.06, 0.06),
            _ellipse(0.57, 0.65, 0.07, 0.07),
        ]
        body += [
            _line([(0.37, 0.66), (0.35, 0.79)], 0.05),
            _line([(0.63, 0.68), (0.66, 0.79)], 0.05),
        ]
    c.paste(_OUTLINE, _mask(c, base, grow=0.013))
    _paint(c, base, accent)
    _material(c, body, colour, "plain")
    _pattern(c, body[:1], scene.look, 0.5, 0.62)
    _paint(c, [_line([(0.5, top), (0.5, top - 0.07)], 0.02)], _OUTLINE)
    if scene.attribute == "burning":
        glow = _mask(c, [_ellipse(0.5, 0.22, 0.19, 0.19)]).point(lambda v: v * 110 // 255)
        c.paste((255, 236, 150), glow)
        _paint(
            c,
            [
                _ellipse(0.5, 0.225, 0.062, 0.085),
                _polygon([(0.445, 0.20), (0.555, 0.20), (0.5, 0.07)]),
            ],
            (248, 140, 28),
        )
        _paint(c, [_ellipse(0.5, 0.245, 0.034, 0.052)], (255, 238, 110))
    if scene.companion == "cherries":
        _cherries(c, 0.76, 0.80)


def draw(scene: Scene, resolution: int = RESOLUTION) -> Image.Image:
    """Paint a scene as an antialiased RGB picture of `resolution` x `resolution` pixels."""
    c = _Canvas(scene, resolution)
    _background(c)
    if scene.category in ANIMALS:
        _draw_animal(c)
    else:
        _draw_object(c)
    if scene.companion == "ball":
        ball = [_ellipse(0.86, 0.79, 0.065, 0.065)]
        c.paste(_OUTLINE, _mask(c, ball, grow=0.012))
        _paint(c, ball, (226, 60, 60))
        _paint(c, [_line([(0.80, 0.80), (0.92, 0.78)], 0.026)], (255, 255, 255))
    return c.image.resize((resolution, resolution), Image.Resampling.BOX)
