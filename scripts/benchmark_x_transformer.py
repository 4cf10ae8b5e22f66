"""XTransformer beside x-transformers and transformers' Llama of the same size: training steps, memory, decoding."""

from collections.abc import Callable, Iterator

import torch
from benchmark_measure import Row, peer_version, summary, time_rounds, typical_peak_memory
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_efficient import XTransformerConfig, XTransformerForCausalLM


VOCABULARY, WIDTH, LAYERS, HEADS = 256, 256, 6, 4
SIZES = f"width {WIDTH}, {LAYERS} layers, {HEADS} heads, vocabulary {VOCABULARY}"
PEER, FLASH, LLAMA = "x-transformers", "x-transformers-flash", "llama"
# What ours changes, and theirs. The plain models have rotary positions, as Llama has; theirs turn half of each head.
OPTIONS: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {"rotary_pos_emb": True}),
    "alibi": ({"position_bias": "alibi", "rotary_positions": None}, {"alibi_pos_bias": True}),
    "t5": ({"position_bias": "t5", "rotary_positions": None}, {"rel_pos_bias": True}),
    "softclamp": ({"attn_logit_softcapping": 50.0}, {"rotary_pos_emb": True, "attn_softclamp_logits": True}),
}
# What is measured in memory alone, beside those above.
LINEAR = {
    "window": {"sliding_window": 256},
    "sinks": {"learned_attention_sinks": True, "zero_attention_sink": True},
    "memory keys": {"num_memory_key_values": 16},
    "grouped heads": {"num_key_value_heads": 1},
}
# What makes ours a Llama, weight for weight.
LLAMA_OPTIONS = {
    "norm_type": "rms_norm",
    "gated_feed_forward": True,
    "hidden_act": "silu",
    "mlp_bias": False,
    "mlp_output_bias": False,
    "intermediate_size": 8 * WIDTH // 3,
}
OURS_AS_LLAMA = "ours-as-llama"
# A step of x-transformers that holds all scores needs 5 GB at 4,096 tokens.
DENSE_LIMIT = 4096


def ours(length: int, options: dict, layers: int = LAYERS) -> nn.Module:
    """A decoder of the common size."""
    config = XTransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
        **options,
    )
    return XTransformerForCausalLM(config)


def theirs(length: int, options: dict, flash: bool) -> nn.Module:
    """x-transformers' decoder of the common size, with its loss and generation."""
    import x_transformers

    stack = x_transformers.Decoder(
        dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=flash, verbose=False, **options
    )
    model = x_transformers.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=length, use_abs_pos_emb=False, attn_layers=stack
    )
    return x_transformers.AutoregressiveWrapper(model)


def llama(length: int) -> nn.Module:
    """Llama of the common size: its gated feed-forward is narrower by a third, and so has as many weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=LLAMA_OPTIONS["intermediate_size"],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def training_models(option: str, length: int, peers: bool) -> dict[str, nn.Module]:
    """The models that are compared with this option, by provider."""
    own, foreign = OPTIONS[option] if option in OPTIONS else (LINEAR[option], None)
    models = {"ours": ours(length, own)}
    if peers and foreign is not None:
        if option == "plain":
            models |= {FLASH: theirs(length, foreign, flash=True), LLAMA: llama(length)}
        elif length <= DENSE_LIMIT:
            models[PEER] = theirs(length, foreign, flash=False)
    return models


def measure_training(options: list[str], length: int, repeats: int, peers: bool = True) -> Iterator[Row]:
    """Forward and backward passes of the language modelling loss, of one row of random bytes."""
    for option in options:
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (1, length))
        models = training_models(option, length, peers)
        calls = {name: _step(model.train(), tokens) for name, model in models.items()}
        times = time_rounds(calls, repeats)
        for name, call in calls.items():
            yield Row(
                name=f"x_transformer_{option}",
                provider=name,
                mode="forward+backward",
                length=length,
                **summary(times[name]),
                peak_mib=typical_peak_memory(call),
                sizes=SIZES,
                peer=_peer(name),
            )


def measure_memory(length: int) -> Iterator[Row]:
    """Peak memory of a training step of one block with each option of the fast path; scores alone are N² numbers."""
    for option in (*OPTIONS, *LINEAR):
        torch.manual_seed(0)
        options = OPTIONS[option][0] if option in OPTIONS else LINEAR[option]
        call = _step(ours(length, options, layers=1).train(), torch.randint(VOCABULARY, (1, length)))
        times = time_rounds({"ours": call}, 1)
        yield Row(
            name="x_transformer_memory",
            provider=option,
            mode="forward+backward",
            length=length,
            **summary(times["ours"]),
            peak_mib=typical_peak_memory(call),
            sizes=f"width {WIDTH}, 1 layer, {HEADS} heads",
        )


def measure_generation(prompt: int, new_tokens: int, repeats: int, peers: bool = True) -> Iterator[Row]:
    """`generate` as a user calls it: greedy, cached, a prompt of random bytes, one row."""
    torch.manual_seed(0)
    tokens, room = torch.randint(VOCABULARY, (1, prompt)), prompt + new_tokens
    models = {"ours": ours(room, {}), OURS_AS_LLAMA: ours(room, LLAMA_OPTIONS), LLAMA: llama(room)}
    if peers:
        models[PEER] = theirs(room, OPTIONS["plain"][1], flash=False)
    calls = {name: _generation(name, model.eval(), tokens, new_tokens) for name, model in models.items()}
    for name, samples in time_rounds(calls, repeats).items():
        spread = summary(samples)
        yield Row(
            name="x_transformer_generate",
            provider=name,
            mode=f"{prompt}+{new_tokens}",
            length=room,
            **spread,
            tokens_per_second=1e3 * new_tokens / spread["median"],
            sizes=SIZES,
            peer=_peer(name),
        )


def _step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    is_ours = hasattr(model, "config")

    def call():
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss if is_ours else model(tokens)
        loss.backward()

    return call


def _generation(name, model, tokens, new_tokens):
    if name == PEER:
        return lambda: model.generate(tokens, new_tokens, temperature=0.0, cache_kv=True)
    mask = torch.ones_like(tokens)
    return lambda: model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)


def _peer(provider: str) -> str:
    if provider in (PEER, FLASH):
        return peer_version("x-transformers")
    return peer_version("transformers") if provider == LLAMA else ""
