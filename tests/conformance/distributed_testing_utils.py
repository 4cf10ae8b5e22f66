"""Starts the ranks of transformers' distributed tests, on the CPU and over gloo.

Stands where `tests/distributed_testing_utils.py` stands in transformers' repository (fetch.py copies it into the
unpacked package); the names are those that the tensor-parallel and FSDP mixins import. Ranks are processes on the CPU
even where there is a GPU: the mixins are about sharding, and two ranks need no two devices that way.
"""

import functools
import multiprocessing
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing


# Longer than any of the tests takes with four ranks on two cores, short enough to notice a deadlock.
DEADLINE_SECONDS = 300

# What every rank imports: what the mixins need, and our models.
PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.tensor", "transformers.testing_utils", "hf_efficient"]


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    # All ranks share the CPU; without this each would start a thread per core.
    torch.set_num_threads(1)


def _start_rank_processes(function, args=(), nprocs=1) -> None:
    """Calls `function(rank, *args)` in `nprocs` processes; raises what the first failing one raised."""
    # One server process imports torch and transformers once and forks the ranks: a spawned rank would import both
    # again, which takes longer than most of the tests, and a rank forked from here would inherit our threads' locks.
    multiprocessing.set_forkserver_preload(PRELOADED)
    ranks = torch.multiprocessing.start_processes(
        function, args=args, nprocs=nprocs, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not ranks.join(timeout=5):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__}: {nprocs} ranks did not finish in {DEADLINE_SECONDS} s")


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
