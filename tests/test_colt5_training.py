"""Trainer trains a CoLT5, resumes it to the bit, and compiles it."""

import pytest
import torch
from colt5_models import SIZES, VOCABULARY
from transformers import Trainer, TrainingArguments

from hf_efficient import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForImageClassification,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5Model,
)


CLASSES = pytest.mark.parametrize(
    "model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM], ids=["conditional", "causal"]
)


def make(model_class, **options):
    torch.manual_seed(0)
    return model_class(CoLT5Config(**{**SIZES, "dropout_rate": 0.1, **options}))


def train(folder, model, resume=None, **arguments):
    """Train on a text that repeats itself; returns the losses."""
    row = torch.arange(40) % 11 + 5
    labels = row if isinstance(model, CoLT5ForCausalLM) else row[:9]
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    data = [{"input_ids": row, "labels": labels}] * 48
    trainer = Trainer(model, TrainingArguments(str(folder), **settings | arguments), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@CLASSES
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_falls(tmp_path, model_class, bf16):
    losses = train(tmp_path, make(model_class), bf16=bf16)
    assert losses[-1] < 0.7 * losses[0]


@CLASSES
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, model_class):
    whole, first, second = (make(model_class) for _ in range(3))
    train(tmp_path / "whole", whole, max_steps=6)
    train(tmp_path / "parts", first, max_steps=6, save_strategy="steps", save_steps=3)
    train(tmp_path / "again", second, str(tmp_path / "parts/checkpoint-3"), max_steps=6)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@CLASSES
def test_checkpointing_changes_no_weight(tmp_path, model_class):
    plain, checkpointed = make(model_class), make(model_class)
    train(tmp_path, plain, max_steps=3)
    train(tmp_path, checkpointed, max_steps=3, gradient_checkpointing=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, checkpointed.state_dict()[name]), name


TOKENS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": TOKENS, "attention_mask": (torch.arange(20) < torch.tensor([[20], [13]])).long()}
COMPILED = {
    CoLT5Model: PADDED | {"decoder_input_ids": TOKENS[:, :7]},
    CoLT5EncoderModel: PADDED,
    CoLT5ForConditionalGeneration: PADDED | {"labels": TOKENS[:, :7]},
    CoLT5ForCausalLM: PADDED | {"labels": TOKENS},
    CoLT5ForSequenceClassification: PADDED | {"labels": torch.tensor([0, 1])},
    CoLT5ForQuestionAnswering: PADDED
    | {"start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([4, 9])},
    CoLT5ForImageClassification: {"pixel_values": torch.linspace(0, 1, 1536).view(2, 3, 16, 16)},
}


@pytest.mark.parametrize("model_class", COMPILED, ids=lambda c: c.__name__)
def test_a_whole_step_is_one_graph(model_class):
    """`torch.compile(fullgraph=True)`, forward and backward, without the time it takes to generate code."""
    model, inputs = make(model_class, num_hidden_layers=1).eval(), COMPILED[model_class]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (model, compiled):
        model.zero_grad()
        output = function(**inputs)
        (output[0] if output[0].ndim == 0 else output[0].square().mean()).backward()
        gradients.append([output[0], *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
