"""One training run: from a recipe and options to trained weights, resumable at any step."""

import io
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from diffperception.devices import first_process, prefer_fast_products
from diffperception.echo import echo, echo_notes
from diffperception.training.callbacks import Averaging, Checkpoints, Evaluations, Reporter
from diffperception.training.data import TrainingData
from diffperception.training.folder import CHECKPOINT, FILES, WEIGHTS, RunFolder, contents_of, read_to_resume
from diffperception.training.loggers import METRICS, open_loggers, require_loggers
from diffperception.training.module import TrainingModule
from diffperception.training.options import RunOptions, TrainerOptions
from diffperception.training.recipe import Metrics, Parts, Recipe
from diffperception.visualization.curves import training_curves
from diffperception.visualization.draw import save_png

SHARDING = ("fsdp", "deepspeed", "model_parallel")


@dataclass
class Outcome:
    """How a run ended: with which model, in evaluation mode and with the averaged weights if there is an average."""

    model: nn.Module
    step: int  # updates of the weights made, in all
    metrics: Metrics  # the final ones; empty where a signal stopped the run
    signal: int | None  # that stopped the run early, if one did


def run(recipe: Recipe, options: RunOptions, settings: Mapping[str, Any] | None = None) -> Outcome:
    """Train, evaluate and save what a recipe describes. Every process calls this.

    Args:
        recipe: what is trained on what.
        options: where the run goes and how it is carried out.
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
    echo_notes(parts.notes)
    if options.trainer.accumulate > 1 and not parts.module.automatic_optimization:
        raise ValueError(f"trainer.accumulate must be 1 for {recipe.task}, which updates its weights by itself")
    if parts.module.max_steps and options.trainer.max_steps != TrainerOptions.max_steps:
        raise ValueError(f"trainer.max_steps is not for {recipe.task}: its options fit say how long it takes")
    trainer = replace(options.trainer, max_steps=parts.module.max_steps or options.trainer.max_steps)
    checkpoint = None
    if folder is not None:
        parts.module.contents |= contents_of(getattr(recipe, "data", None))
    if folder is not None and options.resume:
        checkpoint = read_to_resume(
            folder, settings, recipe.lasting, trainer.max_steps, parts.module.model, parts.module.contents
        )
    started = None if checkpoint or recipe.init is None else parts.module.start_from(recipe.init)
    if folder is not None and first_process():
        folder.begin(options.overwrite, settings)
    if checkpoint is not None:
        echo(f"going on after step {checkpoint['global_step']} of {options.output}/{CHECKPOINT}")
    echo(parts.summary)
    if started is not None:
        echo(str(started))
    outcome = fit(parts, trainer, folder, checkpoint)
    if folder is not None:
        again = f"the same command with --resume goes on from {folder.path / CHECKPOINT}"
        files = (f"{folder.path / name}: {text}" for name, text in {**recipe.files, **FILES}.items())
        echo("\n".join(files) if outcome.signal is None else f"stopped after step {outcome.step}; {again}")
    return outcome


def fit(
    parts: Parts, options: TrainerOptions, folder: RunFolder | None = None, checkpoint: dict[str, Any] | None = None
) -> Outcome:
    """Train, from the beginning or a checkpoint on, then save and evaluate; nothing is written without a folder."""
    module, path = parts.module, None if folder is None else folder.path
    averaging = None if module.options.ema_decay is None else Averaging(module.options.ema_decay)
    checkpoints = Checkpoints(path and path / CHECKPOINT, options)
    evaluations = Evaluations(parts.evaluator, averaging, folder)
    if options.compile:
        module.compile_networks()
    trainer = Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=module.grad_clip_norm,
        # Called in this order after each step.
        callbacks=[*([averaging] if averaging else []), Reporter(options.log_every), checkpoints, evaluations],
        plugins=[ReadBefore(checkpoint)],
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=open_loggers(options.logger, path, checkpoint["global_step"] if checkpoint else 0),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        sync_batchnorm=options.sync_batchnorm,
        deterministic=options.deterministic,
        benchmark=options.benchmark,
        **machine(options),
    )
    prefer_fast_products(trainer.strategy.root_device)
    _train(trainer, parts, path / CHECKPOINT if path is not None and checkpoint is not None else None)
    model = (averaging.model if averaging else module.model).to(trainer.strategy.root_device).eval()
    metrics: Metrics = {}
    writes = folder if trainer.is_global_zero else None
    if checkpoints.signal is None:
        if writes is not None:
            model.save(writes.path / WEIGHTS)  # type: ignore[operator]
        metrics = evaluations.finish(trainer, model)
        if writes is not None and (writes.path / METRICS).exists():
            save_png(training_curves(writes.path / METRICS), writes.file("pictures/curves.png"))
    for logger in trainer.loggers:
        logger.finalize("success")
    if writes is not None:
        writes.note_events()
    return Outcome(model, trainer.global_step, metrics, checkpoints.signal)


def _train(trainer: Trainer, parts: Parts, resumed: Path | None) -> None:
    """Lightning's training, its errors told in our words."""
    try:
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=resumed, weights_only=True)
    except RuntimeError as error:
        if resumed and "loading state_dict" in str(error):
            raise ValueError(f"{resumed} was written by another training step than the one configured now") from None
        raise
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from None
        raise


def fit_quietly(module: TrainingModule, data: TrainingData, options: TrainerOptions | None = None) -> Any:
    """The trained model of a run that leaves nothing on disk and says nothing but how long it will take."""
    quiet_lightning()
    assert module.max_steps is not None
    with redirect_stdout(io.StringIO()):
        return fit(Parts(module, data), replace(options or TrainerOptions(), max_steps=module.max_steps)).model


class ReadBefore(TorchCheckpointIO):
    """Gives Lightning the checkpoint that has been read before, once, instead of reading it again."""

    def __init__(self, checkpoint: dict[str, Any] | None):
        self.checkpoint = checkpoint

    def load_checkpoint(self, *_: Any, **__: Any) -> dict[str, Any]:
        assert self.checkpoint is not None
        checkpoint, self.checkpoint = self.checkpoint, None
        return checkpoint


def require_machine(options: TrainerOptions) -> None:
    """ValueError if this machine does not have what the options would train on."""
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
    devices, nodes = options.devices, options.num_nodes
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
