#!/usr/bin/env python3
"""The developers' command line: `python dev.py --help`. The code is in dev/."""
from dev.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
