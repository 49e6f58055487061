"""Run the loaders that input_pipeline.py compares with, in the environments of open_clip and of TensorFlow.

usage: python peer_loaders.py open_clip|tensorflow WORKERS SECONDS SHARD...

Prints what `measure` returns as JSON. WORKERS are open_clip's processes (0: it has none) or TensorFlow's threads.
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


def open_clip(shards, workers):
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
        dataset = webdataset.DataPipeline(
            webdataset.SimpleShardList(shards),
            webdataset.split_by_worker,
            webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
            webdataset.select(lambda sample: "txt" in sample and ("jpg" in sample or "png" in sample)),
            webdataset.shuffle(WINDOW, initial=WINDOW),
            webdataset.decode("pilrgb", handler=webdataset.warn_and_continue),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(32, partial=False),  # faster than larger batches
        )
        if workers:  # endless, so that its processes are not started again
            dataset = webdataset.WebLoader(dataset.repeat(10**6), batch_size=None, num_workers=workers)
        yield from dataset


def tensorflow(shards, workers):
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
    options.threading.private_threadpool_size = workers or 1
    dataset = tf.data.TFRecordDataset(path).repeat().shuffle(WINDOW)
    dataset = dataset.map(sample, num_parallel_calls=workers or None).batch(BATCH).prefetch(2)
    yield from dataset.with_options(options).as_numpy_iterator()


def children():
    """List the ids of this process's children."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found += file.read().split()
    return found


def children_seconds():
    """Return the processor seconds that this process's children have used."""
    total = 0
    for child in children():
        with open(f"/proc/{child}/stat") as file:
            total += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def measure(batches, seconds):
    """Count images, wall-clock and processor seconds for `seconds`, after several batches.

    `main_seconds` are those of this process alone, `cpu_seconds` those of its children too.
    """
    start, images = time.perf_counter(), 0
    while images < 5 * BATCH or time.perf_counter() - start < seconds / 4:  # do not count what was prefetched
        images += len(next(batches)[0])
    start, main, other, images = time.perf_counter(), time.process_time(), children_seconds(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    took, main, other = time.perf_counter() - start, time.process_time() - main, children_seconds() - other
    return {"images": images, "seconds": took, "cpu_seconds": main + other, "main_seconds": main}


if __name__ == "__main__":
    loader, workers, seconds, *paths = sys.argv[1:]
    batches = {"open_clip": open_clip, "tensorflow": tensorflow}[loader](paths, int(workers))
    print(json.dumps(measure(batches, float(seconds))))
    sys.stdout.flush()
    os._exit(0)  # threads that wait for a consumer would keep the process alive
