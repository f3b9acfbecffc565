"""`diffperception extract`."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from diffperception.devices import Precision, join_processes, pick_device
from diffperception.echo import echo
from diffperception.segmentation import FeatureExtractor, extract_features


def extract(
    features: FeatureExtractor,
    images: str,
    output: Path,
    short_side: PositiveInt | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    max_bytes: str | None = None,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "32",
) -> None:
    """Write the feature maps of images to disk, at their native resolutions: a safetensors file per image.

    Before it starts it says how many bytes that will be. It can be interrupted: given again, the command goes on with
    the images whose files are missing or incomplete. Images that cannot be read are left out and named at the end.

    For example: `diffperception extract --features diffperception.segmentation.DiffusionFeatures
    --features.generator runs/shapes_ddpm/model.safetensors --images photos --output features --max_bytes 2GB`.

    Training takes the maps from there instead of computing them: `diffperception train --task segmentation
    --features diffperception.segmentation.ExtractedFeatures --features.folder features ...`.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures, RGBFeatures, or a class of your own.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the files, named as the images, settings.json, which says what they hold, and the extractor.
        short_side: resize the images to this short side first.
        dtype: type of the numbers.
        max_bytes: refuse to start if all files would take more than this, such as 2GB.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: bf16 computes the networks' products in bfloat16, faster on recent GPUs; 32 in float32.
    """
    on_device = features.to(pick_device(device))
    with join_processes():
        broken = extract_features(on_device, images, output, short_side, dtype, max_bytes, workers, precision)
    echo("\n".join([f"{output}: feature maps", *(["left out:", *broken] if broken else [])]))
