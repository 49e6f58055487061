"""The process: what it refuses, its compilation cache, and the processes it works with."""

import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

COMPILED = pathlib.Path.home() / ".cache" / "flip_jax" / "compiled"


class UserError(ValueError):
    """Something that the user can put right: the message says what was given, what is allowed and the remedy."""

    exit_code = 1


def run(function: Callable[..., Any], *arguments: Any) -> int:
    """Calls a command's function and returns the exit code; a `UserError` is printed, others keep their trace."""
    try:
        return function(*arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


def enable_compile_cache() -> None:
    """Keeps programs that took over a second to compile in `COMPILED`, so that they are compiled once.

    JAX_COMPILATION_CACHE_DIR names another folder (a gs:// one serves all hosts of a pod), and
    JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
