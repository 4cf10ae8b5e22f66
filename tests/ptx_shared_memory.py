"""The memory that each program has for itself, and what a GPU would not forgive.

What one warp writes to shared memory and another reads or writes with no barrier between is an error, as for NVIDIA's
`compute-sanitizer`. What is copied beside a program (`cp.async`) arrives when the program waits for it, not before.
"""

import numpy as np


class MemoryFault(RuntimeError):
    """An access that a GPU would not forgive."""


def _bytes(values):
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


class SharedMemory:
    """Shared memory of `programs` programs, each of `size` bytes, used by `threads` threads in warps of 32."""

    ALL = -1  # in place of a warp
    ATOMIC = np.uint32(0)  # in place of the warps that have written a cell, a bit for each

    def __init__(self, programs: int, size: int, threads: int, cell: int):
        self.cell = cell  # bytes for which accesses are remembered together: the fewest that one has, but 2 at least
        # What one program has begins at a multiple of the largest pattern in which matrix operands are swizzled.
        self.limit, self.size = size, -(-max(size, 1) // 1024) * 1024
        self.bytes = np.full(programs * self.size, 0xFF, dtype=np.uint8)
        self.views = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}
        cells = self.bytes.size // self.cell
        self.base = np.repeat(np.arange(programs, dtype=np.int64) * self.size, threads)
        self.program = np.repeat(np.arange(programs), threads)
        self.warp = np.tile(np.arange(threads) // 32, programs)
        self.epoch = np.zeros(programs, dtype=np.int64)  # how many barriers a program has passed
        self.fences = np.zeros(programs, dtype=np.int64)
        self.written = np.full(cells, -1, dtype=np.int64)  # the epoch of the last write of each cell
        self.writers = np.zeros(cells, dtype=np.uint32)
        self.written_fence = np.full(cells, -1, dtype=np.int64)
        self.read = np.full(cells, -1, dtype=np.int64)
        self.reader = np.zeros(cells, dtype=np.int16)
        self.in_use = np.zeros(cells, dtype=np.int16)  # by matrix products that have not ended
        self.copies, self.products = [], []
        self.copy_groups = np.zeros(programs, dtype=np.int64)
        self.product_groups = np.zeros(programs, dtype=np.int64)

    def locate(self, addresses, size, active, text):
        """Places among the bytes of all programs, of active threads alone, and which threads those are."""
        addresses = addresses.astype(np.int64)
        threads = np.arange(addresses.size) if active is None else np.flatnonzero(active)
        addresses = addresses[threads]
        if ((addresses % size != 0) | (addresses < 0) | (addresses + size > self.limit)).any():
            raise MemoryFault(f"{text}: outside of shared memory or not aligned")
        return addresses + self.base[threads], threads

    def note_read(self, places, size, threads, text):
        cells, threads = self._cells(places, size, threads)
        epoch, warp = self.epoch[self.program[threads]], self.warp[threads]
        if ((self.written[cells] == epoch) & (self.writers[cells] & self._bits(warp) == 0)).any():
            raise MemoryFault(f"race: {text} reads what another warp wrote with no barrier between")
        several = (self.read[cells] == epoch) & (self.reader[cells] != warp)
        self.read[cells], self.reader[cells] = epoch, warp
        # Of warps that read one cell together, numpy keeps the last.
        self.reader[cells[several | (self.reader[cells] != warp)]] = self.ALL

    def write(self, places, size, threads, text, values, copied=False):
        """`values` `[threads, size]` bytes to `places`. Warps may write the same number to one place."""
        cells, owners = self._cells(places, size, threads)
        program = self.program[owners]
        epoch, warp = self.epoch[program], self.warp[owners]
        if ((self.read[cells] == epoch) & (self.reader[cells] != warp)).any():
            raise MemoryFault(f"race: {text} writes what another warp reads with no barrier between")
        if self.products and self.in_use[cells].any():
            raise MemoryFault(f"race: {text} writes what a matrix product still reads")
        bits = self._bits(warp)
        before = np.where(self.written[cells] == epoch, self.writers[cells], np.uint32(0))
        others = (self.written[cells] == epoch) & (before != bits)
        self.written[cells], self.writers[cells] = epoch, before | bits
        if (self.writers[cells] & bits == 0).any():  # of warps that write a cell together, numpy keeps the last
            np.bitwise_or.at(self.writers, cells, bits)
        self.written_fence[cells] = -1 if copied else self.fences[program]
        unit = min(size, 8)
        memory, index = self.views[unit], (places // unit)[:, None] + np.arange(size // unit)
        values = values.view(f"u{unit}")
        known = size >= self.cell  # of less than a cell, nobody knows which part of it was written
        shared = others.reshape(len(places), -1).any(1)
        if known and (memory[index][shared] != values[shared]).any():
            raise MemoryFault(f"race: {text} writes what another warp wrote with no barrier between")
        memory[index] = values
        kept = memory[index]
        lost = (kept != values).any(1)
        if known and lost.any():
            # Threads that hold the same sum may have added it in another order: `fma` of their own part to another's.
            kind, tolerance = (np.float32, 1e-5) if size >= 4 else (np.float16, 1e-3)
            kept, given = kept[lost].view(kind), values[lost].view(kind)
            largest = np.max(np.abs(given), where=np.isfinite(given), initial=0)
            # What would be so small as a float is an integer.
            floats = ((kept == given) | (np.abs(given) > 1e-30) | ~np.isfinite(given) | (given == 0)).all() or size < 4
            if not floats or not np.allclose(kept, given, rtol=0, atol=tolerance * largest, equal_nan=True):
                raise MemoryFault(f"race: {text} writes different numbers to one place")

    def note_atomic(self, places, size, threads, text):
        """Atomic operations may meet each other, and nothing else."""
        cells, threads = self._cells(places, size, threads)
        epoch = self.epoch[self.program[threads]]
        if ((self.written[cells] == epoch) & (self.writers[cells] != self.ATOMIC)).any():
            raise MemoryFault(f"race: {text} meets what was written with no barrier between")
        if (self.read[cells] == epoch).any():
            raise MemoryFault(f"race: {text} meets what was read with no barrier between")
        self.written[cells], self.writers[cells] = epoch, self.ATOMIC

    def _bits(self, warp):
        return np.uint32(1) << warp.astype(np.uint32)

    def _cells(self, places, size, threads):
        count = max(size // self.cell, 1)
        cells = (places // self.cell)[:, None] + np.arange(count)
        return cells.ravel(), np.repeat(threads, count)

    def load(self, addresses, size, active, text, width):
        """`[threads, size / width]` numbers of `width` bytes."""
        places, threads = self.locate(addresses, size, active, text)
        self.note_read(places, size, threads, text)
        found = np.zeros((addresses.size, size // width), dtype=f"u{width}")
        found[threads] = self.views[width][(places // width)[:, None] + np.arange(size // width)]
        return found

    def store(self, addresses, size, active, text, width, values):
        places, threads = self.locate(addresses, size, active, text)
        self.write(places, size, threads, text, _bytes(values[threads]))

    def barrier(self, programs):
        self.epoch[programs] += 1

    def copy_later(self, addresses, size, active, text, values):
        """`cp.async`: until it has been waited for, not-a-number stands there."""
        places, threads = self.locate(addresses, size, active, text)
        self.write(places, size, threads, text, np.full((len(threads), size), 0xFF, dtype=np.uint8))
        program = self.program[threads]
        self.copies.append((places, size, threads, values[threads], self.copy_groups[program], text))

    def wait_for_copies(self, programs, newest):
        """All but the `newest` groups have arrived."""
        waiting = np.zeros(self.epoch.size, dtype=bool)
        waiting[programs] = True
        kept = []
        for places, size, threads, values, groups, text in self.copies:
            program = self.program[threads]
            ready = waiting[program] & (groups < self.copy_groups[program] - newest)
            if ready.any():
                self.write(places[ready], size, threads[ready], text, values[ready], copied=True)
            if not ready.all():
                rest = ~ready
                kept.append((places[rest], size, threads[rest], values[rest], groups[rest], text))
        self.copies = kept

    def use(self, cells, program, text):
        """A matrix product of a program begins to read these of its cells."""
        cells = cells + program * (self.size // self.cell)
        if (self.written_fence[cells] == self.fences[program]).any():
            raise MemoryFault(f"{text} reads what was written with no fence.proxy.async between")
        if (self.written[cells] == self.epoch[program]).any():
            raise MemoryFault(f"{text} reads what was written with no barrier between")
        self.in_use[cells] += 1
        self.products.append((program, self.product_groups[program], cells))

    def wait_for_products(self, programs, newest):
        waiting = set(programs.tolist())
        kept = []
        for program, group, cells in self.products:
            if int(program) in waiting and group < self.product_groups[program] - newest:
                self.in_use[cells] -= 1
                # A warp knows that its part has been read, and of the others only after a barrier.
                self.read[cells], self.reader[cells] = self.epoch[program], self.ALL
            else:
                kept.append((program, group, cells))
        self.products = kept
