"""A canvas for pictures, text and lines, shared by `charts.py` and `overlays.py`. Plain torch and Pillow."""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Point = tuple[float, float]

PAPER, PANEL, BAND = (243, 244, 246), (255, 255, 255), (238, 241, 247)
INK, GREY, RULE = (31, 36, 48), (98, 106, 122), (214, 218, 226)
RED, GREEN = (214, 30, 44), (24, 140, 74)
SERIES: tuple[Colour, ...] = ((0, 105, 180), (224, 134, 0), (122, 62, 168), (0, 150, 128),
                              (226, 84, 150), (120, 82, 44), (86, 176, 226), (134, 146, 22))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def series_colour(index: int) -> Colour:
    return SERIES[index % len(SERIES)]


def tint(colour: Colour, share: float) -> Colour:
    """`colour` mixed with white. share: 1 gives the colour, 0 white."""
    return tuple(round(255 + share * (value - 255)) for value in colour)


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """The dashes of a polyline: every second piece of `length`."""
    pieces: list[list[Point]] = []
    travelled = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        distance, at = math.hypot(x1 - x0, y1 - y0), 0.0
        while at < distance:
            number = int((travelled + at) / length + 1e-6)
            end = min(distance, (number + 1) * length - travelled)
            if number % 2 == 0:
                pieces.append([(x0 + (x1 - x0) * share / distance, y0 + (y1 - y0) * share / distance)
                               for share in (at, end)])
            at = end
        travelled += distance
    return pieces


def _plain(text: str) -> str:
    """The text on one line and without accents, because Pillow's built-in font has basic Latin letters only."""
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


class Canvas:
    """A drawing surface. The origin is the upper left corner; lengths are in layout pixels.

    size: (height, width) of the finished picture, in pixels.
    zoom: picture pixels per layout pixel, so that one layout serves every size.
    oversample: factor by which the drawing is larger than the picture; reducing it at the end smooths slanted lines.
    Raises ValueError for a size under 16 pixels.
    """

    def __init__(self, size: tuple[int, int], zoom: float = 1.0, oversample: int = 1) -> None:
        if min(size) < 16:
            raise ValueError(f"A picture of {size[0]}x{size[1]} (height x width) cannot be drawn on; "
                             "ask for at least 16 pixels a side.")
        self.size = size
        self.height, self.width = size[0] / zoom, size[1] / zoom
        self._scale = zoom * oversample
        self._image = Image.new("RGB", (size[1] * oversample, size[0] * oversample), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def _at(self, *values: float) -> list[float]:
        return [value * self._scale for value in values]

    def _thick(self, width: float) -> int:
        return max(1, round(width * self._scale))

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0, dash: float = 0.0) -> None:
        """Draws a polyline. dash: length of dashes and gaps, 0 for a solid line."""
        if dash:
            for piece in _dashes(points, dash):
                self.line(piece, colour, width)
        elif len(points) > 1:
            scaled = [tuple(self._at(*point)) for point in points]
            self._draw.line(scaled, fill=colour, width=self._thick(width), joint="curve")

    def rectangle(self, box: tuple[float, float, float, float], fill: Colour | None,
                  outline: Colour | None = None) -> None:
        self._draw.rectangle(self._at(*box), fill=fill, outline=outline, width=self._thick(1))

    def disc(self, x: float, y: float, radius: float, fill: Colour, outline: Colour | None = None) -> None:
        self._draw.ellipse(self._at(x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline,
                           width=self._thick(1.8))

    def mark(self, x: float, y: float, radius: float, colour: Colour, width: float = 2.0) -> None:
        """Draws a diagonal cross."""
        for slope in (-1, 1):
            self.line([(x - radius, y - slope * radius), (x + radius, y + slope * radius)], colour, width)

    def text_width(self, text: str, size: float) -> float:
        return _font(self._thick(size)).getlength(text) / self._scale

    def text(self, x: float, y: float, text: str, size: float, colour: Colour = INK, anchor: str = "ls",
             room: float = math.inf) -> None:
        """Draws one line of text. anchor: Pillow's two letters; room: longest width, beyond which "..." shortens the text."""
        text = _plain(text)
        if self.text_width(text, size) > room:
            while text and self.text_width(text + "...", size) > room:
                text = text[:-1]
            text = text.rstrip() + "..."
        self._draw.text(self._at(x, y), text, fill=colour, font=_font(self._thick(size)), anchor=anchor)

    def vertical_text(self, x: float, y: float, text: str, size: float, colour: Colour = INK) -> None:
        """Draws text that reads upward, centred at (x, y)."""
        text, font = _plain(text), _font(self._thick(size))
        stamp = Image.new("L", (math.ceil(font.getlength(text)) + 4, self._thick(size * 1.6)))
        ImageDraw.Draw(stamp).text((stamp.width / 2, stamp.height / 2), text, fill=255, font=font, anchor="mm")
        stamp = stamp.rotate(90, expand=True)
        left, top = self._at(x, y)
        self._image.paste(colour, (round(left - stamp.width / 2), round(top - stamp.height / 2)), stamp)

    def wrap(self, text: str, size: float, room: float) -> list[str]:
        """`text` broken at spaces into lines no wider than `room`. A longer word gets its own line."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.text_width(f"{lines[-1]} {word}", size) <= room:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def paste(self, x: float, y: float, picture: Tensor) -> None:
        """Puts `picture` [H, W, 3] with its upper left corner at (x, y), pixel by pixel."""
        self._image.paste(to_pillow(picture), tuple(round(value) for value in self._at(x, y)))

    def tensor(self) -> Tensor:
        image = self._image
        if image.size != (self.size[1], self.size[0]):
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BOX)
        return torch.from_numpy(numpy.array(image)).float() / 255


def to_pillow(picture: Tensor) -> Image.Image:
    """[H, W, 3] in 0..1 (values beyond are clamped, NaN is black) as an 8-bit picture."""
    values = picture.detach().float().cpu().nan_to_num(0).clamp(0, 1)
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())


@dataclass(frozen=True)
class Frame:
    """A plotting area in layout pixels, and the ranges of the values shown in it."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: Point
    y_range: Point

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.left, self.top, self.right, self.bottom

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """The y position of `value`, clamped to the frame."""
        low, high = self.y_range
        return self.bottom - min(max((value - low) / (high - low), 0), 1) * (self.bottom - self.top)

    def runs(self, points: Sequence[Point]) -> list[list[Point]]:
        """Positions of `points` as unbroken runs. A value that is not finite leaves a gap."""
        return [[(self.x(x), self.y(y)) for x, y in run]
                for finite, run in groupby(points, lambda point: math.isfinite(point[0]) and math.isfinite(point[1]))
                if finite]
