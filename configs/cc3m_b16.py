"""CLIPF B/16 on CC3M: 49 patches and the 6 rarest of 32 tokens, then an epoch of whole images and captions.

To beat: CLIPF's 18.2 % zero-shot on ImageNet with this recipe (14.4 before the last epoch), and the 18.6 of its CLIP
without masks, which needs four times the compute. FLIP with 49 patches has 14.2. Source: github.com/ml-liang/CLIPF and
arXiv 2412.16148.
Hours at 40 % MFU: 1.9 on one H100, 0.75 on eight A100, 1.2 on a v5e-8. Not run here.

All but data and masks is as in cc12m_b16.py. CLIPF does not say how many of CC3M's pairs it had; these are the hub's.
"""

from configs import cc12m_b16, common


def get_config(arg=None):
    config = cc12m_b16.clipf("cc3m-wds/cc3m-train-{0000..0575}", 2_905_954, 0.75, 0.8125)
    return common.with_arg(config, arg, variants=common.LOCAL)
