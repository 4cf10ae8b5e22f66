"""THE table of heads that generate: tests/test_generation_contract.py holds each of them to the same contract.

A new head needs a row here (the contract's first test asks for it): its tiny, decisive float64 models, which of them
are held to the whole contract, and which only to "with a cache it says what it says without".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import colt5_models
import generation_models
import perceiver_flash_models
import torch
import x_transformer_image_models
import x_transformer_models
from generation_models import NEW_TOKENS, left_padded, tokens
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache


@dataclass(frozen=True)
class Head:
    """One generating class: `build(variant)` gives a model; the same one every time."""

    build: Callable[[str], PreTrainedModel]
    contract: Sequence[str]
    cached_only: Sequence[str] = ()
    encoder_decoder: bool = False
    # Images `[B, channels, height, width]` for a number of rows, if the encoder sees some beside the source.
    images: Callable[[int], torch.Tensor] | None = None
    # A short row and a long one; prompts are made of these.
    lengths: tuple[int, int] = (3, 7)
    # Variants whose windows do not reach from the end of a generated text back to its beginning.
    short_sighted: Sequence[str] = ()
    # Perceiver AR: of several tokens at once only the last ones have logits.
    latents_only: bool = False


def _without(names, *taken) -> list[str]:
    return [name for name in names if name not in taken]


@cache
def _writer(name: str) -> PreTrainedModel:
    """About images and text, with an output that does not say one token again and again."""
    model = x_transformer_image_models.writer(name)
    torch.manual_seed(6)
    torch.nn.init.normal_(model.lm_head.weight, std=2 * model.config.hidden_size**-0.5)
    return model


_PERFORMER = (
    "softmax", "relu", "elu", "learned positions", "rotary_and_sinusoidal positions", "grouped heads", "token shift",
    "reversible", "local heads in one layer", "local heads only", "bucketed local heads", "full attention last",
    "full attention first", "all at once",
)  # fmt: skip
_COLT5 = ("paper", "two sets of keys", "null tokens", "numbers of tokens")
_PERCEIVER = (
    "learned positions", "rotary", "a stride of one", "two cross-attentions, tied", "values of another size",
    "more latents than tokens",
)  # fmt: skip
HEADS = {
    "PerformerForCausalLM": Head(
        generation_models.causal_model,
        _PERFORMER,
        _without(generation_models.CAUSAL, *_PERFORMER),
        short_sighted=["local heads only"],
    ),
    "PerformerForConditionalGeneration": Head(
        generation_models.encoder_decoder_model, list(generation_models.ENCODER_DECODER), encoder_decoder=True
    ),
    "XTransformerForCausalLM": Head(
        x_transformer_models.causal_model,
        x_transformer_models.SOME,
        _without(x_transformer_models.CAUSAL, *x_transformer_models.SOME),
        short_sighted=["window", "window and scores", "much at once"],
    ),
    "XTransformerForConditionalGeneration": Head(
        x_transformer_models.encoder_decoder_model,
        x_transformer_models.SOME,
        encoder_decoder=True,
        short_sighted=["window", "window and scores", "much at once"],
    ),
    "XTransformerForImageTextToText": Head(
        _writer,
        ["pali", "pali, many options"],
        encoder_decoder=True,
        images=x_transformer_image_models.pixels,
    ),
    "CoLT5ForCausalLM": Head(
        colt5_models.causal_model,
        (*_COLT5[:3], "window of one"),
        _without(colt5_models.CAUSAL, *_COLT5[:3], "window of one"),
        lengths=(3, 17),
    ),
    "CoLT5ForConditionalGeneration": Head(
        colt5_models.conditional_model,
        (*_COLT5, "deeper decoder"),
        _without(colt5_models.DECODERS, *_COLT5, "deeper decoder"),
        encoder_decoder=True,
        lengths=(23, 40),
    ),
    "PerceiverFlashForCausalLM": Head(
        perceiver_flash_models.causal_model,
        _PERCEIVER,
        _without(perceiver_flash_models.CAUSAL, *_PERCEIVER),
        lengths=(4, 13),
        latents_only=True,
    ),
}


# How far a cache reaches, greedy search says; what the others add to it shows after a few tokens.
FEW = {"max_new_tokens": 6}
STRATEGIES = {
    "greedy": {"max_new_tokens": NEW_TOKENS},
    "sampling": {"do_sample": True, **FEW},
    "top-k, top-p, temperature": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5, **FEW},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, **FEW},
    "beams": {"num_beams": 3, **FEW},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, **FEW},
    "beam sampling": {"num_beams": 3, "do_sample": True, **FEW},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **FEW},
}
KINDS = ("greedy", "top-k, top-p, temperature", "beams", "beam sampling")
# transformers 5 keeps these in repositories of their own, which `generate` fetches if it may run their code.
MOVED_OUT = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "group beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beam search": {"num_beams": 3, "force_words_ids": [[5]]},
    "dola generation": {"dola_layers": "low"},
}


def strategies_for(head, variant):
    """All for the first variants of a head, one of each kind for others of the contract."""
    first, others = HEADS[head].contract[:3], HEADS[head].contract[3:]
    return STRATEGIES if variant in first else KINDS if variant in others else ("greedy", "beams")


class Decoder:
    """How a decoder is asked: its prompt is what it continues. Rows of unequal length are padded on the left."""

    def __init__(self, head: str, variant: str):
        self.head, self.variant, self.row = head, variant, HEADS[head]
        self.model = self.row.build(variant)
        self.short, self.long = self.row.lengths

    def prompt(self, *lengths: int) -> dict:
        """Arguments of `run`."""
        ids, mask = left_padded(list(lengths or self.row.lengths))
        return {"ids": ids, "attention_mask": mask}

    def alone(self, prompt: dict, row: int, length: int) -> dict:
        """A row of the prompt without its padding."""
        return {"ids": prompt["ids"][row : row + 1, -length:]}

    def shown(self, prompt: dict) -> int:
        """How many positions the first call has to see."""
        return prompt["ids"].shape[1]

    def continued(self, prompt: dict, sequences: torch.Tensor) -> dict:
        """The prompt with what has been generated behind it."""
        new = sequences.shape[1] - prompt["ids"].shape[1]
        return {
            "ids": sequences,
            "attention_mask": torch.nn.functional.pad(prompt["attention_mask"], (0, new), value=1),
        }

    def embedded(self, prompt: dict) -> dict:
        prompt = dict(prompt)
        return {"inputs_embeds": self.model.get_input_embeddings()(prompt.pop("ids")), **prompt}

    def layers(self) -> list:
        """Of a new cache of the decoder."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers

    @property
    def first_call_reaches_every_row(self) -> bool:
        """XTransformer's memory tokens stand right before the first real token of each row, wherever that matters."""
        config = self.model.config
        return bool(
            getattr(config, "num_memory_tokens", 0)
            and (config.position_bias or config.sliding_window or config.shift_tokens)
        )

    # Without `generate`: a sequence, given to the model in pieces.

    def sequence(self, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
        return left_padded(list(lengths))

    def whole(self, ids: torch.Tensor, mask: torch.Tensor | None = None, model=None, rows=None) -> torch.Tensor:
        """Logits of `ids` without a cache; `rows` says which sources an encoder–decoder reads, one for each row."""
        return self._forward(model or self.model, ids, mask, 0, rows, use_cache=False)

    def cache(self, kind: str, length: int = 96):
        config = self.model.config.get_text_config(decoder=True)
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=length)

    def feed(self, cache, ids: torch.Tensor, split: list[int], mask=None, model=None, rows=None) -> torch.Tensor:
        """Logits of `ids`, given in pieces of these lengths to a model with this cache."""
        logits, start = [], int(cache.get_seq_length())
        for piece in ids.split(split, dim=1):
            options = {"past_key_values": cache, "use_cache": True}
            logits.append(self._forward(model or self.model, piece, mask, start, rows, **options))
            start += piece.shape[1]
            assert cache.get_seq_length() == start
        return torch.cat(logits, dim=1)

    def assert_remembers(self, cache, ids: torch.Tensor, what: str, rows=None) -> None:
        """The cache holds `ids`: what comes next gets the logits that it gets after `ids` without a cache."""
        following = tokens(len(ids), 5, seed=9)
        whole = self.whole(torch.cat((ids, following), dim=1), rows=rows)[:, -1:]
        logits = self.feed(cache, following, [1, 3, 1], rows=rows)[:, -1:]
        torch.testing.assert_close(
            logits, whole, rtol=0, atol=1e-10 * whole.abs().max().item(), msg=lambda text: f"{what}: {text}"
        )

    def _forward(self, model, ids, mask, start, _rows, **keywords):
        if mask is not None:
            end = start + ids.shape[1]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            keywords |= {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        return model(ids, **keywords).logits


class EncoderDecoder(Decoder):
    """How an encoder–decoder is asked: its prompt is the encoder's input, padded on the right."""

    def prompt(self, *lengths: int) -> dict:
        lengths = torch.tensor(lengths or self.row.lengths)
        ids = tokens(len(lengths), int(lengths.max()), seed=4)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"ids": ids * mask, "attention_mask": mask, **self._images(len(ids))}

    def _images(self, count: int) -> dict:
        return {} if self.row.images is None else {"pixel_values": self.row.images(count)}

    def alone(self, prompt: dict, row: int, length: int) -> dict:
        images = {name: value[row : row + 1] for name, value in prompt.items() if name == "pixel_values"}
        return {"ids": prompt["ids"][row : row + 1, :length], **images}

    def encoded(self, prompt: dict, model=None):
        """What the encoder makes of the prompt."""
        dtype = next((model or self.model).parameters()).dtype
        images = {name: value.to(dtype) for name, value in prompt.items() if name == "pixel_values"}
        encoder = (model or self.model).get_encoder()
        return encoder(prompt["ids"], attention_mask=prompt["attention_mask"], **images)

    def shown(self, prompt: dict) -> int:
        return prompt["decoder_input_ids"].shape[1] if "decoder_input_ids" in prompt else 1

    def continued(self, prompt: dict, sequences: torch.Tensor) -> dict:
        # transformers tells from the mask's length that the ids hold what the cache has already seen.
        return prompt | {"decoder_input_ids": sequences, "decoder_attention_mask": torch.ones_like(sequences)}

    def started(self, prompt: dict) -> dict:
        """The prompt with a start of the target: several tokens at once, padded on the left as prompts are."""
        start, mask = tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        return prompt | {"decoder_input_ids": start * mask, "decoder_attention_mask": mask}

    def sequence(self, *lengths: int) -> tuple[torch.Tensor, None]:
        """Targets, whose padding is behind them and therefore no business of a causal decoder."""
        return tokens(len(lengths), max(lengths)), None

    def cache(self, kind: str, length: int = 96):
        config = self.model.config.get_text_config(decoder=True)
        return EncoderDecoderCache(super().cache(kind, length), DynamicCache(config=config))

    def _forward(self, model, ids, _mask, _start, rows, **keywords):
        rows = list(range(len(ids)) if rows is None else rows)
        source = self.prompt(*(self.row.lengths[row % 2] for row in range(max(rows) + 1)))
        encoded = self.encoded(source, model)[0][rows]
        mask = source["attention_mask"][rows]
        return model(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=ids, **keywords).logits


@cache
def ask(head: str, variant: str) -> Decoder:
    return (EncoderDecoder if HEADS[head].encoder_decoder else Decoder)(head, variant)


# (head, variant)
CONTRACT = [(head, variant) for head, row in HEADS.items() for variant in row.contract]
CACHED_ONLY = [(head, variant) for head, row in HEADS.items() for variant in row.cached_only]
DECODERS = [case for case in CONTRACT if not HEADS[case[0]].encoder_decoder]
ENCODER_DECODERS = [case for case in CONTRACT if case not in DECODERS]
