"""CLIPA L/16 (I37, T8): images of 96 px and 8 tokens, then whole ones: 224 px and 32 tokens.

CLIPA, arXiv 2305.07017: 69.3 % zero-shot on ImageNet, from LAION-400M. Image size, tokens and crops are those of the
published PyTorch scripts for this model (github.com/UCSC-VLAA/CLIPA, clipa_torch/scripts/exp/gpu/vit_l16/i37_t8_*.sh),
which use a batch of 4,096 and 896. Batch, rates, warm-ups and the tuning's length are those of the JAX recipes
(clipa_jax/configs/model_b and model_l), and the length of pre-training, 2,000 times ImageNet-1K, is the paper's.
CLIPA-v2, arXiv 2306.15658, uses 84 px with patches of 14 and 12.8 billion samples.

Not here: the scripts' colour jitter, and positions that are learned from the tuning on. Towers and pooling are FLIP's,
so that accuracy is not this recipe's. Not run here.
"""

from configs import common

BATCH = 32_768
PRETRAINING = 2_000 * 1_281_167 // BATCH * BATCH  # samples; a stage has whole steps


def get_config(arg=None):
    config = common.get_config("l", mask_ratio=0.0)
    config.data.crop_area = (0.4, 1.0)
    config.global_batch_size = BATCH
    config.optim.base_learning_rate = 8e-6
    config.warmup_samples = 1_600 * BATCH
    config.model.text.mask = "truncate"
    config.stages = (
        f"{PRETRAINING}:model.image.image_size=96,model.text.mask_ratio=0.75;"
        f"{4_000 * BATCH}:optim.base_learning_rate=8e-7,warmup_samples={800 * BATCH},optim.state=fresh"
    )
    return common.with_arg(config, arg, variants=common.LOCAL)
