"""`flip aot`: its figures against arithmetic by hand, an audit of the collectives, and its exit codes."""

import json
import types

import jax
import pytest

from flip_jax.tools import __main__ as flip
from flip_jax.tools import aot

RECIPE = """
import dataclasses
import helpers
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
    """Write the tiny model as a recipe and return its option."""
    path = tmp_path_factory.mktemp("recipe") / "tiny_recipe.py"
    path.write_text(RECIPE)
    return f"--config={path}"


@pytest.fixture
def run(recipe, monkeypatch, capsys):
    """Return a function of options that runs the command and returns its exit code, stdout and stderr."""
    # monkeypatch restores the variables that the tool sets.
    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "")

    def run(*flags):
        try:
            code = flip.main(["aot", recipe, *flags])
        except SystemExit as stopped:  # argparse refuses the options
            code = stopped.code
        return code, *capsys.readouterr()

    return run


PARAMS = 61_025  # 4 blocks of 12 w^2 + 13 w, w = 32; patches 6,176, positions 544 + 256, words 2,048, ...
EMBED = 8 * 2 * (8 * 8 * 3) * 32  # FLOPs of an image's 8 visible patches
TOWERS = sum(2 * tokens * (24 * 32**2 + 4 * tokens * 32) for tokens in (9, 8))  # blocks, forward
PROJECT = 2 * (32 + 32) * 16
# Each device has 2 pairs, forward and backward; pixels need no gradient. The loss compares 2 rows with 16 columns in
# two directions, and again in the backward pass.
FLOPS = 2 * (2 * EMBED + 3 * TOWERS + 3 * PROJECT) + 2 * 4 * (2 * 2 * 16 * 16)


def test_a_frozen_image_tower_has_no_backward_pass_and_an_average_is_one_copy_more(run):
    """Freezing leaves the tower's forward pass, and of its projection the gradient by the kernel alone."""
    options = ("--config.optim.image_rate=0", "--config.optim.ema=0.9")
    result = json.loads(run("--topology=cpu:8", "--json", *options)[1])
    image, text = (2 * tokens * (24 * 32**2 + 4 * tokens * 32) for tokens in (9, 8))
    flops = 2 * (EMBED + image + 3 * text + (2 + 3) * PROJECT / 2) + 2 * 4 * (2 * 2 * 16 * 16)
    assert result["flops"] == pytest.approx(flops, rel=0.001)
    assert result["model_flops"] == 2 * (EMBED + image + 3 * text + 3 * PROJECT)
    # Two blocks, patches, positions of 17, cls, and the last norm.
    tower = 2 * (12 * 32**2 + 13 * 32) + 8 * 8 * 3 * 32 + 32 + 17 * 32 + 32 + 64
    assert result["memory"]["arguments"] == 4 * (4 * PARAMS - 2 * tower + 3) + 2 * (32 * 32 * 3 + 4 * 8)


def sent(result):
    return {(c["op"], *c["axes"]): (c["count"], c["bytes"]) for c in result["collectives"]}


def test_data_parallel_step(run):
    code, out, err = run("--topology=cpu:8", "--json")
    result = json.loads(out)
    assert code == 0 and result["fits"]
    assert "compiling" in err
    assert (result["devices"], result["global_batch_size"], result["mask_ratio"]) == (8, 16, 0.5)
    # Every device holds f32 parameters, two moments, three counters and its two rows of the batch.
    assert result["memory"]["arguments"] == 4 * (3 * PARAMS + 3) + 2 * (32 * 32 * 3 + 4 * 8)
    assert result["flops"] == pytest.approx(FLOPS, rel=0.001)
    # An audit of all that a step may send: the embeddings of both towers, their gradients on the way back, and the loss
    # with the gradients of all parameters except the fixed positions (544), which are summed per stacked layer.
    assert sent(result) == {
        ("all-gather", "data"): (2, 2 * 16 * 16 * 4),
        ("reduce-scatter", "data"): (2, 2 * 16 * 16 * 4),
        ("all-reduce", "data"): (2 * 2 + 1, 4 * (PARAMS - 544 + 2)),
    }
    assert sum(c["wire_bytes"] for c in result["collectives"]) == 7 / 8 * (2 * 2048 + 2 * 4 * (PARAMS - 544 + 2))


def test_fully_sharded_step(run):
    code, out, _ = run("--topology=cpu:8", "--json", "--config.mesh.fsdp=2", "--config.model.remat=full")
    result = json.loads(out)
    assert code == 0 and result["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert result["memory"]["arguments"] < 0.6 * 4 * 3 * PARAMS
    # Every block is recomputed, except for its last product.
    assert result["flops"] == pytest.approx(FLOPS + 2 * (TOWERS - 2 * (9 + 8) * 8 * 32**2), rel=0.001)
    assert sent(result) == {
        # As in data-parallel training, over all devices.
        ("all-gather", "data", "fsdp"): (2, 2048),
        ("reduce-scatter", "data", "fsdp"): (2, 2048),
        # Each block's six kernels, forward and again backward; patches, words and projections once or as gradients.
        ("all-gather", "fsdp"): (54, 430_592),
        # Gradients of kernels: over fsdp, then their parts over data (on TPUs the first is a reduce-scatter).
        ("all-reduce", "fsdp"): (5, 225_280),
        ("all-reduce", "data"): (5, 112_640),
        ("all-reduce", "data", "fsdp"): (5, 16_652),
        ("all-to-all", "fsdp"): (2, 512),  # the parts of cls and of the text's first position
    }


def test_microbatches_gather_embeddings_only_once(run):
    """Microbatches are encoded twice, but embeddings are gathered once; gradients are summed after each."""
    code, out, _ = run("--topology=cpu:8", "--json", "--config.microbatches=2", "--config.model.remat=auto")
    result = json.loads(out)
    assert code == 0 and result["remat"] == "none"
    found = sent(result)
    assert found["all-gather", "data"] == (2, 2 * 16 * 16 * 4)
    assert found["reduce-scatter", "data"] == (2, 2 * 16 * 16 * 4)
    assert set(found) == {("all-gather", "data"), ("reduce-scatter", "data"), ("all-reduce", "data")}
    assert found["all-reduce", "data"][1] <= 2.01 * 4 * PARAMS
    # One more forward pass of the towers, and no other work.
    assert result["flops"] == pytest.approx(FLOPS + 2 * (EMBED + TOWERS + PROJECT), rel=0.001)


def test_steps_far_too_large_are_refused_without_compiling(run, monkeypatch):
    monkeypatch.setitem(aot.CHIPS, "cpu", aot.Chip(1e-6, 1, 1))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: pytest.fail("compiled"))
    code, out, _ = run("--topology=cpu:8", "--json", "--config.model.remat=auto")
    result = json.loads(out)
    assert code == 1 and not result["fits"] and result["remat"] == "full" and len(result["largest"]) <= 5


@pytest.mark.parametrize("message", REFUSALS, ids=("early", "late"))
def test_refusals_of_the_compiler_are_read(run, monkeypatch, message):
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
    # The hidden units of the image tower's two blocks: 2 rows of 9 tokens and 128 values, saved more than once.
    count, array = result["largest"][0]["array"].split(" x ")
    assert array == "f32[2,16,9,128]"
    assert result["largest"][0]["bytes"] == int(count) * 4 * 2 * 2 * 9 * 128
    text = aot.describe(result)
    assert "69.23 GiB" in text and "--config.mesh.fsdp=8" in text


def test_without_program_text_memory_is_still_reported(run, monkeypatch):
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
        ([], "required: --topology"),
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
    assert message in err and "error: " in err


def test_without_the_tpu_compiler(run, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("--topology=v5e:2x4")
    assert code == 2 and "needs the TPU compiler: pip install -e" in err


@pytest.mark.parametrize(
    "topology, kind", [("v5e:2x4", "TPU v5 lite"), ("v5p:2x2x2", "TPU v5"), ("tpu7x:2x2x1", "TPU7x")]
)
def test_the_tpu_compiler(run, topology, kind):
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
    """Parameters are gathered within a slice; embeddings, their gradients and parameters' gradients cross slices."""
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
    assert found["all-gather", "slices"][1] == 2 * 4 * 16 * 4  # f32: two rows of a device and two of its counterpart
    assert (
        4 * PARAMS / 4 < found["all-reduce", "slices"][1] < 4 * PARAMS
    )  # shards of the kernels, and some whole vectors


def test_every_stage_is_reported_and_which_is_the_tightest(run):
    code, out, _ = run(
        "--topology=cpu:8",
        "--json",
        "--config.stages=160;160:model.image.mask_ratio=0;160:model.image.image_size=16,global_batch_size=8",
    )
    result = json.loads(out)
    assert code == 0 and result["fits"] and result["tightest"] == "2/3"
    whole, large, small = result["stages"]  # the first is the step of `test_data_parallel_step`
    assert [(one["stage"], one["image_size"], one["mask_ratio"]) for one in result["stages"]] == [
        ("1/3", 32, 0.5),
        ("2/3", 32, 0.0),
        ("3/3", 16, 0.5),
    ]
    assert whole["global_batch_size"] == large["global_batch_size"] == 2 * small["global_batch_size"] == 16
    assert whole["memory"]["arguments"] == 4 * (3 * PARAMS + 3) + 2 * (32 * 32 * 3 + 4 * 8)
    assert large["memory"]["peak"] > whole["memory"]["peak"] > small["memory"]["peak"]
    text = aot.describe(result)
    assert text.startswith("stage           1/3, 32 px\n") and "\n\nstage           3/3, 16 px\n" in text
    assert text.splitlines()[-1].startswith("tightest        stage 2/3, ")
