"""Damages classifier files at random and reads them in a child process, so that a crash is a result."""
from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import resource
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

VALUES = [None, True, -1, 0, 1, 2**31, 10**30, 10**5000, 0.5, float("nan"), float("inf"), "", "16", "unet", "x" * 5000, b"bytes",
          [], [1], {}, {"a": 1}, [[[]]], (1, 2), {3}, torch.zeros(2), torch.zeros(0, 3), numpy.float32(1), numpy.arange(3),
          [None] * 50]
JSON_VALUES = [value for value in VALUES if isinstance(value, (type(None), int, float, str, list, dict))
               and value != 10**5000]


def flip(rng: random.Random, content: bytes) -> bytes:
    """Flips bits, often near the end, where a zip archive has its directory, or near the beginning."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.choice((rng.randrange(len(changed)), rng.randrange(min(400, len(changed))),
                            len(changed) - 1 - rng.randrange(min(12000, len(changed)))))
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice((content[:last], content[first:], content[:first] + content[last:]))


def swap(rng: random.Random, content: bytes) -> bytes:
    """Exchanges two pieces, or overwrites one with another."""
    length = rng.choice((1, 4, 16, 64, 512))
    a, b = (rng.randrange(max(1, len(content) - length)) for _ in range(2))
    changed = bytearray(content)
    first, second = content[a:a + length], content[b:b + length]
    changed[a:a + length], changed[b:b + length] = second, rng.choice((first, second))
    return bytes(changed)


def change_value(rng: random.Random, tree: object, values: list) -> object:
    """Changes, removes or renames one value at a random place."""
    places: list[tuple] = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            places.append((node, key))
            walk(item)

    walk(tree)
    group, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 and isinstance(group, dict):
        del group[key]
    elif kind == 1 and isinstance(group, dict):
        group[rng.choice(["", "x", "layout", "0", "\udc80" if values is VALUES else "\u20ac"])] = group.pop(key)
    else:
        group[key] = copy.deepcopy(rng.choice(values))  # it may be changed in its turn
    return tree


def mutate_pickle(rng: random.Random, content: bytes) -> bytes:
    """Removes, repeats, exchanges or replaces opcodes of a pickle."""
    places = [place for _, _, place in pickletools.genops(content)]
    pieces = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    codes = [code.code.encode("latin-1") for code in pickletools.opcodes]
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(pieces))
        piece = pieces[place]
        pieces[place] = rng.choice((
            b"", piece + piece, pieces[rng.randrange(len(pieces))], rng.choice(codes) + piece[1:], rng.choice(codes) + piece,
            bytes([piece[0]]) + rng.randbytes(len(piece) - 1)))
    return b"".join(pieces)


def rezip(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A torch.save archive with its pickle replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def with_metadata(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with a changed value in its description, or with damaged JSON text."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    if rng.random() < 0.2:
        packed = flip(rng, json.dumps(header).encode())
    else:
        description = json.loads(header["__metadata__"]["relation_classifier"])
        for _ in range(rng.choice((1, 1, 3))):
            description = change_value(rng, description, JSON_VALUES)
        header["__metadata__"]["relation_classifier"] = json.dumps(description)
        if rng.random() < 0.1:
            change_value(rng, header, JSON_VALUES)
        packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + content[8 + length:]


def with_value(rng: random.Random, content: bytes, legacy: bool) -> bytes:
    """A published file with one changed value."""
    tree = torch.load(io.BytesIO(content), weights_only=False)
    for _ in range(rng.choice((1, 1, 3))):
        tree = change_value(rng, tree, VALUES)
    out = io.BytesIO()
    torch.save(tree, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def damaged(rng: random.Random, name: str, content: bytes) -> bytes:
    ways = [flip, flip, cut, swap]
    if name.endswith(".safetensors"):
        ways += [with_metadata] * 4
    else:
        legacy = not zipfile.is_zipfile(io.BytesIO(content))
        ways += [lambda rng, content: with_value(rng, content, legacy)] * 3
        if not legacy:
            ways += [lambda rng, content: rezip(content, lambda pickled: mutate_pickle(rng, pickled))] * 4
    return rng.choice(ways)(rng, content)


def main(sources: list[Path], folder: Path, first: int, count: int) -> None:
    """Reads damaged files number first to first + count; prints one JSON line for each that is not refused properly."""
    from learn_to_steer.classifiers.base import ClassifierError
    from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier

    whole = {source.name: source.read_bytes() for source in sources}
    for source in sources:
        load_classifier(source)  # what is imported and allocated at first use counts for none
    accepted = 0
    tracemalloc.start()
    for number in range(first, first + count):
        rng = random.Random(number)
        name = rng.choice(sorted(whole))
        path = folder / f"{number}{Path(name).suffix}"
        content = damaged(rng, name, whole[name])
        path.write_bytes(content)
        del content
        print(number, flush=True)  # the last one printed is the one that crashed
        tracemalloc.reset_peak()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before, began, fault = tracemalloc.get_traced_memory()[0], time.thread_time(), None
        try:
            classifier = load_classifier(path)
            # What was accepted must be of use: judged with and written.
            maps = torch.rand(1, classifier.layout.channels or 1, classifier.layout.size, classifier.layout.size)
            classifier.logits(maps, maps, torch.tensor([0.5]))
            save_classifier(folder / "again.safetensors", classifier)
            load_classifier(folder / "again.safetensors")
            accepted += 1
        except ClassifierError as error:
            if path.name not in str(error) or len(str(error)) > 2000:
                fault = f"the message does not name the file, or is too long: {str(error)[:300]}"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:300]
        # tracemalloc sees what Python takes, the process's peak also what torch and safetensors take.
        seconds, memory = time.thread_time() - began, max(
            tracemalloc.get_traced_memory()[1] - before, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most))
        if seconds > 2 or memory > 4 * path.stat().st_size + 2**25:
            fault = f"{seconds:.1f} s, {memory / 2**20:.0f} MB for a file of {path.stat().st_size} bytes"
        if fault is None:
            path.unlink()
        else:
            print(json.dumps({"number": number, "source": name, "fault": fault}), flush=True)
    print(f"accepted: {accepted}")


if __name__ == "__main__":
    import importlib

    sys.path.append(str(Path(__file__).resolve().parents[2]))
    importlib.import_module("dev")  # registers the pack
    torch.set_num_threads(1)
    main([Path(word) for word in sys.argv[4:]], Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
