"""Time and peak memory of capture and of steering, as ratios to the host's own forward pass in the same run.

    python dev.py bench cost --backbone unet --json FILE

The rows are a plain forward pass, a forward pass with capture, and a gradient evaluation without and with recomputation.
Each row runs in its own process, so that the peaks are independent. Models are the small world's, and models of real width
with random weights: SD2.1 in fp32, and FLUX with 2 double and 4 single blocks, in bf16 if the CPU multiplies it, else in fp32.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PASSES = ("forward", "capture", "gradient", "gradient, recomputed")
SIZES = {"unet": ("small world", "SD2.1 256²", "SD2.1 512²"),
         "flux": ("small world", "FLUX 2 + 4 blocks 512²", "FLUX 2 + 4 blocks 1024²")}


class PeakMemory:
    """Peak resident memory of this process above its initial value, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self._process, self._stop, self.peak = psutil.Process(), threading.Event(), 0
        self._base = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._base)

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join()


def measure(size: str, kind: str, backbone: str, repeats: int, threads: int) -> dict:
    """Median seconds of a pass, and its peak memory in bytes: the weights plus the pass's own peak."""
    import torch

    from dev.standalone import load_pack

    load_pack()
    from .passes import prepare

    torch.set_num_threads(threads)
    with torch.inference_mode():
        run, weights, dtype = prepare(size, kind, backbone)
        run(warm_up=True)  # the first pass fills caches
        with PeakMemory() as memory:
            seconds = [run() for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "peak_bytes": weights + memory.peak, "dtype": dtype}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", choices=sorted(SIZES), default="unet")
    parser.add_argument("--sizes", nargs="+", help="only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "PASS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        write_result(arguments)
        return
    import torch

    from .table import machine, print_table, write_json

    torch.set_num_threads(arguments.threads)
    result = {"machine": machine(), "backbone": arguments.backbone, "rows": []}
    print(result["machine"])
    for size in arguments.sizes or SIZES[arguments.backbone]:
        plain = None
        for kind in PASSES:
            measured = in_own_process(arguments, size, kind)
            plain = plain or measured
            result["rows"].append({"name": kind, "size": size, "dtype": measured["dtype"], "seconds": measured["seconds"],
                                   "seconds_ratio": measured["seconds"] / plain["seconds"],
                                   "peak_bytes": measured["peak_bytes"],
                                   "peak_ratio": measured["peak_bytes"] / plain["peak_bytes"]})
            print(f"{size}, {kind}: {measured['seconds']:.3f} s, {measured['peak_bytes'] / 2**20:.0f} MB", flush=True)
            write_json(arguments.json, result)
    print_table(result["rows"])


def in_own_process(arguments: argparse.Namespace, size: str, kind: str) -> dict:
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # return freed memory to the system at once
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        subprocess.run([sys.executable, "-m", "dev.benchmarks.cost", "--backbone", arguments.backbone, "--repeats",
                        str(arguments.repeats), "--threads", str(arguments.threads), "--json", str(file), "--one", size,
                        kind], check=True, env={**os.environ, **at_once})
        return json.loads(file.read_text())


def write_result(arguments: argparse.Namespace) -> None:
    measured = measure(*arguments.one, arguments.backbone, arguments.repeats, arguments.threads)
    arguments.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
