"""What the process is told about its memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from ctypes import CDLL, c_size_t, c_void_p, memset
from dlplora.runtime import keep_freed_memory
if {keeps}:
    keep_freed_memory()
libc = CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_size_t], [c_void_p]
def step():
    places = [libc.malloc(16 << 20) for _ in range(5)]
    for place in places:
        memset(place, 1, 16 << 20)
    for place in places:
        libc.free(place)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keeps: bool) -> int:
    script = FAULTS.format(keeps=keeps)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept_for_what_is_taken_next() -> None:
    assert 10 * faults(keeps=True) < faults(keeps=False)
