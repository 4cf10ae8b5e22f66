"""Language modelling: the next token (causal), or the hidden ones (masked)."""

from dataclasses import dataclass, field

import torch
from block_draws import BlockDraws, NewDrawsEachEpoch
from datasets import Dataset
from held_out_metrics import HeldOutMetrics, row_totals
from text_data import (
    BlockCollator,
    EvaluationBlocks,
    Objective,
    load_tokenizer,
    pack_for_evaluation,
    pack_for_training,
    tokenize_first_documents,
)
from text_sources import load_splits
from train_arguments import TextArguments
from training_model import fields_from_tokenizer, fit_vocabulary, resolve_block_size
from training_task import TaskData, TrainingTask
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel


class LanguageModel(TrainingTask):
    """What both have in common: blocks of running text, every held-out token scored once."""

    objective: Objective
    encoder_decoder = False
    argument_classes = (TextArguments,)
    examples = "blocks"
    mlm_probability = 0.15
    predicted_tokens: int | None = None

    @classmethod
    def accepts(cls, config):
        return super().accepts(config) and config.is_encoder_decoder == cls.encoder_decoder

    def check(self, config):
        self.block_size = resolve_block_size(config, self.arguments.of(TextArguments).block_size)
        self.draws = BlockDraws(self.arguments.training.seed)

    def load_processor(self):
        model = self.arguments.model
        return load_tokenizer(
            model.tokenizer_name or model.model_name_or_path,
            objective=self.objective,
            trust_remote_code=model.trust_remote_code,
            token=model.token,
        )

    def config_fields(self, processor):
        return fields_from_tokenizer(processor)

    def prepare_model(self, model, processor):
        fit_vocabulary(model, processor, from_checkpoint=self.arguments.model.model_name_or_path is not None)

    def load_data(self, model, processor):
        data, text, training = self.arguments.data, self.arguments.of(TextArguments), self.arguments.training
        splits = load_splits(
            train_file=data.train_file,
            validation_file=data.validation_file,
            text_folder=text.text_folder,
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            text_column_name=text.text_column_name,
            validation_split_percentage=data.validation_split_percentage,
        )
        options = {
            "parse_special_tokens": text.parse_special_tokens,
            "num_proc": data.preprocessing_num_workers,
        }
        train_blocks = evaluation = None
        if training.do_train:
            samples = data.max_train_samples
            tokens = None if samples is None else samples * self.block_size
            tokenized = tokenize_first_documents(splits.train, processor, tokens, **options)
            train_blocks = pack_for_training(tokenized, self.block_size, max_samples=samples)
        if training.do_eval:
            evaluation = self.pack_held_out(splits.validation, processor, data.max_eval_samples, options)
        return TaskData(
            train_dataset=train_blocks,
            eval_dataset=None if evaluation is None else evaluation.blocks,
            description=splits.description,
            data_collator=self.collator(processor),
            compute_metrics=None if evaluation is None else HeldOutMetrics(self.objective, evaluation, processor),
            preprocess_logits_for_metrics=row_totals(self.objective),
            callbacks=(NewDrawsEachEpoch(self.draws),),
        )

    def collator(self, processor):
        """What batches blocks and makes their labels."""
        return BlockCollator(processor, self.objective, self.mlm_probability, self.draws)

    def pack_held_out(self, documents: Dataset, processor, max_samples: int | None, options: dict) -> EvaluationBlocks:
        """Held-out blocks, at most `max_samples`; `options` are those of `tokenize_documents`."""
        return pack_for_evaluation(
            documents,
            processor,
            self.block_size,
            objective=self.objective,
            mlm_probability=self.mlm_probability,
            predicted_tokens=self.predicted_tokens,
            max_samples=max_samples,
            **options,
        )

    def training_arguments(self):
        # Sums per batch: the logits of a whole evaluation would not fit anywhere.
        return {"batch_eval_metrics": True}


class CausalLanguageModel(LanguageModel):
    """Predicts each token from those before it."""

    objective = "causal"
    auto_class = AutoModelForCausalLM
    head_suffixes = ("ForCausalLM", "LMHeadModel")
    pipeline_tag = "text-generation"

    def prepare_model(self, model, processor):
        super().prepare_model(model, processor)
        require_causal(model)
        self.predicted_tokens = count_predictions(model, self.block_size)


@dataclass
class MaskedArguments:
    """Of the masked objective alone."""

    mlm_probability: float | None = field(
        default=None, metadata={"help": "Share of tokens hidden by the masked objective; default 0.15."}
    )

    def __post_init__(self):
        if self.mlm_probability is not None and not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability}")


class MaskedLanguageModel(LanguageModel):
    """Predicts hidden tokens from all others."""

    objective = "masked"
    auto_class = AutoModelForMaskedLM
    head_suffixes = ("ForMaskedLM",)
    argument_classes = (TextArguments, MaskedArguments)
    pipeline_tag = "fill-mask"

    def check(self, config):
        super().check(config)
        self.mlm_probability = self.arguments.of(MaskedArguments).mlm_probability or self.mlm_probability


@torch.no_grad()
def count_predictions(model: PreTrainedModel, block_size: int) -> int:
    """For how many positions of a block, its last, the model has logits: for all, unless it is a Perceiver AR."""
    tokens = torch.zeros(1, block_size, dtype=torch.long, device=model.device)
    return model(input_ids=tokens, use_cache=False).logits.shape[1]


@torch.no_grad()
def require_causal(model: PreTrainedModel) -> None:
    """Changes the last of eight tokens and looks whether an earlier prediction moves.

    Raises:
        ValueError: one does. Bits per byte of a model that sees what it predicts would mean nothing.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = (vocabulary // 2 + torch.arange(8)).remainder(vocabulary)[None].to(model.device)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary
    was_training = model.training
    model.eval()
    before, after = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (tokens, changed))
    model.train(was_training)
    moved = (before - after).abs().max().item()
    # Rounding may differ between the two; a leak shows in every digit.
    tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 1e-2
    if not moved <= tolerance * before.abs().max().item():
        raise ValueError(
            f"--objective causal needs a model that does not look ahead, got {type(model).__name__}, whose earlier "
            f"logits move by {moved:.2g} when only the last token changes: pass --objective masked, or "
            "--config_overrides is_decoder=True where the architecture has that field"
        )
