"""The memory that all programs of a launch share: the storages of the tensors that a kernel was given.

What lies outside of them, or is not aligned, is an error, and so are programs and warps that meet in what is written
(`ptx_meetings.py`).
"""

import ctypes

import numpy as np
import torch
from ptx_meetings import Meetings
from ptx_shared_memory import MemoryFault


GUARD = 4096  # bytes between two copies
ALIGNMENT = 256
IN_PLACE = 1 << 30  # bytes from which on a storage is not copied


class GlobalMemory:
    """Copies of storages with room between them; `write_back` gives the storages what the kernel has written.

    What is too large to copy is used where it is: of a storage that nobody has written, only what a kernel touches
    takes memory. There nobody looks for races. `written`: tensors that the kernel may write, in pieces of `cell` bytes
    or more. Addresses are those of this process less `origin`; offsets count from the start of the copies.

    Methods take addresses of all threads, `active` ones among them or `None`, and a function `who` that gives each
    thread's key for `Meetings`.
    """

    def __init__(self, tensors, written=(), cell=1):
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        large = [(pointer, one.nbytes()) for pointer, one in storages.items() if one.nbytes() >= IN_PLACE]
        offsets, end = {}, GUARD
        for pointer, storage in storages.items():
            if storage.nbytes() < IN_PLACE:
                # Triton's kernels depend on what a pointer is divisible by.
                offsets[pointer] = -(-end // ALIGNMENT) * ALIGNMENT + pointer % ALIGNMENT
                end = offsets[pointer] + storage.nbytes() + GUARD
        size = -(-end // ALIGNMENT) * ALIGNMENT
        self.buffer = np.full(size + ALIGNMENT, 0xFF, dtype=np.uint8)
        start = -(-self.buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
        copies = self.buffer[start - self.buffer.ctypes.data :][:size]
        self.mapped, self.may_be_written = (np.zeros(size, dtype=bool) for _ in range(2))
        self.meetings = Meetings(size, cell)
        watched = {tensor.untyped_storage().data_ptr() for tensor in written}
        self.origin = min([start, *(pointer for pointer, _ in large)]) // ALIGNMENT * ALIGNMENT
        last = max([start + size, *(pointer + length for pointer, length in large)])
        self.span = -(-(last - self.origin) // ALIGNMENT) * ALIGNMENT
        self.start = start - self.origin
        self.large = [(pointer - self.origin, length) for pointer, length in large]
        self.addresses = {pointer: pointer - self.origin for pointer, _ in large}
        self.copied = []
        for pointer, offset in offsets.items():
            copy = copies[offset : offset + storages[pointer].nbytes()]
            copy[:] = _numbers(storages[pointer])
            self.mapped[offset : offset + copy.size] = True
            self.may_be_written[offset : offset + copy.size] = pointer in watched
            self.addresses[pointer] = self.start + offset
            self.copied.append((copy, storages[pointer]))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.span).from_address(self.origin))
        self.views = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}

    def address(self, tensor) -> int:
        pointer = tensor.untyped_storage().data_ptr()
        return self.addresses[pointer] + tensor.data_ptr() - pointer

    def load(self, addresses, size, active, text, width, who):
        """`[threads, size / width]` numbers of `width` bytes. Idle threads get some."""
        addresses = self._checked(addresses, size, active, text)
        offsets, threads = self._in_copies(addresses, active)
        watched = self.may_be_written[offsets]
        if watched.any():
            self._refuse(self.meetings.read(offsets[watched], size, who()[threads[watched]]), text)
        return self.views[width][(addresses // width)[:, None] + np.arange(size // width)]

    def store(self, addresses, size, active, text, width, values, who):
        """`values` `[threads, size / width]`, of which threads may write the same to one place."""
        addresses = self._checked(addresses, size, active, text)
        memory, indices = self.views[width], (addresses // width)[:, None] + np.arange(size // width)
        offsets, threads = self._in_copies(addresses, active)
        if offsets.size:
            self._expect_to_be_written(offsets, text)
            new = memory[indices[threads]] != values[threads]
            self._refuse(self.meetings.write(offsets, size, who()[threads], new), text)
        if active is not None:
            indices, values = indices[active], values[active]
        memory[indices] = values
        if (memory[indices] != values).any():
            raise MemoryFault(f"race: {text} writes different numbers to one place")

    def add(self, addresses, active, text, kind, count, who):
        """Memory as numbers of `kind`, and the index there of the first of `count` that each thread will add to."""
        width = np.dtype(kind).itemsize
        addresses = self._checked(addresses, width * count, active, text)
        offsets, threads = self._in_copies(addresses, active)
        if offsets.size:
            self._expect_to_be_written(offsets, text)
            self._refuse(self.meetings.add(offsets, width * count, who()[threads]), text)
        return self.views[width].view(kind), addresses // width

    def write_back(self):
        for copy, storage in self.copied:
            _numbers(storage)[:] = copy

    def _in_copies(self, addresses, active):
        """Offsets of the active threads that are among the copies, and which threads those are."""
        offsets = addresses - self.start
        inside = (offsets >= 0) & (offsets < self.mapped.size)
        threads = np.flatnonzero(inside if active is None else inside & active)
        return offsets[threads], threads

    def _expect_to_be_written(self, offsets, text):
        assert self.may_be_written[offsets].all(), f"{text}: none of the parameters that lead to writes lead there"

    def _refuse(self, problem, text):
        if problem:
            raise MemoryFault(f"race: {text} {problem}")

    def _checked(self, addresses, size, active, text):
        """The addresses, where idle threads have one that is nobody's but can be read."""
        addresses = addresses.astype(np.int64)
        if active is not None:
            addresses = np.where(active, addresses, self.start + GUARD // 2 // size * size)
        wrong = (addresses % size != 0) | (addresses < 0) | (addresses + size > self.span)
        if not wrong.any():
            offsets = addresses - self.start
            if self.large:
                offsets = np.where((offsets >= 0) & (offsets + size <= self.mapped.size), offsets, 0)
            known = self.mapped[offsets] & self.mapped[offsets + size - 1]
            for start, length in self.large:
                known |= (addresses >= start) & (addresses + size <= start + length)
            wrong = ~known
            if active is not None:
                wrong &= active
        if wrong.any():
            thread = int(np.flatnonzero(wrong)[0])
            raise MemoryFault(
                f"thread {thread}: {text} at {addresses[thread]:#x} is outside of every tensor or not aligned"
            )
        return addresses


def _numbers(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
