"""A network of diffusers behind the interface of our UNet: its modules' outputs as activations."""

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffperception.integrations.diffusers.families import FAMILIES, class_of
from diffperception.integrations.diffusers.hooks import Output, as_map, outputs_until
from diffperception.integrations.diffusers.shapes import outputs_of, small_input, twin_of
from diffperception.integrations.diffusers.weights import plain, read_component
from diffperception.models import Condition, FeatureInfo, Model
from diffperception.models.feature_info import strides_in_words

ATTENTION = "attention"  # how the names of blocks begin that are maps of attention, before `.` and their stride


class DiffusersNetwork(Model):
    """A network that diffusers runs.

    Blocks are named by the paths of modules (`up_blocks.1`, `transformer_blocks.7`), or by their number in
    :attr:`block_info`; `attention.8` is how much cells of stride 8 attend to each word. A pass ends after the last
    module that is wanted.

    Args:
        architecture: the class in diffusers.
        config: of the network, as its config.json has it.
        pixels: how many pixels of the image wide a cell of its input is; some networks are told the image's size.

    Attributes:
        block_info: the blocks that go by number: of a UNet the middle and each layer on the way up, of a transformer
            all of its blocks; strides are in cells of the input.
        stride: what height and width of the input must be multiples of.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the network is none that is run here.
    """

    kind = "network of diffusers"

    def __init__(self, architecture: str, config: Mapping[str, Any], pixels: int = 1) -> None:
        super().__init__()
        kind = class_of(architecture)
        self.architecture, self.pixels, self.family = architecture, pixels, FAMILIES[architecture]
        if problem := self.family.problem(config):
            raise ValueError(f"a {architecture} whose config says that {problem} is not run here")
        self.network = kind.from_config(plain(config))
        full = self.network.config
        self.config = json.dumps(plain(full))
        self.record(config=plain(full))
        self.in_channels, self.out_channels = self.family.channels(full)
        self.stride, self.largest = self.family.multiple(full), self.family.largest(full)
        self.word_width, self.vector_widths = self.family.word_width(full), self.family.vector_widths(full)
        self.num_labels, self.has_null_label = self.family.labels(full)

    @property
    def outputs(self) -> dict[str, Output | None]:
        """Of each module that a pass runs, in the order in which they end; None where it gives no map of the image."""
        return outputs_of(self.architecture, self.config)

    @cached_property
    def block_info(self) -> list[FeatureInfo]:
        return [self._info(name) for name in self.family.blocks(self.network)]

    @cached_property
    def word_layers(self) -> dict[str, int]:
        """The layers that attend to words alone, with the strides of the maps that do."""
        return {
            name: place.stride
            for name, place in self.outputs.items()
            if place and getattr(module := self.network.get_submodule(name), "is_cross_attention", False)
            if getattr(module, "added_kv_proj_dim", None) is None
        }

    def weights_at(self, place: Path, part: str) -> dict[str, Tensor]:
        """The weights in a folder of diffusers, of json and safetensors."""
        return read_component(place / part, self.architecture, "network.")

    def check_size(self, height: int, width: int) -> None:
        """ValueError for inputs whose sides are no multiples, or larger than a network with learned places takes."""
        if height % self.stride or width % self.stride or min(height, width) < 1:
            whole = self.stride * self.pixels
            raise ValueError(
                f"this {self.architecture} takes images whose sides are multiples of {whole} pixels, not"
                f" {height * self.pixels} x {width * self.pixels}"
            )
        if self.largest is not None and max(height, width) > self.largest:
            raise ValueError(
                f"this {self.architecture} takes images of at most {self.largest * self.pixels} pixels a side, not"
                f" {height * self.pixels} x {width * self.pixels}: cut them into windows, or make them smaller"
            )

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The prediction (B, out_channels, h, w) for x (B, C, h, w) and times (B,), 0..1000."""
        self._check(x)
        if self.family.square and x.shape[2] != x.shape[3]:
            raise ValueError(f"a {self.architecture} of diffusers makes squares, not {x.shape[2]} x {x.shape[3]} cells")
        return self.family.unfold(self._run(self.network, self.family.fold(x), *self._told(x, t, condition)), x)

    @torch.compiler.disable  # hooks come and go with each pass
    def activations(
        self, x: Tensor, t: Tensor, blocks: Sequence[int | str], condition: Condition | None = None
    ) -> list[Tensor]:
        """What blocks give, (B, channels, h / stride, w / stride) each; what follows the last is not computed.

        Args:
            x, t, condition: as for :meth:`forward`, as are the errors.
            blocks: in the order wanted; ValueError for one that does not exist.
        """
        self._check(x)
        maps = self._read(self.network, self.family.fold(x), *self._told(x, t, condition), blocks)
        return [self.family.unfold(m, x) for m in maps]

    def info_of(self, blocks: Sequence[int | str], condition: Condition | None = None) -> list[FeatureInfo]:
        """What :meth:`activations` gives of these blocks; ValueError for one that does not exist.

        Args:
            condition: what the network will be told, whose words are the channels of maps of attention.
        """
        if not blocks:
            raise ValueError(f"name at least one block of this {self.architecture}")
        words = 0 if condition is None or condition.tokens is None else condition.tokens.shape[1]
        return [self._info(self._name(block), words) for block in blocks]

    def attention_blocks(self, blocks: Sequence[int | str]) -> list[str]:
        """The maps of attention that can be had where a pass ends after these blocks; ValueError if there are none."""
        strides = sorted({self.word_layers[name] for name in self._attending(blocks)})
        if not strides:
            raise ValueError(
                f"no layer of this {self.architecture}, up to the last of the blocks, attends to words alone: leave"
                " attention out"
            )
        return [f"{ATTENTION}.{stride}" for stride in strides]

    def unused(self, blocks: Sequence[int | str]) -> list[nn.Parameter]:
        """The parameters that :meth:`activations` of these blocks do not depend on."""
        twin = twin_of(self.architecture, json.loads(self.config))
        with torch.enable_grad():
            maps = self._read(twin, *small_input(self.architecture, twin), blocks)
            names, parameters = zip(*twin.named_parameters(), strict=True)
            gradients = torch.autograd.grad([m.sum() for m in maps], parameters, allow_unused=True)
        return [self.network.get_parameter(n) for n, g in zip(names, gradients, strict=True) if g is None]

    def layers(self) -> dict[str, int]:
        """The number of the block of each parameter by its name, from the image on, from 0 on.

        What comes before the first block is 0; what follows the last is of that.
        """
        number, done = dict[str, int](), 0
        ended = [name for name in self.outputs if _is_block(name)]
        for name in self.outputs:
            inside = next((i for i, block in enumerate(ended, 1) if f"{name}.".startswith(f"{block}.")), None)
            number[name] = done if inside is None else inside
            done += name in ended
        owners = {name: name.rpartition(".")[0] for name, _ in self.network.named_parameters()}
        return {f"network.{name}": number.get(owner, 0) for name, owner in owners.items()}

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"This {self.architecture} takes {self.in_channels} channels, not {x.shape[1]}.")
        self.check_size(*x.shape[2:])

    def _told(self, x: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Condition]:
        """Times and condition of the parts that the network sees of x, where x is and of its type."""
        parts = len(self.family.fold(x)) // len(x)
        given = {name: value for name, value in vars(condition or Condition()).items() if value is not None}
        return t.repeat_interleave(parts), Condition(
            **{
                name: value.to(x.device, x.dtype if value.is_floating_point() else None).repeat_interleave(parts, 0)
                for name, value in given.items()
            }
        )

    def _run(self, network: nn.Module, x: Tensor, t: Tensor, told: Condition) -> Any:
        return self.family.run(network, x, t, told, self.pixels)

    def _read(
        self, network: nn.Module, x: Tensor, t: Tensor, told: Condition, blocks: Sequence[int | str]
    ) -> list[Tensor]:
        names = [self._name(block) for block in blocks]
        modules = [name for name in names if not _stride_of_attention(name)]
        attending = self._attending(blocks) if len(modules) < len(names) else []
        outputs, attention = outputs_until(network, modules, attending, lambda: self._run(network, x, t, told))
        maps = {name: as_map(outputs[name], place, x) for name in modules if (place := self.outputs[name])}
        for name in names:
            if stride := _stride_of_attention(name):
                layers = [attention[layer] for layer in attending if self.word_layers[layer] == stride]
                cells = (x.shape[2] // stride, x.shape[3] // stride)
                maps[name] = torch.stack(layers).mean(0).mT.unflatten(2, cells)
        return [maps[name] for name in names]

    def _attending(self, blocks: Sequence[int | str]) -> list[str]:
        """The layers that attend to words before the last of the blocks that are no maps of attention."""
        order = {name: number for number, name in enumerate(self.outputs)}
        names = (self._name(block) for block in blocks)
        end = max((order[name] for name in names if not _stride_of_attention(name)), default=len(order))
        return [name for name in self.word_layers if order[name] < end]

    def _name(self, block: int | str) -> str:
        if isinstance(block, int):
            if block not in range(len(self.block_info)):
                choice = strides_in_words(self.block_info)
                raise ValueError(f"this {self.architecture} has no block {block}; it has, in cells, {choice}")
            return self.block_info[block].name
        if stride := _stride_of_attention(block):
            if stride not in self.word_layers.values():
                raise ValueError(f"no layer of this {self.architecture} attends to words at stride {stride}: {block}")
        elif self.outputs.get(block) is None:
            raise ValueError(self._unknown(block))
        return block

    def _unknown(self, name: str) -> str:
        """What is wrong with a name."""
        known = [name for name, place in self.outputs.items() if place]
        near = difflib.get_close_matches(name, known, n=3) or [info.name for info in self.block_info]
        gives = "has no module" if name not in dict(self.network.named_modules()) else "has no map of the image in"
        return f"this {self.architecture} {gives} {name}; there are {', '.join(near[:8])} and others"

    def _info(self, name: str, words: int = 0) -> FeatureInfo:
        if stride := _stride_of_attention(name):
            return FeatureInfo(name, words, stride)
        place = self.outputs[name]
        assert place is not None
        return FeatureInfo(name, place.channels, place.stride)


def _is_block(name: str) -> bool:
    """Whether a path is of the blocks that a network is a series of."""
    first, _, rest = name.partition(".")
    return (first == "mid_block" and not rest) or (first.endswith("_blocks") and rest.isdigit())


def _stride_of_attention(name: str) -> int:
    """The stride in the name of a map of attention; 0 for the names of modules."""
    first, _, stride = name.partition(".")
    return int(stride) if first == ATTENTION and stride.isdigit() else 0
