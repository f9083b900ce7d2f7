"""Tests in this folder talk to a real ComfyUI server over HTTP."""
from __future__ import annotations

from live import client, object_info, server  # noqa: F401
