"""Config and model of a training run, from a checkpoint or from nothing."""

import dataclasses
import difflib
import json
import re

import torch
from safetensors import SafetensorError
from train_arguments import ModelArguments
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


DEFAULT_BLOCK_SIZE = 1024
OVERRIDE_SEPARATOR = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")  # a comma before the next "name=", not one in a list


def parse_value(text: str):
    """A JSON value where the text is one, Python's True, False and None, else the text itself."""
    python_words = {"True": True, "False": False, "None": None}
    if text in python_words:
        return python_words[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_config_overrides(overrides: str | None) -> dict:
    """`"hidden_size=256,layer_types=[...]"` or a JSON object, as a dict."""
    if not overrides or not overrides.strip():
        return {}
    if overrides.lstrip().startswith("{"):
        try:
            return json.loads(overrides)
        except json.JSONDecodeError as error:
            raise ValueError(f"--config_overrides must be a valid JSON object, got {overrides!r}: {error}") from error
    values = {}
    for pair in OVERRIDE_SEPARATOR.split(overrides):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--config_overrides must be name=value pairs parted by commas, got {pair!r}")
        values[name.strip()] = parse_value(value.strip())
    return values


def config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Every name the config understands, aliases included."""
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


def check_override_names(config_class: type[PreTrainedConfig], overrides: dict) -> None:
    # Unknown names would become attributes that nothing reads: the run would silently be another one than asked for.
    known = config_fields(config_class)
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"--config_overrides must name fields of {config_class.__name__}, got {name!r}{hint}")


def hub_options(arguments: ModelArguments) -> dict:
    return {
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def fields_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a model trained from nothing takes from its tokenizer: the size of the vocabulary and the special ids."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The config before the data has its say: it decides the objective, and the objective what is read."""
    overrides = parse_config_overrides(arguments.config_overrides)
    if arguments.model_type is not None:
        if arguments.model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(arguments.model_type, CONFIG_MAPPING.keys())
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"--model_type must be known to AutoConfig, got {arguments.model_type!r}{hint}")
        check_override_names(CONFIG_MAPPING[arguments.model_type], overrides)
        # Built with the overrides and not changed after: fields that are derived from others come out right.
        return AutoConfig.for_model(arguments.model_type, **overrides)
    source = arguments.model_name_or_path or arguments.config_name
    options = hub_options(arguments)
    config = AutoConfig.from_pretrained(source, **options)
    if overrides:
        check_override_names(type(config), overrides)
        config = AutoConfig.from_pretrained(source, **options, **overrides)
    return config


def with_fields(config: PreTrainedConfig, arguments: ModelArguments, fields: dict) -> PreTrainedConfig:
    """The config with those of `fields` that it has, unless --config_overrides sets them."""
    overrides = parse_config_overrides(arguments.config_overrides)
    known = config_fields(type(config))
    fields = {name: value for name, value in fields.items() if name in known and name not in overrides}
    if not fields:
        return config
    if arguments.model_type is not None:
        return AutoConfig.for_model(arguments.model_type, **{**fields, **overrides})
    source = arguments.model_name_or_path or arguments.config_name
    return AutoConfig.from_pretrained(source, **hub_options(arguments), **{**fields, **overrides})


def resolve_block_size(config: PreTrainedConfig, wish: int | None) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return wish or DEFAULT_BLOCK_SIZE
    if wish is not None and wish > limit:
        raise ValueError(
            f"--block_size must be at most the model's max_position_embeddings of {limit}, got {wish} "
            "(a model trained from scratch takes more with --config_overrides max_position_embeddings=...)"
        )
    return wish or min(DEFAULT_BLOCK_SIZE, limit)


def resolve_dtype(name: str | None) -> torch.dtype | str:
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name or "float32", None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype must be auto or a floating-point dtype such as bfloat16, got {name!r}")
    return dtype


def load_model(config: PreTrainedConfig, arguments: ModelArguments, auto_class: type) -> PreTrainedModel:
    """The model that an Auto class makes of the config: with random weights, or with a checkpoint's."""
    dtype = resolve_dtype(arguments.dtype)
    if arguments.model_name_or_path is None:
        return auto_class.from_config(
            config,
            dtype=torch.float32 if dtype == "auto" else dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    try:
        return auto_class.from_pretrained(
            arguments.model_name_or_path, config=config, dtype=dtype, **hub_options(arguments)
        )
    except SafetensorError as error:
        raise ValueError(
            f"--model_name_or_path must hold whole weights, got {arguments.model_name_or_path!r}: {error}"
        ) from error


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, from_checkpoint: bool) -> None:
    """Makes room for every token of the tokenizer.

    Raises:
        ValueError: there is none in a model trained from scratch, whose size somebody chose.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if size >= len(tokenizer):
        return
    if not from_checkpoint:
        raise ValueError(f"vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got {size}")
    model.resize_token_embeddings(len(tokenizer))


def set_decoder_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where nothing says how a decoder starts, it starts as T5's: with the token for padding."""
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = tokenizer.pad_token_id
    if model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
