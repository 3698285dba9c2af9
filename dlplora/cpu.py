"""What this machine's processor says of itself."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the name of the processor."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Return the names of its sets of instructions, sorted; none where the system tells none."""
    return sorted({flag for line in _cpuinfo("flags", "Features") for flag in line.split()})


def _cpuinfo(*keys: str) -> list[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    parts = [line.partition(":") for line in lines]
    return [value.strip() for key, _, value in parts if key.strip() in keys]
