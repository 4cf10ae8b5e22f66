"""Whole models on a GPU: Performer beside GPT-2 in training and decoding, CoLT5 beside LongT5, both Perceivers."""

from collections.abc import Iterator

import torch
from benchmark_gpu_work import on_gpu
from benchmark_measure import Row, peer_version, summary
from benchmark_perceiver import QUICK_SIZES, WIDTH, ours, perceiver_pytorch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LongT5Config, LongT5EncoderModel

from hf_efficient import CoLT5Config, CoLT5EncoderModel, PerformerConfig, PerformerForCausalLM


DECODE_STEPS = 16
INPUTS_PER_TOKEN = 4  # a Perceiver reads four times as many inputs as the others read tokens
# Rows that keep a GPU busy: with two, CoLT5 waited for Python, with one, both Perceivers. LongT5 gets two: what one
# and two of its layers keep for the backward pass on a CPU comes to 170 GiB for all twelve and four rows of 16,384.
ENCODER_ROWS, PERCEIVER_ROWS = {"ours": 4, "longt5": 2}, 8


def models(device: torch.device, positions: int) -> dict[str, nn.Module]:
    """Both with the widths of GPT-2's smallest model: 12 layers of 768, heads of 64."""
    full = on_gpu(device)
    width, layers, vocabulary = (768, 12, 50257) if full else (32, 1, 64)
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}
    performer = PerformerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        is_decoder=True,
        **tokens,
    )
    gpt2 = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64 or 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **tokens,
    )
    with device:  # drawing the weights on a CPU took longer than measuring
        return {"ours": PerformerForCausalLM(performer), "gpt2": GPT2LMHeadModel(gpt2)}


def measure_training(length: int, device: torch.device, repeats: int, time) -> Iterator[Row]:
    """One step of `Trainer`'s work: forward and backward in bfloat16 autocast, one row of this length.

    `time(call, device, repeats)` gives milliseconds.
    """
    tokens = torch.randint(64, (1, length), device=device)
    for name, model in models(device, length).items():
        model.train()

        def step(model=model):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        samples = time(step, device, repeats)
        yield _row("train", name, "forward+backward", length, samples, length, model)


def measure_encoders(length: int, device: torch.device, repeats: int, time) -> Iterator[Row]:
    """CoLT5 and LongT5 (transient-global) of their papers' base sizes; forward and backward in autocast."""
    small = {} if on_gpu(device) else {"num_layers": 1, "d_model": 32, "d_ff": 64, "num_heads": 2, "d_kv": 16}
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    longt5 = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu"}
    with device:
        encoders = {
            "ours": CoLT5EncoderModel(CoLT5Config(**({} if on_gpu(device) else tiny))),
            "longt5": LongT5EncoderModel(LongT5Config(encoder_attention_type="transient-global", **longt5 | small)),
        }
    for name, model in encoders.items():
        model.train()
        rows = ENCODER_ROWS[name] if on_gpu(device) else 1
        tokens = torch.randint(3, 64, (rows, length), device=device)
        step = _mean_square_step(
            model, device, lambda model=model, tokens=tokens: model(input_ids=tokens).last_hidden_state
        )
        samples = time(step, device, repeats)
        yield _row("encoder", name, "forward+backward", length, samples, rows * length, model)
        model.to("cpu")


def measure_perceivers(length: int, device: torch.device, repeats: int, time) -> Iterator[Row]:
    """The Perceivers of `benchmark_perceiver.py`; forward and backward in autocast."""
    length *= INPUTS_PER_TOKEN
    rows, sizes = (PERCEIVER_ROWS, {}) if on_gpu(device) else (1, QUICK_SIZES)
    inputs = torch.randn(rows, length, WIDTH, device=device)
    with device:
        models = {"ours": ours(**sizes), "perceiver-pytorch": perceiver_pytorch(**sizes)}
    for name, model in models.items():
        run = _reader(model, inputs, name == "ours")
        samples = time(_mean_square_step(model, device, run), device, repeats)
        row = _row("perceiver", name, "forward+backward", length, samples, rows * length, model)
        row.peer = "" if name == "ours" else peer_version(name)
        yield row


def _reader(model, inputs, named):
    return (lambda: model(inputs=inputs).last_hidden_state) if named else lambda: model(inputs)


def _mean_square_step(model, device, run):
    def step():
        with torch.autocast(device.type, torch.bfloat16):
            output = run()
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def measure_decoding(context: int, device: torch.device, repeats: int, time) -> Iterator[Row]:
    """Single steps behind this context, bfloat16 weights."""
    steps = DECODE_STEPS if on_gpu(device) else 2
    tokens = torch.randint(64, (1, context), device=device)
    # Room in GPT-2's position table for the steps that warm up too.
    room = context + steps * (max(repeats, 10) + 4)
    for name, model in models(device, room).items():
        model = model.to(torch.bfloat16).eval()
        with torch.no_grad():
            cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

        def decode(model=model, cache=cache):
            token = tokens[:, -1:]
            with torch.no_grad():
                for _ in range(steps):
                    token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        samples = time(decode, device, repeats)
        yield _row("decode", name, f"{steps} steps", context, samples, steps, model)


def _row(name, provider, mode, length, samples, tokens, model):
    spread = summary(samples)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return Row(
        name,
        provider,
        mode,
        length,
        **spread,
        tokens_per_second=1e3 * tokens / spread["median"],
        sizes=f"{millions:.1f}M parameters",
        dtype="bfloat16",
    )
