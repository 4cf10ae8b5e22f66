"""Does the router find the few tokens that matter? Associative recall among 4,096 tokens, routed and static.

    python scripts/recall_experiment.py                  10 runs of minutes each on one core
    python scripts/recall_experiment.py --seeds 0 --routing learned
    python scripts/recall_figure.py                      draws docs/figures/colt5_recall.png from the rows

A CoLT5 encoder of two layers reads the task of `recall_task.py`; a linear layer reads the answer off its last token.
Its light attention reaches two tokens, so nothing but the heavy branch, in which 32 of the 4,096 tokens ask and 32 are
asked, can carry the value to where it is needed. With `static_routing` (the paper's control, section 4.4) these 32 are
evenly spaced, and the last token is always one of them. All else is the same for both: weights from the same seed,
data, and a training that begins with 32 tokens, all of which are routed, and goes on to a greater length once held-out
sequences of one are solved (99.5 % at first, then 97 %), or after a number of steps; the last stage, of 4,096 tokens,
always has all of its own. The first lengths grow slowly, since a router learns from the tokens that it routes alone:
with lengths doubled from the start seed 0 ended at 61 %. At 32 tokens nearly all must be right: with 97 % there
seed 3 stayed near 15 of 16 and ended at 90 %.

Each finished run appends its rows to docs/benchmarks/colt5_recall.csv, and what it routed in the first held-out
sequence to colt5_recall_positions.csv. A run that has its rows already is left out: an interrupted experiment goes on,
and several processes can share the runs (`--seeds`, `--routing`).
"""

import argparse
import csv
import fcntl
import io
import os
from pathlib import Path

import torch
from benchmark_measure import ROOT, provenance
from recall_task import FIRST_KEY, FIRST_QUERY, VALUES, VOCABULARY, draw_batch
from torch import Tensor, nn

from hf_efficient import CoLT5Config, CoLT5EncoderModel


ROUTINGS = ("learned", "static")
ROUTED = 32
# Tokens of a sequence, at most so many steps, learning rate. A stage ends as soon as it is solved.
STAGES = (
    (32, 2000, 3e-3),
    (36, 200, 3e-3),
    (40, 200, 3e-3),
    (48, 200, 3e-3),
    (64, 200, 3e-3),
    (96, 150, 2e-3),
    (128, 120, 1.5e-3),
    (192, 100, 1.5e-3),
    (256, 100, 1.5e-3),
    (512, 200, 1.5e-3),
    (1024, 150, 1.5e-3),
    (2048, 100, 1.5e-3),
    (4096, 80, 1e-3),
)
SOLVED_AT_FIRST, SOLVED = 0.995, 0.97
STEPS_BETWEEN_EVALUATIONS, WARM_UP_STEPS = 20, 50
EVALUATION_TOKENS, EVALUATION_SEQUENCES, FINAL_SEQUENCES = 1 << 16, 512, 128
EVALUATION_SEED = 7
ROLES = ("queries", "keys", "feed_forward")

FILES = {
    "colt5_recall.csv": [
        *("routing", "seed", "step", "length", "loss", "accuracy", "needle_routed", "sequences", "final"),
        *("torch", "commit", "date"),
    ],
    "colt5_recall_positions.csv": ["routing", "seed", "layer", "role", "position", "token"],
}


class RecallModel(nn.Module):
    """A CoLT5 encoder and a linear layer on its last token."""

    def __init__(self, routing: str):
        super().__init__()
        config = CoLT5Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_light_attention_heads=1,
            num_heavy_attention_heads=4,
            head_dim=16,
            light_intermediate_size=64,
            heavy_intermediate_size=128,
            light_attention_radius=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=8,
            heavy_position_embedding_type="none",  # what is asked for can stand anywhere
            num_routed_tokens=ROUTED,
            num_routed_queries=ROUTED,
            num_routed_keys=ROUTED,
            static_routing=routing == "static",
            dropout_rate=0.0,
        )
        self.encoder = CoLT5EncoderModel(config)
        self.head = nn.Linear(config.hidden_size, VALUES)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple]:
        """Logits `[B, VALUES]` for `[B, N]` tokens, and every router's decision."""
        outputs = self.encoder(input_ids=input_ids, output_router_logits=True)
        return self.head(outputs.last_hidden_state[:, -1]), outputs.router_logits


@torch.no_grad()
def evaluate(model: RecallModel, length: int, sequences: int) -> dict[str, float]:
    """Accuracy on held-out sequences, and how often the last layer routes the pair that is asked for, as a key."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    right, routed, done = 0, 0, 0
    while done < sequences:
        rows = min(sequences - done, max(EVALUATION_TOKENS // 2 // length, 1))
        batch = draw_batch(rows, length, generator)
        logits, decisions = model(batch.input_ids)
        right += int((logits.argmax(-1) == batch.answers).sum())
        keys = decisions[-2].indices[:, 0]  # queries, keys, feed-forward of each layer
        distance = keys - batch.places[:, :1]
        routed += int(((distance == 0) | (distance == 1)).any(-1).sum())
        done += rows
    return {"accuracy": right / sequences, "needle_routed": routed / sequences, "sequences": sequences}


@torch.no_grad()
def routed_positions(model: RecallModel, length: int) -> list[dict]:
    """What every router chose in the first held-out sequence. A value that belongs to no key is filler."""
    batch = draw_batch(1, length, torch.Generator().manual_seed(EVALUATION_SEED))
    places, rows = batch.places[0].tolist(), []
    for index, decision in enumerate(model(batch.input_ids)[1]):
        for position in sorted(decision.indices.flatten().tolist()):
            token = "filler"
            if batch.input_ids[0, position] >= FIRST_KEY:
                token = "query" if batch.input_ids[0, position] >= FIRST_QUERY else "key"
            elif position - 1 in places:
                token = "value"
            row = {"layer": index // len(ROLES) + 1, "role": ROLES[index % len(ROLES)]}
            rows.append(row | {"position": position, "token": token})
    return rows


def run(routing: str, seed: int, stages=STAGES) -> tuple[list[dict], list[dict]]:
    """Trains one model; rows for both files."""
    torch.manual_seed(seed)
    model = RecallModel(routing)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    step, curve = 0, []
    for length, steps, learning_rate in stages:
        last, losses = length == stages[-1][0], []
        solved = SOLVED_AT_FIRST if length == stages[0][0] else SOLVED
        for number in range(1, steps + 1):
            for group in optimizer.param_groups:
                fading = 1 - 0.9 * number / steps if last else 1.0
                group["lr"] = learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS) * fading
            batch = draw_batch(max(min(4096 // length, 128), 4), length, generator)
            loss = nn.functional.cross_entropy(model(batch.input_ids)[0], batch.answers)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            if number % STEPS_BETWEEN_EVALUATIONS == 0 or number == steps:
                found = evaluate(model, length, max(min(EVALUATION_TOKENS // length, EVALUATION_SEQUENCES), 1))
                curve.append({"step": step, "length": length, "loss": sum(losses) / len(losses), "final": 0} | found)
                losses = []
                if found["accuracy"] >= solved and not last:
                    break
    length = stages[-1][0]
    curve.append({"step": step, "length": length, "loss": curve[-1]["loss"], "final": 1})
    curve[-1] |= evaluate(model, length, FINAL_SEQUENCES)
    own = {"routing": routing, "seed": seed}
    return [own | row for row in curve], [own | row for row in routed_positions(model, length)]


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    """The file with more rows, whole or not at all; several processes may add theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*read_rows(path), *rows])
        partial = path.with_suffix(".partial")
        partial.write_text(text.getvalue())
        os.replace(partial, path)
    finally:
        os.close(folder)  # and with it goes the lock


def main(argv: list[str] | None = None, stages=STAGES) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+", default=list(ROUTINGS))
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/benchmarks", help="of the rows")
    arguments = parser.parse_args(argv)
    table, positions = (arguments.folder / name for name in FILES)
    for seed in arguments.seeds:
        for routing in arguments.routing:
            done = {(row["routing"], row["seed"]) for row in read_rows(table)}
            if (routing, str(seed)) in done:
                continue
            stamp = provenance("default", torch.get_num_threads())
            stamp = {name: stamp[name] for name in ("torch", "commit", "date")}
            curve, chosen = run(routing, seed, stages)
            curve = [
                row | {name: f"{row[name]:.4f}" for name in ("loss", "accuracy", "needle_routed")} for row in curve
            ]
            append_rows(positions, FILES[positions.name], chosen)
            append_rows(table, FILES[table.name], [row | stamp for row in curve])
            final = curve[-1]
            print(
                f"{routing} routing, seed {seed}: accuracy {final['accuracy']} on {final['sequences']} sequences of "
                f"{final['length']} tokens; the pair asked for is routed in {final['needle_routed']}",
                flush=True,
            )
    return read_rows(table)


if __name__ == "__main__":
    main()
