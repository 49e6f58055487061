"""CLIP L/16, the paper's baseline: FLIP's recipe without masking."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("l", mask_ratio=0.0), arg)
