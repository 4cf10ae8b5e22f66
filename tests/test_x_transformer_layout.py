"""Blocks of single branches, which can run more often than others, and several kinds of token types."""

import pytest
import torch
from generation_models import decisive, tokens
from transformers import DataCollatorWithFlattening, DynamicCache
from x_transformer_models import SIZES, VOCABULARY

from hf_efficient import (
    XTransformerConfig,
    XTransformerForCausalLM,
    XTransformerForConditionalGeneration,
    XTransformerForMaskedLM,
    XTransformerModel,
)


def make(model_class, **options):
    torch.manual_seed(0)
    return model_class(XTransformerConfig(**{**SIZES, **options})).eval()


@torch.no_grad()
def test_branches_that_run_twice_are_cached():
    """Blocks of single branches: each step has a cache layer of its own, that of a feed-forward stays empty."""
    order = {"sublayer_order": "a|f|af", "layer_execution_order": [0, 1, 1, 2, 0], "num_hidden_layers": 5}
    model = decisive(make(XTransformerForCausalLM, **order, value_residual="learned", sliding_window=4))
    assert len(model.model.layers) == 3 and model.config.execution_order == [0, 1, 1, 2, 0]
    ids, cache = tokens(2, 9), DynamicCache(config=model.config)
    expected = model(ids, use_cache=False).logits
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split((4, 1, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    for options in ({}, {"num_beams": 3}):
        given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
        assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))
    # The second run of the feed-forward does something.
    once = decisive(make(XTransformerForCausalLM, **{**order, "layer_execution_order": [0, 1, 2, 0],
                                                     "num_hidden_layers": 4}, value_residual="learned",
                         sliding_window=4))  # fmt: skip
    once.load_state_dict(model.state_dict())
    assert (once(ids).logits - expected).abs().max() > 1e-2


def test_an_encoder_needs_blocks_that_stay_blocks_without_cross_attention():
    options = {**SIZES, "is_encoder_decoder": True, "sublayer_order": "a|c|f", "num_hidden_layers": 3}
    with pytest.raises(ValueError, match="no blocks without cross-attention: the encoder's sublayer_order"):
        XTransformerForConditionalGeneration(XTransformerConfig(**options))
    options |= {"encoder_overrides": {"sublayer_order": None, "num_hidden_layers": 1}}
    model = XTransformerForConditionalGeneration(XTransformerConfig(**options))
    assert model(tokens(2, 5), decoder_input_ids=tokens(2, 3)).logits.shape == (2, 3, VOCABULARY)


@torch.no_grad()
def test_several_kinds_of_token_types():
    model = make(XTransformerModel, type_vocab_size=[3, 2])
    ids, types = tokens(2, 5), torch.stack([tokens(2, 5) % 3, tokens(2, 5) % 2], dim=-1)
    tables = model.embeddings.token_types
    embeds = model.embed_tokens(ids) + tables[0](types[..., 0]) + tables[1](types[..., 1])
    less = embeds - tables[0].weight[0] - tables[1].weight[0]  # zeros are taken where none are given
    states = model(ids, token_type_ids=types).last_hidden_state
    torch.testing.assert_close(states, model(inputs_embeds=less).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert (states - model(ids).last_hidden_state).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"token_type_ids must have shape \(2, 5, 2\), got \(2, 5\)"):
        model(ids, token_type_ids=types[..., 0])


@pytest.mark.parametrize(
    "options", [{}, {"num_memory_tokens": 2, "shift_tokens": 1}, {"absolute_positions": "learned"}]
)
def test_packed_sequences_are_the_sequences(options):
    """Logits, loss and gradients, as DataCollatorWithFlattening packs them; nothing crosses a border."""
    model = make(XTransformerForCausalLM, **options).train()
    parts = [tokens(1, length) for length in (5, 9, 1, 4)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": part[0].tolist()} for part in parts])
    packed = model(**batch)
    separate = [model(part).logits for part in parts]
    torch.testing.assert_close(packed.logits, torch.cat(separate, dim=1), rtol=1e-4, atol=1e-4)
    logits = torch.cat([found[0, :-1] for found in separate])
    expected = torch.nn.functional.cross_entropy(logits, torch.cat([part[0, 1:] for part in parts]))
    torch.testing.assert_close(packed.loss, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        *(torch.autograd.grad(loss, list(model.parameters())) for loss in (packed.loss, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    ids, borders = batch["input_ids"], batch["cu_seq_lens_q"]
    for more, message in (
        ({"attention_mask": torch.ones_like(ids)}, "parts a row of tokens alone"),
        ({"cu_seq_lens_q": borders[:-1]}, "must lead from 0 to the length 19"),
        ({"cu_seq_lens_q": borders.flip(0)}, "must be rising numbers"),
        ({"input_ids": ids.expand(2, -1)}, "must be one row where cu_seq_lens_q is given, got 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, "cu_seq_lens_q": borders, **more})


@torch.no_grad()
def test_packed_sequences_of_an_encoder():
    """Here the tokens before padding would see it."""
    model = make(XTransformerForMaskedLM, type_vocab_size=2)
    parts, borders = [tokens(1, length) for length in (5, 9, 1)], torch.tensor([0, 5, 14, 15])
    ids = torch.cat(parts, dim=1)
    packed = model(ids, token_type_ids=ids % 2, cu_seq_lens_q=borders).logits
    separate = [model(part, token_type_ids=part % 2).logits for part in parts]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-4, atol=1e-4)
