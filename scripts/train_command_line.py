"""Reads the command line of train.py as Hugging Face's example scripts read theirs, and checks it before any work."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import yaml
from task_table import TASKS, ObjectiveArguments, task_argument_classes
from train_arguments import Arguments, DataArguments, ModelArguments, OptimizerArguments, OutputArguments
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import is_tensorboard_available, is_trackio_available


EXPONENT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def installed_trackers() -> list[str]:
    """Where to log unless --report_to says: local trackers only. Nothing leaves the machine unasked."""
    available = {"tensorboard": is_tensorboard_available(), "trackio": is_trackio_available()}
    return [name for name, installed in available.items() if installed] or ["none"]


def read_argument_file(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be a readable JSON or YAML file of arguments, got: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of argument names to values, got {type(values).__name__}")
    # YAML 1.1 takes 1e-3 for text, which is how everybody writes a learning rate.
    return {
        name: float(value) if isinstance(value, str) and EXPONENT_NUMBER.fullmatch(value) else value
        for name, value in values.items()
    }


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    """Reads the command line, or the JSON or YAML file that is its only word."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(
        [
            *(ObjectiveArguments, ModelArguments, DataArguments, OptimizerArguments, OutputArguments),
            *(Seq2SeqTrainingArguments, *task_argument_classes()),
        ]
    )
    defaults = {"report_to": installed_trackers()}
    if len(arguments) == 1 and Path(arguments[0]).suffix in (".json", ".yaml", ".yml"):
        parsed = parser.parse_dict({**defaults, **read_argument_file(Path(arguments[0]))})
    else:
        parser.set_defaults(**defaults)
        parsed = parser.parse_args_into_dataclasses(arguments)
    objective, model, data, optimizer, output, training, *of_tasks = parsed
    result = Arguments(objective.objective, model, data, optimizer, output, training, tuple(of_tasks))
    check_arguments(result)
    return result


def check_arguments(arguments: Arguments) -> None:
    """Refuses arguments that contradict each other (what needs the model or the data is checked with those)."""
    model, training, overwrite = arguments.model, arguments.training, arguments.output.overwrite_output_dir
    if not (training.do_train or training.do_eval):
        raise ValueError("--do_train or --do_eval must be given, got neither: nothing to do")
    if model.model_name_or_path and (model.model_type or model.config_name):
        other = "--model_type" if model.model_type else "--config_name"
        raise ValueError(f"--model_name_or_path and {other} exclude each other, got both")
    if model.model_type and model.config_name:
        raise ValueError("--model_type and --config_name exclude each other, got both")
    if not (model.model_name_or_path or model.model_type or model.config_name):
        raise ValueError("--model_name_or_path, --model_type or --config_name must name a model, got none of them")
    if training.resume_from_checkpoint and not training.do_train:
        raise ValueError("--resume_from_checkpoint goes on with a training, got it without --do_train")
    if overwrite and str(training.resume_from_checkpoint).lower() not in ("none", "false"):
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other, got both")


def check_objective_arguments(arguments: Arguments, objective: str) -> None:
    """Refuses arguments that are given although they belong to other objectives only."""
    for group in arguments.of_tasks:
        if type(group) in TASKS[objective].argument_classes:
            continue
        owners = [name for name, task in TASKS.items() if type(group) in task.argument_classes]
        for field in fields(group):
            if getattr(group, field.name) != field.default:
                raise ValueError(
                    f"--{field.name} belongs to --objective {' or '.join(owners)}, got it with --objective {objective}"
                )
