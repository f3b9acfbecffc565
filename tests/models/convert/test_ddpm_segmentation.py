import pytest
import torch
from torch import nn

from diffperception.segmentation import PixelEnsemble
from tests.helpers.pixel_classifiers import Classifier, random_maps, write_classifier


@pytest.mark.parametrize("widths", [(5, 128, 32), (34, 256, 128)])
def test_the_members_of_the_files_give_the_logits(tmp_path, widths):
    torch.manual_seed(0)
    members = [Classifier(25, *widths).eval() for _ in range(3)]
    files = [write_classifier(tmp_path / f"model_{i}.pth", member) for i, member in enumerate(members)]
    ensemble = PixelEnsemble.from_reference(files)
    maps = random_maps(11, 20)
    rows = maps.dense().flatten(1).T
    expected = torch.stack([member(rows) for member in members]).detach()
    torch.testing.assert_close(ensemble.logits(maps).flatten(2).mT, expected, rtol=1e-5, atol=1e-5)


def test_files_that_are_no_classifiers_are_refused(tmp_path):
    file = write_classifier(tmp_path / "model_0.pth", Classifier())
    with pytest.raises(
        ValueError, match=r"model_1.pth does not fit the first .* layers.0.weight is \(128, 24\) instead"
    ):
        PixelEnsemble.from_reference([file, write_classifier(tmp_path / "model_1.pth", Classifier(24))])
    with pytest.raises(ValueError, match="5 classes and a first layer 256 wide; the reference makes it 128"):
        PixelEnsemble.from_reference([write_classifier(tmp_path / "wide.pth", Classifier(first=256))])
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        PixelEnsemble.from_reference([tmp_path / "none.pth"])
    with pytest.raises(ValueError, match="at least one member"):
        PixelEnsemble.from_reference([])
    torch.save({"state": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        PixelEnsemble.from_reference([tmp_path / "other.pth"])
    state = nn.DataParallel(Classifier()).state_dict()
    del state["module.layers.3.bias"]
    torch.save({"model_state_dict": state}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"lacks layers\.3\.bias"):
        PixelEnsemble.from_reference([tmp_path / "short.pth"])


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model_state_dict": Classifier()}, tmp_path / "code.pth")  # a pickled object
    with pytest.raises(ValueError, match="could run code"):
        PixelEnsemble.from_reference([tmp_path / "code.pth"])
    (tmp_path / "cut.pth").write_bytes((tmp_path / "code.pth").read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged"):
        PixelEnsemble.from_reference([tmp_path / "cut.pth"])
