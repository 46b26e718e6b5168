"""``--help``: every command shows an example, and the answer comes at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from fedpeft.cli.app import app

HEAVY = ("torch", "transformers", "peft", "grpc", "flwr", "sqlalchemy", "pydantic", "numpy", "cryptography")


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group of the tree with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


TREE = list(commands(typer.main.get_command(app)))


def test_the_tree_holds_the_commands_that_are_promised():
    leaves = {" ".join(path) for path, command in TREE if not getattr(command, "commands", None)}
    assert leaves >= {
        "simulate", "compare", "job check", "job schema", "data export",
        "server init", "server up", "server enroll", "server revoke", "client up", "client config",
        "submit", "status", "watch", "stop", "fetch", "verify",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "command"), TREE, ids=[" ".join(path) or "fedpeft" for path, _ in TREE])
def test_help_explains_and_shows_an_example_that_the_parser_takes(path, command):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert command.help
    assert command.epilog
    example = command.epilog.removeprefix("Example: ").split(" > ")[0].split()
    assert f"Example: fedpeft {' '.join(path)}".rstrip() in shown.output
    assert example[0] == "fedpeft"
    assert tuple(example[1 : 1 + len(path)]) == path

    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name} has no help"

    # The example's words are parsed by the command that it shows (nothing is run).
    node, words = TREE[0][1], example[1:]
    while getattr(node, "commands", None):
        node, words = node.commands[words[0]], words[1:]
    context = click.Context(node)
    with context:
        node.make_parser(context).parse_args(list(words))
    required = {p.opts[0] for p in node.params if p.required and isinstance(p, click.Option) and not p.envvar}
    assert required <= {word for word in words if word.startswith("--")}


def test_every_option_is_explained():
    for path, command in TREE:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)


def test_help_loads_nothing_heavy_and_takes_less_than_300_ms_of_processor_time():
    code = (
        "import sys\nfrom fedpeft.cli import main\nsys.argv = ['fedpeft', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # the first may have to write or read byte code; the best is what the program needs
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"fedpeft --help: {min(seconds):.3f} s of processor time")
    assert min(seconds) < 0.3
