"""`diffperception convert`: checkpoints of the reference programs as model files of ours."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffperception.cli import say
from diffperception.cli.checkpoints import EMA, read_checkpoint
from diffperception.data.coco_file import labels_of, read_coco
from diffperception.detection import DiffusionDet
from diffperception.diffusion import Prediction, ScheduleName
from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier, UNet, adm
from diffperception.models.base import require_file_name

Model = DiffusionDet | DiffusionModel | NoisyClassifier
USES = {
    DiffusionDet: "`diffperception evaluate`, `predict` and `train --init`",
    DiffusionModel: "`diffperception sample`, and as the UNet of detectors and pixel classifiers",
    NoisyClassifier: "`diffperception sample --classifier`",
}


def convert(
    checkpoint: Path,
    output: Path,
    ema: bool = False,
    annotations: Path | None = None,
    heads: int | None = None,
    head_channels: int | None = None,
    new_attention_order: bool = False,
    depth: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    schedule: ScheduleName = "linear",
    num_timesteps: int = 1000,
    prediction: Prediction = "eps",
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint of a reference program into a model file.

    Three kinds are known by their weights' names: detectors of DiffusionDet (ResNet-50/101, Swin-T/S/B), diffusion
    models of guided-diffusion and improved-diffusion, and noisy classifiers of guided-diffusion. Widths, classes and
    layouts are read off names and shapes; what those cannot tell of the last two kinds are the options from --heads to
    --prediction. Only weights and numbers are read: a checkpoint that would run code is refused. The pixel classifiers
    of ddpm-segmentation are turned into a segmenter by `--task segmentation`, which has options of its own.

    For example: `diffperception convert --checkpoint lsun_cat.pt --output cat.safetensors --head-channels 64
    --image-size 256`.

    Args:
        checkpoint: a .pth, .pt or .safetensors file: the weights themselves, or a dictionary with them under model,
            state_dict or ema_state.
        output: the file to write, model.safetensors for example.
        ema: take the averaged weights, under ema_state.
        annotations: a COCO JSON file whose categories name the classes, or a .txt file with a name a line. Without it
            a detector's 80 classes get COCO's names, any others are numbered.
        heads: attention heads at every width (the reference's num_heads).
        head_channels: channels of a head (num_head_channels; 64 in ADM's models); this or heads.
        new_attention_order: q, k and v come before heads in the attention's weights (use_new_attention_order).
        depth: residual blocks a level (num_res_blocks), for a classifier whose names fit several.
        image_size: side, or [height, width], of the images that a diffusion model was trained on.
        schedule: the path it was trained on (noise_schedule).
        num_timesteps: steps of the path (diffusion_steps).
        prediction: what the model predicts.
        overwrite: replace the output file.
    """
    require_file_name(output)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already: name another file, or replace it with --overwrite")
    weights, part, parts = read_checkpoint(checkpoint, ema)
    classes = None if annotations is None else read_names(annotations)
    model: Model
    if adm.is_unet(weights):
        unet = UNet.from_reference(weights, heads, head_channels, new_attention_order)
        model = generator(unet, classes, image_size, schedule, num_timesteps, prediction)
    elif adm.is_classifier(weights):
        model = NoisyClassifier.from_reference(
            weights, classes, schedule, num_timesteps, heads, head_channels, new_attention_order, depth
        )
    else:
        require_detector(checkpoint, weights)
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            model = DiffusionDet.from_reference(weights, classes)
        for remark in remarks:
            say(str(remark.message))
    model.save(output)
    say(f"{checkpoint}{f' ({part})' if part else ''}: {describe(model)}")
    if EMA in parts and part != EMA:
        say(f"it also has averaged weights ({EMA}): --ema takes those")
    if model.classes and model.classes[0] == "0":
        say("its classes are numbered: --annotations FILE names them after a COCO file's categories or a .txt's lines")
    say(f"{output}: for {USES[type(model)]}")


def read_names(path: Path) -> list[str]:
    """The names of the classes in a COCO file, or the lines of a .txt file."""
    if path.suffix == ".txt":
        return path.read_text().splitlines()
    return labels_of(read_coco(path)["categories"])[1]


def generator(
    unet: UNet,
    classes: list[str] | None,
    image_size: int | tuple[int, int] | None,
    schedule: ScheduleName,
    num_timesteps: int,
    prediction: Prediction,
) -> DiffusionModel:
    """The generator that a UNet belongs to; ValueError if there is none or its image size must be given."""
    channels, outputs = unet.in_channels, unet.out_channels
    # The upsamplers of guided-diffusion see a small image beside the noisy one.
    if outputs not in (channels, 2 * channels) or channels == 6:
        raise ValueError(
            f"the UNet takes {channels} channels and gives {outputs}: it enlarges images, or is conditioned on another"
            " one, which is not supported"
        )
    if image_size is None:
        raise ValueError("give --image-size, the side of the images it was trained on: a checkpoint does not tell it")
    if classes is None and unet.num_classes is not None:
        classes = [str(label) for label in range(unet.num_classes)]
    if len(classes or ()) != (unet.num_classes or 0):
        raise ValueError(f"{len(classes or ())} class names are given for a UNet of {unet.num_classes or 'no'} classes")
    return DiffusionModel(
        classes,
        unet,
        schedule=schedule,
        num_timesteps=num_timesteps,
        prediction=prediction,
        learned_range=outputs == 2 * channels,
        image_size=image_size,
    )


def require_detector(path: Path, weights: Mapping[str, Tensor]) -> None:
    """ValueError if the names of the weights are not even like DiffusionDet's."""
    if not any("head.head_series." in name for name in weights):
        raise ValueError(
            f"{path} is no checkpoint of the reference DiffusionDet, nor of guided-diffusion's or improved-diffusion's"
            f" UNet or classifier: its weights are named {', '.join(list(weights)[:3])}, ..."
        )


def describe(model: Model) -> str:
    """A line about the model."""
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
    if isinstance(model, DiffusionDet):
        kind = f"DiffusionDet with backbone {model.arguments['backbone']}, {model.arguments['stages']} stages"
    else:
        layout = (model.unet if isinstance(model, DiffusionModel) else model).arguments
        widths = ", ".join(f"{layout['channels'] * multiplier:g}" for multiplier in layout["multipliers"])
        height, width = model.image_size
        kind = (
            f"{type(model).__name__} of {height} x {width} pixels with levels {widths} channels wide,"
            f" depth {layout['depth']}, {model.arguments['schedule']} path of {model.arguments['num_timesteps']} steps"
        )
    return f"{kind}, {describe_classes(model.classes)}, {parameters}"


def describe_classes(classes: list[str] | None) -> str:
    """How many, and the first."""
    if classes is None:
        return "no classes"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
