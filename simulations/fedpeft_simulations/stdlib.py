"""``builtin:stdlib``: the Python standard library as a federation, one package family per client.

Every Python installation carries a few megabytes of source code by many authors, in many styles, sorted into packages.
That makes a federation without a download whose clients are *naturally* unlike each other: ``asyncio`` knows futures,
``email`` knows headers, ``xml`` knows nodes. A client owns one package family and never sees another's files.

- **Which families.** :data:`FAMILIES` is an ordered list; the clients are those that this installation has and that are
  large enough, in that order. The first eight are part of every regular Python 3.11 to 3.14; where a distribution
  leaves one out, the next takes its place.
- **Records.** A file is cut between top-level statements into sections of at most about 2 KB; a section is a record.
- **Held out.** Whole files, about a quarter of a family's text, chosen by a PRF over the file's name. No section of a
  held-out file is ever trained on.
- **Caps.** Training text and held-out text are capped by choosing sections with the same PRF, so that evaluation stays
  cheap and every client has little data: the situation in which federating pays.
- **Public part.** :func:`public_sections`: the single-file modules at the top level, which belong to no family. The
  base model ``builtin:tiny-code-lm`` was trained on these alone.

The text differs between Python versions. Two machines get the same records if they run the same Python version.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.data.records import ClientData, Record
from fedpeft.errors import FedPeftError
from fedpeft.prf import prf_bytes

FAMILIES = (
    "asyncio",
    "email",
    "unittest",
    "xml",
    "http",
    "multiprocessing",
    "logging",
    "importlib",
    # what follows may be missing (tkinter, idlelib) or is smaller
    "tkinter",
    "urllib",
    "idlelib",
    "concurrent",
    "ctypes",
    "json",
    "wsgiref",
    "html",
    "zoneinfo",
    "xmlrpc",
)

SECTION_BYTES = 2048
_SPLIT_SEED = 20240  # fixes which files are held out; changing it changes the benchmark
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "Icons"}
# A top-level statement that opens a new thought: the only place where a file is cut, unless a section grows too long.
_TOP_LEVEL = re.compile(r"^(?:class |def |async def |@|if __name__)")


def sections(text: str, limit_bytes: int = SECTION_BYTES) -> list[str]:
    """``text`` cut into pieces of at most about ``limit_bytes``; joined, they are ``text`` again.

    Cuts fall before top-level definitions where possible, else before an unindented or blank line, else anywhere
    between lines.

    >>> sections("import a\\n\\ndef f():\\n    pass\\n\\ndef g():\\n    pass\\n", limit_bytes=30)
    ['import a\\n\\ndef f():\\n    pass\\n\\n', 'def g():\\n    pass\\n']
    """
    lines = text.splitlines(keepends=True)
    pieces: list[str] = []
    start = 0
    while start < len(lines):
        size, end = 0, start
        while end < len(lines) and (size + len(lines[end].encode()) <= limit_bytes or end == start):
            size += len(lines[end].encode())
            end += 1
        if end < len(lines):
            end = _best_cut(lines, start, end)
        pieces.append("".join(lines[start:end]))
        start = end
    return pieces


def _best_cut(lines: list[str], start: int, end: int) -> int:
    """The last good place to cut in the second half of ``lines[start:end]``; ``end`` if there is none."""
    half = start + (end - start) // 2
    for cut in range(end, max(half, start + 1) - 1, -1):
        # A decorator line starts the definition; the definition after it must not be cut off from it.
        if _TOP_LEVEL.match(lines[cut]) and not lines[cut - 1].startswith("@"):
            return cut
    for cut in range(end, max(half, start + 1) - 1, -1):
        if not lines[cut - 1].strip():
            return cut
    return end


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):  # a few files of the standard library declare another encoding
        return None


def _family_files(root: Path, family: str) -> dict[str, str]:
    """Path relative to the library, with ``/``, to text; sorted; empty files left out."""
    found: dict[str, str] = {}
    for path in sorted((root / family).rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts[1:-1]):
            continue
        text = _read(path)
        if text is not None and len(text) >= 256:
            found[relative.as_posix()] = text
    return found


def _rank(purpose: str, *parts: str | int) -> bytes:
    return prf_bytes(_SPLIT_SEED, purpose, *parts)


def _capped(files: dict[str, str], family: str, cap_bytes: int) -> tuple[Record, ...]:
    """Sections of ``files`` in file order, chosen by PRF until ``cap_bytes`` are reached."""
    every = [(name, i, text) for name in sorted(files) for i, text in enumerate(sections(files[name]))]
    kept: set[tuple[str, int]] = set()
    total = 0
    for name, i, text in sorted(every, key=lambda item: _rank("stdlib-section", item[0], item[1])):
        if total >= cap_bytes:
            break
        kept.add((name, i))
        total += len(text.encode())
    return tuple({"text": text, "client": family} for name, i, text in every if (name, i) in kept)


@dataclass(frozen=True)
class StdlibSource:
    """The source behind ``builtin:stdlib``.

    Attributes:
        families: candidates in order of preference.
        train_bytes: about how much training text a client has at most.
        heldout_bytes: about how much held-out text a client has at most.
        heldout_share: the part of a family's text whose files are held out.
        min_bytes: a family with less text than this is no client.
    """

    families: tuple[str, ...] = FAMILIES
    train_bytes: int = 40 * 1024
    heldout_bytes: int = 20 * 1024
    heldout_share: float = 0.25
    min_bytes: int = 40 * 1024
    task: str = "causal-lm"

    def load(self) -> tuple[ClientData, ...]:
        """The clients, in the order of :attr:`families`.

        Raises:
            FedPeftError: this Python was installed without the sources of its library.
        """
        root = _stdlib()
        clients = tuple(client for family in self.families if (client := self._client(root, family)) is not None)
        if not clients:
            raise FedPeftError(
                "this Python installation has no source files of the standard library",
                field="data.source",
                value="builtin:stdlib",
                hint=f"looked in {root}; use a regular CPython installation or a local folder",
            )
        return clients

    def _client(self, root: Path, family: str) -> ClientData | None:
        files = _family_files(root, family)
        total = sum(len(text.encode()) for text in files.values())
        if len(files) < 2 or total < self.min_bytes:
            return None
        heldout: dict[str, str] = {}
        for name in sorted(files, key=lambda name: _rank("stdlib-heldout", name)):
            if heldout and sum(len(t.encode()) for t in heldout.values()) >= self.heldout_share * total:
                break
            # A file with most of the family's text would leave too little to train on.
            if len(files[name].encode()) <= 0.5 * total and len(heldout) < len(files) - 1:
                heldout[name] = files[name]
        train = {name: text for name, text in files.items() if name not in heldout}
        if not heldout or not train:
            return None
        return ClientData(
            name=family,
            train=_capped(train, family, self.train_bytes),
            heldout=_capped(heldout, family, self.heldout_bytes),
        )


def public_sections() -> Iterator[tuple[str, str]]:
    """(module file name, section) of every single-file module at the library's top level, in order of name.

    Raises:
        FedPeftError: there are none.
    """
    root = _stdlib()
    files = [(path.name, text) for path in sorted(root.glob("*.py")) if (text := _read(path)) is not None]
    if not files:
        raise FedPeftError("no source files found", field="data.source", value=str(root))
    for name, text in files:
        for section in sections(text):
            yield name, section


SOURCE = StdlibSource()
