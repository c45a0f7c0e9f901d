"""Entry point of `python -m psgd.cli`."""

from __future__ import annotations

from psgd.cli import main

if __name__ == "__main__":
    main()
