"""What training inside detectron2 lacks: clipping of the whole gradient, and an average of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import GradientClipType, get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from diffperception.files import written_beside

FULL_MODEL = "full_model"  # the CLIP_TYPE of DETR's descendants for clipping the whole gradient
AVERAGED_WEIGHTS = "model_ema.pth"


def global_clip(optimizer_class: type[Optimizer], norm: float) -> type[Optimizer]:
    """An optimiser that first scales the whole gradient down to this norm.

    For LazyConfig: `optimizer = L(L(global_clip)(optimizer_class=torch.optim.AdamW, norm=1.0))(params=..., lr=...)`.
    """

    class Clipped(optimizer_class):  # type: ignore[valid-type,misc]
        # A fused optimiser would have mixed precision's scale taken off the gradient within its step: after clipping.
        _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], norm)
            return super().step(closure)

    Clipped.__name__ = Clipped.__qualname__ = f"Clipped{optimizer_class.__name__}"
    return Clipped


class EmaHook(HookBase):
    """Keeps an exponential moving average of the weights, which evaluations during training see.

    Its place among the hooks does not matter. Checkpoints of training hold the averages, and a resumed training goes on
    with them; `model_ema.pth`, written when training ends, has them as MODEL.WEIGHTS takes them. The decay of update n
    is min(decay, (1 + n) / (10 + n)), so that a short run does not average its first steps in.

    Args:
        model: that is trained.
        decay: of the average.
        output_dir: where model_ema.pth goes; None writes none.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, output_dir: str | Path | None = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of the average is {decay}: it must be from 0 to 1")
        self.model: nn.Module = getattr(model, "module", model)  # not its wrapper for several processes
        self.decay = decay
        self.output_dir = output_dir
        self.averages: dict[str, Tensor] = {}
        self.updates = 0
        self.is_due = False

    def before_train(self) -> None:
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.EvalHook):
                hook._func = self._averaging(hook._func)

    def before_step(self) -> None:
        self.is_due = True

    def after_step(self) -> None:
        self._update()

    def after_train(self) -> None:
        if self.output_dir is None or not self.updates or not comm.is_main_process():
            return
        with written_beside(Path(self.output_dir, AVERAGED_WEIGHTS)) as beside, beside.open("wb") as file:
            torch.save({"model": self.model.state_dict() | self.averages}, file)

    def state_dict(self) -> dict[str, Any]:
        self._update()  # by hooks that are before this one
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self._weights()
        if state["averages"].keys() - own.keys():
            raise ValueError("the checkpoint's averaged weights are of another model: begin a new training")
        self.averages = {name: value.to(own[name], copy=True) for name, value in state["averages"].items()}
        self.updates = state["updates"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights, if there are some."""
        self._update()
        weights = self._weights() if self.updates else {}
        kept = {name: value.clone() for name, value in weights.items()}
        for name, value in weights.items():
            value.copy_(self.averages[name])
        try:
            yield
        finally:
            for name, value in weights.items():
                value.copy_(kept[name])

    def _averaging(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate_averaged() -> Any:
            with self.averaged():
                return evaluate()

        return evaluate_averaged

    def _weights(self) -> dict[str, Tensor]:
        """What learns, and statistics."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point() and name not in frozen}

    def _update(self) -> None:
        """Once a step, after it, whichever hook asks first."""
        if not self.is_due:
            return
        self.is_due = False
        weights = self._weights()
        if self.updates:
            weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_([self.averages[name] for name in weights], list(weights.values()), weight)
        else:
            self.averages = {name: value.clone() for name, value in weights.items()}
        self.updates += 1


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SOLVER.OPTIMIZER, ADAMW or SGD, with the options that detectron2's SGD has.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be `full_model` too, which clips the whole gradient to the norm CLIP_VALUE.

    Raises:
        ValueError: it is another optimiser, or another kind of clipping.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    known: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
        "ADAMW": (torch.optim.AdamW, {}),
        "SGD": (torch.optim.SGD, momentum),
    }
    if solver.OPTIMIZER not in known:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER}: it is one of {', '.join(known)}")
    kind, options = known[solver.OPTIMIZER]
    kinds = [FULL_MODEL, *(each.value for each in GradientClipType)]
    if clip.ENABLED and clip.CLIP_TYPE not in kinds:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE}: it is one of {', '.join(kinds)}")
    whole = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
    kind = global_clip(kind, clip.CLIP_VALUE) if whole else maybe_add_gradient_clipping(cfg, kind)
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return kind(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)  # type: ignore[call-arg]


class NoiseToBoxTrainer(DefaultTrainer):
    """DefaultTrainer with `build_optimizer`, an `EmaHook` if MODEL_EMA.ENABLED, and a COCOEvaluator."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        # The fast implementation needs detectron2 compiled.
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")), use_fast_impl=False)

    def build_hooks(self) -> list[HookBase]:
        ema = self.cfg.MODEL_EMA
        own = [EmaHook(self.model, ema.DECAY, self.cfg.OUTPUT_DIR)] if ema.ENABLED else []
        return [*super().build_hooks(), *own]
