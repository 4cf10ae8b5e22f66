"""ROUGE of generated texts, and the texts themselves beside what was expected."""

import json
import os
from pathlib import Path

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class RougeMetrics:
    """For `Seq2SeqTrainer(compute_metrics=)` with `predict_with_generate`.

    ROUGE-1, -2 and -L (Lin, 2004) as `rouge_score` counts them with stemming: F1 in percent, the mean over all texts.
    Beside them how many texts are exactly the expected one, in percent, and the mean number of generated tokens. Each
    evaluation leaves its texts in a file, one JSON object a line: source (its start), prediction, target.

    Args:
        tokenizer: decodes predictions and labels.
        sources: the texts that the predictions are made of, in their order.
        path: the file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sources: list[str], path: Path):
        self.tokenizer, self.sources, self.path = tokenizer, sources, path
        from rouge_score import rouge_scorer  # and with it nltk, which no other objective needs

        self.scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)

    def decode(self, ids: np.ndarray) -> list[str]:
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)  # -100 is padding of Trainer's
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predicted, expected = self.decode(prediction.predictions), self.decode(prediction.label_ids)
        scores = [self.scorer.score(target, text) for target, text in zip(expected, predicted, strict=True)]
        metrics = {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE_TYPES}
        metrics["exact_match"] = 100 * float(np.mean([a == b for a, b in zip(predicted, expected, strict=True)]))
        # The first token is the one that the decoder starts with.
        real = prediction.predictions[:, 1:]
        metrics["gen_len"] = float(np.mean(((real != self.tokenizer.pad_token_id) & (real >= 0)).sum(-1)))
        self.write(predicted, expected)
        return metrics

    def write(self, predicted: list[str], expected: list[str]) -> None:
        rows = zip(self.sources, predicted, expected, strict=True)
        lines = [
            json.dumps({"source": source[:400], "prediction": text, "target": target}, ensure_ascii=False)
            for source, text, target in rows
        ]
        partial = self.path.with_suffix(f".{os.getpid()}.partial")  # every process of a run has all of them
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(partial, self.path)
