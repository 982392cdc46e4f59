"""One batch at a time: what a killed one left behind is ended, then Snakemake takes the place of this process.

In: STUDY, JOBS and PROFILE from the environment, as ``make report`` exports them. Out: Snakemake's exit code; or one
sentence and 2. All that a batch starts carries its name, in `MARK` or as a Slurm job's name, so that the next finds it.
"""

import os
import re
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from tuneformer import cluster, paths, study
from tuneformer.artifacts import UserError, read_json, write_json

MARK = "TUNEFORMER_BATCH"
RECORD = paths.RUNS / ".batch.json"
LOCKS = paths.ROOT / ".snakemake" / "locks"
BOOT = Path("/proc/sys/kernel/random/boot_id")
PATIENCE = 120.0
"""Seconds that what a killed batch left may take to end; Slurm gives a job 30 s by default."""


def options() -> list[str]:
    """Return how STUDY, JOBS and PROFILE have Snakemake called; a cluster is made ready for it."""
    jobs, profile = os.environ.get("JOBS", ""), os.environ.get("PROFILE")
    if not re.fullmatch(r"([1-9]\d*)?", jobs):
        msg = f"JOBS={jobs}: this is the number of jobs at a time, such as JOBS=4."
        raise UserError(msg)
    asked = ["--config", f"study={os.environ.get('STUDY') or 'default'}"]
    if profile:
        return [*asked, *cluster.options(profile), *(["--jobs", jobs] if jobs else [])]
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return ["--cores", jobs or str(len(allowed)), *asked]


def clear() -> None:
    """End what the last batch left if it was killed, and say so; UserError if a batch is at work."""
    locks = _locks()
    if not RECORD.is_file():
        return  # a lock without a record is none of ours, and Snakemake says what to do
    last = read_json(RECORD)
    who = f"study {last['study']}, process {last['pid']} on {last['host']}, started {last['started']}"
    if last["host"] != socket.gethostname():
        if locks:
            msg = f"A batch may be at work on another machine ({who}): go on there; if that is impossible, delete "
            msg += f"{paths.shown(RECORD)} and {paths.shown(LOCKS)}."
            raise UserError(msg)
        return
    at_work = _processes(last)
    others = _without_record() if locks else []
    if last["pid"] in at_work or others:
        pid = last["pid"] if last["pid"] in at_work else others[0]
        who = who if pid == last["pid"] else f"Snakemake, process {pid}, started by hand"
        msg = f"A batch is at work ({who}): wait for it, or end it with `kill {pid}` (its present jobs end first)."
        raise UserError(msg)
    queued = cluster.queued(last["name"]) if last["on_slurm"] else []
    if locks or at_work or queued:
        running = f"; ending its processes {', '.join(map(str, sorted(at_work)))}" if at_work else ""
        running += f"; ending its Slurm jobs {', '.join(queued)}" if queued else ""
        print(f"The last batch was killed ({who}){running}. What it finished is kept.", flush=True)
        _end(last)
    for lock in locks:
        lock.unlink(missing_ok=True)


def _end(last: dict[str, Any]) -> None:
    """End the processes and Slurm jobs of a killed batch, also those that start meanwhile."""
    give_up = time.monotonic() + PATIENCE
    while True:
        at_work = _processes(last)
        queued = cluster.queued(last["name"]) if last["on_slurm"] else []
        if not (at_work or queued):
            return
        if time.monotonic() > give_up:
            msg = f"What the killed batch left does not end: processes {sorted(at_work)}, Slurm jobs {queued}."
            raise UserError(msg)
        if queued:
            cluster.cancel(queued)
        for process in at_work.values():
            process.kill()
        time.sleep(1 if queued else 0.1)


def _processes(last: dict[str, Any]) -> dict[int, Any]:
    """Return the processes of a batch by process id, and its first one also where its environment is not to be read."""
    import psutil

    found: dict[int, Any] = {}
    if last["boot"] != _boot():
        return found
    for process in psutil.process_iter(["environ", "status"]):
        environ, status = process.info["environ"], process.info["status"]
        hidden = environ is None and process.pid == last["pid"] and status != psutil.STATUS_ZOMBIE
        if hidden or (environ or {}).get(MARK) == last["name"]:
            found[process.pid] = process
    return found


def _without_record() -> list[int]:
    """Return the calls of Snakemake in this repository that did not come through here."""
    import psutil

    here = [p for p in psutil.process_iter(["cmdline", "cwd", "environ"]) if p.info["cwd"] == str(paths.ROOT)]
    called = [p for p in here if any(Path(word).name == "snakemake" for word in (p.info["cmdline"] or [])[:3])]
    return [p.pid for p in called if MARK not in (p.info["environ"] or {})]


def _boot() -> str:
    """Return what tells one start of this machine from the next."""
    return BOOT.read_text(encoding="utf-8").strip() if BOOT.is_file() else ""


def _locks() -> list[Path]:
    """Return the files in which Snakemake notes what a batch of these folders makes."""
    ours = tuple(f"{folder}/" for folder in (paths.RUNS, paths.SITE))
    found = sorted(LOCKS.glob("*.lock"))
    return [file for file in found if any(line.startswith(ours) for line in file.read_text().splitlines())]


def main() -> int:
    """Check a study, fetch its files, and let Snakemake do its jobs."""
    from filelock import FileLock

    from tuneformer.data import download

    name = os.environ.get("STUDY") or "default"
    try:
        if code := study.main([name]):
            return code
        asked = options()
        if code := download.main([name]):
            return code
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(RECORD.with_suffix(".lock")):  # until Snakemake takes over
            clear()
            mark, on_slurm = f"tuneformer-{uuid.uuid4().hex[:12]}", cluster.STATUS_COMMAND in asked
            last = {"name": mark, "study": name, "pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}
            write_json(RECORD, last | {"started": time.strftime("%Y-%m-%d %H:%M"), "on_slurm": on_slurm})
            os.chdir(paths.ROOT)
            command = [
                sys.executable,
                "-m",
                "snakemake",
                *asked,
                *(["--slurm-jobname-prefix", mark] if on_slurm else []),
            ]
            os.execve(sys.executable, command, os.environ | {MARK: mark})  # noqa: S606
    except UserError as error:
        print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
