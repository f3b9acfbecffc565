import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.diffusion import linear_schedule
from diffperception.models import DiffusionModel, FeatureInfo
from diffperception.segmentation import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures
from diffperception.segmentation.maps import Windows, rows_around, upsample, upsample_rows
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import diffusion, generator, random_maps
from tests.parity import filled_state

SCHEDULE = linear_schedule(1000)


def flow(side: int = 32) -> DiffusionModel:
    return generator(side=side, schedule="flow", prediction="flow")


TIMM = {
    "resnet18": lambda: TimmFeatures("resnet18", (4, 8), window=32),
    "test_vit": lambda: TimmFeatures("test_vit", (16,), window=32),
}


# Maps


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (1, 9), (33, 5)])
def test_values_at_points_are_those_of_the_dense_map(size):
    maps = random_maps(*size)
    every = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))
    dense = maps.dense()
    assert dense.shape == (25, *size)
    torch.testing.assert_close(maps.at_points(every), dense.flatten(1).T, rtol=0, atol=1e-6)


def test_a_point_outside_is_refused():
    with pytest.raises(ValueError, match="rows 0 to 15 and columns 0 to 8"):
        random_maps(16, 9).at_points(torch.tensor([[3, 9]]))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_bands_of_the_upsampled_map_join_without_a_seam(stride):
    cells = torch.randn(1, 3, 48 // stride, 5)
    bands = [
        upsample_rows(cells[:, :, rows_around(a, b, stride)], stride, a, b) for a, b in ((0, 8), (8, 32), (32, 48))
    ]
    assert torch.equal(torch.cat(bands, 2), upsample(cells, stride))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 32), (64, 136), (24, 80)])
def test_windows_cover_the_image_and_blend_to_what_they_agree_on(height, width):
    windows = Windows(height, width, 32, 8)
    image = torch.randn(2, height, width)
    parts = [[image[:, rows, columns], image[:, rows, columns][:, ::4, ::4]] for rows, columns in windows.places]
    fine, coarse = windows.blend(parts, [1, 4])
    torch.testing.assert_close(fine, image)
    torch.testing.assert_close(coarse, image[:, ::4, ::4])
    assert all(rows.stop - rows.start == min(32, height) for rows, _ in windows.places)


def test_blending_passes_evenly_from_one_window_to_the_next():
    windows = Windows(8, 56, 32, 8)
    ones, twos = torch.ones(1, 8, 32), 2 * torch.ones(1, 8, 32)
    (blended,) = windows.blend([[ones], [twos]], [1])
    expected = torch.cat([torch.ones(24), 1 + (torch.arange(8) + 0.5) / 8, 2 * torch.ones(24)])
    torch.testing.assert_close(blended[0, 3], expected)


# Extractors


@pytest.mark.parametrize("size", [(32, 32), (30, 17), (3, 5), (61, 40)])
@pytest.mark.parametrize("make", [diffusion, RGBFeatures, *TIMM.values()], ids=["diffusion", "RGB", *TIMM])
def test_maps_are_of_the_declared_channels_and_sizes_for_any_image(make, size):
    features = make()
    maps = features.maps(torch.rand(3, *size))
    assert [m.shape[0] for m in maps.maps] == [info.channels for info in features.info]
    assert [tuple(m.shape[1:]) for m in maps.maps] == features.map_sizes(*size)
    assert maps.dense().shape == (features.channels, *size)
    assert all(m.dtype == torch.float32 for m in maps.maps)


def test_a_pass_a_timestep_with_the_noise_of_the_file():
    features, image = diffusion(), torch.rand(3, 32, 32)
    maps = features.maps(image).maps
    for i, t in enumerate((50, 250)):
        x = SCHEDULE.alpha(t).float() * (2 * image - 1) + SCHEDULE.sigma(t).float() * features.reader.noise
        expected = features.generator.activations(x[None], torch.tensor([t]), (0, 3, 4))
        for ours, theirs in zip(maps[3 * i : 3 * i + 3], expected, strict=True):
            torch.testing.assert_close(ours, theirs[0])
    assert [info.name for info in features.info][2:4] == ["t50 block 4", "t250 block 0"]


class MeansOfWindows(FeatureExtractor):
    """The mean colours of a window in all its cells, and how many windows came at once."""

    def __init__(self, window: int) -> None:
        super().__init__([FeatureInfo("mean", 3, 4)], 4, window)
        self.batches: list[int] = []

    def encode(self, images: Tensor) -> list[Tensor]:
        self.batches.append(len(images))
        cells = (images.shape[2] // 4, images.shape[3] // 4)
        return [images.mean((2, 3), keepdim=True).expand(-1, -1, *cells)]


@pytest.mark.parametrize(("window", "batches"), [(16, [8, 8, 4]), (128, [4, 2]), (256, [1, 1])])
def test_small_windows_are_encoded_together(window, batches):
    """Each batch holds 2^16 pixels or a window at most; each window keeps its place."""
    step = window - window // 4
    columns = sum(batches) // 2
    image = torch.rand(3, window + step - 3, window + (columns - 1) * step)
    features = MeansOfWindows(window)
    maps = features.maps(image)
    assert features.batches == batches
    padded = F.pad(image[None], (0, 0, 0, 3), mode="replicate")[0]
    for row in range(2):
        for column in range(columns):
            top, left = row * step, column * step
            expected = padded[:, top : top + window, left : left + window].mean((1, 2))
            middle = maps.maps[0][:, (top + window // 2) // 4, (left + window // 2) // 4]
            torch.testing.assert_close(middle, expected)


def test_windows_of_a_unet_do_not_look_at_one_another():
    features, image = diffusion(), torch.rand(3, 56, 56)
    together = features.maps(image)
    parts = [[m[0] for m in features.encode(image[None, :, y : y + 32, x : x + 32])] for y in (0, 24) for x in (0, 24)]
    alone = Windows(56, 56, 32, 8).blend(parts, features.strides)
    for a, b in zip(together.maps, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stride", "mean", "std"),
    [("resnet18", 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("test_vit", 16, (0.5,) * 3, (0.5,) * 3)],
)
def test_timm_models_get_images_normalised_as_in_their_training(name, stride, mean, std):
    features, image = TimmFeatures(name, (stride,)), torch.rand(1, 3, 32, 48)
    normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(features.maps(image[0]).maps[0], features.backbone(normalised)[0][0])
    assert not torch.allclose(features.backbone(image)[0], features.backbone(normalised)[0], atol=1e-3)


def test_of_a_transformers_maps_the_last_is_taken():
    body = TimmFeatures("test_vit", (16,)).backbone.body
    assert len(body.model.blocks) == len(timm.create_model("test_vit").blocks) == body.out_indices[0] + 1 > 1


def test_a_timm_model_of_one_image_size_is_refused():
    with pytest.raises(ValueError, match=r"mixer_s32_224 does not take images of any size \(.*224.*\): choose a"):
        TimmFeatures("mixer_s32_224", (32,))


def test_one_timestep_alone_is_the_same():
    features, image = diffusion(seed=3), torch.rand(3, 30, 45)
    torch.testing.assert_close(features.at_timestep(1).maps(image).maps, features.maps(image).maps[3:])


def test_the_noise_depends_on_the_seed_alone():
    first, second, other = diffusion(), diffusion(), diffusion(seed=1)
    assert torch.equal(first.reader.noise, second.reader.noise)
    assert not torch.equal(first.reader.noise, other.reader.noise)
    assert first.reader.noise.shape == (3, 32, 32)


def test_an_image_moved_by_a_step_of_windows_has_its_features_moved():
    features, image = diffusion(), torch.rand(3, 32, 32 + 3 * 24)  # windows begin every 24 pixels
    moved = torch.cat([torch.rand(3, 32, 24), image[:, :, :-24]], 2)
    before, after = features.maps(image), features.maps(moved)
    for a, b, stride in zip(before.maps, after.maps, before.strides, strict=True):
        kept = slice(24 // stride, (32 + 2 * 24) // stride - 8 // stride)  # windows that both have, whole
        torch.testing.assert_close(
            b[:, :, kept.start + 24 // stride : kept.stop + 24 // stride], a[:, :, kept], rtol=1e-5, atol=1e-5
        )


def test_an_image_smaller_than_a_window_is_taken_as_it_is():
    features, image = diffusion(window=64), torch.rand(3, 32, 48)
    noisy = [a * (2 * image - 1) + s * features.reader.noise[:, :32, :48] for a, s, _ in features.reader.levels]
    expected = features.generator.activations(noisy[0][None], torch.tensor([50.0]), (0, 3, 4))
    torch.testing.assert_close(features.maps(image).maps[:3], [m[0] for m in expected])


def test_features_of_a_reference_checkpoint():
    features = DiffusionFeatures(
        DiffusionModel.from_reference(filled_state("adm_small"), 64, num_head_channels=16), (0, 1), (100,)
    )
    maps = features.maps(torch.rand(3, 40, 24))
    assert all(torch.isfinite(m).all() for m in maps.maps)


def test_continuous_paths_have_times_below_one():
    assert DiffusionFeatures(flow(), (0,), (0.25,)).reader.levels == [(0.75, 0.25, 250.0)]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((50, 0.5, 150), r"\[50, 150\] lie outside .* from 0 to 1"),
        ((-0.1,), r"\[-0.1\] lie outside"),
        ((float("nan"),), r"\[nan\] lie outside"),
        ((0.25, 0.2500000001), "each timestep once, to six digits"),
    ],
)
def test_times_outside_of_a_continuous_path_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        DiffusionFeatures(flow(), (0,), times)


def test_a_continuous_path_has_both_its_ends():
    features = DiffusionFeatures(flow(), (0,), (0, 1))
    assert [level[:2] for level in features.reader.levels] == [(1, 0), (0, 1)]


def test_classes_need_a_label_and_it_counts():
    model = DiffusionModel(list("abcd"), tiny_unet(), image_size=32)
    with pytest.raises(ValueError, match="images without a label: give one"):
        DiffusionFeatures(model, (0,), (50,))
    image = torch.rand(3, 32, 32)
    one, other = (DiffusionFeatures(model, (4,), (50,), label=k).maps(image) for k in (0, 3))
    assert not torch.allclose(one.maps[0], other.maps[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (2, 6)}, r"no decoder blocks \[6\]; it has stride 4: 0;"),
        ({"blocks": ()}, r"no decoder blocks \[\]"),
        ({"timesteps": (50, 1000)}, r"\[1000\] lie outside .* whole, 0 to 999"),
        ({"timesteps": (0.5,)}, r"\[0.5\] lie outside .* whole, 0 to 999"),
        ({"timesteps": ()}, "at least one timestep"),
        ({"blocks": (0, 3, 0)}, r"each timestep once, .* not \[0, 3, 0\] and"),
        ({"timesteps": (50, 250, 50.0)}, r"each timestep once, .* and \[50, 250, 50.0\]"),
        ({"window": 30}, "multiple of 4"),
        ({"label": 1}, "leave labels out"),
    ],
)
def test_what_does_not_exist_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        diffusion(**change)


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="height, width"):
        RGBFeatures().maps(torch.rand(4, 8, 8))


def test_rgb_features_are_the_colours():
    image: Tensor = torch.rand(3, 5, 7)
    torch.testing.assert_close(RGBFeatures().maps(image).dense(), 2 * image - 1)
