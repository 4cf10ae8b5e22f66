"""Races in the memory that programs share: which are seen, and what is none.

Run: pytest tests/test_ptx_meetings.py
"""

import pytest
import torch
from ptx_program import parse
from ptx_shared_memory import MemoryFault
from ptx_written_by_hand import THREADS, run


# `%rd3`: the thread's place in the first tensor, whichever its program, which is `%r5`. `%p1`: the last program.
HERE = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r5, %ctaid.x;
    setp.eq.u32 %p1, %r5, 2;
    ld.param.b64 %rd1, [kernel_param_0];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
"""
# `%rd5`: the place of a thread of the other warp. `%p2`: the second warp.
OTHER = """
    xor.b32 %r6, %r1, 32;
    mul.wide.u32 %rd4, %r6, 4;
    add.s64 %rd5, %rd1, %rd4;
    setp.ge.u32 %p2, %r1, 32;
"""
BARRIER = "bar.sync 0;"
READ, WRITE, ADD = "ld.global.b32 %r4, [%rd3];", "st.global.b32 [%rd3], 7;", "atom.global.add.s32 %r4, [%rd3], 1;"


def faults(*lines, **options):
    """Whether three programs of two warps race."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    try:
        run("\n".join([HERE, OTHER, *lines, "ret;"]), out, **{"grid": (3, 1, 1)} | options)
    except MemoryFault as fault:
        assert str(fault).startswith("race: ")
        return True
    return False


@pytest.fixture(params=[1, 4096], ids=["one after the other", "together"])
def in_either_way(request, monkeypatch):
    monkeypatch.setattr("ptx_machine.THREADS_AT_ONCE", request.param)


@pytest.mark.usefixtures("in_either_way")
@pytest.mark.parametrize(
    "lines, races",
    [
        ([READ], False),
        ([WRITE], False),  # all the same number
        ([ADD], False),
        (["red.global.gpu.relaxed.add.u32 [%rd3], 1;"], False),
        (["red.global.gpu.relaxed.add.u32 [%rd3], 1;", BARRIER, f"@%p1 {READ}"], True),
        ([f"@%p1 {line}" for line in (READ, WRITE, READ, ADD)], False),
        (["st.global.b32 [%rd3], %r5;"], True),
        ([WRITE, BARRIER, "@%p1 st.global.b32 [%rd3], 8;"], True),
        ([f"@%p1 {WRITE}", f"@!%p1 {READ}"], True),
        ([f"@!%p1 {WRITE}", f"@%p1 {READ}"], True),
        (["@%p1 st.global.b32 [%rd3], 0;", f"@!%p1 {READ}"], True),  # even if nothing changes
        ([f"@%p1 {READ}", BARRIER, WRITE], True),
        ([ADD, BARRIER, f"@%p1 {READ}"], True),
        ([ADD, BARRIER, f"@%p1 {WRITE}"], True),
        ([f"@%p1 {WRITE}", BARRIER, ADD], True),
        ([f"@%p1 {READ}", BARRIER, ADD], True),
    ],
)
def test_programs(lines, races):
    assert faults(*lines) == races


@pytest.mark.parametrize("barrier", [[], [BARRIER]], ids=["no barrier", "barrier"])
@pytest.mark.parametrize(
    "first, then, races",
    [
        ("st.global.b32 [%rd3], %r1;", "ld.global.b32 %r4, [%rd5];", True),
        ("ld.global.b32 %r4, [%rd3];", "st.global.b32 [%rd5], %r1;", True),
        ("st.global.b32 [%rd3], %r1;", "st.global.b32 [%rd5], %r1;", True),
        ("st.global.b32 [%rd1], 7;", "@%p2 st.global.b32 [%rd1], 8;", True),
        ("st.global.b32 [%rd1], 7;", "@!%p2 st.global.b32 [%rd1], 8;", True),
        ("atom.global.add.s32 %r4, [%rd3], 1;", "ld.global.b32 %r4, [%rd5];", True),
        ("atom.global.add.s32 %r4, [%rd1], 1;", "atom.global.add.s32 %r4, [%rd1], 1;", False),
        ("st.global.b32 [%rd1], 7;", "st.global.b32 [%rd1], 7;", False),
        ("ld.global.b32 %r4, [%rd1];", "ld.global.b32 %r4, [%rd1];", False),
        *((one, other, False) for one in (READ, WRITE, ADD) for other in (READ, WRITE, ADD)),  # each its own place
    ],
)
def test_warps(first, then, races, barrier):
    assert faults(first, *barrier, then, grid=(1, 1, 1)) == (races and not barrier)


def test_threads_that_write_different_numbers_to_one_place():
    assert faults("st.global.b32 [%rd1], %r1;", grid=(1, 1, 1))


@pytest.mark.usefixtures("in_either_way")
def test_idle_threads_meet_nobody():
    idle = "setp.eq.u32 %p3, %r1, %r5;"  # of each program one thread is not
    assert not faults(idle, "@%p3 st.global.b32 [%rd3], %r5;", f"@%p3 {READ}", f"@%p3 {ADD}")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "one, other, races",
    [
        ("st.global.v2.b32 [%rd1], {%r5, 9};", "st.global.b32 [%rd1+4], 9;", False),
        ("st.global.v2.b32 [%rd1], {%r5, 9};", "st.global.b32 [%rd1+4], 8;", True),
        ("st.global.b32 [%rd1], 9;", "ld.global.v2.b32 {%r6, %r7}, [%rd1];", True),
        ("st.global.b32 [%rd1+4], 9;", "ld.global.v2.b32 {%r6, %r7}, [%rd1];", True),
        ("st.global.b32 [%rd1+8], 9;", "ld.global.v2.b32 {%r6, %r7}, [%rd1];", False),
        ("st.global.b64 [%rd1], %rd1;", "ld.global.b32 %r6, [%rd1+4];", True),
        ("st.global.b64 [%rd1], %rd1;", "ld.global.b32 %r6, [%rd1+8];", False),
        ("st.global.b16 [%rd1+2], %rs1;", "ld.global.b16 %rs2, [%rd1];", False),
        ("st.global.b16 [%rd1+2], %rs1;", "ld.global.b16 %rs2, [%rd1+2];", True),
        ("st.global.b16 [%rd1+2], %rs1;", "ld.global.b32 %r6, [%rd1];", True),
        ("st.global.b32 [%rd1], 9;", "ld.global.b16 %rs2, [%rd1+2];", True),
    ],
)
def test_pieces_of_other_sizes(one, other, races, turned):
    """Of two programs each has a part of the first 16 bytes."""
    first, second = (other, one) if turned else (one, other)
    choose = "mov.b16 %rs1, 3;\nsetp.eq.u32 %p3, %r5, 1;"
    assert faults(choose, f"@!%p3 {first}", f"@%p3 {second}", threads=1, grid=(2, 1, 1)) == races


@pytest.mark.parametrize(
    "lines, written",
    [
        (["st.global.b32 [%rd1], 1;"], {0}),
        (["ld.global.b32 %r4, [%rd1];", "st.global.b32 [%rd2], %r4;"], {1}),
        (["selp.b64 %rd3, %rd1, %rd2, %p1;", "st.global.b32 [%rd3], 1;"], {0, 1}),
        (["mov.b64 {%r1, %r2}, %rd1;", "mov.b64 %rd3, {%r1, %r2};", "st.global.b32 [%rd3], 1;"], {0}),
        (["st.shared.b64 [%r1], %rd1;", "ld.shared.b64 %rd3, [%r1];", "atom.global.add.s32 %r4, [%rd3], 1;"], {0}),
        (["$L__BB0_1:", "st.global.b32 [%rd3], 1;", "add.s64 %rd3, %rd2, 4;", "bra.uni $L__BB0_1;"], {1}),
        (["red.global.gpu.relaxed.add.u32 [%rd2], 1;"], {1}),
        (["cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;"], set()),
    ],
)
def test_which_parameters_lead_to_writes(lines, written):
    head = ".visible .entry kernel(\n\t.param .u64 kernel_param_0,\n\t.param .u64 kernel_param_1\n)\n.reqntid 32\n{\n"
    registers = ".reg .pred %p<9>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n"
    load = "ld.param.b64 %rd1, [kernel_param_0];\nld.param.b64 %rd2, [kernel_param_1];\n"
    assert parse(head + registers + load + "\n".join(lines) + "\nret;\n}\n").written == written
