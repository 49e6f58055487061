"""A Ray cluster of two nodes on this machine does what worker processes do; skipped where Ray is not installed."""

import itertools
import sys

import pytest
from helpers import REPO, samples, write_tar
from prepared import contents, prepare
from unit_jobs import RECORDS, Numbers

from flip_jax.runtime import UserError
from flip_jax.tools import spill, units
from flip_jax.tools.unit_workers import ENDS

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a core each; the second one may be removed."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", ":".join([str(REPO), str(REPO / "tests"), *filter(None, sys.path)]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**settings, "include_dashboard": False})
    cluster.second = cluster.add_node(**settings)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def run(job, count, cluster, done=lambda *_: None, **rest):
    found = {}
    with units.Crew(job, units.Size(0, cluster.address), **rest) as crew:
        skipped = crew.run(range(count), lambda unit, answer: (found.update({unit: answer}), done(unit, answer)))
    return found, skipped


def test_deadly_records_cost_themselves_and_deadly_units_too(tmp_path, cluster):
    job = Numbers(tmp_path, at_record=[(1, 4)], at_unit=[3], once=[0])
    found, skipped = run(job, 6, cluster, marks=tmp_path)
    assert list(skipped) == [3] and sorted(found) == [0, 1, 2, 4, 5]
    assert {unit: answer["bad"] for unit, answer in found.items() if answer["bad"]} == {1: [["4", ENDS]]}
    assert len({answer["process"] for answer in found.values()}) > 1


def test_a_node_that_is_lost_costs_nothing(tmp_path, cluster):
    def done(unit, _):
        if unit == 4:
            cluster.remove_node(cluster.second, allow_graceful=False)

    found, skipped = run(Numbers(tmp_path, seconds=0.5), 16, cluster, done)
    assert not skipped and {unit: answer["total"] for unit, answer in found.items()} == dict.fromkeys(
        range(16), sum(range(RECORDS))
    )


def test_shards_have_the_same_bytes(tmp_path, cluster, monkeypatch):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", itertools.chain(samples(12, 12 * i), samples(1, 0)))
    source = f"webdataset:{tmp_path}/{{0..3}}.tar"
    prepare(source, tmp_path / "none", dedup=True)
    prepare(source, tmp_path / "ray", dedup=True, crew=units.Size(0, cluster.address))
    ours, truth = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ray", "none"))
    assert ours == truth and len(truth) == 10 and spill.HELD == 2**28


def test_what_does_not_fit_is_refused(tmp_path, cluster):
    with pytest.raises(UserError, match="it has room for 2 workers by CPU, not 5: use --workers=2"):
        units.Crew(Numbers(tmp_path), units.Size(5, cluster.address))


def test_an_address_without_a_cluster_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ray=127.0.0.1:1: no Ray cluster answers .*`ray start --head`"):
        units.Crew(Numbers(tmp_path), units.Size(2, "127.0.0.1:1"))


def test_a_preparation_that_was_refused_leaves_its_folder_to_other_settings(tmp_path):
    write_tar(tmp_path / "0.tar", samples(4))
    source, out = f"webdataset:{tmp_path}/0.tar", tmp_path / "out"
    with pytest.raises(UserError, match="no Ray cluster answers"):
        prepare(source, out, shards=1, crew=units.Size(1, "127.0.0.1:1"))
    prepare(source, out, shards=2)
    assert sum(len(tar) for tar in contents(out)) == 3 * 4
