"""Contrastive fine-tuning of a trained or converted model (`init_from`) on your own pairs, which sees whole images.

Rate, decay, batch and warm-up are those of "Finetune like you pretrain", arXiv 2212.00638 (its code: 1e-5, 0.1, 512
and 500 steps, on ImageNet for 10 epochs). Set `total_samples` to a few times the number of your pairs.
"""

from configs import common


def get_config(arg=None):
    config = common.get_config("b", 16, 0.0)
    config.init_model = True
    config.global_batch_size = 512
    config.total_samples = 10_000 * 512
    config.warmup_samples = 500 * 512
    config.optim.learning_rate = 1e-5
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.999
    config.data.crop_area = (0.9, 1.0)  # as CLIP's own training
    return common.with_arg(config, arg, variants=common.LOCAL)
