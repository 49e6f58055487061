"""Run the command line: `python -m flip_jax NAME ...` is the same as `flip NAME ...`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("flip_jax.tools", run_name="__main__", alter_sys=True)
