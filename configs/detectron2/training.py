"""What the LazyConfig files of this folder share: data, optimiser, schedule; for detectron2's lazyconfig_train_net.py.

For your own data, register it in the catalogues before the configuration is read, for example in a copy of that tool:

    register_coco_instances("my_train", {}, "my/train.json", "my/images")

and name it, here or on the command line: dataloader.train.dataset.names=my_train dataloader.test.dataset.names=my_val,
and the model's classes.
"""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from diffperception.integrations.detectron2 import global_clip

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
dataloader.evaluator.use_fast_impl = False  # the fast one needs detectron2 compiled
dataloader.evaluator.output_dir = "${train.output_dir}"

# AdamW, the whole gradient clipped. The learning rate is for total_batch_size = 16: change both together.
optimizer = L(L(global_clip)(optimizer_class=torch.optim.AdamW, norm=1.0))(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=2.5e-5,
    weight_decay=1e-4,
)

train = model_zoo.get_config("common/train.py").train
train.output_dir = "output"
train.max_iter = 450000
train.eval_period = 10000

# Fractions of train.max_iter: two drops, at 7/9 and 14/15 of the training, after a short warm-up.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[350000, 420000], num_updates=450000),
    warmup_length=1000 / 450000,
    warmup_method="linear",
    warmup_factor=0.01,
)
