"""Trim the recordings of the official code to what the tests read: python dev/trim_official_fixtures.py FOLDER.

FOLDER holds the full recordings, 25 MB; tests/fixtures/official, which is written, holds 8 MB in files below 1 MiB.
"""

import gzip
import io
import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np

OUT = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "official"
COPIED = (
    "eval_outputs.npz",
    "inputs.npz",
    "logit_scale_clip.json",
    "lr_schedules.json",
    "tokenization.json",
    "train_steps.npz",
    "vocab_bert_base.txt",
    "weight_decay.json",
)
PARAMETERS = ("params", "grads_step0", "params_after_step2")
# Small images, and the one with an odd margin around its centre square.
IMAGES = (0, 1, 2, 4, 5)
TRAINING_IMAGES = (0, 1, 3)  # numbers of the crops, which come from images 1, 2 and 4
VARIANTS = ("filedriver", "multichunk", "flatten_params")


def main(folder: pathlib.Path):
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(folder / name, OUT / name)
    trim_shapes(folder)
    for name in PARAMETERS:
        split_parameters(folder / f"{name}.npz")
    trim_images(folder)
    trim_checkpoints(folder)


def trim_shapes(folder: pathlib.Path):
    models = json.loads((folder / "param_shapes_full_configs.json").read_text())
    kept = {name: {key: model[key] for key in ("n_params", "params")} for name, model in models.items()}
    (OUT / "param_shapes_full_configs.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def split_parameters(path: pathlib.Path):
    """Write the image tower's arrays to one file and the others to another."""
    with np.load(path) as file:
        arrays = dict(file)
    image = {name: array for name, array in arrays.items() if name.startswith("img_encoder/")}
    rest = {name: array for name, array in arrays.items() if name not in image}
    np.savez_compressed(OUT / f"{path.stem}_image.npz", **image)
    np.savez_compressed(OUT / f"{path.stem}_text.npz", **rest)


def trim_images(folder: pathlib.Path):
    """Keep five images and three training crops; of the 224 px result every fourth row."""
    with np.load(folder / "image_preproc.npz") as file:
        kept = {f"{kind}_{i}": file[f"{kind}_{i}"] for i in IMAGES for kind in ("jpg", "evalcrop", "eval64")}
        kept["eval224_1"] = file["eval224_1"][::4]
        for i in TRAINING_IMAGES:
            kept |= {f"train64_{i}{part}": file[f"train64_{i}{part}"] for part in ("", "_window_yxhw", "_jpg")}
    np.savez_compressed(OUT / "image_preproc.npz", **kept)


def trim_checkpoints(folder: pathlib.Path):
    """Keep the weights but not the optimizer's state, and store the arrays that two checkpoints share once."""
    plain = read_tar(folder / "checkpoint_3.tar.gz", "checkpoint_3/")
    write_checkpoint("gcs", "one_chunk", plain)
    for name in VARIANTS:
        variant = read_tar(folder / "checkpoint_variants.tar.gz", f"checkpoint_variants/{name}/checkpoint_3/")
        shared = all(variant[path] == plain[path] for path in plain if path.startswith("target."))
        write_checkpoint(name, "one_chunk" if shared else name, variant)


def read_tar(path: pathlib.Path, prefix: str) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith(prefix)]
        return {member.name.removeprefix(prefix): tar.extractfile(member).read() for member in members}


def write_checkpoint(name: str, arrays: str, files: dict[str, bytes]):
    """Write the index of one checkpoint, and its arrays where they are not written yet."""
    (OUT / f"checkpoint_{name}.gz").write_bytes(gzip.compress(files["checkpoint"], mtime=0))
    weights = {path: content for path, content in files.items() if path.startswith("target.")}
    image = {path: content for path, content in weights.items() if path.startswith("target.img_encoder.")}
    write_tar(OUT / f"arrays_{arrays}_image.tar.gz", image)
    write_tar(OUT / f"arrays_{arrays}_text.tar.gz", {path: weights[path] for path in weights if path not in image})


def write_tar(path: pathlib.Path, files: dict[str, bytes]):
    with gzip.GzipFile(path, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
