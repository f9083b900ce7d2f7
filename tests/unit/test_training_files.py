"""Datasets, tables and word lists on disk: what is missing, swapped, altered or of another form is noticed, in words."""
from __future__ import annotations

import importlib
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from learn_to_steer.files.locks import locked
from PIL import Image

captions, dataset, gqa, sources, storage, trainer = (importlib.import_module(f"learn_to_steer.training.{name}") for name in (
    "captions", "dataset", "gqa", "sources", "storage", "trainer"))
TrainingError = storage.TrainingError


class Pictures:
    """Pictures without files; `usable`: which of them can be opened."""

    licence = "CC0"

    def __init__(self, usable=lambda number: True) -> None:
        self.usable = usable

    def describe(self) -> dict:
        return {"kind": "tiny"}

    def candidates(self) -> list:
        return [sources.Candidate(f"{split}-{number}", split, number)
                for split, count in (("train", 12), ("validation", 4), ("test", 4)) for number in range(count)]

    def open(self, candidates: list) -> list:
        return [sources.Example(item.picture, torch.full((4, 4, 3), item.number / 20), "dog", sources.RELATIONS[item.number % 4],
                                "cat") if self.usable(item.number) else sources.Drop(item.picture, sources.UNREADABLE)
                for item in candidates]


class Maps:
    least_psnr = 20.0

    def describe(self) -> dict:
        return {"backbone": "unet", "size": 8, "normalise": "always", "steps": 10, "timesteps": [1, 4]}

    def invert(self, images: torch.Tensor, texts: list, seeds: list):
        maps = [torch.rand(2, 2, 5, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return captions.Inverted(torch.stack(maps).half(), torch.full((len(images),), 30.0))


def build(folder: Path, **options) -> dict:
    return dataset.build_dataset(folder, Pictures(**options), Maps(), batch=4)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build(tmp_path / "data")
    return tmp_path / "data"


def read_all(folder: Path) -> int:
    opened = dataset.RelationDataset(folder)
    return sum(len(opened.read(split)[0]) for split in sources.SPLITS)


SHARD = "train-00001.safetensors"


def missing(shards: Path) -> None:
    (shards / SHARD).unlink()


def swapped(shards: Path) -> None:
    shutil.copy(shards / "train-00002.safetensors", shards / SHARD)


def altered(shards: Path) -> None:
    content = bytearray((shards / SHARD).read_bytes())
    content[-1000] ^= 1
    (shards / SHARD).write_bytes(content)


def added(shards: Path) -> None:
    shutil.copy(shards / SHARD, shards / "train-00003.safetensors")


def cut_off(shards: Path) -> None:
    (shards / SHARD).write_bytes((shards / SHARD).read_bytes()[:-1])


@pytest.mark.parametrize("harm", [missing, swapped, altered, added, cut_off])
def test_a_shard_that_is_not_the_one_is_noticed(built: Path, harm) -> None:
    before = {path.name: path.read_bytes() for path in (built / "shards").iterdir()}
    assert read_all(built) == 40
    harm(built / "shards")
    with pytest.raises(TrainingError, match=r"train-0000[13]\.safetensors") as error:
        read_all(built)
    if harm is added:
        return
    if harm is altered:  # as the message says
        assert "Delete it" in str(error.value)
        (built / "shards" / SHARD).unlink()
    build(built)
    assert {path.name: path.read_bytes() for path in (built / "shards").iterdir()} == before and read_all(built) == 40


def older(folder: Path) -> None:
    """Makes of a dataset what was written before there were checksums."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("shards", "unreadable"):
        del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in (folder / "shards").iterdir():
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:8 + length])
        described = json.loads(header["__metadata__"]["relation_maps"])
        described.pop("maps_sha256", None)
        header["__metadata__"]["relation_maps"] = json.dumps(described)
        packed = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length:])


def test_datasets_without_checksums_still_load_and_go_on(built: Path, tmp_path: Path) -> None:
    mark = dataset.RelationDataset(built).sha256
    older(built)
    assert read_all(built) == 40
    settings = trainer.TrainingSettings(epochs=1)
    trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(built)], settings, 32).run()
    build(built)  # queued again, it gets its list of shards
    assert "shards" in json.loads((built / "manifest.json").read_text()) and read_all(built) == 40
    assert dataset.RelationDataset(built).sha256 == mark
    trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(built)], settings, 32)  # the same data for a run begun before
    older(built)
    missing(built / "shards")
    with pytest.raises(TrainingError, match="holds 16 samples for train, but its manifest lists 24"):
        read_all(built)


@pytest.mark.parametrize(("entry", "value", "words"), [
    ("channels", "5", "channels is '5', but must be a whole number"), ("channels", None, "channels is None"),
    ("maps", [], "maps is a list of 0"), ("maps", {}, "maps.backbone is missing"), ("licence", 3, "licence is 3"),
    ("maps", {"backbone": "unet", "normalise": "always", "size": 8, "steps": 10, "timesteps": ["1"]}, "maps.timesteps is"),
    ("maps", {"backbone": "unet", "normalise": "always", "size": 8, "steps": 3, "timesteps": [1, 4]}, "step indices below 3"),
    ("maps", {"backbone": "vae", "normalise": "always", "size": 8, "steps": 10, "timesteps": [1]}, "maps.backbone is 'vae'"),
    ("splits", {"train": {}}, "splits.train.samples is missing"), ("source", "folder", "source is 'folder'"),
    ("shards", {"../x.safetensors": {"sha256": ""}}, "a name that no shard has"),
    ("shards", {"train-00000.safetensors": 1}, "shards.train"),
])
def test_every_entry_of_a_manifest_is_checked_when_it_is_read(built: Path, entry: str, value: object, words: str) -> None:
    path = built / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(TrainingError, match=rf"manifest\.json: .*{words}"):
        dataset.RelationDataset(built)


@pytest.mark.parametrize(("change", "words"), [
    (lambda shard: shard["samples"][0].update(relation="beside"), "relation is 'beside', but must be one of above"),
    (lambda shard: shard["samples"][0].update(psnr="good"), "psnr is 'good'"),
    (lambda shard: shard.update(samples=3), "samples is 3"),
    (lambda shard: shard["samples"].append([]), "a sample is a list"), (lambda shard: shard["samples"].pop(), "describes 7"),
])
def test_every_entry_of_a_shard_is_checked_when_it_is_read(built: Path, change, words: str) -> None:
    older(built)
    path = built / "shards" / SHARD
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    described = json.loads(header["__metadata__"]["relation_maps"])
    change(described)
    header["__metadata__"]["relation_maps"] = json.dumps(described)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length:])
    with pytest.raises(TrainingError, match=f"{SHARD}: .*{words}"):
        read_all(built)


def test_one_process_builds_or_trains_in_a_folder(built: Path, tmp_path: Path) -> None:
    with locked(built), pytest.raises(TrainingError, match="data: another run is at work there.*Wait until it has ended"):
        build(built)
    run = trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(built)], trainer.TrainingSettings(epochs=1), 32)
    with locked(tmp_path / "run"), pytest.raises(TrainingError, match="run: another run is at work there"):
        run.run()
    run.run()


def test_a_damaged_state_is_named(built: Path, tmp_path: Path) -> None:
    def begin():
        return trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(built)], trainer.TrainingSettings(epochs=1), 32)
    begin().run()
    for content in (b"", b"nothing", (tmp_path / "run" / "state.pt").read_bytes()[:5000]):
        (tmp_path / "run" / "state.pt").write_bytes(content)
        with pytest.raises(TrainingError, match=r"state\.pt is damaged or cut off.*Delete it"):
            begin()


@pytest.mark.parametrize(("setting", "value"), [("learning_rate", float("nan")), ("learning_rate", 0.0),
                                                ("weight_decay", float("inf")), ("factor", -1.0)])
def test_numbers_that_are_none_are_refused(setting: str, value: float) -> None:
    with pytest.raises(TrainingError, match=f"{setting}: {value} is not usable"):
        trainer.TrainingSettings(**{setting: value})


def test_a_dataset_without_a_usable_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"No picture gives a usable sample \(20 x picture file cannot be read; .*train-"):
        build(tmp_path / "data", usable=lambda number: False)
    with pytest.raises(TrainingError, match="is not finished"):
        dataset.RelationDataset(tmp_path / "data")


def test_pictures_that_cannot_be_read_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = build(tmp_path / "data", usable=lambda number: number != 2)
    assert manifest["unreadable"] == ["test-2", "train-2", "validation-2"]
    assert "3 picture files could not be read and were passed over: test-2, train-2, validation-2" in caplog.text


def picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)


def broken_pictures(folder: Path) -> list[str]:
    """One of each kind that Pillow opens, cut off or damaged at several places."""
    names = []
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp", "avif", "icns", "ico", "ppm", "jp2"):
        path = folder / f"whole.{kind}"
        try:
            Image.new("RGB", (64, 64), "red").save(path)
        except (KeyError, OSError, ValueError):  # this Pillow was built without it
            continue
        whole = path.read_bytes()
        path.unlink()
        harmed = (whole[:len(whole) // 2], whole[:30], whole[:12] + bytes(len(whole) - 12),
                  whole[:20] + b"\xff" * 20 + whole[40:], b"icns" + struct.pack(">I", 2**31) + whole[8:])
        for number, content in enumerate(harmed):
            names.append(f"{kind}{number}.{kind}")
            (folder / names[-1]).write_bytes(content)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100))))))
    return [*names, "bomb.png"]


@pytest.mark.filterwarnings("ignore")
def test_broken_pictures_of_every_kind_are_passed_over(tmp_path: Path) -> None:
    names = broken_pictures(tmp_path)
    picture(tmp_path / "good.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,subject,relation,object,split\n" + "".join(
        f"{name},dog,above,cat,train\n" for name in [*names, "good.png"]))
    source = sources.read_folder(tmp_path, table, 32, sources.Quota(), "")
    opened = source.open(source.candidates())
    assert len(opened) == len(names) + 1
    assert isinstance(next(item for item in opened if item.picture == "good.png"), sources.Example)
    assert sum(isinstance(item, sources.Drop) for item in opened) > len(names) // 2


ROWS = [("file", "subject", "relation", "object"), ("a.png", "dog", "left of", "cat")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "; "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_as_spreadsheets_write_them(tmp_path: Path, separator: str, encoding: str, end: str) -> None:
    picture(tmp_path / "a.png")
    text = end.join(separator.join(row) for row in [*ROWS, ("b.png", "\u732b", "above", "caf\u00e9")])
    table = tmp_path / "labels.csv"
    table.write_bytes(text.encode(encoding) if encoding != "utf-16-le" else b"\xff\xfe" + text.encode(encoding))
    labels = sources.read_folder(tmp_path, table, 16, sources.Quota(), "").labels
    assert [(label.picture, label.subject, label.object) for label in labels] == [
        ("a.png", "dog", "cat"), ("b.png", "\u732b", "caf\u00e9")]


@pytest.mark.parametrize(("content", "words"), [
    ("file,subject,relation,object\na.png,\u732b,above,\u72d7\n".encode("gbk"), "not written in UTF-8. Save the table as CSV"),
    (b"file|subject|relation|object\na|b|above|c\n", "the first line must name the columns file, subject, relation, object"),
    (b"", "the first line must name"), (b"root:x:0:0:root:/root:/bin/bash\n", "the first line must name"),
    (b"file,subject,relation,object\n\0a.png,a,above,b\n", "is not the name of a file|cannot be read as CSV"),
    (b"file,subject,relation,object\n\"" + b"a" * 200_000, "cannot be read as CSV"),
    (b"file,subject,relation,object\n" + b"a" * 5000 + b",a,above,b\n", "is not the name of a file"),
], ids=["gbk", "bars", "empty", "another file", "nul", "quotation", "long name"])
def test_another_table_is_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(TrainingError, match=f"labels.csv.*({words})") as error:
        sources.read_folder(tmp_path, table, 16, sources.Quota(), "")
    assert "root:x" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("row", [{"file": ["a"]}, {"split": 3}, {"relation": {"a": 1}}])
def test_values_of_another_kind_in_a_table_are_named(tmp_path: Path, row: dict) -> None:
    whole = {"file": "a.png", "subject": "dog", "relation": "above", "object": "cat", **row}
    (tmp_path / "labels.json").write_text(json.dumps([whole]))
    with pytest.raises(TrainingError, match=f"labels.json, row 1: {next(iter(row))} is .*must be a text"):
        sources.read_folder(tmp_path, tmp_path / "labels.json", 16, sources.Quota(), "")


SECRET = "hunter2-AKIA-secret"
GRAPH = {"objects": {"1": {"name": "dog", "x": 1, "y": 1, "w": 5, "h": 5, "relations": [{"name": "above", "object": "2"}]},
                     "2": {"name": "cat", "x": 1, "y": 9, "w": 5, "h": 5, "relations": []}}}


@pytest.mark.parametrize("content", [
    f"{SECRET}\n", f"password = {SECRET}\n", f"a, b\n{SECRET}\n", f'{{"{SECRET}": {{"{SECRET}": "{SECRET}"}}}}', f'["{SECRET}"]',
    f'{{"{SECRET}": {{"objects": {{"{SECRET}": "{SECRET}"}}}}}}', f'{{"a": "{SECRET}', f"{SECRET}\xff",
    f'[{{"{SECRET}": "{SECRET}"}}]',
])
def test_messages_do_not_quote_a_file_of_another_form(tmp_path: Path, content: str) -> None:
    """The paths are typed in the browser, where the messages are shown, and may name any file of the server."""
    graphs, other = tmp_path / "graphs.json", tmp_path / "other.json"
    graphs.write_text(json.dumps({"1": GRAPH}))
    other.write_bytes(content.encode("latin-1"))
    table = tmp_path / "labels.csv"
    table.write_bytes(other.read_bytes())
    for read in (lambda: gqa.read_gqa(graphs, tmp_path, 32, sources.Quota(), other),
                 lambda: gqa.read_gqa(other, tmp_path, 32, sources.Quota()),
                 lambda: sources.read_folder(tmp_path, other, 32, sources.Quota(), ""),
                 lambda: sources.read_folder(tmp_path, table, 32, sources.Quota(), "")):
        try:
            read()
        except TrainingError as error:
            assert SECRET not in str(error) and ("other.json" in str(error) or "labels.csv" in str(error))
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("change", [
    {"x": "1"}, {"x": None}, {"w": [1]}, {"name": 5}, {"relations": {}}, {"relations": [1]}, {"relations": [{"name": "above"}]},
    {"relations": [{"name": 3, "object": "2"}]}, {"relations": [{"name": "above", "object": ["2"]}]}])
def test_values_of_another_kind_in_a_scene_graph_are_named(tmp_path: Path, change: dict) -> None:
    graph = {"objects": {**GRAPH["objects"], "1": {**GRAPH["objects"]["1"], **change}}}
    (tmp_path / "graphs.json").write_text(json.dumps({"1": GRAPH, "2407890": graph}))
    with pytest.raises(TrainingError, match=r"graphs\.json, image 2407890: not in GQA's form"):
        gqa.read_gqa(tmp_path / "graphs.json", tmp_path, 32, sources.Quota())
