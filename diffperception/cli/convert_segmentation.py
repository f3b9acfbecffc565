"""`diffperception convert --task segmentation`: classifiers of ddpm-segmentation as a segmenter file."""

from pathlib import Path

from jsonargparse.typing import PositiveInt

from diffperception.cli import counted, say
from diffperception.models.base import require_file_name
from diffperception.segmentation import FeatureExtractor, PixelEnsemble, PixelSegmenter


def convert(
    features: FeatureExtractor,
    checkpoints: list[Path],
    classes: list[str],
    output: Path,
    short_side: PositiveInt | None = None,
    overwrite: bool = False,
) -> None:
    """Turn the pixel classifiers of ddpm-segmentation into a segmenter file.

    The features must be those that the classifiers were trained on: of the same UNet, which `diffperception convert`
    makes a model file of first, with the same blocks and timesteps in the same order.

    For example: `diffperception convert --task segmentation --features
    diffperception.segmentation.DiffusionFeatures --features.generator cat.safetensors --checkpoints
    model_0.pth model_1.pth --classes "[background, ...]" --output cat_segmenter.safetensors`.

    Args:
        features: what is known of pixels; DiffusionFeatures and its arguments.
        checkpoints: model_0.pth, model_1.pth, ...: a file a member of the ensemble. Nothing in them is run.
        classes: names of the classes 0, 1, ...
        output: the file to write.
        short_side: images are resized to this short side first; null for not.
        overwrite: replace the output file.
    """
    require_file_name(output)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already: name another file, or replace it with --overwrite")
    ensemble = PixelEnsemble.from_reference(checkpoints, features.channels, len(classes))
    PixelSegmenter(features, ensemble, classes, short_side).save(output)
    say(
        f"{counted(len(checkpoints), 'classifier')} of {features.channels} features and {len(classes)} classes\n"
        f"{output}: for `diffperception segment`, `distill` and `evaluate --task segmentation`"
    )
