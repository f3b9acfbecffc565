"""Random damage to what users give: JSON and YAML trees, pictures, masks, tensors and bytes."""

import copy
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

VALUES = (
    *(None, True, False, "", [], {}, [None], 0, 1, -1, 2, 7, 2**31, 2**70, 0.5, -0.0, 1e30),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "1",
        "0.5",
        "nan",
        "no",
        "гайка",
        "\u0000",
        "../../x",
        "/x",
        "a/b",
        " ",
        "x" * 300,
    ),
)
SCALES = (-1, 0.001, 1e-9, 1.5, 100, 1e20)
Place = tuple[Any, Any]  # a list or dict, and a key of it


def places(tree: Any, avoid: frozenset[str] = frozenset()) -> list[Place]:
    """Every list or dict with each of its keys, those below the keys to avoid left out."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    here = [(tree, key) for key in keys if key not in avoid]
    return here + [place for _, key in here for place in places(tree[key], avoid)]


def damage_tree(random: Random, tree: Any, avoid: frozenset[str] = frozenset()) -> Any:
    """A copy of a JSON or YAML tree with one to three places changed."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(random.randint(1, 3)):
        every = places(tree, avoid)
        if not every:
            break
        shallow = [place for place in every if place[0] is tree or place[0] is tree.get("")]
        holder, key = random.choice(shallow if random.random() < 0.15 else every)
        _damage_place(random, holder, key, every)
    return tree.get("", {})


def _damage_place(random: Random, holder: Any, key: Any, every: list[Place]) -> None:
    value = holder[key]
    kind = random.choice(("value", "value", "drop", "twin", "swap", "wrap", "text", "scale"))
    if kind == "drop":
        del holder[key]
    elif kind == "twin":
        if isinstance(holder, list):
            holder.append(copy.deepcopy(value))
        else:
            holder[f"{key}_"] = copy.deepcopy(value)
    elif kind == "swap":
        other, place = random.choice(every)
        if other is holder or not isinstance(other[place], dict | list):  # a tree stays a tree
            holder[key], other[place] = other[place], holder[key]
    elif kind == "wrap":
        holder[key] = [value]
    elif kind == "text":
        holder[key] = str(value)
    elif kind == "scale" and isinstance(value, int | float):
        holder[key] = value * random.choice(SCALES)
    else:
        holder[key] = random.choice(VALUES)


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Cut off, overwritten, longer, empty, or in another encoding."""
    kind = random.choice(("cut", "flip", "insert", "empty", "mark", "utf-16", "latin"))
    at = random.randrange(len(content) + 1)
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + random.randbytes(4) + content[at + 4 :]
    if kind == "insert":
        return content[:at] + random.randbytes(8) + content[at:]
    if kind == "mark":
        return b"\xef\xbb\xbf" + content
    if kind == "utf-16":
        return content.decode("latin-1").encode("utf-16")
    return b"" if kind == "empty" else content + "é".encode("latin-1")


def damage_json(random: Random, path: Path) -> None:
    if random.random() < 0.2:
        path.write_bytes(damage_bytes(random, path.read_bytes()))
    else:
        path.write_text(json.dumps(damage_tree(random, json.loads(path.read_text()))), encoding="utf-8")


def damage_picture(random: Random, path: Path) -> None:
    """Another size, mode, format, orientation, ending or place; or broken bytes."""
    image = Image.open(path)
    image.load()
    kind = random.choice(("size", "mode", "format", "turn", "ending", "bytes", "gone", "folder", "hidden"))
    if kind == "size":
        image.resize((random.choice((1, 2, 17, 300)), random.choice((1, 3, 40)))).save(path)
    elif kind == "mode":
        image.convert(
            random.choice(
                ("1", "L", "LA", "P", "RGBA", "I", "I;16") if image.mode == "L" else ("1", "L", "LA", "P", "RGBA")
            )
        ).save(path)
    elif kind == "format":
        form = random.choice(("TIFF", "BMP", "GIF", "JPEG", "WEBP"))
        image.convert("RGB").save(path, format=form)  # under the old name
    elif kind == "turn":
        exif = Image.Exif()
        exif[0x0112] = random.choice((0, 3, 6, 8, 99))
        image.save(path, exif=exif)
    elif kind == "ending":
        path.rename(path.with_suffix(random.choice((".PNG", ".jpg", ".txt", "", ".tiff", ".npy"))))
    elif kind == "bytes":
        path.write_bytes(damage_bytes(random, path.read_bytes()))
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.rename(path.with_name(f".{path.name}"))


def damage_mask(random: Random, path: Path) -> None:
    """As a picture, or with other values in its pixels."""
    if random.random() < 0.5:
        damage_picture(random, path)
        return
    mask = np.array(Image.open(path))
    mask[random.randrange(len(mask)) :] = random.choice((0, 1, 2, 7, 254, 255))
    if random.random() < 0.3:
        mask = mask * 255
    Image.fromarray(mask).save(path)


def damage_state(random: Random, state: dict[str, Tensor]) -> dict[str, Any]:
    """Weights that are missing, extra, of another shape, type or name."""
    state = dict(state)
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(state))
        value = state[name]
        kind = random.choice(("drop", "shape", "flat", "type", "nan", "name", "prefix", "scalar"))
        if kind == "drop":
            del state[name]
        elif kind == "shape":
            state[name] = torch.cat([value, value]) if value.ndim else value[None]
        elif kind == "flat":
            state[name] = value.flatten()[: random.randint(0, 3)].clone()
        elif kind == "type":
            state[name] = value.to(random.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool)))
        elif kind == "nan":
            state[name] = torch.full_like(value.float(), float("nan"))
        elif kind == "name":
            state[f"{name}.extra"] = value.clone()
        elif kind == "prefix":
            state = {f"module.{key}": tensor for key, tensor in state.items()}
        else:
            state[name] = torch.tensor(1.0)
        if not state:
            return {}
    return state


def damage_checkpoint(random: Random, path: Path) -> None:
    """A checkpoint of torch's with other weights, other things in it, or broken bytes."""
    if random.random() < 0.25:
        path.write_bytes(damage_bytes(random, path.read_bytes()))
        return
    state: Any = damage_state(random, torch.load(path, weights_only=True))
    wrapped = random.choice((None, None, "state_dict", "model", "ema", "epoch"))
    if wrapped:
        state = {wrapped: state, "step": 3}
    content = io.BytesIO()
    torch.save(random.choice((state, state, state, state, [state], "text", None)), content)
    path.write_bytes(content.getvalue())


def damage_model(random: Random, path: Path) -> None:
    """A model file of ours with other weights, another header, or broken bytes."""
    if random.random() < 0.25:
        path.write_bytes(damage_bytes(random, path.read_bytes()))
        return
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    state = load_file(path)
    if random.random() < 0.5:
        key = random.choice(sorted(header))
        try:
            header[key] = json.dumps(damage_tree(random, json.loads(header[key])))
        except ValueError:  # not JSON
            header[key] = str(random.choice(VALUES))
    else:
        state = {name: value.contiguous().clone() for name, value in damage_state(random, state).items()}
    save_file(state, path, metadata=header)
