"""Requirements of evaluators on the model and the data set, checked before time is spent.

An evaluator lists those it has in `NEEDS`. Each is a function of the data set and the settings that raises UserError
where the requirement is not met.
"""

from collections import Counter
from collections.abc import Callable

from flip_jax.config import Config
from flip_jax.evaluators import class_file, datasets, known
from flip_jax.evaluators.datasets import Dataset
from flip_jax.runtime import UserError

Need = Callable[[Dataset, Config], None]


def text_tower(dataset: Dataset, config: Config) -> None:
    """Requires an image-text model."""
    if config.finetune.classes:
        raise UserError("a fine-tuned classifier reads no text; use classify, linear_probe or few_shot")


def classifier(dataset: Dataset, config: Config) -> None:
    """Requires a fine-tuned classifier."""
    if not config.finetune.classes:
        raise UserError("the model is not a classifier (config.finetune.classes is 0); use zeroshot or linear_probe")


def captions(dataset: Dataset, config: Config) -> None:
    """Refuses known data sets without captions; whether a source has any shows when it is read."""
    if dataset.name in known.KNOWN and dataset.metric != known.CAPTIONS:
        raise UserError(f"{dataset.name} has classes but no captions; use zeroshot/{dataset.name}")


def labels(dataset: Dataset, config: Config) -> None:
    """Refuses known data sets without labels; whether a source has any shows when it is read."""
    if dataset.metric == known.CAPTIONS:
        raise UserError(f"{dataset.name} has captions but no classes; use retrieval/{dataset.name}")


def train_split(dataset: Dataset, config: Config) -> None:
    """Requires a training split whose classes are those of the test split."""
    if not dataset.train:
        raise UserError(f"{dataset.name} has no train split: add ';train=SOURCE' to the task")
    dataset = datasets.with_training_names(dataset, config)
    for split in ("train", "test"):
        datasets.match(dataset, config, split)


def class_names(dataset: Dataset, config: Config) -> None:
    """Requires distinct class names that fit the test source."""
    if not dataset.classes:
        raise UserError(f"{dataset.test!r} has no class names. {class_file.WANTED}")
    repeated = list((Counter(dataset.classes) - Counter(set(dataset.classes))).elements())
    # Known data sets may repeat names, because CLIP does: ImageNet has two classes called "missile".
    if repeated and not dataset.labels:
        raise UserError(
            f"{len(repeated)} of the {len(dataset.classes)} class names are repeated, first {repeated[0]!r}: give "
            "distinct names in a file (config.eval.classnames)"
        )
    datasets.match(dataset, config)


def prompts(dataset: Dataset, config: Config) -> None:
    """Requires prompts with one place for the class name."""
    for template in dataset.templates:
        if template.count("{}") != 1:
            raise UserError(f"each prompt needs one {{}} for the class name, got {template!r}")
