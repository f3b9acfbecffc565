"""One training run: from a task, data and options to trained weights, resumable at any step."""

import json
import logging
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from diffperception.training.callbacks import Averaging, Checkpoints, Evaluations, Reporter, Score
from diffperception.training.data import TrainingData
from diffperception.training.loggers import RunLog
from diffperception.training.module import ARGUMENTS, Task
from diffperception.training.options import TrainerOptions

CHECKPOINT = "last.ckpt"


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        model: with the averaged weights if there is an average.
        step: updates of the weights made, in all.
        signal: the signal that stopped it early, if one did.
        device: that it was trained on.
    """

    model: nn.Module
    step: int
    signal: int | None
    device: torch.device


def fit(
    task: Task,
    data: TrainingData,
    folder: Path,
    options: TrainerOptions,
    score: Score,
    score_every: int | None,
    score_last: bool,
    resume: bool,
    say: Callable[[str], None],
) -> Outcome:
    """Train, writing last.ckpt, metrics.csv and tensorboard/ to `folder`.

    Args:
        score: gives the metrics of a model; all processes call it every `score_every` steps.
        score_last: whether they call it after the last step too, on averaged and raw weights as before.
        resume: go on from last.ckpt in `folder`.
        say: prints a line.

    Raises:
        NonFiniteLossError: the loss is infinite or no number.
        ValueError: the checkpoint cannot be read or belongs to another training step.
    """
    hush()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
    # Of 1 x 1 kernels, whose two memory layouts are the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Of a frozen backbone.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    checkpoint = folder / CHECKPOINT
    first = read_checkpoint(checkpoint).step if resume else 0
    record = RunLog(folder, after=first) if rank_zero_only.rank == 0 else None  # type: ignore[attr-defined]
    decay = task.options.ema_decay
    averaging = None if decay is None else Averaging(decay)
    checkpoints = Checkpoints(checkpoint, options.checkpoint_every, options.max_minutes)
    callbacks = [  # called in this order after each step
        *([averaging] if averaging else []),
        Reporter(record, options.log_every, say),
        checkpoints,
        Evaluations(score, averaging, record, score_every, score_last, say),
    ]
    devices, nodes = machines(options)
    trainer = Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=task.options.clip_norm,
        precision=options.precision,
        accelerator=options.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=options.strategy,
        callbacks=callbacks,
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint if resume else None, weights_only=True)
    except RuntimeError as error:
        if resume and "loading state_dict" in str(error):
            raise ValueError(f"{checkpoint} was written by another training step than the one configured now") from None
        raise
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from None
        raise
    finally:
        if record:
            record.close()
    trained = averaging.model if averaging else task.model
    return Outcome(trained, trainer.global_step, checkpoints.signal, trainer.strategy.root_device)


def require_machine(options: TrainerOptions) -> None:
    """ValueError if this machine has not what the options would train on."""
    hush()
    devices, nodes = machines(options)
    try:
        Trainer(
            accelerator=options.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=options.strategy,
            precision=options.precision,
            logger=False,
            enable_checkpointing=False,
        )
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise ValueError(
            f"trainer.accelerator {options.accelerator}, devices {options.devices} and strategy {options.strategy} do"
            f" not suit this machine: {error}"
        ) from None


def hush() -> None:
    """Let Lightning speak of problems alone."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def machines(options: TrainerOptions) -> tuple[int | str, int]:
    """Processes on this machine and number of machines: what torchrun says, where it started us, else the options."""
    if not torch.distributed.is_torchelastic_launched():
        return options.devices, options.num_nodes
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


@dataclass
class Checkpoint:
    """What a checkpoint tells of its run.

    Attributes:
        step: that it was written after.
        model: the arguments of the model's constructor; those of models among them as `weights.describe` gives them.
        shapes: of the model's weights, by name.
    """

    step: int
    model: dict[str, Any]
    shapes: dict[str, torch.Size]


def read_checkpoint(path: Path) -> Checkpoint:
    """What a checkpoint tells; ValueError if it is not whole."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shapes = {name[6:]: value.shape for name, value in content["state_dict"].items() if name.startswith("model.")}
        return Checkpoint(content["global_step"], json.loads(content.get(ARGUMENTS, "{}")), shapes)
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise ValueError(
            f"{path} is cut short or no checkpoint of ours: start again without --resume and with --overwrite, or fetch"
            " a whole copy"
        ) from None
