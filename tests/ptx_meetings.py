"""Where programs, or the warps of one, meet in the memory of a launch, so that it matters who is first.

Programs run at the same time, or one after the other in any order. So none may read or overwrite what another one
writes in the same launch, and of a program no warp what another warp writes with no barrier between. Several may write
the same number, which then nobody reads, and atomic operations may meet each other. Nothing else puts programs in an
order here, as a lock or a count of those who are done would. What `cp.async` reads is noted when it is asked for.
"""

import numpy as np


WARP_BITS, MOMENT_BITS = 7, 32
SEVERAL_WARPS = 2**WARP_BITS - 1  # in place of a warp
SEVERAL_PROGRAMS = 2**63 - 1


def key_of(program, epoch, warp):
    """Who, and after how many barriers: one number, above zero. `program`: below 2³¹ - 2."""
    return (program + 1 << MOMENT_BITS) | (epoch << WARP_BITS) | warp + 1


def _clash(before, keys):
    """Whether neither a barrier nor the order within a warp stands between those noted before and these."""
    other_program = before >> MOMENT_BITS != keys >> MOMENT_BITS
    same_moment = before >> WARP_BITS == keys >> WARP_BITS
    return (before != 0) & (other_program | (same_moment & (before != keys)))


def _join(before, keys):
    """Those noted before and these as one key. Who came before a barrier of the same program is forgotten."""
    other_program = before >> MOMENT_BITS != keys >> MOMENT_BITS
    same_moment = before >> WARP_BITS == keys >> WARP_BITS
    joined = np.where(same_moment & (before != keys), keys | SEVERAL_WARPS, keys)
    return np.where((before != 0) & other_program, SEVERAL_PROGRAMS, joined)


def _note(noted, cells, keys):
    joined = _join(noted[cells], keys)
    noted[cells] = joined
    # Of several in one cell together, numpy keeps the last.
    while (lost := noted[cells] != joined).any():
        joined[lost] = _join(noted[cells[lost]], joined[lost])
        noted[cells[lost]] = joined[lost]


class Meetings:
    """Who has read, written and added to each cell of `cell` bytes since its program's last barrier.

    Each method notes that threads do so at `places`, with `size` bytes from there on, and says what is wrong with it.
    """

    def __init__(self, size: int, cell: int):
        self.cell = cell
        self.readers, self.writers, self.adders = (np.zeros(size // cell + 1, dtype=np.int64) for _ in range(3))

    def _cells(self, places, size, keys):
        count = max(size // self.cell, 1)
        return ((places // self.cell)[:, None] + np.arange(count)).ravel(), np.repeat(keys, count)

    def read(self, places, size, keys) -> str | None:
        cells, keys = self._cells(places, size, keys)
        wrong = (_clash(self.writers[cells], keys) | _clash(self.adders[cells], keys)).any()
        _note(self.readers, cells, keys)
        return "reads what another one writes" if wrong else None

    def write(self, places, size, keys, new) -> str | None:
        """`new` `[places, size / width]` says which numbers of `width` bytes are others than before."""
        cells, keys = self._cells(places, size, keys)
        new = np.repeat(new, cells.size // new.size, axis=1).ravel()
        over_written = (_clash(self.writers[cells], keys) & new) | _clash(self.adders[cells], keys)
        over_read = _clash(self.readers[cells], keys)
        _note(self.writers, cells, keys)
        if over_written.any() or over_read.any():
            return f"writes what another one {'writes' if over_written.any() else 'reads'}"
        return None

    def add(self, places, size, keys) -> str | None:
        """An atomic operation."""
        cells, keys = self._cells(places, size, keys)
        wrong = (_clash(self.writers[cells], keys) | _clash(self.readers[cells], keys)).any()
        _note(self.adders, cells, keys)
        return "adds to what another one reads or writes" if wrong else None
