"""Hostile files: each is refused with a message; none makes the process read foreign memory, take gigabytes or minutes, or crash.

measured.py reads each file in its own process and reports the system's counts.
"""
from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier
from learn_to_steer.classifiers.network import RelationNetwork, paper_config

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures with fork and /proc, which only Linux has")
SECONDS, FACTOR, ALLOWANCE = 2, 4, 2**25
RELATIONS = ("above", "below", "to the left of", "to the right of")


def published(**changes) -> dict:
    torch.manual_seed(0)
    network = RelationNetwork(paper_config("unet", d_model=32), 40, len(RELATIONS))
    return {"model_state_dict": dict(network.state_dict()), "rel_name_to_idx": {name: i for i, name in enumerate(RELATIONS)},
            "input_channels": 40, "config": paper_config("unet", d_model=32).to_dict(),
            "training_config": {"timesteps": [5, 25], "num_timesteps": 50, "model_name": "sd2"}, **changes}


class Reduced:
    """Pickled as a call."""

    def __init__(self, function: Callable, *arguments, state: object = None) -> None:
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


LYING = Reduced(numpy.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (numpy.dtype("f8"), 10**9)}, 8, 1, 0))
RECONSTRUCT, SCALAR = numpy.array([0]).__reduce__()[0], numpy.float64(0).__reduce__()[0]


def array(dtype: object, shape: tuple = (1,), content: bytes = b"ABCDEFGH") -> Reduced:
    return Reduced(RECONSTRUCT, numpy.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


def shared_lists() -> list:
    values = [1]
    for _ in range(9):
        values = [values] * 10
    return values


def in_training(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(published(training_config={"num_timesteps": 50, "lr": value}), path)


def with_weight(make: Callable[[], torch.Tensor], name: str = "object_extractor.query_vector") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = published()
        content["model_state_dict"][name] = make()
        torch.save(content, path)
    return write


def one_storage_many_times(path: Path) -> None:
    content, table = published(), torch.zeros(500_000)
    content["model_state_dict"].update({f"more{number}": table for number in range(2000)})
    torch.save(content, path)


def zip_with(pickled: bytes, kind: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    return write


def bomb_that_lies(path: Path) -> None:
    """Declares 100 bytes and unpacks to 256 MB."""
    zip_with(b"\0" * 2**28, zipfile.ZIP_DEFLATED)(path)
    content = path.read_bytes().replace(struct.pack("<L", 2**28), struct.pack("<L", 100))
    path.write_bytes(content)


def many_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(40_000):
            archive.writestr(f"a/data/{number}", b"")


def overlapping(path: Path) -> None:
    """Every entry of the directory unpacks the same megabytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**25)
    whole = out.getvalue()
    start = whole.rfind(b"PK\x01\x02")
    entry, end = whole[start:whole.rfind(b"PK\x05\x06")], bytearray(whole[whole.rfind(b"PK\x05\x06"):])
    entries = b"".join(entry.replace(b"data.pkl", f"data{number:04d}".encode()) for number in range(1000))
    struct.pack_into("<HHL", end, 8, 1000, 1000, len(entries))
    path.write_bytes(whole[:start] + entries + bytes(end))


def encrypted(path: Path) -> None:
    torch.save(published(), path)
    content = path.read_bytes()
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = content.find(mark)
        while place >= 0:
            content = content[:place + offset] + bytes([content[place + offset] | 1]) + content[place + offset + 1:]
            place = content.find(mark, place + 1)
    path.write_bytes(content)


def beginning_lost(path: Path) -> None:
    torch.save(published(), path)
    path.write_bytes(path.read_bytes()[4096:])


def colliding_keys() -> bytes:
    """A dict with 100,000 numeric keys of the same hash: each is compared with all earlier keys."""
    return pickle.dumps({number * (2**61 - 1): None for number in range(100_000)})


def nested_key() -> bytes:
    """A tuple of tuples, shared by reference, whose hash takes 2^60 steps."""
    return b"\x80\x02}(" + b"K\x01" + b"\x86".join([b"2"] * 61) + b"\x86NuN0."


HOSTILE = {
    "dtype_that_lies": in_training(array(LYING)),
    "scalar_that_lies": in_training(Reduced(SCALAR, LYING, b"ABCDEFGH")),
    "dtype_of_objects": in_training(array(Reduced(numpy.dtype, "O8", False, True, state=(
        3, "|", None, None, None, -1, -1, 63)))),
    "shape_that_lies": in_training(array(numpy.dtype("f8"), (10**9,))),
    "empty_shape": in_training(array(numpy.dtype("f8"), (10**9, 0), b"")),
    "shared_lists": in_training(shared_lists()),
    "shared_text": in_training(["x" * 10**6] * 10**4),
    "deep_list": zip_with(b"]" * 150_000 + b"a" * 149_999 + b"."),
    "many_dicts": zip_with(b"(" + b"}" * 4_000_000 + b"l."),
    "many_in_memo": zip_with(b"\x80\x04" + b"}\x94" * 2_000_000 + b"."),
    "far_in_memo": zip_with(b"\x80\x02]r\xff\xff\xff\x7f."),
    "long_bytes": zip_with(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
    "doubled": zip_with(b"]" + b"2" * 100_000 + b"e" * 10 + b"."),
    "colliding_keys": zip_with(colliding_keys()),
    "nested_key": zip_with(nested_key()),
    "expanded_tensor": with_weight(lambda: torch.zeros(1).expand(10**10)),
    "expanded_weight": with_weight(lambda: torch.zeros(1).expand(1, 1, 32)),
    "meta_tensor": with_weight(lambda: torch.empty(10**9, device="meta")),
    "sparse_tensor": with_weight(lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (10**12,))),
    "one_storage_many_times": one_storage_many_times,
    "zip_bomb": zip_with(pickle.dumps(b"\0" * 2**20) + b"\0" * 2**28, zipfile.ZIP_DEFLATED),
    "bomb_that_lies": bomb_that_lies, "many_entries": many_entries, "overlapping": overlapping, "encrypted": encrypted,
    "beginning_lost": beginning_lost,
    "bare_zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "ordered": lambda path: torch.save(OrderedDict(a=1), path),
}


def with_header(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def metadata(text: str) -> bytes:
    return with_header(json.dumps({"__metadata__": {"relation_classifier": text}}).encode())


OWN = {
    "header_beyond_the_file": with_header(b"{}", length=2**62),
    "header_of_spaces": with_header(b"{}" + b" " * 9_000_000),
    "many_tensors": with_header(json.dumps({f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                            for number in range(300_000)}).encode()),
    "deep_header": with_header(b'{"a":' + b"[" * 100_000),
    "deep": metadata("[" * 100_000 + "]" * 100_000),
    "many_lists": metadata("[" + "[]," * 300_000 + "[]]"),
    "many_quotes": metadata('"' + '\\"' * 300_000),
    "long_number": metadata("1" * 500_000),
    "not_a_number": metadata('{"format_version": NaN}'),
    "infinite": metadata('{"format_version": 1e999}'),
    "huge_shape": with_header(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()),
}


GRAPH = {"objects": {"1": {"name": "dog", "x": 1, "y": 1, "w": 5, "h": 5, "relations": [{"name": "above", "object": "2"}]},
                     "2": {"name": "cat", "x": 1, "y": 9, "w": 5, "h": 5, "relations": []}}}
JSON = {
    "deep": "[" * 100_000 + "]" * 100_000, "deep_in_one": '{"1": {"objects": ' + "[" * 900_000 + "]" * 900_000 + "}}",
    "deep_list": '[{"file": ' + "[" * 100_000 + "]" * 100_000 + "}]",
    "many_lists": '{"1": {"objects": [' + "[]," * 3_000_000 + "[]]}}", "many_in_list": '[{"a": [' + "[]," * 3_000_000 + "[]]}]",
    "long_number": '{"1": ' + "1" * 5_000_000 + "}", "cut_off": '{"1": {"objects": {', "nothing": "", "text": '"text"',
    "not_a_number": json.dumps({"1": {"objects": {**GRAPH["objects"], "1": {**GRAPH["objects"]["1"], "x": float("nan")}}}}),
    "latin": '{"1": "\u00e9"}'.encode("latin-1"), "trailing": "[] []", "trailing_object": "{} {}",
}


DOCUMENTS = {"gqa": "graphs.json", "table": "table.json", "dataset": "manifest.json"}


def honest(folder: Path) -> list[tuple[str, Path]]:
    """Valid files of more than 20 MB; half-precision numbers become float32."""
    config = paper_config("mmdit", d_model=512)
    network = RelationNetwork(config, 1368, 4)
    for name, weights in (("whole", network.state_dict()), ("half", network.half().state_dict())):
        torch.save(published(model_state_dict=weights, config=config.to_dict(), input_channels=1368), folder / f"{name}.pth")
    save_classifier(folder / "own.safetensors", load_classifier(folder / "whole.pth"))
    return [("classifier", folder / name) for name in ("whole.pth", "half.pth", "own.safetensors")]


def scene_graphs(path: Path) -> None:
    """GQA's own file has 400 MB."""
    skipped = {**GRAPH, "objects": {**GRAPH["objects"], "3": {**GRAPH["objects"]["2"], "name": "dog"}}, "location": "x" * 2000}
    with open(path, "w", encoding="utf-8") as file:
        file.write("{" + ",".join(f'"{number}": {json.dumps(skipped)}' for number in range(10_000)))
        file.write(f', "last": {json.dumps(GRAPH)}}}')


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What came of each file, by its path in the folder; all are read by one process, which forks."""
    folder = tmp_path_factory.mktemp("files")
    files: list[tuple[str, Path]] = honest(folder)
    for name, write in HOSTILE.items():
        files.append(("classifier", folder / f"{name}.pth"))
        write(files[-1][1])
    for name, content in OWN.items():
        files.append(("classifier", folder / f"{name}.safetensors"))
        files[-1][1].write_bytes(content)
    for place, content in JSON.items():
        (folder / place).mkdir()
        for kind, name in DOCUMENTS.items():
            files.append((kind, folder / place / name))
            files[-1][1].write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "chain.txt").write_text("\n".join(f"a{number}, a{number + 1}" for number in range(30_000)))
    (folder / "star.txt").write_text("\n".join(f"a0, b{number}" for number in range(40_000)))
    (folder / "long.txt").write_text("a0, b\n" * 1_000_000)
    files += [("words", folder / f"{name}.txt") for name in ("chain", "star", "long")]
    files.append(("gqa", folder / "large.json"))
    scene_graphs(files[-1][1])
    (folder / "list").write_text(json.dumps([(kind, str(path)) for kind, path in files]))
    command = [sys.executable, str(Path(__file__).with_name("measured.py")), str(folder / "list")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    return {path.relative_to(folder).as_posix(): {**json.loads(line), "size": path.stat().st_size}
            for (_, path), line in zip(files, result.stdout.splitlines(), strict=True)}


def check_measured(found: dict) -> None:
    assert found["signal"] == 0, found
    assert found["seconds"] < SECONDS and found["bytes"] < FACTOR * found["size"] + ALLOWANCE, found


def check_refused(found: dict, error: str, name: str) -> None:
    check_measured(found)
    assert found["result"].startswith(f"{error}: ") and name in found["result"], found


@pytest.mark.parametrize("name", [*(f"{name}.pth" for name in HOSTILE), *(f"{name}.safetensors" for name in OWN)])
def test_a_hostile_classifier_file_is_refused(found: dict, name: str) -> None:
    check_refused(found[name], "ClassifierError", name)


@pytest.mark.parametrize("place", JSON)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_hostile_json_is_refused(found: dict, kind: str, place: str) -> None:
    check_refused(found[f"{place}/{DOCUMENTS[kind]}"], "TrainingError", place)


@pytest.mark.parametrize("name", ["chain.txt", "star.txt", "long.txt"])
def test_a_word_list_of_endless_chains_is_refused(found: dict, name: str) -> None:
    check_refused(found[name], "TrainingError", name)


@pytest.mark.parametrize("name", ["whole.pth", "half.pth", "own.safetensors"])
def test_honest_files_take_no_more_either(found: dict, name: str) -> None:
    assert found[name]["result"] == "read: LearnedClassifier" and found[name]["size"] > 20_000_000, found[name]
    check_measured(found[name])


def test_a_large_scene_graph_file_is_not_held_in_memory(found: dict) -> None:
    assert found["large.json"]["result"] == "read: tuple" and found["large.json"]["size"] > 20_000_000
    assert found["large.json"]["bytes"] < 10_000_000, found["large.json"]
