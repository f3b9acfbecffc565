"""What happens after the steps of training: averaging, logging, checkpoints, evaluation."""

import math
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from tqdm import tqdm

from diffperception.echo import echo
from diffperception.files import OutputFolder, written_beside
from diffperception.training.module import TrainingModule
from diffperception.training.options import TrainerOptions
from diffperception.training.recipe import Evaluator, Metrics

IMPATIENCE = 3.0  # seconds; torchrun hands Ctrl-C on to processes that got it from the terminal already


class Averaging(WeightAveraging):
    """Exponential moving average of weights and statistics.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run does not average its first steps in.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert self._average_model is not None
        # On the CPU no update waits for a GPU to tell its number.
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._latest_update_step:
            self.update(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """As AveragedModel.update_parameters, which copies the number of updates to a GPU and waits for it."""
        average = self._average_model
        assert average is not None
        n = int(average.n_averaged)
        states = (chain(model.parameters(), model.buffers()) for model in (average.module, module))
        pairs = list(zip(*states, strict=True))
        blended = [pair for pair in pairs if n and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (n and pair[0].is_floating_point())]  # counters; all at first
        if blended:
            weight = 1 - min(self.decay, (1 + n) / (10 + n))
            torch._foreach_lerp_([old for old, _ in blended], [new for _, new in blended], weight)
        if copied:
            torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
        average.n_averaged += 1

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        assert self._average_model is not None
        return self._average_model.module.model  # type: ignore[return-value]


def log(trainer: Trainer, step: int, numbers: Mapping[str, float]) -> None:
    """Give the loggers the numbers of a step, in the first process."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        logger.log_metrics(dict(numbers), step)


class Reporter(Callback):
    """Progress with the time left, and a row of numbers every so many steps."""

    def __init__(self, every: int):
        self.every = every
        self.busy = 0.0

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        echo(module.rate_in_words())
        self.first = self.last = trainer.global_step
        self.began = time.monotonic()
        hidden = None if trainer.is_global_zero else True  # None: where there is no terminal
        self.bar = tqdm(total=trainer.max_steps, initial=self.first, desc="train", disable=hidden)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batch_began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: TrainingModule, *_: Any) -> None:  # type: ignore[override]
        self.busy += time.perf_counter() - self.batch_began
        step = trainer.global_step
        if step == self.last:  # gradients are being accumulated
            return
        self.last = step
        self.bar.update()
        if step % self.every == 0 or step == trainer.max_steps:
            self._report(trainer, module, step)

    def _report(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        module.require_finite()
        means = torch.stack([loss.terms for loss in module.noted]).mean(0)
        means = trainer.strategy.reduce(means, reduce_op="mean")
        module.noted.clear()
        if not trainer.is_global_zero:
            return
        loss, rate = float(means.sum()), max(group["lr"] for group in trainer.optimizers[0].param_groups)
        terms = {f"train/loss_{name}": mean for name, mean in zip(module.term_names, means.tolist(), strict=True)}
        log(trainer, step, {"train/loss": loss, **terms, "train/lr": rate, "train/waiting": self.waiting(trainer)})
        self.bar.set_postfix_str(f"loss {loss:.3f}")
        if self.bar.disable:
            elapsed = time.monotonic() - self.began
            left = elapsed / (step - self.first) * (trainer.max_steps - step)
            so_far, left_over = tqdm.format_interval(elapsed), tqdm.format_interval(left)
            echo(f"step {step}/{trainer.max_steps}  loss {loss:.3f}  {so_far} so far, {left_over} left")

    def waiting(self, trainer: Trainer) -> float:
        """The fraction of training time, evaluations and checkpoints apart, that was spent waiting for data."""
        waited = trainer.datamodule.loader.waited  # type: ignore[attr-defined]
        return waited / (waited + self.busy)

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        self.bar.close()
        if self.busy:
            echo(f"waiting for data took {100 * self.waiting(trainer):.1f} % of the training time")

    def on_exception(self, *_: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Checkpoints(Callback):
    """Writes last.ckpt every so many steps, at the end, when told to stop, and on an error between two steps.

    Ctrl-C, SIGTERM and the time limit stop training after the step in hand, so what is saved is never half a step, nor
    half an accumulation; a second signal, some seconds later, stops at once. Several processes on GPUs ask each other
    whether to stop only at steps with a row of numbers, for that waits for the GPUs.

    Args:
        path: the checkpoint's; None writes none.
    """

    def __init__(self, path: Path | None, options: TrainerOptions):
        self.path, self.options = path, options
        self.seconds = math.inf if options.max_minutes is None else options.max_minutes * 60
        self.signal: int | None = None
        self.saved = 0
        self.between_steps = False

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        self.saved = trainer.global_step
        self.between_steps = True
        self.began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
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
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = trainer.should_stop or self._is_told_to_stop(trainer)
        if stop or trainer.global_step % self.options.checkpoint_every == 0 or trainer.global_step == trainer.max_steps:
            module.require_finite()
            self._save(trainer)
        self.between_steps = True
        trainer.should_stop = stop

    def _is_told_to_stop(self, trainer: Trainer) -> bool:
        told = self.signal is not None or time.monotonic() - self.began > self.seconds
        on_gpus = trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu"
        if on_gpus and trainer.global_step % self.options.log_every:
            return False
        return trainer.strategy.reduce_boolean_decision(told, all=False)

    def _save(self, trainer: Trainer) -> None:
        if self.path is None:
            return
        with written_beside(self.path) if trainer.is_global_zero else nullcontext(self.path) as beside:
            trainer.save_checkpoint(beside)
        self.saved = trainer.global_step

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        # One of several processes cannot tell whether the others have come as far.
        if trainer.world_size == 1 and self.between_steps and trainer.global_step > self.saved:
            trainer.lightning_module.require_finite()  # type: ignore[operator]
            self._save(trainer)


class Evaluations(Callback):
    """Has the model looked at every so many steps; a resumed run makes up for the one it was interrupted in."""

    def __init__(self, evaluator: Evaluator, averaging: Averaging | None, folder: OutputFolder | None):
        self.evaluator, self.averaging, self.folder = evaluator, averaging, folder
        self.evaluated = 0  # the step of the last evaluation

    def on_train_batch_end(self, trainer: Trainer, module: TrainingModule, *_: Any) -> None:  # type: ignore[override]
        if self._is_due(trainer):
            self._evaluate(trainer, module)

    on_train_start = on_train_batch_end  # type: ignore[assignment]

    def on_fit_end(self, trainer: Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        """Of a run that was interrupted in its last evaluation no step is left, so training does not start again."""
        if self._is_due(trainer):
            module.to(trainer.strategy.root_device)  # which it has left
            self._evaluate(trainer, module)

    def _is_due(self, trainer: Trainer) -> bool:
        step, every = trainer.global_step, self.evaluator.every
        due = self.evaluator.last if step == trainer.max_steps else every is not None and step % every == 0
        return due and step not in (0, self.evaluated) and not trainer.should_stop

    def _evaluate(self, trainer: Trainer, module: TrainingModule) -> None:
        module.require_finite()
        step = self.evaluated = trainer.global_step
        averaged = self.averaging.model if self.averaging else module.model
        modes = [(model, model.training) for model in (averaged, module.model)]
        with trainer.strategy.precision_plugin.val_step_context():
            metrics = self.evaluator.evaluate(averaged, module.model, step, self.folder)
        for model, training in modes:
            model.train(training)
        self._record(trainer, step, metrics)
        if metrics:
            shown = ((name, "-" if math.isnan(value) else f"{value:.3f}") for name, value in islice(metrics.items(), 3))
            echo(f"step {step}: " + "  ".join(f"{name} {value}" for name, value in shown))

    def finish(self, trainer: Trainer, model: nn.Module) -> Metrics:
        """The final metrics of the trained model."""
        metrics = self.evaluator.finish(model, self.folder if trainer.is_global_zero else None)
        self._record(trainer, trainer.global_step, metrics)
        return metrics

    def _record(self, trainer: Trainer, step: int, metrics: Metrics) -> None:
        if metrics:
            log(trainer, step, {f"val/{name}": value for name, value in metrics.items()})
