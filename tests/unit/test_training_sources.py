"""Labelled pictures: folders with a table, GQA scene graphs, splits, wrong captions."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

captions, dataset, gqa, sources, storage = (importlib.import_module(f"learn_to_steer.training.{name}") for name in (
    "captions", "dataset", "gqa", "sources", "storage"))


def picture(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def gqa_file(folder: Path, graphs: dict) -> Path:
    path = folder / "graphs.json"
    path.write_text(json.dumps(graphs))
    return path


def thing(name: str, x: int, y: int, *relations: tuple[str, str], w: int = 10, h: int = 10) -> dict:
    return {"name": name, "x": x, "y": y, "w": w, "h": h, "attributes": ["red"],
            "relations": [{"name": word, "object": other} for word, other in relations]}


GRAPHS = {
    "2407890": {"width": 60, "height": 40, "location": "street", "objects": {
        "1": thing("dog", 5, 20, ("to the left of", "2"), ("wearing", "3")),
        "2": thing("car", 30, 20, ("to the right of", "1")),
        "3": thing("collar", 5, 15)}},
    "2407891": {"width": 60, "height": 40, "objects": {  # two dogs: which one is meant?
        "1": thing("dog", 5, 20, ("above", "2")), "2": thing("car", 30, 20), "3": thing("dog", 40, 1)}},
    "2407892": {"width": 60, "height": 40, "objects": {  # a man is a person
        "1": thing("man", 5, 20, ("to the left of", "2")), "2": thing("horse", 30, 20), "3": thing("person", 40, 1)}},
    "2407893": {"width": 60, "height": 40, "objects": {  # two relations at once: no single truth
        "1": thing("cup", 5, 1, ("above", "2"), ("to the left of", "2")), "2": thing("plate", 30, 30)}},
    "2407894": {"width": 60, "height": 40, "objects": {  # too far apart for one square
        "1": thing("lamp", 0, 20, ("to the left of", "2")), "2": thing("sofa", 50, 20)}},
}


def test_gqa_keeps_clear_relations_and_says_what_it_skips(tmp_path: Path) -> None:
    for image in GRAPHS:
        picture(tmp_path / f"{image}.jpg")
    words = tmp_path / "is_a.txt"
    words.write_text("# kinds\nman, adult\nadult, person\n")
    source, skipped = gqa.read_gqa(gqa_file(tmp_path, GRAPHS), tmp_path, 32, sources.Quota(), words)
    assert [(label.picture, label.subject, label.relation, label.object) for label in source.labels] == [
        ("2407890", "dog", "to the left of", "car"), ("2407890", "car", "to the right of", "dog"),
        ("2407894", "lamp", "to the left of", "sofa")]
    assert skipped == {"object more than once in the picture": 1, "another object is a kind of it": 1,
                       "several relations between the same two": 1}
    opened = {item.picture: item for item in source.open(source.candidates())}
    assert opened["2407890"].image.shape == (32, 32, 3)
    assert opened["2407894"].reason == "objects do not fit into a square"


def test_gqa_without_a_word_list_keeps_is_a_pairs(tmp_path: Path) -> None:
    picture(tmp_path / "2407892.png")
    source, _ = gqa.read_gqa(gqa_file(tmp_path, GRAPHS), tmp_path, 32, sources.Quota())
    assert "man" in {label.subject for label in source.labels}
    assert [candidate.picture for candidate in source.candidates()] == ["2407892"]


def test_gqa_relations_that_contradict_each_other_both_ways_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "1.jpg")
    picture(tmp_path / "2.jpg")
    graphs = {"1": {"objects": {"1": thing("cup", 5, 1, ("above", "2")), "2": thing("plate", 30, 30, ("to the right of", "1"))}},
              "2": {"objects": {"1": thing("cup", 5, 1, ("above", "2")), "2": thing("plate", 30, 30, ("below", "1"))}}}
    source, skipped = gqa.read_gqa(gqa_file(tmp_path, graphs), tmp_path, 32, sources.Quota())
    assert {label.picture for label in source.labels} == {"2"} and len(source.labels) == 2
    assert skipped == {"several relations between the same two": 2}


def test_only_pictures_that_are_there_count_for_the_quota(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [sources.Label(f"p{number}", "dog", "above", "cat", "train") for number in range(50)]
    paths = {f"p{number}": tmp_path for number in range(20)}
    source = sources.LabelledPictures(labels, paths, 16, sources.Quota({"train": 12}), "folder", "")
    assert len(source.candidates()) == 12 and {candidate.picture for candidate in source.candidates()} <= set(paths)
    assert "folder: 30 of 50 labelled pictures are not in the folder" in caplog.text


class Grey:
    """A map maker with constant maps, for tests of which pictures are used."""

    least_psnr = 0.0

    def describe(self) -> dict:
        return {"backbone": "unet", "size": 8, "normalise": "always", "steps": 10, "timesteps": [1]}

    def invert(self, images: torch.Tensor, texts: list, seeds: list):
        return captions.Inverted(torch.ones(len(images), 1, 2, 3, 8, 8).half(), torch.full((len(images),), 30.0))


def test_pictures_that_come_or_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table, folder = tmp_path / "labels.csv", tmp_path / "pictures"
    folder.mkdir()
    table.write_text("file,subject,relation,object,split\na.png,dog,above,cat,train\nb.png,dog,below,cat,train\n")

    def build() -> dict:
        return dataset.build_dataset(tmp_path / "data", sources.read_folder(folder, table, 16, sources.Quota(), ""), Grey())

    with pytest.raises(storage.TrainingError, match="no pictures to build from"):
        build()
    picture(folder / "a.png")
    manifest = build()
    assert manifest["splits"]["train"]["pictures"] == 1
    picture(folder / "b.png")
    assert build() == manifest and "is finished, from other pictures than are there now" in caplog.text
    (tmp_path / "data" / "manifest.json").unlink()  # not finished: the new picture would be lost
    with pytest.raises(storage.TrainingError, match="begun with other settings .other pictures are in the folder"):
        build()
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert build() == manifest  # the maps are there: the pictures are not needed any more


@pytest.mark.parametrize("content", [[], {"1": {"width": 1}}, {"1": {"objects": {"2": {"name": "dog"}}}}])
def test_another_json_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(storage.TrainingError, match="graphs.json|GQA"):
        gqa.read_gqa(gqa_file(tmp_path, content), tmp_path, 32, sources.Quota())


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_folder_with_a_table(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [("a.png", "dog", "left of", "cat"), ("broken.png", "cat", "on top of", "car"),
            ("gone.png", "a", "below", "b")]
    table = tmp_path / f"labels.{kind}"
    names = ("file", "subject", "relation", "object")
    if kind == "csv":
        table.write_text("\n".join([",".join(names), *map(",".join, rows)]))
    else:
        table.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    source = sources.read_folder(tmp_path, table, 16, sources.Quota(), "CC0")
    opened = {item.picture: item for item in source.open(source.candidates())}
    assert (opened["a.png"].relation, opened["a.png"].image.shape) == ("to the left of", (16, 16, 3))
    assert opened["broken.png"].reason == "picture file cannot be read"
    assert "gone.png" not in opened
    assert source.licence == "CC0"


@pytest.mark.parametrize("row", ["./a.png,dog,left of,cat", "a.png,cat,right of,Dog", "a.png,cat,above,dog"])
def test_a_file_has_one_name_a_row_counts_once_and_a_pair_has_one_truth(tmp_path: Path, row: str,
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,subject,relation,object\na.png,dog,above,cat\n./a.png,cat,below,dog\na.png,dog,over,cat\n"
                     "a.png,dog,left of,car\n")
    source = sources.read_folder(tmp_path, table, 16, sources.Quota(), "")
    assert [(label.picture, label.subject, label.object) for label in source.labels] == [
        ("a.png", "dog", "cat"), ("a.png", "cat", "dog"), ("a.png", "dog", "car")]
    assert not caplog.text
    table.write_text(table.read_text() + row + "\n")
    source = sources.read_folder(tmp_path, table, 16, sources.Quota(), "")
    assert [label.object for label in source.labels] == ["car"]
    assert "labels.csv: 1 pairs of objects are left out" in caplog.text


@pytest.mark.parametrize(("row", "message"), [
    ("a.png,dog,beside,cat,", "row 2.*beside"), ("a.png,dog,above and to the left of,cat,", "diagonal"),
    ("a.png,,above,cat,", "subject is missing"), ("../a.png,dog,above,cat,", "outside the folder"),
    ("a.png,dog,above,cat,half", "split"), ("a.png,dog#2,above,cat,", "row 2: 'dog#2' cannot be found in a caption"),
])
def test_a_wrong_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"file,subject,relation,object,split\n{row}\n")
    with pytest.raises(storage.TrainingError, match=message):
        sources.read_folder(tmp_path, table, 16, sources.Quota(), "")


EVERYTHING = {f"p{number}" for number in range(40)}


def test_no_picture_is_on_two_sides() -> None:
    labels = [sources.Label(f"p{number % 40}", "dog", relation, "cat") for number, relation in
              enumerate(sources.RELATIONS * 50)]
    chosen = sources.Quota({"train": 10, "validation": 3, "test": None}).choose(labels, EVERYTHING)
    sides: dict[str, set] = {}
    for candidate in chosen:
        sides.setdefault(candidate.picture, set()).add(candidate.split)
    assert all(len(splits) == 1 for splits in sides.values())
    counts = [sum(c.split == "train" and labels[c.number].relation == relation for c in chosen)
              for relation in sources.RELATIONS]
    assert counts == [10, 10, 10, 10]
    assert chosen == sources.Quota({"train": 10, "validation": 3, "test": None}).choose(labels, EVERYTHING)


def test_one_picture_given_to_two_splits_is_an_error() -> None:
    labels = [sources.Label("p", "a", "above", "b", "train"), sources.Label("p", "b", "below", "a", "test")]
    with pytest.raises(storage.TrainingError, match="two splits"):
        sources.LabelledPictures(labels, {}, 16, sources.Quota(), "folder", "")


def test_the_square_holds_both_objects() -> None:
    assert sources.square_around((60, 40), None) == (10, 0, 50, 40)
    assert sources.square_around((60, 40), ((45, 0, 58, 9), (30, 9, 40, 20))) == (18, 0, 58, 40)
    assert sources.square_around((60, 40), ((0, 0, 9, 9), (50, 9, 60, 20))) is None


def test_wrong_captions_have_another_word_and_stay_the_same() -> None:
    examples = [sources.Example(f"p{number}", torch.zeros(1), "dog", "above", "apple") for number in range(60)]
    words = [dataset.wrong_relation(0, example) for example in examples]
    assert set(words) == set(sources.RELATIONS) - {"above"}
    assert words == [dataset.wrong_relation(0, example) for example in examples]
    assert words != [dataset.wrong_relation(1, example) for example in examples]
    assert captions.Caption("apple", "above", "dog").text == "An apple above a dog"
