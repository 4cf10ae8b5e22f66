"""Fine-tuning of an encoder–decoder on pairs of texts: a long source, and what is to be written about it."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from pair_sources import load_pair_splits
from rouge_metrics import RougeMetrics
from text_data import first_tokens, load_tokenizer
from training_model import fields_from_tokenizer, fit_vocabulary, set_decoder_start
from training_task import TaskData, TrainingTask
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer


@dataclass
class PairArguments:
    """Of sequence_to_sequence alone."""

    source_column: str = field(default="source", metadata={"help": "Column that holds the text to read."})
    target_column: str = field(default="target", metadata={"help": "Column that holds the text to write."})
    source_prefix: str = field(default="", metadata={"help": "Text to put in front of every source."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of a source; longer ones are cut."})
    max_target_length: int = field(
        default=128, metadata={"help": "Tokens of a target, and of what is generated; longer ones are cut."}
    )

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name} must be at least 2, got {getattr(self, name)}")


class SequenceToSequence(TrainingTask):
    """Measured by ROUGE of what `generate` writes (`--predict_with_generate`, `--generation_num_beams`); without that
    flag by the loss alone, as in the example scripts of transformers."""

    auto_class = AutoModelForSeq2SeqLM
    head_suffixes = ("ForConditionalGeneration",)
    argument_classes = (PairArguments,)
    trainer_class = Seq2SeqTrainer
    pipeline_tag = "text2text-generation"
    examples = "pairs"

    @classmethod
    def accepts(cls, config):
        return super().accepts(config) and config.is_encoder_decoder

    def check(self, config):
        self.pairs = self.arguments.of(PairArguments)
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and max(self.pairs.max_source_length, self.pairs.max_target_length) > limit:
            raise ValueError(
                f"--max_source_length and --max_target_length must be at most the model's max_position_embeddings of "
                f"{limit}, got {self.pairs.max_source_length} and {self.pairs.max_target_length}"
            )

    def load_processor(self):
        model = self.arguments.model
        tokenizer = load_tokenizer(
            model.tokenizer_name or model.model_name_or_path,
            objective="sequence_to_sequence",
            trust_remote_code=model.trust_remote_code,
            token=model.token,
        )
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"--objective sequence_to_sequence needs a tokenizer with {name}, got {type(tokenizer).__name__}"
                )
        return tokenizer

    def config_fields(self, processor):
        return fields_from_tokenizer(processor)

    def prepare_model(self, model, processor):
        fit_vocabulary(model, processor, from_checkpoint=self.arguments.model.model_name_or_path is not None)
        set_decoder_start(model, processor)

    def load_data(self, model, processor):
        data, training = self.arguments.data, self.arguments.training
        splits = load_pair_splits(
            train_file=data.train_file,
            validation_file=data.validation_file,
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            source_column=self.pairs.source_column,
            target_column=self.pairs.target_column,
            validation_split_percentage=data.validation_split_percentage,
        )
        train = evaluation = metrics = None
        if training.do_train:
            train = self.tokenize(limit_rows(splits.train, data.max_train_samples), processor)
        if training.do_eval:
            held_out = limit_rows(splits.validation, data.max_eval_samples)
            evaluation = self.tokenize(held_out, processor)
            if training.predict_with_generate:
                path = Path(training.output_dir) / "generated_predictions.jsonl"
                metrics = RougeMetrics(processor, list(held_out["source"]), path)
        return TaskData(
            train_dataset=train,
            eval_dataset=evaluation,
            description=splits.description,
            data_collator=DataCollatorForSeq2Seq(processor, model),
            compute_metrics=metrics,
        )

    def tokenize(self, rows: Dataset, processor) -> Dataset:
        """Columns `input_ids` and `labels`, each cut to its limit and with an end of sequence."""

        def cut(text: str, limit: int) -> list[int]:
            return [*first_tokens(processor, text, limit - 1), processor.eos_token_id]

        prefix, limits = self.pairs.source_prefix, (self.pairs.max_source_length, self.pairs.max_target_length)
        return rows.map(
            lambda row: {"input_ids": cut(prefix + row["source"], limits[0]), "labels": cut(row["target"], limits[1])},
            num_proc=self.arguments.data.preprocessing_num_workers,
            remove_columns=rows.column_names,
            desc="Tokenising",
        )

    def training_arguments(self):
        if self.arguments.training.generation_max_length is None:
            # The decoder's first token counts too.
            return {"generation_max_length": self.pairs.max_target_length + 1}
        return {}


def limit_rows(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
