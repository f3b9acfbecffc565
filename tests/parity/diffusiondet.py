"""Names and shapes of the reference DiffusionDet in any size."""

Shapes = dict[str, tuple[int, ...]]

RESNET50, RESNET101 = (3, 4, 6, 3), (3, 4, 23, 3)
SWIN_TINY = {"channels": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
SWIN_SMALL = {"channels": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
SWIN_BASE = {"channels": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
SMALL_HEAD = {"stages": 2, "width": 32, "pool": 2, "dynamic": 4, "ffn": 16}


def resnet_shapes(blocks: tuple[int, ...], width: int = 256) -> Shapes:
    """A ResNet of bottlenecks under a pyramid of `width` channels."""
    convolutions = {"stem.conv1": (64, 3, 7, 7)}
    entering = 64
    for stage, count in enumerate(blocks):
        inner, leaving = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"res{stage + 2}.{block}"
            if block == 0:
                convolutions[f"{name}.shortcut"] = (leaving, entering, 1, 1)
            convolutions[f"{name}.conv1"] = (inner, entering, 1, 1)
            convolutions[f"{name}.conv2"] = (inner, inner, 3, 3)
            convolutions[f"{name}.conv3"] = (leaving, inner, 1, 1)
            entering = leaving
    shapes: Shapes = {}
    for name, shape in convolutions.items():
        shapes[f"backbone.bottom_up.{name}.weight"] = shape
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.bottom_up.{name}.norm.{statistic}"] = shape[:1]
    return shapes | pyramid_shapes((256, 512, 1024, 2048), width)


def swin_shapes(
    channels: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int = 7, width: int = 256
) -> Shapes:
    """A Swin with a norm at each output, under a pyramid of `width` channels; without its index buffers."""
    layers = norm("patch_embed.norm", channels) | affine("patch_embed.proj", channels, 3, 4, 4)
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        wide = channels * 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            layers |= norm(f"{name}.norm1", wide) | norm(f"{name}.norm2", wide)
            layers |= affine(f"{name}.attn.qkv", 3 * wide, wide) | affine(f"{name}.attn.proj", wide, wide)
            layers |= affine(f"{name}.mlp.fc1", 4 * wide, wide) | affine(f"{name}.mlp.fc2", wide, 4 * wide)
            layers[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, count)
        layers |= norm(f"norm{stage}", wide)
        if stage < len(depths) - 1:
            layers |= norm(f"layers.{stage}.downsample.norm", 4 * wide)
            layers[f"layers.{stage}.downsample.reduction.weight"] = (2 * wide, 4 * wide)
    shapes = {f"backbone.bottom_up.{name}": shape for name, shape in layers.items()}
    return shapes | pyramid_shapes(tuple(channels * 2**stage for stage in range(len(depths))), width)


def pyramid_shapes(channels: tuple[int, ...], width: int) -> Shapes:
    shapes: Shapes = {}
    for level, entering in enumerate(channels, start=2):
        shapes |= affine(f"backbone.fpn_lateral{level}", width, entering, 1, 1)
        shapes |= affine(f"backbone.fpn_output{level}", width, width, 3, 3)
    return shapes


def head_shapes(
    classes: int = 80, stages: int = 6, width: int = 256, pool: int = 7, dynamic: int = 64, ffn: int = 2048
) -> Shapes:
    """The head, with three layers in the box tower."""
    shapes = affine("head.time_mlp.1", 4 * width, width) | affine("head.time_mlp.3", 4 * width, 4 * width)
    for stage in range(stages):
        layers: Shapes = {"self_attn.in_proj_weight": (3 * width, width), "self_attn.in_proj_bias": (3 * width,)}
        layers |= affine("self_attn.out_proj", width, width)
        layers |= affine("inst_interact.dynamic_layer", 2 * width * dynamic, width)
        layers |= affine("inst_interact.out_layer", width, width * pool**2)
        layers |= norm("inst_interact.norm1", dynamic)
        layers |= norm("inst_interact.norm2", width) | norm("inst_interact.norm3", width)
        layers |= affine("linear1", ffn, width) | affine("linear2", width, ffn)
        layers |= norm("norm1", width) | norm("norm2", width) | norm("norm3", width)
        layers |= affine("block_time_mlp.1", 2 * width, 4 * width)
        for tower, depth in (("cls_module", 1), ("reg_module", 3)):
            for layer in range(depth):
                layers[f"{tower}.{3 * layer}.weight"] = (width, width)
                layers |= norm(f"{tower}.{3 * layer + 1}", width)
        layers |= affine("class_logits", classes, width) | affine("bboxes_delta", 4, width)
        shapes |= {f"head.head_series.{stage}.{name}": shape for name, shape in layers.items()}
    return shapes


def affine(name: str, out: int, *others: int) -> Shapes:
    return {f"{name}.weight": (out, *others), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
