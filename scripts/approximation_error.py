"""How far linear attention with random features is from the softmax attention that it estimates.

    python scripts/approximation_error.py            about a minute; writes docs/benchmarks/approximation_error.csv
                                                     and docs/figures/approximation_error.png

Relative error |out - softmax| / |softmax| of bidirectional attention with d = 64, 512 tokens and standard normal
values, for queries and keys ~ N(0, s²). Beside the feature maps stands "mean of the values", which looks at neither
query nor key: a map above that line does worse than no attention at all, which happens where the estimate's variance
is larger than what it estimates. Nothing here is trained; a model learns queries and keys that suit its features.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_measure import ROOT, peer_version, provenance

from hf_efficient.kernels.linear_attention import FeatureMap, linear_attention
from hf_efficient.modeling.random_features import draw_projection, optimal_positive_constants


HEAD_DIM, LENGTH, HEADS = 64, 512, 4
SCALES = (0.25, 0.5, 1.0, 1.5)
FEATURES = (64, 256, 1024, 4096)
TABLE_FEATURES = 256
COLUMNS = ["feature_map", "scale", "features", "median", "p20", "p80", "seeds", "peer", "torch", "commit", "date"]


def softmax_features(projection, query, key, epsilon=1e-6):
    """Positive features (arXiv 2009.14794, eq. 6)."""
    return FeatureMap("exponential", projection, None, HEAD_DIM**-0.25, epsilon)


def softmax_features_without_floor(projection, query, key):
    return softmax_features(projection, query, key, epsilon=0.0)


def hyperbolic_features(projection, query, key):
    """Half as many rows, each with both signs."""
    half = projection[: projection.shape[0] // 2]
    return softmax_features(torch.cat([half, -half]), query, key)


def optimal_positive_features(projection, query, key):
    """The positive features of least variance (arXiv 2205.15317), for these queries and keys."""
    # Over all pairs, which a model would average over as well: E|q + k|² = E|q|² + E|k|² + 2 E[q]·E[k].
    means = [t.mean(dim=(0, 1, 2)) for t in (query, key)]
    squares = [t.square().sum(-1).mean() for t in (query, key)]
    pair_norm = (sum(squares) + 2 * means[0] @ means[1]) * HEAD_DIM**-0.5
    a, b = optimal_positive_constants(HEAD_DIM, pair_norm)
    return FeatureMap("exponential", b * projection, a * projection.square().sum(1), HEAD_DIM**-0.25, 1e-6)


MAPS = {
    "softmax": softmax_features,
    "softmax, no floor": softmax_features_without_floor,
    "hyperbolic": hyperbolic_features,
    "optimal_positive": optimal_positive_features,
}
MEAN, PEER = "mean of the values", "performer-pytorch"


def errors_of_one_draw(seed: int, scale: float, features: int) -> dict[str, float]:
    """Relative error of every feature map on one draw of inputs and projection."""
    torch.manual_seed(seed)
    query, key = (scale * torch.randn(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64) for _ in range(2))
    value = torch.randn(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(query, key, value)
    projection = draw_projection(features, HEAD_DIM, seed=seed, layer_idx=0, draw=0).double()
    outputs = {
        name: linear_attention(query, key, value, make(projection, query, key)).output for name, make in MAPS.items()
    }
    outputs[MEAN] = value.mean(dim=2, keepdim=True).expand_as(value)
    outputs[PEER] = _performer_pytorch(features)(query, key, value)
    return {name: ((output - exact).norm() / exact.norm()).item() for name, output in outputs.items()}


def _performer_pytorch(features):
    """With its own draw of the projection and its floor of 1e-4 below a maximum over the sequence."""
    from performer_pytorch import FastAttention

    return FastAttention(HEAD_DIM, nb_features=features).double()


def measure(seeds: int, scales=SCALES, feature_counts=FEATURES) -> list[dict]:
    rows = []
    stamp = provenance("default", torch.get_num_threads())
    for features in feature_counts:
        for scale in scales:
            draws = [errors_of_one_draw(seed, scale, features) for seed in range(seeds)]
            for name in draws[0]:
                found = sorted(draw[name] for draw in draws)
                row = {
                    "feature_map": name,
                    "scale": scale,
                    "features": features,
                    "median": statistics.median(found),
                    "p20": found[int(0.2 * seeds)],
                    "p80": found[min(int(0.8 * seeds), seeds - 1)],
                    "seeds": seeds,
                    "peer": peer_version(PEER) if name == PEER else "",
                }
                rows.append(row | {name: stamp[name] for name in ("torch", "commit", "date")})
    return rows


def table(rows: list[dict]) -> str:
    """Median error (20 % to 80 % of the draws) at 256 features, one column per scale."""
    from benchmark_table import markdown_table

    scales = sorted({row["scale"] for row in rows})
    counts = {row["features"] for row in rows}
    features = TABLE_FEATURES if TABLE_FEATURES in counts else max(counts)
    found = {(row["feature_map"], row["scale"]): row for row in rows if row["features"] == features}

    def cell(row):
        return f"{row['median']:.3f} ({row['p20']:.3f}–{row['p80']:.3f})"

    lines = [(name, *[cell(found[name, s]) for s in scales]) for name in dict.fromkeys(n for n, _ in found)]
    return markdown_table([f"{features} features", *[f"s = {scale:g}" for scale in scales]], lines)


def draw_figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scales = sorted({row["scale"] for row in rows})
    figure, panels = pyplot.subplots(1, len(scales), figsize=(3.2 * len(scales), 3.6), sharey=True, squeeze=False)
    for panel, scale in zip(panels[0], scales, strict=True):
        for name in dict.fromkeys(row["feature_map"] for row in rows):
            own = [row for row in rows if (row["feature_map"], row["scale"]) == (name, scale)]
            counts = [row["features"] for row in own]
            style = {MEAN: {"color": "black", "linestyle": ":"}, PEER: {"linestyle": "--"}}.get(name, {})
            (line,) = panel.plot(counts, [row["median"] for row in own], label=name, **style)
            low, high = ([row[p] for row in own] for p in ("p20", "p80"))
            panel.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(title=f"queries, keys ~ N(0, {scale:g}²)", xlabel="features", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative error against softmax attention")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws of inputs and projection")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="standard deviations")
    parser.add_argument("--features", type=int, nargs="+", default=FEATURES, help="numbers of features")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/benchmarks/approximation_error.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/approximation_error.png")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        sys.exit(f"--seeds must be at least 1, got {arguments.seeds}")
    rows = measure(arguments.seeds, arguments.scales, arguments.features)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row | {n: f"{row[n]:.5g}" for n in ("median", "p20", "p80")} for row in rows)
    draw_figure(rows, arguments.figure)
    print(table(rows))


if __name__ == "__main__":
    main()
