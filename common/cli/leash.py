"""Starts a command that ends when its parent does: `python leash.py PARENT_PID COMMAND...`.

Linux sends the signal; it survives exec, so the command itself need not know. Standard library only, and run by
path, so that it costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):  # it ended before the line above
        sys.exit(f"the parent process {parent} is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
