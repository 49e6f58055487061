"""Every setting and its default. `config_check` turns a recipe and the command line into a checked `Config`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Vision transformer. Sizes in pixels; `mask_ratio` is the share of patches removed in training (0: CLIP).

    `mask` is a strategy of flip_jax/masking.py; "resize" shrinks the image to as many patches instead.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mask: str = "random"
    mask_ratio: float = 0.5
    # Over all tokens, cls included (official); "patches": without it; "cls"; or "map", a learned probe that attends to
    # the patches (SigLIP), without cls.
    pool: str = "mean"
    patch_bias: bool = True
    positions: str = "sincos"  # fixed (official), or "learned", with one for cls
    pre_norm: bool = False  # a norm before the first block (CLIP)
    pixel_stats: str = "imagenet"  # mean and deviation that pixels are normalised with: an entry of vit.PIXEL_STATS
    mlp_width: int = 0  # hidden units of the MLPs; 0: 4 x width

    @property
    def visible_patches(self) -> int:
        """Counts the patches that a training step encodes: rounded down, as the official code does."""
        return int((self.image_size // self.patch_size) ** 2 * (1 - self.mask_ratio))


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text transformer over `context_length` word pieces, of which training drops `mask_ratio`."""

    vocab_size: int = 30_523  # BERT's 30,522 and one out-of-vocabulary row that never occurs (official)
    context_length: int = 32
    width: int = 512
    depth: int = 12
    heads: int = 8
    # The first word piece (official), "mean" over the real tokens, "last", the last of them, or "final", the last
    # position, padding or not (SigLIP).
    pool: str = "first"
    mask_padding: bool = False  # the official tower attends to padding
    causal: bool = False  # tokens attend to earlier ones only (CLIP)
    mlp_width: int = 0  # hidden units of the MLPs; 0: 4 x width
    mask: str = "prioritised"
    mask_ratio: float = 0.0
    mask_counts: str = ""  # for mask "frequency": a file of `flip inspect --counts`; empty: counts of the batch

    @property
    def visible_tokens(self) -> int:
        """Counts the tokens that a training step encodes, rounded down."""
        return int(self.context_length * (1 - self.mask_ratio))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """MAE's decoder, which reconstructs the removed patches, and the weight of its loss (0: none). Paper, table 1f."""

    weight: float = 0.0
    width: int = 512
    depth: int = 8
    heads: int = 16


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Two towers, their projections to `embed_dim`, the compute type and what the backward pass recomputes."""

    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    decoder: DecoderConfig = DecoderConfig()
    embed_dim: int = 512
    projection: str = "both"  # of both towers to embed_dim; "text": of the text alone, with a bias (SigLIP)
    init_logit_scale: float = 1 / 0.07  # initial exp(logit_scale), an inverse temperature; the loss clips it at 100
    activation: str = "gelu_tanh"  # the official approximation; "gelu"; or "quick_gelu", OpenAI's
    norm_eps: float = 1e-6
    loss: str = "info_nce"  # or "sigmoid" (SigLIP), with a learned bias
    dtype: str = "bfloat16"
    remat: str = "none"  # or "dots", "names", "full", each of which keeps less; "auto": the first that fits
    # "auto": XLA's, on v4, v5e and v6e for as many rows at a time as fit into on-chip memory; "xla": for all at once;
    # or "cudnn": cuDNN's, on NVIDIA GPUs where attention has no mask (padding, causal).
    attention: str = "auto"
    unroll: bool = False  # layers unrolled instead of a loop: longer to compile, faster on CPUs


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The peak learning rate is `learning_rate`; where that is 0, `base_learning_rate * batch / 256`.

    `schedule` "cosine" falls to 0 over the whole run (the paper); "constant" stays at the peak after the warm-up, until
    it falls linearly to 0 over the last `cooldown_samples` (0: never), so a run's length can be changed until then.
    """

    name: str = "adamw"  # or "lamb", or "muon": matrices by Muon, embeddings, biases and norms by AdamW
    base_learning_rate: float = 4e-6
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.2
    mu_dtype: str = "float32"
    learning_rate: float = 0.0
    schedule: str = "cosine"
    cooldown_samples: int = 0
    clip_norm: float = 0.0  # the most that the norm of all gradients together may be (0: any)
    ema: float = 0.0  # decay per step of an average of the weights, which evaluation and export then take (0: none)
    image_rate: float = 1.0  # factor of a tower's learning rate, without its projection; 0 freezes the tower
    text_rate: float = 1.0
    layer_decay: float = 1.0  # within a tower, the rate of a layer as a share of that of the next one


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Training of the image tower as a classifier of `classes` classes (0: contrastive training).

    `mixup` and `cutmix` are the a of their Beta(a, a) distributions (0: never). See models/classifier.py.
    """

    classes: int = 0
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how a record becomes a sample.

    `train` is one source or several, "WEIGHT*SOURCE;WEIGHT*SOURCE"; weights are shares of records. A source is
    KIND:PATTERN, with brace ranges and globs, of kind webdataset, tfrecord, parquet or csv, or "tfds:NAME/SPLIT";
    `tfds_dir` is where TFDS keeps its data (default: TFDS's own). `vocab` is a vocabulary file, of WordPiece or CLIP's
    byte pairs, or a tokenizer.json; empty: a WordPiece is trained on the captions.
    """

    train: str = ""
    tfds_dir: str = ""
    vocab: str = ""
    captions: tuple[str, ...] = (
        "txt",
        "caption",
        "captions",
        "title",
        "text",
        "comment",
        "captions/text",
    )  # the first found; "txt" is also the text file of a webdataset. "WEIGHT*KEY,WEIGHT*KEY": one is drawn each epoch
    image: str = ""  # column or feature that holds the images; empty: a usual name
    allow_urls: bool = False  # a local CSV or Parquet file of your own may name images by URLs
    allow_parent_paths: bool = False  # the paths in a CSV or Parquet file of your own may hold ".."
    shuffle_window: int = 10_000  # records that are held, still encoded, and shuffled
    interleave: int = 8  # shards read in parallel
    workers: int | str = "auto"  # processes that read and decode; 0: threads; "auto": cores - 1 of more than 4, else 0
    threads: int = 0  # decoding threads where there are no workers; 0: one per core
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    resize: str = "antialias"  # or "official": FLIP's own bicubics, which do not antialias
    max_image_pixels: int = 100_000_000
    max_bad_fraction: float = 0.1


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes `fsdp` and `tensor`; `data` takes the remaining devices."""

    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation every `every_steps` (0: only at the end) by `tasks`, each EVALUATOR/DATASET.

    EVALUATOR is an entry of `evaluators.EVALUATORS`. DATASET is NAME, one of `evaluators.known.KNOWN`; NAME=SOURCE,
    where its images lie elsewhere; or SOURCE, as in `DataConfig.train`. Where something is fitted on a training split,
    ";train=SOURCE" follows. `classnames` names a file of class names (one a line, or JSON) for tasks that
    are a SOURCE, `templates` are prompts with {} for the name; where they are empty, the set's own are used.

    `mask` is the part of an image that is encoded (the paper's table 1d): all of it, "intact"; one random part of the
    size that training sees, "masked"; or the mean over such parts that together cover it, "ensemble".
    """

    every_steps: int = 0
    tasks: tuple[str, ...] = ()
    classnames: str = ""
    templates: tuple[str, ...] = ()
    batch_size: int = 256
    mask: str = "intact"

    @property
    def wanted(self) -> bool:
        """Tells whether the run evaluates; without tasks it still draws for the trackers every `every_steps`."""
        return bool(self.tasks or self.every_steps)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save every `every_steps` (0: only at the end and on SIGTERM) and keep the newest `keep`.

    A run whose newest checkpoint is damaged resumes from the one before; with `strict` it stops instead.
    """

    every_steps: int = 1000
    keep: int = 3
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Write metrics every `every_steps`; in between nothing is fetched from the devices."""

    every_steps: int = 50
    wandb: str = ""  # a project of Weights & Biases, which then gets everything that TensorBoard gets


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Durations are in samples, so that a changed batch keeps their meaning."""

    seed: int = 0
    global_batch_size: int = 65_536
    total_samples: int = 12_800_000_000
    warmup_samples: int = 51_200_000
    # Parts of the batch that are encoded one after the other; the loss compares the full batch. "auto": as few as fit.
    microbatches: int | str = 1
    init_from: str = ""  # a run, a step, a portable folder, hf://ORG/NAME or timm's file: weights to start from
    init_model: bool = False  # take the architecture of `init_from`, too, in place of that in `model`
    profile: tuple[int, ...] = ()  # first and last step that jax.profiler traces to WORKDIR/profile
    # "SAMPLES:KEY=VALUE,KEY=VALUE;SAMPLES:...": one stage after the other, each with changes to the other settings
    # (docs/train.md); total_samples is their sum.
    stages: str = ""
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def total_steps(self) -> int:
        """Counts the optimizer steps of the whole run; a last, partial batch is not trained."""
        return self.total_samples // self.global_batch_size


@dataclasses.dataclass(frozen=True)
class Stage:
    """The steps `first` + 1 to `last` of a run, all with one `config`; a run without `Config.stages` is one stage."""

    config: Config
    last: int
    first: int = 0
    samples: int = 0  # seen before it
    name: str = ""  # "stage 2/3: ", with which its lines begin; empty without `Config.stages`
    fresh: bool = False  # whether the optimizer starts without the state of the stage before

    def samples_seen(self, step: int) -> int:
        """Counts the samples of the whole run up to a step of this stage."""
        return self.samples + (step - self.first) * self.config.global_batch_size
