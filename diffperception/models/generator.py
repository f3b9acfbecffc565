"""A generator of images: a denoising network with its schedule, its space and what it is told, in one file."""

import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from diffperception.diffusion import (
    Denoiser,
    GuidanceRescale,
    Network,
    NetworkDenoiser,
    Objective,
    Prediction,
    ScheduleName,
    classifier_free_guidance,
    named_schedule,
)
from diffperception.models.base import Model, leave_weights, require_not_named_by_a_file
from diffperception.models.condition import Condition
from diffperception.models.conditioners import ClassLabels, Conditioner, Said
from diffperception.models.convert import adm
from diffperception.models.convert.checkpoints import class_names
from diffperception.models.convert.unet2d import ForeignLayoutError
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.space import Pixels, Space
from diffperception.models.unet.encoder import both_sides
from diffperception.models.unet.unet import UNet

CODECS = ("vae", "vqvae", "movq")  # components of diffusers' pipelines whose networks do not see pixels


class DiffusionModel(Model):
    """The only door to a denoising network: all that training, sampling and reading activations need to know.

    ValueError if the parts do not fit each other.

    Args:
        classes: names of the labels, None for a model without.
        network: the denoiser; with ``learned_range`` it has twice as many output as input channels.
        conditioner: makes what the network is told; by default an embedding per class, if there are classes.
        space: where the signal that is noised lives; by default the pixels.
        schedule: linear (DDPM), scaled_linear (latent diffusion), cosine (Improved DDPM), that of ``betas``, sub_vp
            (score SDEs), or flow (the straight path of flow matching; its ``prediction`` is ``flow``).
        num_timesteps: T of the discrete schedules.
        rescale_timesteps: the network is told times of 0 to 1000 whatever T is, as improved-diffusion's default is.
        prediction: what the network predicts.
        learned_range: the network learns the variance too (Improved DDPM, arXiv 2102.09672).
        image_size: side, or height and width, of the images it learns from; samples have it by default.
        null_class: there is a label that stands for none, as classifier-free guidance needs.
        beta_start, beta_end: variance added at the first and the last step of linear and scaled_linear; by default
            1e-4 and 0.02 for 1000 steps, and in proportion for others.
        betas: variance added at each step, where the schedule is ``betas``.
    """

    kind = "generator"

    def __init__(
        self,
        classes: Sequence[str] | None,
        network: UNet,
        conditioner: Conditioner | None = None,
        space: Space | None = None,
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        prediction: Prediction = "eps",
        learned_range: bool = False,
        image_size: int | tuple[int, int] = 64,
        null_class: bool = False,
        rescale_timesteps: bool = False,
        beta_start: float | None = None,
        beta_end: float | None = None,
        betas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.classes = None if classes is None else list(classes)
        self.network = network
        self.space = space or Pixels(network.in_channels)
        self.schedule = named_schedule(schedule, num_timesteps, rescale_timesteps, beta_start, beta_end, betas)
        self.prediction = prediction
        self.learned_range = learned_range
        self.image_size = both_sides(image_size)
        if conditioner is None and self.classes is not None:
            conditioner = ClassLabels(self.classes, network.embedding, null_class)
        self.conditioner = conditioner
        self._require_fit(schedule, null_class)

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Tensor],
        image_size: int | tuple[int, int] | None = None,
        classes: Sequence[str] | None = None,
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        prediction: Prediction = "eps",
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        new_attention_order: bool = False,
        rescale_timesteps: bool | None = None,
    ) -> "DiffusionModel":
        """The generator of a guided-diffusion or improved-diffusion checkpoint, with its weights.

        What a checkpoint does not tell can be tried out: :func:`~diffperception.models.convert.trial.try_conventions`.

        Args:
            state: the checkpoint's state dict; its tensors become the model's.
            image_size: side, or [height, width], of the images that a diffusion model was trained on.
            classes: names of its labels; numbers by default.
            schedule: the path it was trained on (noise_schedule).
            num_timesteps: steps of the path (diffusion_steps).
            prediction: what the model predicts.
            num_heads: attention heads at every width.
            num_head_channels: channels of a head (64 in ADM's models); this or num_heads.
            new_attention_order: q, k and v come before heads in the attention's weights (use_new_attention_order).
            rescale_timesteps: whether the network is told times of 0 to 1000 whatever their number is
                (rescale_timesteps, true by default in improved-diffusion, false in guided-diffusion); to be said of
                other numbers of steps than 1000.

        Raises:
            ValueError: as :meth:`UNet.from_reference`; without image_size or rescale_timesteps; for another number of
                classes; or if it enlarges images.
        """
        labels = state.get(adm.LABELS)
        unlabelled = {name: value for name, value in state.items() if name != adm.LABELS}
        network = UNet.from_reference(unlabelled, num_heads, num_head_channels, new_attention_order)
        channels, outputs = network.in_channels, network.out_channels
        # The upsamplers of guided-diffusion see a small image beside the noisy one.
        if outputs not in (channels, 2 * channels) or channels == 6:
            raise ValueError(
                f"the UNet takes {channels} channels and gives {outputs}: it enlarges images, which is not supported"
            )
        if image_size is None:
            raise ValueError("give image_size, the side of the images it was trained on: a checkpoint does not tell it")
        if labels is not None and (labels.ndim != 2 or labels.shape[1] != network.embedding or not len(labels)):
            wanted = f"a row of {network.embedding} numbers per class"
            raise ValueError(f"{adm.LABELS} is {tuple(labels.shape)}, which does not fit this UNet: it takes {wanted}")
        model = cls(
            class_names(classes, 0 if labels is None else len(labels)) or None,
            network,
            schedule=schedule,
            num_timesteps=num_timesteps,
            prediction=prediction,
            learned_range=outputs == 2 * channels,
            image_size=image_size,
            rescale_timesteps=bool(rescale_timesteps),
        )
        if rescale_timesteps is None and num_timesteps != 1000 and schedule not in ("flow", "sub_vp"):
            raise ValueError(
                f"give rescale_timesteps, whether the network is told its {num_timesteps} times as 0 to 1000 (true, by"
                " default in improved-diffusion) or as they are (false, by default in guided-diffusion): a checkpoint"
                " does not tell it"
            )
        if model.conditioner is not None:
            model.conditioner.load_state_dict({"embedding.weight": labels})
        return model.eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow: str | tuple[str, ...] = (),
        weights: str | Path | None = None,
    ) -> Self:
        """As :meth:`Model.load`; of a folder of diffusers too, see :func:`load_generator`."""
        if not Path(path).is_dir():
            return super().load(path, device, dtype, allow, weights)
        return cast(Self, load_generator(path).to(device=device, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.network.parameters()).dtype

    @property
    def stride(self) -> int:
        """What the height and width of images must be multiples of."""
        return self.network.stride * self.space.stride

    @property
    def block_info(self) -> list[FeatureInfo]:
        """The network's blocks that can be read, with their strides in pixels of the image."""
        return self._in_pixels(self.network.block_info)

    def info_of(self, blocks: Sequence[int | str], condition: Condition | None = None) -> list[FeatureInfo]:
        """The maps of blocks, with strides in pixels of the image; ValueError if the network has no such block."""
        return self._in_pixels(self.network.info_of(blocks, condition))

    def _in_pixels(self, info: Sequence[FeatureInfo]) -> list[FeatureInfo]:
        return [replace(about, stride=about.stride * self.space.stride) for about in info]

    @property
    def has_absent(self) -> bool:
        """Whether it has learned images of which nothing is said."""
        return self.conditioner is None or self.conditioner.has_absent

    def signal_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the signal of an image of this size; ValueError if the network does not take such images."""
        stride = self.space.stride
        if height % stride or width % stride:
            raise ValueError(f"images must be multiples of {self.stride} pixels high and wide, not {height} x {width}")
        self.network.check_size(height // stride, width // stride)
        return self.space.channels, height // stride, width // stride

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's output for noisy signals (B, C, h, w) and times (B,), as the schedule tells them."""
        return self.network(x, t, condition)

    def activations(
        self, x: Tensor, t: Tensor, blocks: Sequence[int | str], condition: Condition | None = None
    ) -> list[Tensor]:
        """What blocks, as of :meth:`info_of`, give; what follows the last of them is not computed."""
        return self.network.activations(x, t, blocks, condition)

    def condition(self, said: Said | None) -> Condition | None:
        """What the network is told where this is said of images, or nothing; ValueError if it has not learned that."""
        if self.conditioner is None:
            if said is not None:
                raise ValueError("This model was trained without classes: leave labels out.")
            return None
        if said is None and not self.conditioner.has_absent:
            raise ValueError("This model has not learned images without a label: give one, or train with null_class.")
        return self.conditioner(self.conditioner.absent(1) if said is None else said)

    def told(self, prompt: str | Path | Mapping[str, Tensor]) -> "DiffusionModel":
        """The model whose network is told this; ValueError if it knows no words or images of which this is said."""
        if self.conditioner is None:
            raise ValueError("this generator attends to no words: leave the prompt out")
        conditioner = self.conditioner.told(prompt, self.network)
        return DiffusionModel(**self.arguments | {"conditioner": conditioner}).train(self.training)

    def objective(self, min_snr: float | None = None) -> Objective:
        """The training loss."""
        return Objective(self.schedule, self.prediction, self.learned_range, min_snr)

    def read(self, targets: Sequence[Mapping[str, Any]]) -> Said | None:
        """What the targets of a batch say; None where the model is told nothing. ValueError if they lack it."""
        return None if self.conditioner is None else self.conditioner.read(targets)

    def prepare(self, captions: Sequence[str] | None) -> None:
        """Take note, before a training, of its images' captions; ValueError if it lacks or ignores them."""
        if self.conditioner is not None:
            self.conditioner.prepare(captions)
        elif captions is not None:
            raise ValueError(
                "the images have captions, but the model has no conditioner that reads them: leave data.captions out,"
                " or set model.conditioner, to TextConditioner for example"
            )

    def losses(
        self, objective: Objective, x0: Tensor, t: Tensor, noise: Tensor, said: Said | None = None
    ) -> dict[str, Tensor]:
        """The terms of each sample's loss (B,) by an :meth:`objective`, of signals ``x0`` (B, C, h, w) of its space."""
        return objective(self._told(said), x0, t, noise)

    def denoiser(
        self, said: Said | None = None, guidance: float = 1.0, unwanted: Said | None = None, rescale: float = 0.0
    ) -> Denoiser:
        """What samplers work on; ValueError if this is asked of a model that has not learned it.

        Args:
            said: what is wanted of B samples, such as labels (B,); None for nothing in particular.
            guidance: weight of classifier-free guidance; 1 is none.
            unwanted: what guidance leads away from; by default nothing in particular.
            rescale: how far guided predictions are brought back to the spread of those that are not, 0 to 1.
        """
        if guidance == 1.0:
            return self._denoiser(said)
        if self.conditioner is None or not self.conditioner.has_absent:
            raise ValueError("Guidance needs another model: train it with classes and null_class, or give guidance 1.")
        against = self._denoiser(unwanted)
        if said is None and unwanted is None:
            return against
        back = GuidanceRescale(rescale, self.schedule, self.prediction) if rescale else None
        return classifier_free_guidance(self._denoiser(said), against, guidance, back)

    def _denoiser(self, said: Said | None) -> Denoiser:
        return NetworkDenoiser(self._told(said), self.schedule, self.prediction, self.learned_range)

    def _told(self, said: Said | None) -> Network:
        """The network as a function of noisy signals and times, told what is said of them."""
        condition = self.condition(said)
        return lambda x, t: self(x, t, None if condition is None else condition.expand(len(x)))

    def _require_fit(self, schedule: ScheduleName, null_class: bool) -> None:
        channels, outputs = self.network.in_channels, self.network.out_channels
        if outputs != channels * (2 if self.learned_range else 1):
            raise ValueError(
                f"The network has {channels} channels in and {outputs} out: learned_range needs twice as many out, else"
                " as many as in; set network.out_channels or learned_range."
            )
        if (self.prediction == "flow") != (schedule == "flow"):
            raise ValueError("The prediction flow belongs to the schedule flow, and to no other: set both.")
        if channels != self.space.channels:
            raise ValueError(f"The network has {channels} channels in, but its space {self.space.channels}.")
        if null_class and self.classes is None:
            raise ValueError("null_class belongs to a model with classes: leave it out, or learn from labelled images.")
        if isinstance(self.network, UNet):
            require_told(self.network, self.conditioner)
        self.signal_shape(*self.image_size)


def require_told(network: UNet, conditioner: Conditioner | None) -> None:
    """ValueError unless a conditioner makes what the network is told, as far as it says what it makes."""
    made = None if conditioner is None else conditioner.token_width
    kind = "no conditioner" if conditioner is None else f"a {type(conditioner).__name__}"
    if network.context != made and (made is not None or conditioner is None or isinstance(conditioner, ClassLabels)):
        wanted = "attends to no tokens" if network.context is None else f"attends to tokens {network.context} wide"
        makes = "makes none" if made is None else f"makes them {made} wide"
        raise ValueError(f"The network {wanted}, but {kind} {makes}: set network.context and model.conditioner alike.")
    vector = None if conditioner is None else conditioner.vector_width
    if vector not in (None, network.embedding):
        raise ValueError(
            f"The network's embedding has {network.embedding} channels (4 times network.channels), but {kind} makes a"
            f" vector of {vector}."
        )


def load_generator(
    source: DiffusionModel | UNet | str | Path,
    allow: tuple[str, ...] = (),
    prompt: str | Path | None = None,
    keep_weights: bool | None = None,
    named_blocks: bool = False,
) -> DiffusionModel:
    """The generator in a file or in a folder of diffusers; or of a UNet alone, taken for one of DDPM's linear schedule.

    Args:
        source: the file, the folder, or the model.
        allow: as for :meth:`Model.load`.
        prompt: what a network that attends to words is told, see
            :meth:`diffperception.integrations.diffusers.prompt.Prompt.told`; by default nothing.
        keep_weights: whether files of models that hold this generator hold its weights too, or name the file or folder
            that they were read from; by default they hold what our own networks are, and not what diffusers runs.
        named_blocks: blocks will be named by diffusers' modules: it runs its network itself even where ours could.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :meth:`Model.load`; a folder that diffusers did not write, or
            whose network we do not run; diffusers is absent; another model; a prompt that does not suit it.
    """
    model: Any = source
    if isinstance(source, str | Path):
        source = Path(source)
        require_here(source)
        if source.is_dir() and not (source / "model.safetensors").is_file():
            model = _of_folder(source, as_theirs=named_blocks or keep_weights is False)
        else:
            model = Model.load(source, allow=allow)
        if keep_weights is False and source.is_file():
            leave_weights(model, source)
    if keep_weights is False and not model.leaves_weights:
        raise ValueError("keep_weights false needs the file or folder that the generator lies in: name it, not a model")
    if isinstance(model, UNet):
        learned_range = model.out_channels == 2 * model.in_channels
        size = max(256, 2 * model.stride)
        model = DiffusionModel(None, model, learned_range=learned_range, image_size=size).eval()
    if not isinstance(model, DiffusionModel):
        place = "this" if model is source else source
        raise ValueError(f"{place} holds a {type(model).__name__}: give the file of a generator or a UNet")
    told = model if prompt is None else model.told(prompt)
    if keep_weights:
        told.keep_weights()
    return told


def _of_folder(folder: Path, as_theirs: bool) -> DiffusionModel:
    """The generator in a folder of diffusers: with a UNet of ours, if that can be the network, else run by diffusers.

    Plug-ins are imported by name: they are optional, and may import everything.
    """
    require_not_named_by_a_file(folder)
    latent = any((place / part).is_dir() for place in (folder, folder.absolute().parent) for part in CODECS)
    has_unet = any((folder / part / "config.json").is_file() for part in ("unet", ""))
    if has_unet and not (as_theirs or latent):
        with suppress(ForeignLayoutError):  # another network, or options that ours lacks
            return importlib.import_module("diffperception.models.convert.diffusers").generator_from_folder(folder)
    return importlib.import_module("diffperception.integrations.diffusers.folder").read_folder(folder)


def require_here(source: Path) -> None:
    """FileNotFoundError, saying how to download it, for what may be the name of a repository."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and source.suffix not in (
        ".safetensors",
        ".pt",
        ".ckpt",
    )
    if is_name and not source.parent.exists():
        raise FileNotFoundError(
            f"there is no file or folder {source}, and nothing is downloaded here: if that is a repository of Hugging"
            f" Face, `hf download {source} --local-dir FOLDER` fetches it, and FOLDER is what to name"
        )
