"""FLIP B/16: the paper's pre-training with half of the patches masked; `:unmasked` is its unmasked tuning.

`:clip_layout` trains the same on the layout of OpenAI's CLIP, which transformers can express (docs/hub.md).
"""

from configs import common


def get_config(arg=None):
    return common.with_arg(common.get_config("b"), arg, (*common.VARIANTS, "clip_layout"))
