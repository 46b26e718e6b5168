"""One packed object per delta or state: a safetensors file whose header carries the manifest.

A delta is the *difference* between a client's trained tensors and the global state that it started from. Differences
are what rules combine, what privacy clips and what a later removal takes out, and they survive a 16-bit wire format far
better than the values do.

The object's name is the SHA-256 of its bytes. The same tensors and manifest give the same bytes: safetensors orders its
header by dtype and name, and the manifest is one deterministic entry. Nothing is ever unpickled.

:class:`PackedFile` reads such an object from disk piece by piece, so that neither the size of a payload nor the
number of clients shows in the coordinator's memory.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft.adapters.manifest import DTYPE_OF_CODEC, Manifest
from fedpeft.adapters.spec import TensorSpec
from fedpeft.errors import DeltaRefused

METADATA_KEY = "fedpeft.manifest"
MAX_HEADER_BYTES = 16 << 20
TORCH_DTYPE = {"F32": torch.float32, "BF16": torch.bfloat16}


def pack(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> bytes:
    """One safetensors object with the manifest in its header; values are rounded to the manifest's codec."""
    dtype = TORCH_DTYPE[DTYPE_OF_CODEC[manifest.codec]]
    encoded = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    return save(encoded, metadata={METADATA_KEY: base64.b64encode(manifest.to_bytes()).decode()})


def content_address(data: bytes) -> str:
    """Lowercase hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def difference(trained: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``trained - start``, tensor by tensor, in float32."""
    return {name: value - start[name] for name, value in trained.items()}


class PackedFile:
    """A packed object on disk, read in pieces.

    Opening reads and checks the header only. The tensors are read on demand into a buffer of a bounded size, by plain
    file reads rather than a memory map, so that resident memory stays bounded too.

    Raises:
        DeltaRefused: code ``format`` if the file is no safetensors file, is truncated, or has bytes that belong to no
            tensor; code ``manifest`` if there is no manifest in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data_start, header = _read_header(path)
        metadata = header.pop("__metadata__", None) or {}
        self._entries: dict[str, dict[str, Any]] = header
        encoded = metadata.get(METADATA_KEY)
        if encoded is None:
            raise DeltaRefused("manifest", "has no manifest in its header", field=path.name)
        try:
            self.manifest_bytes = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise DeltaRefused("manifest", f"the manifest is not base64: {error}", field=path.name) from None
        tensors = tuple(TensorSpec(name, self.shape(name)) for name in self.names())
        self.manifest = Manifest.from_bytes(self.manifest_bytes, tensors)

    def names(self) -> Sequence[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """Safetensors' word for the number format: ``"F32"``, ``"BF16"``, ..."""
        return self._entries[name]["dtype"]

    def chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """Consecutive one-dimensional pieces of at most ``elements`` numbers.

        Each piece is a view of one buffer that the next piece overwrites, or the next call in the same thread once
        this one has ended.
        """
        entry = self._entries[name]
        dtype = TORCH_DTYPE[entry["dtype"]]
        begin, end = entry["data_offsets"]
        size = dtype.itemsize
        if begin == end:
            return
        buffer = _borrow(min(elements * size, end - begin))
        view = memoryview(buffer)[: min(elements * size, end - begin)]
        try:
            with io.FileIO(self.path) as file:
                file.seek(self._data_start + begin)
                left = end - begin
                while left:
                    want = min(len(view), left)
                    _read_exactly(file, view[:want], self.path)
                    yield torch.frombuffer(buffer, dtype=dtype, count=want // size)
                    left -= want
        finally:
            _give_back(buffer)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor as float32 in its shape."""
        entry = self._entries[name]
        whole = torch.empty(self.shape(name), dtype=TORCH_DTYPE[entry["dtype"]])
        if whole.numel():
            with io.FileIO(self.path) as file:
                file.seek(self._data_start + entry["data_offsets"][0])
                _read_exactly(file, whole.view(-1).view(torch.uint8).numpy().data, self.path)
        return whole.float()

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor."""
        return {name: self.tensor(name) for name in self.names()}


# A fresh buffer costs as much as reading into it: its pages must be zeroed and mapped first. So each thread keeps one.
_SPARE_BYTES = 1 << 20
_spare = threading.local()


def _borrow(size: int) -> bytearray:
    """A buffer of at least ``size`` bytes that nobody else has: the thread's spare one if it will do."""
    buffer: bytearray | None = getattr(_spare, "buffer", None)
    _spare.buffer = None
    return buffer if buffer is not None and len(buffer) >= size else bytearray(size)


def _give_back(buffer: bytearray) -> None:
    """Keep it for the next reader in this thread, unless it is too large or a larger one is kept already."""
    kept: bytearray | None = getattr(_spare, "buffer", None)
    if len(buffer) <= _SPARE_BYTES and (kept is None or len(kept) < len(buffer)):
        _spare.buffer = buffer


def _read_exactly(file: Any, view: memoryview, path: Path) -> None:
    got = 0
    while got < len(view):
        count = file.readinto(view[got:])
        if not count:
            raise DeltaRefused("format", "is shorter than its header says", field=path.name)
        got += count


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        # A header length can look like the first bytes of a pickle (640 does), so the header's own brace decides.
        if not (0 < length <= min(MAX_HEADER_BYTES, size - 8) and start[8:] == b"{"):
            if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise DeltaRefused(
                    "format",
                    "is a pickle or zip file, not safetensors; it was not opened",
                    field=path.name,
                    hint="write adapters with safetensors",
                )
            raise DeltaRefused("format", "is not a safetensors file, or is truncated", field=path.name)
        file.seek(8)
        raw = file.read(length)
    try:
        # The library's own parser proves that offsets are contiguous, in bounds and consistent with the shapes.
        with safe_open(str(path), framework="pt"):
            pass
        header = json.loads(raw)
    except (SafetensorError, ValueError) as error:
        raise DeltaRefused("format", f"is not a valid safetensors file: {error}", field=path.name) from None
    return 8 + length, header
