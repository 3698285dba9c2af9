"""What the process is told about its memory."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from dlplora.runtime import Place, surroundings

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


def test_what_bytes_depend_on_is_told_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(torch.device("cpu"), torch.float32)
    told = surroundings(place)
    assert json.loads(json.dumps(told)) == told
    assert surroundings(Place(place.device, torch.bfloat16)) != told
    torch.set_num_threads(1)  # a fixture sets it back
    assert surroundings(place) != told
    torch.set_num_threads(2)
    assert surroundings(place) == told
    for name, value in (("cpu_name", "another"), ("cpu_flags", ["amx_bf16"])):
        with monkeypatch.context() as changed:
            changed.setattr(f"dlplora.runtime.{name}", lambda value=value: value)
            assert surroundings(place) != told
