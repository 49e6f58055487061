"""Fine-tuning of L/16 (`init_from`) on ImageNet-1K as MAE does it: 50 epochs, 5 of them warm-up, at a batch of 1024.

MAE, arXiv 2111.06377, table 9; its RandAugment and drop path are not here.
"""

from configs import common


def get_config(arg=None):
    config = common.get_config("l", 16, 0.0)
    config.data.train = "tfds:imagenet2012/train"
    config.data.crop_area = (0.08, 1.0)
    config.global_batch_size = 1024
    config.total_samples = 50 * 1_281_167
    config.warmup_samples = 5 * 1_281_167
    config.optim.base_learning_rate = 1e-3
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 0.75
    config.finetune.classes = 1000
    config.eval.tasks = ("classify/imagenet",)
    config.eval.every_steps = 6255  # 5 epochs
    return common.with_arg(config, arg, variants=common.LOCAL)
