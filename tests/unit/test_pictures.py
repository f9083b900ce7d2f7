"""Heat maps, overlays, sheets and charts: sizes, colours, positions of marks, and unusual inputs."""
from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from learn_to_steer.pictures.canvas import GREEN, GREY, RED, Canvas, series_colour
from learn_to_steer.pictures.overlays import (
    LABEL_HEIGHT,
    MARGIN,
    contact_sheet,
    curve_chart,
    heat_map,
    matrix_chart,
    overlay,
    probability_plot,
    save_png,
    soft_centre,
)
from learn_to_steer.steering.report import SteeringReport, UpdateRecord
from PIL import Image

NAN = math.nan


def hot_cell(row: int, column: int, height: int = 16, width: int = 16) -> torch.Tensor:
    map = torch.zeros(height, width)
    map[row, column] = 1
    return map


def check_picture(picture: torch.Tensor, height: int | None = None, width: int | None = None) -> None:
    assert picture.ndim == 3 and picture.shape[-1] == 3 and picture.dtype == torch.float32
    assert picture.isfinite().all() and 0 <= picture.min() and picture.max() <= 1
    if height is not None:
        assert tuple(picture.shape[:2]) == (height, width)


def near(picture: torch.Tensor, colour: tuple[int, int, int], tolerance: float = 0.03) -> torch.Tensor:
    """Mask [H, W] of the pixels with this colour."""
    return ((picture - torch.tensor(colour) / 255).abs() < tolerance).all(-1)


def record(update: int, probability=((0.5,),), norm=(0.1,), outcome: str = "moved", step: int = 0) -> UpdateRecord:
    return UpdateRecord(step=step, update=update, sigma=1.0, progress=0.1, loss=(0.5,) * len(probability),
                        probability=probability, gradient_norm=norm, moved=(outcome == "moved",) * len(probability),
                        outcome=outcome, seconds=0.1)


def report(*records: UpdateRecord, relations: tuple[str, ...] = ("dog above cat",)) -> SteeringReport:
    return SteeringReport(relations, "geometric", 20, records)


# --------------------------------------------------------------------------- heat maps


def test_heat_map_runs_from_dark_blue_to_yellow_with_rising_lightness():
    picture = heat_map(torch.linspace(0.2, 0.3, 512)[None], (4, 512))
    check_picture(picture, 4, 512)
    lightness = picture[0] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > -1e-3).all() and lightness[-1] - lightness[0] > 0.7
    assert picture[0, 0].argmax() == 2 and picture[0, -1].argmin() == 2


def test_heat_map_is_hottest_where_the_map_is():
    picture = heat_map(hot_cell(3, 12), (128, 256))
    check_picture(picture, 128, 256)
    brightest = picture.sum(-1).argmax().item()
    assert abs(brightest // 256 - 3.5 * 8) <= 4 and abs(brightest % 256 - 12.5 * 16) <= 8


@pytest.mark.parametrize("map", [torch.full((8, 8), 1 / 64), torch.full((8, 8), NAN), torch.zeros(1, 1),
                                 torch.full((8, 8), 1 / 64) + 1e-10 * torch.randn(8, 8)])
def test_a_map_without_contrast_is_one_colour_and_has_no_centre(map):
    picture = heat_map(map, (32, 32))
    check_picture(picture, 32, 32)
    assert (picture - picture[0, 0]).abs().max() < 1e-6
    assert soft_centre(map) is None


def test_values_that_are_not_finite_count_as_cold():
    map = hot_cell(2, 2)
    broken = map.clone()
    broken[10, 10], broken[11, 11] = NAN, math.inf
    assert torch.equal(heat_map(map, (32, 32)), heat_map(broken, (32, 32)))


def test_heat_map_takes_half_precision_with_gradient():
    check_picture(heat_map(torch.rand(8, 8, dtype=torch.bfloat16, requires_grad=True), (32, 32)), 32, 32)


def test_soft_centre_is_the_mean_position_of_the_squared_map():
    map = torch.full((16, 8), 0.01)
    map[3, 1], map[3, 5] = 0.01 + 0.2, 0.01 + 0.1
    assert soft_centre(map) == pytest.approx(((4 * 1.5 + 5.5) / 5 / 8, 3.5 / 16))


# --------------------------------------------------------------------------- overlays


@pytest.mark.parametrize(("image_size", "panel"), [
    ((64, 64), (256, 256)), ((32, 48), (192, 288)), ((256, 256), (256, 256)), ((300, 400), (300, 400)),
    ((1024, 1024), (512, 512)), ((1024, 2048), (256, 512)), ((64, 256), (64, 256))])
def test_panels_are_enlarged_by_whole_factors_or_reduced(image_size, panel):
    picture = overlay(torch.rand(*image_size, 3), torch.rand(2, 16, 16), ["dog", "cat"])
    check_picture(picture, MARGIN + LABEL_HEIGHT + panel[0] + MARGIN, 3 * MARGIN + 2 * panel[1])


def test_a_small_picture_keeps_hard_pixels():
    image = torch.rand(64, 64, 3)
    picture = overlay(image, torch.zeros(1, 16, 16), ["dog"], strength=0)
    shown = picture[MARGIN + LABEL_HEIGHT:-MARGIN, MARGIN:-MARGIN]
    expected = image.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (shown - expected).abs().max() < 1 / 255


@pytest.mark.parametrize("image", [torch.full((64, 64, 3), 0.5), None])
@pytest.mark.parametrize(("row", "column"), [(2, 12), (9, 3), (0, 15)])
def test_the_cross_is_at_the_soft_centre(image, row, column):
    picture = overlay(image, hot_cell(row, column)[None], ["dog"])
    panel = picture[-MARGIN - 256:-MARGIN, MARGIN:MARGIN + 256]
    y, x = row * 16 + 8, column * 16 + 8
    cross = {(y, x + shift) for shift in range(-8, 9)} | {(y + shift, x) for shift in range(-8, 9)}
    inside = {place for place in cross if 0 <= min(place) and max(place) < 256}
    assert {tuple(place) for place in (panel == 1).all(-1).nonzero().tolist()} == inside


def test_the_picture_stays_visible_and_heat_follows_the_map():
    image = torch.full((64, 64, 3), 0.8)
    panel = overlay(image, hot_cell(8, 2)[None], ["dog"])[-MARGIN - 256:-MARGIN, MARGIN:MARGIN + 256]
    cold, hot = panel[20, 230], panel[8 * 16 + 12, 2 * 16 + 12]  # beside the cross's arms
    assert (cold - 0.8).abs().max() < 0.25 and cold[2] > cold[0]
    assert hot[0] - hot[2] > 0.15
    untouched = overlay(image, torch.zeros(1, 8, 8), ["dog"], strength=0)[-MARGIN - 256:-MARGIN, MARGIN:-MARGIN]
    assert (untouched - 0.8).abs().max() < 1 / 255


def test_labels_and_caption_are_written_where_they_belong():
    maps = torch.rand(2, 16, 16)
    dog, cow = (overlay(None, maps, [word, "cat"]) for word in ("dog", "cow"))
    changed = (dog != cow).any(-1).nonzero()
    assert len(changed) > 20
    assert changed[:, 0].max() < MARGIN + LABEL_HEIGHT and changed[:, 1].max() < MARGIN + 256
    captioned = overlay(None, maps, ["dog", "cat"], "step 3")
    extra = captioned.shape[0] - dog.shape[0]
    assert extra > 0 and torch.equal(captioned[extra + MARGIN:], dog[MARGIN:])
    assert near(captioned[:extra + MARGIN], GREY).sum() > 20


def test_a_long_caption_is_wrapped_and_a_long_label_shortened():
    maps = torch.rand(1, 16, 16)
    short, long = (overlay(None, maps, ["dog"], "a photo of a dog " * times) for times in (1, 8))
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1]
    label = overlay(None, maps, ["w" * 500])
    assert near(label[:, :MARGIN], (243, 244, 246)).all() and near(label[:, -MARGIN:], (243, 244, 246)).all()


@pytest.mark.parametrize("label", ["", "a\nb", "na\u00efve \u72d7 \u2192"])
def test_any_text_can_be_drawn(label):
    check_picture(overlay(None, torch.rand(1, 16, 16), [label], label))


def test_accents_are_dropped():
    maps = torch.rand(1, 16, 16)
    assert torch.equal(overlay(None, maps, ["na\u00efve"]), overlay(None, maps, ["naive"]))


@pytest.mark.parametrize(("maps", "labels"), [(torch.rand(2, 8, 8), ["dog"]), (torch.rand(8, 8), ["dog"]),
                                              (torch.rand(0, 8, 8), [])])
def test_overlay_names_maps_that_do_not_fit_their_labels(maps, labels):
    with pytest.raises(ValueError, match="one label each"):
        overlay(None, maps, labels)


def test_overlay_of_non_finite_picture_and_maps():
    check_picture(overlay(torch.full((64, 64, 3), NAN), torch.full((1, 8, 8), NAN), ["dog"]))


# --------------------------------------------------------------------------- contact sheets, files


def test_contact_sheet_of_different_sizes():
    images = [torch.rand(64, 64, 3), torch.rand(512, 384, 3), torch.rand(100, 300, 4)]
    picture = contact_sheet(images, ["small", "tall", "wide"], 2)
    # 64 x 64 is 256 x 256 on its own; the cell is 512 high (the tall one) and 384 wide.
    check_picture(picture, MARGIN + 2 * (LABEL_HEIGHT + 512 + MARGIN), MARGIN + 2 * (384 + MARGIN))
    small = picture[MARGIN + LABEL_HEIGHT:MARGIN + LABEL_HEIGHT + 512, MARGIN:MARGIN + 384]
    expected = images[0].repeat_interleave(6, 0).repeat_interleave(6, 1)
    assert (small[64:448] - expected).abs().max() < 1 / 255


def test_contact_sheet_needs_no_more_columns_than_pictures():
    assert contact_sheet([torch.rand(64, 64, 3)], ["one"], 5).shape[1] == 256 + 2 * MARGIN


@pytest.mark.parametrize(("images", "labels", "columns"), [([], [], 1), ([torch.rand(8, 8, 3)], [], 1),
                                                           ([torch.rand(8, 8, 3)], ["a"], 0)])
def test_contact_sheet_says_what_is_missing(images, labels, columns):
    with pytest.raises(ValueError, match="contact_sheet: needs"):
        contact_sheet(images, labels, columns)


def test_a_batch_is_not_a_picture():
    with pytest.raises(ValueError, match="one of a batch"):
        overlay(torch.rand(1, 64, 64, 3), torch.rand(1, 8, 8), ["dog"])


def test_save_png(tmp_path):
    image = torch.rand(5, 7, 3)
    save_png(image[None], tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert (numpy.asarray(file) == (image * 255).round().numpy()).all()
    with pytest.raises(ValueError, match="one picture"):
        save_png(torch.rand(2, 5, 7, 3), tmp_path / "b.png")


# --------------------------------------------------------------------------- charts


def test_probability_plot_shows_what_happened_in_its_colours():
    plain = probability_plot(report(*[record(i, ((0.2 + i / 20,),)) for i in range(10)]), stop=0.9)
    check_picture(plain, 512, 768)
    assert near(plain, series_colour(0)).sum() > 300
    assert not near(plain, RED).any() and not near(plain, GREEN).any()
    failed = probability_plot(report(record(0), record(1, norm=(NAN,), outcome="non-finite gradient"), record(2)))
    assert near(failed, RED).sum() > 20
    done = probability_plot(report(record(0), record(1, ((0.95,),), None, "satisfied")))
    assert near(done, GREEN).sum() > 10


def test_probability_plot_puts_high_above_low():
    def height_of_line(probability: float) -> float:
        plot = probability_plot(report(*[record(i, ((probability,),)) for i in range(6)]))
        return near(plot[110:], series_colour(0)).nonzero()[:, 0].double().mean().item()  # below the legend

    low, middle, high = map(height_of_line, (0.1, 0.5, 0.9))
    assert high < middle < low
    assert low - middle == pytest.approx(middle - high, abs=1.5)


def test_probability_plot_has_one_colour_per_relation_and_its_words():
    records = [record(i, ((0.3, 0.6),)) for i in range(6)]
    one = probability_plot(report(*records, relations=("dog above cat", "car below cow")))
    other = probability_plot(report(*records, relations=("dog above cat", "car below owl")))
    assert near(one, series_colour(0)).any() and near(one, series_colour(1)).any()
    changed = (one != other).any(-1).nonzero()
    assert len(changed) > 10 and changed[:, 0].max() < 110  # only in the legend, above the lines


def test_a_gradient_between_two_gaps_is_a_dot():
    records = [record(i % 2, norm=None if i % 2 else (0.1,), step=i // 2) for i in range(10)]
    strip = probability_plot(report(*records))[380:455, 90:]
    assert near(strip, GREY).sum() >= 5 * 9


def test_stopping_probability_is_drawn_only_where_given():
    records = [record(i, ((0.3,),)) for i in range(6)]
    without, with_stop = probability_plot(report(*records)), probability_plot(report(*records), stop=0.9)
    rows = (without != with_stop)[110:].any(-1).any(-1).nonzero()
    assert 0 < len(rows) <= 4


def test_empty_report_is_a_picture_that_shows_its_notes():
    empty = report()
    check_picture(probability_plot(empty), 512, 768)
    noted = replace(empty, notes=("the window is empty, so no step was steered " * 20,))
    assert not torch.equal(probability_plot(empty), probability_plot(noted))


@pytest.mark.parametrize("records", [
    [record(0, (), None, "not recorded")],
    [record(0, ((NAN,),), (math.inf,))],
    [record(0, ((0.5,), (NAN,)), (0.0, 1e-30)), record(1, (), None, "not recorded"),
     record(0, ((1.0,), (0.0,)), (1e20, 1.0))],
    [record(0, ((0.5, 0.4, 0.3),))],
    [record(update, ((0.5,), (0.9,)), (0.1, 0.2), step=step) for step in range(50) for update in range(16)],
], ids=["not recorded", "not finite", "ragged batch", "more values than relations", "800 evaluations"])
def test_probability_plot_of_reports_that_are_not_nice(records):
    check_picture(probability_plot(report(*records)), 512, 768)


@pytest.mark.parametrize("size", [(512, 768), (1024, 1536), (160, 240), (300, 300), (64, 900)])
def test_charts_have_the_size_asked_for(size):
    check_picture(probability_plot(report(record(0), record(1)), size), *size)
    check_picture(curve_chart({"a": [(0, 1), (1, 2)]}, "t", "x", "y", size), *size)


def test_a_picture_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        probability_plot(report(), (0, 768))


def test_curve_chart_draws_every_series_and_leaves_gaps():
    line = [(x, x * x) for x in range(40)]
    whole = curve_chart({"loss": line, "accuracy": [(0, 900), (39, 0)]}, "Training", "epoch", "loss")
    check_picture(whole, 512, 768)
    assert near(whole, series_colour(0)).sum() > 300 and near(whole, series_colour(1)).sum() > 300
    broken = [(x, NAN if 10 <= x < 30 else y) for x, y in line]
    gap = curve_chart({"loss": broken, "accuracy": [(0, 900), (39, 0)]}, "Training", "epoch", "loss")
    assert near(gap, series_colour(0)).sum() < 0.8 * near(whole, series_colour(0)).sum()


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, 5)]}, {"a": [(0, 0), (1, 0)]}, {"a": [(0, NAN)]},
                                    {"a": [(0, 1e9), (1, 1e9 + 1e-9)]}, {"a": [(0, -1e-12), (1e6, math.inf)]},
                                    {f"series {index}": [(0, index), (1, 0)] for index in range(20)}])
def test_curve_chart_of_series_that_are_not_nice(series):
    check_picture(curve_chart(series, "t", "x", "y"), 512, 768)


def test_curve_chart_refuses_an_empty_range():
    with pytest.raises(ValueError, match="y_range"):
        curve_chart({"a": [(0, 1)]}, "t", "x", "y", y_range=(1, 1))


def test_matrix_chart_darkens_with_the_value_and_prints_it():
    names = ["above", "to the left of"]
    first = matrix_chart(torch.tensor([[90, 10], [40, 60]]), names, names, "Confusion")
    check_picture(first)
    assert near(first, series_colour(0)).sum() > 2000  # the largest value's cell
    second = matrix_chart(torch.tensor([[90, 10], [41, 60]]), names, names, "Confusion")
    rows, columns = (first != second).any(-1).nonzero().unbind(1)
    assert 0 < len(rows) and columns.max() - columns.min() < 100 and rows.max() - rows.min() < 56


@pytest.mark.parametrize("matrix", [torch.zeros(1, 1), torch.full((3, 2), NAN), -torch.rand(2, 3), torch.eye(12)])
def test_matrix_chart_of_matrices_that_are_not_nice(matrix):
    rows, columns = ([f"relation {index}" for index in range(length)] for length in matrix.shape)
    check_picture(matrix_chart(matrix, rows, columns, "A title"))


def test_matrix_chart_names_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        matrix_chart(torch.eye(2), ["a"], ["a", "b"], "t")


def test_canvas_dashes_cover_half_of_a_line():
    canvas = Canvas((32, 220))
    canvas.line([(10, 16), (50, 16), (210, 16)], RED, 1, dash=10)
    drawn = near(canvas.tensor(), RED)[16].nonzero()[:, 0]
    assert 90 <= len(drawn) <= 125 and drawn.min() == 10 and drawn.max() >= 195
