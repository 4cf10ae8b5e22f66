"""Fitting the features of least variance to the queries and keys that a model really has."""

import torch

from .performer_attention import PerformerAttention


@torch.no_grad()
def calibrate_features(model, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> None:
    """Set `pair_norm` of every layer of a `PerformerModel` to what it is on a batch `[B, N]`.

    Raises:
        ValueError: a feature map that has nothing to calibrate.
    """
    if model.config.feature_map != "optimal_positive":
        raise ValueError(f"calibrate_features needs feature_map='optimal_positive', got {model.config.feature_map!r}")
    attentions = [m for m in model.modules() if isinstance(m, PerformerAttention) and m.pair_norm is not None]
    handles = [m.register_forward_pre_hook(m.measure_pair_norm, with_kwargs=True) for m in attentions]
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
