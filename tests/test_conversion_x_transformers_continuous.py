"""`ContinuousTransformerWrapper` of x-transformers 2.31.10 and what it becomes compute the same, to 2e-5."""

import pytest
import torch

from hf_efficient.conversion.weight_transfer import ConversionError
from hf_efficient.conversion.x_transformers_continuous import CONTINUOUS_FLAGS, convert_continuous


x_transformers = pytest.importorskip("x_transformers")

TOLERANCE, LENGTH = 2e-5, 9
LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
SIZES = {"dim_in": 3, "dim_out": 3, "max_seq_len": 24}
CASES = {
    "defaults": ({}, {}),
    "no positions": ({"max_seq_len": None}, {"rotary_pos_emb": True}),
    "no table": ({"use_abs_pos_emb": False}, {"alibi_pos_bias": True}),
    "sinusoids, norm, dropout": ({"scaled_sinu_pos_emb": True, "post_emb_norm": True, "emb_dropout": 0.1}, {}),
    "memory tokens": ({"num_memory_tokens": 2}, {"attn_num_mem_kv": 2}),
    "mean and variance": ({"probabilistic": True}, {"rel_pos_bias": True}),
    "no projections": ({"dim_in": 32, "dim_out": 32, "use_identity_if_same_dim": True}, {}),
    "projections of the same width": ({"dim_in": 32, "dim_out": 32}, {}),
    "neither given": ({"dim_in": None, "dim_out": None}, {}),
}


def original(kind, name):
    torch.manual_seed(0)
    wrapper, layers = {**SIZES, **CASES[name][0]}, {**LAYERS, **CASES[name][1]}
    module = x_transformers.ContinuousTransformerWrapper(
        **wrapper, attn_layers=getattr(x_transformers, kind)(**layers)
    )
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval(), {**wrapper, "attn_layers": {"class": kind, **layers}}


def vectors(size, seed=1):
    return torch.randn(2, LENGTH, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_predictions(name, kind):
    module, arguments = original(kind, name)
    model, _ = convert_continuous(module, arguments)
    inputs = vectors(arguments["dim_in"] or 32)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])
    expected = module(inputs, mask=mask)
    output = model(inputs, attention_mask=mask.long())
    pairs = [(output.prediction, expected)]
    if arguments.get("probabilistic"):
        pairs = [(output.prediction, expected[0]), (output.variance, expected[1])]
    for actual, wanted in pairs:
        assert wanted.std() > 0.02
        torch.testing.assert_close(actual[mask], wanted[mask], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"use_l1_loss": True}, {"probabilistic": True}], ids=str)
@torch.no_grad()
def test_the_same_loss_and_the_same_sequence(options):
    module, arguments = original("Decoder", "mean and variance" if "probabilistic" in options else "defaults")
    wrapped = x_transformers.ContinuousAutoregressiveWrapper(module, use_l1_loss="use_l1_loss" in options)
    model, _ = convert_continuous(wrapped.state_dict(), arguments)
    if "use_l1_loss" in options:
        model.config.feature_loss = "l1"
    inputs = vectors(3)
    torch.testing.assert_close(model(inputs, labels=inputs).loss, wrapped(inputs), rtol=1e-5, atol=1e-6)
    if "probabilistic" not in options:
        torch.testing.assert_close(model.generate(inputs, 6), wrapped.generate(inputs, 6), rtol=0, atol=TOLERANCE)


REFUSED = {
    "a module": ({"project_in": torch.nn.Linear(3, 32), "dim_in": None}, "Decoder", "a module of one's own"),
    "memories": ({"max_mem_len": 4}, "Decoder", "max_mem_len=4 has no counterpart"),
    "another class": ({}, "CrossAttender", "Encoder or Decoder"),
    "a distribution of nothing": ({"probabilistic": True, "dim_out": None}, "Decoder", "needs output_feature_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name):
    wrapper, kind, message = REFUSED[name]
    with pytest.raises(ConversionError, match=message):
        convert_continuous({}, {**SIZES, **wrapper, "attn_layers": {"class": kind, **LAYERS}})


def test_every_flag_is_in_a_case():
    used = {name for wrapper, _ in CASES.values() for name in wrapper} | set(SIZES)
    assert {flag.name for flag in CONTINUOUS_FLAGS if not flag.refused} == used
