# Pictures in one folder and their masks, of the same names, in another: a class number per pixel, 255 where nothing is
# said. The folders are of `diffperception shapes --output data/scenes --min-side 40 --max-side 40 --max-objects 3
# --min-size 18`. For yours, change data_root, the prefixes, the suffixes, the metainfo and, in the head, num_classes.
data_root = "data/scenes"
metainfo = dict(
    classes=["background", "ellipse", "rectangle", "triangle", "star", "cross", "ring"],
    palette=[[0, 0, 0], [230, 60, 60], [60, 160, 60], [60, 90, 220], [220, 190, 40], [160, 60, 190], [60, 190, 200]],
)
crop_size = (40, 40)
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=metainfo,
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="train", seg_map_path="masks/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**dataset, data_prefix=dict(img_path="val", seg_map_path="masks/val"), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
