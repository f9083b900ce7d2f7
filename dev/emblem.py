"""Draws the icon and the banner that the registry shows: `python dev.py run -m dev.emblem` writes them into docs/.

Two objects, the heat map of a word, and the arrow along which steering moves an object.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .environment import ROOT

ICON, BANNER = ROOT / "docs" / "icon.png", ROOT / "docs" / "banner.png"
ICON_SIZE = 400
BANNER_SIZE = (1680, 720)  # 21:9
OVERSAMPLING = 4

NIGHT, CELL = (17, 19, 33), (30, 33, 54)
HEAT = (CELL, (68, 38, 110), (160, 44, 104), (230, 92, 66), (250, 176, 62))
BALL, BALL_LIGHT = (64, 196, 190), (190, 240, 232)
BOX, BOX_SIDE, BOX_TOP = (122, 138, 240), (84, 98, 196), (166, 178, 252)
WHITE, GREY = (244, 245, 252), (166, 171, 200)
CELLS = 8

Point = tuple[float, float]
Colour = tuple[int, int, int]


def heat(value: float) -> Colour:
    """The colour of a map's value, 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(HEAT) - 1)
    index = min(int(place), len(HEAT) - 2)
    share = place - index
    return tuple(round(a + share * (b - a)) for a, b in zip(HEAT[index], HEAT[index + 1], strict=True))


class Scene:
    """Draws in a square of side 1 that lies at `corner` of the picture and is `side` pixels large."""

    def __init__(self, image: Image.Image, corner: Point, side: float) -> None:
        self.draw, self.corner, self.side = ImageDraw.Draw(image), corner, side

    def at(self, *points: Point) -> list[Point]:
        return [(self.corner[0] + x * self.side, self.corner[1] + y * self.side) for x, y in points]

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float) -> None:
        self.draw.rounded_rectangle([*self.at((x0, y0))[0], *self.at((x1, y1))[0]], radius * self.side, fill)

    def disc(self, centre: Point, radius: float, fill: Colour) -> None:
        (x, y), r = centre, radius
        self.draw.ellipse([*self.at((x - r, y - r))[0], *self.at((x + r, y + r))[0]], fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        self.draw.line(self.at(*points), fill, round(width * self.side), joint="curve")
        for end in (points[0], points[-1]):
            self.disc(end, width / 2, fill)

    def heat_map(self, peak: Point, spread: float) -> None:
        """Cells of an attention map whose word is at `peak`."""
        pitch, gap = 1 / CELLS, 0.012
        for row in range(CELLS):
            for column in range(CELLS):
                x, y = (column + 0.5) * pitch, (row + 0.5) * pitch
                value = math.exp(-((x - peak[0]) ** 2 + (y - peak[1]) ** 2) / (2 * spread ** 2))
                self.box(x - pitch / 2 + gap / 2, y - pitch / 2 + gap / 2, x + pitch / 2 - gap / 2, y + pitch / 2 - gap / 2,
                         heat(value), 0.018)

    def ball(self, centre: Point, radius: float) -> None:
        self.disc(centre, radius, BALL)
        self.disc((centre[0] - 0.33 * radius, centre[1] - 0.36 * radius), 0.26 * radius, BALL_LIGHT)

    def ghost(self, centre: Point, radius: float, dashes: int = 10) -> None:
        """Where the ball was: a dashed circle."""
        for dash in range(dashes):
            angles = [2 * math.pi * (dash + share) / dashes for share in (0.0, 0.12, 0.24, 0.36, 0.48)]
            self.line([(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles], 0.02, BALL)

    def crate(self, centre: Point, side: float) -> None:
        """A cube, seen from above its front."""
        x, y = centre
        half, depth = side / 2, 0.30 * side
        left, right, top, bottom = x - half, x + half, y - half + depth / 2, y + half + depth / 2
        self.draw.polygon(self.at((left, top), (left + depth, top - depth), (right + depth, top - depth), (right, top)), BOX_TOP)
        self.draw.polygon(self.at((right, top), (right + depth, top - depth), (right + depth, bottom - depth), (right, bottom)),
                          BOX_SIDE)
        self.draw.polygon(self.at((left, top), (right, top), (right, bottom), (left, bottom)), BOX)

    def arrow(self, start: Point, control: Point, end: Point, width: float) -> None:
        """A quadratic curve with a head that points along its end."""
        length = 3.6 * width
        angle = math.atan2(end[1] - control[1], end[0] - control[0])
        neck = (end[0] - 0.8 * length * math.cos(angle), end[1] - 0.8 * length * math.sin(angle))
        shares = [index / 60 for index in range(61)]
        self.line([((1 - t) ** 2 * start[0] + 2 * t * (1 - t) * control[0] + t * t * neck[0],
                    (1 - t) ** 2 * start[1] + 2 * t * (1 - t) * control[1] + t * t * neck[1]) for t in shares], width, WHITE)
        wings = [(end[0] - length * math.cos(angle + turn), end[1] - length * math.sin(angle + turn)) for turn in (0.55, -0.55)]
        self.draw.polygon(self.at(end, *wings), WHITE)


def draw_scene(scene: Scene) -> None:
    """The ball leaves the right of the crate for its left, where the heat map of its word is."""
    target, origin = (0.21, 0.60), (0.865, 0.63)
    scene.heat_map(target, 0.19)
    scene.ghost(origin, 0.105)
    scene.crate((0.545, 0.595), 0.25)
    scene.arrow((0.865, 0.46), (0.56, -0.14), (0.235, 0.43), 0.042)
    scene.ball(target, 0.145)


def draw_icon() -> Image.Image:
    side = ICON_SIZE * OVERSAMPLING
    image = Image.new("RGB", (side, side), NIGHT)
    draw_scene(Scene(image, (0.05 * side, 0.05 * side), 0.9 * side))
    return image.resize((ICON_SIZE, ICON_SIZE), Image.Resampling.LANCZOS)


def draw_banner() -> Image.Image:
    width, height = (length * OVERSAMPLING for length in BANNER_SIZE)
    image = Image.new("RGB", (width, height), NIGHT)
    margin = 0.11 * height
    side = height - 2 * margin
    draw_scene(Scene(image, (width - side - 1.2 * margin, margin), side))
    draw = ImageDraw.Draw(image)

    def write(text: str, x: float, y: float, size: float, fill: Colour) -> float:
        """Writes with the left end of the baseline at (x, y), in shares of the height; returns where the text ends."""
        font = ImageFont.load_default(round(size * height))
        draw.text((x * height, y * height), text, fill, font, anchor="ls")
        return x + font.getlength(text) / height

    write("Learn to Steer", 0.15, 0.42, 0.165, WHITE)
    write("Puts things where the prompt says", 0.155, 0.55, 0.062, GREY)
    end = 0.155
    for text, colour in (("a ball ", BALL), ("to the left of ", HEAT[-1]), ("a box", BOX_TOP)):
        end = write(text, end, 0.72, 0.07, colour)
    return image.resize(BANNER_SIZE, Image.Resampling.LANCZOS)


def save(image: Image.Image, path: Path) -> None:
    image.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    save(draw_icon(), ICON)
    save(draw_banner(), BANNER)
