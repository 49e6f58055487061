"""Filters remove what they name, and the page shows it."""

import itertools
import json

import numpy as np
from helpers import png, save, write_tar
from prepared import contents, prepare

from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms


def test_filters_remove_what_they_name(tmp_path):
    kept = ["a red fox", "ein Fuchs", "狐", "see http://a.b", "fox.jpg on a wall"]
    junk = ["http://a.b/c.jpg www.d.e", "IMG_1234", "a-fox.JPG", "12:30 #!", "dsc 0042"]
    members = [(f"a{i}", (20, 20), text) for i, text in enumerate([*kept, *junk])]
    members += [
        ("b0", (9, 40), "small"),
        ("b1", (10, 31), "narrow"),
        ("b2", (10, 30), "fits"),
        ("b3", (20, 20), "x" * 99),
    ]
    write_tar(
        tmp_path / "0.tar",
        itertools.chain(*(((f"{k}.png", png(0, size)), (f"{k}.txt", text.encode())) for k, size, text in members)),
    )
    settings = {"min_side": 10, "max_aspect": 3.0, "max_caption": 50, "drop_junk_captions": True}
    done = prepare(f"webdataset:{tmp_path}/0.tar", tmp_path / "out", shards=1, **settings)
    assert done.removed.counts == {
        "junk caption": 5,
        "side below 10 pixels": 1,
        "aspect above 3": 1,
        "caption longer than 50 characters": 1,
    }
    (found,) = contents(tmp_path / "out")
    assert sorted(data.decode() for name, data in found.items() if name.endswith("txt")) == sorted([*kept, "fits"])
    page = (tmp_path / "out" / "removed.html").read_text()
    assert "removed: 5 junk caption (35.71%)" in page and "0.tar/b0" in page and page.count("<img src=") == 8
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert stats["count"] == stats["successes"] == 6 and stats["status_dict"] == {"success": 6}
    real = "count successes failed_to_download failed_to_resize duration start_time end_time status_dict"
    assert list(stats) == real.split()  # as img2dataset 1.47 writes them


def test_one_of_several_captions_may_be_removed(tmp_path):
    captions = json.dumps({"caption": ["IMG_1", "a fox", "no"]}).encode()
    write_tar(tmp_path / "0.tar", [("0.png", png()), ("0.json", captions)])
    prepare(f"webdataset:{tmp_path}/0.tar", tmp_path / "out", 1, drop_junk_captions=True, min_caption=3)
    (found,) = contents(tmp_path / "out")
    assert found["0000000000.txt"] == b"a fox"


def test_pairs_below_a_score_are_removed(encoder, source, tmp_path):
    save(encoder, tmp_path / "model")
    opened = sources.open_source(source, DataConfig())
    good = [r for r in sources.in_order(opened, iter(range(3))) if r.get("texts") and r["key"] != "1.tar/00008"]
    images = np.stack([transforms.decode(record["image"], 32, DataConfig()) for record in good])
    texts = encoder.encode_text([record["texts"][0] for record in good])
    score = dict(
        zip([r["key"] for r in good], np.sum(np.asarray(encoder.encode_image(images)) * texts, 1), strict=True)
    )
    least = float(np.median(list(score.values()))) + 1e-4  # between two of them
    done = prepare(source, tmp_path / "out", 1, min_score=least, model=str(tmp_path / "model"))
    (found,) = contents(tmp_path / "out")
    truth = {int(key[-5:]) for key, value in score.items() if value >= least}
    assert {int(name[:10]) for name in found} == truth and 0 < len(truth) < len(good)
    assert done.removed.counts == {f"score below {least:g}": len(good) - len(truth)}
