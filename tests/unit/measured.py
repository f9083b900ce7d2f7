"""Reads each file in its own process, and prints outcome, CPU seconds and memory as JSON lines.

    python measured.py LIST

LIST: a JSON file of pairs: classifier, gqa, table, words or dataset, and the file to read as that.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def readers() -> dict[str, Callable[[Path], object]]:
    checkpoint, dataset, gqa, sources = (importlib.import_module(f"learn_to_steer.{name}") for name in (
        "classifiers.checkpoint", "training.dataset", "training.gqa", "training.sources"))
    return {"classifier": checkpoint.load_classifier,
            "gqa": lambda path: gqa.read_gqa(path, path.parent, 32, sources.Quota()),
            "table": lambda path: sources.read_folder(path.parent, path, 32, sources.Quota(), ""),
            "words": lambda path: gqa.read_word_list(path)("a0"),
            "dataset": lambda path: dataset.RelationDataset(path.parent)}


def resident() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_apart(read: Callable[[Path], object], path: Path, before: Callable[[], object]) -> dict:
    """Reads `path` in a fork of this process. The system reports its time and peak memory when it ends.

    before: called first in the fork and not counted, because loading code takes memory too.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        before()
        started, memory = time.process_time(), resident()
        try:
            text = f"read: {type(read(path)).__name__}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        answer = {"result": text[:4000], "seconds": time.process_time() - started, "memory": memory}
        os.write(sending, json.dumps(answer).encode())
        os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as answer:
        found = json.loads(answer.read() or b'{"result": "ended", "seconds": 0, "memory": 0}')
    _, status, usage = os.wait4(child, 0)
    return {"file": path.name, "result": found["result"], "seconds": found["seconds"],
            "bytes": usage.ru_maxrss * 1024 - found["memory"], "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    importlib.import_module("dev")  # registers the pack
    importlib.import_module("torch").set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    shipped = Path(__file__).resolve().parents[2] / "classifiers" / "weights"
    known = readers()
    known["classifier"](shipped / "toyworld_unet.safetensors")
    for kind, file in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        found = read_apart(known[kind], Path(file), lambda: known["classifier"](shipped / "toyworld_flux_geometric.safetensors"))
        print(json.dumps(found), flush=True)
