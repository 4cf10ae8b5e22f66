"""Training that ends when its time is over, with a learning rate that has come down by then.

A schedule over steps needs to know how many steps there will be; on an unknown machine only the clock knows. So the
learning rate follows the share of the budget that is spent, and the run stops with the step that spends the rest.
"""

import math
import time

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback


NO_LIMIT = 10**9  # for TrainingArguments(max_steps=): the clock decides


class Clock:
    """Share of a budget of seconds that is spent, from the moment it is started."""

    def __init__(self, seconds: float):
        if not seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds}")
        self.seconds = seconds
        self.started: float | None = None

    def start(self) -> None:
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def spent(self) -> float:
        return min(self.elapsed / self.seconds, 1.0)


def learning_rate_factor(spent: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Linear warm-up over the first `warmup` of the budget, then a cosine down to `floor`."""
    if spent < warmup:
        return max(spent / warmup, 0.05)
    progress = (spent - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clocked_schedule(optimizer: Optimizer, clock: Clock) -> LambdaLR:
    """For `Trainer(optimizers=)`: a scheduler that asks the clock and not the number of steps."""
    return LambdaLR(optimizer, lambda _: learning_rate_factor(clock.spent))


class TimeBudget(TrainerCallback):
    """Starts the clock, stops the training when it has run out, and shows both as a progress bar over seconds."""

    def __init__(self, clock: Clock, *, show: bool = True):
        self.clock = clock
        self.show = show
        self.bar: tqdm | None = None
        self.evaluation_bar: tqdm | None = None
        self.loss: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.start()
        self.bar = tqdm(
            total=round(self.clock.seconds),
            desc="training",
            unit="s",
            disable=not self.show,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}",
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.n = round(min(self.clock.elapsed, self.clock.seconds))
        loss = "" if self.loss is None else f", loss {self.loss:.3f} nats per byte"
        rate = state.global_step / max(self.clock.elapsed, 1e-9)
        self.bar.set_postfix_str(f"step {state.global_step} ({rate:.1f}/s){loss}")
        if self.clock.spent >= 1:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluation_bar is None:
            self.evaluation_bar = tqdm(
                total=len(eval_dataloader), desc="held-out text", unit=" batches", disable=not self.show, leave=False
            )
        self.evaluation_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
        self.evaluation_bar = None
