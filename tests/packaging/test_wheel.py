"""The built wheel, in an environment of its own: it installs what it should, nothing else, and runs a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fedpeft",
    "fedpeft_client",
    "fedpeft_kernels",
    "fedpeft_proto",
    "fedpeft_server",
    "fedpeft_simulations",
}
JOB = """
name = "wheel"
seed = 7
[model]
base = "builtin:digits-vit"
[data]
source = "builtin:digits"
task = "image-classification"
partition = { by = "dirichlet", alpha = 0.5 }
[adapter]
kind = "ffa-lora"
rank = 2
[clients]
count = 2
[train]
local_steps = 1
batch_size = 8
[aggregation]
rounds = 2
[evaluation]
max_examples = 8
baselines = []
"""


def run(command, **options):
    """The finished process; its output is part of the failure."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    for tool in ("build", "hatchling", "pip"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; third-party packages are seen through a path file, the repository is not.

    A path file only adds folders to the path: the path files *inside* those folders, among them that of an editable
    install of this repository, are not followed.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / "bin" / "python"
    purelib = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip())
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel])
    installed = {path.name for path in purelib.iterdir() if path.name != "__pycache__"}
    assert {name for name in installed if not name.endswith(".dist-info")} == PACKAGES
    others = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (purelib / "_third_party.pth").write_text("".join(f"{other}\n" for other in others))
    return folder


@pytest.fixture
def command(environment, tmp_path):
    """Runs a program of the environment in an empty folder, with nothing of this process's Python settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COVERAGE"))}
    clean |= {"HF_HUB_OFFLINE": "1", "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    empty = tmp_path / "empty"
    empty.mkdir()
    return lambda name, *arguments: run([environment / "bin" / name, *arguments], cwd=empty, env=clean)


def test_the_wheel_holds_the_packages_and_nothing_beside_them(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert len(top) == len(PACKAGES) + 1
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_the_wheel_holds_what_is_not_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    for needed in (
        "fedpeft/py.typed",
        "fedpeft/store/migrations/env.py",
        "fedpeft/store/migrations/script.py.mako",
        "fedpeft_simulations/assets/tiny-code-lm/model.safetensors",
        "fedpeft_simulations/assets/tiny-code-lm/tokenizer.json",
        "fedpeft_simulations/assets/digits-vit/model.safetensors",
        "fedpeft_simulations/assets/digits-vit/config.json",
        "fedpeft_proto/v1/manifest_pb2.py",
    ):
        assert needed in names
    # Everything that git keeps inside a package is in the wheel.
    for package in PACKAGES:
        folder = next(path for path in (ROOT / package, *ROOT.glob(f"*/{package}")) if path.is_dir())
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix in (".py", ".pyi", ".json", ".mako"):
                assert f"{package}/{path.relative_to(folder).as_posix()}" in names
    assert any(name.startswith("fedpeft/store/migrations/versions/") and name.endswith(".py") for name in names)
    assert "Requires-Dist: torch>=" in described
    assert not [
        line for line in described.splitlines() if line.startswith("Requires-Dist: triton") and "extra" not in line
    ]


def test_every_package_comes_from_the_environment_and_not_from_the_repository(command, environment):
    script = (
        f"import importlib, json;print(json.dumps([importlib.import_module(n).__file__ for n in {sorted(PACKAGES)!r}]))"
    )
    files = [Path(name) if name else None for name in json.loads(command("python", "-c", script).stdout)]
    assert all(file is not None and environment in file.parents for file in files), files
    path = json.loads(command("python", "-c", "import json, sys; print(json.dumps(sys.path))").stdout)
    assert not [entry for entry in path if entry and Path(entry).resolve() == ROOT]


def test_the_command_line_answers(command):
    assert "simulate" in command("fedpeft", "--help").stdout
    assert "0." in command("fedpeft", "--version").stdout


def test_a_job_runs_from_an_empty_folder(command, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    command("fedpeft", "simulate", job, "--out", "run", "--engine", "in-process")
    folder = tmp_path / "empty" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    status = json.loads(command("fedpeft", "status", folder, "--json").stdout)
    assert status["state"] == "finished"
