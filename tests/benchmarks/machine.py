"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["machine", "versions"]


def machine() -> dict[str, Any]:
    """Return the processor, its cores, and the number of cores that the benchmark may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(models, platform.machine()),
        "cores_used": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the compared packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "psgd", "ray", "torch")}
