"""FLIP L/14: as L/16 with patches of 14 pixels; `:unmasked` is the paper's tuning from the weights of flip_l16."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("l", patch_size=14), arg)
