"""A small FLIP on the embedded emoji: minutes on two CPU cores; the test images are another vendor's drawings."""

from configs import common


def get_config(arg=None):
    config = common.get_config("b")
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.mask_ratio = 64, 4, 0.75
    image.width, image.depth, image.heads = 128, 4, 2
    text.width, text.depth, text.heads = 128, 2, 2
    text.vocab_size, text.context_length = 4000, 16
    text.pool, text.mask_padding = "mean", True
    config.model.embed_dim = 128
    config.model.dtype = "float32"  # CPUs are slow at bf16
    config.model.unroll = True
    config.data.train = "tfds:emoji/train"
    config.eval.tasks = ("zeroshot/emoji",)
    config.global_batch_size = 128
    config.total_samples = 600 * 128
    config.warmup_samples = 60 * 128
    config.optim.name = "muon"
    config.optim.base_learning_rate = 2e-3
    config.eval.every_steps = 200
    config.checkpoint.every_steps = 200
    config.log.every_steps = 10
    return common.with_arg(config, arg, variants=common.LOCAL)
