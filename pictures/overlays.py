"""Attention maps as pictures: heat maps, overlays, contact sheets. Plain torch and Pillow, no host.

Pictures are float tensors [H, W, 3] in 0..1, results on the CPU, like one picture of the host's IMAGE.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import GREY, Canvas, to_pillow
from .charts import curve_chart, matrix_chart, probability_plot

__all__ = ["captioned", "contact_sheet", "curve_chart", "heat_map", "matrix_chart", "overlay", "probability_plot", "save_png",
           "soft_centre"]

MARGIN, LABEL_HEIGHT = 10, 30
SMALLEST_PANEL, LARGEST_PANEL = 256, 512
# Dark blue over magenta and orange to light yellow; lightness rises evenly, so it also reads in grey.
_HEAT = ((6, 10, 48), (44, 14, 98), (92, 18, 124), (138, 30, 124), (182, 48, 108), (220, 76, 80), (244, 116, 52),
         (252, 168, 52), (252, 228, 120))


def _unit_range(attention_map: Tensor) -> Tensor:
    """The map [h, w] scaled to 0..1, on the CPU. A flat map and values that are not finite become 0."""
    if attention_map.ndim != 2 or attention_map.numel() == 0:
        raise ValueError(f"An attention map must be [height, width] and not empty; got shape {tuple(attention_map.shape)}.")
    values = attention_map.detach().float().cpu()
    finite = values.isfinite()
    if not finite.any():
        return torch.zeros_like(values)
    low, high = values[finite].min(), values[finite].max()
    # A smaller range is rounding error, which must not be amplified into a pattern.
    if high - low <= 1e-6 * high.abs():
        return torch.zeros_like(values)
    return torch.where(finite, (values - low) / (high - low), 0).clamp(0, 1)


def _resize(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resizes [H, W, channels] to size (height, width)."""
    options = {} if mode == "nearest-exact" else {"align_corners": False, "antialias": True}
    return F.interpolate(picture.movedim(-1, 0)[None], size, mode=mode, **options)[0].movedim(0, -1).clamp(0, 1)


def _heat(attention_map: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The map's colours [H, W, 3] and its scaled values [H, W, 1] in 0..1, both smoothly resized to `size`."""
    heat = _resize(_unit_range(attention_map)[..., None], size, "bicubic")
    table = torch.tensor(_HEAT) / 255
    place = heat[..., 0] * (len(_HEAT) - 1)
    lower = place.floor().long().clamp(max=len(_HEAT) - 2)
    return torch.lerp(table[lower], table[lower + 1], (place - lower)[..., None]), heat


def heat_map(attention_map: Tensor, size: tuple[int, int]) -> Tensor:
    """An attention map [h, w] as colours [H, W, 3], from its smallest value (dark blue) to its largest (yellow).

    size: (height, width) of the result. A flat map, or one without a finite value, is uniformly dark blue.
    """
    return _heat(attention_map, size)[0]


def soft_centre(attention_map: Tensor) -> tuple[float, float] | None:
    """The soft centre of a map [h, w]: (x, y) as fractions of the sides, y downward; None for a flat map.

    It is the mean position weighted by the squared map, after subtracting the minimum, as in the geometric classifier's
    default settings.
    """
    weight = _unit_range(attention_map).double() ** 2
    if not weight.any():
        return None
    rows, columns = ((torch.arange(length) + 0.5) / length for length in weight.shape)
    total = weight.sum()
    return ((weight.sum(0) * columns).sum() / total).item(), ((weight.sum(1) * rows).sum() / total).item()


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """The largest (height, width) at which a picture of this size is shown."""
    return LARGEST_PANEL, min(LARGEST_PANEL, width * math.ceil(SMALLEST_PANEL / width))


def _fitted_size(height: int, width: int, room: tuple[int, int]) -> tuple[int, int]:
    """The largest size inside `room` with the same proportions: a whole multiple, or a reduction."""
    factor = min(room[0] / height, room[1] / width)
    factor = math.floor(factor) if factor >= 1 else factor
    return max(1, round(height * factor)), max(1, round(width * factor))


def _fit(picture: Tensor, room: tuple[int, int]) -> Tensor:
    """`picture` [H, W, 3 or 4] enlarged pixel by pixel or smoothly reduced to fit into `room`."""
    if picture.ndim != 3 or picture.shape[-1] < 3 or picture.numel() == 0:
        raise ValueError(f"A picture must be [height, width, 3], one of a batch; got shape {tuple(picture.shape)}.")
    picture = picture[..., :3].detach().float().cpu().nan_to_num(0).clamp(0, 1)
    size = _fitted_size(*picture.shape[:2], room)
    return _resize(picture, size, "nearest-exact" if size[0] >= picture.shape[0] else "bilinear")


def _sheet(panels: Sequence[Tensor], labels: Sequence[str], columns: int, caption: str = "") -> Tensor:
    """Panels [H, W, 3] in a grid, each centred in its cell under its label, with a caption on top."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    cell_height = max(panel.shape[0] for panel in panels)
    cell_width = max(SMALLEST_PANEL, *(panel.shape[1] for panel in panels))
    width = MARGIN + columns * (cell_width + MARGIN)
    lines = Canvas((16, 16)).wrap(caption, 17, width - 2 * MARGIN)
    top = MARGIN + (len(lines) * 24 + 4 if lines else 0)
    canvas = Canvas((top + rows * (LABEL_HEIGHT + cell_height + MARGIN), width))
    for number, line in enumerate(lines):
        canvas.text(MARGIN, MARGIN + 24 * number + 12, line, 17, GREY, "lm", room=width - 2 * MARGIN)
    for index, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x = MARGIN + index % columns * (cell_width + MARGIN)
        y = top + index // columns * (LABEL_HEIGHT + cell_height + MARGIN)
        canvas.text(x + cell_width / 2, y + LABEL_HEIGHT / 2 - 2, label, 20, anchor="mm", room=cell_width)
        canvas.paste(x + (cell_width - panel.shape[1]) // 2,
                     y + LABEL_HEIGHT + (cell_height - panel.shape[0]) // 2, panel)
    return canvas.tensor()


def _draw_cross(panel: Tensor, centre: tuple[float, float]) -> None:
    """A white cross with a dark rim, drawn into `panel` [H, W, 3]; centre: (x, y) as fractions of the sides."""
    height, width = panel.shape[:2]
    x, y = min(int(centre[0] * width), width - 1), min(int(centre[1] * height), height - 1)
    for reach, half, value in ((10, 2, 0.0), (8, 0, 1.0)):
        panel[max(y - half, 0):y + half + 1, max(x - reach, 0):x + reach + 1] = value
        panel[max(y - reach, 0):y + reach + 1, max(x - half, 0):x + half + 1] = value


def overlay(image: Tensor | None, maps: Tensor, labels: Sequence[str], caption: str = "",
            strength: float = 0.6) -> Tensor:
    """Attention maps over a picture: one panel per word, side by side, as one picture [H, W, 3].

    image: [H, W, 3], or None for the heat maps alone; maps: [words, h, w], scaled per word.
    strength: opacity of the colour at the map's maximum, 0..1. A cross marks the map's soft centre.
    Raises ValueError where the numbers of maps and labels differ.
    """
    if maps.ndim != 3 or len(maps) != len(labels) or not len(maps):
        raise ValueError(f"overlay: maps must be [words, h, w] with one label each; got shape {tuple(maps.shape)} and "
                         f"{len(labels)} labels.")
    shown_as = image.shape[:2] if image is not None else maps.shape[1:]
    room = _panel_size(*shown_as)
    picture = _fit(image, room) if image is not None else None
    size = tuple(picture.shape[:2]) if picture is not None else _fitted_size(*shown_as, room)
    panels = []
    for attention_map in maps:
        colours, heat = _heat(attention_map, size)
        # Low values are dimmed a little, so that high ones stand out on a light picture.
        panel = colours if picture is None else torch.lerp(picture, colours, strength * (0.4 + 0.6 * heat))
        if (centre := soft_centre(attention_map)) is not None:
            _draw_cross(panel, centre)
        panels.append(panel)
    return _sheet(panels, labels, len(panels), caption)


def captioned(image: Tensor | None, caption: str) -> Tensor:
    """A picture [H, W, 3], or an empty panel for None, with a caption above it, as one picture [H, W, 3]."""
    picture = torch.zeros(64, 64, 3) if image is None else image
    return _sheet([_fit(picture, _panel_size(*picture.shape[:2]))], [""], 1, caption)


def contact_sheet(images: Sequence[Tensor], labels: Sequence[str], columns: int) -> Tensor:
    """Pictures [H, W, 3] of any size in a grid, each under its label, as one picture [H, W, 3].

    Each picture is resized to the largest (256 to 512 pixels) by a whole factor or a reduction.
    Raises ValueError without pictures, and where the numbers of pictures and labels differ.
    """
    if not images or len(images) != len(labels) or columns < 1:
        raise ValueError(f"contact_sheet: needs at least one picture, one label each and one column; got {len(images)} "
                         f"pictures, {len(labels)} labels, {columns} columns.")
    sizes = [_fitted_size(*image.shape[:2], _panel_size(*image.shape[:2])) for image in images]
    room = max(height for height, _ in sizes), max(width for _, width in sizes)
    return _sheet([_fit(image, room) for image in images], labels, columns)


def save_png(image: Tensor, path: str | Path) -> None:
    """Writes a picture [H, W, 3], or a batch of one, as an 8-bit PNG. Makes the folder. Raises ValueError otherwise."""
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"save_png: {path} needs one picture [height, width, 3]; got shape {tuple(image.shape)}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pillow(image).save(path, format="PNG")
