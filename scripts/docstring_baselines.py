"""What needs no model: the ROUGE on held-out docstrings that a model trained on them must beat.

    python scripts/docstring_baselines.py

- **most common**: the docstring that most training functions have, whatever the function.
- **typical**: of the training docstrings of 1,000 functions the one that is most like the others (mean ROUGE-1).
- **name**: the function's name as words: `get_event_loop` says "get event loop".
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pair_sources import load_pair_splits
from rouge_metrics import ROUGE_TYPES
from rouge_score.rouge_scorer import RougeScorer


NAME = re.compile(r"def\s+(\w+)")
CANDIDATES = 1000


def name_as_words(source: str) -> str:
    """The words of the name of the first function in `source`, parted at underscores and capitals."""
    found = NAME.search(source)
    return " ".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", found[1])) if found else ""


def most_typical(texts: Sequence[str], scorer: RougeScorer, others: int = 40) -> str:
    """The text with the highest mean ROUGE-1 against `others` of them, evenly taken."""
    references = texts[:: max(len(texts) // others, 1)]

    def likeness(text: str) -> float:
        return sum(scorer.score(reference, text)["rouge1"].fmeasure for reference in references)

    return max(dict.fromkeys(texts), key=likeness)


def rouge(predicted: Sequence[str], expected: Sequence[str], scorer: RougeScorer) -> dict[str, float]:
    """Mean F1 in percent, as `RougeMetrics` has it."""
    scores = [scorer.score(target, text) for target, text in zip(expected, predicted, strict=True)]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE_TYPES}


def baselines(train: Sequence[str], sources: Sequence[str], expected: Sequence[str]) -> dict[str, dict[str, float]]:
    """ROUGE by name of the baseline, for training docstrings, held-out functions and their docstrings."""
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    common = Counter(train).most_common(1)[0][0]
    typical = most_typical(train[:: max(len(train) // CANDIDATES, 1)], RougeScorer(["rouge1"], use_stemmer=True))
    return {
        f"most common ({common!r})": rouge([common] * len(expected), expected, scorer),
        f"typical ({typical!r})": rouge([typical] * len(expected), expected, scorer),
        "name": rouge([name_as_words(source) for source in sources], expected, scorer),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    splits = load_pair_splits()
    held_out = splits.validation
    print(f"{len(splits.train)} pairs to learn from, {len(held_out)} held out")
    for name, found in baselines(splits.train["target"][:], held_out["source"][:], held_out["target"][:]).items():
        print(f"{name}: " + ", ".join(f"{kind} {value:.1f}" for kind, value in found.items()))


if __name__ == "__main__":
    main()
