"""What runs compiled kernels without a GPU: what it computes, and that it sees what a GPU would not forgive.

Run: pytest tests/test_ptx_machine.py
"""

import numpy as np
import pytest
import torch
from ptx_global_memory import GlobalMemory
from ptx_shared_memory import MemoryFault
from ptx_written_by_hand import THREADS, run


SHARE = """
    mov.u32 %r1, %tid.x;
    mul.lo.s32 %r2, %r1, 4;
    st.shared.b32 [%r2], %r1;
    {between}
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r4, [%r3];
"""
# Each thread's own place in the only tensor.
STORE = """
    ld.param.b64 %rd1, [kernel_param_0];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r4;
    ret;
"""
COPY = """
    mov.u32 %r1, %tid.x;
    ld.param.b64 %rd4, [kernel_param_1];
    mul.wide.u32 %rd5, %r1, 4;
    add.s64 %rd6, %rd4, %rd5;
    mul.lo.s32 %r2, %r1, 4;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd6 + 0 ], 0x4, {bytes};
    cp.async.commit_group;
    {between}
    ld.shared.b32 %r4, [%r2];
"""


def result_of(computation, x=None, dtype=torch.int32):
    """What `%r4` holds in each thread; `%r5` holds the numbers of `x`."""
    out = torch.zeros(THREADS, dtype=dtype)
    load = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd7, %r1, 4;\n"
    if x is not None:
        load += "ld.param.b64 %rd4, [kernel_param_1];\nadd.s64 %rd5, %rd4, %rd7;\nld.global.b32 %r5, [%rd5];\n"
    run(load + computation + STORE, out, *([] if x is None else [x]))
    return out


def test_every_program_writes_its_own_part():
    out = torch.zeros(10 * THREADS, dtype=torch.int32)
    body = "mov.u32 %r5, %ctaid.x;\nmov.u32 %r6, %tid.x;\nmad.lo.s32 %r1, %r5, 64, %r6;\nadd.s32 %r4, %r1, 7;\n"
    run(body + STORE, out, grid=(5, 1, 2))
    assert torch.equal(out[: 5 * THREADS], torch.arange(5 * THREADS, dtype=torch.int32) + 7)
    assert not out[5 * THREADS :].any()
    out.zero_()
    run(body + STORE, out, grid=(5, 1, 2), programs=[1, 8])
    assert set((out.nonzero().squeeze(1) // THREADS).tolist()) == {1, 3}


def test_the_last_program_of_the_largest_grid():
    out, sizes = torch.zeros(3, dtype=torch.int32), (2**31 - 1, 65_535, 65_535)
    places = [f"mov.u32 %r{place + 4}, %ctaid.{axis};\n" for place, axis in enumerate("xyz")]
    stores = [f"st.global.b32 [%rd1+{4 * place}], %r{place + 4};\n" for place in range(3)]
    last = sizes[0] * sizes[1] * sizes[2] - 1
    run(
        "ld.param.b64 %rd1, [kernel_param_0];\n" + "".join([*places, *stores, "ret;"]),
        out,
        grid=sizes,
        programs=[last],
    )
    assert out.tolist() == [size - 1 for size in sizes]


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65_536, 1), (1, 1, 65_536), (1, 0, 1)])
def test_a_grid_that_no_gpu_takes_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid must have 1 to \(2147483647, 65535, 65535\) programs, got"):
        run("ret;", grid=grid)


@pytest.mark.parametrize(
    "computation, expected",
    [
        ("shl.b32 %r4, %r5, 40;", lambda x: torch.zeros_like(x)),
        ("shr.s32 %r4, %r5, 40;", lambda x: -(x < 0).int()),
        ("div.s32 %r4, %r5, 7;", lambda x: torch.div(x, 7, rounding_mode="trunc").int()),
        ("mul.hi.s32 %r4, %r5, 1431655766;", lambda x: (x.long() * 1431655766) >> 32),
        ("mul.hi.u32 %r4, %r5, -2;", lambda x: ((x.long() & 0xFFFFFFFF) * 0xFFFFFFFE) >> 32),
        ("rem.s32 %r4, %r5, 7;", lambda x: torch.fmod(x, 7)),
        ("min.relu.s32 %r4, %r5, 9;", lambda x: x.clamp(0, 9)),
        ("bfe.s32 %r4, %r5, 3, 4;", lambda x: ((x >> 3) & 15) - 16 * ((x >> 6) & 1)),
        ("bfe.s32 %r4, %r5, 28, 8;", lambda x: x >> 28),
        ("prmt.b32 %r4, %r5, 0, 0x4123U;", lambda x: x_with_bytes_turned(x)),
        ("selp.b32 %r4, %r5, 3, %p1;", lambda x: torch.full_like(x, 3)),
        ("mov.b32 {%rs1, %rs2}, %r5;\nmov.b32 %r4, {%rs2, %rs1};", lambda x: (x << 16) | ((x >> 16) & 0xFFFF)),
        ("popc.b32 %r4, %r5;", lambda x: torch.tensor([bin(n & 0xFFFFFFFF).count("1") for n in x.tolist()])),
        ("redux.sync.add.s32 %r4, %r5, -1;", lambda x: x.view(2, 32).sum(1, True).expand(2, 32).reshape(-1)),
        ("shfl.sync.bfly.b32 %r4, %r5, 3, 31, -1;", lambda x: x[torch.arange(64) ^ 3]),
        ("shfl.sync.up.b32 %r4, %r5, 4, 0, -1;", lambda x: torch.cat((x[:4], x[:28], x[32:36], x[32:60]))),
        ("shfl.sync.idx.b32 %r4, %r5, 5, 31, -1;", lambda x: x[[5] * 32 + [37] * 32]),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integers(computation, expected):
    x = torch.randint(-(2**31), 2**31, (THREADS,)).int()
    x[:4] = torch.tensor([0, -1, 2**31 - 1, -(2**31)])
    assert torch.equal(result_of(computation, x), expected(x).int())


def x_with_bytes_turned(x):
    """Selectors 3, 2, 1 from the first operand and 4, the first byte of the second, which is zero."""
    data = x.numpy().view(np.uint8).reshape(-1, 4)
    turned = np.stack([data[:, 3], data[:, 2], data[:, 1], 0 * data[:, 0]], axis=1)
    return torch.from_numpy(np.ascontiguousarray(turned).view(np.int32).ravel())


@pytest.mark.parametrize(
    "computation, expected",
    [
        ("fma.rn.f32 %r4, %r5, %r5, 0fBF800000;", lambda x: (x.double() * x - 1).float()),
        ("mul.f32 %r4, %r5, 0f00800000;", lambda x: x * 2.0**-126),
        ("mul.ftz.f32 %r4, %r5, 0f00800000;", lambda x: torch.where(x.abs() < 1, 0, x * 2.0**-126)),
        ("max.f32 %r4, %r5, 0f3F000000;", lambda x: torch.where(x.isnan(), 0.5, x.clamp(min=0.5))),
        ("cvt.rn.bf16.f32 %rs1, %r5;\ncvt.f32.bf16 %r4, %rs1;", lambda x: x.bfloat16().float()),
        (
            "cvt.rn.f16x2.f32 %r6, %r5, 0f3F800000;\nmov.b32 {%rs1, %rs2}, %r6;\ncvt.f32.f16 %r4, %rs2;",
            torch.Tensor.half,
        ),
        ("ex2.approx.ftz.f32 %r4, %r5;", lambda x: torch.exp2(x)),
        ("setp.ltu.f32 %p1, %r5, 0f00000000;\nselp.f32 %r4, 0f3F800000, 0f00000000, %p1;", lambda x: 1.0 * ~(x >= 0)),
        ("setp.lt.f32 %p1, %r5, 0f00000000;\nselp.f32 %r4, 0f3F800000, 0f00000000, %p1;", lambda x: 1.0 * (x < 0)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_floats(computation, expected):
    x = torch.randn(THREADS)
    x[:3] = torch.tensor([torch.nan, 1 + 2.0**-20, -0.0])
    torch.testing.assert_close(
        result_of(computation, x, torch.float32), expected(x).float(), rtol=1e-6, atol=0, equal_nan=True
    )


def test_threads_that_part_meet_again():
    """Each adds up the numbers below its own, in a loop of its own length; then all of a warp are there for a sum."""
    body = """
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
$again:
    setp.ge.s32 %p1, %r2, %r1;
    @%p1 bra $done;
    add.s32 %r3, %r3, %r2;
    add.s32 %r2, %r2, 1;
    bra.uni $again;
$done:
    bar.sync 0;
    redux.sync.max.s32 %r4, %r3, -1;
    add.s32 %r4, %r4, %r3;
"""
    own = torch.tensor([n * (n - 1) // 2 for n in range(THREADS)], dtype=torch.int32)
    assert torch.equal(result_of(body), own + own.view(2, 32).amax(1, True).expand(2, 32).reshape(-1))


def test_a_barrier_for_a_part_of_a_program_is_refused():
    with pytest.raises(RuntimeError, match="a part of a program at a barrier"):
        result_of("setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $out;\nbar.sync 0;\n$out:\nmov.b32 %r4, 1;\n")


def test_what_another_warp_wrote_is_read_after_a_barrier():
    out = torch.zeros(THREADS, dtype=torch.int32)
    run(SHARE.format(between="bar.sync 0;") + STORE, out)
    assert torch.equal(out, torch.arange(THREADS, dtype=torch.int32) ^ 32)
    with pytest.raises(MemoryFault, match="reads what another warp wrote with no barrier"):
        run(SHARE.format(between="") + STORE, out)


@pytest.mark.parametrize(
    "after, fault",
    [
        ("st.shared.b32 [%r2], %r4;", "writes what another warp reads"),
        ("bar.sync 0;\nst.shared.b32 [%r3], %r4;\nst.shared.b32 [%r2], 9;", "writes what another warp wrote"),
        ("bar.sync 0;\nmov.b32 %r5, 0;\nst.shared.b32 [%r5], %r1;", "writes different numbers to one place"),
        ("ld.shared.v2.b32 {%r5, %r6}, [%r2];", "outside of shared memory or not aligned"),
        ("ld.shared.b32 %r5, [%r2+8192];", "outside of shared memory or not aligned"),
    ],
)
def test_what_goes_wrong_in_shared_memory(after, fault):
    with pytest.raises(MemoryFault, match=fault):
        run(SHARE.format(between="bar.sync 0;") + after + STORE, torch.zeros(THREADS, dtype=torch.int32))


def test_warps_may_write_the_same_number_to_one_place():
    """And read it: each has written it itself. A third, which has not, waits for a barrier."""
    body = "mov.b32 %r2, 16;\n{which}st.shared.b32 [%r2], 7;\nld.shared.b32 %r4, [%r2];\n"
    assert (result_of(body.format(which="")) == 7).all()
    two = "setp.lt.u32 %p1, %r1, 64;\n@%p1 "
    with pytest.raises(MemoryFault, match="reads what another warp wrote"):
        run("mov.u32 %r1, %tid.x;\n" + body.format(which=two) + STORE, torch.zeros(96), threads=96)


def test_integers_that_differ_are_no_rounding():
    body = "mov.b32 %r2, 16;\nshr.u32 %r3, %r1, 5;\nadd.s32 %r3, %r3, 1000000;\nst.shared.b32 [%r2], %r3;\n"
    with pytest.raises(MemoryFault, match="writes different numbers"):
        result_of(body + "bar.sync 0;\nld.shared.b32 %r4, [%r2];\n")


@pytest.fixture(params=[False, True], ids=["copied", "in place"])
def of_any_size(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("ptx_global_memory.IN_PLACE", 1)


@pytest.mark.usefixtures("of_any_size")
def test_a_tensor_ends_where_it_ends():
    """One thread too many, a place between two numbers, and threads that are held back from either."""
    with pytest.raises(MemoryFault, match="outside of every tensor"):
        result_of("mov.b32 %r4, 1;", torch.zeros(THREADS - 1))
    with pytest.raises(MemoryFault, match="outside of every tensor or not aligned"):
        result_of("ld.global.b32 %r4, [%rd5+2];", torch.zeros(THREADS + 1))
    guarded = "setp.lt.u32 %p1, %r1, 9;\nmov.b32 %r4, 3;\n@%p1 ld.global.b32 %r4, [%rd5+256];"
    x = torch.arange(THREADS + 9, dtype=torch.int32)
    assert result_of(guarded, x).tolist() == [*range(64, 73), *[3] * (THREADS - 9)]


@pytest.mark.usefixtures("of_any_size")
def test_a_view_begins_where_it_begins():
    whole = torch.zeros(THREADS + 8, dtype=torch.int32)
    run("mov.u32 %r1, %tid.x;\nadd.s32 %r4, %r1, 1;" + STORE, whole[4:-4])
    assert torch.equal(whole[4:-4], torch.arange(THREADS, dtype=torch.int32) + 1)
    assert not whole[:4].any() and not whole[-4:].any()


def test_a_large_tensor_beside_a_small_one():
    """Of 4 GiB that nobody has written, the end alone."""
    large, x = torch.empty(2**30, dtype=torch.int32), torch.arange(THREADS, dtype=torch.int32)
    load = "ld.param.b64 %rd4, [kernel_param_1];\nmul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd6, %rd4, %rd5;\n"
    run("mov.u32 %r1, %tid.x;\n" + load + "ld.global.b32 %r4, [%rd6];\n" + STORE, large[-THREADS:], x)
    assert torch.equal(large[-THREADS:], x)
    memory = GlobalMemory([large, x])
    assert memory.buffer.size < 2**20 and memory.origin + memory.address(large) == large.data_ptr()
    with pytest.raises(MemoryFault, match="outside of every tensor"):
        run("mov.u32 %r1, %tid.x;\n" + STORE, large[1 - THREADS :], x)


def test_a_copy_arrives_when_it_is_waited_for():
    x, out = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    run(COPY.format(bytes=4, between="") + STORE, out, x)
    assert (out == -1).all()  # what stands there until then: all bits are ones
    run(COPY.format(bytes=4, between="cp.async.wait_group 0;") + STORE, out, x)
    assert torch.equal(out, x)
    run(COPY.format(bytes=0, between="cp.async.wait_group 0;") + STORE, out, x)
    assert not out.any()
    run(COPY.format(bytes=4, between="cp.async.commit_group;\ncp.async.wait_group 1;") + STORE, out, x)
    assert torch.equal(out, x)
    with pytest.raises(MemoryFault, match="reads what another warp wrote with no barrier"):
        run(COPY.format(bytes=4, between="cp.async.wait_group 0;\nxor.b32 %r2, %r2, 128;") + STORE, out, x)


# 64 rows of sixteen ones in shared memory, and the product of four warps of these with the first eight of them.
PRODUCT = """
    mov.u32 %r1, %tid.x;
    mul.lo.s32 %r2, %r1, 16;
    mov.b32 %r3, 0x3F803F80;
    st.shared.v4.b32 [%r2], {{%r3, %r3, %r3, %r3}};
    {between}
    mov.b64 %rd5, 0x0000000800400000;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
    mov.b32 %r7, 0;
    mov.pred %p1, 1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r4,%r5,%r6,%r7}}, %rd5, %rd5, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {after}
    wgmma.wait_group.sync.aligned 0;
"""
FENCE = "fence.proxy.async.shared::cta;\nbar.sync 0;"


def test_a_product_reads_what_was_fenced():
    out = torch.zeros(128)
    run(PRODUCT.format(between=FENCE, after="") + STORE, out, threads=128)
    assert (out == 16).all()
    for between, fault in (
        ("bar.sync 0;", "with no fence.proxy.async between"),
        ("fence.proxy.async.shared::cta;", "with no barrier between"),
    ):
        with pytest.raises(MemoryFault, match=fault):
            run(PRODUCT.format(between=between, after="") + STORE, out, threads=128)
    with pytest.raises(MemoryFault, match="writes what a matrix product still reads"):
        run(PRODUCT.format(between=FENCE, after="st.shared.b32 [%r2], 0;") + STORE, out, threads=128)
    with pytest.raises(MemoryFault, match="writes what another warp reads"):
        run(PRODUCT.format(between=FENCE, after="") + "st.shared.b32 [%r2], 0;" + STORE, out, threads=128)


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.alloc.b32 [%r1], 32;", "mad.hi.s32 %r1, %r2, %r3, %r4;", "max.NaN.f32 %r1, %r2, %r3;",
        "cvt.rni.f32.f32 %r1, %r2;", "cvt.rn.relu.f16.f32 %rs1, %r2;", "add.sat.f32 %r1, %r2, %r3;",
        "shfl.sync.down.b32 %r1, %r2, 1, 31, -1;", "bar.sync 1, 32;", "fence.acq_rel.gpu ;",
        "ld.const.b32 %r1, [%rd1];", "cp.async.bulk.commit_group ;", "setp.lt.ftz.f32 %p1, %r1, %r2;",
    ],
    ids=lambda instruction: instruction.split()[0],
)  # fmt: skip
def test_an_unknown_form_is_named(instruction):
    with pytest.raises(NotImplementedError, match=instruction.split()[0]):
        run(instruction, torch.zeros(1))


def test_a_part_of_a_warp_is_refused_where_it_takes_all():
    body = "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $out;\nredux.sync.add.s32 %r4, %r1, -1;\n$out:\nadd.s32 %r4, %r4, 1;\n"
    with pytest.raises(RuntimeError, match="redux.*a part of 32 threads"):
        result_of(body)
