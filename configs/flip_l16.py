"""FLIP L/16: the paper's pre-training with half of the patches masked; `:tuned` adds its unmasked tuning."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("l"), arg)
