r"""Sums of deltas in 64-bit integers: the order of arrival leaves no trace, and a term can be taken out exactly.

Floating-point addition is not associative, so a float sum depends on who was faster. Here every entry becomes an
integer, ``q = round(x * 2^f)`` (half to even), and a weighted sum of integers is exact. Folding, removing and merging
therefore commute to the last bit: simulation equals deployment, a resumed round equals an uninterrupted one, and a
removal equals never having been there. Masking modulo 2^64 needs the same numbers.

The scale comes from public values alone (:func:`plan`): a bound on the entries, ``|x| <= max_abs <= 2^e``, and a bound
on the sum of weights, ``W <= 2^b``. With ``f = min(61 - b - e, 50 - e)`` every partial sum satisfies ``|sum w q| <
2^62``: overflow is impossible by construction. Each q is off by at most half a unit, hence so is any weighted mean of
them: the error is at most ``2^-(f+1)`` for each entry, whatever the number of clients.

>>> fixed = plan({"w": (2, 3)}, max_abs=1.0, max_total_weight=1 << 20)
>>> fixed["w"].fraction_bits, fixed.error_bound("w") < 2.0 ** -41
(41, True)

**How a block is folded.** Adding the constant ``1.5 * 2^(52-f)`` to a float64 makes its last mantissa bit worth 2^-f:
the addition itself rounds, and the bit pattern read as an integer is a constant (the *magic*) plus q. So a block is
copied to a float64 buffer, one addition rounds it, and its bits are added to the accumulator as they are. The magic
piles up modulo 2^64 and is taken out when the sum is read; two's complement makes this exact. With the extra ``fast``,
checking, rounding and adding are one compiled pass (:mod:`fedpeft.aggregation.fused`). Without it they are separate
passes on blocks that fit the core's cache, to the same bits; the integer ones go through numpy, whose int64 loops are
vectorised; torch's are not.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedpeft.aggregation import fused
from fedpeft.aggregation.protocols import TensorReader
from fedpeft.errors import DeltaRefused, FedPeftError, IntegrityError

BLOCK = 32_768  # elements: 256 KiB of float64, measured best among 8k..128k (benchmarks/aggregate.py)
COMMIT_BLOCK = 65_536
CHUNK = 1 << 18  # elements asked of a reader at once; a reader's buffer is at most 1 MiB
SUM_BITS = 62  # |sum w q| < 2^62
TERM_BITS = 50  # |q| <= 2^50, so that 1.5 * 2^52 + q keeps its exponent
MIN_BITS = 16  # fewest bits between the bound and the resolution that are still of use
MIN_MAX_ABS, MAX_MAX_ABS = 2.0**-40, 2.0**60


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's fixed-point format: value = integer * 2^-fraction_bits, for |value| <= max_abs."""

    shape: tuple[int, ...]
    max_abs: float
    fraction_bits: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def magic(self) -> float:
        """The float64 whose last mantissa bit is worth 2^-fraction_bits, in the middle of its binade."""
        return math.ldexp(1.5, 52 - self.fraction_bits)

    @property
    def magic_bits(self) -> int:
        """Its bit pattern as a signed 64-bit integer."""
        return int(struct.unpack("<q", struct.pack("<d", self.magic))[0])


@dataclass(frozen=True)
class FixedPointSpec(Mapping[str, TensorPlan]):
    """The formats of all tensors, and the bound on the sum of weights that they were made for."""

    tensors: Mapping[str, TensorPlan]
    max_total_weight: int

    def __getitem__(self, name: str) -> TensorPlan:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def error_bound(self, name: str) -> float:
        """Largest absolute error of an entry of the mean: rounding to the grid, and two roundings of the quotient."""
        tensor = self.tensors[name]
        return math.ldexp(1.0, -tensor.fraction_bits - 1) + math.ldexp(tensor.max_abs, -52)


def plan(
    shapes: Mapping[str, tuple[int, ...]], max_abs: float | Mapping[str, float], max_total_weight: int
) -> FixedPointSpec:
    """Choose the scales from public values: the same in a simulation and in a deployment.

    Args:
        shapes: the tensors that travel.
        max_abs: bound on every entry of a delta, for all tensors or by name. Larger entries will be refused.
        max_total_weight: bound on the sum of the weights of a round.

    Raises:
        FedPeftError: a bound is out of range, or they leave fewer than 16 bits of resolution.
    """
    if not isinstance(max_total_weight, int) or not 1 <= max_total_weight < 2**SUM_BITS:
        raise FedPeftError(
            "must be a positive integer below 2^62", field="aggregation.max_total_weight", value=max_total_weight
        )
    weight_bits = max_total_weight.bit_length()  # W < 2^weight_bits
    if max_total_weight & (max_total_weight - 1) == 0:
        weight_bits -= 1  # W = 2^weight_bits; the spare bit below keeps the sum strictly under 2^62
    tensors: dict[str, TensorPlan] = {}
    for name in sorted(shapes):
        bound = max_abs[name] if isinstance(max_abs, Mapping) else max_abs
        if not MIN_MAX_ABS <= bound <= MAX_MAX_ABS:
            raise FedPeftError("must lie between 2^-40 and 2^60", field="aggregation.max_abs", value=bound)
        mantissa, exponent = math.frexp(bound)  # bound = mantissa * 2^exponent, 0.5 <= mantissa < 1
        exponent -= mantissa == 0.5
        bits = min(SUM_BITS - 1 - weight_bits, TERM_BITS)
        if bits < MIN_BITS:
            raise FedPeftError(
                f"leaves only {bits} bits between max_abs and the resolution",
                field="aggregation.max_total_weight",
                value=max_total_weight,
                hint="choose a bound of at most 2^45",
            )
        tensors[name] = TensorPlan(tuple(shapes[name]), float(bound), bits - exponent)
    return FixedPointSpec(MappingProxyType(tensors), max_total_weight)


class FixedPointAccumulator:
    """The weighted sum of any number of deltas: 8 bytes per parameter, independent of their number.

    All methods leave it unchanged when they raise. (If a reader fails a second time while its half-read delta is being
    taken out again, the accumulator declares itself unusable instead of being silently wrong.)

    Args:
        spec: formats from :func:`plan`.
        compiled: use compiled loops where there are any. The bits are the same either way.
    """

    def __init__(self, spec: FixedPointSpec, compiled: bool = True):
        self.spec = spec
        self.compiled = compiled
        self.total_weight = 0
        self.clients = 0
        # One allocation for all tensors: large enough for huge pages, which the kernel grants by the 2 MiB.
        whole = np.zeros(sum(tensor.elements for tensor in spec.values()), np.int64)
        ends = np.cumsum([tensor.elements for tensor in spec.values()], dtype=np.int64).tolist()
        self._sums = {n: whole[end - t.elements : end] for (n, t), end in zip(spec.items(), ends, strict=True)}
        self._magic_weight = 0  # how many times each tensor's magic is in its sum
        largest = min(BLOCK, max((t.elements for t in spec.values()), default=0))
        self._float = torch.empty(largest, dtype=torch.float64)
        self._bits = self._float.numpy().view(np.int64)
        self._unusable: str | None = None

    # --- contributions -------------------------------------------------------------------------------------------

    def fold(self, reader: TensorReader, weight: int) -> None:
        """Add ``weight * delta``.

        Raises:
            DeltaRefused: code ``weight`` (negative, no integer, or beyond the bound on the sum), ``names``, ``shape``,
                ``not-finite`` or ``out-of-bounds``.
        """
        self._check_usable()
        check_weight(weight, self.total_weight, self.spec.max_total_weight)
        check_layout(reader, self.spec)
        done = [0]  # pieces folded so far
        try:
            self._add(reader, weight, done, stop=None)
        except BaseException:
            self._undo(reader, weight, done[0])
            raise
        self.total_weight += weight
        self._magic_weight += weight
        self.clients += 1

    def remove(self, reader: TensorReader, weight: int) -> None:
        """The exact inverse of :meth:`fold` with the same delta and weight.

        Raises:
            DeltaRefused: as in :meth:`fold`; code ``weight`` if less than that is in the sum.
        """
        self._check_usable()
        if not isinstance(weight, int) or not 0 <= weight <= self.total_weight or self.clients == 0:
            raise DeltaRefused(
                "weight", "is not in the sum with this weight", field="weight", value=weight, hint="fold it in first"
            )
        check_layout(reader, self.spec)
        done = [0]
        try:
            self._add(reader, -weight, done, stop=None)
        except BaseException:
            self._undo(reader, -weight, done[0])
            raise
        self.total_weight -= weight
        self._magic_weight -= weight
        self.clients -= 1

    def merge(self, other: FixedPointAccumulator) -> None:
        """Add another accumulator's sum: the same as folding its deltas in here.

        Raises:
            FedPeftError: made for other shapes or bounds.
            DeltaRefused: code ``weight`` if the sum of weights would exceed the bound.
        """
        self._check_usable()
        other._check_usable()
        if dict(self.spec) != dict(other.spec) or self.spec.max_total_weight != other.spec.max_total_weight:
            raise FedPeftError("has another fixed-point format", field="accumulator", hint="plan both from one job")
        check_weight(other.total_weight, self.total_weight, self.spec.max_total_weight)
        for name, total in self._sums.items():
            np.add(total, other._sums[name], out=total)
        self.total_weight += other.total_weight
        self._magic_weight += other._magic_weight
        self.clients += other.clients

    # --- results -------------------------------------------------------------------------------------------------

    def integers(self, name: str) -> torch.Tensor:
        """The sum in units of 2^-fraction_bits, int64, in the tensor's shape (a copy)."""
        self._check_usable()
        return torch.from_numpy(self._sums[name] - self._magic(name)).reshape(self.spec[name].shape)

    def mean_chunks(self, name: str, elements: int = BLOCK) -> Iterator[torch.Tensor]:
        """The weighted mean in consecutive 1-D float64 pieces; each overwrites the last.

        Raises:
            FedPeftError: the sum of weights is zero.
        """
        self._check_usable()
        if self.total_weight == 0:
            raise FedPeftError("nothing to combine: the sum of weights is zero", field="weight", value=0)
        sums, magic = self._sums[name], self._magic(name)
        unit = math.ldexp(1.0, -self.spec[name].fraction_bits)
        whole = np.empty(min(elements, sums.size), np.int64)
        mean = np.empty(whole.size, np.float64)
        for begin in range(0, sums.size, elements):
            size = min(elements, sums.size - begin)
            np.subtract(sums[begin : begin + size], magic, out=whole[:size])
            # Integer to float64 and the quotient round once each; the power of two is exact. IEEE fixes all three.
            np.copyto(mean[:size], whole[:size])
            np.divide(mean[:size], self.total_weight, out=mean[:size])
            np.multiply(mean[:size], unit, out=mean[:size])
            yield torch.from_numpy(mean[:size])

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of one tensor, float64, in its shape. Raises as :meth:`mean_chunks`."""
        tensor = self.spec[name]
        pieces = list(self.mean_chunks(name, max(tensor.elements, 1)))
        return pieces[0].reshape(tensor.shape) if pieces else torch.zeros(tensor.shape, dtype=torch.float64)

    def commit(self, name: str, start: torch.Tensor, new: torch.Tensor) -> None:
        """``new = float32(float64(start) + mean)``, both 1-D float32 and contiguous. Raises as :meth:`mean_chunks`."""
        loop = fused.fixed_commit() if self.compiled else None
        if loop is None or self._unusable or self.total_weight == 0:
            commit_chunks(self.mean_chunks(name, COMMIT_BLOCK), start, new)
            return
        unit = math.ldexp(1.0, -self.spec[name].fraction_bits)
        weight = float(self.total_weight)
        loop(self._sums[name], self._magic(name), weight, unit, fused.as_array(start), new.numpy())

    def error_bound(self) -> float:
        """Largest absolute error of any entry of :meth:`mean`, over all tensors."""
        return max((self.spec.error_bound(name) for name in self.spec), default=0.0)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """A safetensors object; equal sums give equal bytes."""
        facts = {
            "max_total_weight": self.spec.max_total_weight,
            "total_weight": self.total_weight,
            "clients": self.clients,
            "max_abs": {name: t.max_abs.hex() for name, t in self.spec.items()},
        }
        return save(
            {name: self.integers(name) for name in self.spec},
            metadata={"fedpeft.fixed_point": json.dumps(facts, sort_keys=True)},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> FixedPointAccumulator:
        """Read :meth:`to_bytes`. Raises :class:`~fedpeft.errors.IntegrityError` if it is not that."""
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts = json.loads(header["__metadata__"]["fedpeft.fixed_point"])
            bounds = {name: float.fromhex(value) for name, value in facts["max_abs"].items()}
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            spec = plan(shapes, bounds, facts["max_total_weight"])
            total_weight, clients = int(facts["total_weight"]), int(facts["clients"])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"is not a stored accumulator: {error}", field="accumulator") from None
        if any(t.dtype != torch.int64 for t in tensors.values()):
            raise IntegrityError("is not a stored accumulator: tensors are not int64", field="accumulator")
        self = cls(spec)
        self.total_weight, self.clients = total_weight, clients
        for name, tensor in tensors.items():
            np.copyto(self._sums[name], tensor.reshape(-1).numpy())
        return self

    # --- inside --------------------------------------------------------------------------------------------------

    def _magic(self, name: str) -> np.int64:
        """The magic in a tensor's sum, modulo 2^64 as a signed integer."""
        raw = self._magic_weight * self.spec[name].magic_bits % 2**64
        return np.int64(raw - 2**64 if raw >= 2**63 else raw)

    def _add(self, reader: TensorReader, weight: int, done: list[int], stop: int | None) -> None:
        """Add ``weight * (magic + q)``, piece by piece, counting pieces in ``done``; end after ``stop`` of them."""
        for name, tensor in self.spec.items():
            total, position = self._sums[name], 0
            for chunk in reader.chunks(name, CHUNK):
                if position + chunk.numel() > tensor.elements:
                    raise DeltaRefused("shape", "has more elements than its shape says", field=name)
                loop = fused.fixed_fold(chunk.dtype) if self.compiled else None
                step = CHUNK if loop else BLOCK
                for begin in range(0, chunk.numel(), step):
                    if done[0] == stop:
                        return
                    piece = chunk if chunk.numel() <= step else chunk[begin : begin + step]
                    part = total[position : position + piece.numel()]
                    if loop:
                        self._add_compiled(loop, part, piece, name, weight)
                    else:
                        self._add_block(part, piece, name, weight)
                    position += piece.numel()
                    done[0] += 1
            if position != tensor.elements:
                raise DeltaRefused("shape", "has fewer elements than its shape says", field=name)

    def _add_compiled(
        self, loop: Callable[..., int], part: np.ndarray, piece: torch.Tensor, name: str, weight: int
    ) -> None:
        """One pass over a piece; what was added before a bad entry is taken out again."""
        tensor = self.spec[name]
        values, bound = fused.as_array(piece), fused.float32_bound(tensor.max_abs)
        added = loop(values, part, bound, tensor.magic, weight)
        if added < values.size:
            loop(values[:added], part[:added], bound, tensor.magic, -weight)
            refuse_piece(piece, BLOCK, tensor.max_abs, name)

    def _add_block(self, part: np.ndarray, piece: torch.Tensor, name: str, weight: int) -> None:
        """The same in separate passes over a block in the cache."""
        size = piece.numel()
        buffer, bits = self._float[:size], self._bits[:size]
        buffer.copy_(piece)
        check_block(piece if piece.dtype == torch.float32 else buffer, self.spec[name].max_abs, name)
        buffer.add_(self.spec[name].magic)
        if weight != 1:
            np.multiply(bits, weight, out=bits)
        np.add(part, bits, out=part)

    def _undo(self, reader: TensorReader, weight: int, blocks: int) -> None:
        """Take ``blocks`` pieces out again. The same values give the same integers, so this is exact."""
        undone = [0]
        try:
            self._add(reader, -weight, undone, stop=blocks)
        except BaseException as error:
            if undone[0] != blocks:
                self._unusable = f"a delta could not be read again to take it out: {error}"

    def _check_usable(self) -> None:
        if self._unusable:
            raise IntegrityError(self._unusable, field="accumulator", hint="build it again from the stored deltas")


def check_weight(weight: int, total: int, limit: int) -> None:
    """Refuse a weight that is no non-negative integer, or takes the sum beyond its public bound."""
    if not isinstance(weight, int) or isinstance(weight, bool) or weight < 0:
        raise DeltaRefused("weight", "must be an integer of at least 0", field="weight", value=weight)
    if total + weight > limit:
        raise DeltaRefused(
            "weight",
            f"would take the sum of weights from {total} beyond max_total_weight = {limit}",
            field="weight",
            value=weight,
            hint="raise aggregation.max_total_weight in the job file",
        )


def check_layout(reader: TensorReader, spec: Mapping[str, TensorPlan]) -> None:
    """Refuse a delta whose names or shapes are not the planned ones."""
    names = set(reader.names())
    if names != set(spec):
        missing, extra = sorted(set(spec) - names), sorted(names - set(spec))
        what = f"lacks {missing[0]}" if missing else f"has the unexpected tensor {extra[0]}"
        raise DeltaRefused("names", what, field="delta", hint="send exactly the tensors of the round's state")
    for name, tensor in spec.items():
        if tuple(reader.shape(name)) != tensor.shape:
            raise DeltaRefused("shape", f"must be {tensor.shape}", field=name, value=tuple(reader.shape(name)))


def check_block(values: torch.Tensor, max_abs: float, name: str) -> None:
    """Refuse NaN, infinity and entries beyond the bound.

    The sum of squares bounds the largest entry and is much the fastest reduction there is, so it decides the ordinary
    case; 0.98 covers its rounding over a block. Only a block that it cannot clear (or a NaN) pays for a minimum and
    maximum.
    """
    if torch.dot(values, values).item() <= 0.98 * max_abs * max_abs:
        return
    low, high = (float(v) for v in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DeltaRefused("not-finite", "holds NaN or infinity", field=name, hint="the client's training diverged")
    worst = max(-low, high)
    if worst > max_abs:
        raise DeltaRefused(
            "out-of-bounds",
            f"holds an entry beyond max_abs = {max_abs:g}",
            field=name,
            value=worst,
            hint="train with a smaller step, or raise aggregation.max_abs in the job file",
        )


def commit_chunks(means: Iterable[torch.Tensor], start: torch.Tensor, new: torch.Tensor) -> None:
    """``new = float32(float64(start) + mean)`` for 1-D tensors, the mean coming in consecutive float64 pieces."""
    position = 0
    for mean in means:
        end = position + mean.numel()
        mean.add_(start[position:end])  # float64 + float32: the float32 is widened first, exactly
        new[position:end].copy_(mean)
        position = end


def refuse_piece(piece: torch.Tensor, block: int, max_abs: float, name: str) -> NoReturn:
    """Say what is wrong with a piece that a compiled loop refused, in the words of the first bad block."""
    for values in piece.float().split(block):
        check_block(values, max_abs, name)
    raise IntegrityError(
        "was refused by the compiled loop but passes the check", field=name, hint="set NUMBA_DISABLE_JIT=1"
    )
