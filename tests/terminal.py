"""Runs commands on a terminal, as a person does."""

import contextlib
import os
import pty
import select
import subprocess
import sys

from helpers import REPO, environment

# Makes the terminal that is standard input the one whose Ctrl-C the command gets.
CONTROLLED = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


def on_a_terminal(command, happened, env=None):
    """Runs a command on a terminal and types Ctrl-C when happened(output); returns its exit code and output."""
    terminal, end = pty.openpty()
    how = {"cwd": REPO, "env": env or environment(), "start_new_session": True}
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLED, *command], stdin=end, stdout=end, stderr=end, **how
    ) as process:
        os.close(end)
        said = ""
        with contextlib.suppress(OSError):  # as reading ends when the program has ended
            while True:
                if happened and happened(said):
                    os.write(terminal, b"\3")
                    happened = None
                if select.select([terminal], [], [], 0.02)[0]:
                    said += os.read(terminal, 65536).decode(errors="replace").replace("\r", "")
    os.close(terminal)
    return process.returncode, said
