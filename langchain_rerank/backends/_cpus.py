"""How many cores this process may use: its affinity, and its container's quota, which libraries overlook."""

from __future__ import annotations

import math
import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def allowed_cpus(groups: Path = _GROUPS) -> int:
    """Cores that this process may run on, at least one; a quota of 1.5 counts as two.

    Args:
        groups: Where Linux shows a container its limits, of version 2 or 1:
            https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(groups)
    return mine if quota is None else max(1, min(mine, math.ceil(quota)))


def _quota(groups: Path) -> float | None:
    """Cores' worth of time; `None` where there is no limit, or no Linux."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            time, period = " ".join((groups / name).read_text(encoding="ascii") for name in files).split()
            quota = float(time) / float(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
            continue
        return quota if quota > 0 else None  # version 1 says -1 where there is no limit
    return None
