"""Where a model is trained, in which arithmetic, and what that took.

In: the device, precision and threads of a study. Out: the resolved device and precision, and peaks of memory.
"""

import ctypes
import functools
import sys

import torch

from tuneformer.finetune import deployed
from tuneformer.study.params import ParameterError, Study

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
LARGEST = 2**31 - 1


def device_of(settings: Study) -> torch.device:
    """Return the device of a run: the one asked for, or with ``auto`` a GPU when there is one.

    Raises
    ------
    ParameterError
        ``cuda`` without a GPU that torch can use.
    """
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        msg = "device: cuda was asked for, but torch finds no GPU here; set device to auto or cpu."
        raise ParameterError(msg)
    return torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")


def trains_in_bf16(settings: Study) -> bool:
    """Return whether a run uses bfloat16 autocast: as asked for, or with ``auto`` where the hardware computes it.

    Raises
    ------
    ParameterError
        ``bf16`` on a GPU that cannot compute it.
    """
    if device_of(settings).type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        if settings.precision == "bf16" and not is_native:
            msg = f"precision: {torch.cuda.get_device_name()} cannot compute in bf16; set precision to auto or fp32."
            raise ParameterError(msg)
    else:
        features = torch.cpu.get_capabilities()
        is_native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return settings.precision == "bf16" or (settings.precision == "auto" and is_native)


def prepare(settings: Study) -> None:
    """Set the CPU threads of this process and make its allocator keep freed memory; on a GPU, begin to count its peak.

    By default glibc hands every large block back to the system and asks for it again in the next step, which costs
    page faults all through the training on a CPU.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _keep_freed_memory()
    if device_of(settings).type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return ``peak_memory_mb`` of the whole process and, on a GPU, ``peak_gpu_memory_mb`` since `prepare`."""
    peaks = {"peak_memory_mb": deployed.peak_memory()}
    if device.type == "cuda":
        peaks["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@functools.cache
def _keep_freed_memory() -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
