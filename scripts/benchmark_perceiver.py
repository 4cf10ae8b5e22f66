"""PerceiverFlash beside perceiver-pytorch and transformers' Perceiver, whole models on random inputs, one row.

- `perceiver_flash_features`: 128-wide inputs, 256 latents of 512, one cross-attention of eight heads and four blocks
  of self-attention; the inputs are data and need no gradient. transformers' Perceiver has other widths than
  perceiver-pytorch's, so it is compared with its own conversion.
- `perceiver_flash_language`: the full configuration of deepmind/language-perceiver (201 M random weights), logits for
  every input, against its conversion.
- `perceiver_flash_chunks`: cross-attention in chunks against the same model reading its input at once; 64-wide
  inputs that need a gradient, 64 latents of 64.

`ours` reads long inputs in chunks, as it does by itself on a CPU, `ours-at-once` does not.
"""

from collections.abc import Callable, Iterator

import torch
from benchmark_measure import Row, peak_memory, peer_version, summary, time_rounds
from torch import Tensor, nn
from transformers import PerceiverConfig, PerceiverForMaskedLM, PerceiverModel

from hf_efficient import PerceiverFlashConfig, PerceiverFlashModel
from hf_efficient.conversion.transformers_perceiver import convert_transformers_perceiver


PEER, AT_ONCE = "perceiver-pytorch", "ours-at-once"
WIDTH, LATENTS, LATENT_WIDTH = 128, 256, 512
QUICK_SIZES = {"latents": 16, "width": 64}
QUICK_LANGUAGE = {"d_latents": 64, "d_model": 32, "num_latents": 16, "num_self_attends_per_block": 1}
LANGUAGE = {"qk_channels": 256, "v_channels": 1280}


def measure_features(length: int, repeats: int, quick: bool = False, only: str | None = None) -> Iterator[Row]:
    """Forward, and forward with backward, over `length` inputs; of all providers, or of one.

    `quick` is tiny and leaves perceiver-pytorch out.
    """
    torch.manual_seed(0)
    inputs = torch.randn(1, length, WIDTH)
    sizes = QUICK_SIZES if quick else {}
    original = transformers_perceiver(**sizes)
    models = {
        "ours": (ours(**sizes), True),
        AT_ONCE: (ours(**sizes, cross_attention_chunk_size=None), True),
        "transformers": (original, True),
        "ours-converted": (convert_transformers_perceiver(original)[0], True),
    }
    if not quick:
        models[PEER] = (perceiver_pytorch(), False)
    if only is not None:
        models = {only: models[only]}
    for backward in (False, True):
        calls = {name: _feature_call(model, inputs, named, backward) for name, (model, named) in models.items()}
        built = {name: model for name, (model, _) in models.items()}
        yield from _rows("perceiver_flash_features", calls, backward, length, repeats, built)


def measure_language(length: int, repeats: int, quick: bool = False) -> Iterator[Row]:
    """Logits of the masked language model for `length` bytes, without gradients."""
    torch.manual_seed(0)
    config = PerceiverConfig(**(QUICK_LANGUAGE if quick else LANGUAGE), max_position_embeddings=length)
    original = PerceiverForMaskedLM(config).eval()
    models = {"transformers": original, "ours-converted": convert_transformers_perceiver(original)[0]}
    ids = torch.randint(config.vocab_size, (1, length))

    def call_of(model):
        @torch.no_grad()
        def call():
            assert model(input_ids=ids).logits.shape == (1, length, config.vocab_size)

        return call

    calls = {name: call_of(model) for name, model in models.items()}
    yield from _rows("perceiver_flash_language", calls, False, length, repeats, models)


def measure_chunks(length: int, repeats: int, whole: bool = True) -> Iterator[Row]:
    """Forward and backward over inputs that need a gradient; without `whole`, in chunks only."""
    torch.manual_seed(0)
    inputs = torch.randn(1, length, 64, requires_grad=True)
    sizes = {"input_size": 64, "hidden_size": 64, "num_latents": 64, "num_self_attention_layers": 1}
    models = {"ours": _features_model(**sizes)}
    if whole:
        models[AT_ONCE] = _features_model(**sizes, cross_attention_chunk_size=None)
    calls = {name: _feature_call(model, inputs, True, True) for name, model in models.items()}
    yield from _rows("perceiver_flash_chunks", calls, True, length, repeats, models)


def ours(latents: int = LATENTS, width: int = LATENT_WIDTH, **options) -> nn.Module:
    """As perceiver-pytorch's: GEGLU, eight heads of 64."""
    return _features_model(
        input_size=WIDTH,
        hidden_size=width,
        num_latents=latents,
        num_self_attention_layers=4,
        gated_feed_forward=True,
        **options,
    )


def _features_model(**options) -> nn.Module:
    config = PerceiverFlashConfig(modality="features", **options)
    return PerceiverFlashModel._from_config(config, attn_implementation="sdpa").train()


def perceiver_pytorch(latents: int = LATENTS, width: int = LATENT_WIDTH) -> nn.Module:
    from perceiver_pytorch import Perceiver

    return Perceiver(
        num_freq_bands=1,
        max_freq=1.0,
        fourier_encode_data=False,
        input_axis=1,
        input_channels=WIDTH,
        depth=1,
        self_per_cross_attn=4,
        cross_heads=8,
        num_latents=latents,
        latent_dim=width,
        final_classifier_head=False,
    ).train()


def transformers_perceiver(latents: int = LATENTS, width: int = LATENT_WIDTH) -> nn.Module:
    """The same blocks, without gates; the cross-attention is as wide as the input. Its dropout is off."""
    config = PerceiverConfig(
        d_model=WIDTH,
        d_latents=width,
        num_latents=latents,
        num_self_attends_per_block=4,
        self_attention_widening_factor=4,
        cross_attention_widening_factor=4,
        attention_probs_dropout_prob=0.0,
    )
    return PerceiverModel(config).train()


def _feature_call(model: nn.Module, inputs: Tensor, named: bool, backward: bool) -> Callable[[], None]:
    def run():
        return model(inputs=inputs).last_hidden_state if named else model(inputs)

    def forward():
        with torch.no_grad():
            run()

    def forward_and_backward():
        model.zero_grad(set_to_none=True)
        inputs.grad = None
        run().square().mean().backward()

    return forward_and_backward if backward else forward


def _rows(name, calls, backward, length, repeats, models) -> Iterator[Row]:
    times = time_rounds(calls, repeats)
    for provider, call in calls.items():
        millions = sum(parameter.numel() for parameter in models[provider].parameters()) / 1e6
        yield Row(
            name=name,
            provider=provider,
            mode="forward+backward" if backward else "forward",
            length=length,
            **summary(times[provider]),
            peak_mib=peak_memory(call),
            sizes=f"{millions:.1f}M parameters",
            peer=peer_version(PEER) if provider == PEER else "",
        )
        models[provider].zero_grad(set_to_none=True)
