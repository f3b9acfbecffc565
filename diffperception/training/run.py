"""One training run: from a recipe and options to trained weights, resumable at any step."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from diffperception.devices import first_process, prefer_fast_products
from diffperception.echo import echo
from diffperception.training.callbacks import Averaging, Checkpoints, Evaluations, Reporter
from diffperception.training.folder import CHECKPOINT, FILES, WEIGHTS, Checkpoint, RunFolder, read_to_resume
from diffperception.training.loggers import METRICS, open_loggers, require_loggers
from diffperception.training.options import RunOptions, TrainerOptions
from diffperception.training.recipe import Parts, Recipe
from diffperception.visualization.curves import training_curves
from diffperception.visualization.draw import save_png

SHARDING = ("fsdp", "deepspeed", "model_parallel")


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        model: in evaluation mode, with the averaged weights if there is an average.
        step: updates of the weights made, in all.
        metrics: the final ones; empty where a signal stopped the run.
        signal: the signal that stopped it early, if one did.
    """

    model: nn.Module
    step: int
    metrics: dict[str, float]
    signal: int | None


def run(recipe: Recipe, options: RunOptions, settings: Mapping[str, Any] | None = None) -> Outcome:
    """Train, evaluate and save what a recipe describes. Every process calls this.

    Args:
        settings: all options as a configuration has them, which are written to config.yaml and compared on resuming.

    Raises:
        NonFiniteLossError: the loss is infinite or no number.
        ValueError: options, data, model and machine do not fit each other, or the output folder holds something.
    """
    settings = settings or {}
    folder = None if options.output is None else RunFolder(options.output, recipe.files)
    if folder is not None and first_process():
        folder.require_room(options.resume, options.overwrite)
    require_machine(options.trainer)
    require_loggers(options.trainer.logger)
    torch.manual_seed(options.seed)
    parts = recipe.prepare(options.seed)
    if options.trainer.accumulate > 1 and not parts.module.automatic_optimization:
        raise ValueError(f"trainer.accumulate must be 1 for {recipe.task}, which updates its weights by itself")
    max_steps = parts.module.max_steps or options.trainer.max_steps
    checkpoint = None
    if folder is not None and options.resume:
        checkpoint = read_to_resume(folder, settings, recipe.lasting, max_steps, parts.module.model)
    if folder is not None and first_process():
        folder.begin(options.overwrite, settings)
    if checkpoint is not None:
        echo(f"going on after step {checkpoint.step} of {options.output}/{CHECKPOINT}")
    echo(parts.summary)
    outcome = fit(parts, options.trainer, max_steps, folder, checkpoint)
    if folder is not None:
        again = f"the same command with --resume goes on from {folder.path / CHECKPOINT}"
        files = (f"{folder.path / name}: {text}" for name, text in {**recipe.files, **FILES}.items())
        echo("\n".join(files) if outcome.signal is None else f"stopped after step {outcome.step}; {again}")
    return outcome


def fit(
    parts: Parts, options: TrainerOptions, max_steps: int, folder: RunFolder | None, checkpoint: Checkpoint | None
) -> Outcome:
    """Train, then save and evaluate.

    Args:
        max_steps: updates of the weights.
        folder: what is written to; None for nothing.
        checkpoint: what the run goes on from; None to begin.
    """
    module, path = parts.module, None if folder is None else folder.path
    averaging = None if module.ema_decay is None else Averaging(module.ema_decay)
    checkpoints = Checkpoints(
        path and path / CHECKPOINT, options.checkpoint_every, options.log_every, options.max_minutes
    )
    evaluations = Evaluations(parts.evaluator, averaging, folder)
    # Called in this order after each step.
    callbacks = [*([averaging] if averaging else []), Reporter(options.log_every), checkpoints, evaluations]
    after = checkpoint.step if checkpoint else 0
    loggers = open_loggers(options.logger, path, after) if path is not None else []
    if options.compile:
        module.compile_networks()
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=module.grad_clip_norm,
        callbacks=callbacks,
        plugins=[ReadBefore(checkpoint)],
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=loggers or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        sync_batchnorm=options.sync_batchnorm,
        deterministic=options.deterministic,
        benchmark=options.benchmark,
        **machine(options),
    )
    prefer_fast_products(trainer.strategy.root_device)
    resumed = path / CHECKPOINT if path is not None and checkpoint is not None else None
    try:
        trainer.fit(module, datamodule=parts.data, ckpt_path=resumed, weights_only=True)
    except RuntimeError as error:
        if resumed and "loading state_dict" in str(error):
            raise ValueError(f"{resumed} was written by another training step than the one configured now") from None
        raise
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from None
        raise
    model = (averaging.model if averaging else module.model).to(trainer.strategy.root_device).eval()
    metrics: dict[str, float] = {}
    if checkpoints.signal is None:
        if path is not None and trainer.is_global_zero:
            model.save(path / WEIGHTS)  # type: ignore[operator]
        metrics = evaluations.finish(trainer, model)
        if folder is not None and trainer.is_global_zero and (folder.path / METRICS).exists():
            save_png(training_curves(folder.path / METRICS), folder.file("pictures/curves.png"))
    for logger in trainer.loggers:
        logger.finalize("success")
    if folder is not None and trainer.is_global_zero:
        folder.record_events()
    return Outcome(model, trainer.global_step, metrics, checkpoints.signal)


class ReadBefore(TorchCheckpointIO):
    """Gives Lightning the checkpoint that has been read before, once, instead of reading it again."""

    def __init__(self, checkpoint: Checkpoint | None):
        self.checkpoint = checkpoint

    def load_checkpoint(self, *_: Any, **__: Any) -> dict[str, Any]:
        assert self.checkpoint is not None
        content, self.checkpoint = self.checkpoint.content, None
        return content


def require_machine(options: TrainerOptions) -> None:
    """ValueError if this machine has not what the options would train on."""
    quiet_lightning()
    if options.strategy.startswith(SHARDING):
        raise ValueError(
            f"trainer.strategy {options.strategy} spreads the weights over processes, which neither their average nor"
            " model files allow: take ddp"
        )
    try:
        Trainer(logger=False, **machine(options))
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise ValueError(
            f"trainer.accelerator {options.accelerator}, devices {options.devices} and strategy {options.strategy} do"
            f" not suit this machine: {error}"
        ) from None


def quiet_lightning() -> None:
    """Let Lightning speak of problems alone, and torch not of what is none here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
    # Kernels of 1 x 1, whose two memory layouts are the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # The module knows what of a batch it needs on its device.
    warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device`")
    # A frozen backbone.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")


def machine(options: TrainerOptions) -> dict[str, Any]:
    """Lightning's options of what is trained on: as torchrun says, where it started us."""
    devices: int | str = options.devices
    nodes = options.num_nodes
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    return {
        "accelerator": options.accelerator,
        "devices": devices,
        "num_nodes": nodes,
        "strategy": options.strategy,
        "precision": options.precision,
        "enable_checkpointing": False,
    }
