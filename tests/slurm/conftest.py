"""A Slurm cluster of one node on loopback, with or without slurmdbd, that leaves nothing behind."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INSTALLED = Path(
    "/etc/slurm/slurm.conf"
)  # where the plugin's srun looks: it takes SLURM_CONF out of a job's environment
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db")

# The node claims more than a small machine has (config_overrides), so that the profile is tried as it is shipped.
SLURM_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MpiDefault=none
MinJobAge=300
KillWait=2
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=UNLIMITED State=UP
{accounting}
"""
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_daemon}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database_daemon}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=loopback
StorageLoc=slurm
"""


def wait_for(condition, what, *, seconds=60):
    """Wait until `condition` holds; what did not happen is said."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def free_ports(number):
    """Find ports of loopback that nothing listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Cluster:
    """The daemons, their folder, and the environment in which Slurm's commands find them."""

    folder: Path
    has_accounting: bool
    started: list[subprocess.Popen] = field(default_factory=list)
    wait_for = staticmethod(wait_for)

    @property
    def environment(self):
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command):
        """Run one of Slurm's commands and return what it printed."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, (command, ended.stderr)
        return ended.stdout

    def daemon(self, *command):
        """Start a daemon in the foreground, which ends with this process; what it says goes to the file of its name."""
        with (self.folder / f"{Path(command[0]).name}.out").open("w") as out:
            self.started.append(
                subprocess.Popen(
                    ("setpriv", "--pdeathsig", "TERM", *command),
                    env=self.environment,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    cwd=self.folder,
                )
            )

    def start(self):
        """Start all daemons and wait for a node that takes jobs."""
        names = ("controller", "node", "database", "database_daemon")
        values = dict(zip(names, free_ports(len(names)), strict=True))
        values |= {"folder": self.folder, "host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
        accounting = ACCOUNTING.format(**values) if self.has_accounting else ""
        self.write("slurm.conf", SLURM_CONF.format(accounting=accounting, **values))
        INSTALLED.symlink_to(self.folder / "slurm.conf")
        self.write("gres.conf", "Name=gpu File=/dev/null\n")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        options = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        options |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        self.daemon("munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in options.items()))
        wait_for(options["socket"].exists, "munged has no socket")
        if self.has_accounting:
            self.start_accounting(values)
        self.daemon("slurmctld", "-D", "-i")
        self.daemon("slurmd", "-D", "-N", values["host"])
        wait_for(lambda: "idle" in self.said("sinfo", "-h", "-o", "%T"), "the node takes no jobs")

    def start_accounting(self, values):
        """Start a database and slurmdbd, and make the cluster known there."""
        data, run_as = self.folder / "database", f"--user={values['user']}"
        options = ("--no-defaults", f"--datadir={data}", run_as)
        subprocess.run(["mariadb-install-db", *options, "--auth-root-authentication-method=normal"],
                       check=True, capture_output=True)  # fmt: skip
        there = f"--socket={self.folder}/database.socket"
        self.daemon("mariadbd", *options, there, "--bind-address=127.0.0.1", f"--port={values['database']}")
        wait_for((self.folder / "database.socket").exists, "the database has no socket")
        users = "GRANT ALL ON slurm.* TO slurm@localhost IDENTIFIED BY 'loopback';"
        subprocess.run(["mariadb", "--no-defaults", there, "-uroot", "-e", users], check=True, capture_output=True)
        self.write("slurmdbd.conf", SLURMDBD_CONF.format(**values))
        self.daemon("slurmdbd", "-D")
        wait_for(lambda: self.said("sacctmgr", "-n", "show", "stats"), "slurmdbd does not answer")
        self.call("sacctmgr", "-i", "add", "cluster", "loopback")

    def said(self, *command):
        """Return what a command printed, if it worked."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return ended.stdout if ended.returncode == 0 else ""

    def write(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o600)

    def stop(self):
        """End what runs on the node, then the daemons, the last one first."""
        INSTALLED.unlink(missing_ok=True)
        if self.said("squeue", "-h"):
            self.said("scancel", "--state=RUNNING,PENDING", f"--user={getpass.getuser()}")
            wait_for(lambda: not self.said("squeue", "-h"), "jobs do not end")
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def pytest_collection_modifyitems(items):
    """Skip all of this folder unless it is asked for: it installs nothing, but takes minutes and starts daemons."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    reason = f"not installed: {', '.join(missing)}" if missing else "make test-slurm"
    if missing or "TUNEFORMER_TEST_SLURM" not in os.environ:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=[False, True], ids=["without accounting", "with slurmdbd"])
def cluster(request, tmp_path):
    """Start a `Cluster`, and end it with all that runs on it."""
    if INSTALLED.is_symlink() and "pytest-of-" in str(INSTALLED.readlink()):  # a killed test left it
        INSTALLED.unlink()
    if INSTALLED.exists():
        pytest.skip(f"{INSTALLED} is there: this machine belongs to a cluster")
    folder = tmp_path / "cluster"
    folder.mkdir(mode=0o755)
    built = Cluster(folder, request.param)
    try:
        built.start()
        yield built
    finally:
        built.stop()
