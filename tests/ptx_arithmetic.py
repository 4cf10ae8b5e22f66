"""What PTX instructions compute, on arrays with one number for each thread.

Floats are rounded as PTX says where it says so. Its approximate instructions (`ex2.approx`, `div.full`, …) are rounded
correctly here: what a GPU makes of them lies within a few units of that.
"""

import numpy as np


u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
s8, s16, s32, s64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
TYPES = {name: globals()[name] for name in ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "f32", "f64")}
TYPES |= {"b8": u8, "b16": u16, "b32": u32, "b64": u64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x):
    """Subnormal numbers are zero under `.ftz`."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f32(0), x), x)


def from_bf16(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def to_bf16(x):
    """To nearest, ties to even; what is not a number stays none."""
    bits = x.astype(f32).view(u32).astype(u64)
    rounded = ((bits + u64(0x7FFF) + ((bits >> u64(16)) & u64(1))) >> u64(16)).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), rounded)


def to_tf32(x):
    """Without the digits that a matrix product in TF32 does not see."""
    return (np.ascontiguousarray(x, dtype=f32).view(u32) & u32(0xFFFFE000)).view(f32)


def fma(a, b, c):
    """Rounded once to float32 but for one in 2^29, where the sum in float64 is rounded before."""
    if a.dtype == f64:
        return a * b + c  # numpy has no fused one
    return (a.astype(f64) * b + c).astype(a.dtype)


def divide(a, b):
    """Of integers, rounded towards zero; by zero: all ones."""
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, 1, b).astype(a.dtype))
    wide = np.abs(a.astype(s64)) // np.maximum(np.abs(b.astype(s64)), 1)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -wide, wide)).astype(a.dtype)


def shift_left(a, count):
    bits = a.dtype.itemsize * 8
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, count):
    """Arithmetic for signed numbers. A count beyond the width is the width."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def high_part(a, b):
    """`mul.hi`: the upper half of a product of twice as many bits."""
    bits, kind = 8 * a.dtype.itemsize, a.dtype.kind
    assert bits < 64, "numpy has no numbers of 128 bits"
    wide = np.dtype(f"{kind}{a.dtype.itemsize * 2}")
    return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)


def extract_bits(a, start, length):
    """`bfe`: `length` bits from `start` on; the sign of the last one fills the rest of a signed number."""
    bits = a.dtype.itemsize * 8
    start, length = np.minimum(np.asarray(start) & 255, bits), np.asarray(length) & 255
    length = np.minimum(length, bits - start)
    unsigned = np.dtype(f"u{a.dtype.itemsize}").type
    raw = shift_right(a.view(unsigned), start)
    raw = np.where(length < bits, raw & (shift_left(np.ones_like(raw), length) - unsigned(1)), raw)
    if a.dtype.kind == "u":
        return raw
    sign_place = np.minimum(start + length - 1, bits - 1)
    negative = ((a.view(unsigned) >> sign_place.astype(unsigned)) & unsigned(1)).astype(bool) & (length > 0)
    filled = np.where(length < bits, raw | ~(shift_left(np.ones_like(raw), length) - unsigned(1)), raw)
    return np.where(negative, filled, raw).view(a.dtype)


def permute_bytes(a, b, selector):
    """`prmt` without a mode."""
    source = (b.astype(u64) << u64(32)) | a
    found = np.zeros_like(a)
    for place in range(4):
        choice = (selector >> u32(4 * place)) & u32(15)
        byte = ((source >> ((choice & u32(7)) * u32(8)).astype(u64)) & u64(255)).astype(u32)
        byte = np.where(choice & u32(8), np.where(byte & u32(128), u32(255), u32(0)), byte)
        found |= byte << u32(8 * place)
    return found


def to_integer(whole, kind):
    """A whole number in a float as an integer, held within its type's range; zero for NaN, whatever PTX gives."""
    bounds = np.iinfo(kind)
    inside = (whole >= float(bounds.min)) & (whole < float(bounds.max))
    found = np.where(inside, whole, 0).astype(kind)
    return np.where(whole >= float(bounds.max), bounds.max, np.where(whole < float(bounds.min), bounds.min, found))


def compare(name, a, b):
    """`setp`. With a `u` behind the name, true also where one is not a number."""
    floats = a.dtype.kind == "f"
    if name == "num":
        return ~(np.isnan(a) | np.isnan(b))
    unordered = floats and name.endswith("u")
    with_nan = (np.isnan(a) | np.isnan(b)) if floats else False
    function = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }[name.removesuffix("u")]  # fmt: skip
    found = function(a, b)
    return found | with_nan if unordered else found & ~with_nan if floats else found
