"""diffusers' UNet2DModel with its scheduler: folders of theirs as generators of ours, and ours as such folders.

Nothing of diffusers is imported, for a folder is JSON and safetensors. Their UNet has the parts of ours under other
names. An option of theirs that ours lacks, or of ours that theirs lacks, is refused by its name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffperception.files import OutputFolder, write_json
from diffperception.models.base import save_tensors
from diffperception.models.conditioners import ClassLabels
from diffperception.models.convert.checkpoints import WEIGHTS_OF_DIFFUSERS as WEIGHTS
from diffperception.models.convert.checkpoints import assign, class_names, load_untrusted
from diffperception.models.convert.checkpoints import is_diffusers_folder as is_diffusers_folder
from diffperception.models.convert.schedulers import path_arguments, scheduler_config
from diffperception.models.convert.unet2d import (
    Config,
    ForeignLayoutError,
    assign_theirs,
    read_object,
    to_theirs,
    unet_config,
    unet_layout,
    unet_options,
)
from diffperception.models.generator import CODECS, DiffusionModel, load_generator
from diffperception.models.space import Pixels
from diffperception.models.unet.unet import UNet

VERSION = "0.42.1"  # of diffusers, whose folders these are
INDEX, CONFIG, SCHEDULER, CLASSES = "model_index.json", "config.json", "scheduler_config.json", "classes.json"

PARTS = ("", "-*-of-*", ".fp16", ".fp16-*-of-*")  # of names of weights: in one file or several, also of half precision

_LABELS = "class_embedding.weight"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, before 0.15


def generator_from_folder(
    folder: str | Path, classes: Sequence[str] | None = None, image_size: int | tuple[int, int] | None = None
) -> DiffusionModel:
    """The generator in a folder of diffusers: a pipeline's with unet/ and scheduler/, or that of a UNet2DModel alone.

    Of a scheduler the path and the prediction are taken, not how it samples. Without one they are taken to be DDPM's,
    which predicts the noise.

    Args:
        folder: where `save_pretrained` wrote.
        classes: names of its labels; by default those that :func:`write_folder` noted, else numbers.
        image_size: side, or height and width, of the images it was trained on, instead of `sample_size`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, the weights do not fit, or the path is not ours.
        ForeignLayoutError: our UNet cannot express an option, which is named with its value.
    """
    unet, root = _places(Path(folder))
    config = unet_options(unet / CONFIG)
    _require_unet_alone(root)
    number = config["num_class_embeds"] or 0
    names, null_class = _read_classes(root / CLASSES, classes, number)
    scheduler = _scheduler_config(root)
    try:
        with torch.device("meta"):
            network = UNet(**unet_layout(config))
        size = image_size or config["sample_size"] or max(256, 2 * network.stride)
        path = path_arguments(scheduler) if scheduler else {}
        path["learned_range"] = _learned_range(scheduler, config)
        model = DiffusionModel(names, network, image_size=size, null_class=null_class, **path)
    except ValueError as error:
        raise type(error)(f"{folder}: {error}") from None
    state = _read_state(unet)
    labels = {"embedding.weight": state.pop(_LABELS)} if number and _LABELS in state else {}
    assign_theirs(network, state, not config["flip_sin_to_cos"], unet)
    if model.conditioner is not None:
        assign(model.conditioner, labels, f"{unet} does not fit num_class_embeds = {number}")
    return model.eval()


def write_folder(model: DiffusionModel | UNet, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder that diffusers reads: UNet and scheduler, for most models a whole DDPMPipeline.

    There is no pipeline for models with classes and for those of the schedule flow: unet/ and scheduler/ are read by
    `UNet2DModel.from_pretrained` and the scheduler's. Names of classes go into classes.json, which diffusers ignores.

    Args:
        model: a UNet alone is taken for one of the linear schedule of 1000 steps.
        folder: a new or empty one.
        overwrite: replace what this function wrote there before.

    Raises:
        ValueError: diffusers cannot express an option of the model, which is named; or the folder is not empty.
    """
    model = load_generator(model)
    _require_expressible(model)
    height, width = model.image_size
    labels = model.conditioner.embedding if isinstance(model.conditioner, ClassLabels) else None
    unet = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": height if height == width else [height, width],
        **unet_config(model.network),
        "num_class_embeds": None if labels is None else labels.num_embeddings,
    }
    scheduler = {**scheduler_config(model.arguments, model.learned_range), "_diffusers_version": VERSION}
    state = dict(to_theirs(model.network, model.network.state_dict()))
    if labels is not None:
        state[_LABELS] = labels.weight.detach()
    state = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    results = OutputFolder(folder, overwrite)
    results.clear()
    try:
        save_tensors(state, results.file(f"unet/{WEIGHTS}.safetensors"), {"format": "pt"})
        write_json(results.file(f"unet/{CONFIG}"), unet)
        write_json(results.file(f"scheduler/{SCHEDULER}"), scheduler)
        if model.classes is not None:
            write_json(results.file(CLASSES), {"classes": model.classes, "null_class": model.has_absent})
        elif model.prediction != "flow":
            parts = {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DModel"]}
            write_json(results.file(INDEX), {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION, **parts})
    except BaseException:
        results.clear()
        raise


def _places(folder: Path) -> tuple[Path, Path]:
    """The folder of the UNet, and that of the pipeline around it, or once more that of the UNet."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "unet" / CONFIG).is_file():
        return folder / "unet", folder
    if not (folder / CONFIG).is_file():
        raise ForeignLayoutError(f"{folder} has no unet/{CONFIG}, nor a {CONFIG} of its own")
    around = folder.absolute().parent
    others = (INDEX, "scheduler", *CODECS)
    in_pipeline = folder.absolute().name.startswith("unet") and any((around / name).exists() for name in others)
    return folder, around if in_pipeline else folder


def has_scheduler(folder: str | Path) -> bool:
    """Whether the path of the UNet in a folder of diffusers is said there, in a scheduler's configuration."""
    return bool(_scheduler_config(_places(Path(folder))[1]))


def _require_unet_alone(root: Path) -> None:
    """ForeignLayoutError if there are more parts than a UNet and a scheduler, such as an autoencoder of latents."""
    path = root / INDEX
    parts = read_object(path) if path.is_file() else {name: [name] for name in CODECS if (root / name).is_dir()}
    others = [n for n, part in parts.items() if isinstance(part, list) and any(part) and n not in ("unet", "scheduler")]
    if others:
        raise ForeignLayoutError(f"{path} names {', '.join(others)}, and our UNet has only a scheduler beside it")


def _scheduler_config(root: Path) -> Config:
    """The scheduler's options, none without a scheduler."""
    paths = [path for path in (root / "scheduler" / SCHEDULER, root / SCHEDULER) if path.is_file()]
    return read_object(paths[0]) if paths else {}


def _learned_range(scheduler: Config, unet: Config) -> bool:
    """Whether the UNet learned the variance too; ValueError if it makes no generator."""
    channels, outputs = unet["in_channels"], unet["out_channels"]
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"in_channels = {channels} and out_channels = {outputs} are no generator's, which has as many out as in, or"
            " twice as many for a learned variance"
        )
    if scheduler.get("variance_type") == "learned":
        raise ValueError('the scheduler\'s variance_type = "learned" is not ours, only "learned_range"')
    return outputs == 2 * channels


def _read_state(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, of one file or several, in float32, with today's names."""
    patterns = [f"{WEIGHTS}{part}.{end}" for end in ("safetensors", "bin") for part in PARTS]
    files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), None)
    if files is None:
        others = sorted(path.name for path in folder.glob(f"{WEIGHTS}*"))
        raise FileNotFoundError(
            f"there are no weights in {folder}: {WEIGHTS}.safetensors or .bin is expected"
            + (f", instead of {', '.join(others)}" if others else "")
        )
    state: dict[str, Tensor] = {}
    for file in files:
        content = load_untrusted(file)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{file} holds something else than weights by their names")
        state |= content
    return {_today(name): value.float() for name, value in state.items()}


def _today(name: str) -> str:
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_NAMES[m[2]]}.", name)


def _read_classes(path: Path, given: Sequence[str] | None, number: int) -> tuple[list[str] | None, bool]:
    """The names of so many labels, and whether the last of these stands for none."""
    noted = read_object(path) if path.is_file() and number else {}
    names, null_class = noted.get("classes"), noted.get("null_class") is True
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} must have a list of names as its classes")
    try:
        return class_names(names if given is None else given, number - null_class) or None, null_class
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None


def _require_expressible(model: DiffusionModel) -> None:
    """ValueError naming the part or option of a generator, beside its UNet's, that no folder of diffusers can say."""
    steps = model.schedule.num_timesteps
    if type(model) is not DiffusionModel or type(model.network) is not UNet:
        kind = f"{type(model).__name__} with a {type(model.network).__name__}"
        raise ValueError(f"diffusers has no {kind}: only a DiffusionModel with a UNet is written")
    if type(model.space) is not Pixels:
        raise ValueError(f"diffusers cannot say space = {type(model.space).__name__}: only Pixels are written")
    if model.conditioner is not None and type(model.conditioner) is not ClassLabels:
        kind = type(model.conditioner).__name__
        raise ValueError(f"diffusers cannot say conditioner = {kind}: only ClassLabels are written")
    if model.arguments["rescale_timesteps"] and steps not in (None, 1000):
        raise ValueError(
            f"diffusers cannot say rescale_timesteps = true with num_timesteps = {steps}: its UNet is told times as"
            " they are"
        )
