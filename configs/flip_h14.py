"""FLIP H/14: the paper's pre-training with half of the patches masked; `:unmasked` is its unmasked tuning."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("h", patch_size=14), arg)
