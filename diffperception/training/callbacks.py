"""What happens after the steps of training: averaging, logging, checkpoints, evaluation."""

import os
import signal
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from tqdm import tqdm

from diffperception.training.loggers import RunLog
from diffperception.training.module import Task

# (averaged model, model in training, step) -> metrics, the most telling first; without an average both are the same.
Score = Callable[[nn.Module, nn.Module, int], dict[str, float]]
IMPATIENCE = 3.0  # seconds; torchrun hands Ctrl-C on to processes that got it from the terminal already


class Averaging(WeightAveraging):
    """Exponential moving average of weights and statistics.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run does not average its first steps in.
    """

    def __init__(self, decay: float):
        super().__init__(multi_avg_fn=self._blend)
        self.decay = decay

    def _blend(self, averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:  # counters
                average.copy_(value)

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        assert self._average_model is not None
        return self._average_model.module.model  # type: ignore[return-value]


class Reporter(Callback):
    """Progress with the time left, and a row of numbers every so many steps.

    Args:
        record: where the numbers go; None in all processes but the first.
        every: steps between rows.
        say: prints a line; used where there is no terminal for a bar.
    """

    def __init__(self, record: RunLog | None, every: int, say: Callable[[str], None]):
        self.record = record
        self.every = every
        self.say = say
        self.terms: list[dict[str, Tensor]] = []
        self.busy = 0.0

    def on_train_start(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        options = task.options
        self.say(
            f"{task.images_per_step} images a step, so the learning rate is {options.lr:g} x {task.images_per_step}"
            f" / {options.base_batch_size} = {task.lr:g}"
        )
        self.first = self.last = trainer.global_step
        self.began = time.monotonic()
        hidden = None if self.record else True  # None: where there is no terminal
        self.bar = tqdm(total=trainer.max_steps, initial=self.first, desc="train", disable=hidden)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batch_began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, task: Task, *_: Any) -> None:  # type: ignore[override]
        self.busy += time.perf_counter() - self.batch_began
        self.terms.append(task.terms)
        step = trainer.global_step
        if step == self.last:  # gradients are being accumulated
            return
        self.last = step
        self.bar.update()
        if step % self.every == 0 or step == trainer.max_steps:
            self._report(trainer, step)

    def _report(self, trainer: Trainer, step: int) -> None:
        names = list(self.terms[0])
        means = torch.stack([torch.stack([terms[name] for terms in self.terms]).mean() for name in names])
        means = trainer.strategy.reduce(means, reduce_op="mean")
        self.terms = []
        if self.record is None:
            return
        loss, rate = float(means.sum()), max(group["lr"] for group in trainer.optimizers[0].param_groups)
        terms = {f"train/loss_{name}": mean for name, mean in zip(names, means.tolist(), strict=True)}
        waiting = self.waiting(trainer)
        self.record.write(step, {"train/loss": loss, **terms, "train/lr": rate, "train/waiting": waiting})
        self.bar.set_postfix_str(f"loss {loss:.3f}")
        if self.bar.disable:
            elapsed = time.monotonic() - self.began
            left = elapsed / (step - self.first) * (trainer.max_steps - step)
            self.say(f"step {step}/{trainer.max_steps}  loss {loss:.3f}  {clock(elapsed)} so far, {clock(left)} left")

    def waiting(self, trainer: Trainer) -> float:
        """The share of training time, evaluations and checkpoints apart, that was spent waiting for data."""
        waited = trainer.datamodule.loader.waited  # type: ignore[attr-defined]
        return waited / (waited + self.busy)

    def on_train_end(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        self.bar.close()
        if self.busy:
            self.say(f"waiting for data took {100 * self.waiting(trainer):.1f} % of the training time")

    def on_exception(self, *_: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Checkpoints(Callback):
    """Writes last.ckpt every so many steps, at the end, when told to stop, and on an error between two steps.

    Ctrl-C, SIGTERM and the time limit stop training after the step in hand, so what is saved is never half a step, nor
    half an accumulation; a second signal, some seconds later, stops at once.

    Args:
        path: of the checkpoint; a new one is written beside and then renamed.
        every: steps between checkpoints.
        max_minutes: stop after these.
    """

    def __init__(self, path: Path, every: int, max_minutes: float | None):
        self.path = path
        self.every = every
        self.seconds = float("inf") if max_minutes is None else max_minutes * 60
        self.signal: int | None = None
        self.saved = 0
        self.between_steps = False

    def on_train_start(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        self.saved = trainer.global_step
        self.between_steps = True
        self.began = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)  # lightning restores what was there before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.noted = number, time.monotonic()
        elif time.monotonic() - self.noted > IMPATIENCE:
            raise KeyboardInterrupt

    def on_train_batch_start(self, *_: Any) -> None:
        self.between_steps = False

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, task: Task, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.between_steps = True
        told = self.signal is not None or time.monotonic() - self.began > self.seconds
        stop = trainer.strategy.reduce_boolean_decision(told, all=False)
        if stop or trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        trainer.should_stop = trainer.should_stop or stop

    def _save(self, trainer: Trainer) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, self.path)
        self.saved = trainer.global_step

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        # One of several processes cannot tell whether the others have come as far.
        if trainer.world_size == 1 and self.between_steps and trainer.global_step > self.saved:
            self._save(trainer)


class Evaluations(Callback):
    """Scores the model every so many steps; a resumed run makes up for the one it was interrupted in.

    Args:
        score: gives the metrics of the averaged model and the one in training at a step, the most telling first.
        averaging: what holds the averaged model; None if there is no average.
        record: where the metrics go; None in all processes but the first.
        every: steps between evaluations; None for none.
        last: whether there is one after the last step too; afterwards only the averaged weights are left.
        say: prints a line.
    """

    def __init__(
        self,
        score: Score,
        averaging: Averaging | None,
        record: RunLog | None,
        every: int | None,
        last: bool,
        say: Callable[[str], None],
    ):
        self.score = score
        self.averaging = averaging
        self.record = record
        self.every = every
        self.last = last
        self.say = say
        self.scored = 0

    def on_train_start(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        if self._is_due(trainer):
            self._evaluate(trainer, task)

    def on_train_batch_end(self, trainer: Trainer, task: Task, *_: Any) -> None:  # type: ignore[override]
        if self._is_due(trainer):
            self._evaluate(trainer, task)

    def on_fit_end(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        """Of a run that was interrupted in its last evaluation no step is left, so training does not start again."""
        if self._is_due(trainer):
            task.to(trainer.strategy.root_device)  # which it has left
            self._evaluate(trainer, task)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = self.last if step == trainer.max_steps else bool(self.every) and step % (self.every or 1) == 0
        return due and step not in (0, self.scored) and not trainer.should_stop

    def _evaluate(self, trainer: Trainer, task: Task) -> None:
        step = self.scored = trainer.global_step
        averaged = self.averaging.model if self.averaging else task.model
        modes = [(model, model.training) for model in (averaged, task.model)]
        with trainer.strategy.precision_plugin.val_step_context():
            metrics = self.score(averaged, task.model, step)
        for model, training in modes:
            model.train(training)
        if self.record is not None:
            self.record.write(step, {f"val/{name}": value for name, value in metrics.items()})
        self.say(f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in islice(metrics.items(), 3)))


def clock(seconds: float) -> str:
    """12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
