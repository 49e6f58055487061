"""OpenVision B/16: images of 160, then 224, then 384 px.

OpenVision, arXiv 2505.04601: 72.4, 73.9 and 74.5 % zero-shot on ImageNet after each stage, from Recap-DataComp-1B.
Lengths (10,000, 800 and 200 times ImageNet-1K), batches, rates, warm-ups, crops and towers are those of its published
recipe (github.com/UCSC-VLAA/OpenVision, src/configs/openvision.py and scripts/project/openvision/train.sh), and the
sizes those of its released B/16 models; its L/14 begins at 84 px.

Not here: its captioning loss (weight 2, next to the contrastive loss of weight 1), its second, synthetic caption per
image and its colour jitter, so those accuracies are not this recipe's. Not run here.
"""

from configs import common

EPOCH = 1_281_167  # samples; lengths are in epochs of ImageNet-1K, and a stage has whole steps


def get_config(arg=None):
    config = common.get_config("b", mask_ratio=0.0)
    text = config.model.text
    text.vocab_size, text.context_length, text.pool = 32_000, 80, "last"
    config.data.crop_area = (0.4, 1.0)
    config.global_batch_size = 32_768
    config.optim.base_learning_rate = 8e-6
    config.optim.mu_dtype = "bfloat16"
    config.warmup_samples = 40 * EPOCH
    first, second, third = (
        epochs * EPOCH // batch * batch for epochs, batch in ((10_000, 32_768), (800, 16_384), (200, 8_192))
    )
    config.stages = (
        f"{first}:model.image.image_size=160;"
        f"{second}:global_batch_size=16384,optim.base_learning_rate=4e-7,warmup_samples={20 * EPOCH},optim.state=fresh;"
        f"{third}:model.image.image_size=384,global_batch_size=8192,optim.base_learning_rate=1e-7,warmup_samples=0,"
        "optim.state=fresh"
    )
    return common.with_arg(config, arg, variants=common.LOCAL)
