"""Checkpoints of the reference DiffusionDet (detectron2's names) under our names."""

import re

from torch import Tensor

# (pattern, replacement) from the reference's names to ours, tried in order.
_HEAD = [
    (r"^head\.time_mlp\.1\.", "head.time_embedding.0."),
    (r"^head\.time_mlp\.3\.", "head.time_embedding.2."),
    (r"^head\.head_series\.(\d+)\.self_attn\.", r"head.stages.\1.attention."),
    (r"^head\.head_series\.(\d+)\.norm1\.", r"head.stages.\1.attention_norm."),
    (r"^head\.head_series\.(\d+)\.norm2\.", r"head.stages.\1.interaction_norm."),
    (r"^head\.head_series\.(\d+)\.norm3\.", r"head.stages.\1.ffn_norm."),
    (r"^head\.head_series\.(\d+)\.inst_interact\.dynamic_layer\.", r"head.stages.\1.interaction.generate."),
    (r"^head\.head_series\.(\d+)\.inst_interact\.norm3\.", r"head.stages.\1.interaction.out_norm."),
    (r"^head\.head_series\.(\d+)\.inst_interact\.out_layer\.", r"head.stages.\1.interaction.out."),
    (r"^head\.head_series\.(\d+)\.inst_interact\.", r"head.stages.\1.interaction."),
    (r"^head\.head_series\.(\d+)\.linear1\.", r"head.stages.\1.ffn.0."),
    (r"^head\.head_series\.(\d+)\.linear2\.", r"head.stages.\1.ffn.2."),
    (r"^head\.head_series\.(\d+)\.block_time_mlp\.", r"head.stages.\1.time_modulation."),
    (r"^head\.head_series\.(\d+)\.cls_module\.", r"head.stages.\1.class_tower."),
    (r"^head\.head_series\.(\d+)\.reg_module\.", r"head.stages.\1.box_tower."),
    (r"^head\.head_series\.(\d+)\.class_logits\.", r"head.stages.\1.class_logits."),
    (r"^head\.head_series\.(\d+)\.bboxes_delta\.", r"head.stages.\1.box_deltas."),
]
_RESNET = [
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.backbone.body.bn1."),
    (r"^backbone\.bottom_up\.stem\.conv1\.", "backbone.backbone.body.conv1."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.", r"backbone.backbone.body.layer\1.\2.downsample.1."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.", r"backbone.backbone.body.layer\1.\2.downsample.0."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", r"backbone.backbone.body.layer\1.\2.bn\3."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.", r"backbone.backbone.body.layer\1.\2.conv\3."),
]


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names; diffusion tables are left out, as the schedule brings them."""
    return {_ours(name): value for name, value in state.items() if name.startswith(("head.", "backbone."))}


def _ours(name: str) -> str:
    fpn = re.match(r"^backbone\.fpn_(lateral|output)(\d)\.(weight|bias)$", name)
    if fpn:
        block = {"lateral": "inner", "output": "layer"}[fpn[1]]
        return f"backbone.fpn.{block}_blocks.{int(fpn[2]) - 2}.0.{fpn[3]}"
    for pattern, replacement in _HEAD + _RESNET:
        new, count = re.subn(pattern, replacement, name)
        if count:
            # detectron2 counts ResNet's stages from 2, timm from 1.
            return re.sub(r"body\.layer(\d)", lambda m: f"body.layer{int(m[1]) - 1}", new)
    return name
