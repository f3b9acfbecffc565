"""From any format of annotations to COCO, and from there to Pascal VOC or YOLO."""

from pathlib import Path
from typing import Literal, NamedTuple

from diffperception.data.annotations import tabulate
from diffperception.data.box_outlines import outline_boxes
from diffperception.data.formats import Format, open_annotations, split_part
from diffperception.data.formats.writers import write_voc, write_yolo
from diffperception.data.soundness import require_entries, with_sizes
from diffperception.files import OutputFolder, require_file_name, write_json


class Conversion(NamedTuple):
    """What was converted."""

    images: Path  # the folder of the images, which stay there
    num_images: int
    num_objects: int
    classes: list[str]
    notes: list[str]  # what was passed over, or taken in another way than it is written


def convert_annotations(
    annotations: Path,
    output: Path,
    images: Path | None = None,
    format: Format = "auto",
    to: Literal["coco", "voc", "yolo"] = "coco",
    classes: list[str] | None = None,
    masks: Path | None = None,
    mask_classes: list[str] | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert annotations of any format to COCO, Pascal VOC or YOLO. Images are not copied.

    Args:
        annotations: file or folder of annotations; `data.yaml:val` or `VOC2007:val` is one part of it.
        output: the COCO JSON file to write; or the folder of a VOC or YOLO data set.
        images: folder of the images; by default where the format has them.
        format: what is read: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for itself.
        to: what is written.
        classes: all classes in order, for formats that do not list them; by default those that occur, sorted.
        masks: folder with a mask of each image, not 0 where any object is: COCO's objects get as their outline what it
            shows in their box. Names go together as for `train --task segmentation`.
        mask_classes: the classes whose objects the masks show; others are left out. By default all.
        overwrite: write in place of a file, or of what an earlier run wrote into the folder.

    Raises:
        FileNotFoundError, ValueError: the annotations cannot be read, or the output would replace something.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"there is no image folder {images}")
    found = open_annotations(annotations, images, format, outlines=to == "coco", classes=classes)
    table = with_sizes(tabulate(found.content, annotations), found.images)
    require_entries(table)
    content, notes = found.content, list(found.notes)
    if masks is not None:
        if to != "coco":
            raise ValueError("outlines from masks are written to COCO alone: leave the option masks or to out")
        named = table.category_names if mask_classes is None else mask_classes
        content, said = outline_boxes(content, table, found.images, masks, named)
        table, notes = tabulate(content, annotations), [*notes, *said]
    num_objects = len(table.boxes)
    if classes is not None and classes != table.category_names:
        notes.append(f"{annotations} lists its classes itself, so --classes is not used")
    if to == "coco":
        require_file_name(output)
        if output.exists() and output.samefile(split_part(str(annotations))[0]):
            raise ValueError(f"{output} is what is to be converted: choose another --output")
        if output.exists() and not overwrite:
            raise ValueError(f"{output} is there already: choose another, or allow to replace it with --overwrite")
        write_json(output, content, indent=None)
    else:
        folder = OutputFolder(output, overwrite)
        folder.clear()
        (write_voc if to == "voc" else write_yolo)(table, folder)
        if to == "yolo" and table.iscrowd.any():
            notes.append(f"crowd regions, which YOLO does not know, are left out: {table.iscrowd.sum()}")
            num_objects -= int(table.iscrowd.sum())
    return Conversion(found.images, len(table.image_ids), num_objects, list(table.category_names), notes)
