"""Run the loaders that input_pipeline.py compares with, in the environments of open_clip and of TensorFlow.

usage: python peer_loaders.py open_clip|tensorflow SECONDS SHARD...

Prints {"images", "seconds", "cpu_seconds"} as JSON. One process, one decoding thread, 224 pixels.
"""

import itertools
import json
import os
import sys
import tarfile
import tempfile
import time

SIZE, BATCH, TOKENS, WINDOW = 224, 256, 32, 1000


def declare_torchvision():
    """Make torchvision importable next to a torch that it does not fit; open_clip only needs its transforms."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # Its transforms work once the operators of its models are declared.
        library = torch.library.Library("torchvision", "FRAGMENT")
        names = ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
        for name in ["nms", "qnms", *names, *(f"_{name}_backward" for name in names)]:
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        globals()["library"] = library  # deleting it would undo the declarations


def open_clip(shards):
    """Yield batches of open_clip's training transform and tokenizer, in the webdataset stages of its training."""
    import torch

    torch.set_num_threads(1)
    declare_torchvision()
    import webdataset
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform

    transform = image_transform(SIZE, is_train=True, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    tokenizer = SimpleTokenizer(context_length=TOKENS)
    while True:
        yield from webdataset.DataPipeline(
            webdataset.SimpleShardList(shards),
            webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
            webdataset.select(lambda sample: "txt" in sample and ("jpg" in sample or "png" in sample)),
            webdataset.shuffle(WINDOW, initial=WINDOW),
            webdataset.decode("pilrgb", handler=webdataset.warn_and_continue),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(32, partial=False),  # faster than larger batches
        )


def tensorflow(shards):
    """Yield batches of a usual tf.data pipeline over TFRecords of the same images; without a tokenizer it does less."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "0.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for shard in shards:
            with tarfile.open(shard) as tar:
                for _, files in itertools.groupby(tar, key=lambda file: file.name.partition(".")[0]):
                    parts = {file.name.partition(".")[2]: tar.extractfile(file).read() for file in files}
                    if "jpg" in parts and "txt" in parts:
                        features = {
                            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[parts[name]]))
                            for name in ("jpg", "txt")
                        }
                        example = tf.train.Example(features=tf.train.Features(feature=features))
                        writer.write(example.SerializeToString())

    def sample(record):
        features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("jpg", "txt")}
        fields = tf.io.parse_single_example(record, features)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(fields["jpg"]),
            tf.zeros([0, 0, 4]),
            area_range=(0.5, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(fields["jpg"], window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE], tf.image.ResizeMethod.BICUBIC)
        image = tf.image.random_flip_left_right(tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8))
        return image, fields["txt"]

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = tf.data.TFRecordDataset(path).repeat().shuffle(WINDOW).map(sample).batch(BATCH).prefetch(2)
    yield from dataset.with_options(options).as_numpy_iterator()


def measure(batches, seconds):
    """Count images, wall-clock and processor seconds for `seconds`, after two batches."""
    next(batches), next(batches)  # do not count what was prefetched
    start, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    return {"images": images, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


if __name__ == "__main__":
    loader, seconds, *paths = sys.argv[1:]
    print(json.dumps(measure({"open_clip": open_clip, "tensorflow": tensorflow}[loader](paths), float(seconds))))
    sys.stdout.flush()
    os._exit(0)  # threads that wait for a consumer would keep the process alive
