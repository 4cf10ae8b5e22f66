"""Perplexity and bits per byte of held-out text, from the total of nats and not from a mean of means.

`eval_loss` stays what `Trainer` makes it (a mean over batches). The figures here come from one sum over every scored
token, so they do not depend on batch size, block size or the number of processes; bits per byte does not depend on the
tokenizer either: total nats / ln 2 / UTF-8 bytes of the evaluated text. The separators between documents are paid for
too, as a decoder would need them.
"""

import math
from collections.abc import Callable

import torch
from text_data import IGNORED_LABEL, EvaluationBlocks, Objective
from transformers import ByT5Tokenizer, EvalPrediction, PreTrainedTokenizerBase


def row_totals(objective: Objective) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """For `Trainer(preprocess_logits_for_metrics=)`: logits `[B, T, V]` become nats and tokens per row, `[B, 2]`.

    A causal model may have logits for the last T of the labels' positions only; labels in front of them are left out.
    """

    def totals(logits, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(logits, tuple):  # a model that returns more than logits
            logits = logits[0]
        if objective == "causal":
            logits, labels = logits[:, :-1], labels[:, -logits.shape[1] :][:, 1:]
        nats = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
        )
        return torch.stack([nats.sum(-1), (labels != IGNORED_LABEL).sum(-1).to(nats.dtype)], dim=-1)

    return totals


def exponential(nats: float) -> float:
    """e to the mean loss, infinite where an untrained or diverged model would overflow a float."""
    return math.exp(nats) if nats < 700 else math.inf


class HeldOutMetrics:
    """For `Trainer(compute_metrics=)` with `batch_eval_metrics`: adds rows up, reports at the last batch."""

    def __init__(self, objective: Objective, evaluation: EvaluationBlocks, tokenizer: PreTrainedTokenizerBase):
        self.objective = objective
        self.evaluation = evaluation
        self.tokens_are_bytes = isinstance(tokenizer, ByT5Tokenizer)
        self.nats = 0.0
        self.tokens = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        totals = torch.as_tensor(prediction.predictions).double().sum(0)
        self.nats += totals[0].item()
        self.tokens += round(totals[1].item())
        if not compute_result:
            return {}
        nats, tokens = self.nats, self.tokens
        self.nats, self.tokens = 0.0, 0
        expected = self.evaluation.scored_tokens
        if tokens != expected:
            raise RuntimeError(
                f"evaluation must score each of {expected} held-out tokens once, got {tokens}: a dataloader that "
                "drops or repeats blocks gives no bits per byte"
            )
        bits = nats / math.log(2)
        if self.objective == "causal":
            return {
                "perplexity": exponential(nats / tokens),
                "bits_per_byte": bits / self.evaluation.text_bytes,
                "scored_tokens": tokens,
                "text_bytes": self.evaluation.text_bytes,
            }
        # Only some tokens are asked for: this is no code length of the text, and must not be read as one.
        unit = "byte" if self.tokens_are_bytes else "token"
        if self.objective == "span_corruption":
            # Where a span ends is a part of what has to be said: sentinels count as nats, not as hidden tokens.
            hidden = self.evaluation.hidden_tokens
            return {f"bits_per_hidden_{unit}": bits / hidden, f"hidden_{unit}s": hidden, "target_tokens": tokens}
        return {
            f"perplexity_of_masked_{unit}s": exponential(nats / tokens),
            f"bits_per_masked_{unit}": bits / tokens,
            f"masked_{unit}s": tokens,
        }
