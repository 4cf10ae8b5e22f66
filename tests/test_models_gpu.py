"""Every head on a GPU, where the kernels run compiled: the processor's outputs and gradients, bfloat16, generation."""

import pytest
import torch
from tiny_heads import HEADS


pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GENERATING = [name for name, head in HEADS.items() if head.generates]


def make(head, device=DEVICE):
    torch.manual_seed(0)
    return HEADS[head].model_class(HEADS[head].config()).eval().to(device)


def inputs_of(head, device, labels=False):
    inputs = HEADS[head].inputs() | (HEADS[head].labels() if labels else {})
    return {name: value.to(device) for name, value in inputs.items()}


def outputs_and_gradients(head, device):
    """The first output, and every parameter's gradient of its mean square, on the processor."""
    model = make(head, device)
    output = model(**inputs_of(head, device))[0]
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().cpu() for name, tensor in ({"output": output} | gradients).items()}


@pytest.mark.parametrize("head", HEADS)
def test_a_gpu_computes_what_the_processor_does(head):
    expected, found = (outputs_and_gradients(head, device) for device in ("cpu", DEVICE))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert torch.allclose(found[name], tensor, rtol=2e-3, atol=2e-3 * scale + 1e-7), name


@pytest.mark.parametrize("head", [name for name, head in HEADS.items() if head.learns])
def test_bfloat16_learns(head):
    model = make(head).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**inputs_of(head, DEVICE, labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("head", GENERATING)
def test_a_cache_changes_no_token(head):
    model, inputs = make(head), inputs_of(head, DEVICE)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, uncached = (model.generate(**inputs, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    expected = make(head, "cpu").generate(**{name: value.cpu() for name, value in inputs.items()}, **options)
    assert torch.equal(cached.cpu(), expected)
