"""`diffperception evaluate --task segmentation`: how much of the labelled pixels is predicted right."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.data.masks import IGNORE_INDEX, MaskFolder
from diffperception.detection.inference import spread
from diffperception.devices import pick_device
from diffperception.files import check_output_dir as require_room
from diffperception.files import write_text
from diffperception.segmentation import MeanIoU, PixelSegmenter
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import segmentation_panels


def evaluate(
    model: Path,
    images: Path,
    masks: Path,
    annotations: Path | None = None,
    limit: PositiveInt | None = None,
    unlabelled: Literal["stop", "skip"] = "stop",
    ignore: int | None = IGNORE_INDEX,
    mask_values: dict[int, int] | None = None,
    output: Path | None = None,
    pictures: NonNegativeInt = 4,
    device: str = "auto",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
) -> None:
    """Score a segmenter on images with masks: IoU of each class, and their mean.

    Pixels are counted over all images, at the masks' own size. Pixels without a label count nowhere, and a class that
    neither the masks nor the predictions have is left out of the mean.

    Args:
        model: the segmenter, a model.safetensors file.
        images: folder with pictures.
        masks: folder with their masks, of the same names: PNG of one channel or NPY, in each pixel its class's number.
        annotations: only the images are used that this COCO JSON file lists, or this text file with a name a line.
        limit: use only so many of the images, chosen by the seed; by default all.
        unlabelled: what to do at an image without a mask: stop, naming it, or leave it out.
        ignore: the value in masks of pixels without a label; null for none.
        mask_values: class numbers of the values in masks where they differ, such as '{0: 0, 255: 1}'.
        output: folder for metrics.json and pictures/; nothing is written without it.
        pictures: how many are drawn, spread over the images: image, truth, prediction and uncertainty.
        device: cpu, cuda, cuda:1, ... or auto.
        seed: of which images `limit` chooses.
        overwrite: write into a folder that is not empty.
    """
    if output is not None:
        require_room(output, overwrite)
    segmenter = PixelSegmenter.load(model).to(pick_device(device))
    classes = segmenter.classes
    folder = MaskFolder(images, masks, len(classes), ignore, mask_values, annotations, unlabelled, limit, seed)
    metrics = score(segmenter, folder).summary(classes)
    say(iou_table(metrics, len(folder)))
    if output is None:
        return
    content = {"metrics": metrics, "images": len(folder), "model": str(model)}
    write_text(output / "metrics.json", json.dumps(content, indent=2) + "\n")
    draw(segmenter, folder, output / "pictures", pictures)
    say(f"{output}: these numbers in metrics.json" + (", and pictures/" if pictures else ""))


def score(model: PixelSegmenter, folder: MaskFolder) -> MeanIoU:
    """The counts of a model's predictions on all images of a folder; shows the time left."""
    counts = MeanIoU(len(model.classes))
    for image, mask in tqdm(
        (folder[i] for i in range(len(folder))), "evaluate", len(folder), leave=False, unit="image", disable=None
    ):
        counts.update(model.segment(image).labels, mask)
    return counts


def iou_table(metrics: Mapping[str, Any], images: int) -> str:
    """The summary of a score as lines of text."""
    ious = {"mean IoU": metrics["miou"], **{f"  {name}": iou for name, iou in metrics["iou"].items()}}
    width = max(map(len, ious))
    lines = [f"{name:<{width}}  {'-' if iou is None else f'{100 * iou:.1f} %'}" for name, iou in ious.items()]
    return "\n".join(
        [*lines, f"on the labelled pixels of {counted(images, 'image')}; - is in no mask and in no prediction"]
    )


def draw(model: PixelSegmenter, folder: MaskFolder, output: Path, count: int) -> None:
    """Image, truth, prediction and uncertainty of some images, spread over the folder."""
    for index in spread(len(folder), count) if count else []:
        image, mask = folder[index]
        found = model.segment(image)
        picture = segmentation_panels(image, found.labels, found.uncertainty, model.classes, mask)
        save_png(picture, (output / folder.names[index]).with_suffix(".png"))
