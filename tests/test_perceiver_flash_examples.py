"""What users of flash-perceiver do, done with PerceiverFlash: a counterpart of each example of its README, and B1–B9.

Also what its users run into: masks that cost memory, and weights that nothing reads.
"""

import pytest
import torch
from helpers import ROOT, run_warm_python

from hf_efficient import (
    PerceiverFlashConfig,
    PerceiverFlashForImageClassification,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashIOModel,
    PerceiverFlashModel,
)


def make(model_class, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_latents": 8, "num_attention_heads": 2, "num_cross_attention_heads": 1,
             "num_query_attention_heads": 1, "num_self_attention_layers": 1}  # fmt: skip
    return model_class(PerceiverFlashConfig(**{**sizes, **options}))


def trains(model, loss):
    """Every parameter takes a gradient."""
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_classification_of_feature_arrays():
    """`Perceiver(input_dim, depth, output_dim, num_latents, …, weight_tie_layers, gated_mlp, self_per_cross_attn,
    num_zero_tokens, output_mode)`, with a mask."""
    model = make(
        PerceiverFlashModel,
        modality="features",
        input_size=12,
        num_cross_attention_layers=4,
        num_self_attention_layers=2,
        weight_tie_layers=True,
        gated_feed_forward=True,
        num_zero_tokens=3,
        output_size=5,
        pooling="concat",
    )
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    output = model(inputs=torch.randn(2, 20, 12), attention_mask=mask)
    assert output.pooler_output.shape == (2, 5) and output.last_hidden_state.shape == (2, 8, 32)
    trains(model, output.pooler_output.square().sum())


def test_perceiver_io_with_learned_and_given_queries():
    """`PerceiverIO(input_dim, query_dim, depth, proj_dim)`: as many outputs as queries."""
    model = make(
        PerceiverFlashIOModel, modality="features", input_size=12, query_size=10, output_size=4, num_queries=6
    )
    inputs = torch.randn(2, 20, 12)
    assert model(inputs=inputs, queries=torch.randn(50, 10)).last_hidden_state.shape == (2, 50, 4)
    output = model(inputs=inputs).last_hidden_state
    assert output.shape == (2, 6, 4)
    trains(model, output.square().sum())


def test_an_image_adapter_with_nerf_positions():
    """The CIFAR example: pixels with NeRF positions, normalised and projected to 64 channels, channels last."""
    model = make(
        PerceiverFlashForImageClassification,
        modality="image",
        image_size=16,
        image_position_encoding="nerf",
        num_frequency_bands=10,
        project_image=True,
        input_size=64,
        channels_last=True,
        num_labels=10,
        num_self_attention_layers=4,
        latent_drop=0.2,
        attention_dropout=0.2,
    ).train()
    images = torch.randn(2, 16, 16, 3)
    loss = model(pixel_values=images, labels=torch.tensor([3, 9])).loss
    trains(model, loss)
    # B8: the positions of a size do not hang on the sizes that were seen before.
    first = model.eval()(pixel_values=images).logits
    model(pixel_values=torch.randn(1, 8, 24, 3))
    assert torch.equal(model(pixel_values=images).logits, first)


def test_texts():
    model = make(PerceiverFlashForSequenceClassification, vocab_size=50, max_position_embeddings=64, num_labels=3)
    ids = torch.randint(50, (2, 64))
    trains(model, model(input_ids=ids, labels=torch.tensor([0, 2])).loss)


def test_attention_weights_of_every_kind():
    """`return_attn_weights`, the decoder's among them, without another library's unmerged change (B3)."""
    model = make(
        PerceiverFlashIOModel, modality="features", input_size=12, query_size=10, num_cross_attention_layers=2
    )
    model.set_attn_implementation("eager")
    output = model(inputs=torch.randn(2, 20, 12), queries=torch.randn(7, 10), output_attentions=True)
    assert [weights.shape[2:] for weights in output.attentions] == [(8, 20), (8, 8)] * 2
    assert output.cross_attentions[0].shape == (2, 1, 7, 8)


def test_heads_are_what_was_asked_for():
    """B5."""
    model = make(
        PerceiverFlashModel, modality="features", input_size=12, num_cross_attention_heads=2, cross_head_dim=6
    )
    assert model.layers[0].attention.q_proj.out_features == 12 and model.layers[0].attention.num_heads == 2


def test_most_latents_can_be_dropped():
    """B9: a probability that leaves less than one latent leaves one, in its place."""
    model = make(PerceiverFlashModel, modality="features", input_size=12, latent_drop=0.95).train()
    assert model(inputs=torch.randn(2, 20, 12)).last_hidden_state.shape == (2, 1, 32)


MASK_MEMORY = """
import sys, torch
sys.path.append(sys.argv[1])
from benchmark_measure import peak_memory
from hf_efficient import PerceiverFlashConfig, PerceiverFlashModel
config = PerceiverFlashConfig(modality="features", input_size=16, hidden_size=16, num_latents=1024,
    num_self_attention_layers=0, num_cross_attention_heads=1, num_attention_heads=1, num_query_attention_heads=1)
model = PerceiverFlashModel._from_config(config, attn_implementation=sys.argv[2])
inputs, mask = torch.randn(2, 65536, 16), torch.ones(2, 65536, dtype=torch.long)
mask[1, 1000:] = 0
for given in (None, mask):
    def step():
        model(inputs=inputs, attention_mask=given).last_hidden_state.sum().backward()
    step()
    print(peak_memory(step))
"""


@pytest.mark.parametrize("implementation", ["sdpa", "hf_efficient"])
def test_a_mask_costs_no_memory_of_queries_times_keys(implementation):
    """Measured: a bool for each of 2×1,024×65,536 pairs would be 128 MiB, the keys and values themselves are 16."""
    printed = run_warm_python(
        "-c", MASK_MEMORY, ROOT / "scripts", implementation, environment={"OMP_NUM_THREADS": "1"}
    )
    plain, masked = map(float, printed.split())
    assert masked - plain < 48, (plain, masked)
