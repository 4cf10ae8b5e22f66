"""`make demo`: trains a small Performer on real text for about three minutes, saves it, and loads it elsewhere.

    python scripts/demo.py [--minutes 3] [--output_dir outputs/demo]

The text is this Python's own standard library, one token per byte, a twentieth of the files held out. "Elsewhere" is a
new process in which hf_efficient cannot be imported: it has the folder and transformers, nothing else. That process is
told `trust_remote_code=True`, which is safe here because the folder's code was written by this script a moment before.
Exits with 1 unless the model beats a byte bigram on the held-out text and the loaded logits are equal to the bit.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from byte_baselines import baselines, byte_count
from held_out_metrics import HeldOutMetrics, row_totals
from muon_adamw import MuonAdamW
from output_folder import require_writable
from safetensors.torch import save_file
from text_data import BlockCollator, load_tokenizer, pack_for_evaluation, pack_for_training, tokenize_documents
from text_sources import TextSplits, load_splits
from time_budget import NO_LIMIT, Clock, TimeBudget, clocked_schedule
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

import hf_efficient


ROOT = Path(__file__).resolve().parent.parent
SEED = 0
# Found by search at this budget: small batches, for many steps; token shift and a few local heads, for spelling.
BLOCK_SIZE = 256
BATCH_SIZE = 4
LEARNING_RATE = 5e-3
MATRIX_LEARNING_RATE = 8e-3
WEIGHT_DECAY = 0.01
MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_local_attention_heads": 4,
    "local_window_size": 32,
    "feature_map": "relu",
    "num_random_features": 32,
    "feature_redraw_interval": None,
    "shift_tokens": True,
    "hidden_act": "relu2",
    "mlp_bias": False,
    "norm_type": "rms_norm",
    "initializer_range": 0.06,
}
PROMPT = '''\
class LineReader:
    """Reads a file line by line."""

    def __init__(self, path):
        self.path = path

    def read(self):
'''


def prepare_folder(output_dir: str) -> Path:
    """An empty folder for the checkpoint; an earlier demo's is replaced, anything else is left alone."""
    require_writable(output_dir)
    folder = Path(output_dir) / "checkpoint"
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--output_dir must not hold a checkpoint folder of other origin, got {str(folder)!r}")
        shutil.rmtree(folder)
    return folder


def build_trainer(splits: TextSplits, tokenizer, clock: Clock, scratch: str) -> Trainer:
    train = pack_for_training(tokenize_documents(splits.train, tokenizer), BLOCK_SIZE)
    evaluation = pack_for_evaluation(splits.validation, tokenizer, BLOCK_SIZE, objective="causal")
    config = hf_efficient.PerformerConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_decoder=True,
        **MODEL,
    )
    model = hf_efficient.PerformerForCausalLM(config)
    optimizer = MuonAdamW(model, lr=LEARNING_RATE, matrix_lr=MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            max_steps=NO_LIMIT,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=32,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            batch_eval_metrics=True,
            dataloader_pin_memory=False,
            use_cpu=True,  # the promise is about two CPU cores
            seed=SEED,
        ),
        train_dataset=train,
        eval_dataset=evaluation.blocks,
        data_collator=BlockCollator(tokenizer, "causal"),
        compute_metrics=HeldOutMetrics("causal", evaluation, tokenizer),
        preprocess_logits_for_metrics=row_totals("causal"),
        callbacks=[TimeBudget(clock)],
        optimizers=(optimizer, clocked_schedule(optimizer, clock)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def bits_per_byte(trainer: Trainer) -> float:
    return trainer.evaluate()["eval_bits_per_byte"]


def save_probe(trainer: Trainer, path: Path) -> None:
    """The logits of one held-out block, for the other process to compare with its own."""
    model = trainer.model.eval()
    input_ids = trainer.eval_dataset[0]["input_ids"][None]
    with torch.no_grad():
        save_file({"input_ids": input_ids, "logits": model(input_ids=input_ids).logits.contiguous()}, path)


def load_elsewhere(folder: Path, probe: Path, scratch: str, max_new_tokens: int) -> bool:
    """Runs demo_load.py in an isolated process (no PYTHONPATH, no project on its path); True if it ends well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(ROOT / "scripts" / "demo_load.py"), str(folder.resolve()), str(probe)]
    command += ["--prompt", PROMPT, "--max_new_tokens", str(max_new_tokens), "--threads", str(torch.get_num_threads())]
    sys.stdout.flush()
    return subprocess.run(command, cwd=scratch, env=environment).returncode == 0


def compare(model_bits: float, held_out: list[str], train: list[str]) -> dict[str, float]:
    """Bits per byte of everything on the same held-out bytes, best last; printed as a table."""
    table = {**baselines(train, held_out), "this Performer": model_bits}
    for name, value in sorted(table.items(), key=lambda row: -row[1]):
        print(f"  {name:>16}  {value:.3f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="time to train")
    parser.add_argument("--output_dir", default=str(ROOT / "outputs" / "demo"))
    parser.add_argument("--text_folder", help="text files to train on instead of the standard library")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="bytes to generate")
    options = parser.parse_args(arguments)
    clock = Clock(60 * options.minutes)
    folder = prepare_folder(options.output_dir)
    transformers_logging.set_verbosity_error()
    set_seed(SEED)

    splits = load_splits(text_folder=options.text_folder)
    train_text, held_out_text = list(splits.train["text"]), list(splits.validation["text"])
    print(
        f"Text: {splits.description}, {byte_count(train_text):,} bytes to learn from, "
        f"{byte_count(held_out_text):,} bytes held out ({len(held_out_text)} files the model never sees)."
    )
    tokenizer = load_tokenizer(None, objective="causal")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(splits, tokenizer, clock, scratch)
        size, threads = trainer.model.num_parameters(), torch.get_num_threads()
        print(f"Model: a causal Performer of {size:,} parameters, {threads} thread{'s' * (threads > 1)}.")
        before = bits_per_byte(trainer)
        print(f"Held out, before training: {before:.3f} bits per byte.")
        trainer.train()
        minutes = clock.elapsed / 60
        after = bits_per_byte(trainer)
        steps = trainer.state.global_step
        print(
            f"Held out, after {steps} steps ({steps * BATCH_SIZE * BLOCK_SIZE / 1e6:.1f} M bytes read, "
            f"{minutes:.1f} minutes): {after:.3f} bits per byte. On the same bytes:"
        )
        table = compare(after, held_out_text, train_text)

        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        probe = Path(scratch) / "probe.safetensors"
        save_probe(trainer, probe)
        print(f"\nSaved to {folder}. A new process without hf_efficient loads it:")
        same = load_elsewhere(folder, probe, scratch, options.max_new_tokens)

    better = after < table["byte bigram"]
    print("\nSummary")
    print(f"  held-out bits per byte: {before:.3f} -> {after:.3f} in {options.minutes:g} minutes")
    print(f"  below a byte bigram ({table['byte bigram']:.3f}): {'yes' if better else 'NO'}")
    print(f"  below a byte trigram ({table['byte trigram']:.3f}): {'yes' if after < table['byte trigram'] else 'no'}")
    print(f"  below zlib -9 ({table['zlib']:.3f}): {'yes' if after < table['zlib'] else 'no'}")
    print(f"  the saved folder runs without this project, logits equal to the bit: {'yes' if same else 'NO'}")
    print(f"  try it: python scripts/generate.py --model_name_or_path {folder} --prompt 'def main('")
    return 0 if better and same else 1


if __name__ == "__main__":
    sys.exit(main())
