"""The examples with text from x-transformers' README, at their sizes: the original and what it becomes.

Both compute the same, to 2e-5 of the largest logit in float32; then ours takes a training step. The deep stacks and
those with memory read the 1,024 tokens of the README; of options that do to each token the same, 256 tell as much.
"""

import pytest
import torch

from hf_efficient import XTransformerForCausalLM, XTransformerForConditionalGeneration, XTransformerForMaskedLM
from hf_efficient.conversion.x_transformers import convert_x_transformers


x_transformers = pytest.importorskip("x_transformers")
pytestmark = pytest.mark.slow

SIZES = {"num_tokens": 20000, "max_seq_len": 1024}
STACK = {"dim": 512, "depth": 6, "heads": 8}
DEEP = {**STACK, "depth": 12}
WHOLE_LENGTH = ("GPT-like", "BERT-like", "memory tokens")
# name -> class of the stack, arguments of the wrapper, of the stack, and fields that the result has to have.
EXAMPLES = {
    "GPT-like": ("Decoder", {}, DEEP, {"is_decoder": True}),
    "BERT-like": ("Encoder", {}, DEEP, {"is_decoder": False}),
    "dropouts": (
        "Decoder",
        {"emb_dropout": 0.1},
        {**STACK, "layer_dropout": 0.1, "attn_dropout": 0.1, "ff_dropout": 0.1},
        {"embedding_dropout": 0.1, "layerdrop": 0.1, "attention_dropout": 0.1, "feed_forward_dropout": 0.1},
    ),
    "flash attention": ("Decoder", {}, {**STACK, "attn_flash": True}, {}),
    "persistent memory": ("Encoder", {}, {**STACK, "attn_num_mem_kv": 16}, {"num_memory_key_values": 16}),
    "memory tokens": ("Encoder", {"num_memory_tokens": 20}, STACK, {"num_memory_tokens": 20}),
    "ScaleNorm": ("Decoder", {}, {**STACK, "use_scalenorm": True}, {"norm_type": "scale_norm"}),
    "l2-normalised embeddings": ("Decoder", {"l2norm_embed": True}, STACK, {"l2_normalize_embeddings": True}),
}


def close(actual, expected):
    # Not assert_close, which takes a third of the time of a model for 20 million logits.
    assert (actual - expected).abs().max().item() <= 2e-5 * max(1.0, expected.abs().max().item())


def take_step(model, **inputs):
    """A forward and backward pass in training mode, which reaches every parameter (but dropped branches')."""
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_stack(name):
    kind, wrapper, layers, fields = EXAMPLES[name]
    torch.manual_seed(0)
    stack = getattr(x_transformers, kind)(**layers, verbose=False)
    original = x_transformers.TransformerWrapper(**SIZES, **wrapper, attn_layers=stack).eval()
    model, _ = convert_x_transformers(original, {**SIZES, **wrapper, "attn_layers": {"class": kind, **layers}})
    assert type(model) is (XTransformerForCausalLM if kind == "Decoder" else XTransformerForMaskedLM)
    assert {field: getattr(model.config, field) for field in fields} == fields
    length = 1024 if name in WHOLE_LENGTH else 256
    tokens = torch.randint(0, 20000, (1, length))
    with torch.no_grad():
        mask = {} if kind == "Decoder" else {"mask": torch.ones_like(tokens).bool()}
        logits = model(tokens).logits
        assert logits.shape == (1, length, 20000)
        close(logits, original(tokens, **mask))
    take_step(model, input_ids=tokens[:, :64], labels=tokens[:, :64])


def test_encoder_decoder():
    torch.manual_seed(0)
    parts = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in
             {"num_tokens": 256, "depth": 6, "heads": 8, "max_seq_len": 1024, "verbose": False}.items()}  # fmt: skip
    arguments = {"dim": 512, **parts, "tie_token_emb": True}
    original = x_transformers.XTransformer(**arguments).eval()
    model, _ = convert_x_transformers(original, arguments)
    assert type(model) is XTransformerForConditionalGeneration and model.config.share_embeddings
    source, target = torch.randint(0, 256, (1, 1024)), torch.randint(0, 256, (1, 1024))
    inputs = {"input_ids": source, "decoder_input_ids": target[:, :-1], "labels": target[:, 1:], "use_cache": False}
    with torch.no_grad():
        expected = original(source, target, mask=torch.ones_like(source).bool())
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-5, atol=1e-5)
    take_step(model, input_ids=source[:, :64], labels=target[:, :64], decoder_input_ids=target[:, :64])
