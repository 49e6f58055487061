"""The tool that compiles ahead of time: its figures against those worked out by hand, its audit, its exit codes."""

import json
import types

import jax
import pytest

from flip_jax.tools import aot, hlo

RECIPE = """
import dataclasses
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dataclasses.asdict(helpers.CONFIG))
"""
REFUSALS = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (69.23G) exceeds available HBM (15.48G). HLO module: jit_step.",
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. Used 69.23G of 15.48G hbm. "
    "Exceeded hbm capacity by 53.75G.",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny model as a recipe."""
    path = tmp_path_factory.mktemp("recipe") / "tiny_recipe.py"
    path.write_text(RECIPE)
    return f"--config={path}"


@pytest.fixture
def run(recipe, monkeypatch, capsys):
    """A function of flags: the exit code, what went to stdout, and what to stderr."""
    # What the tool sets is put back afterwards.
    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "")

    def run(*flags):
        code = aot.main(["aot", recipe, *flags])
        return code, *capsys.readouterr()

    return run


PARAMS = 61_025  # 4 blocks of 12 w^2 + 13 w, w = 32; patches 6,176, positions 544 + 256, words 2,048, ...
EMBED = 8 * 2 * (8 * 8 * 3) * 32  # FLOPs of a picture's 8 visible patches
TOWERS = sum(2 * tokens * (24 * 32**2 + 4 * tokens * 32) for tokens in (9, 8))  # of the blocks, forward
PROJECT = 2 * (32 + 32) * 16
# A device's 2 pairs, forward and backward; the pixels need no gradient. The loss compares 2 rows with 16 columns in two
# directions, and once more for the backward pass.
FLOPS = 2 * (2 * EMBED + 3 * TOWERS + 3 * PROJECT) + 2 * 4 * (2 * 2 * 16 * 16)


def sent(result):
    return {(c["op"], *c["axes"]): (c["count"], c["bytes"]) for c in result["collectives"]}


def test_data_parallel_step(run):
    code, out, err = run("--topology=cpu:8", "--json")
    result = json.loads(out)
    assert code == 0 and result["fits"]
    assert "compiling" in err
    assert (result["devices"], result["global_batch_size"], result["mask_ratio"]) == (8, 16, 0.5)
    # f32 parameters, two moments and three counters, on every device, and its two rows of the batch.
    assert result["memory"]["arguments"] == 4 * (3 * PARAMS + 3) + 2 * (32 * 32 * 3 + 4 * 8)
    assert result["flops"] == pytest.approx(FLOPS, rel=0.001)
    # An audit: this is all that a step may send. The embeddings of both towers, the way back of their gradients, and
    # the gradients of all but the fixed positions (544), with the loss; those of each block's layer in one piece.
    assert sent(result) == {
        ("all-gather", "data"): (2, 2 * 16 * 16 * 4),
        ("reduce-scatter", "data"): (2, 2 * 16 * 16 * 4),
        ("all-reduce", "data"): (2 * 2 + 1, 4 * (PARAMS - 544 + 3)),
    }
    assert sum(c["wire_bytes"] for c in result["collectives"]) == 7 / 8 * (2 * 2048 + 2 * 4 * (PARAMS - 544 + 3))


def test_fully_sharded_step(run):
    code, out, _ = run("--topology=cpu:8", "--json", "--config.mesh.fsdp=2", "--config.model.remat=full")
    result = json.loads(out)
    assert code == 0 and result["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert result["memory"]["arguments"] < 0.6 * 4 * 3 * PARAMS
    # Every block is computed again, but for its last product.
    assert result["flops"] == pytest.approx(FLOPS + 2 * (TOWERS - 2 * (9 + 8) * 8 * 32**2), rel=0.001)
    assert sent(result) == {
        # As above, over all devices.
        ("all-gather", "data", "fsdp"): (2, 2048),
        ("reduce-scatter", "data", "fsdp"): (2, 2048),
        # Each block's six kernels, forward and again backward; patches, words and projections once, some as gradients.
        ("all-gather", "fsdp"): (54, 430_592),
        # Kernels' gradients: within fsdp, then the parts over data (a TPU's compiler makes the first a reduce-scatter).
        ("all-reduce", "fsdp"): (5, 225_280),
        ("all-reduce", "data"): (5, 112_640),
        ("all-reduce", "data", "fsdp"): (5, 16_656),
        ("all-to-all", "fsdp"): (2, 512),  # the pieces of cls and of the text's first position
    }


def test_a_step_in_microbatches_gathers_no_more(run):
    """Embeddings go around once, whatever is encoded twice; gradients are summed after each part."""
    code, out, _ = run("--topology=cpu:8", "--json", "--config.microbatches=2", "--config.model.remat=auto")
    result = json.loads(out)
    assert code == 0 and result["remat"] == "none"
    found = sent(result)
    assert found["all-gather", "data"] == (2, 2 * 16 * 16 * 4)
    assert found["reduce-scatter", "data"] == (2, 2 * 16 * 16 * 4)
    assert set(found) == {("all-gather", "data"), ("reduce-scatter", "data"), ("all-reduce", "data")}
    assert found["all-reduce", "data"][1] <= 2.01 * 4 * PARAMS
    # The towers' forward pass once more, and no other work.
    assert result["flops"] == pytest.approx(FLOPS + 2 * (EMBED + TOWERS + PROJECT), rel=0.001)


def test_what_cannot_fit_by_far_is_refused_uncompiled(run, monkeypatch):
    monkeypatch.setitem(aot.CHIPS, "cpu", aot.Chip(1e-6, 1, 1))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: pytest.fail("compiled"))
    code, out, _ = run("--topology=cpu:8", "--json", "--config.model.remat=auto")
    result = json.loads(out)
    assert code == 1 and not result["fits"] and result["remat"] == "full" and len(result["largest"]) <= 5


@pytest.mark.parametrize("message", REFUSALS, ids=("early", "late"))
def test_refusal(run, monkeypatch, message):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    code, out, _ = run("--topology=cpu:8", "--json")
    result = json.loads(out)
    assert code == 1 and not result["fits"]
    assert result["memory"]["peak"] == pytest.approx(69.23 * 2**30)
    assert result["memory"]["limit"] == pytest.approx(15.48 * 2**30)
    assert result["try"] == [
        "--config.mesh.fsdp=8",
        "--config.model.remat=dots",
        "--config.model.remat=names",
    ]
    # The hidden units of the image tower's two blocks: 2 rows of 9 tokens and 128 values, saved several times.
    count, array = result["largest"][0]["array"].split(" x ")
    assert array == "f32[2,16,9,128]"
    assert result["largest"][0]["bytes"] == int(count) * 4 * 2 * 2 * 9 * 128
    code, out, _ = run("--topology=cpu:8")
    assert code == 1
    assert "69.23 GiB" in out and "--config.mesh.fsdp=8" in out


def test_a_program_that_cannot_be_read(run, monkeypatch):
    sizes = {"argument": 5, "temp": 4, "generated_code": 3, "output": 2, "alias": 1}

    class Unreadable:
        def memory_analysis(self):
            return types.SimpleNamespace(**{f"{name}_size_in_bytes": size * 2**20 for name, size in sizes.items()})

    monkeypatch.setattr(aot, "_compile", lambda lowered, mesh: (Unreadable(), None))
    code, out, err = run("--topology=cpu:8")
    assert code == 0 and "13.00 MiB" in out and "memory only" in err
    monkeypatch.setitem(aot.CHIPS, "cpu", aot.Chip(0.01, 1, 1))
    code, out, _ = run("--topology=cpu:8")
    assert code == 1 and "of 10.24 MiB" in out and "--config.mesh.fsdp=8" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "both --config and --topology"),
        (["--topology=big"], "GENERATION:SHAPE"),
        (["--topology=cpu:4x2"], "GENERATION:SHAPE"),
        (["--topology=0*v5e:2x2"], "GENERATION:SHAPE"),
        (["--topology=cpu:16"], "8 devices"),
        (["--topology=cpu:8", "--config.nope=1"], "nope"),
        (["--topology=cpu:8", "--nope"], "nope"),
        (["--topology=cpu:8", "nope"], "nope"),
        (["--topology=cpu:8", "--config.global_batch_size=20"], "global_batch_size 20 does not divide"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "config.mesh"),
        (["--topology=cpu:8", "--config.model.remat=some"], "config.model.remat"),
    ],
)
def test_wrong_usage(run, flags, message):
    code, out, err = run(*flags)
    assert code == 2 and not out
    assert message in err and "usage: " in err


def test_without_the_tpu_compiler(run, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("--topology=v5e:2x4")
    assert code == 2 and "pip install libtpu" in err


@pytest.mark.parametrize("topology, kind", [("v5e:2x4", "TPU v5 lite"), ("v5p:2x2x2", "TPU v5")])
def test_a_real_tpu_compiler(run, topology, kind):
    pytest.importorskip("libtpu")
    code, out, _ = run(f"--topology={topology}", "--json", "--config.model.dtype=bfloat16")
    result = json.loads(out)
    assert code == 0 and result["devices"] == 8 and result["device_kind"] == kind
    assert 0.99 < result["memory"]["spare"] < 1
    assert result["flops"] == pytest.approx(FLOPS, rel=0.02)
    assert {c["op"] for c in result["collectives"]} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert result["least_seconds"] == max(result["seconds"].values())


@pytest.mark.slow
def test_two_slices(run):
    """FSDP gathers within a slice; between them go embeddings, their gradients, and the gradients of the parameters."""
    pytest.importorskip("libtpu")
    code, out, _ = run("--topology=2*v5e:2x2", "--json", "--config.mesh.fsdp=4", "--config.model.dtype=bfloat16")
    result = json.loads(out)
    assert code == 0 and result["devices"] == 8 and result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    found = sent(result)
    assert {axis for _, *axes in found for axis in axes} == {"fsdp", "slices"} and ("all-gather", "fsdp") in found
    assert {op: found[op, axis][0] for op, axis in found if axis == "slices" and op != "all-reduce"} == {
        "all-gather": 2,
        "reduce-scatter": 2,
    }
    assert found["all-gather", "slices"][1] == 2 * 4 * 16 * 4  # the two rows of a device and of its like, f32
    assert 4 * PARAMS / 4 < found["all-reduce", "slices"][1] < 4 * PARAMS  # a part each, and some vectors whole


LOOP = """HloModule test
%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)S(1)} constant(24)
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[]{:S(1)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:S(1)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %w = f32[8,8]{1,0:S(1)} constant({...})
  %y = f32[4,8]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i.1, %y)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_loops_count_as_often_as_they_run():
    module = hlo.Module(LOOP)
    assert module.flops()[0] == 24 * 2 * 4 * 8 * 8
    assert module.hbm_bytes() == 24 * 2 * (4 * 8 * 4)  # the weight lies in the chip's own memory, S(1)


IN_PLACE = """HloModule test
%fused (all: f32[24,8], i: s32[], one: f32[24,8]) -> f32[24,8] {
  %all = f32[24,8]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %one = f32[24,8]{1,0} parameter(2)
  %slice = f32[1,8]{1,0} dynamic-slice(%one, %i, %i), dynamic_slice_sizes={1,8}
  %update = f32[24,8]{1,0} dynamic-update-slice(%all, %slice, %i, %i)
  ROOT %t = (f32[24,8]{1,0}, f32[1,8]{1,0}) tuple(%update, %slice)
}

ENTRY %main (all: f32[24,8], i: s32[], one: f32[24,8]) -> f32[24,8] {
  %all = f32[24,8]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %one = f32[24,8]{1,0} parameter(2)
  ROOT %f = (f32[24,8]{1,0}, f32[1,8]{1,0}) fusion(%all, %i, %one), kind=kLoop, calls=%fused
}
"""


def test_stacks_of_layers_count_what_is_read_and_written_of_them():
    assert hlo.Module(IN_PLACE).hbm_bytes() == 3 * 8 * 4  # the slice is read once and written twice


@pytest.mark.parametrize("precision, passes", [("", 1), (", operand_precision={highest,highest}", 6)])
def test_batched_product_as_the_tpu_writes_it(precision, passes):
    text = (
        "ENTRY %main (a: bf16[1]) -> bf16[1] {\n"
        "  %a = bf16[256,99,16,64]{3,2,1,0} parameter(0)\n"
        "  %b = bf16[256,99,16,64]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[256,16,99,99]{2,3,1,0:T(8,128)} convolution(%a, %b), "
        "window={size=256x16 stride=255x15 lhs_dilate=256x16}, dim_labels=0b1f_0o1i->01bf" + precision + "\n}\n"
    )
    flops, weighted = hlo.Module(text).flops()
    assert flops == 2 * 256 * 16 * 99 * 99 * 64
    assert weighted == passes * flops


@pytest.mark.parametrize(
    "text",
    [
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}",
        "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use_global_device_ids=true",
        "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={1}",
        "source_target_pairs={{0,4},{1,5},{2,6},{3,7}}",
    ],
)
def test_groups_of_devices(text):
    assert sorted(map(sorted, hlo.groups(text, 8).tolist())) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_table_goes_on_where_it_stopped(tmp_path):
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
        aot.write_table(path, measure)
    # 5 GiB too many of "dots" are more than sharding the state of 1 GiB and its gradients can help.
    tried = (("dots", 1), ("names", 1), ("names", 8), ("full", 1))
    assert asked == [("flip_l16", "v3:16x8", *step) for step in tried]
    assert "| flip_l16 | v3-256 | 8 | 0.5 | remat full | yes | 1.0 | 2.00 | 100 | links | 40% |" in path.read_text()
    path.write_text(path.read_text() + "\n## What follows\n\nstays\n")
    asked = [None] * 5
    aot.write_table(path, measure)
    assert path.read_text().endswith(" |\n\n## What follows\n\nstays\n")
    assert ("flip_l16", "v3:16x8", "dots", 1) not in asked and ("clip_b16", "v5e:16x16", "full", 1) in asked
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| flip_", "| clip_"))]
    assert len(rows) == len(aot.ROWS) == 36


SLICED = """HloModule test
%fetch (all: f32[64,8]) -> f32[16,8] {
  %all = f32[64,8]{1,0} parameter(0)
  ROOT %part = f32[16,8]{1,0:S(1)} slice(%all), slice={[0:16], [0:8]}
}

ENTRY %main (a: f32[64,8]) -> f32[16,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %start = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%fetch
  %done = f32[16,8]{1,0:S(1)} async-done(%start)
  ROOT %slice = f32[8,8]{1,0} slice(%a), slice={[8:16], [0:8]}
}
"""


def test_slices_count_what_they_move():
    # One is copied to the chip's own memory, the other from and to the main one.
    assert hlo.Module(SLICED).hbm_bytes() == 16 * 8 * 4 + 2 * 8 * 8 * 4
