"""Linear attention on GPUs, backward: the order of the launches. Features and states are computed again, not kept.

1. `triton_states.states`: the sums `S`, `z` before each chunk once more (causal).
2. `triton_state_gradients.state_gradients`: their gradients `dS`, `dz` after each chunk, from the end to the start.
3. `triton_state_gradients.value_gradients`, and `triton_feature_gradients.feature_gradients` for queries and for keys:
   everything else, chunk by chunk.
"""

from torch import Tensor

from .feature_maps import FeatureMap
from .launch_plan import Chunks, MapTensors
from .state import LinearAttentionState
from .triton_feature_gradients import feature_gradients
from .triton_forward import chunk_size
from .triton_state_gradients import row_products, state_gradients, value_gradients
from .triton_states import states


def backward(
    gradient: Tensor,
    of_end: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    wanted: tuple[bool, bool],
    mask: Tensor | None,
    start: LinearAttentionState,
    causal: bool,
    cu_seqlens: Tensor | None,
    output: Tensor,
    end: LinearAttentionState,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the two initial sums, projection and bias; `wanted` says which of the last two.

    `gradient` and `of_end` are those of the output and of the two final sums; the rest is what `forward` was given and
    what it returned.
    """
    tensors = MapTensors.of(feature_map, query)
    mask = None if mask is None else (mask != 0).contiguous()
    query_normalizers, *found, reciprocals, running = saved
    size = chunk_size(query)
    of_queries = Chunks.of(query.shape[0], query.shape[2], size, cu_seqlens)
    of_keys = of_queries if causal else Chunks.of(key.shape[0], key.shape[2], size, cu_seqlens)
    read = states(key, value, tensors, mask, start, of_keys, found, keep_states=True)[1] if causal else end
    products = row_products(gradient, output)
    rows = reciprocals, running, query_normalizers
    scales = start.log_scale.contiguous(), end.log_scale
    kept, of_start = state_gradients(
        query, gradient, tensors, (products, *rows), read.log_scale, scales, of_end, of_queries, causal
    )
    of_value = value_gradients(
        query, key, gradient, tensors, mask, rows, found, end.log_scale, kept[0], of_keys, causal
    )
    common = query, key, value, gradient, tensors, mask, (products, *rows, *found)
    of_query, *from_query = feature_gradients(True, *common, read.log_scale, read[:2], of_queries, causal, wanted)
    of_key, *from_key = feature_gradients(False, *common, end.log_scale, kept, of_keys, causal, wanted)
    of_parameters = [None if a is None else a + b for a, b in zip(from_query, from_key, strict=True)]
    return of_query, of_key, of_value, *of_start, *of_parameters
