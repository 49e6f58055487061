"""FLIP B/16: the paper's pre-training with half of the patches masked; `:unmasked` is its unmasked tuning.

`:clip_layout` trains the same on the layout of OpenAI's CLIP, which transformers can express (docs/hub.md).
"""

from configs import common


def clip_layout(config):
    """Sets the layout of OpenAI's CLIP; its text tower needs CLIP's byte pairs as data.vocab, which end each text."""
    image, text = config.model.image, config.model.text
    image.pool, image.patch_bias, image.positions, image.pre_norm = "cls", False, "learned", True
    image.pixel_stats = "openai"
    text.pool, text.causal, text.vocab_size, text.context_length = "last", True, 49_408, 77


def get_config(arg=None):
    return common.with_arg(common.get_config("b"), arg, common.VARIANTS | {"clip_layout": clip_layout})
