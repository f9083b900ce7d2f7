"""The archive that the registry hands out, as `comfy node publish` packs it: `python dev.py run -m dev.archive FILE.zip`."""
from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from .environment import ROOT

IGNORE = ".comfyignore"


def published_files() -> list[str]:
    """The files that git tracks and .comfyignore does not name, relative to the repository.

    Git itself reads .comfyignore, which has its syntax. Raises CalledProcessError outside a clone.
    """
    def tracked(*options: str) -> set[str]:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", *options]
        return set(subprocess.check_output(command, encoding="utf-8").split("\0")) - {""}

    left_out = tracked("--ignored", f"--exclude-from={ROOT / IGNORE}")
    return sorted(name for name in tracked() - left_out if (ROOT / name).is_file())


def write_archive(target: Path) -> None:
    """Writes the zip file; names in it are relative to the pack's own folder."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in published_files():
            archive.write(ROOT / name, name)


if __name__ == "__main__":
    write_archive(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB")
