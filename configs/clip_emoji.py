"""CLIP on the embedded emoji: flip_emoji without masking."""

from configs import common, flip_emoji


def get_config(arg=None):
    config = flip_emoji.get_config()
    config.model.image.mask_ratio = 0.0
    return common.with_arg(config, arg)
