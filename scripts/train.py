"""Trains or fine-tunes a model with `Trainer`: Performer, its siblings, or any that the Auto classes know.

    python scripts/train.py --model_type performer --config_overrides "hidden_size=256,num_hidden_layers=4" \
        --output_dir out --do_train --do_eval
    python scripts/train.py --model_name_or_path out --text_folder my_notes --output_dir tuned --do_train --do_eval
    torchrun --nproc_per_node 2 scripts/train.py run.yaml

`--objective` says what it learns (`task_table.py` lists the objectives). Without a source of data it takes what the
machine has, for text the Python standard library's own sources; without a tokenizer, bytes. All arguments of
`TrainingArguments` hold (`--help` lists them); one JSON or YAML file can stand for the whole command line.
"""

import logging
from pathlib import Path

import datasets
import torch
import transformers
from muon_adamw import MuonAdamW
from output_folder import find_resume_point, remove_checkpoints, require_free, require_writable
from task_table import TASKS, resolve_objective
from train_arguments import Arguments, OutputArguments
from train_command_line import check_objective_arguments, parse_arguments
from training_model import load_config, load_model, with_fields
from training_task import TrainingTask
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_efficient.model_card import WritesModelCard  # and registers our architectures with the Auto classes


logger = logging.getLogger(__name__)


def set_up_logging(training: TrainingArguments) -> None:
    """One voice per run: the main process at the chosen level, the others where --log_level_replica puts them."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training.get_process_log_level()
    logger.setLevel(min(level, logging.INFO) if training.should_log else level)
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    if training.disable_tqdm or not training.should_log:
        datasets.disable_progress_bars()


def prepare_output(output: OutputArguments, training: TrainingArguments) -> str | None:
    """Settles what happens to the output folder; returns the checkpoint to resume from."""
    resume_point = None
    with training.main_process_first(local=False, desc="checking the output folder"):
        if training.do_train:
            resume_point = find_resume_point(training.output_dir, training.resume_from_checkpoint)
            require_free(
                training.output_dir,
                resuming=resume_point is not None,
                overwrite=output.overwrite_output_dir or training.process_index != 0,
            )
        require_writable(training.output_dir)
        if output.overwrite_output_dir and training.do_train and training.process_index == 0:
            remove_checkpoints(training.output_dir)
    if resume_point is not None:
        logger.info("resuming from %s", resume_point)
    return resume_point


def make_optimizer(model: PreTrainedModel, arguments: Arguments) -> MuonAdamW | None:
    """The optimizer that `Trainer` cannot make, or None for one of its own."""
    matrix_lr, training = arguments.optimizer.matrix_learning_rate, arguments.training
    if matrix_lr is None:
        return None
    return MuonAdamW(
        model,
        lr=training.learning_rate,
        matrix_lr=matrix_lr,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
    )


def save_result(trainer: Trainer) -> None:
    """Weights, config, code and processor, ready to be shared."""
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        # A pickle, which Trainer reads from its own checkpoints only; a folder to be shared holds none.
        (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


def describe_result(trainer: Trainer, task: TrainingTask, description: str) -> None:
    """The model card beside the weights; with --push_to_hub, all of it on the Hub."""
    checkpoint = task.arguments.model.model_name_or_path
    if checkpoint is None:
        # Trainer takes any other name for the checkpoint that was fine-tuned, the empty one included.
        trainer.model.config.name_or_path = trainer.args.output_dir
    facts = {
        "model_name": Path(trainer.args.output_dir).resolve().name,
        "dataset": description,
        "finetuned_from": checkpoint,
        "tasks": task.pipeline_tag,
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs one command line; returns the metrics of training and evaluation."""
    parsed = parse_arguments(arguments)
    training = parsed.training
    set_up_logging(training)
    set_seed(training.seed)

    # Everything that can be refused without reading the data is refused here.
    config = load_config(parsed.model)
    objective = resolve_objective(config, parsed.objective)
    check_objective_arguments(parsed, objective)
    task = TASKS[objective](parsed)
    task.check(config)
    processor = task.load_processor()
    from_checkpoint = parsed.model.model_name_or_path is not None
    fields = task.checkpoint_fields(processor) if from_checkpoint else task.config_fields(processor)
    config = with_fields(config, parsed.model, fields)
    resume_point = prepare_output(parsed.output, training)

    model = load_model(config, parsed.model, task.auto_class)
    task.prepare_model(model, processor)
    with training.main_process_first(desc="preparing the data"):
        data = task.load_data(model, processor)
    logger.info(
        "%s objective, %s parameters, %s training %s and %s held-out %s from %s",
        objective,
        f"{model.num_parameters():,}",
        "no" if data.train_dataset is None else f"{len(data.train_dataset):,}",
        task.examples,
        "no" if data.eval_dataset is None else f"{len(data.eval_dataset):,}",
        task.examples,
        data.description,
    )

    training.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is none
    for name, value in task.training_arguments().items():
        setattr(training, name, value)
    trainer_class = type(task.trainer_class.__name__, (WritesModelCard, task.trainer_class), {})
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        processing_class=processor,
        data_collator=data.data_collator,
        compute_metrics=data.compute_metrics,
        preprocess_logits_for_metrics=data.preprocess_logits_for_metrics,
        optimizers=(make_optimizer(model, parsed), None),
        callbacks=list(data.callbacks),
    )
    metrics = {}
    if training.do_train:
        outcome = trainer.train(resume_from_checkpoint=resume_point)
        outcome.metrics[f"train_{task.examples}"] = len(data.train_dataset)
        save_result(trainer)
        report(trainer, "train", outcome.metrics)
        metrics |= outcome.metrics
    if training.do_eval:
        held_out = trainer.evaluate()
        report(trainer, "eval", held_out)
        metrics |= held_out
    if training.do_train:
        describe_result(trainer, task, data.description)
    return metrics


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
