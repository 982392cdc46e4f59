"""Settings of all tests: working files of their own, one thread each, and stderr left out where nbval compares."""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit what their parent sets
    os.environ["TUNEFORMER_RUNS"] = tempfile.mkdtemp(prefix="tuneformer-test-runs-")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported
    atexit.register(shutil.rmtree, os.environ["TUNEFORMER_RUNS"], ignore_errors=True)


def pytest_collectstart(collector):
    """Leave stderr (progress lines with times) out of the comparison that nbval makes."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
