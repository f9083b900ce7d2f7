"""Tools for developers: command line, servers for tests, benchmarks, training of the small models, workflow writer.

Importing this package makes the repository importable as `learn_to_steer`, the pack's only name outside a ComfyUI server.
"""
from __future__ import annotations

from .standalone import register_pack

register_pack()
