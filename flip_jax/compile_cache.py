"""Compiled programs outlive the process: a run that starts again, or a tool used twice, does not compile twice."""

import pathlib

import jax

FOLDER = pathlib.Path.home() / ".cache" / "flip_jax" / "compiled"


def enable() -> None:
    """Keeps programs that took over a second to compile in `FOLDER`, for command-line programs.

    JAX_COMPILATION_CACHE_DIR names another folder (a gs:// one serves all hosts of a pod), and
    JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(FOLDER))
