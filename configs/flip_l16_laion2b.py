"""FLIP L/16 on LAION-2B, twice as long at half the rate."""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.laion2b(common.get_config("l")), arg)
