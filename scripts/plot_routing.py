"""Draws which tokens of a text each layer of a CoLT5 sends down the heavy path.

    python scripts/plot_routing.py --model_name_or_path outputs/docstrings --text_file some_source.py \
        --max_length 4096 --first_token 0 --num_tokens 300 --output routing.png

One panel for each layer and router: queries of the heavy attention, its keys and values, and the heavy feed-forward.
The text is drawn as it stands, routed tokens on a coloured ground, the stronger the higher their soft top-k score. The
model reads the first `--max_length` tokens; drawn are `--num_tokens` of them from `--first_token` on. Any class with
routers will do: encoder–decoder (its encoder is drawn), encoder, causal model. For each panel it prints how many of
the tokens were routed, and which kinds of token most.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel

import hf_efficient  # noqa: F401  (registers our architectures with the Auto classes)


ROLES = ("queries", "keys and values", "feed-forward")
COLOURS = ("tab:blue", "tab:green", "tab:orange")
FONT_SIZE, CELL_WIDTH, LINE_HEIGHT = 7.0, 0.602, 1.35  # of DejaVu Sans Mono, in units of the font's size
POINTS_PER_INCH = 72


class RouterDecision(NamedTuple):
    """What one router chose in one text: `scores` `[N]` holds 0 at tokens that it left to the light path.

    Attributes:
        layer: from 1.
        role: one of `ROLES`.
        routed: `[N]`, bool.
        scores: `[N]`, in [0, 1]; of several sets of keys the highest.
    """

    layer: int
    role: str
    routed: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def router_decisions(model: PreTrainedModel, input_ids: torch.Tensor) -> list[RouterDecision]:
    """The decisions of every router for `input_ids` `[N]`, layer by layer, each in the order of `ROLES`.

    Raises:
        ValueError: a model that has no routers.
    """
    outputs = model(input_ids=input_ids[None], output_router_logits=True)
    routings = outputs.get("router_logits") or outputs.get("encoder_router_logits")
    if not routings:
        raise ValueError(f"the model must have routers, got {type(model).__name__}, which returned none")
    decisions = []
    for index, routing in enumerate(routings):
        mask = torch.ones_like(routing.indices, dtype=torch.bool) if routing.mask is None else routing.mask
        routed, scores = torch.zeros(len(input_ids), dtype=torch.bool), torch.zeros(len(input_ids))
        for places, weights, real in zip(routing.indices[0], routing.scores[0], mask[0], strict=True):
            routed[places[real]] = True
            scores[places[real]] = torch.maximum(scores[places[real]], weights[real].float())
        decisions.append(RouterDecision(index // len(ROLES) + 1, ROLES[index % len(ROLES)], routed, scores))
    return decisions


def token_cells(tokenizer, input_ids: list[int], width: int) -> tuple[list[str], list[list[tuple[int, int, int]]]]:
    """Lines of at most `width` characters, and for each token its cells in them: (line, first column, columns).

    Where several tokens make one character, one of them has its cell.
    """
    lines, cells, before = [""], [], 0
    text = tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)
    for index in range(len(input_ids)):
        end = len(tokenizer.decode(input_ids[: index + 1], clean_up_tokenization_spaces=False))
        places = []
        for character in text[before:end]:
            if character == "\n":
                places.append((len(lines) - 1, len(lines[-1]), 1))
                lines.append("")
                continue
            if len(lines[-1]) >= width:
                lines.append("")
            places.append((len(lines) - 1, len(lines[-1]), 1))
            lines[-1] += character if character.isprintable() else " "
        cells.append(places)
        before = end
    return lines, cells


def draw(tokenizer, input_ids: list[int], decisions: list[RouterDecision], window: range, path: Path, width: int = 72):
    """The figure for the tokens in `window`, written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    lines, cells = token_cells(tokenizer, input_ids[window.start : window.stop], width)
    layers = max(decision.layer for decision in decisions)
    cell, line = FONT_SIZE * CELL_WIDTH / POINTS_PER_INCH, FONT_SIZE * LINE_HEIGHT / POINTS_PER_INCH
    size = ((width + 3) * cell * len(ROLES), (len(lines) + 2.5) * line * layers)
    figure, panels = pyplot.subplots(layers, len(ROLES), figsize=size, squeeze=False)
    for decision in decisions:
        column = ROLES.index(decision.role)
        panel = panels[decision.layer - 1][column]
        share = decision.routed[window.start : window.stop].float().mean()
        panel.set_title(
            f"layer {decision.layer}, {decision.role}: {share:.0%} of these tokens", fontsize=FONT_SIZE + 1
        )
        panel.set(xlim=(0, width), ylim=(len(lines), 0))
        panel.axis("off")
        for offset, places in enumerate(cells):
            position = window.start + offset
            if decision.routed[position]:
                shade = 0.25 + 0.65 * float(decision.scores[position])
                for row, start, count in places:
                    ground = Rectangle((start, row), count, 1, color=COLOURS[column], alpha=shade, linewidth=0)
                    panel.add_patch(ground)
        for row, text in enumerate(lines):
            panel.text(
                0, row + 0.5, text, fontsize=FONT_SIZE, family="DejaVu Sans Mono", va="center", parse_math=False
            )
    figure.subplots_adjust(
        left=cell / size[0],
        right=1 - cell / size[0],
        bottom=0.01,
        top=1 - 1.5 * line / size[1],
        wspace=0.04,
        hspace=0.06,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def describe(tokenizer, input_ids: list[int], decision: RouterDecision, most: int = 8) -> str:
    """One line: how many tokens were routed, and which kinds of token most."""
    kinds = Counter(input_ids[place] for place in decision.routed.nonzero().flatten().tolist())
    names = ", ".join(f"{tokenizer.decode([token])!r} {count}" for token, count in kinds.most_common(most))
    routed = int(decision.routed.sum())
    return f"layer {decision.layer}, {decision.role}: {routed} of {len(input_ids)} tokens routed; most: {names}"


def load_routed_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal model of a causal checkpoint, the encoder of any other."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    causal = not config.is_encoder_decoder and getattr(config, "is_decoder", False)
    auto_class = AutoModelForCausalLM if causal else AutoModelForTextEncoding
    return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code).eval()


def main(argv: list[str] | None = None) -> list[RouterDecision]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--text_file", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens that the model reads")
    parser.add_argument("--first_token", type=int, default=0)
    parser.add_argument("--num_tokens", type=int, default=300, help="tokens that are drawn")
    parser.add_argument("--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code
    )
    text = arguments.text_file.read_text(encoding="utf-8")
    input_ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"][: arguments.max_length]
    window = range(arguments.first_token, min(arguments.first_token + arguments.num_tokens, len(input_ids)))
    if arguments.first_token < 0 or not window:
        parser.error(f"--first_token must be one of the {len(input_ids)} tokens read, got {arguments.first_token}")
    model = load_routed_model(arguments.model_name_or_path, arguments.trust_remote_code)
    decisions = router_decisions(model, torch.tensor(input_ids))
    draw(tokenizer, input_ids, decisions, window, arguments.output)
    for decision in decisions:
        print(describe(tokenizer, input_ids, decision))
    return decisions


if __name__ == "__main__":
    main()
