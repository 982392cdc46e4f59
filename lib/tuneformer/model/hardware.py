"""Where a model is trained, in which arithmetic, and what memory that took.

In: device, precision and threads of a study. Out: the device, whether it computes in bf16, and peaks of memory.
"""

import ctypes
import functools
import platform
import sys
from typing import TYPE_CHECKING

import torch

from tuneformer.artifacts import UserError
from tuneformer.model import memory

if TYPE_CHECKING:
    from tuneformer.study import Study

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
LARGEST = 2**31 - 1


def device_of(asked: str) -> torch.device:
    """Return the device: ``cpu``, ``cuda``, or with ``auto`` a GPU when there is one; UserError without the GPU."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        msg = "device: cuda was asked for, but torch finds no GPU here; set device to auto or cpu."
        raise UserError(msg)
    return torch.device("cuda" if has_gpu and asked != "cpu" else "cpu")


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Return whether to compute under bf16 autocast: as asked for, or with ``auto`` where the hardware does natively.

    UserError for ``bf16`` on a GPU that cannot compute it.
    """
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not is_native:
            msg = f"precision: {torch.cuda.get_device_name()} cannot compute in bf16; set precision to auto or fp32."
            raise UserError(msg)
    else:
        features = torch.cpu.get_capabilities()
        is_native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return precision == "bf16" or (precision == "auto" and is_native)


def prepare(settings: "Study") -> torch.device:
    """Set the threads of this process, make its allocator keep freed memory, and return the device of a run.

    By default glibc hands every large block back to the system and asks for it again in the next step, which costs
    page faults all through a training on a CPU.
    """
    device = device_of(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return device


def used(device: torch.device, arithmetic: str) -> dict[str, str | float]:
    """Return what computed a run, as its row says it: ``device``, ``peak_memory_mb`` and, on a GPU, its own peak."""
    if device.type == "cuda":
        name, gpu = torch.cuda.get_device_name(device), {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6}
    else:
        processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        name, gpu = f"{processor}, {torch.get_num_threads()} threads", {}
    return {"device": f"{name}, {arithmetic}", "peak_memory_mb": memory.peak_memory(), **gpu}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@functools.cache
def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
