"""The rules of import: arrows run downwards only, private parts of Flower stay in one module per side, no pickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "fedpeft": "fedpeft",
    "fedpeft_server": "server/fedpeft_server",
    "fedpeft_client": "client/fedpeft_client",
    "fedpeft_kernels": "kernels/fedpeft_kernels",
    "fedpeft_simulations": "simulations/fedpeft_simulations",
    "fedpeft_proto": "proto/fedpeft_proto",
}
# Flower's documented modules; everything else of it may change from one release to the next.
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
FLOWER_ENGINES = {"server/fedpeft_server/engine.py", "client/fedpeft_client/engine.py"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, folders
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[Import]:
    """Every import anywhere in a file, also lazy ones and those for type checkers only."""
    file = path.relative_to(ROOT).as_posix()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports here are absolute"
            yield Import(file, node.lineno, node.module or "")
        elif isinstance(node, ast.Call) and _called(node) in ("importlib.import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(file, node.lineno, name.value)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def forbidden(paths: list[Path], names: set[str]) -> list[str]:
    return [str(i) for path in paths for i in imports(path) if i.top in names]


def test_the_library_knows_no_transport_no_terminal_and_no_room_above_it():
    paths = [p for p in sources("fedpeft") if ROOT / "fedpeft" / "cli" not in p.parents]
    above = {"fedpeft_server", "fedpeft_client", "fedpeft_simulations"}
    outside = {"flwr", "grpc", "triton", "typer", "rich", "click", "fastapi", "starlette", "uvicorn", "aiohttp", "ray"}
    assert forbidden(paths, above | outside) == []
    assert [str(i) for p in paths for i in imports(p) if i.module.startswith("fedpeft.cli")] == []


def test_server_and_client_do_not_know_each_other_nor_the_simulations():
    assert forbidden(sources(ROOMS["fedpeft_server"]), {"fedpeft_client", "fedpeft_simulations"}) == []
    assert forbidden(sources(ROOMS["fedpeft_client"]), {"fedpeft_server", "fedpeft_simulations"}) == []


def test_the_simulations_run_without_a_network():
    """Except the app for those who want Flower's own engines: it is loaded by Flower alone."""
    paths = [p for p in sources(ROOMS["fedpeft_simulations"]) if p.name != "flower_app.py"]
    assert forbidden(paths, {"fedpeft_server", "fedpeft_client", "flwr", "grpc"}) == []
    app = [ROOT / ROOMS["fedpeft_simulations"] / "flower_app.py"]
    assert forbidden(app, {"fedpeft_server", "fedpeft_client", "grpc"}) == []
    others = [f"{i} of the app" for p in paths for i in imports(p) if i.module == "fedpeft_simulations.flower_app"]
    assert others == []


def test_the_kernels_know_torch_and_triton_and_nothing_of_federation():
    allowed = {"torch", "triton", "fedpeft_kernels", *sys.stdlib_module_names}
    assert [str(i) for p in sources(ROOMS["fedpeft_kernels"]) for i in imports(p) if i.top not in allowed] == []


def test_the_protocol_is_generated_code_alone():
    allowed = {"google", "grpc", "fedpeft_proto", *sys.stdlib_module_names}
    assert [str(i) for p in sources(ROOMS["fedpeft_proto"]) for i in imports(p) if i.top not in allowed] == []


def test_nobody_but_the_command_line_imports_the_command_line():
    rooms = [folder for name, folder in ROOMS.items() if name != "fedpeft"]
    assert [str(i) for p in sources(*rooms) for i in imports(p) if i.module.startswith("fedpeft.cli")] == []


def test_private_parts_of_flower_are_imported_by_one_module_per_side():
    private = [
        i
        for path in sources(*ROOMS.values())
        for i in imports(path)
        if i.top == "flwr" and i.module != "flwr" and not i.module.startswith(PUBLIC_FLOWER)
    ]
    assert {i.file for i in private} == FLOWER_ENGINES, [str(i) for i in private if i.file not in FLOWER_ENGINES]


def test_nothing_is_ever_unpickled():
    found = []
    for path in sources(*ROOMS.values(), "simulations", "benchmarks", "proto"):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = _called(node), {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal") and (
                name.endswith((".load", ".loads", ".Unpickler", ".open"))
            )
            unsafe |= name in ("torch.load", "torch.hub.load") and keywords.get("weights_only") != "True"
            unsafe |= keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True"
            if unsafe:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {name}")
    assert found == []


def test_the_scan_sees_what_it_is_there_to_see(tmp_path):
    """The rules above pass on an empty list, so the scan itself is shown to find something."""
    seen = {i.module for path in sources(ROOMS["fedpeft_server"]) for i in imports(path)}
    assert {"grpc", "flwr.app", "fedpeft.federation.run"} <= seen
    assert "typer" in {i.top for path in sources("fedpeft/cli") for i in imports(path)}


def tracked_texts() -> Iterator[tuple[str, str]]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files: {error}")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data[:8192]:
                yield name, data.decode("utf-8", "replace")


def test_no_file_of_the_repository_speaks_of_the_machine_that_it_was_written_on():
    folders = ("work", "root", "Users", "mnt")  # not /home or /tmp: tests use them as examples
    machine = re.compile(r"(?<![\w.~*)\]}>-])/(?:" + "|".join(folders) + r")/[\w.]")
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if machine.search(line)
    ]
    assert found == []
