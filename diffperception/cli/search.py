"""`diffperception search`."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor

from diffperception.cli import counted, say
from diffperception.devices import pick_device
from diffperception.files import check_output_dir as require_room
from diffperception.files import write_text
from diffperception.segmentation import DiffusionFeatures, Probe
from diffperception.segmentation import search as rank
from diffperception.training.recipes.segmentation import MaskDataOptions
from diffperception.visualization.curves import heat_map
from diffperception.visualization.draw import save_png

SUGGESTED = {"blocks": 4, "timesteps": 3}  # how many of each
SHOWN = 15


def search(
    model: Path,
    data: MaskDataOptions,
    output: Path,
    timesteps: list[float] = [50, 150, 250, 400, 25, 600],  # noqa: B006 (the defaults are not changed)
    blocks: list[NonNegativeInt] | None = None,
    seconds: NonNegativeFloat = 600,
    pixels: PositiveInt = 2000,
    window: PositiveInt | None = None,
    label: int | None = None,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Rank the timesteps and decoder blocks of a generator by how well they tell the classes of pixels apart.

    Each block at each timestep is tried alone, by a linear classifier that learns from half of the labelled images and
    is scored on the other half. Writes search.json (all of them, and the suggested options) and search.png (a heat
    map). The suggestion is the blocks and timesteps that are best on average over the others; together they know more
    than the best alone.

    For example: `diffperception search --model runs/shapes_ddpm/model.safetensors --data.images data/shapes/train
    --data.masks data/shapes/masks/train --data.classes "[background, ...]" --data.limit 10 --output runs/search`.

    Args:
        model: the generator, a model.safetensors file.
        data: the labelled images; ten are a good number.
        output: folder for the results.
        timesteps: to try, in this order while time is left.
        blocks: decoder blocks to try; null for all.
        seconds: no timestep is begun that would pass this limit; the first always is.
        pixels: how many of an image are looked at.
        window: larger images are cut into windows of this side; null for what the generator was trained on.
        label: the class to tell a generator that has classes; null for its absent label.
        seed: of the noise, the choice of images that data.limit asks for, and the choice of pixels.
        device: cpu, cuda, cuda:1, ... or auto.
        overwrite: write into a folder that is not empty, replacing files of the same names.
    """
    require_room(output, overwrite)
    features = DiffusionFeatures.of_generator(model, [0] if blocks is None else blocks, timesteps, window, seed, label)
    if blocks is None:
        features = DiffusionFeatures(
            **features.arguments | {"unet": features.unet, "blocks": [*range(len(features.unet.block_info))]}
        )
    features.to(pick_device(device))
    folder = data.open(seed)
    images = list(folder.images)
    tried_on = f"{counted(len(features.blocks), 'block')}, {counted(len(images), 'image')}"
    expected = expected_seconds(features, images)
    say(f"{counted(len(timesteps), 'timestep')} to try with {tried_on}: each takes about {expected:.0f} s")
    if expected > seconds:
        say(
            f"note: the first timestep alone will take more than --seconds {seconds:g}: to be done in time, look at"
            " fewer images with data.limit, or at smaller ones with data.short_side"
        )
    probes = rank(features, images, list(folder.masks), len(data.classes), seconds, pixels, seed, folder.names)
    tried = list(dict.fromkeys(t for t in features.timesteps if any(probe.timestep == t for probe in probes)))
    suggested = suggest(probes)
    say(table(probes, features))
    if len(tried) < len(timesteps):
        say(f"the time was enough for {len(tried)} of {len(timesteps)} timesteps: raise --seconds for the others")
    content = {"suggested": suggested, "probes": [described(probe, features) for probe in probes]}
    write_text(output / "search.json", json.dumps(content, indent=2) + "\n")
    save_png(picture(probes, tried, features.blocks), output / "search.png")
    options = [f"--features.{name} '[{', '.join(f'{v:g}' for v in values)}]'" for name, values in suggested.items()]
    say(f"suggested: {' '.join(options)}")
    say(f"{output / 'search.json'}: all of them; beside it search.png")


def expected_seconds(features: DiffusionFeatures, images: Sequence[Tensor]) -> float:
    """What the features of all images (3, H, W) take at one timestep, judged by the first image's."""
    start = time.monotonic()
    features.at_timestep(0).maps(images[0])
    return (time.monotonic() - start) * sum(image.numel() for image in images) / images[0].numel()


def suggest(probes: Sequence[Probe]) -> dict[str, list[float]]:
    """The blocks and the timesteps with the best mean mIoU, each in ascending order."""
    return {
        "blocks": _best([(probe.block, probe.miou) for probe in probes], SUGGESTED["blocks"]),
        "timesteps": _best([(probe.timestep, probe.miou) for probe in probes], SUGGESTED["timesteps"]),
    }


def _best(scores: Sequence[tuple[float, float]], count: int) -> list[float]:
    values = {key: [miou for other, miou in scores if other == key] for key, _ in scores}
    means = {key: statistics.fmean(mious) for key, mious in values.items()}
    return sorted(sorted(means, key=lambda key: -means[key])[:count])


def described(probe: Probe, features: DiffusionFeatures) -> dict[str, Any]:
    info = features.unet.block_info[probe.block]
    return {
        "timestep": probe.timestep,
        "block": probe.block,
        "channels": info.channels,
        "stride": info.stride,
        "miou": None if math.isnan(probe.miou) else probe.miou,
    }


def table(probes: Sequence[Probe], features: DiffusionFeatures) -> str:
    """The best ones, a line each."""
    lines = ["timestep  block  channels  stride   mIoU"]
    for probe in probes[:SHOWN]:
        info = features.unet.block_info[probe.block]
        score = f"{100 * probe.miou:7.1f}"
        lines.append(f"{probe.timestep:8g}  {probe.block:5}  {info.channels:8}  {info.stride:6}{score}")
    return "\n".join(lines) + (f"\n... and {len(probes) - SHOWN} others" if len(probes) > SHOWN else "")


def picture(probes: Sequence[Probe], timesteps: Sequence[float], blocks: Sequence[int]) -> Image.Image:
    found = {(probe.timestep, probe.block): probe.miou for probe in probes}
    values = [[found[t, block] for block in blocks] for t in timesteps]
    names = [f"{t:g}" for t in timesteps], [f"{block}" for block in blocks]
    return heat_map(values, *names, "mIoU of a linear classifier in percent", ("timestep", "decoder block"))
