from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psgd_workers import free_memory as module
from psgd_workers.free_memory import free_memory

MIB = 2**20


@pytest.fixture
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates a machine with 900 MiB free and these cgroups.

    The cgroups are given by folder, each with its limit (None: no limit), usage and inactive page cache, in MiB.
    """
    (tmp_path / "meminfo").write_text("MemTotal:  1024000 kB\nMemFree:  10 kB\nMemAvailable:  921600 kB\n")
    monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "cgroup")

    def limited(own: str, version: int, groups: dict[str, tuple[int | None, int, int]]) -> None:
        (tmp_path / "own").write_text(own)
        limit_file, used_file, cache_name = module.CGROUP_FILES[2 - version]
        unlimited = "max" if version == 2 else "9223372036854771712"
        for folder, (limit, used, cache) in groups.items():
            group = tmp_path / "cgroup" / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / limit_file).write_text(f"{unlimited if limit is None else limit * MIB}\n")
            (group / used_file).write_text(f"{used * MIB}\n")
            (group / "memory.stat").write_text(f"anon 7\n{cache_name} {cache * MIB}\nactive_file 9\n")

    return limited


@pytest.mark.parametrize(
    ("own", "version", "groups", "free"),
    [
        ("0::/\n", 2, {".": (None, 500, 0)}, 900),
        ("0::/\n", 2, {".": (300, 200, 0)}, 100),
        ("0::/\n", 2, {".": (300, 300, 120)}, 120),
        ("0::/\n", 2, {".": (300, 310, 0)}, 0),
        ("0::/slice/job\n", 2, {"slice/job": (None, 10, 0), "slice": (200, 50, 0)}, 150),
        ("0::/slice/job\n", 2, {"slice/job": (100, 10, 0), "slice": (200, 190, 5)}, 15),
        ("0::/elsewhere\n", 2, {".": (250, 50, 0)}, 200),
        ("1:cpu:/\n2:memory:/docker/4f\n0::/\n", 1, {"memory": (256, 100, 30)}, 186),
        ("2:memory:/docker/4f\n", 1, {"memory": (None, 9, 9), "memory/docker/4f": (64, 60, 10)}, 14),
        ("1:cpu:/\n", 1, {"memory": (256, 100, 30)}, 900),
        ("", 2, {}, 900),
    ],
)
def test_free_memory_is_what_the_smallest_limit_around_this_process_leaves(
    limits: Callable[..., None], own: str, version: int, groups: dict[str, tuple[int | None, int, int]], free: int
) -> None:
    limits(own, version, groups)
    assert free_memory() == free * MIB


def test_where_the_system_tells_nothing_all_memory_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
    assert free_memory() == sys.maxsize
