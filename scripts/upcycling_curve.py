"""Does an upcycled T5 learn faster than a CoLT5 from scratch? Held-out loss of both by step of the same fine-tune.

    python scripts/upcycling_curve.py        about four minutes of one core; writes docs/benchmarks/colt5_upcycling.csv
                                             and docs/figures/colt5_upcycling.png

A small T5 v1.1 of transformers learns span corruption (`span_corruption.py`) on the Python standard library's sources,
byte by byte. `hf_efficient.conversion.upcycled_t5` makes a CoLT5 of it, which routes the fractions of the paper; its
light branches start at zero, or as copies. Both, and a CoLT5 of that configuration with random weights, are trained
on the same blocks in the same order with the same optimizer. What is measured is bits per hidden byte of held-out
files, before the first step and at every `--eval_steps`.
"""

import argparse
import csv
from pathlib import Path

import torch
from benchmark_measure import ROOT, provenance
from block_draws import BlockDraws, NewDrawsEachEpoch
from datasets import Dataset
from held_out_metrics import HeldOutMetrics, row_totals
from muon_adamw import MuonAdamW
from span_corruption import Denoiser, SpanCorruptionCollator, SpanCorruptor
from task_span_corruption import pack_held_out_spans
from text_data import EvaluationBlocks, limit_documents, load_tokenizer, pack_for_training, tokenize_documents
from text_sources import load_splits
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_efficient import CoLT5ForConditionalGeneration
from hf_efficient.conversion.upcycled_t5 import upcycle_t5


SIZES = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
BLOCK_SIZE, BATCH_SIZE, TRAIN_BLOCKS, HELD_OUT_BLOCKS = 512, 8, 2048, 48
LEARNING_RATE, MATRIX_LEARNING_RATE = 1e-2, 1e-2
METRIC = "bits_per_hidden_byte"
ORIGINAL, SCRATCH = "T5 v1.1", "CoLT5 from scratch"
UPCYCLED = {"zero": "upcycled, light branches at zero", "copy": "upcycled, light branches copied"}
COLUMNS = ["model", "seed", "step", METRIC, "torch", "commit", "date"]


class SpanData:
    """Blocks of bytes to learn from, the same held-out ones for every model, and what hides their spans."""

    def __init__(self, train_blocks: int, held_out_blocks: int):
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(None, objective="span_corruption")
        self.corruptor = SpanCorruptor(self.tokenizer, (Denoiser(0.15, 3),))
        splits = load_splits()
        documents = limit_documents(splits.train.shuffle(seed=0), self.tokenizer, train_blocks * BLOCK_SIZE)
        self.train: Dataset = pack_for_training(tokenize_documents(documents, self.tokenizer), BLOCK_SIZE)
        self.held_out: EvaluationBlocks = pack_held_out_spans(
            splits.validation, self.tokenizer, self.corruptor, BLOCK_SIZE, max_samples=held_out_blocks
        )


def train(model: PreTrainedModel, data: SpanData, steps: int, eval_steps: int, seed: int, folder: str) -> dict:
    """Trains in place; {step: held-out bits per hidden byte}, from step 0 on."""
    draws = BlockDraws(seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=16,
            warmup_steps=min(20, steps // 5),
            eval_strategy="steps",
            eval_steps=eval_steps,
            eval_on_start=True,
            batch_eval_metrics=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=data.train,
        eval_dataset=data.held_out.blocks,
        data_collator=SpanCorruptionCollator(data.tokenizer, data.corruptor, draws),
        callbacks=[NewDrawsEachEpoch(draws)],
        compute_metrics=HeldOutMetrics("span_corruption", data.held_out, data.tokenizer),
        preprocess_logits_for_metrics=row_totals("span_corruption"),
        optimizers=(MuonAdamW(model, lr=LEARNING_RATE, matrix_lr=MATRIX_LEARNING_RATE), None),
    )
    trainer.train()
    name = f"eval_{METRIC}"
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def measure(data: SpanData, seed: int, steps: int, fine_tune_steps: int, eval_steps: int, folder: str) -> list[dict]:
    """Rows for all four models."""
    set_seed(seed)
    tokenizer = data.tokenizer
    original = T5ForConditionalGeneration(
        T5Config(
            **SIZES,
            vocab_size=len(tokenizer),
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    # transformers draws the head of such a T5 with unit variance, for which its logits are far too large at the start.
    with torch.no_grad():
        original.lm_head.weight *= original.config.d_model**-0.5
    curves = {ORIGINAL: train(original, data, steps, max(steps // 4, 1), seed, folder)}
    for light, name in UPCYCLED.items():
        model, _ = upcycle_t5(original, light=light)
        curves[name] = train(model, data, fine_tune_steps, eval_steps, seed, folder)
    set_seed(seed)
    scratch = CoLT5ForConditionalGeneration(model.config)
    curves[SCRATCH] = train(scratch, data, fine_tune_steps, eval_steps, seed, folder)
    stamp = provenance("default", torch.get_num_threads())
    return [
        {"model": name, "seed": seed, "step": step, METRIC: f"{bits:.4f}"}
        | {field: stamp[field] for field in ("torch", "commit", "date")}
        for name, curve in curves.items()
        for step, bits in curve.items()
    ]


def curve_of(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and means over seeds."""
    steps = sorted({int(row["step"]) for row in rows if row["model"] == name})
    values = [[float(r[METRIC]) for r in rows if (r["model"], int(r["step"])) == (name, step)] for step in steps]
    return steps, [sum(found) / len(found) for found in values]


def draw_figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 4))
    for name in (*UPCYCLED.values(), SCRATCH):
        panel.plot(*curve_of(rows, name), label=name, marker=".")
    steps, values = curve_of(rows, ORIGINAL)
    label = f"the {ORIGINAL} that is upcycled, after its {steps[-1]} steps"
    panel.axhline(values[-1], color="grey", linestyle=":", label=label)
    panel.set(xlabel="step of the fine-tune", ylabel="held-out bits per hidden byte")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of the T5")
    parser.add_argument("--fine_tune_steps", type=int, default=120, help="of each CoLT5")
    parser.add_argument("--eval_steps", type=int, default=15)
    parser.add_argument("--train_blocks", type=int, default=TRAIN_BLOCKS)
    parser.add_argument("--held_out_blocks", type=int, default=HELD_OUT_BLOCKS)
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/benchmarks/colt5_upcycling.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/colt5_upcycling.png")
    parser.add_argument(
        "--output_dir", default="outputs/upcycling_curve", help="Trainer's folder; nothing stays in it"
    )
    arguments = parser.parse_args(argv)
    for name in ("steps", "fine_tune_steps", "eval_steps", "train_blocks", "held_out_blocks"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    data = SpanData(arguments.train_blocks, arguments.held_out_blocks)
    rows = measure(
        *(data, arguments.seed, arguments.steps, arguments.fine_tune_steps, arguments.eval_steps),
        arguments.output_dir,
    )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_figure(rows, arguments.figure)
    for name in (ORIGINAL, *UPCYCLED.values(), SCRATCH):
        steps, values = curve_of(rows, name)
        print(f"{name}: " + ", ".join(f"{step}: {bits:.2f}" for step, bits in zip(steps, values, strict=True)))
    return rows


if __name__ == "__main__":
    main()
