"""Trainer trains a Performer in every way its arguments offer: bf16, compiled, checkpointed, on two processes."""

import json

import pytest
import torch
from generation_models import SIZES, VOCABULARY
from helpers import run_warm_python
from transformers import Trainer, TrainingArguments

from hf_efficient import PerformerConfig, PerformerForCausalLM


def make(**options):
    torch.manual_seed(0)
    return PerformerForCausalLM(PerformerConfig(**{**SIZES, "feature_redraw_interval": 5, **options}))


def train(folder, model, **arguments):
    """Train on a text that repeats itself; returns the losses."""
    row = torch.arange(33) % 11 + 5
    data = [{"input_ids": row, "labels": row}] * 64
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
    trainer = Trainer(model, TrainingArguments(str(folder), **settings | arguments), train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_model_in_bf16_trains_and_keeps_its_counters(tmp_path):
    model = make().to(torch.bfloat16)
    losses = train(tmp_path, model, max_steps=20)
    assert losses[-1] < 0.7 * losses[0]
    assert model.model.num_redraws == 3 and model.model.num_redraws.dtype == torch.int64


@pytest.mark.slow
def test_compiled_training_follows_the_plain_one(tmp_path):
    plain = train(tmp_path, make())
    compiled = train(tmp_path, make(), torch_compile=True, torch_compile_backend="inductor")
    assert torch.allclose(torch.tensor(plain), torch.tensor(compiled), rtol=1e-3)
    assert plain[-1] < 0.7 * plain[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_weight(tmp_path, reentrant):
    plain, checkpointed = make(), make()
    train(tmp_path, plain)
    train(
        tmp_path,
        checkpointed,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert plain.model.num_redraws == 2, "the run must cross a redraw"
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, checkpointed.state_dict()[name]), name


DDP = """
import sys, json, os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
child = os.fork()
rank = 0 if child else 1
from hf_efficient import PerformerConfig, PerformerForCausalLM
settings, folder = json.loads(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = PerformerForCausalLM(PerformerConfig(**settings))
ids = torch.load(folder + "/ids.pt")[:, 2 * rank : 2 * rank + 2]
wrapped = DistributedDataParallel(model, broadcast_buffers=False)  # equal features must not need a broadcast
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in ids:
    optimizer.zero_grad()
    wrapped(batch, labels=batch).loss.backward()
    optimizer.step()
torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("reversible", [False, True])
def test_two_processes_draw_the_same_features_and_match_one_with_the_doubled_batch(tmp_path, reversible):
    settings = {**SIZES, "feature_redraw_interval": 2, "reversible": reversible}
    ids = torch.randint(3, VOCABULARY, (5, 4, 12))
    torch.save(ids, tmp_path / "ids.pt")
    run_warm_python("-c", DDP, json.dumps(settings), tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["model.num_redraws"] == 2
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name

    torch.manual_seed(0)
    alone = PerformerForCausalLM(PerformerConfig(**settings))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for batch in ids:
        optimizer.zero_grad()
        alone(batch, labels=batch).loss.backward()
        optimizer.step()
    for name, tensor in alone.state_dict().items():
        exact = "projection" in name or "redraw" in name
        close = torch.equal(tensor, ranks[0][name]) if exact else torch.allclose(tensor, ranks[0][name], atol=1e-5)
        assert close, name


def test_reversible_training_through_trainer(tmp_path):
    losses = train(tmp_path, make(reversible=True))
    assert losses[-1] < 0.7 * losses[0]


def test_gradient_accumulation_matches_the_whole_batch(tmp_path):
    """Projections are drawn once a forward, so the comparison keeps them still."""
    whole, parts = (make(feature_redraw_interval=None) for _ in range(2))
    train(tmp_path, whole, max_steps=4)
    train(tmp_path, parts, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, parts.state_dict()[name], atol=1e-4), name
