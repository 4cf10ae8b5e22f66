"""Randomness that belongs to a block of tokens, not to the order in which batches are made.

A `DataLoader` makes the next batch before the model has seen the last one, so the state of torch's generator in a
checkpoint is one batch ahead of the model: a collator that draws from it hides other tokens in a resumed run.
"""

import hashlib
import math

import torch
from torch import Tensor
from transformers import TrainerCallback


class BlockDraws:
    """Gives each block its own generator, by its tokens, the seed and the epoch: the same whatever the batches are,
    however many processes load them, and in a run that is resumed."""

    def __init__(self, seed: int = 0):
        self.seed, self.epoch = seed, 0

    def generator(self, tokens: Tensor) -> torch.Generator:
        """What draws for the block `tokens` `[L]`, on the CPU."""
        digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=7)
        digest.update(f"{self.seed} {self.epoch}".encode())
        return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))


class NewDrawsEachEpoch(TrainerCallback):
    """Tells what draws which epoch it is."""

    def __init__(self, draws: BlockDraws):
        self.draws = draws

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.draws.epoch = math.floor((state.epoch or 0) + 1e-6)
