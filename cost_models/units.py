"""Bytes and seconds: how people write them and how pipefit shows them.

"8GB" is 8·10⁹ bytes and "8GiB" is 8·2³⁰, as in accelerate; what is shown to people is GiB with two
decimals, and says GiB.
"""

from __future__ import annotations

import math
import re

from pipefit.errors import InvalidRequest

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes of one element of the dtypes that weights are stored in and kernels compute in."""

_UNIT_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*")


def format_bytes(num_bytes: float) -> str:
    """Return *num_bytes* as GiB with two decimals.

    >>> format_bytes(8 * 10**9)
    '7.45 GiB'
    """
    return f"{num_bytes / GIB:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    >>> format_seconds(0.0042), format_seconds(31.2), format_seconds(512)
    ('4.2 ms', '31.2 s', '8 min 32 s')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def parse_bytes(size: str | int | float, *, total_bytes: int | None = None) -> int:
    """Return the bytes that *size* stands for.

    A number is bytes; a string carries a unit (``"8GB"``, ``"7.5GiB"``, ``"800MB"``) or is a share
    of *total_bytes* (``"80%"``).

    >>> parse_bytes("8GB"), parse_bytes("8GiB"), parse_bytes("50%", total_bytes=10)
    (8000000000, 8589934592, 5)

    Raises:
        InvalidRequest: if it is not a size, not positive, not finite, or a share above 100 %.
    """
    asked = f"The size {size!r} was not understood: "
    if isinstance(size, bool) or not isinstance(size, (str, int, float)):
        raise InvalidRequest(asked + 'write a number of bytes or a text like "8GB".')
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match.group(2).lower() if match else ""
        if match is None or (unit not in _UNIT_BYTES and unit != "%"):
            raise InvalidRequest(
                asked + 'write a positive number with a unit, like "8GB", "7.5GiB" or "80%".'
            )
        number = float(match.group(1))
        if unit == "%":
            if not 0 < number <= 100:
                raise InvalidRequest(asked + "a share lies above 0% and at most at 100%.")
            if total_bytes is None:
                raise InvalidRequest(asked + "a share needs a GPU whose total is known.")
            number, unit_bytes = number / 100, total_bytes
        else:
            unit_bytes = _UNIT_BYTES[unit]
        num_bytes = number * unit_bytes
    else:
        num_bytes = float(size)
    if not math.isfinite(num_bytes) or num_bytes < 1:
        raise InvalidRequest(asked + "a size is a positive, finite number of bytes.")
    return int(num_bytes)
