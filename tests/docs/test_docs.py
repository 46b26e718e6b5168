"""Documents are executed: what the README and the docs say is what happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALL = "--set aggregation.rounds=2 --set train.local_steps=1 --set train.batch_size=2 --set clients.count=3"


def block(after: str, language: str) -> str:
    """The first code block after a marker of the README."""
    found = re.search(rf"```{language}\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert found
    return found[1]


def test_the_generated_pages_are_up_to_date():
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.e2e
def test_the_five_commands_of_the_readme_make_a_federation(tmp_path):
    commands = block("<!-- five-commands -->", "bash")
    assert len(commands.strip().splitlines()) == 5
    script = (
        commands.replace("--watch", f"{SMALL} --watch")
        + "sleep 1\nkill $(jobs -p)\nwait\nls fl-server/runs/*/adapter\n"
    )
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "run-finished" in out, out + err
    assert "adapter_model.safetensors" in out
    assert "Traceback" not in err


@pytest.mark.e2e
def test_the_python_snippet_of_the_readme_loads_the_adapter(tmp_path):
    fedpeft = [sys.executable, "-m", "fedpeft.cli", "simulate", str(ROOT / "simulations/jobs/quickstart.toml")]
    options = [*SMALL.split(), "--set", "evaluation.baselines=[]", "--out", "runs/quickstart"]
    done = subprocess.run([*fedpeft, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = block("whose `adapter/` stock PEFT loads", "python") + "\nprint(model.peft_config['default'].r)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr
