"""CLIP L/14, the paper's baseline: FLIP's recipe without masking."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("l", patch_size=14, mask_ratio=0.0), arg)
