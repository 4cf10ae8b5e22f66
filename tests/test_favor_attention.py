"""FAVOR+ under other people's models: `attn_implementation="favor"`."""

import copy

import pytest
import torch
from process_with_torch import run_python_with_torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    T5Config,
)

import hf_efficient  # noqa: F401  (registers "favor")
from hf_efficient.attention import favor_attention_forward, favor_mask, register_favor_attention
from hf_efficient.favor_features import FavorFeatures


VOCABULARY, LENGTH = 41, 20
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}
CONFIGS = {
    "BERT": BertConfig(**SIZES, attention_probs_dropout_prob=0.0),
    "GPT-2": GPT2Config(**GPT2, **TOKENS),
    "GPT-2 scaled": GPT2Config(**GPT2, **TOKENS, scale_attn_by_inverse_layer_idx=True),
    "Llama": LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2),
}
CAUSAL = ["GPT-2", "Llama"]


def build(name: str, implementation: str = "favor", spread: float = 0.03):
    auto_class = AutoModelForMaskedLM if name == "BERT" else AutoModelForCausalLM
    model = auto_class.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_from_pretrained_and_back(name, tmp_path):
    """Loaded with favor it runs, twice the same; loaded without it is the softmax model it was."""
    softmax = build(name, "sdpa")
    softmax.save_pretrained(tmp_path / "softmax")
    auto_class = AutoModelForMaskedLM if name == "BERT" else AutoModelForCausalLM
    favor = auto_class.from_pretrained(tmp_path / "softmax", attn_implementation="favor")
    ids = tokens()
    first = favor(ids).logits
    assert favor.config._attn_implementation == "favor"
    assert not torch.equal(first, softmax(ids).logits)
    favor.save_pretrained(tmp_path / "favor")
    again = auto_class.from_pretrained(tmp_path / "favor", attn_implementation="favor")
    assert torch.equal(first, again(ids).logits)
    plain = auto_class.from_pretrained(tmp_path / "favor", attn_implementation="sdpa")
    assert torch.equal(plain(ids).logits, softmax(ids).logits)
    plain.set_attn_implementation("favor")
    assert torch.equal(plain(ids).logits, first)


IMPORT_ORDERS = {
    "package first": "import hf_efficient\nfrom transformers import AutoModel, BertConfig",
    "transformers first": "from transformers import AutoModel, BertConfig\nimport hf_efficient",
    "amid modeling_utils": "import hf_efficient\nimport transformers.modeling_utils\n"
    "from transformers import AutoModel, BertConfig",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_importing_the_package_is_enough(order):
    printed = run_python_with_torch(
        "-c",
        IMPORT_ORDERS[order] + f"\nconfig = BertConfig(**{SIZES!r})\n"
        "model = AutoModel.from_config(config, attn_implementation='favor').eval()\n"
        "import torch\nprint(tuple(model(torch.arange(9)[None])[0].shape))\n",
    )
    assert printed.strip() == "(1, 9, 32)"


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_no_future_leak_to_the_bit(name):
    model = build(name)
    ids = tokens()
    changed = ids.clone()
    changed[:, 12:] = tokens(length=LENGTH - 12)
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["BERT", *CAUSAL])
@torch.no_grad()
def test_padding_is_exact(name, side):
    """What stands at padded positions changes nothing, and a padded row equals the same row alone."""
    model = build(name)
    ids = tokens(batch=2)
    mask = torch.ones_like(ids)
    real = slice(0, 13) if side == "right" else slice(LENGTH - 13, LENGTH)
    mask[1] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    other = torch.where(mask.bool(), ids, tokens())
    assert torch.equal(
        padded[mask.bool()], model(other, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    )
    alone = model(ids[1:, real], attention_mask=torch.ones(1, 13, dtype=torch.long)).logits
    torch.testing.assert_close(padded[1:, real], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_generation_is_uncached_generation(name, beams):
    model = build(name, spread=0.3)
    ids = tokens(batch=2, length=6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}
    cached, uncached = (model.generate(ids, **arguments, do_sample=False, use_cache=on) for on in (True, False))
    assert torch.equal(cached, uncached)
    static = model.generate(ids, **arguments, do_sample=False, cache_implementation="static")
    assert torch.equal(static, uncached)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "preallocated"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_several_tokens_at_once_with_a_cache(name, static):
    model = build(name)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 5) if static else None
    pieces, start = [], 0
    for stop in (7, 8, 13, LENGTH):
        outputs = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = outputs.past_key_values, stop
        pieces.append(outputs.logits)
    keep = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[keep], whole[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_error_falls_with_the_number_of_features(name):
    """The figures of docs/benchmarks/favor_error.csv in small."""
    softmax, ids = build(name, "sdpa"), tokens(batch=4)
    expected = softmax(ids).logits
    errors = []
    for features in (16, 64, 256, 1024, 4096):
        square = 0.0
        for seed in range(3):
            register_favor_attention(features, seed=seed, name="favor_test")
            softmax.set_attn_implementation("favor_test")
            square += (softmax(ids).logits - expected).square().mean().item() / 3
        errors.append(square**0.5 / expected.std().item())
    print(name, [f"{error:.1e}" for error in errors])
    assert all(more < less for less, more in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < errors[0] / 8, errors


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_flow(name):
    model = build(name).train()
    model(tokens(), labels=tokens()).loss.backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("q_proj", "k_proj", "query.weight", "key.weight", "c_attn")):
            assert parameter.grad.abs().max() > 0, key


def test_gradient_of_the_features_is_that_of_many_features():
    """Attention itself: with many features value and gradients approach softmax attention's."""
    query, key, value = (0.3 * torch.randn(1, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    key, value = key[:, :2], value[:, :2]
    module = torch.nn.Module()
    module.layer_idx, module.is_causal = 3, True
    features = FavorFeatures(100_000, 0, True, "softmax")

    def gradients(function):
        inputs = [states.clone().requires_grad_() for states in (query, key, value)]
        output = function(*inputs)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    for scaling in (8**-0.5, 0.1):
        exact = gradients(
            lambda q, k, v, scaling=scaling: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
        )
        ours = gradients(
            lambda q, k, v, scaling=scaling: favor_attention_forward(
                module, q, k, v, None, features=features, scaling=scaling
            )[0]
        )
        for approximation, target in zip(ours, exact, strict=True):
            assert (approximation - target).norm() < 0.08 * target.norm()


@pytest.mark.parametrize("kind", ["softmax", "hyperbolic", "optimal_positive"])
@torch.no_grad()
def test_kinds_of_features(kind):
    softmax = build("BERT", "sdpa")
    expected = softmax(ids := tokens()).logits
    register_favor_attention(2048, feature_map=kind, name=f"favor_{kind}")
    softmax.set_attn_implementation(f"favor_{kind}")
    error = ((softmax(ids).logits - expected).norm() / (expected - expected.mean()).norm()).item()
    assert error < 0.002, error


def test_attention_of_another_kind_trains():
    register_favor_attention(feature_map="relu", name="favor_relu")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["Llama"]), attn_implementation="favor_relu")
    optimizer, ids = torch.optim.Adam(model.parameters(), lr=3e-3), tokens(batch=4)
    losses = []
    for _ in range(10):
        losses.append(model(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_projections_are_the_same_everywhere():
    code = (
        "from hf_efficient.favor_features import FavorFeatures\nimport torch\n"
        "print(FavorFeatures(None, 5, True, 'softmax').projection(8, 2, torch.device('cpu')).tolist())"
    )
    features = FavorFeatures(None, 5, True, "softmax")
    rows = features.projection(8, 2, torch.device("cpu"))
    assert run_python_with_torch("-c", code).strip() == str(rows.tolist())
    assert features.projection(8, 2, torch.device("cpu")) is rows
    assert not torch.equal(rows, features.projection(8, 3, torch.device("cpu")))


@torch.no_grad()
def test_bidirectional_use_of_a_decoder_follows_the_mask():
    """config.is_causal=False makes transformers ask for bidirectional masks; the layers still say they are causal."""
    config = copy.deepcopy(CONFIGS["Llama"])
    config.is_causal = False
    register_favor_attention(4096, name="favor_many")
    model = AutoModel.from_config(config, attn_implementation="favor_many").eval()
    ids = tokens()
    ours = model(ids).last_hidden_state
    model.set_attn_implementation("eager")
    expected = model(ids).last_hidden_state
    assert (ours - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_compiles_as_one_graph_with_a_mask():
    model, ids = build("Llama"), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "use_cache": False}
    expected = model(ids, **arguments).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, **arguments).logits[mask.bool()], expected[mask.bool()])


REFUSED = {
    "a sliding window": (
        MistralConfig(**SIZES, **TOKENS, num_key_value_heads=2, sliding_window=4),
        {},
        "another mask",
    ),
    "packed sequences": (
        CONFIGS["Llama"],
        {"position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None], "use_cache": False},
        "another mask",
    ),
    "a mask of one's own": (
        CONFIGS["Llama"],
        {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()},
        r"got a mask of \(1, 1, 20, 20\)",
    ),
    "attention weights": (CONFIGS["BERT"], {"output_attentions": True}, "cannot honour output_attentions"),
    "a position bias": (
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0),
        {"decoder_input_ids": torch.ones(1, 3, dtype=torch.long)},
        "cannot honour position_bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_express_is_refused(case):
    config, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="favor").eval()
        model(tokens(batch=1), **arguments)


def test_dropout_of_weights_is_refused_in_training_only():
    model = AutoModel.from_config(BertConfig(**SIZES), attn_implementation="favor")
    model.eval()(tokens())
    with pytest.raises(ValueError, match="attention dropout must be 0, got 0.1.*attention_probs_dropout_prob=0"):
        model.train()(tokens())


def test_arguments_of_the_functions_are_checked():
    for arguments, message in (
        ({"feature_map": "cosine"}, "feature_map must be one of softmax"),
        ({"num_features": 0}, "num_features must be None or at least 1, got 0"),
        ({"num_features": 7, "feature_map": "hyperbolic"}, "must be even"),
        ({"name": "sdpa"}, "name must not be"),
    ):
        with pytest.raises(ValueError, match=message):
            register_favor_attention(**arguments)
    states = torch.randn(1, 2, 5, 8)
    module, features = torch.nn.Module(), FavorFeatures(None, 0, True, "softmax")
    for arguments, message in (
        ({"attention_mask": None}, "must know whether Module is causal"),
        ({"attention_mask": torch.ones(1, 5)}, "got torch.float32"),
        ({"attention_mask": None, "is_causal": True, "softcap": 30.0}, "cannot honour softcap"),
        ({"attention_mask": None, "is_causal": True, "scaling": -1.0}, "positive scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            favor_attention_forward(module, states, states, states, features=features, **arguments)
    with pytest.raises(ValueError, match=r"at least 9\] .* got \(2, 4\)"):
        favor_mask(2, 5, 9, q_offset=4, attention_mask=torch.ones(2, 4))
