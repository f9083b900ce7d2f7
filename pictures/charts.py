"""Charts as pictures: probabilities while sampling, training curves, confusion matrices. Plain torch and Pillow.

Pictures are float tensors [H, W, 3] in 0..1 on the CPU, like one picture of the host's IMAGE.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from ..steering.report import SteeringReport, UpdateRecord
from .canvas import BAND, GREEN, GREY, INK, PANEL, RED, RULE, SERIES, Canvas, Colour, Frame, Point, series_colour, tint


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend. shape: "line", "dashes", "dot", "ring" or "cross"."""

    label: str
    colour: Colour
    shape: str = "line"


def _chart(size: tuple[int, int], title: str, remark: str = "") -> Canvas:
    """A canvas with a title. At 512 x 768 a layout pixel is one picture pixel."""
    canvas = Canvas(size, zoom=min(size[0] / 512, size[1] / 768), oversample=3)
    canvas.text(20, 34, title, 20, room=canvas.width - 40)
    canvas.text(20, 54, remark, 13, GREY, room=canvas.width - 40)
    return canvas


def _legend(canvas: Canvas, top: float, entries: Sequence[LegendEntry]) -> float:
    """Draws the entries in rows. Returns the y position below the last row."""
    x, y, size, swatch = 20.0, top + 9, 14, 26
    for entry in entries:
        room = canvas.width - 40 - swatch - 8
        width = swatch + 8 + min(canvas.text_width(entry.label, size), room)
        if x > 20 and x + width > canvas.width - 20:
            x, y = 20.0, y + 22
        middle = x + swatch / 2
        if entry.shape in ("line", "dashes"):
            canvas.line([(x, y), (x + swatch, y)], entry.colour, 3 if entry.shape == "line" else 1.6,
                        dash=5 if entry.shape == "dashes" else 0)
        elif entry.shape == "cross":
            canvas.mark(middle, y, 5, entry.colour)
        else:
            canvas.disc(middle, y, 4 if entry.shape == "dot" else 5.5,
                        entry.colour if entry.shape == "dot" else PANEL, entry.colour)
        canvas.text(x + swatch + 8, y, entry.label, size, anchor="lm", room=room)
        x += width + 22
    return y + 18 if entries else top


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers from low to high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _span(values: Sequence[float]) -> Point:
    """The range of the finite values with a margin; never empty."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    air = 0.04 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else max(abs(low) * 0.1, 0.1)
    return low - air, high + air


def _grid(canvas: Canvas, frame: Frame, y_ticks: Mapping[float, str], label: str) -> None:
    """Draws horizontal rules with their values on the left, and the name of the axis."""
    for value, text in y_ticks.items():
        canvas.line([(frame.left, frame.y(value)), (frame.right, frame.y(value))], RULE, 1)
        canvas.text(frame.left - 8, frame.y(value), text, 13, GREY, "rm")
    canvas.vertical_text(20, (frame.top + frame.bottom) / 2, label, 14, INK)


def _write_in(canvas: Canvas, frame: Frame, text: str) -> None:
    canvas.text((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2, text, 16, GREY, "mm",
                room=frame.right - frame.left)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _norm_logarithms(record: UpdateRecord) -> list[float]:
    return [math.log10(norm) if 0 < norm < math.inf else math.nan for norm in record.gradient_norm or ()]


def _column(rows: Sequence[Sequence[float]], index: int) -> list[Point]:
    """Points (number of the row, value at `index`); the value is NaN where the row is shorter."""
    return [(number, row[index] if index < len(row) else math.nan) for number, row in enumerate(rows)]


def _curves(canvas: Canvas, frame: Frame, rows: Sequence[Sequence[float]], colour: Colour) -> list[Point]:
    """Draws the mean of each row as a line and, for several columns, each column as a thin line. Returns the mean's points."""
    columns = max((len(row) for row in rows), default=0)
    for column in range(columns if columns > 1 else 0):
        for run in frame.runs(_column(rows, column)):
            canvas.line(run, tint(colour, 0.4), 1)
    mean = [(number, _mean(row)) for number, row in enumerate(rows)]
    for run in frame.runs(mean):
        canvas.line(run, colour, 2.4)
        if len(run) == 1:  # a value between two gaps
            canvas.disc(*run[0], 2.4, colour)
    return mean


def _step_bands(canvas: Canvas, frames: Sequence[Frame], records: Sequence[UpdateRecord]) -> None:
    """Shades every second denoising step, and writes step numbers under the lowest frame as space permits."""
    lowest, free, number = frames[-1], -math.inf, 0
    for band, (step, group) in enumerate(groupby(records, lambda record: record.step)):
        count = len(list(group))
        left, right = lowest.x(number - 0.5), lowest.x(number + count - 0.5)
        if band % 2 == 0:
            for frame in frames:
                canvas.rectangle((left, frame.top, right, frame.bottom), BAND)
        half = canvas.text_width(str(step), 13) / 2
        if (left + right) / 2 - half >= free:
            canvas.text((left + right) / 2, lowest.bottom + 6, str(step), 13, GREY, "mt")
            free = (left + right) / 2 + half + 6
        number += count


def _markers(canvas: Canvas, frame: Frame, records: Sequence[UpdateRecord], points: Sequence[Point],
             colour: Colour) -> None:
    spacing = (frame.right - frame.left) / len(records)
    for record, (x, y) in zip(records, points, strict=True):
        if not math.isfinite(y):
            continue
        if record.outcome == "non-finite gradient":
            canvas.mark(frame.x(x), frame.y(y), 5, RED)
        elif record.outcome == "satisfied":
            canvas.disc(frame.x(x), frame.y(y), min(max(spacing * 0.6, 3), 5.5), PANEL, GREEN)
        elif any(record.moved):
            canvas.disc(frame.x(x), frame.y(y), min(max(spacing * 0.3, 1.2), 4), colour)


def _plot_legend(report: SteeringReport, stop: float | None) -> list[LegendEntry]:
    entries = [LegendEntry(relation, series_colour(index)) for index, relation in enumerate(report.relations)]
    outcomes = {record.outcome for record in report.records}
    if any(any(record.moved) for record in report.records):
        entries.append(LegendEntry("latent moved", INK, "dot"))
    if "satisfied" in outcomes:
        entries.append(LegendEntry("satisfied", GREEN, "ring"))
    if "non-finite gradient" in outcomes:
        entries.append(LegendEntry("non-finite gradient", RED, "cross"))
    if stop is not None:
        entries.append(LegendEntry(f"stop at {stop:g}", GREY, "dashes"))
    return entries


def _nothing_steered(report: SteeringReport, size: tuple[int, int]) -> Tensor:
    canvas = _chart(size, "Probability of each relation", f"classifier: {report.classifier}")
    middle = canvas.height / 2
    canvas.text(canvas.width / 2, middle, "nothing was steered", 24, GREY, "mm")
    lines = [line for note in (*report.warnings, *report.remarks) for line in canvas.wrap(note, 14, canvas.width - 80)]
    for number, line in enumerate(lines[:8]):
        canvas.text(canvas.width / 2, middle + 36 + 20 * number, line, 14, GREY, "mm", room=canvas.width - 40)
    return canvas.tensor()


def probability_plot(report: SteeringReport, size: tuple[int, int] = (512, 768), stop: float | None = None) -> Tensor:
    """The course of a run as a picture [H, W, 3]: each relation's probability per evaluation, and the gradient norm below.

    Shaded bands are denoising steps. A batch is drawn as its mean, with a thin line per picture.
    stop: the stopping probability, drawn as a dashed line.
    """
    records = report.records
    if not records:
        return _nothing_steered(report, size)
    pictures = max(len(record.probability) for record in records)
    remark = (f"{report.classifier} classifier, {report.gradient_evaluations} gradient evaluations in "
              f"{len({record.step for record in records})} of {report.steps} steps, {report.seconds:.1f} s"
              + (f"; mean of {pictures} pictures, thin: each picture" if pictures > 1 else ""))
    canvas = _chart(size, "Probability of each relation", remark)
    top = _legend(canvas, 66, _plot_legend(report, stop)) + 4
    norms = [_norm_logarithms(record) for record in records]
    finite = [value for row in norms for value in row if math.isfinite(value)]
    low, high = (math.floor(min(finite)), math.ceil(max(finite))) if finite else (0, 1)
    x_range, right, bottom = (-0.5, len(records) - 0.5), canvas.width - 20, canvas.height - 50
    strip = 0.24 * (bottom - top)
    chart = Frame(80, top, right, bottom - strip - 14, x_range, (-0.03, 1.03))
    below = Frame(80, bottom - strip, right, bottom, x_range, (low - 0.1, max(high, low + 1) + 0.1))
    for frame in (chart, below):
        canvas.rectangle(frame.box, PANEL)
    _step_bands(canvas, (chart, below), records)
    _grid(canvas, chart, {value / 4: f"{value / 4:g}" for value in range(5)}, "probability")
    decades = range(low, max(high, low + 1) + 1, max(1, math.ceil((high - low) / 3)))
    _grid(canvas, below, {power: f"{10.0 ** power:g}" for power in decades} if finite else {}, "|gradient|")
    canvas.text((80 + right) / 2, canvas.height - 12, "denoising step (one point per evaluation)", 14, INK, "ms")
    if stop is not None:
        canvas.line([(chart.left, chart.y(stop)), (chart.right, chart.y(stop))], GREY, 1.6, dash=6)
    for index in range(len(report.relations)):
        rows = [[shares[index] for shares in record.probability if index < len(shares)] for record in records]
        points = _curves(canvas, chart, rows, series_colour(index))
        _markers(canvas, chart, records, points, series_colour(index))
    if not any(math.isfinite(share) for record in records for shares in record.probability for share in shares):
        _write_in(canvas, chart, "no probability was recorded")
    _curves(canvas, below, norms, GREY)
    if all(record.gradient_norm is None for record in records):
        _write_in(canvas, below, "no gradient was taken")
    for number, record in enumerate(records):
        if record.outcome == "non-finite gradient":
            canvas.mark(below.x(number), (below.top + below.bottom) / 2, 5, RED)
    for frame in (chart, below):
        canvas.rectangle(frame.box, None, RULE)
    return canvas.tensor()


def curve_chart(series: Mapping[str, Sequence[Point]], title: str, x_label: str, y_label: str,
                size: tuple[int, int] = (512, 768), y_range: Point | None = None) -> Tensor:
    """Lines through (x, y) points, one per name, as a picture [H, W, 3]. A value that is not finite leaves a gap.

    y_range: lowest and highest y shown, by default those of the data. A line of few points has its points marked.
    """
    canvas = _chart(size, title)
    top = _legend(canvas, 48, [LegendEntry(name, series_colour(index)) for index, name in enumerate(series)]) + 6
    points = [point for line in series.values() for point in line]
    x_span, y_span = _span([x for x, _ in points]), y_range or _span([y for _, y in points])
    if not y_span[0] < y_span[1]:
        raise ValueError(f"curve_chart: y_range {y_span} is empty; its first value must be the smaller one.")
    y_ticks = {value: f"{value:.6g}" for value in _ticks(*y_span, 5)}
    left = 48 + max((canvas.text_width(text, 13) for text in y_ticks.values()), default=0)
    frame = Frame(left, top, canvas.width - 24, canvas.height - 60, x_span, y_span)
    canvas.rectangle(frame.box, PANEL)
    _grid(canvas, frame, y_ticks, y_label)
    for value in _ticks(*x_span, 8):
        canvas.line([(frame.x(value), frame.top), (frame.x(value), frame.bottom)], RULE, 1)
        canvas.text(frame.x(value), frame.bottom + 7, f"{value:.6g}", 13, GREY, "mt")
    canvas.text((frame.left + frame.right) / 2, canvas.height - 16, x_label, 14, INK, "ms")
    for index, line in enumerate(series.values()):
        for run in frame.runs(line):
            canvas.line(run, series_colour(index), 2.4)
            for x, y in run if len(line) <= 30 else run[:1] if len(run) == 1 else ():
                canvas.disc(x, y, 4, series_colour(index))
    canvas.rectangle(frame.box, None, RULE)
    if not points:
        _write_in(canvas, frame, "no data")
    return canvas.tensor()


def matrix_chart(matrix: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> Tensor:
    """A table of coloured cells with their numbers, as a picture [H, W, 3]. The largest value has the darkest cell.

    matrix: [rows, columns], whole numbers (counts) or fractions. The size of the picture follows from the table.
    """
    if tuple(matrix.shape) != (len(rows), len(columns)) or matrix.numel() == 0:
        raise ValueError(f"matrix_chart: a matrix of shape {tuple(matrix.shape)} does not fit {len(rows)} row and "
                         f"{len(columns)} column names (at least one each).")
    values = matrix.detach().double().cpu()
    finite = values[values.isfinite()]
    largest = max(finite.max().item() if len(finite) else 0, 1e-12)
    whole = bool((finite == finite.round()).all()) and largest >= 2
    ruler = Canvas((16, 16))  # measures text before the sheet's size is known
    margin = 34 + min(max(ruler.text_width(name, 15) for name in rows), 240)
    heads = [ruler.wrap(name, 15, 92)[:4] for name in columns]
    top, cell_height, cell_width = 62 + 18 * max(map(len, heads)), 56, 100
    width = max(margin + cell_width * len(columns) + 20, ruler.text_width(title, 20) + 40)
    canvas = Canvas((round(top + cell_height * len(rows) + 20), round(width)), oversample=3)
    canvas.text(20, 34, title, 20)
    for column, lines in enumerate(heads):
        for number, line in enumerate(reversed(lines)):
            canvas.text(margin + cell_width * (column + 0.5), top - 8 - 18 * number, line, 15, anchor="ms",
                        room=cell_width - 4)
    for row, name in enumerate(rows):
        y = top + cell_height * row
        canvas.text(margin - 12, y + cell_height / 2, name, 15, anchor="rm", room=margin - 28)
        for column, value in enumerate(values[row].tolist()):
            share = min(max(value / largest, 0), 1) if math.isfinite(value) else 0
            x = margin + cell_width * column
            canvas.rectangle((x + 1, y + 1, x + cell_width - 1, y + cell_height - 1), tint(SERIES[0], share))
            text = "-" if not math.isfinite(value) else f"{value:.0f}" if whole else f"{value:.2f}"
            canvas.text(x + cell_width / 2, y + cell_height / 2, text, 17, PANEL if share > 0.5 else INK, "mm")
    return canvas.tensor()
