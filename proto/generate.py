"""Build ``fedpeft_proto`` from ``proto/fedpeft/v1/*.proto``; with ``--check``, say whether it is up to date.

    python proto/generate.py            # write proto/fedpeft_proto/v1/
    python proto/generate.py --check    # exit 1 and name the files that differ

The generated code is committed, so neither users nor wheels need protoc. The protobuf package stays ``fedpeft.v1``
(that is the contract on the wire); the Python package is ``fedpeft_proto.v1``, because ``fedpeft`` is the library and
must not import gRPC. protoc derives Python imports from file paths, hence the rewriting of imports below.

The compiler is pinned (grpcio-tools 1.81.1 in the ``dev`` extra): the newest one emits code for protobuf 7, which
cannot share an environment with Flower.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "fedpeft_proto" / "v1"
_IMPORT = re.compile(r"^(from|import) fedpeft\.v1\b", re.MULTILINE)


def generate(out: Path) -> dict[str, str]:
    """Compile every ``.proto`` into ``out`` (a scratch folder) and return file name -> rewritten text."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    sources = sorted(path.relative_to(HERE).as_posix() for path in (HERE / "fedpeft" / "v1").glob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    flags = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{HERE}", f"-I{well_known}", *flags, *sources]) != 0:
        sys.exit(1)
    made = sorted((out / "fedpeft" / "v1").iterdir())
    texts = {path.name: _IMPORT.sub(r"\1 fedpeft_proto.v1", path.read_text()) for path in made}
    # A .proto without a service yields a stub module with nothing in it: leave it out.
    return {name: text for name, text in texts.items() if not name.endswith("_grpc.py") or "class " in text}


def main(argv: list[str] | None = None) -> int:
    """Generate, or compare with what is committed; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when the committed files differ")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        texts = generate(Path(scratch))
    texts["__init__.py"] = ""
    have = {path.name: path.read_text() for path in TARGET.glob("*.py*") if path.is_file()}
    differing = sorted(name for name in texts.keys() | have.keys() if texts.get(name) != have.get(name))
    if arguments.check:
        for name in differing:
            print(f"{TARGET.relative_to(HERE.parent) / name} differs; run python proto/generate.py", file=sys.stderr)
        return 1 if differing else 0
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in differing:
        if name in texts:
            (TARGET / name).write_text(texts[name])
        else:
            (TARGET / name).unlink()
    print(f"{len(texts)} files, {len(differing)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
