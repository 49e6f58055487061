"""Check that the checkpoints of a run are whole: every file has the size and the checksum that it was saved with.

Prints a line for each step, and ends with exit code 1 if one is damaged. Nothing is changed. A run that resumes checks
its newest step itself, and sets it aside if it is damaged.
"""

import argparse

from flip_jax import checkpoint, damage, manifest
from flip_jax.runtime import UserError

EXAMPLE = "flip check runs/b16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip check`."""
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a run, or of one of its steps")


def main(arguments: argparse.Namespace) -> int:
    """Check all steps and print what is found; return 1 if one is damaged."""
    folder = checkpoint.absolute(arguments.workdir)
    steps = [folder / "checkpoints" / str(step) for step in manifest.complete(folder / "checkpoints")]
    if not steps and ((folder / manifest.NAME).exists() or (folder / "state").is_dir()):
        steps = [folder]
    if not steps:
        raise UserError(f"{arguments.workdir} holds no checkpoint: expected a workdir with checkpoints/STEP, or a STEP")
    code = 0
    for step in steps:
        if problems := damage.problems(step):
            code = 1
            print(f"step {step.name}: damaged\n" + "\n".join(f"  {problem}" for problem in problems))
        elif (step / manifest.NAME).exists():
            print(f"step {step.name}: whole")
        else:
            print(f"step {step.name}: cannot be checked, because an earlier version saved it without checksums")
    return code
