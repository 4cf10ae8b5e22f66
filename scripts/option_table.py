"""Bits per byte of XTransformer's options at equal budget: same text, tokens, steps and optimiser, several seeds.

    python scripts/option_table.py                    trains what is missing; rows in docs/benchmarks/
                                                      x_transformer_options.csv, page docs/x_transformer_options.md
    python scripts/option_table.py --seconds 400      starts no run after that time; call it again to go on
    python scripts/option_table.py --report           writes the page from the rows that are there

Each option is one change to the same small decoder. A seed decides initial weights and the order of the text, and is
shared by all options, so that each is compared with the baseline of its own seed.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_measure import ROOT, provenance
from held_out_metrics import HeldOutMetrics, row_totals
from muon_adamw import MuonAdamW
from text_data import (
    BlockCollator,
    EvaluationBlocks,
    limit_documents,
    load_tokenizer,
    pack_for_evaluation,
    pack_for_training,
    tokenize_documents,
)
from text_sources import load_splits
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_efficient import XTransformerConfig, XTransformerForCausalLM


BASELINE = "baseline"
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.05}
# What each option changes. The baseline: rotary positions, LayerNorm before each branch, GELU.
OPTIONS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "RMSNorm": {"norm_type": "rms_norm"},
    "SwiGLU": {"gated_feed_forward": True, "hidden_act": "silu", "intermediate_size": 256},  # as many weights
    "learned positions": {"rotary_positions": None, "absolute_positions": "learned"},
    "ALiBi": {"rotary_positions": None, "position_bias": "alibi"},
    "T5 bias": {"rotary_positions": None, "position_bias": "t5"},
    "query and key RMSNorm": {"qk_norm": "rms"},
    "two key heads for four": {"num_key_value_heads": 2},
    "value residual": {"value_residual": "learned"},
    "token shift": {"shift_tokens": 1},
    "sandwich norm": {"norm_position": "sandwich"},
    "hyper-connections": {"num_residual_streams": 4},
    "memory keys": {"num_memory_key_values": 16},
}
LENGTH, BATCH, EVALUATED_BLOCKS = 256, 4, 256
LEARNING_RATE, MATRIX_LEARNING_RATE, WEIGHT_DECAY = 4e-3, 8e-3, 0.01
# Two-sided 95 % quantiles of Student's t, by number of seeds: three differences have two degrees of freedom.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
COLUMNS = [
    "option",
    "seed",
    "bits_per_byte",
    "parameters",
    "tokens",
    "steps",
    "cpu_seconds",
    "torch",
    "commit",
    "date",
]


class Text(NamedTuple):
    """The same for every run."""

    tokenizer: PreTrainedTokenizerBase
    train_blocks: Any
    evaluation: EvaluationBlocks


def prepare_text(steps: int, evaluated_blocks: int) -> Text:
    """Blocks for one epoch of that many steps, and held-out blocks: documents of the standard library, shuffled."""
    tokenizer = load_tokenizer(None, objective="causal")
    splits = load_splits()
    documents = limit_documents(splits.train.shuffle(seed=0), tokenizer, steps * BATCH * LENGTH + 1)
    return Text(
        tokenizer,
        pack_for_training(tokenize_documents(documents, tokenizer), LENGTH, max_samples=steps * BATCH),
        pack_for_evaluation(
            splits.validation.shuffle(seed=0), tokenizer, LENGTH, objective="causal", max_samples=evaluated_blocks
        ),
    )


def build_model(option: str, vocabulary: int) -> XTransformerForCausalLM:
    """The small decoder with this one change."""
    config = XTransformerConfig(vocab_size=vocabulary, max_position_embeddings=LENGTH, **SIZES, **OPTIONS[option])
    return XTransformerForCausalLM(config)


def run(option: str, seed: int, steps: int, text: Text) -> dict[str, Any]:
    """Train one model and return its row."""
    set_seed(seed)
    model = build_model(option, len(text.tokenizer))
    optimizer = MuonAdamW(model, lr=LEARNING_RATE, matrix_lr=MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            seed=seed,
            batch_eval_metrics=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=text.train_blocks,
            eval_dataset=text.evaluation.blocks,
            data_collator=BlockCollator(text.tokenizer, "causal"),
            compute_metrics=HeldOutMetrics("causal", text.evaluation, text.tokenizer),
            preprocess_logits_for_metrics=row_totals("causal"),
            optimizers=(optimizer, schedule),
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        bits = trainer.evaluate()["eval_bits_per_byte"]
    stamp = provenance("default", torch.get_num_threads())
    return {
        "option": option,
        "seed": seed,
        "bits_per_byte": f"{bits:.4f}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * BATCH * LENGTH,
        "steps": steps,
        "cpu_seconds": f"{seconds:.1f}",
        **{name: stamp[name] for name in ("torch", "commit", "date")},
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """In the order of `OPTIONS`, the whole file at once."""
    order = {option: place for place, option in enumerate(OPTIONS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (order[row["option"]], int(row["seed"]))))
    unfinished.replace(path)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of Markdown, the best option first."""
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        scores.setdefault(row["option"], {})[row["seed"]] = float(row["bits_per_byte"])
    seconds = {
        option: statistics.median(float(row["cpu_seconds"]) for row in rows if row["option"] == option)
        for option in scores
    }
    weights = {row["option"]: int(row["parameters"]) for row in rows}
    lines = [
        "| option | change | bits per byte | against the baseline | verdict | parameters | CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for option in sorted(scores, key=lambda name: statistics.mean(scores[name].values())):
        own = list(scores[option].values())
        spread = f" ± {statistics.stdev(own):.3f}" if len(own) > 1 else ""
        change = ", ".join(f"`{field}={value!r}`" for field, value in OPTIONS[option].items()) or "—"
        difference, verdict = compared(scores[option], scores[BASELINE]) if option != BASELINE else ("—", "—")
        time_ratio = f"{seconds[option] / seconds[BASELINE]:.2f}×"
        lines.append(
            f"| {option} | {change} | {statistics.mean(own):.3f}{spread} | {difference} | {verdict} | "
            f"{weights[option] / 1e6:.2f}M | {time_ratio} |"
        )
    return lines


def compared(own: dict[str, float], baseline: dict[str, float]) -> tuple[str, str]:
    """The mean difference with its 95 % interval over the seeds that both have, and what that allows to say."""
    differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}", "one seed"
    half = QUANTILES[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    verdict = "no difference shown" if abs(mean) <= half else "better" if mean < 0 else "worse"
    return f"{mean:+.3f} ± {half:.3f}", verdict


def page(rows: list[dict[str, str]]) -> str:
    """The document."""
    first, seeds = rows[0], len({row["seed"] for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    verdicts: dict[str, list[str]] = {"better": [], "no difference shown": [], "worse": []}
    for line in table(rows)[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        if cells[5] in verdicts:
            verdicts[cells[5]].append(cells[1])
    said = "; ".join(f"{verdict}: {', '.join(names) or 'none'}" for verdict, names in verdicts.items())
    return f"""# Twelve options at equal budget

Written by `scripts/option_table.py` from [the rows](benchmarks/x_transformer_options.csv); no figure is typed.

Each line is one change to the same decoder ({SIZES["num_hidden_layers"]} blocks of width {SIZES["hidden_size"]},
{SIZES["num_attention_heads"]} heads, rotary positions, LayerNorm before each branch, GELU), trained from nothing on
{int(first["tokens"]):,} bytes of the Python standard library's sources in {first["steps"]} steps of {BATCH} × {LENGTH}
bytes, one epoch: Muon for matrices (from {MATRIX_LEARNING_RATE:g}), AdamW for the rest (from {LEARNING_RATE:g}),
cosine schedule, the same for all. Scored are {EVALUATED_BLOCKS} blocks of held-out files. There are {seeds} seeds:
each decides the initial weights and the order of the text, for all options.

{chr(10).join(table(rows))}

**Bits per byte**: mean ± standard deviation over the seeds. **Against the baseline**: mean difference to the
baseline of the same seed, with its 95 % interval (Student's t); where the interval holds 0, no difference is shown.
**CPU time** of training on one core, over the baseline's; the machine was shared: only large ratios mean anything.

{said}.

What this does not say: anything about other sizes, budgets or texts. No option had its own learning rate, the models
saw each byte once and are far from converged, and the intervals show how little {seeds} seeds can tell apart.
Options that pay off in long runs or long sequences cannot show it here.

(torch {first["torch"]}, commits {commits}.)
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--evaluated-blocks", type=int, default=EVALUATED_BLOCKS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/benchmarks/x_transformer_options.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/x_transformer_options.md")
    arguments = parser.parse_args(argv)
    rows, start = read_rows(arguments.csv), time.monotonic()
    done = {(row["option"], int(row["seed"])) for row in rows}
    missing = [(o, s) for s in arguments.seeds for o in arguments.options if (o, s) not in done]
    if missing and not arguments.report:
        text = prepare_text(arguments.steps, arguments.evaluated_blocks)
        for option, seed in missing:
            if time.monotonic() - start > arguments.seconds:
                break
            rows.append(run(option, seed, arguments.steps, text))
            write_rows(arguments.csv, rows)
            print(f"{option}, seed {seed}: {rows[-1]['bits_per_byte']} bits per byte", flush=True)
    rows = read_rows(arguments.csv)
    if not any(row["option"] == BASELINE for row in rows):
        parser.error(f"no row of the {BASELINE} in {arguments.csv}: train it first")
    arguments.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
