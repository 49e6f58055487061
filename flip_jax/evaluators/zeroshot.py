"""Zero-shot classification: which class's prompts is a picture nearest to?"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.data import pipeline
from flip_jax.inference import Encoder


def check(source: str, config: Config) -> None:
    """Raises ValueError where the source is not there or has no class names."""
    pipeline.class_names(source, config)


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str], batch_size: int) -> np.ndarray:
    """The normalised mean of each class's normalised prompt embeddings, f32 [classes, embed_dim]. Paper, section 4."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    # Full batches only, so that one shape is compiled.
    padded = prompts + [""] * (-len(prompts) % batch_size)
    embedded = [encoder.encode_text(padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
    means = np.concatenate(embedded)[: len(prompts)].reshape(len(names), len(templates), -1).mean(axis=1)
    return means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8)


def summary(top1: float, top5: float, classes: int) -> str:
    """The result as one line for people and scripts."""
    return f"zero-shot top-1 {top1:.2f} % top-5 {top5:.2f} % over {classes} classes"


@jax.jit
def _hits(image_BxE, label_B, real_B, class_CxE):
    """How many real rows have their class first, and among the first five."""
    cosine_BxC = jnp.einsum("be,ce->bc", image_BxE, class_CxE, precision="highest")
    own_Bx1 = jnp.take_along_axis(cosine_BxC, label_B[:, None], axis=1)
    earlier_BxC = jnp.arange(cosine_BxC.shape[1])[None] < label_B[:, None]
    # Ties go to the class that comes first, as with argmax.
    rank_B = jnp.sum((cosine_BxC > own_Bx1) | ((cosine_BxC == own_Bx1) & earlier_BxC), axis=1)
    return jnp.sum(real_B & (rank_B < 1)), jnp.sum(real_B & (rank_B < 5)), jnp.sum(real_B)


def run(encoder: Encoder, source: str, config: Config) -> Iterator[tuple[str, float]]:
    """Top-1 and top-5 accuracy in percent over all pictures of `source`, split over processes and devices."""
    names = pipeline.class_names(source, config)
    classes = class_embeddings(encoder, names, pipeline.templates(source, config), config.eval.batch_size)
    counts = np.zeros(3)
    for batch in pipeline.eval_dataset(source, config):
        label, real = sharding.to_devices(encoder.mesh, batch["label"], batch["mask"])
        counts += jax.device_get(_hits(encoder.encode_image(batch["image"]), label, real, classes))
    top1, top5 = (100 * hits / counts[2] for hits in counts[:2])
    if jax.process_index() == 0:
        print(summary(top1, top5, len(names)), flush=True)
    yield "zeroshot/top1", top1
    yield "zeroshot/top5", top5
