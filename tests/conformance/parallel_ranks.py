"""What each rank of `test_colt5.py`'s parallel test does. A file of its own: the ranks import no more than this."""

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers_tests.test_tensor_parallel_mixin import _test_tp_backward_impl


def check_rank(rank: int, path: str, model_class: type, tolerance: float) -> None:
    """Two ranks compute what one does: transformers' own check of a step in tensor parallelism, then FSDP's.

    Args:
        path: a checkpoint of `model_class`, an encoder–decoder.
        tolerance: of losses and gradients, absolute and relative.
    """
    _test_tp_backward_impl(rank, path, model_class, tolerance, tolerance)
    _check_fsdp(path, model_class, tolerance)


def _check_fsdp(path, model_class, tolerance):
    """Blocks of both stacks are sharded as the plan says, and a step with them is the step without."""
    whole = model_class.from_pretrained(path).train()
    sharded = model_class.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2)).train()
    units = {name for name, module in sharded.named_modules() if type(module).__name__.startswith("FSDP")}
    blocks = {f"model.{stack}.layers.{index}" for stack in ("encoder", "decoder") for index in range(2)}
    assert blocks < units, units
    held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    assert held < 0.6 * whole.num_parameters(), held
    ids = torch.randint(3, whole.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for model in (whole, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, expected), parameter in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(parameter.full_tensor(), expected, rtol=tolerance, atol=tolerance, msg=name)
