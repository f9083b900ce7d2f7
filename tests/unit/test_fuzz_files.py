"""Thousands of damaged classifier files: each is usable or refused with its name; none crashes or takes much memory or time.

`python dev.py test -m fuzz` runs 5,000 files; a short selection always runs. damage.py reads them in its own process.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.classifiers.network import ExtractorConfig, HeadConfig, NetworkConfig, RelationNetwork

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="measures memory with getrusage, which Windows does not have")
RELATIONS = ("above", "below", "to the left of", "to the right of")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One valid file of each kind, small, so that damage meets every part of it."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = NetworkConfig(map_size=4, d_model=8, extractor=ExtractorConfig(num_layers=1, dim_feedforward=8),
                           classifier=HeadConfig(num_layers=1, dim_feedforward=8))
    network = RelationNetwork(config, 6, len(RELATIONS))
    content = {
        "model_state_dict": network.state_dict(), "rel_name_to_idx": {name: number for number, name in enumerate(RELATIONS)},
        "idx_to_rel_name": dict(enumerate(RELATIONS)), "input_channels": 6, "config": config.to_dict(),
        "training_config": {"timesteps": [5, 25], "num_timesteps": 50, "model_name": "sd2", "lr": numpy.float64(1e-4),
                            "weights": numpy.array([0.5, 2.0], dtype=numpy.float32)}}
    torch.save(content, folder / "new.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_classifier(folder / "own.safetensors", load_classifier(folder / "new.pth"))
    save_classifier(folder / "rule.safetensors", GeometricClassifier(size=4, channel_weights=torch.ones(3), backbone="unet",
                                                                     training={"results": {"test": {"accuracy": 0.5}}}))
    return sorted(folder.iterdir())


def read_damaged(sources: list[Path], folder: Path, first: int, count: int) -> None:
    script = str(Path(__file__).with_name("damage.py"))
    result = subprocess.run([sys.executable, script, str(folder), str(first), str(count), *map(str, sources)],
                            capture_output=True, text=True, timeout=600 + count, check=False)
    lines = result.stdout.splitlines()
    faults = [json.loads(line) for line in lines if line.startswith("{")]
    last = lines[-1] if lines else first
    assert result.returncode == 0, f"file {last} ended the process ({result.returncode}):\n{result.stderr[-2000:]}"
    assert sum(line.isdigit() for line in lines) == count
    assert not faults, f"{len(faults)} of {count} in {folder}, among them: " + "\n".join(map(str, faults[:10]))
    assert 0 < int(last.removeprefix("accepted: ")) < count / 2  # most of the damage matters, and not all of it


def test_some_damaged_files(sources: list[Path], tmp_path: Path) -> None:
    read_damaged(sources, tmp_path, 0, 150)


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(10))
def test_many_damaged_files(sources: list[Path], tmp_path: Path, part: int) -> None:
    read_damaged(sources, tmp_path, 1000 + 500 * part, 500)
