"""How a `:runlocal` run ends; reports of whole runs are drawn by the tests of the README and of staged runs."""

from helpers import CONFIG, make_encoder, save

from flip_jax.tools import report


def test_a_local_run_that_was_stopped_is_not_reported(tmp_path, capsys):
    save(make_encoder(), tmp_path / "checkpoints" / str(CONFIG.total_steps - 1))
    report.local(str(tmp_path), CONFIG)
    assert not capsys.readouterr().out and not (tmp_path / "report").exists()
