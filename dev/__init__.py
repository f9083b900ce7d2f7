"""What only developers need: the command line, servers for tests, benchmarks, training of the small models, workflows.

Importing it makes the repository importable as `learn_to_steer`, the one name that the pack has outside a ComfyUI server.
"""
from __future__ import annotations

from .standalone import register_pack

register_pack()
