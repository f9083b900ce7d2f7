"""The error of training, and reading JSON with it."""
from __future__ import annotations

import json
from pathlib import Path


class TrainingError(ValueError):
    """Training data or a training run cannot be used; the message says what is wrong, where, and what to do."""


def read_json(path: Path) -> object:
    """Raises TrainingError naming a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainingError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read as JSON ({error}).") from error
