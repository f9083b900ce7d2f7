#!/usr/bin/env python3
"""The door for developers: `python dev.py --help`. What it does lives in dev/."""
from dev.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
