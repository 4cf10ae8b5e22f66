"""Each example of CoLT5-attention's README has its counterpart here, at its sizes, on a CPU, within 8 GiB."""

import pytest
from helpers import run_python


pytestmark = pytest.mark.slow

LIMIT = 8 * 2**30
EXAMPLES = {
    "feed-forward": """
from hf_efficient.modeling.routed_feed_forward import RoutedFeedForward
layer = RoutedFeedForward(512, light_intermediate_size=256, heavy_intermediate_size=2048, num_routed=1024)
tokens, mask = torch.randn(2, 32768, 512), torch.ones(2, 32768, dtype=torch.bool)
assert layer(tokens, mask).shape == tokens.shape
""",
    "attention": """
from hf_efficient.modeling.routed_attention import RoutedAttention
layer = RoutedAttention(512, light_heads=8, radius=64, heavy_heads=8, num_routed_queries=1024, num_routed_keys=1024)
tokens, mask = torch.randn(2, 32768, 512), torch.ones(2, 32768, dtype=torch.bool)
assert layer(tokens, mask).shape == tokens.shape
""",
    "block": """
from hf_efficient.modeling.routed_block import RoutedTransformerBlock
block = RoutedTransformerBlock(
    512,
    attention={"radius": 64, "num_routed_queries": 1024, "num_routed_keys": 1024},
    feed_forward={"light_intermediate_size": 256, "heavy_intermediate_size": 2048, "num_routed": 1024},
)
tokens, mask = torch.randn(2, 32768, 512), torch.ones(2, 32768, dtype=torch.bool)
assert block(tokens, mask).shape == tokens.shape
""",
    "cross-attention to a million memories": """
from hf_efficient.modeling.routed_attention import RoutedCrossAttention
layer = RoutedCrossAttention(512, num_routed_queries=512, num_routed_keys=1024, num_key_value_sets=2)
tokens, memories = torch.randn(1, 1024, 512), torch.randn(1, 1_048_576, 512)
masks = (torch.ones(1, 1024, dtype=torch.bool), torch.ones(1, 1_048_576, dtype=torch.bool))
assert layer(tokens, memories, *masks).shape == tokens.shape
""",
    "autoregressive attention": """
from hf_efficient.modeling.routed_autoregressive_attention import RoutedAutoregressiveAttention
layer = RoutedAutoregressiveAttention(512, num_routed_queries=32, num_routed_keys=16, num_key_value_sets=2)
tokens = torch.randn(2, 8192, 512)
assert (layer(tokens) + tokens).shape == tokens.shape
""",
    "image attention": """
from hf_efficient.modeling.routed_image_attention import RoutedImageAttention
layer = RoutedImageAttention(32, window_size=32, num_routed_queries=1024, num_routed_keys=1024, channel_first=True)
maps = torch.randn(1, 32, 256, 256)
assert layer(maps).shape == maps.shape
""",
    "vision transformer": """
from hf_efficient import CoLT5Config, CoLT5ForImageClassification
config = CoLT5Config(
    hidden_size=1024, num_hidden_layers=6, image_size=256, patch_size=32, image_window_size=4, num_labels=1000,
    num_light_attention_heads=4, num_heavy_attention_heads=8, num_routed_queries=16, num_routed_keys=16,
    num_routed_tokens=16, light_intermediate_size=2048, heavy_intermediate_size=4096,
)
assert CoLT5ForImageClassification(config)(torch.randn(1, 3, 256, 256)).logits.shape == (1, 1000)
""",
    "topk": """
from hf_efficient.modeling.differentiable_topk import topk
values, indices, scores, gates = topk(torch.randn(1024, 512), k=10)
assert values.shape == indices.shape == scores.shape == gates.shape == (1024, 10)
""",
    "64k tokens through an encoder of the base width": """
from hf_efficient import CoLT5Config, CoLT5EncoderModel
model = CoLT5EncoderModel(CoLT5Config(num_hidden_layers=2)).eval()
assert model(torch.randint(3, 32128, (1, 65536))).last_hidden_state.shape == (1, 65536, 768)
""",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    """In a process of its own, which is the only way to see its peak of memory."""
    measure = "import resource\nprint(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    code = f"import torch\ntorch.set_grad_enabled(False)\n{EXAMPLES[name]}\n{measure}"
    assert int(run_python("-c", code)) < LIMIT, "bytes at the peak"
