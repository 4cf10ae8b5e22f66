"""How far a model's logits move when `attn_implementation="favor"` replaces its softmax attention.

    python scripts/favor_error.py            a few minutes; writes docs/benchmarks/favor_error.csv
                                             and docs/figures/favor_error.png

Relative error |favor - softmax| / |softmax| of the logits of a BERT, a GPT-2 and a Llama (2 layers, heads of size 64,
256 random tokens) at the same weights, over projections from several seeds. The weights are random, as the models
initialise them; a sharpness of s multiplies the query and key projections by s, so that attention has something to
choose between (its scores grow by s²). Beside the feature maps stands "uniform", attention that looks at nothing: a
map above that line is worse than none. Nothing is trained here: after a conversion to a Performer comes a fine-tune.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from benchmark_measure import ROOT, provenance
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hf_efficient.attention import register_favor_attention


VOCABULARY, LENGTH = 1000, 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": LENGTH,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "BERT": BertConfig(**SIZES),
    "GPT-2": GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=2, n_head=4, n_positions=LENGTH, **TOKENS),
    "Llama": LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2),
}
MAPS = ("softmax", "hyperbolic", "optimal_positive")
UNIFORM = "uniform"
FEATURES, SHARPNESS = (64, 256, 1024, 4096), (1.0, 2.0, 4.0)
COLUMNS = ["model", "sharpness", "feature_map", "features", "median", "min", "max", "seeds", "torch", "commit", "date"]


def uniform_attention(module, query, *arguments, **kwargs):
    return sdpa_attention_forward(module, torch.zeros_like(query), *arguments, **kwargs)


def build_model(name: str, sharpness: float) -> PreTrainedModel:
    torch.manual_seed(0)
    auto_class = AutoModelForMaskedLM if name == "BERT" else AutoModelForCausalLM
    model = auto_class.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith("c_attn.weight"):  # [in, queries and keys and values]
                weight[:, : 2 * weight.shape[0]] *= sharpness
            elif parameter.endswith(("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")):
                weight *= sharpness
    return model


@torch.no_grad()
def measure(seeds: int, feature_counts=FEATURES, sharpness=SHARPNESS) -> list[dict]:
    AttentionInterface.register(UNIFORM, uniform_attention)
    AttentionMaskInterface.register(UNIFORM, sdpa_mask)
    stamp = provenance("default", torch.get_num_threads())
    rows = []
    for name in CONFIGS:
        for factor in sharpness:
            model = build_model(name, factor)
            ids = torch.randint(3, VOCABULARY, (1, LENGTH))
            exact = model(ids).logits

            def error(implementation, model=model, ids=ids, exact=exact):
                model.set_attn_implementation(implementation)
                return ((model(ids).logits - exact).norm() / exact.norm()).item()

            def row(kind, features, found, name=name, factor=factor):
                spread = {"median": statistics.median(found), "min": min(found), "max": max(found)}
                own = {"model": name, "sharpness": factor, "feature_map": kind, "features": features}
                return own | spread | {"seeds": len(found)} | {key: stamp[key] for key in ("torch", "commit", "date")}

            for features in feature_counts:
                rows.append(row(UNIFORM, features, [error(UNIFORM)]))
                for kind in MAPS:
                    found = []
                    for seed in range(seeds):
                        register_favor_attention(features, seed=seed, feature_map=kind, name="favor_measured")
                        found.append(error("favor_measured"))
                    rows.append(row(kind, features, found))
    return rows


def draw_figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    factors = sorted({row["sharpness"] for row in rows})
    shape = {"nrows": len(CONFIGS), "ncols": len(factors)}
    figure, panels = pyplot.subplots(
        **shape, figsize=(3.2 * len(factors), 2.6 * len(CONFIGS)), sharex=True, squeeze=False
    )
    for line_of_panels, name in zip(panels, CONFIGS, strict=True):
        for panel, factor in zip(line_of_panels, factors, strict=True):
            for kind in (*MAPS, UNIFORM):
                key = (name, factor, kind)
                own = [row for row in rows if (row["model"], row["sharpness"], row["feature_map"]) == key]
                counts = [row["features"] for row in own]
                style = {"color": "black", "linestyle": ":"} if kind == UNIFORM else {}
                (line,) = panel.plot(counts, [row["median"] for row in own], label=kind, **style)
                low, high = ([row[end] for row in own] for end in ("min", "max"))
                panel.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            panel.set(title=f"{name}, sharpness {factor:g}", xscale="log", yscale="log")
            panel.grid(alpha=0.3)
        line_of_panels[0].set_ylabel("relative error of the logits")
    for panel in panels[-1]:
        panel.set_xlabel("features")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def summary(rows: list[dict]) -> str:
    """One line for each model and sharpness: the error of the default map by number of features."""
    lines = []
    for row in rows:
        if row["feature_map"] == "softmax":
            own = (row["model"], row["sharpness"])
            if not lines or lines[-1][0] != own:
                lines.append((own, []))
            lines[-1][1].append(f"{row['features']}: {row['median']:.2e}")
    return "\n".join(f"{name}, sharpness {factor:g}: {', '.join(found)}" for (name, factor), found in lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="projections for each point")
    parser.add_argument("--features", type=int, nargs="+", default=FEATURES, help="numbers of features (even)")
    parser.add_argument("--sharpness", type=float, nargs="+", default=SHARPNESS, help="factors on queries and keys")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/benchmarks/favor_error.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/favor_error.png")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        sys.exit(f"--seeds must be at least 1, got {arguments.seeds}")
    rows = measure(arguments.seeds, arguments.features, arguments.sharpness)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row | {name: f"{row[name]:.5g}" for name in ("median", "min", "max")} for row in rows)
    draw_figure(rows, arguments.figure)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
