"""The training contract: `Trainer` trains, evaluates and resumes every head of the registry that has a loss.

With the collator that transformers has for the task (tests/training_tasks.py); encoder–decoders with
`Seq2SeqTrainer`, which also generates while it evaluates.
"""

import gc
from functools import cache

import pytest
import torch
from tiny_heads import HEADS
from training_tasks import TASKS, TOKENIZER


# Two steps are an epoch, so the checkpoint stands in the middle of one. Where a collator draws masks it stands between
# two: accelerate fetches one batch ahead, and its masks are drawn before the state of the random numbers is saved.
STEPS, SAVED_AT, SAVED_WITH_MASKS_AT = 6, 3, 4
FEWER_LAYERS = {"perceiver_flash": {}}
LEARNING = [name for name, head in HEADS.items() if head.learns]
# Dropout, so that resuming has to restore the state of the random numbers.
DROPOUT = {
    "colt5": {"dropout_rate": 0.1},
    "performer": {"attention_output_dropout": 0.1, "feature_redraw_interval": 3},
    "perceiver_flash": {"attention_dropout": 0.1, "feed_forward_dropout": 0.1},
    "x_transformer": {"attention_dropout": 0.1, "feed_forward_dropout": 0.1},
}
heads = pytest.mark.parametrize("head", LEARNING)
# A layer or two on a body that another head has too: their backward pass is not traced once more.
ON_ANOTHER_BODY = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


def make(head, seed=0, **options):
    torch.manual_seed(seed)
    row = HEADS[head]
    return row.model_class(row.config(vocab_size=len(TOKENIZER), **DROPOUT[row.model_type], **options))


def saved_at(head):
    return SAVED_WITH_MASKS_AT if HEADS[head].auto_class == "AutoModelForMaskedLM" else SAVED_AT


def trainer_for(head, model, folder, **arguments):
    task = TASKS[HEADS[head].auto_class]
    settings = {
        "max_steps": STEPS,
        "save_steps": saved_at(head),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **(task.options or {}),
        **arguments,
    }
    rows = task.rows()
    return task.trainer(
        model,
        task.arguments(str(folder), **settings),
        data_collator=task.collator(model),
        train_dataset=rows,
        eval_dataset=rows,
    )


def evaluate(trainer):
    with torch.random.fork_rng():
        torch.manual_seed(1)  # a collator of masked language modelling draws its masks
        return trainer.evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By head: the trainer of a finished run, its folder, and the evaluation loss before it."""

    @cache
    def run(head):
        folder = tmp_path_factory.mktemp(head)
        trainer = trainer_for(head, make(head), folder)
        before = evaluate(trainer)
        trainer.train()
        return trainer, folder, before

    return run


def test_every_head_with_a_loss_has_a_task():
    assert {HEADS[name].auto_class for name in LEARNING} <= set(TASKS), "tests/training_tasks.py"


@pytest.mark.matrix("Trainer")
@heads
def test_trains_and_evaluates(head, trained):
    trainer, _, before = trained(head)
    assert trainer.state.global_step == STEPS
    assert evaluate(trainer) < before


@pytest.mark.matrix("resume")
@heads
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(head, trained, tmp_path):
    whole, folder, _ = trained(head)
    again = trainer_for(head, make(head, seed=1), tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{saved_at(head)}"))
    assert again.state.global_step == STEPS
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.matrix("bf16")
@heads
def test_trains_in_bf16(head, tmp_path):
    trainer = trainer_for(head, make(head), tmp_path, bf16=True, save_strategy="no", max_steps=4)
    before = evaluate(trainer)
    trainer.train()
    assert evaluate(trainer) < before


def batch(head, model):
    task = TASKS[HEADS[head].auto_class]
    torch.manual_seed(2)
    return task.collator(model)(task.rows()[:3])


@pytest.mark.matrix("checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
@heads
def test_checkpointing_changes_no_gradient(head, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = make(head).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**batch(head, model)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # In reentrant form, gradients of the encoder's states are added up in another order.
    rounding = reentrant and HEADS[head].config().is_encoder_decoder
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if rounding else {"rtol": 0, "atol": 0}
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(
            gradients[1][name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def garbage_left():
    """A graph is made of so many small objects that to search them for garbage takes a tenth of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.matrix("compile")
@pytest.mark.usefixtures("garbage_left")
@pytest.mark.parametrize("head", HEADS)
def test_a_step_is_one_graph(head):
    """`torch.compile(fullgraph=True)`, without the time it takes to generate code: one graph, and the same gradients.

    The backward pass is a graph of its own too, but for the heads `ON_ANOTHER_BODY`.
    """
    torch.compiler.reset()
    row = HEADS[head]
    model = make(head, **FEWER_LAYERS.get(row.model_type, {"num_hidden_layers": 1})).eval()
    inputs, gradients = batch(head, model) if row.learns else row.inputs(), []
    backend = "eager" if head.endswith(ON_ANOTHER_BODY) else "aot_eager_default_partitioner"
    for function in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        output = function(**inputs)
        loss = output.loss if row.learns else output[0].square().mean()
        loss.backward()
        gradients.append({"loss": loss} | {name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda text, name=name: f"{name}: {text}")
