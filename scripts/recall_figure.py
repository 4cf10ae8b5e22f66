"""Draws the recall experiment from its rows: accuracy by length of the sequence, and what the routers chose.

python scripts/recall_figure.py        docs/benchmarks/colt5_recall*.csv -> docs/figures/colt5_recall.png
"""

import argparse
import statistics
from pathlib import Path

from benchmark_measure import ROOT
from recall_experiment import FILES, ROLES, ROUTINGS, read_rows
from recall_task import CHANCE


COLOURS = {"learned": "tab:blue", "static": "tab:red"}
TOKEN_COLOURS = {"filler": "lightgrey", "key": "tab:green", "value": "tab:olive", "query": "black"}


def accuracy_curves(rows: list[dict]) -> dict[str, list[tuple[int, float, float, float]]]:
    """For each routing: (length, lowest, median, highest accuracy of the seeds at the end of that stage) in order."""
    last = {(row["routing"], int(row["length"]), row["seed"]): float(row["accuracy"]) for row in rows}
    curves = {routing: [] for routing in ROUTINGS}
    for routing in ROUTINGS:
        for length in sorted({length for own, length, _ in last if own == routing}):
            found = [value for (own, size, _), value in last.items() if (own, size) == (routing, length)]
            curves[routing].append((length, min(found), statistics.median(found), max(found)))
    return curves


def final_accuracies(rows: list[dict]) -> dict[str, dict[int, float]]:
    """For each routing the accuracy of each seed at the end."""
    finals = {routing: {} for routing in ROUTINGS}
    for row in rows:
        if row["final"] == "1":
            finals[row["routing"]][int(row["seed"])] = float(row["accuracy"])
    return finals


def draw_accuracy(panel, rows: list[dict]) -> None:
    curves, finals = accuracy_curves(rows), final_accuracies(rows)
    for routing, points in curves.items():
        if points:
            lengths, low, middle, high = zip(*points, strict=True)
            found = finals[routing].values()
            label = f"{routing} routing: {min(found):.1%} to {max(found):.1%} at the end, {len(found)} seeds"
            panel.plot(lengths, middle, color=COLOURS[routing], label=label, marker=".")
            panel.fill_between(lengths, low, high, color=COLOURS[routing], alpha=0.2, linewidth=0)
    panel.axhline(CHANCE, color="grey", linestyle=":", label=f"chance ({CHANCE:.1%})")
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) if length.bit_count() == 1 else "" for length in lengths])
    panel.set(xlabel="tokens in a sequence, of which 32 are routed", ylabel="held-out accuracy", ylim=(0, 1.05))
    panel.legend(frameon=False, fontsize=8, loc="center right")


def draw_positions(panel, rows: list[dict], routing: str, seed: str, length: int) -> None:
    """One line for each router of each layer, a stroke at each routed token."""
    own = [row for row in rows if (row["routing"], row["seed"]) == (routing, seed)]
    lines = sorted({(int(row["layer"]), ROLES.index(row["role"])) for row in own}, reverse=True)
    for token, colour in TOKEN_COLOURS.items():
        chosen = [row for row in own if row["token"] == token]
        height = [lines.index((int(row["layer"]), ROLES.index(row["role"]))) for row in chosen]
        places = [int(row["position"]) for row in chosen]
        size = 26 if token == "filler" else 60
        panel.scatter(places, height, marker="|", s=size, color=colour, label=token, linewidths=1.4)
    names = [f"layer {layer}, {ROLES[role].replace('_', '-')}" for layer, role in lines]
    panel.set_yticks(range(len(lines)), names, fontsize=8)
    panel.set(xlim=(-40, length + 40), title=f"{routing} routing, seed {seed}: the routed tokens of one sequence")
    panel.title.set_fontsize(9)


def draw(folder: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table, positions = (read_rows(folder / name) for name in FILES)
    if not table:
        raise ValueError(f"{folder} must hold the rows of recall_experiment.py, got none")
    length = max(int(row["length"]) for row in table)
    seed = min((row["seed"] for row in positions), key=int)
    figure, panels = pyplot.subplots(1 + len(ROUTINGS), figsize=(9, 8), height_ratios=[1.3, 1, 1])
    draw_accuracy(panels[0], table)
    for panel, routing in zip(panels[1:], ROUTINGS, strict=True):
        draw_positions(panel, positions, routing, seed, length)
    panels[1].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.3))
    panels[-1].set_xlabel("position")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/benchmarks", help="of the rows")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/colt5_recall.png")
    arguments = parser.parse_args(argv)
    draw(arguments.folder, arguments.figure)
    for routing, found in final_accuracies(read_rows(arguments.folder / next(iter(FILES)))).items():
        print(f"{routing}: {', '.join(f'{value:.1%}' for _, value in sorted(found.items()))}")


if __name__ == "__main__":
    main()
