"""Records are dealt to shards once each and evenly."""

import itertools
import random

from flip_jax.tools import spill


def test_every_record_goes_to_one_shard_and_sizes_differ_by_one():
    rng = random.Random(0)
    for _ in range(200):
        blocks, shards = [], rng.randint(1, 9)
        for unit in range(rng.randint(1, 6)):
            first = 0
            for _ in range(rng.randint(0, 3)):
                blocks.append(spill.Block(unit, first, rng.randint(0, 25)))
                first += blocks[-1].count
        dealt = [[(b.unit, i) for b, some in spill.deal(blocks, shards, s) for i in some] for s in range(shards)]
        everything = [(b.unit, b.first + i) for b in blocks for i in range(b.count)]
        assert sorted(itertools.chain(*dealt)) == sorted(everything)
        sizes = [len(some) for some in dealt]
        assert max(sizes) - min(sizes) <= 1
