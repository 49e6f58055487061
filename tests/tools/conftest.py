"""Fixtures of the tools' tests."""

import itertools

import pytest
from helpers import make_encoder, png, samples, write_tar


@pytest.fixture(scope="session")
def encoder():
    return make_encoder()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Three tars of 7, 30 and 8 samples, of which the second has three bad ones; a caption "picture N" each."""
    folder = tmp_path_factory.mktemp("source")
    members = [list(samples(1, i)) for i in range(45)]
    members[8][0] = (members[8][0][0], b"no image")
    members[20] = members[20][1:]
    members[36][0] = (members[36][0][0], b"")
    for i, part in enumerate((members[:7], members[7:37], members[37:])):
        write_tar(folder / f"{i}.tar", itertools.chain(*part))
    return f"webdataset:{folder}/{{0..2}}.tar"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Twelve images, four of them in a subfolder; files that are not images; links out of the folder."""
    folder = tmp_path_factory.mktemp("images")
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    secret.write_bytes(png(99))
    (folder / "sub").mkdir()
    for i in range(12):
        (folder / ("sub" if i > 7 else ".") / f"{i:02}.PNG").write_bytes(png(i))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not listed")
    (folder / "link.png").symlink_to(secret)
    (folder / "folder").symlink_to(secret.parent)
    return folder
