# UPerHead on a generator that is fine-tuned with it; pictures larger than a window are predicted window by window.
_base_ = ["_base_/frozen.py", "_base_/folder.py", "_base_/schedule_finetuned.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiffusionPyramid",
        generator="runs/scenes_ddpm/model.safetensors",
        blocks=[4, 2, 0],
        timestep=50,
    ),
    decode_head=dict(
        type="UPerHead",
        in_index="all",
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
    test_cfg=dict(mode="slide", crop_size=(40, 40), stride=(24, 24)),
)
