"""PerceiverFlash trains: no leak, chunks under checkpointing and compilation, export, inputs that do not fit.

What `Trainer` does with it is in test_trainer_contract.py.
"""

import os

import pytest
import torch
from helpers import run_python
from perceiver_flash_models import FEATURES, IMAGES, SIZES, VOCABULARY

from hf_efficient import (
    PerceiverFlashConfig,
    PerceiverFlashForCausalLM,
    PerceiverFlashForImageClassification,
    PerceiverFlashForMaskedLM,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashIOModel,
    PerceiverFlashModel,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """The compiler counts what it has compiled of a function, and gives up at the ninth."""
    torch.compiler.reset()


def make(model_class, **options):
    torch.manual_seed(0)
    return model_class(PerceiverFlashConfig(**options))


def ids(rows=2, length=20):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


CHUNKED = {"cross_attention_chunk_size": 4}  # of 20 tokens
CHUNKED_IMAGES = {"cross_attention_chunk_size": 20}  # of 96 pixels


def chunked(case):
    return CHUNKED_IMAGES if case == "images" else CHUNKED


CASES = {
    "masked": (PerceiverFlashForMaskedLM, SIZES, lambda: {"input_ids": ids(), "labels": ids()}),
    "causal": (PerceiverFlashForCausalLM, SIZES, lambda: {"input_ids": ids(), "labels": ids(), "use_cache": False}),
    "sequences": (
        PerceiverFlashForSequenceClassification,
        SIZES,
        lambda: {"input_ids": ids(), "labels": torch.tensor([0, 1])},
    ),
    "images": (
        PerceiverFlashForImageClassification,
        {**IMAGES, "pooling": "query"},
        lambda: {"pixel_values": torch.ones(2, 2, 8, 12), "labels": torch.tensor([0, 1])},
    ),
}


@pytest.mark.parametrize("changed", range(20))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_no_leak_of_the_future(implementation, changed):
    """Another token changes no bit of a logit in front of it, and every one behind it that is a latent."""
    model = make(PerceiverFlashForCausalLM, **SIZES).eval()
    model.set_attn_implementation(implementation)
    first = ids(rows=1)
    second = first.clone()
    second[:, changed] = (second[:, changed] + 1) % 50 + 3
    before, after = (model(tokens).logits for tokens in (first, second))
    start = 20 - before.shape[1]
    differs = (before != after).any(dim=-1)[0]
    assert differs.tolist() == [start + i >= changed for i in range(before.shape[1])]


@torch.no_grad()
def test_a_batch_equals_its_rows():
    model = make(PerceiverFlashForCausalLM, **SIZES).double().eval()
    batch = model(ids(rows=4)).logits
    for row in range(4):
        torch.testing.assert_close(model(ids(rows=4)[row : row + 1]).logits, batch[row : row + 1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(case, reentrant):
    model_class, sizes, inputs = CASES[case]
    gradients = []
    for checkpointed in (False, True):
        model = make(model_class, **sizes, **chunked(case), attention_dropout=0.3, cross_attention_dropout=0.3).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**inputs()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("case", CASES)
def test_compiles_as_one_graph(case):
    """Result and gradients of a single graph, whose backward pass makes keys and values of each chunk anew."""
    model_class, sizes, inputs = CASES[case]
    model = make(model_class, **sizes, **chunked(case)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for each in (model, compiled):  # in this order: a classifier notes its kind of problem with the first labels
        model.zero_grad()
        output = each(**inputs())
        output.loss.backward()
        results.append([output.logits, *[parameter.grad for parameter in model.parameters()]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_chunks", [False, True])
@torch.no_grad()
def test_exports(case, in_chunks):
    model_class, sizes, inputs = CASES[case]
    options = chunked(case) if in_chunks else {}
    model = make(model_class, **sizes, **options).eval()
    inputs = {name: value for name, value in inputs().items() if name != "labels"}
    program = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_base_model_exports():
    model = make(PerceiverFlashModel, **FEATURES, cross_attention_chunk_size=4).eval()
    inputs = {"inputs": torch.randn(2, 11, 6), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    program = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).pooler_output, model(**inputs).pooler_output)


def test_queries_and_masks_export_and_compile():
    model = make(PerceiverFlashIOModel, **FEATURES).eval()
    inputs = {
        "inputs": torch.randn(2, 11, 6),
        "attention_mask": (torch.arange(11) < torch.tensor([[11], [5]])).long(),
        "queries": torch.randn(7, 10),
    }
    expected = model(**inputs).last_hidden_state
    program = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).last_hidden_state, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)


def test_items_in_a_batch_are_those_of_the_latents():
    """Trainer counts all labels that are not ignored, also in front of the latents; the mean is over those behind."""
    model = make(PerceiverFlashForCausalLM, **SIZES).eval()
    tokens = ids(rows=3)
    for labels in (tokens, tokens.masked_fill(torch.arange(20) < 15, -100), tokens.masked_fill(tokens > 30, -100)):
        count = (labels[:, 1:] != -100).sum()
        plain, counted = (model(tokens, labels=labels, **more).loss for more in ({}, {"num_items_in_batch": count}))
        torch.testing.assert_close(counted, plain)
    nothing = model(tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=torch.tensor(5)).loss
    assert nothing == 0


def test_loss_is_that_of_the_latents_in_their_window():
    """Of 20 tokens and 8 latents in steps of 4 the last 8 predict; padding and what precedes a window do not."""
    model = make(PerceiverFlashForCausalLM, **SIZES).double().eval()
    tokens = ids(rows=1)
    output = model(tokens, labels=tokens)
    assert output.logits.shape == (1, 8, VOCABULARY)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, -7:])
    torch.testing.assert_close(output.loss.float(), expected)
    # 17 tokens: the window begins at 12 and has 5 latents, whichever side is padded.
    short = model(tokens[:, :17], labels=tokens[:, :17])
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    shifted = torch.cat([tokens[:, :3], tokens[:, :17]], dim=1)
    padded = model(shifted, attention_mask=mask, labels=shifted.masked_fill(mask == 0, -100))
    torch.testing.assert_close(padded.loss, short.loss)


LONG = """
import json, resource, sys, torch
from hf_efficient import PerceiverFlashConfig, PerceiverFlashModel
torch.manual_seed(0)
config = PerceiverFlashConfig(
    modality="features", input_size=64, hidden_size=64, num_latents=64, num_self_attention_layers=1,
)
model = PerceiverFlashModel(config)
inputs = torch.randn(1, 1048576, 64, requires_grad=True)
model(inputs=torch.randn(1, 40000, 64)).last_hidden_state.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(inputs=inputs).last_hidden_state.sum().backward()
assert inputs.grad.abs().max() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="reads the peak of resident memory")
def test_a_million_inputs_train_within_two_gibibytes_above_the_input():
    """Forward and backward of 1,048,576 inputs of width 64; the input's own gradient is among the two gibibytes."""
    assert float(run_python("-c", LONG)) < 2.0


@torch.no_grad()
def test_a_context_of_65536_tokens():
    options = {**SIZES, "position_embedding_type": "rotary", "cross_attention_chunk_size": 8192}
    model = make(PerceiverFlashForCausalLM, **options).eval()
    assert model(ids(rows=1, length=65536), use_cache=False).logits.shape == (1, 8, VOCABULARY)
