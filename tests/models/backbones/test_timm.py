"""timm models as backbones: what is done quicker gives what timm gives."""

import copy

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torchvision.ops.misc import FrozenBatchNorm2d

from diffperception.models.backbones.timm import TimmBackbone
from diffperception.models.ops.convolution import FoldedNorm2d


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])  # blocks of two convolutions, and of three
def test_frozen_norms_of_a_resnet_are_done_by_its_convolutions(name: str) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, [8, 16], freeze_norm=True)
    for norm in backbone.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for values in norm.buffers():
                values.uniform_(0.5, 1.5)
    network = timm.create_model(name, features_only=True, out_indices=[2, 3])
    plain = freeze_batch_norm_2d(network)
    plain.load_state_dict(backbone.body.state_dict())
    images = torch.randn(2, 3, 64, 64)
    copied, found = copy.deepcopy(backbone)(images), [plain(images), backbone(images)]
    for one, other, third in zip(*found, copied, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max()))
        assert other.equal(third)
    gradients = [
        torch.autograd.grad(sum(m.square().mean() for m in maps), model.parameters())
        for maps, model in zip(found, (plain, backbone), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    folded = [module for module in backbone.modules() if isinstance(module, FoldedNorm2d)]
    assert len(folded) == sum(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()) > 8
