"""Decoding with whole models of one size: Performer, performer-pytorch, transformers' GPT-2."""

import contextlib
import io
import math
import time
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from benchmark_measure import Row, peer_version, summary
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efficient import PerformerConfig, PerformerForCausalLM


class Sizes(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int


SMALL = Sizes(256, 256, 6, 4)  # about 4.9 million parameters
WIDE = Sizes(32_000, 768, 6, 12)  # the width of GPT-2's smallest, whose weights fit no cache of a processor
# A generation without a cache takes minutes: it is not repeated. Its length averages over hundreds of steps.
REPEATS_LIMIT = 15.0  # seconds
DECODE_STEPS = 64
# So many times as many calls as of other work: two cached models, or two contexts of one, differ by less than two of
# its calls.
GENERATIONS = 3


def measure_generation(prompt: int, new_tokens: int, repeats: int, peers: bool = True) -> Iterator[Row]:
    """`generate` as a user calls it: greedy, a prompt of random bytes, one row."""
    torch.manual_seed(0)
    tokens = torch.randint(SMALL.vocabulary, (1, prompt))
    models = {"ours": performer(), "gpt2": gpt2(prompt + new_tokens)}
    calls = {name: _transformers_call(model, tokens, new_tokens) for name, model in models.items()}
    if peers:
        models["performer-pytorch"] = performer_pytorch(prompt + new_tokens)
        calls["performer-pytorch"] = _performer_pytorch_call(models["performer-pytorch"], tokens, new_tokens)
    for name, samples in _in_turns(calls, GENERATIONS * repeats).items():
        yield _row("generate", name, f"{prompt}+{new_tokens}", prompt + new_tokens, samples, new_tokens, models[name])


def measure_wide_generation(prompt: int, new_tokens: int, repeats: int, sizes: Sizes = WIDE) -> Iterator[Row]:
    """As `measure_generation`, of models as wide as people have them, for one row and for four."""
    for batch in (1, 4):
        torch.manual_seed(0)
        tokens = torch.randint(sizes.vocabulary, (batch, prompt))
        models = {"ours": performer(sizes), "gpt2": gpt2(prompt + new_tokens, sizes)}
        calls = {name: _transformers_call(model, tokens, new_tokens) for name, model in models.items()}
        for name, samples in _in_turns(calls, repeats).items():
            mode = f"{batch} × {prompt}+{new_tokens}"
            made = batch * new_tokens
            yield _row("generate_wide", name, mode, prompt + new_tokens, samples, made, models[name], sizes)


def measure_decoding(contexts: list[int], repeats: int) -> Iterator[Row]:
    """Tokens per second of single steps behind a context of that many tokens, and the bytes that the cache holds.

    All contexts in turns: how their times compare is what is asked.
    """
    steps, repeats = min(DECODE_STEPS, min(contexts) // 2), GENERATIONS * repeats
    models, caches, calls = {}, {}, {}
    for context in contexts:
        torch.manual_seed(0)
        tokens = torch.randint(SMALL.vocabulary, (1, context))
        for name, model in {"ours": performer(), "gpt2": gpt2(context + steps)}.items():
            key = context, name
            with torch.no_grad():
                caches[key] = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
            grows = name == "gpt2"
            models[key], calls[key] = model, _step_call(model, caches[key], tokens[:, -1:], steps, grows)
    sizes = {key: cache_bytes(cache) for key, cache in caches.items()}
    for key, samples in _in_turns(calls, repeats).items():
        context, name = key
        row = _row("decode", name, f"{steps} steps", context, samples, steps, models[key])
        row.cache_bytes = sizes[key]
        yield row


def performer(sizes: Sizes = SMALL) -> nn.Module:
    config = PerformerConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        hidden_act="gelu_pytorch_tanh",  # as GPT-2; performer-pytorch has the exact one
        is_decoder=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    return PerformerForCausalLM(config).eval()


def gpt2(positions: int, sizes: Sizes = SMALL) -> nn.Module:
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=positions,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def performer_pytorch(positions: int) -> nn.Module:
    from performer_pytorch import AutoregressiveWrapper, PerformerLM

    with contextlib.redirect_stdout(io.StringIO()):  # it says that its CUDA extension is missing
        model = PerformerLM(
            num_tokens=SMALL.vocabulary,
            max_seq_len=positions,
            dim=SMALL.width,
            depth=SMALL.layers,
            heads=SMALL.heads,
            dim_head=SMALL.width // SMALL.heads,
            causal=True,
        )
    return AutoregressiveWrapper(model).eval()


def cache_bytes(cache) -> int:
    """Bytes of all tensors in a cache, wherever its layers keep them; storage shared by two of them counts once."""
    storages, seen, stack = {}, set(), list(cache.layers)
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(storages.values())


def _transformers_call(model, tokens, new_tokens):
    mask = torch.ones_like(tokens)

    def call():
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
        assert out.shape[1] == tokens.shape[1] + new_tokens

    return call


def _performer_pytorch_call(model, tokens, new_tokens):
    def call():
        assert model.generate(tokens, new_tokens).shape[1] == new_tokens

    return call


def _step_call(model, cache, token, steps, grows):
    """So many steps; a cache that `grows` is as long as before after each call."""

    def call():
        with torch.no_grad():
            next_token = token
            for _ in range(steps):
                logits = model(next_token, past_key_values=cache, use_cache=True).logits
                next_token = logits[:, -1:].argmax(-1)
        if grows:
            cache.crop(-steps)

    return call


def _in_turns(calls: dict[Hashable, Callable], repeats: int) -> dict[Hashable, list[float]]:
    """As `benchmark_measure.time_rounds`; a call that takes longer than `REPEATS_LIMIT` is made once."""
    times = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        first = 1e3 * (time.perf_counter() - start)
        times[name] = [first] if first > 1e3 * REPEATS_LIMIT else []
    for _ in range(repeats):
        for name, call in calls.items():
            if not times[name] or times[name][0] <= 1e3 * REPEATS_LIMIT:
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _row(name, provider, mode, length, samples, tokens, model, sizes=SMALL):
    spread = summary(samples)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return Row(
        name=name,
        provider=provider,
        mode=mode,
        length=length,
        **spread,
        tokens_per_second=1e3 * tokens / spread["median"] if spread["median"] else math.nan,
        sizes=f"{millions:.1f}M parameters, width {sizes.width}, {sizes.layers} layers, {sizes.heads} heads",
        peer=peer_version("performer-pytorch") if provider == "performer-pytorch" else "",
    )
