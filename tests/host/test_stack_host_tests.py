"""The host's own tests give the same result with the pack installed as without."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dev.standalone import ROOT

HOST = Path(os.environ["COMFYUI_PATH"])
TESTS = ("comfy_quant", "comfy_extras_test/nodes_math_test.py", "comfy_extras_test/image_stitch_test.py", "execution_test",
         "comfy_test/folder_path_test.py", "comfy_test/model_detection_test.py", "folder_paths_test", "utils", "security_test",
         "feature_flags_test.py", "comfy_api_test/multicombo_serialization_test.py")
"""Of the parts that a pack could disturb: quantised layers, detection of models, folders, prompts, custom nodes. Tests that are
coroutines fail or are skipped here for want of a plugin, with the pack as without."""


def outcomes(report: Path, pack: Path | None) -> dict[str, str]:
    """Of each of the host's tests, in a process of its own."""
    tests = [str(path) for name in TESTS if (path := HOST / "tests-unit" / name).exists()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HOST), str(Path(__file__).parent))),
                   "PYTHONDONTWRITEBYTECODE": "1", "PACK_FOLDER": str(pack or "")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-c", str(HOST / "pytest.ini"), "-p", "beside_pack", "-p",
                           "no:cacheprovider", "-q", f"--junitxml={report}", *tests], env=environment, cwd=report.parent,
                          capture_output=True, text=True, timeout=600)
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found[f"{case.get('classname')}.{case.get('name')}"] = failed
    return found


def test_the_hosts_tests_do_not_notice_the_pack(tmp_path: Path):
    if not (HOST / "tests-unit").is_dir():
        pytest.skip("this host came without its tests")
    installed = tmp_path / "learn-to-steer"
    installed.symlink_to(ROOT)
    without = outcomes(tmp_path / "without.xml", None)
    assert list(without.values()).count("passed") > 100, without
    assert outcomes(tmp_path / "with.xml", installed) == without
