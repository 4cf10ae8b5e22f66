"""Trains or fine-tunes a language model with `Trainer`: Performer, its siblings, or any that the Auto classes know.

    python scripts/train.py --model_type performer --config_overrides "hidden_size=256,num_hidden_layers=4" \
        --output_dir out --do_train --do_eval
    python scripts/train.py --model_name_or_path out --text_folder my_notes --output_dir tuned --do_train --do_eval
    torchrun --nproc_per_node 2 scripts/train.py run.yaml

Without a source of text it reads the Python standard library's own sources; without a tokenizer, bytes. All arguments
of `TrainingArguments` hold (`--help` lists them); one JSON or YAML file can stand for the whole command line.
"""

import logging
from pathlib import Path

import datasets
import torch
import transformers
from held_out_metrics import HeldOutMetrics, row_totals
from output_folder import find_resume_point, remove_checkpoints, require_free, require_writable
from text_data import (
    BlockCollator,
    load_tokenizer,
    pack_for_evaluation,
    pack_for_training,
    tokenize_documents,
)
from text_sources import load_splits
from train_arguments import DataArguments, ModelArguments, OutputArguments, parse_arguments
from training_model import load_config, load_model, resolve_block_size, resolve_objective, with_tokenizer
from transformers import Trainer, TrainingArguments, set_seed

import hf_efficient  # noqa: F401  (registers our architectures with the Auto classes)


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


def prepare_text(data: DataArguments, training: TrainingArguments, tokenizer, objective: str, block_size: int):
    """Packed training blocks (None without --do_train), held-out blocks (None without --do_eval), a description."""
    with training.main_process_first(desc="reading the text"):
        splits = load_splits(
            train_file=data.train_file,
            validation_file=data.validation_file,
            text_folder=data.text_folder,
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            text_column_name=data.text_column_name,
            validation_split_percentage=data.validation_split_percentage,
        )
        options = {
            "parse_special_tokens": data.parse_special_tokens,
            "num_proc": data.preprocessing_num_workers,
        }
        train_blocks = evaluation = None
        if training.do_train:
            tokenized = tokenize_documents(splits.train, tokenizer, **options)
            train_blocks = pack_for_training(tokenized, block_size, max_samples=data.max_train_samples)
        if training.do_eval:
            evaluation = pack_for_evaluation(
                splits.validation,
                tokenizer,
                block_size,
                objective=objective,
                mlm_probability=data.mlm_probability or 0.15,
                max_samples=data.max_eval_samples,
                **options,
            )
    return train_blocks, evaluation, splits.description


def save_result(trainer: Trainer) -> None:
    """Weights, config, code and tokenizer, ready to be shared."""
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        # A pickle, which Trainer reads from its own checkpoints only; a folder to be shared holds none.
        (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


def describe_result(trainer: Trainer, model_arguments: ModelArguments, description: str) -> None:
    """The model card beside the weights; with --push_to_hub, all of it on the Hub."""
    if model_arguments.model_name_or_path is None:
        # Trainer takes any other name for the checkpoint that was fine-tuned, the empty one included.
        trainer.model.config.name_or_path = trainer.args.output_dir
    facts = {
        "model_name": Path(trainer.args.output_dir).resolve().name,
        "dataset": description,
        "finetuned_from": model_arguments.model_name_or_path,
        "tasks": "text-generation" if trainer.model.can_generate() else "fill-mask",
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs one command line; returns the metrics of training and evaluation."""
    model_arguments, data_arguments, output_arguments, training = parse_arguments(arguments)
    set_up_logging(training)
    set_seed(training.seed)

    # Everything that can be refused without reading the text is refused here.
    config = load_config(model_arguments)
    objective = resolve_objective(config, model_arguments.objective)
    if objective == "causal" and data_arguments.mlm_probability is not None:
        raise ValueError(
            f"--mlm_probability belongs to the masked objective, got it with a causal {config.model_type!r}"
        )
    block_size = resolve_block_size(config, data_arguments.block_size)
    tokenizer = load_tokenizer(
        model_arguments.tokenizer_name or model_arguments.model_name_or_path,
        objective=objective,
        trust_remote_code=model_arguments.trust_remote_code,
        token=model_arguments.token,
    )
    if model_arguments.model_name_or_path is None:
        config = with_tokenizer(config, model_arguments, tokenizer)
    resume_point = prepare_output(output_arguments, training)

    model = load_model(config, model_arguments, objective, tokenizer)
    train_blocks, evaluation, description = prepare_text(data_arguments, training, tokenizer, objective, block_size)
    logger.info(
        "%s objective, %s parameters, %s training blocks and %s held-out blocks of %s tokens from %s",
        objective,
        f"{model.num_parameters():,}",
        "no" if train_blocks is None else f"{len(train_blocks):,}",
        "no" if evaluation is None else f"{len(evaluation.blocks):,}",
        block_size,
        description,
    )

    training.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is none
    training.batch_eval_metrics = True  # sums per batch: the logits of a whole evaluation would not fit anywhere
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_blocks,
        eval_dataset=None if evaluation is None else evaluation.blocks,
        processing_class=tokenizer,
        data_collator=BlockCollator(tokenizer, objective, data_arguments.mlm_probability or 0.15),
        compute_metrics=None if evaluation is None else HeldOutMetrics(objective, evaluation, tokenizer),
        preprocess_logits_for_metrics=row_totals(objective),
    )
    metrics = {}
    if training.do_train:
        outcome = trainer.train(resume_from_checkpoint=resume_point)
        outcome.metrics["train_blocks"] = len(train_blocks)
        save_result(trainer)
        report(trainer, "train", outcome.metrics)
        metrics |= outcome.metrics
    if training.do_eval:
        held_out = trainer.evaluate()
        report(trainer, "eval", held_out)
        metrics |= held_out
    if training.do_train:
        describe_result(trainer, model_arguments, description)
    return metrics


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
