"""Learning-rate schedule, optimizer, and the weight-decay mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flip_jax.config import Config

NOT_DECAYED = ("bias", "patch_bias", "logit_bias", "scale", "pos_embed")


def peak_learning_rate(config: Config) -> float:
    """Returns the absolute rate if one is set, else applies the linear scaling rule to the base rate of 256 samples."""
    return config.optim.learning_rate or config.optim.base_learning_rate * config.global_batch_size / 256


def describe_peak(config: Config) -> str:
    """Says how the peak learning rate came about."""
    peak, base, batch = peak_learning_rate(config), config.optim.base_learning_rate, config.global_batch_size
    if config.optim.learning_rate:
        return f"peak learning rate {peak:.4g} = optim.learning_rate, in place of base {base:.4g} x batch / 256"
    return f"peak learning rate {peak:.4g} = base {base:.4g} x batch {batch:,} / 256"


def warmup_cosine(peak: float, warmup_steps: float, total_steps: float) -> optax.Schedule:
    """Rises linearly from 0 to `peak` over `warmup_steps`, then falls by half a cosine to 0 at `total_steps`.

    The update of step s uses the value at s, so the first one is 0 (official). Steps may be fractions.
    """

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
        cosine = peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, peak * step / max(warmup_steps, 1), cosine)

    return schedule


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the run's learning rate as a function of the optimizer step."""
    batch, peak = config.global_batch_size, peak_learning_rate(config)
    warmup, total = config.warmup_samples / batch, config.total_samples / batch
    if config.optim.schedule == "constant":
        from flip_jax import optimizers  # only runs with it need it

        return optimizers.warmup_constant(peak, warmup, config.optim.cooldown_samples / batch, total)
    return warmup_cosine(peak, warmup, total)


def decay_mask(params: Any) -> Any:
    """Marks the parameters that decay: not biases, norms and position tables; cls and logit_scale decay (official)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Builds the optimizer, the paper's "adamw" or another; decay is decoupled and multiplied by the learning rate."""
    optim = config.optim
    parts = (
        optax.scale_by_adam(optim.b1, optim.b2, 1e-8, mu_dtype=optim.mu_dtype),
        optax.add_decayed_weights(optim.weight_decay, decay_mask),
    )
    if optim.name != "adamw":
        from flip_jax import optimizers  # only runs with another optimizer need it

        parts = optimizers.UPDATES[optim.name](*parts)
    if optim.clip_norm:
        parts = (optax.clip_by_global_norm(optim.clip_norm), *parts)
    optimizer = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate(config)))
    if (optim.image_rate, optim.text_rate, optim.layer_decay) == (1, 1, 1):
        return optimizer
    from flip_jax import optimizers  # only runs with several rates need it

    return optimizers.by_share(optimizer, optim)


def split(params: dict[str, Any], config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates the parameters that train from those of a tower whose rate is 0."""
    rates = {"image": config.optim.image_rate, "text": config.optim.text_rate}
    frozen = {name: part for name, part in params.items() if rates.get(name) == 0}
    return {name: part for name, part in params.items() if name not in frozen}, frozen
