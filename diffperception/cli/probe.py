"""`diffperception probe`."""

from pathlib import Path

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from diffperception.data.masks import MaskDataOptions
from diffperception.devices import Precision, pick_device
from diffperception.echo import echo, echo_notes
from diffperception.files import OutputFolder
from diffperception.models.generator import load_generator
from diffperception.segmentation import DiffusionFeatures
from diffperception.segmentation.probe import expected_seconds, probe_features, probe_table, suggest, write_probe


def command(
    model: Path,
    data: MaskDataOptions,
    output: Path,
    timesteps: list[float] = [50, 150, 250, 400, 25, 600],  # noqa: B006 (the defaults are not changed)
    blocks: list[NonNegativeInt | str] | None = None,
    seconds: NonNegativeFloat = 600,
    pixels: PositiveInt = 2000,
    window: PositiveInt | None = None,
    label: int | None = None,
    prompt: str | None = None,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> None:
    """Rank the timesteps and decoder blocks of a generator by how well they tell the classes of pixels apart.

    Each block at each timestep is tried alone, by a linear classifier that learns from half of the labelled images and
    is scored on the other half. Writes probe.json (all of them, and the suggested options) and probe.png (a heat map).
    The suggestion is the blocks and timesteps that are best on average over the others; together they know more than
    the best alone.

    For example: `diffperception probe --model runs/shapes_ddpm/model.safetensors --data.images data/shapes/train
    --data.masks data/shapes/masks/train --data.classes "[background, ...]" --data.max_images 10 --output runs/probe`.

    Args:
        data: the labelled images; ten are a good number.
        timesteps: times to try, in this order while time is left.
        model: the model.safetensors file of a generator or a UNet, or a folder of diffusers.
        blocks: decoder blocks to try, or names of modules of a network of diffusers; null for all.
        seconds: no timestep is begun that would pass this limit; the first always is.
        pixels: how many pixels per image are looked at.
        window: larger images are cut into windows of this side; null for what the generator was trained on.
        label: the class to tell a generator that has classes; null for none, if it has learned that.
        prompt: what to tell a network that attends to words: a .safetensors file with `prompt_embeds`, or a text, for
            which transformers must be installed; null for zeros.
        seed: seed of the noise, the choice of images that data.max_images asks for, and the choice of pixels.
    """
    results = OutputFolder(output, overwrite)  # refused before the work, not after it
    generator = load_generator(model, prompt=prompt, named_blocks=any(isinstance(b, str) for b in blocks or []))
    tried: list[int | str] = [*range(len(generator.block_info))] if blocks is None else [*blocks]
    features = DiffusionFeatures(generator, tried, timesteps, window, seed, label).to(pick_device(device))
    folder = data.open(seed)
    echo_notes(folder.notes)
    images = list(folder.images)
    expected = expected_seconds(features, images, precision)
    echo(f"{len(timesteps)} timesteps, {len(tried)} blocks, {len(images)} images: about {expected:.0f} s per timestep")
    if expected > seconds:
        echo(
            f"note: the first timestep alone will take more than --seconds {seconds:g}: to be done in time, look at"
            " fewer images with data.max_images, or at smaller ones with data.short_side"
        )
    masks = list(folder.masks)
    scores = probe_features(features, images, masks, len(data.classes), seconds, pixels, seed, folder.names, precision)
    results.clear()
    write_probe(scores, features, results)
    echo(probe_table(scores))
    options = (
        f"--features.{k} '[{', '.join(v if isinstance(v, str) else f'{v:g}' for v in values)}]'"
        for k, values in suggest(scores).items()
    )
    echo(f"suggested: {' '.join(options)}\n{output / 'probe.json'}: all of them; beside it probe.png")
