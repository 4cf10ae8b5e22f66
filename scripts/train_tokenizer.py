"""Trains a byte-level BPE tokenizer with T5's special tokens on the text that train.py would train on.

    python scripts/train_tokenizer.py --output_dir outputs/tokenizer --vocab_size 4096
    python scripts/train.py --tokenizer_name outputs/tokenizer ...

Any text can be written with it: its alphabet is the 256 bytes. `<pad>`, `</s>` and `<unk>` are 0, 1 and 2, sequences
end with `</s>`, the sentinels `<extra_id_0>`, … of span corruption come last. Held-out documents are not looked at.
"""

import argparse
from collections.abc import Iterable

from text_sources import load_splits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int, num_sentinels: int = 100) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens, sentinels included, of which the merges are learned from `texts`.

    Raises:
        ValueError: a vocabulary in which the bytes and the special tokens have no room.
    """
    if num_sentinels < 0:
        raise ValueError(f"num_sentinels must be at least 0, got {num_sentinels}")
    if vocab_size < SMALLEST_VOCABULARY + num_sentinels:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY + num_sentinels} (256 bytes, {len(SPECIAL_TOKENS)} "
            f"special tokens, {num_sentinels} sentinels), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_sentinels,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    sentinels = [f"<extra_id_{index}>" for index in range(num_sentinels)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        extra_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--num_sentinels", type=int, default=100)
    for argument in ("train_file", "validation_file", "text_folder", "dataset_name", "dataset_config_name"):
        parser.add_argument(f"--{argument}")
    parser.add_argument("--text_column_name", default="text")
    parser.add_argument("--validation_split_percentage", type=float, default=5.0)
    options = vars(parser.parse_args())
    output, vocab_size, num_sentinels = (options.pop(name) for name in ("output_dir", "vocab_size", "num_sentinels"))
    splits = load_splits(**options)
    tokenizer = train_tokenizer(splits.train["text"], vocab_size, num_sentinels)
    tokenizer.save_pretrained(output)
    sample = splits.validation["text"][0]
    length = len(tokenizer(sample, verbose=False)["input_ids"])
    print(f"{len(tokenizer)} tokens from {splits.description} in {output}")
    print(f"{len(sample.encode()) / length:.2f} bytes per token of a held-out document")


if __name__ == "__main__":
    main()
