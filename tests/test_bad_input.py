"""Bad input stops at the door: the message names what was wrong, what was expected and what came."""

import json
import shutil

import pytest
import torch
from generation_models import SIZES, VOCABULARY
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, DynamicCache

from hf_efficient import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerModel,
)


@pytest.fixture(scope="module")
def model():
    return PerformerForCausalLM(PerformerConfig(**SIZES)).eval()


IDS = torch.randint(0, VOCABULARY, (2, 7))
INPUTS = {
    "neither": ({}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 7, 32)}, "got both"),
    "one axis": ({"input_ids": IDS[0]}, r"input_ids must be int64 or int32 of shape \[batch, length\].*\(7,\)"),
    "floats": ({"input_ids": IDS.float()}, "input_ids must be int64 or int32.*float32"),
    "id too large": ({"input_ids": IDS + VOCABULARY}, f"input_ids must be between 0 and {VOCABULARY - 1}, got "),
    "negative id": ({"input_ids": IDS - VOCABULARY}, f"input_ids must be between 0 and {VOCABULARY - 1}, got -"),
    "wide embeddings": ({"inputs_embeds": torch.zeros(2, 7, 33)}, r"shape \[batch, length, 32\].*\(2, 7, 33\)"),
    "integer embeddings": ({"inputs_embeds": torch.zeros(2, 7, 32, dtype=torch.int64)}, "floating point.*int64"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 6)}, r"shape \(2, 7\).*\(2, 6\)"),
    "mask of four axes": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 7)}, r"attention_mask must have"),
    "a cache of another model": ({"input_ids": IDS, "past_key_values": DynamicCache()}, "DynamicCache\\(config="),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(model, name):
    arguments, message = INPUTS[name]
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_mask_must_cover_the_cached_tokens(model):
    cache = model(IDS).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 9\).*cached.*got \(2, 2\)"):
        model(IDS[:, :2], past_key_values=cache, attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize("kind", ["learned", "axial"])
def test_sequences_beyond_a_learned_table(kind):
    options = {"position_embedding_type": kind, "max_position_embeddings": 8, "axial_position_shape": [2, 4]}
    model = PerformerForCausalLM(PerformerConfig(**{**SIZES, **options}))
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="before position 8 .*got position 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="before position 8"):
        model.generate(torch.ones(1, 6, dtype=torch.long), max_new_tokens=6, pad_token_id=0)


def test_an_encoder_takes_no_cache_and_a_stack_no_missing_encoder():
    encoder = PerformerModel(PerformerConfig(**SIZES))
    cache = DynamicCache(config=encoder.config)
    with pytest.raises(ValueError, match="past_key_values needs is_decoder=True"):
        encoder(IDS, past_key_values=cache)
    crossing = PerformerModel(PerformerConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        crossing(IDS)


CONFIGURATIONS = {
    "heads that do not divide": ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    "a wrong type": ({"hidden_size": "32"}, "hidden_size.*expected int, got str"),
    "an unknown feature map": ({"feature_map": "cosine"}, "feature_map.*cosine"),
    "odd hyperbolic features": ({"feature_map": "hyperbolic", "num_random_features": 15}, "must be even.*15"),
    "negative epsilon": ({"feature_epsilon": -1.0}, "feature_epsilon must not be negative, got -1.0"),
    "no interval": ({"feature_redraw_interval": 0}, "feature_redraw_interval must be None or at least 1, got 0"),
    "layer types of another length": ({"layer_types": ["full_attention"]}, r"layer_types must have .*\(2\).*got 1"),
    "an unknown layer type": ({"layer_types": ["mamba"] * 2}, "'linear_attention' or 'full_attention', got"),
    "too many local heads": ({"num_local_attention_heads": 5}, r"between 0 and num_attention_heads \(4\), got 5"),
    "local heads of another depth": ({"num_local_attention_heads": [1]}, r"num_hidden_layers \(2\) entries, got 1"),
    "local and grouped heads": (
        {"num_local_attention_heads": 1, "num_key_value_heads": 2},
        "num_key_value_heads must be 4, got 2",
    ),
    "grouped heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
    "a sure dropout": ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
    "post ReZero": ({"norm_type": "rezero", "norm_position": "post"}, "norm_position='post' needs a norm"),
    "post reversible": ({"reversible": True, "norm_position": "post"}, "reversible=True needs norm_position='pre'"),
    "a leaking cache": (
        {"feature_stabilizer": "sequence", "is_decoder": True, "use_cache": True},
        "use_cache must be False, got True",
    ),
    "a leaking relu": ({"feature_stabilizer": "sequence", "feature_map": "relu"}, "belongs to feature_map='softmax'"),
    "a shifted decoder": (
        {"shifted_local_rotary": True, "local_attention_type": "bucketed", "is_decoder": True},
        "shifted_local_rotary=True belongs to the bucketed heads of an encoder",
    ),
    "an odd rotary head": ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
    "a small axial table": (
        {"axial_position_shape": [2, 4], "position_embedding_type": "axial"},
        r"product is at least max_position_embeddings \(96\)",
    ),
    "an encoder without one": ({"encoder_overrides": {"num_hidden_layers": 1}}, "needs is_encoder_decoder=True"),
    "an encoder with unknown fields": (
        {"encoder_overrides": {"depth": 1}, "is_encoder_decoder": True},
        r"must hold fields of PerformerConfig, got \['depth'\]",
    ),
    "an encoder of another width": (
        {"encoder_overrides": {"hidden_size": 64}, "is_encoder_decoder": True},
        r"must keep hidden_size \(32\).*got 64",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name):
    options, message = CONFIGURATIONS[name]
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        PerformerConfig(**{**SIZES, **options})


def test_configurations_that_do_not_fit_a_class():
    with pytest.raises(ValueError, match="config.is_decoder must be False, got True"):
        PerformerForMaskedLM(PerformerConfig(**SIZES, is_decoder=True))
    with pytest.raises(ValueError, match="config.is_encoder_decoder=True, got False"):
        PerformerForConditionalGeneration(PerformerConfig(**SIZES))
    with pytest.raises(ValueError, match="use PerformerForConditionalGeneration"):
        PerformerModel(PerformerConfig(**SIZES, is_encoder_decoder=True))
    model = PerformerForConditionalGeneration(PerformerConfig(**SIZES, is_encoder_decoder=True))
    with pytest.raises(ValueError, match="config.decoder_start_token_id and config.pad_token_id, got None and 0"):
        model(IDS, labels=IDS)


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("content", ["half", "garbage", "nothing"])
def test_broken_weights(checkpoint, content):
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"half": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "nothing": b""}[content])
    with pytest.raises(ValueError, match=r"checkpoint' must be whole safetensors files, got one that cannot be read"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_missing_weights_and_broken_configuration(checkpoint):
    moved = checkpoint.parent / "elsewhere"
    shutil.copytree(checkpoint, moved)
    (moved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(moved)
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings)[:99])
    with pytest.raises(OSError, match="not a valid JSON file"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 5}))
    with pytest.raises((ValueError, StrictDataclassError), match="num_key_value_heads must divide"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**settings, "intermediate_size": 40}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_unwritable_output_folder(model, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    for place in (occupied, occupied / "below", "/proc/nowhere"):
        with pytest.raises(ValueError, match="save_directory must be a folder that can be written to, got "):
            model.save_pretrained(place)
    assert occupied.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [occupied]
