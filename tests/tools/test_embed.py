"""Rows of an index against direct encoding; the same bytes after interruptions and from any number of workers."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import pyarrow as pa
import pytest
from helpers import WORDS, command, embedded_rows, make_encoder, png, save, write_embeddings, write_tar
from pyarrow import parquet

from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip
from flip_jax.tools import embed, index


def digest(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_embeddings_of_the_images_in_order(encoder, source, tmp_path):
    written = write_embeddings(encoder, source, tmp_path)
    good = [i for i in range(45) if i not in (8, 20, 36)]
    found = embedded_rows(tmp_path)
    shard = ["0.tar"] * 7 + ["1.tar"] * 30 + ["2.tar"] * 8
    assert [row["key"] for row in found] == [f"{shard[i]}/{i:05}" for i in good]
    assert [row["texts"] for row in found] == [[f"picture {i}"] for i in good]
    pictures = np.stack([transforms.decode(png(i), 32, DataConfig()) for i in good])
    truth = np.asarray(encoder.encode_image(pictures))
    np.testing.assert_allclose(np.stack([row["embedding"] for row in found]), truth, atol=1e-6)
    # The first and the last shard fit in a part each; the second takes three.
    names = ["part-000000-0000", *(f"part-000001-000{i}" for i in range(3)), "part-000002-0000"]
    assert written["parts"] == dict(zip(names, (7, 9, 9, 9, 8), strict=True))
    assert (written["rows"], written["read"]) == (42, 45)
    assert written["bad"] == {"image does not decode": 1, "no image": 2}
    named = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in named] == ["1.tar/00008", "1.tar/00020", "1.tar/00036"]
    assert json.loads((tmp_path / "index.json").read_text()) == written


def test_every_row_says_where_its_record_is(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path)
    opened = embed.open_source(source, DataConfig(), False)
    for row in embedded_rows(tmp_path)[::5]:
        record, _ = next(opened.read([(row["item"], 0)], row["offset"]))
        assert record["key"] == row["key"] and record["texts"] == row["texts"]


def test_half_precision_holds_the_same_rounded(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "a")
    write_embeddings(encoder, source, tmp_path / "b", dtype="float16")
    ours, truth = embedded_rows(tmp_path / "b"), embedded_rows(tmp_path / "a")
    for row, true in zip(ours, truth, strict=True):
        np.testing.assert_array_equal(row.pop("embedding"), np.array(true.pop("embedding"), np.float16))
        assert row == true
    kind = parquet.read_schema(tmp_path / "b" / "part-000001-0001.parquet").field("embedding").type
    assert kind.value_type == pa.float16() and kind.list_size == 16


def test_captions_of_a_source_and_lines_of_a_file(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "a", texts=True)
    found = embedded_rows(tmp_path / "a")
    assert len(found) == 43  # an image that does not decode still has a caption
    truth = encoder.encode_text([row["texts"][0] for row in found])
    np.testing.assert_allclose(np.stack([row["embedding"] for row in found]), truth, atol=1e-6)
    lines = [f"a red {i}" for i in range(23)]
    lines[4], lines[11] = " ", "\udcff"
    (tmp_path / "lines.txt").write_bytes("\n".join(lines).encode(errors="surrogateescape") + b"\n")
    written = write_embeddings(encoder, str(tmp_path / "lines.txt"), tmp_path / "b", texts=True)
    assert written["bad"] == {"no text": 1, "not UTF-8": 1} and list(written["parts"].values()) == [9, 9, 3]
    found = embedded_rows(tmp_path / "b")
    assert [row["key"] for row in found] == [str(i + 1) for i in range(23) if i not in (4, 11)]
    assert [row["texts"] for row in found] == [[lines[int(row["key"]) - 1]] for row in found]


def test_every_caption_of_an_image_is_a_row(encoder, tmp_path):
    captions = [json.dumps({"caption": [f"a {i}", f"red {i}"]}).encode() for i in range(9)]
    write_tar(
        tmp_path / "0.tar", itertools.chain(*(((f"{i}.png", png(i)), (f"{i}.json", c)) for i, c in enumerate(captions)))
    )
    written = write_embeddings(encoder, f"webdataset:{tmp_path}/0.tar", tmp_path / "out", texts=True)
    assert (written["rows"], written["read"]) == (18, 9)
    assert [row["texts"] for row in embedded_rows(tmp_path / "out")[6:8]] == [["a 3"], ["red 3"]]


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_and_gives_the_same_bytes(encoder, source, tmp_path, monkeypatch):
    write_embeddings(encoder, source, tmp_path / "whole")
    truth, replace, kills = digest(tmp_path / "whole"), os.replace, 0
    for late, kill_at in itertools.product((False, True), range(len(truth) + 1)):
        out, calls = tmp_path / f"{kill_at}{late}", itertools.count()

        def killable(a, b, kill_at=kill_at, late=late, calls=calls):
            now = next(calls)
            if now == kill_at and not late:
                raise Killed
            replace(a, b)
            if now == kill_at:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killable)
            try:
                write_embeddings(encoder, source, out)
            except Killed:
                kills += 1
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
        write_embeddings(encoder, source, out)
        assert digest(out) == truth
        assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert kills == 2 * (len(truth) + 1)  # index.json is written twice


def test_records_of_finished_parts_are_not_decoded_again(encoder, source, tmp_path, monkeypatch):
    write_embeddings(encoder, source, tmp_path)
    truth = digest(tmp_path)
    (tmp_path / "part-000001-0002.parquet").unlink()
    decoded, decode = [], transforms.decode
    monkeypatch.setattr(transforms, "decode", lambda data, *rest: decoded.append(1) or decode(data, *rest))
    write_embeddings(encoder, source, tmp_path)
    assert digest(tmp_path) == truth and len(decoded) == 9  # one of the ten has no image at all


def test_eight_devices_give_the_same_embeddings(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "one")
    write_embeddings(make_encoder(8), source, tmp_path / "eight")
    one, eight = (np.stack([row["embedding"] for row in embedded_rows(tmp_path / name)]) for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, atol=1e-6)


def test_sources_without_shards_are_split_by_records(encoder, tmp_path):
    (tmp_path / "images").mkdir()
    lines = ["filepath,title"]
    for i in range(23):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
        lines.append(f"images/{i}.png,picture {i}")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    written = write_embeddings(encoder, f"csv:{tmp_path}/a.csv", tmp_path / "out")
    assert written["parts"] == {"part-000000-0000": 10, "part-000001-0000": 10, "part-000002-0000": 3}
    found = embedded_rows(tmp_path / "out")
    assert [row["texts"] for row in found] == [[f"picture {i}"] for i in range(23)]
    assert [row["item"] for row in found] == list(range(23))


def test_the_identity_of_a_model_is_its_weights_settings_and_tokenizer(encoder):
    ours = index.identity(encoder)
    assert index.identity(make_encoder(8)) == ours
    assert index.identity(make_encoder(seed=1))["weights_hash"] != ours["weights_hash"]
    assert index.identity(make_encoder(words=(*WORDS, "more")))["config_hash"] != ours["config_hash"]


def test_the_index_names_a_model_of_the_hub_as_it_was_given(encoder, tmp_path):
    path, data = tmp_path / "texts.txt", encoder.config.data
    path.write_text("a red picture\n")
    lines = embed.open_source(str(path), data, True)
    written = embed.write_index(encoder, "hf://org/fox@v1", lines, data, tmp_path / "out", name=str(path), texts=True)
    assert (written["model"], written["rows"]) == ("hf://org/fox@v1", 1)


def test_a_folder_or_source_that_does_not_fit_is_refused(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "out")
    with pytest.raises(UserError, match="was started with rows_per_part 10, not 5 .*use another folder"):
        write_embeddings(encoder, source, tmp_path / "out", rows_per_part=5)
    with pytest.raises(UserError, match="was started with weights_hash"):
        write_embeddings(make_encoder(seed=1), source, tmp_path / "out")
    with pytest.raises(UserError, match="was started with source"):
        write_embeddings(encoder, source.replace("{0..2}", "[0-2]"), tmp_path / "out")
    with pytest.raises(UserError, match="is not empty and not from this command"):
        write_embeddings(encoder, source, tmp_path)
    with pytest.raises(UserError, match='must be "KIND:REST"'):
        write_embeddings(encoder, "nothing", tmp_path / "x")
    with pytest.raises(UserError, match="'nothing' is neither a text file with one text per line nor KIND:REST"):
        write_embeddings(encoder, "nothing", tmp_path / "x", texts=True)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty.txt' is empty"):
        write_embeddings(encoder, str(tmp_path / "empty.txt"), tmp_path / "x", texts=True)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match="none of the 2 records of .* can be used: {'no text': 2}"):
        write_embeddings(encoder, str(tmp_path / "blank.txt"), tmp_path / "y", texts=True)
    with pytest.raises(UserError, match="part-000000-0000: the model's embeddings are not finite"):
        write_embeddings(make_encoder(factor=np.nan), source, tmp_path / "z")
    part = tmp_path / "out" / "part-000001-0000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match="part-000001-0000.parquet is damaged: delete it and run"):
        write_embeddings(encoder, source, tmp_path / "out")
    part.unlink()
    write_embeddings(encoder, source, tmp_path / "out")
    assert len(embedded_rows(tmp_path / "out")) == 42


def test_the_command(encoder, source, tmp_path, capsys):
    save(encoder, tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "source": source, "rows": "10", "batch_size": "8"}
    done = command("embed", out=str(tmp_path / "a"), workers="2", **options)
    assert "42 images of 45 records in 5 parts" in done.stdout and "bad: 2 no image" in done.stdout, done.stderr
    assert "records/s" in done.stderr
    truth = digest(tmp_path / "a")
    (tmp_path / "a" / "part-000001-0002.parquet").unlink()
    done = command("embed", out=str(tmp_path / "a"), **options)
    assert "already holds 2 of 3" in done.stdout and digest(tmp_path / "a") == truth, done.stderr
    write_embeddings(encoder, source, tmp_path / "b")
    for name in ("index.json", "bad.jsonl"):
        a, b = ((tmp_path / folder / name).read_text() for folder in "ab")
        assert a.replace(str(tmp_path / "model"), os.path.abspath("a model")) == b
    a, b = (np.stack([row["embedding"] for row in embedded_rows(tmp_path / folder)]) for folder in "ab")
    np.testing.assert_allclose(a, b, atol=1e-6)
    shutil.rmtree(tmp_path / "model" / "state")
    out = f"--out={tmp_path / 'c'}"
    assert flip.main(["embed", out, *(f"--{name}={value}" for name, value in options.items())]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert "holds no checkpoint" in said and "Traceback" not in said


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    def exhausted(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(embed.inference, "load", exhausted)
    with pytest.raises(UserError, match="--model 'x' does not fit into a worker's device: use fewer --workers"):
        embed.load("x")
