"""A GPU in numpy: runs the PTX that Triton makes of a kernel, on tensors of a CPU.

It shows what the interpreter cannot: that the compiled code is right, with the tiles that are shipped. All threads of
some programs go through it together, an instruction at a time; where they part, those furthest behind go on first.
"""

from collections.abc import Sequence

import numpy as np
import ptx_matrix
import torch
from ptx_global_memory import GlobalMemory
from ptx_meetings import WARP_BITS, key_of
from ptx_operands import STORAGE
from ptx_program import parse
from ptx_shared_memory import SharedMemory
from ptx_translation import END, Translation


THREADS_AT_ONCE = 4096
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
_translations: dict[bytes | str, Translation] = {}


def launch(
    ptx: bytes | str,
    shared_bytes: int,
    grid: tuple[int, int, int],
    arguments: list,
    programs: Sequence[int] | None = None,
) -> None:
    """Runs all programs of a launch, or some. `arguments`: numbers and tensors of the CPU, as the parameters are.

    `programs`: numbers of those to run, the first axis of the grid being the one that changes fastest.

    Raises:
        ValueError: there are too few or too many arguments, or programs along an axis of the grid.
        MemoryFault: the code reads or writes where it may not, or races with itself.
        NotImplementedError: it has an instruction that Triton is not known to write.
    """
    if any(not 1 <= size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise ValueError(f"grid must have 1 to {GRID_LIMITS} programs, got {grid}")
    translation = _translations.get(ptx)
    if translation is None:
        program = parse(ptx if isinstance(ptx, str) else ptx.decode())
        translation = _translations[ptx] = Translation(program)
    tensors = {place: value for place, value in enumerate(arguments) if isinstance(value, torch.Tensor)}
    written = [tensors[place] for place in translation.program.written if place in tensors]
    memory = GlobalMemory(tensors.values(), written, translation.program.written_cell)
    values = [memory.address(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    missing = len(translation.program.parameters) - len(values)
    if missing not in (0, 2):
        raise ValueError(f"a kernel of {len(translation.program.parameters)} parameters got {len(values)}")
    values += [0] * missing  # the two that Triton adds, for scratch memory
    programs = range(grid[0] * grid[1] * grid[2]) if programs is None else programs
    step = max(THREADS_AT_ONCE // translation.program.threads, 1)
    for start in range(0, len(programs), step):
        Machine(translation, values, grid, programs[start : start + step], start, memory, shared_bytes).run()
    memory.write_back()


class Machine:
    """Some programs of a launch, from their first instruction to the last. The methods are for translated code.

    `programs` are their numbers in the grid; so many ran `before`.
    """

    def __init__(self, translation, parameters, grid, programs, before, memory, shared_bytes):
        program = translation.program
        self.translation, self.parameters, self.memory = translation, parameters, memory
        self.program_threads, count = program.threads, len(programs)
        self.threads = program.threads * count
        self.shared = SharedMemory(count, shared_bytes, program.threads, program.shared_cell)
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), count)
        self.lane = thread % np.uint32(32)
        self.own_keys = key_of(self.shared.program + before, 0, self.shared.warp)
        number, (x, y, _) = np.asarray(programs, dtype=np.int64)[self.shared.program], grid
        places = {"ctaid.x": number % x, "ctaid.y": number // x % y, "ctaid.z": number // (x * y)}
        self.special = {name: place.astype(np.uint32) for name, place in places.items()} | {"tid.x": thread}
        self.local = np.zeros((self.threads, program.local_bytes), dtype=np.uint8)
        zeros = {kind: np.zeros(self.threads, kind.replace("u", "uint")) for kind in set(STORAGE.values())}
        self.registers = [zeros[STORAGE[kind]] for kind in program.registers.values()]

    def run(self):
        """From block to block: all threads at once, or those that are furthest behind."""
        rank = self.translation.program.rank
        block, places = 0, None  # one for all threads, or one for each
        with np.errstate(all="ignore"):
            while block != END:
                if places is None:
                    found = self.translation.function(block, False)(self.registers, self)
                    here = slice(None)
                else:
                    here = places == block
                    found = self.translation.function(block, True)(self.registers, self, here)
                predicate, target = found if isinstance(found, tuple) else (np.bool_(True), found)
                target = block + 1 if target is None else target
                if places is None and predicate.all():
                    block = target
                elif places is None and not predicate.any():
                    block += 1
                else:
                    places = np.full(self.threads, block) if places is None else places
                    places[here] = np.where(predicate, target, block + 1)[here] if predicate.shape else target
                    there = np.unique(places)
                    block = int(min(there, key=lambda one: rank[one] if one != END else END))
                    places = None if there.size == 1 else places

    def full(self, value):
        """One number for each thread."""
        return value if value.shape else np.full(self.threads, value)

    def parameter(self, place, kind):
        return np.full(self.threads, np.asarray(self.parameters[place]).astype(kind))

    def programs_of(self, active):
        """Programs at a place where all of their threads have to be."""
        if active is None:
            return np.arange(self.threads // self.program_threads)
        of_each = active.reshape(-1, self.program_threads)
        if (of_each.any(1) != of_each.all(1)).any():
            raise RuntimeError("a part of a program at a barrier")
        return np.flatnonzero(of_each[:, 0])

    # Memory

    def who(self):
        """A key for each thread: of its program, its warp, and how many barriers it has passed."""
        return self.own_keys + (self.shared.epoch[self.shared.program] << WARP_BITS)

    def load_global(self, addresses, size, active, text, width):
        return self.memory.load(addresses, size, active, text, width, self.who)

    def store_global(self, addresses, size, active, text, width, values):
        self.memory.store(addresses, size, active, text, width, values, self.who)

    def load_shared(self, addresses, size, active, text, width):
        return self.shared.load(addresses, size, active, text, width)

    def store_shared(self, addresses, size, active, text, width, values):
        self.shared.store(addresses, size, active, text, width, values)

    def load_local(self, addresses, size, active, text, width):
        rows = np.arange(self.threads)[:, None]
        found = self.local[rows, addresses.astype(np.int64)[:, None] + np.arange(size)]
        return np.ascontiguousarray(found).view(f"u{width}")

    def store_local(self, addresses, size, active, text, width, values):
        threads = np.arange(self.threads) if active is None else np.flatnonzero(active)
        index = addresses.astype(np.int64)[threads, None] + np.arange(size)
        self.local[threads[:, None], index] = (
            np.ascontiguousarray(values[threads]).view(np.uint8).reshape(len(threads), -1)
        )

    def add_global(self, addresses, active, text, kind, values):
        return self._add(*self.memory.add(addresses, active, text, kind, len(values), self.who), active, values)

    def add_shared(self, addresses, active, text, kind, values):
        width = np.dtype(kind).itemsize
        places, threads = self.shared.locate(addresses, width, active, text)
        self.shared.note_atomic(places, width, threads, text)
        index = np.zeros(self.threads, dtype=np.int64)
        index[threads] = places // width
        return self._add(self.shared.views[width].view(kind), index, active, values)

    def _add(self, memory, index, active, values):
        """Adds to memory, one thread after the other, and gives what each found there."""
        found = [np.zeros(self.threads, dtype=memory.dtype) for _ in values]
        threads = np.arange(self.threads) if active is None else np.flatnonzero(active)
        if np.unique(index[threads]).size == threads.size:  # no two in one place
            for part, value in enumerate(values):
                place = index[threads] + part
                found[part][threads] = memory[place]
                memory[place] += value[threads]
            return found
        for thread in threads:
            for part, value in enumerate(values):
                found[part][thread] = memory[index[thread] + part]
                memory[index[thread] + part] += value[thread]
        return found

    # Copies, products, barriers

    def copy(self, target, source, size, given, active, text):
        """`cp.async`: `size` bytes to shared memory, zeros in the threads that are given none."""
        given = self.full(given)
        active = np.ones(self.threads, dtype=bool) if active is None else active
        if not np.isin(given[active], (0, size)).all():
            raise NotImplementedError(f"{text} of a part")
        reading = active & (given == size)
        values = self.memory.load(source, size, reading, text, 1, self.who)
        values[~reading] = 0
        self.shared.copy_later(target, size, active, text, values)

    def commit_copies(self, active):
        self.shared.copy_groups[self.programs_of(active)] += 1

    def wait_for_copies(self, active, newest):
        self.shared.wait_for_copies(self.programs_of(active), newest)

    def commit_products(self, active):
        self.shared.product_groups[self.programs_of(active)] += 1

    def wait_for_products(self, active, newest):
        self.shared.wait_for_products(self.programs_of(active), newest)

    def barrier(self, active):
        self.shared.barrier(self.programs_of(active))

    def fence(self, active):
        self.shared.fences[self.programs_of(active)] += 1

    # A warp together

    def together(self, active, threads, text):
        """Asks for all threads of each warp, or group of four, of which some are there."""
        of_each = active.reshape(-1, threads)
        if (of_each.any(1) != of_each.all(1)).any():
            raise RuntimeError(f"{text}: a part of {threads} threads")

    def shuffle(self, mode, value, offset, clamp):
        """`shfl`: the number of another lane, or one's own where that is outside of the segment."""
        segment, limit, offset = clamp >> np.uint32(8), clamp & np.uint32(31), offset & np.uint32(31)
        first = self.lane & segment
        last = first | (limit & ~segment)
        if mode == "bfly":
            source = self.lane ^ offset
        elif mode == "up":
            source = self.lane.astype(np.int64) - offset
        else:  # idx
            source = first | (offset & ~segment)
        inside = source >= last if mode == "up" else source <= last
        return value[np.arange(self.threads) - self.lane + np.where(inside, source, self.lane)]

    def reduce(self, operation, value):
        function = {"add": np.add, "max": np.maximum}[operation]
        return np.repeat(function.reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)

    # Matrices

    def multiply(self, *arguments):
        return ptx_matrix.multiply(*arguments)

    def load_matrices(self, *arguments):
        return ptx_matrix.load_matrices(self.shared, *arguments)

    def store_matrices(self, *arguments):
        ptx_matrix.store_matrices(self.shared, *arguments)

    def multiply_group(self, *arguments):
        return ptx_matrix.multiply_group(self.shared, *arguments)
