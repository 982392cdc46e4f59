"""Set-up: one list of pins for pip and conda, all imports in it, and a Makefile that explains itself."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tuneformer import paths

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)(?:  # \S.*)?$")
LINES = (paths.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINS = dict(match.groups() for line in LINES if (match := PIN.match(line)))
DISTRIBUTION = {"sklearn": "scikit-learn", "yaml": "pyyaml", "jinja2": "jinja2", "pygments": "pygments"}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_one_exact_pin():
    required = [line for line in LINES if line and not line.startswith("#")]
    assert [line for line in required if not PIN.match(line)] == []
    assert len({plain(name) for name in PINS}) == len(required)
    assert PINS["torch"] == "2.13.0"


def test_the_pins_are_what_these_tests_run_with():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert installed == PINS


def test_the_pins_are_complete():
    """A dependency of a pinned distribution is pinned too, or not needed here (CUDA libraries, other systems)."""
    pinned = {plain(name) for name in PINS}
    installed = {plain(distribution.metadata["Name"]) for distribution in importlib.metadata.distributions()}
    needed = set()
    for name in PINS:
        for requirement in importlib.metadata.requires(name) or []:
            if "extra ==" not in requirement:
                needed.add(plain(re.match(r"[A-Za-z0-9._-]+", requirement)[0]))
    assert (needed & installed) - pinned == set()


def test_conda_installs_the_same_pins_and_the_package():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert by_pip == {"pip": ["-r requirements.txt", "-e ."]}
    assert pip == "pip"
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    major, minor = map(int, python.removeprefix("python=").split("."))
    assert project["requires-python"] == f">={major}.{minor},<{major}.{minor + 1}"
    assert sys.version_info[:2] == (major, minor)


def test_what_the_code_imports_is_pinned():
    direct = {plain(name) for name in PINS}
    files = [
        *paths.ASSETS.parent.rglob("*.py"),
        *(paths.ROOT / "tests").rglob("*.py"),
        *paths.ROOT.glob("benchmarks/*.py"),
    ]
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    ours = {"tuneformer", *(file.stem for part in ("tests", "benchmarks") for file in (paths.ROOT / part).glob("*.py"))}
    others = modules - set(sys.stdlib_module_names) - ours
    assert {"torch", "anndata"} <= others
    assert {DISTRIBUTION.get(name, plain(name)) for name in others} <= direct


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_a_profile_sets_options_that_snakemake_has(profile):
    settings = yaml.safe_load((paths.ROOT / "profiles" / profile / "config.yaml").read_text(encoding="utf-8"))
    helped = subprocess.run([sys.executable, "-m", "snakemake", "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"--([a-z-]+)", helped.stdout))
    assert {key for key in settings if not key.startswith("slurm-")} <= options  # those of the plugin: make test-slurm
    assert "nolock" not in settings


def test_the_plugin_of_the_cluster_is_pinned_and_needs_nothing_else():
    """It is not in requirements.txt, as it asks Slurm at every start of Snakemake; its pins go into the same .venv."""
    lines = (paths.ROOT / "profiles" / "slurm" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [PIN.match(line)[1] for line in lines if not line.startswith("#")]
    assert pins == ["snakemake-executor-plugin-slurm", "snakemake-executor-plugin-slurm-jobstep"]
    assert not set(pins) & set(PINS)


def make(folder, *arguments, **variables):
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def clone(tmp_path):
    """The files that the set-up reads, and a python3.11 that only notes how it is called."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((paths.ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    script = tmp_path / "python-of-test"
    script.write_text(
        "#!/bin/sh\n"
        'echo "$@" >>calls.txt\n'
        'case "$1 $2" in\n'
        '"-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;\n'
        '"-m pip") [ ! -e no-network ] ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return tmp_path


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


def test_a_wrong_python_is_one_sentence(clone):
    wrong = clone / "wrong"
    wrong.write_text("#!/bin/sh\nexit 1\n")
    wrong.chmod(0o755)
    ended = make(clone, "report", f"PYTHON={wrong}")
    assert ended.returncode != 0
    sentence, *rest = ended.stderr.splitlines()
    assert sentence.startswith("tuneformer needs Python 3.11, and none of these is one: ")
    assert sentence.endswith("make report PYTHON=/path/to/python3.11")
    assert all(line.startswith("make: ***") for line in rest)
    assert not (clone / ".venv").exists()


SPITEFUL = "x;touch p $(touch p) `touch p` $(shell touch p) $HOME \"'&|"


@pytest.mark.parametrize("target", ["report", "plan", "publish"])
@pytest.mark.parametrize("by", ["command line", "environment"])
def test_what_a_user_writes_reaches_python_as_it_is_and_is_never_executed(clone, target, by):
    make(clone, ".venv/complete", "PYTHON=./python-of-test")
    names = ("STUDY", "DATA", "LABEL", "PROFILE", "JOBS")
    python = clone / ".venv" / "bin" / "python"
    values = " ".join(f'"${name}"' for name in names)
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' {values} >values.txt\n")
    given = dict.fromkeys(names, SPITEFUL)
    ended = make(clone, target, *[f"{name}={value}" for name, value in given.items()] if by == "command line" else [],
                 **given if by == "environment" else {})  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (clone / "values.txt").read_text().splitlines() == [SPITEFUL] * len(names)
    assert not (clone / "p").exists()


def test_the_environment_is_made_once(clone):
    assert make(clone, ".venv/complete", "PYTHON=./python-of-test").returncode == 0
    made = calls(clone)
    assert "-m venv .venv" in made
    assert any(call.endswith("-r requirements.txt") for call in made)
    assert any(call.endswith("-e .") for call in made)
    assert make(clone, ".venv/complete", "PYTHON=./python-of-test").returncode == 0
    assert calls(clone) == made


@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml"])
def test_it_is_made_again_when_what_it_is_made_of_changes(clone, changed):
    make(clone, ".venv/complete", "PYTHON=./python-of-test")
    made = len(calls(clone))
    later = (clone / ".venv" / "complete").stat().st_mtime + 1
    os.utime(clone / changed, (later, later))
    make(clone, ".venv/complete", "PYTHON=./python-of-test")
    assert len(calls(clone)) == 2 * made


def test_a_half_made_environment_is_made_again_from_nothing(clone):
    (clone / "no-network").touch()
    assert make(clone, ".venv/complete", "PYTHON=./python-of-test").returncode != 0
    assert (clone / ".venv" / "bin").exists()
    (clone / ".venv" / "left-over").touch()
    (clone / "no-network").unlink()
    assert make(clone, ".venv/complete", "PYTHON=./python-of-test").returncode == 0
    assert not (clone / ".venv" / "left-over").exists()


def test_ci_ends_with_the_closing_line_and_the_code_of_the_tests(tmp_path):
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text((paths.ROOT / ".ci" / "run").read_text())
    script.chmod(0o755)
    for closing, code in (("== 3 passed in 1.00s ==", 0), ("== 1 failed, 2 passed in 1.00s ==", 1)):
        (tmp_path / "Makefile").write_text(f"test:\n\t@echo '{closing}'; exit {code}\n")
        ended = subprocess.run([script], capture_output=True, text=True)
        assert ended.stdout.splitlines()[-1] == closing
        assert (ended.returncode == 0) == (code == 0)
