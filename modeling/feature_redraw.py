"""Drawing the random features anew during training, the same way on every rank and after every resumption."""

from torch import Tensor

from ..kernels.custom_operator import custom_operator
from .performer_attention import PerformerAttention
from .random_features import draw_projection


@custom_operator("redraw_projections", mutates_args=("projections", "forwards_since_draw", "draws"))
def redraw_projections(
    projections: list[Tensor],
    forwards_since_draw: Tensor,
    draws: Tensor,
    layer_indices: list[int],
    interval: int,
    seed: int,
    orthogonal: bool,
    scaling: str,
) -> None:
    """Count one training forward; every `interval` forwards, draw all `projections` anew, in place.

    An operator, because the decision depends on data: `torch.compile` keeps it as one opaque node.

    Args:
        projections: one `[M, D]` buffer per layer.
        forwards_since_draw, draws: int64 scalars, saved with the model.
        layer_indices: the layer of each projection.
        interval, seed, orthogonal, scaling: see `PerformerConfig`.
    """
    if int(forwards_since_draw) >= interval:
        draws += 1
        for projection, layer_idx in zip(projections, layer_indices, strict=True):
            new = draw_projection(
                *projection.shape,
                seed=seed,
                layer_idx=layer_idx,
                draw=int(draws),
                orthogonal=orthogonal,
                scaling=scaling,
            )
            projection.copy_(new)
        forwards_since_draw.zero_()
    forwards_since_draw += 1


@redraw_projections.register_fake
def _(projections, forwards_since_draw, draws, layer_indices, interval, seed, orthogonal, scaling):
    return None


def redraw_and_capture(model) -> list[dict[str, Tensor]]:
    """Each block's projections for one forward of a `PerformerModel`; in training, after a draw if it is time for one.

    The captured copies make a forward, its backward and a recomputation of it use the same features even if another
    forward has drawn new ones in between. Without redraws the blocks read their buffers, and the result is empty
    dicts.
    """
    config = model.config
    captured: list[dict[str, Tensor]] = [{} for _ in model.layers]
    if not model.training or config.feature_redraw_interval is None:
        return captured
    named = [
        (index, name, attention)
        for index, layer in enumerate(model.layers)
        for name, attention in (("self_attn", layer.self_attn), ("cross_attn", layer.cross_attn))
        if isinstance(attention, PerformerAttention) and attention.projection_matrix is not None
    ]
    if not named:
        return captured
    redraw_projections(
        [attention.projection_matrix for *_, attention in named],
        model.forwards_since_redraw,
        model.num_redraws,
        [attention.projection_index for *_, attention in named],
        config.feature_redraw_interval,
        config.feature_seed,
        config.orthogonal_features,
        config.feature_scaling,
    )
    for index, name, attention in named:
        captured[index][name] = attention.projection_matrix.clone()
    return captured
