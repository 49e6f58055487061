"""Record shards that img2dataset downloads from a local server, for the tests in tests/data.

Needs img2dataset, Pillow, TensorFlow and tensorflow-io, which the tests do not. img2dataset writes TFRecord files with
TensorFlow and only imports tensorflow-io, so its version need not fit. In an environment of its own:

    pip install img2dataset==1.47.0 pillow tensorflow-cpu && pip install --no-deps tensorflow-io
    python dev/record_img2dataset.py
"""

import http.server
import io
import pathlib
import shutil
import tempfile
import threading

import img2dataset
import pyarrow
from PIL import Image
from pyarrow import parquet

OUT = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "img2dataset"
PORT = 8765
LINKS = 24
PER_SHARD = 12
DEAD = (3, 10, 17)
NOT_AN_IMAGE = 5
NO_CAPTION = 8


def color(i):
    return 10 * i, 255 - 10 * i, 37 * i % 256


def image(i):
    """Encodes an image of one color; sizes and formats vary."""
    out = io.BytesIO()
    Image.new("RGB", (40 + i, 60 - i), color(i)).save(out, "PNG" if i % 3 else "JPEG", quality=95)
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        i = int(self.path.strip("/"))
        self.send_response(404 if i in DEAD else 200)
        self.end_headers()
        self.wfile.write(b"<html>No image</html>" if i in (*DEAD, NOT_AN_IMAGE) else image(i))


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pairs = {
        "url": [f"http://127.0.0.1:{PORT}/{i}" for i in range(LINKS)],
        "caption": [None if i == NO_CAPTION else f"№ {i}: café" for i in range(LINKS)],
    }
    shutil.rmtree(OUT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(pyarrow.table(pairs), f"{folder}/pairs.parquet")
        for output_format in ("webdataset", "tfrecord", "parquet"):
            img2dataset.download(
                url_list=f"{folder}/pairs.parquet",
                input_format="parquet",
                caption_col="caption",
                output_folder=str(OUT / output_format),
                output_format=output_format,
                number_sample_per_shard=PER_SHARD,
                resize_mode="keep_ratio",
                image_size=32,
                thread_count=1,  # records in the order of the list
            )
    server.shutdown()


if __name__ == "__main__":
    main()
