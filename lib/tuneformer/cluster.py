"""A cluster with Slurm as Snakemake's profile states it: the plugin, and by which command it learns how jobs end.

In: the name of a profile. Out: options of Snakemake; one line that says which way it goes.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tuneformer import paths
from tuneformer.artifacts import UserError

STATUS_COMMAND = "--slurm-status-command"
REMEMBERED = 190
"""Seconds for which squeue has to show a job that has ended, as the plugin asks every 180 s at most."""


def options(profile: str) -> list[str]:
    """Return the options for a profile, a folder below profiles/ or a path; UserError where it cannot be used."""
    import yaml

    places = (paths.ROOT / "profiles" / profile, Path(profile).expanduser())
    folder = next((place for place in places if (place / "config.yaml").is_file()), None)
    if folder is None:
        msg = f"PROFILE={profile}: there is no profiles/{profile}/config.yaml; for a cluster with Slurm, PROFILE=slurm."
        raise UserError(msg)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    given = [*settings.get("config", []), "--profile", str(folder)]  # --config hides the profile's own
    if settings.get("executor") != "slurm":
        return given
    if shutil.which("sbatch") is None:
        msg = f"PROFILE={profile} is for Slurm, but there is no sbatch here: call make on a login node of the cluster."
        raise UserError(msg)
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        _install_plugin(folder / "requirements.txt")
    return [*given, STATUS_COMMAND, _status_command()]


def _install_plugin(pins: Path) -> None:
    print(f"Installing Snakemake's plugin for Slurm into {sys.prefix} (once) ...", flush=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "-r",
        str(pins),
    ]
    if subprocess.run(pip, check=False).returncode:
        msg = f"Snakemake's plugin for Slurm could not be installed; by hand, with a network: {' '.join(pip)}"
        raise UserError(msg)


def _status_command() -> str:
    """Return ``sacct`` where accounting works, else ``squeue``; UserError where that would miss the end of a job."""
    asked = ("--noheader", "--allocations", "--clusters=all", "--format=JobIdRaw", "--starttime=now-1minutes")
    code, said = _call("sacct", *asked)
    if code == 0:
        print("Slurm with accounting: sacct tells how jobs end.", flush=True)
        return "sacct"
    why = " ".join(said.split()) or f"sacct ended with {code}"
    age = re.search(r"MinJobAge\s*=\s*(\d+)", _call("scontrol", "show", "config")[1])
    if age and int(age[1]) < REMEMBERED:
        msg = f"This cluster has no accounting ({why}) and shows an ended job for {age[1]} s only (MinJobAge), "
        msg += f"so that its end may be missed: ask for a MinJobAge of at least {REMEMBERED} s."
        raise UserError(msg)
    print(f"Slurm without accounting ({why}): squeue tells how jobs end.", flush=True)
    return "squeue"


def queued(batch: str) -> list[str]:
    """Return the Slurm jobs whose names begin with that of a batch."""
    lines = [line.split(maxsplit=1) for line in _call("squeue", "--noheader", "--format=%i %j")[1].splitlines()]
    return [number for number, name in lines if name.startswith(batch)]


def cancel(numbers: list[str]) -> None:
    """Have Slurm end jobs."""
    _call("scancel", *numbers)


def _call(*command: str) -> tuple[int, str]:
    """Return how a command ended, and what it said; one that is missing or hangs ended with 127."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return ended.returncode, ended.stdout + (ended.stderr if ended.returncode else "")
