"""FLIP B/16 on DataComp's medium scale: 128 million samples, of each of which it sees as many patches as B/32 has, 49.

To beat, with about the same compute: 29.7 % zero-shot on ImageNet by B/32 with the best 30 % by CLIP score among images
like ImageNet's; 27.3 by CLIP score alone, 17.6 without a filter. Source: DataComp, arXiv 2304.14108, table 3.
Hours at 40 % MFU: 3.0 on one H100, 1.2 on eight A100, 1.9 on a v5e-8. Not run here.

DataComp trains B/32 at this scale, without masks. All but patches, masks and length is as in datacomp_small_b32.py.
"""

from configs import common, datacomp_small_b32


def get_config(arg=None):
    config = datacomp_small_b32.datacomp(128_000_000, 16, 0.75)
    return common.with_arg(config, arg, variants=common.LOCAL)
