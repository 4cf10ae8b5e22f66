"""FAVOR+ (arXiv 2009.14794) as an attention implementation for other people's models.

    import hf_efficient
    model = AutoModelForCausalLM.from_pretrained("meta-llama/...", attn_implementation="favor")

Any model of transformers that goes through its attention interface can have its softmax replaced by linear attention
over random features, at its own weights. `import hf_efficient` makes the name "favor" known;
`register_favor_attention` registers other numbers and kinds of features under other names.

Decoding uses the model's own cache of keys and values, from which every step computes all features again: correct, and
no faster than softmax. A state of constant size needs a Performer (`hf_efficient.conversion`).

Under `torch.compile` pass an attention mask: without one transformers cannot tell a plain sequence from a packed one
while it traces, and asks for the mask of a packed one, which is refused.

Registering an attention function alone would make transformers drop every mask, padding too. So there is a mask
function as well, which passes on the padding as `[batch, keys]`, bool for causal attention and uint8 for bidirectional
attention, and refuses what that cannot express.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from .favor_features import FavorFeatures
from .kernels.linear_attention import linear_attention


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
)
# A dtype survives what happens to a mask between the model and its layers, and reading it waits for no GPU.
CAUSAL, BIDIRECTIONAL = torch.bool, torch.uint8
# Arguments of attention functions that change what is computed, and what they are.
UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "a cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "an additive position bias",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
    "output_attentions": "attention weights (there are none)",
}


def register_favor_attention(
    num_features: int | None = None,
    seed: int = 0,
    orthogonal: bool = True,
    feature_map: str = "softmax",
    name: str = "favor",
) -> None:
    """Make FAVOR+ available as `attn_implementation=name`.

    The same arguments give the same features in every process: a projection depends on the seed, the size of a head
    and the layer's index, and never changes, in training neither.

    Args:
        num_features: number of random features, `int(d ln d)` for heads of size d if not given.
        seed: decides the projections.
        orthogonal: rows of a projection orthogonal in blocks, which lowers the error.
        feature_map: as in `PerformerConfig`: `"softmax"`, `"hyperbolic"` and `"optimal_positive"` approximate softmax
            attention, the others are attention of another kind, for training.
        name: the name to register.

    Raises:
        ValueError: an argument that makes no features.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if num_features is not None and num_features < 1:
        raise ValueError(f"num_features must be None or at least 1, got {num_features}")
    if feature_map == "hyperbolic" and num_features is not None and num_features % 2:
        raise ValueError(f"num_features must be even for feature_map='hyperbolic', got {num_features}")
    if name in ("eager", "sdpa", "flex_attention") or "|" in name or "/" in name:
        raise ValueError(f"name must not be one that transformers gives a meaning of its own, got {name!r}")
    features = FavorFeatures(num_features, seed, orthogonal, feature_map)
    AttentionInterface.register(name, partial(favor_attention_forward, features=features))
    AttentionMaskInterface.register(name, favor_mask)


def favor_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The padding `[batch, keys]`, whose dtype says whether attention is causal; see transformers' `sdpa_mask`.

    Keys behind the last query, which a preallocated cache has, are left out: the number of columns is the number of
    keys that count.

    Raises:
        ValueError: a mask that is neither causal nor bidirectional with padding.
    """
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function or local_size is not None or kv_offset:
        raise ValueError(
            "FAVOR+ attention can be causal or bidirectional with padding; this model (or its inputs) asks for "
            "another mask: a sliding window, chunks, packed sequences or an overlay. Use attn_implementation='sdpa'"
        )
    keys = int(q_offset) + q_length if causal else kv_length
    if attention_mask is None:
        keep = torch.ones(batch_size, keys, dtype=torch.bool, device=device)
    elif attention_mask.ndim == 2 and attention_mask.shape[1] >= keys:
        keep = attention_mask[:, :keys].to(device=device, dtype=torch.bool)
    else:
        raise ValueError(
            f"attention_mask must have shape [batch, at least {keys}] for FAVOR+ attention, got "
            f"{tuple(attention_mask.shape)}"
        )
    return keep.to(CAUSAL if causal else BIDIRECTIONAL)


def favor_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    features: FavorFeatures,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Linear attention in the form of transformers' attention functions.

    Args:
        module: the calling layer; its `layer_idx` decides the projection, its `is_causal` the direction if no mask
            tells it.
        query: `[B, H, N, D]`, the last N of the keys if causal.
        key, value: `[B, KV, K, D]`, H a multiple of KV.
        attention_mask: what `favor_mask` made, or None.
        features: where the projections come from.
        scaling: factor on the scores, `D^(-1/2)` if not given.
        dropout: must be 0: there are no weights that could be dropped.

    Returns:
        `[B, N, H, D]`, and None for the weights.

    Raises:
        ValueError: anything that would have to be computed otherwise.
    """
    _refuse_unsupported(attention_mask, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if scaling <= 0:
        raise ValueError(f"FAVOR+ attention needs a positive scaling of the scores, got {scaling}")
    mask = None
    if attention_mask is not None:
        causal, mask = attention_mask.dtype == CAUSAL, attention_mask.to(torch.bool)
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
        if causal is None:
            raise ValueError(
                f"FAVOR+ attention must know whether {type(module).__name__} is causal: it has no is_causal, and no "
                "mask was made by transformers' mask functions"
            )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    feature_map = features.feature_map(query, getattr(module, "layer_idx", None) or 0, scaling)
    past, state = key.shape[2] - query.shape[2], None
    if causal and past < 0:
        raise ValueError(f"causal attention needs as many keys as queries, {query.shape[2]}, got {key.shape[2]}")
    if causal and past and query.shape[2] > 1:
        # The cached keys are before every query; only the new ones need the causal form.
        before = None if mask is None else mask[:, :past]
        state = linear_attention(query[:, :, :0], key[:, :, :past], value[:, :, :past], feature_map, mask=before).state
        key, value, mask = key[:, :, past:], value[:, :, past:], None if mask is None else mask[:, past:]
    causal = causal and query.shape[2] > 1
    output = linear_attention(query, key, value, feature_map, causal=causal, mask=mask, state=state).output
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _refuse_unsupported(attention_mask, dropout: float, kwargs: dict) -> None:
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"FAVOR+ attention cannot honour {name}: {meaning}. Use attn_implementation='sdpa'")
    if dropout:
        raise ValueError(
            f"FAVOR+ attention has no weights to drop, so the model's attention dropout must be 0, got {dropout}: "
            "pass attention_dropout=0 (BERT: attention_probs_dropout_prob=0, GPT-2: attn_pdrop=0) to from_pretrained"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"FAVOR+ attention takes padding as [batch, keys] from transformers' mask functions, got a mask of "
            f"{shape}: an arbitrary mask has no form that is linear in the length. Use attn_implementation='sdpa'"
        )
    if attention_mask.dtype not in (CAUSAL, BIDIRECTIONAL):
        raise ValueError(
            f"FAVOR+ attention takes the mask that transformers' mask functions made for it ({CAUSAL} or "
            f"{BIDIRECTIONAL}), got {attention_mask.dtype}: this model makes its own masks"
        )
