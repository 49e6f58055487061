"""The arithmetic of the benchmarks, checked against figures computed by hand."""

import json

import pytest

from benchmarks import ablations, cpu_products, input_pipeline, own_step, pages, scale, tradeoff
from flip_jax import train

BASELINE = [(100.0, 10.0), (200.0, 20.0), (400.0, 30.0)]


@pytest.mark.parametrize(
    ("accuracy", "seconds"), [(10, 100), (15, 150), (20, 200), (27.5, 350), (30, 400), (30.1, None), (3, 100)]
)
def test_time_to_an_accuracy_is_interpolated_linearly(accuracy, seconds):
    assert tradeoff.time_to(BASELINE[::-1], accuracy) == seconds


def test_time_to_an_accuracy_is_its_first_crossing():
    assert tradeoff.time_to([(1.0, 0.0), (2.0, 8.0), (3.0, 4.0), (4.0, 9.0)], 6) == 1.75


def test_speed_up_is_measured_at_the_end_of_the_baseline():
    assert tradeoff.speed_up(BASELINE, [(60.0, 12.0), (120.0, 24.0), (240.0, 36.0)]) == pytest.approx(400 / 180)
    assert tradeoff.speed_up(BASELINE, [(60.0, 12.0), (120.0, 24.0)]) is None
    assert tradeoff.speed_up(BASELINE, []) is None


def test_speed_ups_of_the_means_and_of_each_seed():
    baseline = [(100.0, {0: 1.0, 1: 3.0}), (200.0, {0: 4.0, 1: 8.0})]
    masked = [(40.0, {0: 0.0, 1: 4.0}), (80.0, {0: 8.0, 1: 6.0})]
    # Means: 6 at 200 s; 2 at 40 s and 7 at 80 s, so 6 at 72 s. Seed 0: 4 at 60 s. Seed 1 never reaches 8.
    assert tradeoff.speed_ups(baseline, masked) == "2.78 (3.33, not reached)"


def test_runs_come_seed_by_seed_cheap_ones_first_and_finished_ones_never(monkeypatch):
    monkeypatch.setattr(
        tradeoff, "LENGTHS", {"mask 0": (100, 200), "mask 0.75": (200, 600), "mask 0.75, tuned": (600,)}
    )
    done = [{"result": "mask 0", "samples": 100, "seed": 0}, {"result": "mask 0.75", "samples": 600, "seed": 1}]
    assert tradeoff.missing(done, 2) == [
        ("mask 0.75", 200, 0),
        ("mask 0.75", 600, 0),
        ("mask 0", 200, 0),
        ("mask 0.75, tuned", 600, 0),  # after the run that it tunes
        ("mask 0.75", 200, 1),
        ("mask 0", 100, 1),
        ("mask 0", 200, 1),
        ("mask 0.75, tuned", 600, 1),
    ]


def test_a_tuned_run_costs_its_masked_part_and_the_tuning():
    of_sample = {"mask 0": 8.0, "mask 0.75": 2.0}
    assert tradeoff.cost("mask 0.75", 100, of_sample) == 200
    assert tradeoff.cost("mask 0.75, tuned", 100, of_sample) == 200 + 8 * tradeoff.TUNING


ROWS = {row.name: row for row in ablations.ROWS}
WHOLE, SMALL = "model.image.mask_ratio=0", "model.image.image_size=32,model.image.mask_ratio=0"
SECONDS = {"": 0.25, WHOLE: 1.0, SMALL: 0.5, "optim.ema=0.98": 0.3}


def test_runs_have_as_many_steps_as_the_same_time_allows():
    found = {name: ablations.steps(row, 75, SECONDS) for name, row in ROWS.items() if row.stages}
    assert found == {"mask 0.75, then 0": [240, 15], "32 px, then 64 px, both without mask": [120, 15]}
    assert ablations.steps(ablations.BASE, 75, SECONDS) == [300]
    assert ablations.steps(ROWS["constant, cooldown over 20 %"], 75, SECONDS) == [300]  # a schedule costs nothing
    assert ablations.steps(ROWS["constant without cooldown, EMA 0.98"], 75, SECONDS) == [250]
    assert len(ROWS) == len(ablations.ROWS)


def test_runs_at_equal_time_have_a_schedule_of_their_own_length(tmp_path):
    emoji = ablations.data_set("")
    staged = ablations.settings(ROWS["32 px, then 64 px, both without mask"], [120, 15], 1, emoji, tmp_path)
    parts = [(one.last, one.config.model.image, one.config) for one in train.plan(staged)]
    assert [(last, image.image_size, image.mask_ratio) for last, image, _ in parts] == [(120, 32, 0), (135, 64, 0)]
    assert [one.warmup_samples for *_, one in parts] == [1536, 192]
    assert [one.optim.base_learning_rate for *_, one in parts] == [2e-3, 5e-4] and staged.seed == 1
    cooled = ablations.settings(ROWS["constant, cooldown over 20 %"], [300], 0, emoji, tmp_path)
    assert (cooled.total_samples, cooled.optim.cooldown_samples, cooled.stages) == (38_400, 7_680, "")
    counted = ablations.settings(ROWS["rare ones, counted in all captions"], [300], 2, emoji, tmp_path)
    assert counted.model.text.mask_counts == str(tmp_path / "counts-emoji-2.json")
    photos = ablations.settings(ablations.BASE, [300], 0, ablations.data_set(str(tmp_path)), tmp_path)
    assert photos.data.train == f"webdataset:{tmp_path}/train-*.tar"
    assert photos.eval.classnames == f"{tmp_path}/classes.json" and not photos.eval.tasks
    for row in ablations.ROWS:  # all can be trained
        ablations.settings(row, [100] * len(row.parts), 0, emoji, tmp_path)


def test_the_gain_at_equal_time_is_seed_by_seed(tmp_path):
    def line(row, seed, top1):
        key = {"result": f"{row.group}: {row.name}", "data": "emoji", "seconds": 75, "seed": seed}
        return key | {"top1": top1, "top5": 2 * top1}

    times = {name: [seconds, seconds, 9.0] for name, seconds in SECONDS.items()}
    staged = ROWS["mask 0.75, then 0"]
    lines = [{"step_seconds": times, "data": "emoji", "device": "2 CPU cores"}]
    lines += [line(ablations.BASE, seed, top1) for seed, top1 in enumerate((10.0, 14.0, 12.0))]
    lines += [line(staged, 0, 11.0), line(staged, 2, 15.0)]
    ablations.show(lines, tmp_path / "page.md", 75)
    rows = [text.split(" | ")[2:] for text in (tmp_path / "page.md").read_text().splitlines() if " | " in text]
    assert rows[1:] == [
        ["250", "300", "12.00 ± 2.00", "24.00 ± 4.00", "", "3 |"],
        ["250 / 1000", "240 / 15", "13.00 ± 2.83", "26.00 ± 5.66", "2.00 ± 1.41", "2 |"],
    ]
    left = ablations.missing(lines, 3, "emoji", 75)
    assert len(left) == 3 * len(ROWS) - 5 and (staged, 1) in left and (staged, 0) not in left
    assert [seed for _, seed in left] == sorted(seed for _, seed in left)


def test_pages_keep_what_was_written_by_hand(tmp_path):
    path = tmp_path / "page.md"
    pages.write(path, "# Title\n\nold\n")
    path.write_text(path.read_text() + "\n## By hand\n\nstays\n\n## Also\n\nthis\n")
    pages.write(path, "# Title\n\nnew\n")
    assert path.read_text() == "# Title\n\nnew\n\n## By hand\n\nstays\n\n## Also\n\nthis\n"


def test_mean_and_spread():
    assert pages.mean_and_spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65"
    assert pages.mean_and_spread([1.0]) == "1.00"


def test_results_are_read_as_they_were_appended(tmp_path):
    pages.append(tmp_path / "results.jsonl", [{"a": 1}])
    pages.append(tmp_path / "results.jsonl", [{"b": 2.5}])
    assert pages.read(tmp_path / "results.jsonl") == [{"a": 1}, {"b": 2.5}]
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == {"b": 2.5}
    assert pages.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("mlp1, gradient of input", 2 * 6304 * 384 * 1536),
        ("weighted values", 2 * 32 * 6 * 197 * 197 * 64),
        (cpu_products.ATTENTION, 6 * 2 * 32 * 6 * 197 * 197 * 64),
    ],
)
def test_products_of_a_block_count_two_operations_per_multiplication(name, flops):
    assert cpu_products.flops(name) == flops


def test_products_have_the_sizes_of_the_cpu_model():
    image = own_step.MODELS["vit_s16"].image
    tokens = 1 + (image.image_size // image.patch_size) ** 2
    assert cpu_products.PER_HEAD == (32, image.heads, tokens, image.width // image.heads)


def test_scale_page_is_continued_after_an_interruption(tmp_path):
    path, asked = tmp_path / "docs" / "scale.md", []

    def measure(recipe, topology, settings):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append((recipe, topology, settings["model.remat"], settings["mesh.fsdp"]))
        gib = {"dots": 7, "names": 3, "full": 1}[settings["model.remat"]]
        fits = settings["model.remat"] == "full"
        memory = {"peak": gib * 2**30, "limit": 2**31, "spare": 1 - gib / 2}
        result = {"devices": 8, "mask_ratio": 0.5, "memory": memory, "fits": fits, "compile_seconds": 1.0}
        result["state_bytes"] = 2**30
        bound = {"seconds": {}, "least_seconds": 0.1, "bound_by": "links", "most_mfu": 0.4, "collectives": []}
        return result | (bound if fits else {})

    with pytest.raises(KeyboardInterrupt):
        scale.write_table(path, measure)
    # "dots" needs 5 GiB too much; sharding the state of 1 GiB and its gradients can free only 2.
    tried = (("dots", 1), ("names", 1), ("names", 8), ("full", 1))
    assert asked == [("flip_l16", "v3:16x8", *step) for step in tried]
    assert "| flip_l16 | v3-256 | 8 | 0.5 | remat full | yes | 1.0 | 2.00 | 100 | links | 40% |" in path.read_text()
    path.write_text(path.read_text() + "\n## What follows\n\nstays\n")
    asked = [None] * 5
    scale.write_table(path, measure)
    assert path.read_text().endswith(" |\n\n## What follows\n\nstays\n")
    assert ("flip_l16", "v3:16x8", "dots", 1) not in asked and ("clip_b16", "v5e:16x16", "full", 1) in asked
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| flip_", "| clip_"))]
    assert len(rows) == len(scale.ROWS) == 43


def test_cores_that_a_host_needs_follow_from_the_steps_of_the_scale_page():
    page = """
| recipe | slice | devices | mask | settings | fits | GiB | of | step, ms | bound |
|---|---|---|---|---|---|---|---|---|---|
| flip_b16 | v3-256 | 256 | 0.5 | remat dots | yes | 7.1 | 15.48 | 256 | compute |
| flip_b16 | v5e-256 | 256 | 0.5 | remat dots | no | 7.1 | 15.48 | 1 | compute |
| flip_b16 | v6e-256 | 256 | 0.5 | remat dots | yes | 7.1 | 15.48 | 64 | compute |
| flip_b16 | v6e-512 | 512 | 0.5 | remat dots | yes | 7.1 | 15.48 | 64 | compute |
"""
    # v3: 65,536 images in 0.256 s on 256 devices, of which a host has eight; v6e: in 0.064 s, and a host has four.
    table = input_pipeline.cores_table(page, 900.0, 10_000.0)
    assert (
        table.splitlines()[2]
        == "| `flip_b16`, mask 0.5 | 8,000: 9 |  |  |  | 16,000: 18 (more than one process hands on) |  |"
    )
