"""What open_clip and others call a setting, and its name here; read only to word an error."""

# Word -> the setting, "" where there is none, and how the value translates.
SETTINGS: dict[str, tuple[str, str]] = {
    "batch_size": ("global_batch_size", "the batch of all devices together"),
    "accum_freq": ("microbatches", "parts of the batch; the loss still compares the full batch"),
    "lr": ("optim.learning_rate", "the peak; or optim.base_learning_rate, which is per 256 samples"),
    "learning_rate": ("optim.learning_rate", "the peak; or optim.base_learning_rate, which is per 256 samples"),
    "wd": ("optim.weight_decay", ""),
    "beta1": ("optim.b1", ""),
    "beta2": ("optim.b2", ""),
    "epochs": ("total_samples", "epochs x samples in the data"),
    "steps": ("total_samples", "steps x global_batch_size"),
    "train_num_samples": ("total_samples", "epochs x samples in the data"),
    "warmup": ("warmup_samples", "in samples: steps x global_batch_size"),
    "warmup_steps": ("warmup_samples", "in samples: steps x global_batch_size"),
    "workers": ("data.threads", "decoding threads per process, 0 for one per core"),
    "precision": ("model.dtype", "bfloat16 or float32"),
    "grad_checkpointing": ("model.remat", "none, dots, names, full or auto"),
    "save_frequency": ("checkpoint.every_steps", "in steps"),
    "val_frequency": ("eval.every_steps", "in steps"),
    "zeroshot_frequency": ("eval.every_steps", "in steps"),
    "log_every_n_steps": ("log.every_steps", ""),
    "train_data": ("data.train", "KIND:PATTERN, such as 'webdataset:/data/{00000..00127}.tar'"),
    "dataset_type": ("data.train", "KIND:PATTERN, such as 'webdataset:/data/{00000..00127}.tar'"),
    "imagenet_val": ("eval.tasks", "zeroshot/imagenet=folder:DIR"),
    "imagenet_v2": ("eval.tasks", "zeroshot/imagenet_v2=folder:DIR"),
    "csv_caption_key": ("data.captions", "the columns of captions, the first found is read"),
    "force_patch_dropout": ("model.image.mask_ratio", "the share of patches that is removed"),
    "pretrained": ("init_from", "a run, or what flip convert has written"),
    "report_to": ("log.wandb", "a project; TensorBoard needs no setting"),
    "resume": ("", "run the same command again: a run resumes from its newest checkpoint"),
    "logs": ("", "the folder of the run is --workdir=DIR"),
    "name": ("", "the folder of the run is --workdir=DIR"),
    "model": ("", "the recipe says the model: --config=configs/flip_b16.py, clip_b16.py, flip_l16.py ..."),
}


def hint(word: str) -> str | None:
    """Returns what to give in place of a word of another program, None for a word that is not known."""
    found = SETTINGS.get(word.lower().replace("-", "_"))
    if not found:
        return None
    key, translation = found
    if not key:
        return translation
    return f"did you mean --config.{key}" + (f" ({translation})?" if translation else "?")
