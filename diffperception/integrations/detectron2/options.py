"""The options of our parts in detectron2's yacs configurations."""

from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Add the options of `NoiseToBox`, of the diffusion UNet as a backbone and of `NoiseToBoxTrainer`.

    The detector takes INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST for its own; TEST.DETECTIONS_PER_IMAGE is not read.
    """
    cfg.MODEL.NOISE_TO_BOX = CfgNode(
        {
            "FILE": "",  # a detector that diffperception wrote; then only SEED and SCORE_THRESH_TEST are read
            "NUM_CLASSES": 0,  # 0: those of the data set
            "TIMM": "",  # a timm model as the backbone, such as resnet50; else it is the one of MODEL.BACKBONE
            "PRETRAINED": False,  # start from timm's weights, which needs the network once
            "STRIDES": [4, 8, 16, 32],  # of the timm model's maps
            "FREEZE_NORM": False,  # the timm model's batch norm keeps its statistics
            "IN_FEATURES": [],  # maps of MODEL.BACKBONE by name, finest first; empty: all but those of a top block
            "FPN_NORM": False,  # batch norm in the FPN, where one is built: helps training from scratch
            "NUM_BOXES": 300,  # in training, and in prediction unless NUM_BOXES_TEST says another number
            "STAGES": 6,  # of the head
            "WIDTH": 0,  # of the head; 0: that of the backbone's pyramid, or 256
            "SIGNAL_SCALE": 2.0,  # size of the signal beside the unit noise
            "NUM_BOXES_TEST": 0,  # 0: as in training
            "STEPS": 1,  # from noise to boxes
            "NMS_THRESH_TEST": 0.5,
            "SCORE_THRESH_TEST": 0.0,  # boxes below it are left out: 0 for AP, about 0.5 for pictures
            "SEED": 0,  # of the noise, together with the image's id
        }
    )
    cfg.MODEL.DIFFUSION_UNET = CfgNode(
        {
            "FILE": "",  # of a generator or a UNet, or a folder of diffusers
            "BLOCKS": [],  # blocks to read, or modules by name: one per stride, each stride twice the next
            "TIMESTEP": None,  # the noise level that images are brought to, from 0.0 to 1.0 for flow matching; None: 50
            "FROZEN": True,
            "LABEL": None,  # the class that a UNet with classes is told
            "PROMPT": None,  # what a network that attends to words is told
        }
    )
    cfg.MODEL_EMA = CfgNode({"ENABLED": False, "DECAY": 0.999})
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or SGD
