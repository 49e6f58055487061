"""Draw docs/images/masks.png and print the words that each text strategy keeps, for docs/masking.md.

usage: python -m benchmarks.mask_pictures [OUT.png]

The photo comes with Matplotlib: Rear Admiral Grace Hopper, by the U.S. Navy, in the public domain.
"""

import io
import sys

import jax
import numpy as np
from matplotlib import cbook
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from flip_jax import masking
from flip_jax.evaluators import snapshot
from flip_jax.tools import drawing

SIZE, PATCH, KEEP = 224, 16, 49
CAPTIONS = (
    "a portrait of the admiral in a dark navy uniform with a white cap in front of the flag",
    "a photo of a dog in the park",
    "the front of a house with a garden",
    "a cup of tea",
)


def draw(out: str) -> None:
    """Draw the intact image, and what each strategy keeps of it at a mask ratio of 0.75."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))
    patch_1xLxP = masking.patchify(image[None], PATCH)
    shown = {"intact": image}
    for name, strategy in masking.STRATEGIES.items():
        position_1xK = strategy(jax.random.key(1), patch_1xLxP, KEEP)
        patch_KxP = np.asarray(masking.gather(patch_1xLxP, position_1xK)[0])
        shown[name] = snapshot.unpatchify(patch_KxP, np.asarray(position_1xK[0]), SIZE // PATCH)
    margin = [(SIZE // 4, SIZE // 4)] * 2 + [(0, 0)]
    shown["resize"] = np.pad(masking.resize(image[None], SIZE // 2)[0], margin, constant_values=255)
    tiles = list(shown.items())
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    drawing.grid(figure, [tiles[:4], tiles[4:]], columns=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=drawing.DPI)
    Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def print_words() -> None:
    """Print half of the first caption's tokens under each strategy; the other captions only affect word counts."""
    words = {word: i for i, word in enumerate(dict.fromkeys(" ".join(CAPTIONS).split()), start=1)}
    length = 24
    tokens = np.zeros((len(CAPTIONS), length), np.int32)
    for row, caption in zip(tokens, CAPTIONS, strict=True):
        row[: len(caption.split())] = [words[word] for word in caption.split()]
    own = [*CAPTIONS[0].split(), *["·"] * length][:length]
    for name, strategy in masking.TEXT_STRATEGIES.items():
        kept = np.asarray(strategy(jax.random.key(2), tokens, length // 2)[0])
        print(f"{name:12}", " ".join(own[i] for i in kept))


if __name__ == "__main__":
    draw(*sys.argv[1:] or ["docs/images/masks.png"])
    print_words()
