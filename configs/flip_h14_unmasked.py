"""Unmasked tuning of FLIP H/14: set init_from to the pre-training's workdir."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.unmasked(common.get_config("h", patch_size=14)), arg)
