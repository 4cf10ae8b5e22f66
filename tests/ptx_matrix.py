"""Matrix instructions of NVIDIA GPUs: which thread holds which number, and where shared memory holds an operand.

After "Matrix fragments" and "Asynchronous warpgroup level matrix instructions" of the PTX manual. Products are made in
float32 from operands as the instruction sees them (TF32 without its last 13 bits).
"""

import functools

import numpy as np
from ptx_arithmetic import from_bf16, to_tf32
from ptx_shared_memory import MemoryFault


LANE = np.arange(32)
GROUP, FOURTH = LANE // 4, LANE % 4


@functools.cache
def _fragment(name):
    """Rows and columns `[registers, lanes, numbers in a register]` of what a warp holds of one operand."""
    pair = np.arange(2)
    if name == "A16":  # 16 × 16 of two bytes, four registers
        register = np.arange(4)[:, None, None]
        row = GROUP[None, :, None] + 8 * (register % 2) + 0 * pair
        column = 2 * FOURTH[None, :, None] + 8 * (register // 2) + pair
    elif name == "B16":  # 16 × 8, two registers
        register = np.arange(2)[:, None, None]
        row = 2 * FOURTH[None, :, None] + 8 * register + pair
        column = GROUP[None, :, None] + 0 * row
    elif name == "A8":  # 16 × 8 of four bytes, four registers
        register = np.arange(4)[:, None, None]
        row = GROUP[None, :, None] + 8 * (register % 2)
        column = FOURTH[None, :, None] + 4 * (register // 2)
    else:  # "B8": 8 × 8 of four bytes, two registers
        register = np.arange(2)[:, None, None]
        row = FOURTH[None, :, None] + 4 * register
        column = GROUP[None, :, None] + 0 * row
    return row, column


@functools.cache
def _sums(columns):
    """Rows and columns `[registers, lanes]` of 16 × `columns` sums of float32, which a warp holds."""
    register = np.arange(columns // 2)[:, None]
    return GROUP[None] + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * FOURTH[None] + register % 2


def _numbers(bits, kind):
    """Numbers of two or four bytes as float32."""
    if kind == "tf32":
        return to_tf32(bits.view(np.float32))
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _matrix(registers, fragment, shape, kind):
    """`[warps, *shape]` from registers of all threads."""
    bits = np.stack(registers).view("u4" if kind == "tf32" else "u2")
    held = _numbers(bits, kind).reshape(
        len(registers), -1, 32, 4 // bits.itemsize
    )  # [registers, warps, lanes, numbers]
    row, column = _fragment(fragment)
    matrix = np.empty((held.shape[1], *shape), dtype=np.float32)
    matrix[:, np.broadcast_to(row, column.shape), column] = held.transpose(1, 0, 2, 3)
    return matrix


def multiply(shape, kind, left, right, sums):
    """`mma.sync`: new sums, registers of all threads."""
    depth = 8 if kind == "tf32" else 16
    if shape != f"m16n8k{depth}":
        raise NotImplementedError(f"mma of {shape} {kind}")
    a = _matrix(left, f"A{depth}", (16, depth), kind)
    b = _matrix(right, f"B{depth}", (depth, 8), kind)
    product = np.matmul(a, b)
    row, column = _sums(8)
    with_sums = product[:, row, column].transpose(1, 0, 2).reshape(4, -1)  # [registers, threads]
    return [
        (found + register.view(np.float32)).view(np.uint32) for found, register in zip(with_sums, sums, strict=True)
    ]


def load_matrices(shared, addresses, count, transposed, active, text):
    """`ldmatrix`: `count` 8 × 8 matrices of two-byte numbers, whose rows the lanes' addresses name."""
    rows = np.zeros(addresses.size, dtype=bool)
    rows[np.arange(addresses.size) % 32 < 8 * count] = True
    rows = rows if active is None else rows & active
    found = shared.load(addresses, 16, rows, text, 2).reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8)
    found = found.swapaxes(2, 3) if transposed else found
    held = np.ascontiguousarray(found[:, :, GROUP[:, None], 2 * FOURTH[:, None] + np.arange(2)])
    return [np.ascontiguousarray(held[:, matrix]).view(np.uint32).ravel() for matrix in range(count)]


def store_matrices(shared, addresses, registers, transposed, active, text):
    """`stmatrix`: the way back."""
    count = len(registers)
    halves = np.stack(registers, axis=1).view(np.uint16).reshape(-1, 32, count, 2).transpose(0, 2, 1, 3)
    matrices = np.empty((halves.shape[0], count, 8, 8), dtype=np.uint16)
    matrices[:, :, GROUP[:, None], 2 * FOURTH[:, None] + np.arange(2)] = halves
    matrices = matrices.swapaxes(2, 3) if transposed else matrices
    values = np.zeros((halves.shape[0], 32, 8), dtype=np.uint16)
    values[:, : 8 * count] = matrices.reshape(-1, 8 * count, 8)
    rows = np.arange(addresses.size) % 32 < 8 * count
    shared.store(addresses, 16, rows if active is None else rows & active, text, 2, values.reshape(-1, 8))


SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


@functools.lru_cache(maxsize=4096)
def _operand_places(descriptor, extent, depth, width, major_is_extent, cell):
    """Bytes of shared memory `[extent, depth]` where a descriptor finds an operand, and the cells that these are in.

    `width`: bytes of a number; `cell`: of a cell.

    `major_is_extent`: whether neighbours along the extent (M or N) lie side by side, not those along the depth.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    line = SWIZZLED_BYTES[descriptor >> 62 & 3]
    along, deep = np.arange(extent)[:, None], np.arange(depth)[None, :]
    if not major_is_extent:
        place = along % 8 * line + along // 8 * stride
        place = place + (deep * width if line > 16 else deep * width % 16 + deep * width // 16 * leading)
    else:
        numbers = line // width  # in a line
        outer, inner = (leading, stride) if line > 16 else (stride, leading)
        place = along % numbers * width + along // numbers * outer + deep % 8 * line + deep // 8 * inner
    place = place + start
    if line > 16:  # bits 4 to 6 change with bits 7 to 9, as many as a line has
        place = place ^ ((place >> 7 & (line // 16 - 1)) << 4)
    return place, np.unique(place // cell)


def multiply_group(shared, shape, kind, left, right, sums, keep_sums, transposed, active, text):
    """`wgmma.mma_async`: new sums of 64 × `columns` for each four warps.

    `left`: registers, or a descriptor as `right` is, the same in all threads of a group; `transposed`: of both.
    """
    width, depth = (4, 8) if kind == "tf32" else (2, 16)
    columns = 2 * len(sums)
    if shape != f"m64n{columns}k{depth}":
        raise NotImplementedError(f"PTX instruction {text}")
    groups = sums[0].size // 128
    programs = shared.program[::128]
    working = np.arange(groups) if active is None else np.flatnonzero(active[::128])

    def operand(descriptors, extent, is_transposed):
        described = descriptors.reshape(groups, 128)[working]
        if (described != described[:, :1]).any():
            raise MemoryFault(f"{text}: threads of a group have different descriptors")
        found = [
            _operand_places(one, extent, depth, width, is_transposed, shared.cell) for one in described[:, 0].tolist()
        ]
        places = np.stack([places for places, _ in found])
        if (places < 0).any() or (places + width > shared.limit).any():
            raise MemoryFault(f"{text}: an operand outside of shared memory")
        places = places + (programs[working] * shared.size)[:, None, None]
        for program, (_, cells) in zip(programs[working], found, strict=True):
            shared.use(cells, program, text)
        return _numbers(shared.views[width][places // width], kind)

    if isinstance(left, list):
        a = _matrix(left, f"A{depth}", (16, depth), kind).reshape(groups, 64, depth)[working]
    else:
        a = operand(left, 64, transposed[0])
    b = operand(right, columns, transposed[1])
    product = np.zeros((groups, 64, columns), dtype=np.float32)
    product[working] = np.matmul(a, b.swapaxes(1, 2))
    row, column = _sums(columns)
    held = product.reshape(-1, 16, columns)[:, row, column].transpose(1, 0, 2).reshape(len(sums), -1)
    found = []
    for one, register in zip(held, sums, strict=True):
        before = register.view(np.float32)
        found.append(np.where(keep_sums, before + one, one).view(np.uint32))
    return found
