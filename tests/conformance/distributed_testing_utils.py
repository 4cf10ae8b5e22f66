"""Starts the ranks of transformers' distributed tests, on the CPU and over gloo.

Stands where `tests/distributed_testing_utils.py` stands in transformers' repository (fetch.py copies it into the
unpacked package); the names are those that the tensor-parallel and FSDP mixins import. Ranks are processes on the CPU
even where there is a GPU: the mixins are about sharding, and two ranks need no two devices that way.
"""

import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import time
import traceback

import numpy
import psutil
import torch
import torch.distributed as dist


# Longer than any of the tests takes with four ranks on two cores, short enough to notice a deadlock.
DEADLINE_SECONDS = 300

# What every rank imports: what the mixins need, and our models.
PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.tensor", "transformers.testing_utils", "hf_efficient"]

# How many steps the FSDP mixin trains where it compares FSDP with DDP; a checkpoint is in the middle. It wants 20.
FSDP_STEPS = 8

# A rank with more is replaced. torch remembers the meshes it has seen, and with them their process groups; each has a
# dozen threads that wake up again and again, also when nothing goes on.
MOST_THREADS = 32


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    # All ranks share the CPU; without this each would start a thread per core.
    torch.set_num_threads(1)


class _Ranks:
    """Processes that carry out one function after the other; rank 3 exists once a test has asked for four.

    A test's time is mostly what a new process computes for the first time: transformers' conversions of checkpoints,
    the rules by which torch shards each operation. Every function opens and closes a process group of its own. After
    one that failed, all ranks are replaced: the others may still wait for it. So they are when one is worn out.
    """

    def __init__(self):
        self.processes, self.connections = [], []

    def run(self, function, args, count: int) -> None:
        """Calls `function(rank, *args)` in `count` ranks; raises what the first failing one raised."""
        self._start(count)
        waiting = dict(zip(self.connections[:count], range(count), strict=True))
        for connection in waiting:
            connection.send((function, args))
        deadline = time.monotonic() + DEADLINE_SECONDS
        worn = False
        try:
            while waiting:
                ready = multiprocessing.connection.wait(waiting, timeout=max(deadline - time.monotonic(), 0))
                if not ready:
                    raise TimeoutError(f"{function.__name__}: {count} ranks did not finish in {DEADLINE_SECONDS} s")
                for connection in ready:
                    rank = waiting.pop(connection)
                    try:
                        error, threads = connection.recv()
                    except EOFError:
                        error, threads = "no answer: the process is gone", 0
                    if error:
                        raise RuntimeError(f"{function.__name__}: rank {rank} ended with\n{error}")
                    worn |= threads > MOST_THREADS
        except BaseException:
            self.stop()
            raise
        if worn:
            self.stop()

    def _start(self, count: int) -> None:
        # One server process imports torch and transformers once and forks the ranks: a spawned rank would import both
        # again, which takes longer than most of the tests; one forked from here would inherit our threads' locks.
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        for rank in range(len(self.processes), count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join()
            connection.close()
        self.processes, self.connections = [], []


ranks = _Ranks()


def _serve(rank: int, connection) -> None:
    from transformers_tests import test_fsdp_mixin

    test_fsdp_mixin.NUM_STEPS = FSDP_STEPS
    environment = dict(os.environ)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        error = None
        try:
            function(rank, *args)
        except BaseException:  # whatever it is, the test is to hear of it and not to wait for an answer
            error = traceback.format_exc()
        gc.collect()  # frees what the function left of its process groups
        connection.send((error, psutil.Process().num_threads()))


def _start_rank_processes(function, args=(), nprocs=1) -> None:
    """Calls `function(rank, *args)` in `nprocs` processes; raises what the first failing one raised."""
    ranks.run(function, args, nprocs)


def run_distributed(world_size: int):
    """`run_distributed(n)(function)(*args)` calls `function(rank, *args)` in `n` ranks of one process group."""

    def decorate(function):
        @functools.wraps(function)
        def start(*args, **kwargs):
            # The store lives here, on a port that the system chose, so that two test workers cannot meet on one port.
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(
                _run_rank, args=(function, args, kwargs, world_size, store.host, store.port), nprocs=world_size
            )

        return start

    return decorate


def _run_rank(rank, function, args, kwargs, world_size, host, port) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    _set_rank_device(rank)
    store = dist.TCPStore(host, port, world_size=None, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()
