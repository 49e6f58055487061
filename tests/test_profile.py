"""Traces of chosen steps, as the tools that show them read them."""

import gzip
import json

import jax
import pytest
from helpers import arguments, run_command


@pytest.mark.slow
def test_a_trace_of_the_chosen_steps_is_left_and_can_be_read(shards, tmp_path):
    done = run_command(
        [*arguments(shards, tmp_path, total_samples=160, **{"log.every_steps": 1}), "--config.profile=(2,3)"]
    )
    assert "step 5/5" in done.stdout
    folder = tmp_path / "profile" / "process_0"
    [binary] = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(binary)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [2, 3]
    assert any("jit_step" in str(dict(event.stats).get("hlo_module", "")) for event in events)  # the work itself
    [text] = folder.glob("plugins/profile/*/*.trace.json.gz")
    shown = json.loads(gzip.decompress(text.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in shown if event.get("name") == "train"] == ["2", "3"]
