"""Where and in which number format tensors live: the one place that decides device and dtype."""

import ctypes
import platform
import random
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dlplora.cpu import cpu_flags, cpu_name
from dlplora.errors import ParamsError
from dlplora.params.project import Runtime

# Of glibc's mallopt: how much it keeps instead of giving it back, and what it takes a place of its
# own for, which it gives back at once; in bytes, the largest that any glibc takes.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD, _LARGE = -3, 32 << 20
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}


@dataclass(frozen=True)
class Place:
    """The device and dtype that a stage computes with."""

    device: torch.device
    dtype: torch.dtype


def set_up(runtime: Runtime, *, seed: int) -> Place:
    """Fix threads and seeds, and return the device and dtype to use.

    Raises `ParamsError` if the processor has no instructions for the dtype.
    """
    torch.set_num_threads(runtime.threads)
    keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 – libraries draw from it
    torch.manual_seed(seed)
    if not is_supported(runtime.dtype):
        raise ParamsError(
            f"params.yaml: runtime.dtype is {runtime.dtype}, for which this processor has no "
            f"instructions; expected float32"
        )
    return Place(_device(), getattr(torch, runtime.dtype))


def keep_freed_memory(at_most: int = 1 << 30) -> None:
    """Let this process keep so many bytes freed for what it takes next, if its C library is glibc.

    A step of a model frees and takes the same again and again. Given back to the system meanwhile,
    it would come page by page, each filled with zeros first: a twelfth of a training step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, at_most)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def best_place() -> Place:
    """Return the device to use with its best dtype."""
    return place_on(_device())


def place_on(device: torch.device) -> Place:
    """Return a device with bfloat16 if it has instructions for that, else with float32."""
    return Place(device, torch.bfloat16 if has_bfloat16(device) else torch.float32)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def surroundings(place: Place) -> dict[str, Any]:
    """Describe what a model's bytes depend on besides weights, inputs and code; as JSON."""
    is_cuda = place.device.type == "cuda"
    return {
        "dtype": str(place.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,  # with its build
        "device": torch.cuda.get_device_name(place.device) if is_cuda else place.device.type,
        "processor": [cpu_name(), torch.backends.cpu.get_cpu_capability(), *cpu_flags()],
    }


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        return subprocess.run(asked, capture_output=True, check=False).stdout.strip() == b"1"
    return not _BFLOAT16_FLAGS.isdisjoint(cpu_flags())


def is_supported(dtype: str) -> bool:
    """Tell whether this machine has instructions for a dtype; float32 it always has."""
    return dtype == "float32" or has_bfloat16(_device())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of the processor or the device is out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
