# What a frozen generator sees in an image; a configuration adds the decode head. DiffusionSegmentor tells the head its
# in_channels, whatever the generator, the blocks and the timesteps are.
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[127.5, 127.5, 127.5],  # a generator's pixels are -1..1 ...
    std=[127.5, 127.5, 127.5],
    bgr_to_rgb=True,  # ... and RGB; LoadImageFromFile gives BGR
    size=(40, 40),  # crops are padded to it in training: crop_size
    pad_val=0,
    seg_pad_val=255,
)
model = dict(
    type="DiffusionSegmentor",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="DiffusionBackbone",
        generator="runs/scenes_ddpm/model.safetensors",  # configs/generation/shapes_scenes.yaml
        blocks=[4, 2, 0],  # of strides 1, 2 and 4: heads want the finest first
        timesteps=[50],
        save_frozen=False,  # checkpoints without the generator, which is read from its file
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
