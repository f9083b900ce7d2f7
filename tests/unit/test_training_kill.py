"""Killed by SIGKILL 20 times at random moments, building and training still give the same dataset and classifier."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks and sends SIGKILL, which Windows does not have")
def test_kills_leave_no_trace(tmp_path: Path) -> None:
    driver = ROOT / "tests" / "host" / "training_kill_driver.py"
    result = subprocess.run([sys.executable, str(driver), str(ROOT), str(tmp_path)], capture_output=True, text=True,
                            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    kills = json.loads(result.stdout.splitlines()[-1])
    assert sum(kills.values()) >= 20 and min(kills.values()) >= 8
    undisturbed = files(tmp_path / "undisturbed")
    compared = set()
    for folder in tmp_path.glob("disturbed-*"):
        for name, content in files(folder).items():
            assert content == undisturbed[name], f"{folder.name}/{name}"
            compared.add(name)
        if (folder / "data").exists():
            assert {name for name in files(folder) if name.startswith("data")} == {
                name for name in undisturbed if name.startswith("data")}
    assert {"data/manifest.json", "data/shards/train-00009.safetensors", "run/classifier.safetensors",
            "run/training.json"} <= compared
    counts = json.loads(undisturbed["data/manifest.json"])["splits"]
    assert counts["train"]["candidates"] == 40 and counts["train"]["dropped"]["cannot be opened"] == 5
    assert counts["train"]["samples"] + sum(counts["train"]["dropped"].values()) == 2 * 40 - 5


def files(folder: Path) -> dict[str, bytes]:
    """File contents by path, without the optimiser's state."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "state.pt"}
