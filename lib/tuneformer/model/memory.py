"""The largest memory that this process ever had; imports nothing, for `deployed` is measured without torch."""

import resource
import sys
from pathlib import Path


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in MB (10**6 bytes).

    On Linux it is ``VmHWM``: in ``ru_maxrss`` a new process starts with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
