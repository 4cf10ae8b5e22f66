"""What the tests leave out of Triton's interpreter (triton_interpreter.py) changes nothing that a kernel sees."""

import contextlib
import dataclasses
import itertools
import os

import numpy
import pytest


if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)
tl = pytest.importorskip("triton.language")

from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


SEMANTIC = interpreter.interpreter_semantic
TYPES = [tl.int1, tl.int8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64]
SHAPES = [(), (4,), (1, 4), (2, 1), (2, 4), (8, 2, 4)]
NUMBERS = [True, 2, -3, 2**31, 2**40, 1.5, 1e-40, float("inf")]


def tensor(shape, dtype):
    values = numpy.arange(numpy.prod(shape, dtype=int)).astype(interpreter._get_np_dtype(dtype))
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.tensor(interpreter.TensorHandle(values.reshape(shape or (1,)), dtype), kind)


def outcome(function, *arguments, **options):
    """Types and values of the operands that come back, or the error."""
    try:
        operands = function(SEMANTIC, *arguments, **options)
    except Exception as error:  # whichever it is, both have to raise it
        return type(error).__name__, str(error)
    return [
        (str(operand.type), [int(n) for n in operand.type.shape.values] if operand.type.is_block() else [])
        + (str(operand.handle.data.dtype), operand.handle.data.tolist())
        for operand in operands
    ]


def assert_as_before(name, *arguments, **options):
    quick = getattr(TritonSemantic, name)
    # What a function calls in its turn is compared by itself.
    assert outcome(quick, *arguments, **options) == outcome(quick.__wrapped__, *arguments, **options)


@pytest.mark.parametrize("div_or_mod", [False, True])
def test_two_types_meet_in_the_same_one(div_or_mod):
    for left, right in itertools.product(TYPES, TYPES):
        operands = tensor((4,), left), tensor((4,), right)
        assert_as_before("binary_op_type_checking_impl", *operands, div_or_mod=div_or_mod)


@pytest.mark.parametrize("div_or_mod", [False, True])
def test_a_number_takes_the_same_type_or_is_refused(div_or_mod):
    for dtype, number in itertools.product(TYPES, NUMBERS):
        value = tensor((4,), dtype)
        for operands in ((value, number), (number, value)):
            assert_as_before("binary_op_type_checking_impl", *operands, div_or_mod=div_or_mod)


def test_shapes_are_broadcast_alike_or_refused():
    for left, right in itertools.product(SHAPES, [*SHAPES, (8,), (2, 8)]):
        operands = tensor(left, tl.float32), tensor(right, tl.int32)
        for _ in range(2):  # what is remembered of the first time
            assert_as_before("broadcast_impl_value", *operands)


@pytest.mark.parametrize("debug", [False, True])
def test_an_overflow_is_reported_where_triton_reports_it(monkeypatch, debug):
    options = dataclasses.replace(SEMANTIC.builder.options, debug=debug)
    monkeypatch.setattr(SEMANTIC.builder, "options", options)
    lhs, rhs = tensor((4,), tl.int32), tensor((4,), tl.int32)
    SEMANTIC.add(lhs, rhs, True)
    lhs.handle.data[2] = 2**31 - 1
    with pytest.raises(AssertionError, match="overflow detected") if debug else contextlib.nullcontext():
        SEMANTIC.add(lhs, rhs, True)
