"""Pictures whose category, public attribute and private look are known exactly.

A `Scene` says what `draw` paints: the category ("dog"), its public attribute ("running", shared by
all dogs) and the private look (two colours, a pattern, a collar) that makes one dog *your* dog.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

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
COLOURS: dict[str, Colour] = {
    "brown": (142, 92, 48),
    "white": (246, 244, 238),
    "black": (52, 50, 56),
    "grey": (148, 150, 156),
    "orange": (238, 138, 52),
    "blue": (86, 128, 222),
    "pink": (242, 152, 190),
    "green": (98, 176, 98),
}
ACCENTS: dict[str, Colour] = {
    "red": (212, 48, 48),
    "yellow": (248, 210, 62),
    "purple": (142, 84, 196),
    "teal": (42, 168, 172),
}
RESOLUTION = 64
_SUPERSAMPLE = 4
_OUTLINE, _SHADOW, _WHITE = (40, 36, 44), (30, 30, 40), (255, 255, 255)


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
        second = f", {self.second} {self.pattern}" if self.pattern != "plain" else ""
        return self.colour + second + (f", {self.accent} accent" if self.accent else "")


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
            names = ", ".join(CATEGORIES)
            raise ValueError(f"Unknown category {self.category!r}: choose one of {names}.")
        if self.attribute not in ATTRIBUTES[self.category]:
            says = f"A {self.category} cannot be {self.attribute!r}"
            raise ValueError(f"{says}: choose one of {', '.join(ATTRIBUTES[self.category])}.")


def sample_look(rng: random.Random) -> Look:
    """Draw a private look; the second colour always differs from the first."""
    colour, second = rng.sample(tuple(COLOURS), 2)
    pattern, accent = rng.choice(PATTERNS), rng.choice((None, *ACCENTS))
    return Look(colour, second, pattern, accent, shift=rng.uniform(-0.03, 0.03))


def sample_scene(rng: random.Random, category: str | None = None) -> Scene:
    """Draw a scene of one category (or of any), with the free variation of the training set."""
    category = category or rng.choice(CATEGORIES)
    fitting = "ball" if category in ANIMALS else "cherries"
    companion = fitting if rng.random() < 0.15 else None
    attribute, look = rng.choice(ATTRIBUTES[category]), sample_look(rng)
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.5 else None
    return vary(Scene(category, attribute, look, background, companion), rng)


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


# --- pictures ----------------------------------------------------------------------------------


class _Canvas:
    """A supersampled picture with shapes in the unit coordinates of a moved, scaled subject."""

    def __init__(self, scene: Scene, resolution: int) -> None:
        self.scene, self.side = scene, resolution * _SUPERSAMPLE
        self.image = Image.new("RGB", (self.side, self.side))

    def xy(self, x: float, y: float) -> Point:
        s = self.scene
        u = 0.5 + (x - 0.5) * s.size * s.stretch + s.dx
        v = 0.84 + (y - 0.84) * s.size / s.stretch + s.dy
        return u * self.side, v * self.side

    def mask(self, parts: Parts, grow: float = 0.0) -> Image.Image:
        mask = Image.new("L", self.image.size, 0)
        for part in parts:
            part(self, ImageDraw.Draw(mask), grow)
        return mask

    def fill(
        self, colour: Colour, *parts: Part, grow: float = 0, within: Parts = (), opacity: int = 255
    ) -> None:
        """Paint parts, grown by a margin; only where they lie within others; `opacity` of 255."""
        if not parts:
            return
        mask = self.mask(parts, grow)
        if within:
            mask = Image.composite(mask, self.mask([]), self.mask(within))
        if opacity < 255:
            mask = mask.point(lambda v: v * opacity // 255)
        self.image.paste(colour, (0, 0, self.side, self.side), mask)

    def outlined(self, colour: Colour, *parts: Part, grow: float = 0.013) -> None:
        self.fill(_OUTLINE, *parts, grow=grow)
        self.fill(colour, *parts)


Part = Callable[[_Canvas, ImageDraw.ImageDraw, float], None]
"""A shape that draws itself into a mask, grown by a margin (for the outline)."""
Parts = Sequence[Part]


def _ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Part:
    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turns = [2 * math.pi * k / 28 for k in range(28)]
        around = [((rx + grow) * math.cos(a), (ry + grow) * math.sin(a)) for a in turns]
        d.polygon([c.xy(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in around], 255)

    return part


def _circle(x: float, y: float, radius: float) -> Part:
    return _ellipse(x, y, radius, radius)


def _line(width: float, *points: Point) -> Part:
    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        w = (width + 2 * grow) * c.scene.size * c.side
        xy = [c.xy(*p) for p in points]
        d.line(xy, fill=255, width=max(1, round(w)), joint="curve")
        for px, py in (xy[0], xy[-1]):
            d.ellipse((px - w / 2, py - w / 2, px + w / 2, py + w / 2), fill=255)

    return part


def _polygon(*points: Point) -> Part:
    cx, cy = (sum(places) / len(points) for places in zip(*points, strict=True))
    far = [(x, y, math.hypot(x - cx, y - cy)) for x, y in points]

    def part(c: _Canvas, d: ImageDraw.ImageDraw, grow: float) -> None:
        d.polygon([c.xy(x + (x - cx) / r * grow, y + (y - cy) / r * grow) for x, y, r in far], 255)

    return part


def _mix(a: Colour, b: Colour, w: float) -> Colour:
    return tuple(round(p * (1 - w) + q * w) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _pattern(c: _Canvas, body: list[Part], cx: float, cy: float) -> None:
    """Paint the second colour over the body only: spots, stripes or one big patch."""
    look, s, parts = c.scene.look, c.scene.look.shift, list[Part]()
    if look.pattern == "spots":
        offsets = ((-0.15, -0.04), (-0.03, 0.05), (0.08, -0.05), (0.18, 0.05), (-0.06, -0.13))
        parts += [_circle(cx + x + s, cy + y - s, 0.04) for x, y in offsets]
        parts += [_circle(cx + x + s, cy + y, 0.035) for x, y in ((-0.13, 0.13), (0.08, 0.16))]
    elif look.pattern == "stripes":
        across = [cx + x + s for x in (-0.26, -0.17, -0.08, 0.01, 0.10, 0.19, 0.28)]
        parts += [_line(0.034, (x - 0.02, cy - 0.3), (x + 0.02, cy + 0.3)) for x in across]
    elif look.pattern == "patch":
        parts.append(_circle(cx + 0.03 + s, cy + s, 0.10))
    c.fill(COLOURS[look.second], *parts, within=body)


def _background(c: _Canvas) -> None:
    n, tint, name = c.side, c.scene.tint, c.scene.background
    d = ImageDraw.Draw(c.image)
    horizon = round((0.60 + 0.04 * (tint - 0.5)) * n)
    tone = _mix((228, 224, 216), (212, 222, 230), tint)
    sky, ground = {
        None: (tone, _mix(tone, (160, 160, 160), 0.22)),
        "beach": ((142, 206, 240), (242, 218, 158)),
        "snow": ((186, 198, 214), (250, 252, 255)),
        "grass": ((170, 220, 250), (104, 178, 70)),
        "night": ((28, 34, 78), (48, 58, 66)),
    }[name]
    d.rectangle((0, 0, n, horizon), fill=sky)
    d.rectangle((0, horizon, n, n), fill=ground)
    if name == "beach":
        d.rectangle((0, round(0.46 * n), n, horizon), fill=(44, 130, 190))
    elif name == "snow":
        for k in range(14):
            x, y = (k * 0.37 + tint) % 1.0, (k * 0.23 + tint * 0.5) % 0.6
            d.ellipse((x * n, y * n, (x + 0.03) * n, (y + 0.03) * n), fill=_WHITE)
    elif name == "grass":
        for k in range(12):
            x = (k * 0.083 + tint * 0.08) % 1.0
            left, right = (x * n, horizon + 1), ((x + 0.04) * n, horizon + 1)
            d.polygon([left, ((x + 0.02) * n, horizon - 0.05 * n), right], fill=ground)
    elif name == "night":
        d.ellipse((0.08 * n, 0.06 * n, 0.24 * n, 0.22 * n), fill=(250, 240, 190))
        for k in range(9):
            x, y = (0.35 + k * 0.29 + tint * 0.2) % 1.0, (0.05 + k * 0.17) % 0.5
            d.ellipse((x * n, y * n, (x + 0.015) * n, (y + 0.015) * n), fill=(250, 250, 230))


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


@dataclass(frozen=True)
class _Pose:
    body: list[Part]
    legs: list[Part]
    """Near and far ones by turns."""
    head: Point
    tail: Point
    tail_direction: Point
    centre: Point = (0.47, 0.56)
    """Of the pattern."""


def _pose(attribute: str, kind: _Species) -> _Pose:
    thick = {"long": 0.07, "round": 0.085}.get(kind.ears, 0.062)
    ry, ground = 0.118 * kind.body, 0.83
    if attribute in ("standing", "open mouth"):
        y = ground - 0.13 - 0.16 * kind.leg
        legs = [_line(thick, (x, y + 0.05), (x, ground)) for x in (0.31, 0.40, 0.55, 0.63)]
        body = [_ellipse(0.47, y, 0.225, ry)]
        return _Pose(body, legs, (0.69, y - 0.16), (0.27, y - 0.03), (-0.6, -0.8))
    if attribute == "sitting":
        body = [_ellipse(0.46, 0.62, 0.135 * kind.body, 0.20, 14)]
        body.append(_ellipse(0.41, 0.755, 0.16, 0.085))
        legs = [_line(thick, (x, 0.60), (x + 0.02, ground)) for x in (0.53, 0.60)]
        legs.append(_line(thick * 0.9, (0.40, 0.815), (0.50, 0.82)))
        return _Pose(body, legs, (0.55, 0.345), (0.28, 0.78), (-0.9, -0.25), (0.46, 0.62))
    if attribute == "running":
        y, reach = ground - 0.12 - 0.12 * kind.leg, 0.17 + 0.06 * kind.leg
        legs = [
            _line(thick, (0.62, y + 0.03), (0.62 + reach, y + 0.13)),
            _line(thick, (0.58, y + 0.04), (0.60 + reach * 0.6, y + 0.20)),
            _line(thick, (0.31, y + 0.03), (0.30 - reach, y + 0.14)),
            _line(thick, (0.35, y + 0.04), (0.33 - reach * 0.6, y + 0.20)),
        ]
        body = [_ellipse(0.46, y, 0.245, ry * 0.86)]
        return _Pose(body, legs, (0.74, y - 0.10), (0.23, y - 0.04), (-1.0, -0.15))
    y, reach = 0.475, 0.15 + 0.07 * kind.leg
    legs = [
        _line(thick, (0.60, y - 0.04), (0.60 + reach, y - 0.02)),
        _line(thick, (0.57, y), (0.56 + reach, y + 0.08)),
        _line(thick, (0.36, y + 0.12), (0.36 - reach * 0.8, y + 0.25)),
        _line(thick, (0.41, y + 0.13), (0.40 - reach * 0.4, y + 0.30)),
    ]
    body = [_ellipse(0.475, y + 0.03, 0.215, ry * 0.95, -38)]
    return _Pose(body, legs, (0.67, y - 0.21), (0.31, y + 0.16), (-0.85, 0.5), (0.47, 0.505))


def _tail(kind: _Species, pose: _Pose) -> tuple[list[Part], list[Part]]:
    """Return the tail, and the tip that a bushy one has."""
    (x, y), (ux, uy) = pose.tail, pose.tail_direction
    if kind.tail == "up":
        return [_line(0.045, (x, y), (x + 0.13 * ux, y + 0.15 * uy))], []
    if kind.tail == "curl":
        bend = (x + 0.12 * ux, y + 0.10 * uy)
        return [_line(0.034, (x, y), bend, (bend[0] - 0.01, bend[1] - 0.13))], []
    if kind.tail == "bushy":
        end = (x + 0.14 * ux, y + 0.13 * uy)
        return [_line(0.095, (x, y), end)], [_circle(*end, 0.045)]
    return [_circle(x - 0.01, y, 0.05)] if kind.tail == "stub" else [], []


def _ears(kind: _Species, hx: float, hy: float, r: float, moving: bool) -> list[Part]:
    lean = -0.10 if moving else 0.0
    if kind.ears == "floppy":
        turn = 60 if moving else 12
        return [_ellipse(hx - r * 0.85 + lean * 0.5, hy + 0.01, 0.045, 0.09, turn)]
    if kind.ears == "long":
        tip = hy - (0.20 if moving else 0.27)
        roots = (hx - 0.05, hx + 0.03)
        return [_line(0.055, (x, hy - 0.06), (x + 1.5 * lean, tip)) for x in roots]
    if kind.ears == "round":
        return [_circle(hx + x, hy - 0.105, 0.052) for x in (-0.09, 0.075)]
    tip, roots = hy - 0.08 - (0.10 if kind.ears == "pointed" else 0.15), (hx - 0.065, hx + 0.05)
    sides = [((x - 0.045, hy - 0.05), (x + 0.05, hy - 0.06), (x + lean * 0.3, tip)) for x in roots]
    return [_polygon(*side) for side in sides]


def _draw_animal(c: _Canvas) -> None:
    attribute, look = c.scene.attribute, c.scene.look
    kind, main = _SPECIES[c.scene.category], COLOURS[look.colour]
    pose, is_round = _pose(attribute, kind), kind.ears == "round"
    body, legs, (hx, hy), (cx, cy) = pose.body, pose.legs, pose.head, pose.centre
    r = 0.135 if is_round else 0.118
    head = [_ellipse(hx, hy, r, r * 0.92)]
    if kind.snout:
        head.append(_ellipse(hx + r * 0.75, hy + r * 0.32, kind.snout + 0.035, 0.048))
    tail, tip = _tail(kind, pose)
    ears = _ears(kind, hx, hy, r, moving=attribute in ("running", "jumping"))

    shadow = _ellipse(0.47, 0.855, 0.26 if attribute != "jumping" else 0.18, 0.025)
    c.fill(_SHADOW, shadow, opacity=90)
    c.fill(_OUTLINE, *tail, *legs, *body, *ears, *head, grow=0.013)
    c.fill(_mix(main, _OUTLINE, 0.25), *legs[1::2])
    c.fill(main, *tail, *legs[0::2], *body)
    c.fill(COLOURS["white" if look.colour != "white" else "black"], *tip)
    _pattern(c, body, cx, cy)
    ear_colour = _mix(main, _OUTLINE, 0.35) if kind.ears == "floppy" else main
    c.fill(ear_colour, *ears)
    if look.accent and attribute == "running":  # between ear and leg, across the body
        c.fill(ACCENTS[look.accent], _ellipse(hx - 0.115, hy + 0.07, 0.115, 0.055, 62), within=body)
    elif look.accent:
        near_head = 0.56 if is_round else 0.66
        x = hx * near_head + (cx + 0.06) * (1 - near_head)
        y = hy * (near_head - 0.06) + cy * (1.06 - near_head)
        turn = 5 if attribute == "sitting" else 28
        c.fill(ACCENTS[look.accent], _ellipse(x, y, 0.125, 0.062, turn))
    c.fill(main, *head)
    if kind.ears == "floppy":
        c.fill(ear_colour, *ears)
    if look.pattern == "patch":
        c.fill(COLOURS[look.second], _circle(hx + 0.04, hy - 0.03, 0.058), within=head)
    _face(c, kind, hx, hy, r)
    if is_round:
        ends = ((hx - 0.09, hy + 0.03), (hx - 0.07, hy + 0.06))
        c.fill((250, 240, 220), *(_line(0.012, (x, y), (x + 0.025, y + 0.025)) for x, y in ends))


def _face(c: _Canvas, kind: _Species, hx: float, hy: float, r: float) -> None:
    dark = c.scene.look.colour == "black"
    eye, glint = ((250, 246, 220), _OUTLINE) if dark else (_OUTLINE, _WHITE)
    for x in (hx - 0.02, hx + 0.06):
        c.fill(eye, _circle(x, hy - 0.025, 0.026 if kind.ears != "round" else 0.034))
        c.fill(glint, _circle(x + 0.006, hy - 0.032, 0.009))
    x, y = (r * 0.75 + kind.snout, 0.03) if kind.snout else (0.05, 0.035)
    c.fill((230, 120, 140) if dark else (60, 40, 44), _ellipse(hx + x, hy + y, 0.022, 0.017))
    if c.scene.attribute == "open mouth":
        x, y = hx + 0.045 + kind.snout * 0.6, hy + 0.115
        c.outlined((160, 24, 40), _circle(x, y, 0.085), grow=0.014)
        c.outlined((248, 120, 140), _ellipse(x + 0.008, y + 0.062, 0.052, 0.068), grow=0.008)


_BANDS = ((0.30, 0.07, "deep"), (0.40, 0.06, "light"), (0.62, 0.035, "light"), (0.72, 0.09, "deep"))
_METALS: dict[str, dict[str, Colour]] = {
    "golden": {"base": (232, 178, 32), "light": (255, 240, 150), "deep": (160, 108, 10)},
    "metal": {"base": (146, 158, 178), "light": (248, 251, 255), "deep": (66, 76, 98)},
}


def _material(c: _Canvas, parts: list[Part], colour: Colour) -> None:
    """Fill an object: flat, or with the bands of light that read as metal, gold or glass."""
    if c.scene.attribute == "glass":
        c.fill(_WHITE, *parts, grow=0.012, opacity=150)
        c.fill(_mix((196, 232, 244), colour, 0.25), *parts, opacity=165)
        shine = (_line(0.03, (0.36, 0.40), (0.33, 0.72)), _line(0.018, (0.64, 0.46), (0.66, 0.60)))
        c.fill(_WHITE, *shine, within=parts)
    elif tones := _METALS.get(c.scene.attribute):
        c.outlined(tones["base"], *parts)
        for x, width, tone in _BANDS:
            c.fill(tones[tone], _line(width, (x + 0.03, 0.1), (x - 0.03, 0.9)), within=parts)
    else:
        c.outlined(colour, *parts)


def _cherries(c: _Canvas, *places: Point) -> None:
    for x, y in places:
        top, other = (x + 0.04, y - 0.10), _circle(x + 0.085, y + 0.01, 0.048)
        c.fill((60, 120, 50), _line(0.014, (x, y), top), _line(0.014, (x + 0.08, y), top))
        c.outlined((206, 22, 52), _circle(x, y, 0.048), other, grow=0.01)
        c.fill((255, 220, 225), _circle(x - 0.012, y - 0.014, 0.013))


def _draw_object(c: _Canvas) -> None:
    look, name, attribute = c.scene.look, c.scene.category, c.scene.attribute
    colour = COLOURS[look.colour]
    accent = ACCENTS[look.accent] if look.accent else _mix(colour, _OUTLINE, 0.4)
    fruit, lid = [(0.78, 0.80)], list[Part]()
    top = 0.60 if attribute == "melted" else 0.36
    if name == "candle":
        body, centre = [_polygon((0.39, top), (0.61, top), (0.61, 0.81), (0.39, 0.81))], (0.5, 0.62)
        base, fruit = _ellipse(0.5, 0.825, 0.21, 0.038), [(0.76, 0.80)]
        if attribute == "melted":
            body += [_ellipse(0.5, 0.80, 0.19, 0.05), _circle(0.42, 0.63, 0.06)]
            body += [_circle(0.57, 0.65, 0.07), _line(0.05, (0.37, 0.66), (0.35, 0.79))]
            body.append(_line(0.05, (0.63, 0.68), (0.66, 0.79)))
    elif name == "bowl":
        angles = [math.pi * k / 16 for k in range(17)]
        bulb = [(0.5 + 0.31 * math.cos(a), 0.52 + 0.27 * math.sin(a)) for a in angles]
        body, centre, fruit = [_polygon(*bulb)], (0.5, 0.63), [(0.40, 0.47), (0.54, 0.45)]
        base = _polygon((0.40, 0.77), (0.60, 0.77), (0.63, 0.845), (0.37, 0.845))
    elif name == "teapot":
        body, centre = [_ellipse(0.48, 0.62, 0.22, 0.185)], (0.48, 0.62)
        body.append(_line(0.066, (0.66, 0.66), (0.76, 0.56), (0.84, 0.46)))  # the spout
        body.append(_line(0.042, (0.30, 0.53), (0.17, 0.54), (0.17, 0.70), (0.30, 0.72)))
        lid = [_ellipse(0.48, 0.445, 0.11, 0.035), _circle(0.48, 0.395, 0.035)]
        base = _polygon((0.38, 0.785), (0.58, 0.785), (0.60, 0.845), (0.36, 0.845))
    else:
        body, centre = [_ellipse(0.5, 0.60, 0.165, 0.20)], (0.5, 0.60)
        body.append(_polygon((0.43, 0.50), (0.57, 0.50), (0.56, 0.26), (0.44, 0.26)))
        lid = [_ellipse(0.5, 0.255, 0.10, 0.032)]
        base = _polygon((0.42, 0.775), (0.58, 0.775), (0.61, 0.845), (0.39, 0.845))
    c.fill(_SHADOW, _ellipse(0.5, 0.855, 0.27, 0.025), opacity=90)
    c.outlined(accent, base)
    fruit = fruit if c.scene.companion == "cherries" else []
    if name == "bowl":
        _cherries(c, *fruit)
    _material(c, body, colour)
    _pattern(c, body[:1], *centre)
    if name == "bowl":
        rim = ((0.20, 0.52), (0.80, 0.52))
        tones = {"golden": (255, 226, 110), "metal": (226, 232, 240), "glass": (236, 248, 252)}
        c.fill(_OUTLINE, _line(0.03, *rim), grow=0.004)
        c.fill(tones.get(attribute, _mix(colour, _WHITE, 0.35)), _line(0.026, *rim))
        return
    if name == "candle":
        c.fill(_OUTLINE, _line(0.02, (0.5, top), (0.5, top - 0.07)))
    if attribute == "burning":
        c.fill((255, 236, 150), _circle(0.5, 0.22, 0.19), opacity=110)
        tip = _polygon((0.445, 0.20), (0.555, 0.20), (0.5, 0.07))
        c.fill((248, 140, 28), _ellipse(0.5, 0.225, 0.062, 0.085), tip)
        c.fill((255, 238, 110), _ellipse(0.5, 0.245, 0.034, 0.052))
    _material(c, lid, colour)
    _cherries(c, *fruit)


def draw(scene: Scene, resolution: int = RESOLUTION) -> Image.Image:
    """Paint a scene as an antialiased RGB picture of `resolution` x `resolution` pixels."""
    c = _Canvas(scene, resolution)
    _background(c)
    (_draw_animal if scene.category in ANIMALS else _draw_object)(c)
    if scene.companion == "ball":
        c.outlined((226, 60, 60), _circle(0.86, 0.79, 0.065), grow=0.012)
        c.fill(_WHITE, _line(0.026, (0.80, 0.80), (0.92, 0.78)))
    return c.image.resize((resolution, resolution), Image.Resampling.BOX)
