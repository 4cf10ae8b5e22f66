"""Models and comparisons that the tests of generation share.

The models are random but decisive: every matrix keeps the variance of what it multiplies, so that logits spread over
several units and hang on the whole past, and no test turns on a tie between two tokens. They are float64, in which
cached and uncached passes agree to 1e-10 and more; `generate` hands logits out as float32, so "equal" means to the
last bit of the largest of them.
"""

from dataclasses import dataclass
from functools import cache

import torch
from helpers import assert_within_budget

from hf_efficient import PerformerConfig, PerformerForCausalLM, PerformerForConditionalGeneration


VOCABULARY = 61
NEW_TOKENS = 10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_random_features": 16,
    "max_position_embeddings": 96,
    "local_window_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "tie_word_embeddings": False,  # tied, a random model says its last token again and again
}

FEATURE_MAPS = (
    "softmax",
    "hyperbolic",
    "optimal_positive",
    "relu",
    "squared_relu",
    "gelu",
    "silu",
    "sigmoid",
    "softplus",
    "elu",
    "no_projection",
)
POSITIONS = ("sinusoidal", "learned", "axial", "none", "rotary_and_sinusoidal")

# Every way in which a decoder's past can matter. "linear" ones keep a state of constant size.
CAUSAL = {
    **{name: {"feature_map": name} for name in FEATURE_MAPS},
    **{f"{name} positions": {"position_embedding_type": name} for name in POSITIONS},
    "grouped heads": {"num_key_value_heads": 2},
    "token shift": {"shift_tokens": True},
    "reversible": {"reversible": True},
    "scale norm, gated": {"norm_type": "scale_norm", "gated_feed_forward": True},
    "local heads in one layer": {"num_local_attention_heads": [2, 0]},
    "local heads only": {"num_local_attention_heads": 4},
    "bucketed local heads": {"num_local_attention_heads": 2, "local_attention_type": "bucketed"},
    "full attention last": {"layer_types": ["linear_attention", "full_attention"]},
    "full attention first": {"layer_types": ["full_attention", "linear_attention"]},
    "all at once": {
        "layer_types": ["full_attention", "linear_attention"],
        "num_local_attention_heads": [0, 2],
        "shift_tokens": True,
        "reversible": True,
        "position_embedding_type": "learned",
        "feature_map": "relu",
    },
}
CONSTANT_STATE = [name for name in CAUSAL if "full_attention" not in CAUSAL[name].get("layer_types", [])]

ENCODER_DECODER = {
    "softmax": {},
    "relu": {"feature_map": "relu"},
    "elu": {"feature_map": "elu"},
    "learned positions": {"position_embedding_type": "learned"},
    "token shift, reversible": {"shift_tokens": True, "reversible": True, "cross_attention_feed_forward": True},
    "local heads": {"num_local_attention_heads": [2, 0]},
    "full attention first": {"layer_types": ["full_attention", "linear_attention"]},
    "deeper encoder": {"encoder_overrides": {"num_hidden_layers": 3, "num_attention_heads": 2}},
}


@cache
def causal_model(name: str) -> PerformerForCausalLM:
    torch.manual_seed(0)
    return decisive(PerformerForCausalLM(PerformerConfig(**SIZES, **CAUSAL[name])))


@cache
def encoder_decoder_model(name: str) -> PerformerForConditionalGeneration:
    torch.manual_seed(0)
    config = PerformerConfig(**SIZES, **ENCODER_DECODER[name], is_encoder_decoder=True, decoder_start_token_id=1)
    return decisive(PerformerForConditionalGeneration(config))


def decisive(model):
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=3 * model.config.hidden_size**-0.5)
    return model.double().eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths, padded on the left."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


@dataclass
class Run:
    """What `generate` gave, and how many positions the model was shown at each of its calls."""

    sequences: torch.Tensor
    logits: torch.Tensor  # [step, row, vocabulary]
    cache: object
    lengths: list[int]

    @property
    def decoder_cache(self):
        """What the decoder remembers of its own tokens."""
        return getattr(self.cache, "self_attention_cache", self.cache)


def run(model, ids=None, *, seed: int = 0, **options) -> Run:
    lengths = []

    def note(_module, arguments, keywords):
        names = ("decoder_input_ids", "input_ids", "inputs_embeds")
        shown = arguments[0] if arguments else next(keywords[name] for name in names if keywords.get(name) is not None)
        lengths.append(shown.shape[1])

    if ids is not None and not model.config.is_encoder_decoder:
        options.setdefault("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    torch.manual_seed(seed)
    try:
        output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    finally:
        handle.remove()
    return Run(output.sequences, torch.stack(output.logits), output.past_key_values, lengths)


def assert_same(actual: Run, expected: Run, what: str) -> None:
    """The same tokens, and the same logits up to one unit in the last place of the largest."""
    assert actual.sequences.tolist() == expected.sequences.tolist(), f"{what}: other tokens"
    assert_within_budget(actual.logits, expected.logits.double(), expected.logits, f"{what}: logits")


def assert_one_at_a_time(run: Run, prompt: int, steps: int = NEW_TOKENS) -> None:
    """The model saw the prompt once and then one token per step: nothing was computed again."""
    assert run.lengths == [prompt] + [1] * (steps - 1), f"positions per call: {run.lengths}"
