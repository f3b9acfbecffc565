"""Reading the components of a folder of diffusers: json and safetensors, and never a pipeline or code."""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffperception.integrations.diffusers.families import class_of
from diffperception.models.base import undrawn
from diffperception.models.convert.unet2d import read_object

STEM = "diffusion_pytorch_model"  # how diffusers names files of weights


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON has it, without the library's own notes, which name paths and versions."""
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(kept))


def read_config(folder: Path) -> Mapping[str, Any]:
    """A component's config.json; ValueError if it does not say which class it is of, or weights are quantized."""
    config = read_object(folder / "config.json")
    if not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{folder / 'config.json'} names no class of diffusers (_class_name): name another folder")
    if "quantization_config" in config:
        raise ValueError(f"{folder} holds quantized weights (quantization_config), which are not run: fetch full ones")
    return config


class WeightsFile(NamedTuple):
    """The file, or the index of the files, of a component's weights; a variant is a precision, such as fp16."""

    name: str
    is_safe: bool
    variant: str | None


def file_of(folder: Path) -> WeightsFile:
    """Which file is read: safetensors before pickles, the full precision before others; FileNotFoundError without."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder.name} in {folder.parent}: name the folder that holds it")
    names = sorted(path.name for path in folder.iterdir())
    pattern = rf"{STEM}(?:\.(\w+))?\.(safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?"
    found = [WeightsFile(m[0], m[2] == "safetensors", m[1] or m[3]) for n in names if (m := re.fullmatch(pattern, n))]
    if not found:
        there = f"only {', '.join(names[:4])}" if names else "nothing"
        raise FileNotFoundError(f"{folder} holds no weights of diffusers ({STEM}.safetensors), {there}: fetch them too")
    return min(found, key=lambda file: (not file.is_safe, file.variant is not None, file.name))


def read_component(folder: Path, architecture: str, prefix: str = "", pickles: bool = False) -> dict[str, Tensor]:
    """The weights of a component by name, with a prefix, as diffusers reads them: old names become today's.

    Args:
        pickles: whether pickles may be read, without running code in them: not where a file names the folder.

    Raises:
        FileNotFoundError: there are none in the folder.
        ValueError: they do not fit the architecture, or are damaged, quantized, or a pickle.
    """
    file = file_of(folder)
    read_config(folder)  # which diffusers reads once more, quantized weights by other libraries
    if not (file.is_safe or pickles):
        raise ValueError(f"{folder / file.name} is a pickle: save it as safetensors, with diffusers' save_pretrained")
    try:
        with undrawn():
            model, about = class_of(architecture).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=file.is_safe,  # where false, diffusers reads with torch's weights_only
                variant=file.variant,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise ValueError(f"diffusers does not read the weights in {folder} ({reason}): fetch them again") from None
    if wrong := [*about["missing_keys"], *about["unexpected_keys"]]:
        number = f"{len(wrong)} names are" if len(wrong) > 1 else "1 name is"
        raise ValueError(
            f"{folder / file.name} does not fit its config.json: {number} missing or left over"
            f" ({', '.join(map(str, wrong[:3]))}): fetch both again"
        )
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}
