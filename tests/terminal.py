"""Runs commands on a terminal, as a person does."""

import contextlib
import os
import pty
import select

from helpers import REPO, environment


def on_a_terminal(command, happened, env=None):
    """Runs a command on a terminal and types Ctrl-C when happened(output); returns its exit code and output."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(REPO)
        os.execvpe(command[0], command, env or environment())
    said = ""
    with contextlib.suppress(OSError):  # as reading ends when the program has ended
        while True:
            if happened and happened(said):
                os.write(terminal, b"\3")
                happened = None
            if select.select([terminal], [], [], 0.02)[0]:
                said += os.read(terminal, 65536).decode(errors="replace").replace("\r", "")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), said
