# SPDX-License-Identifier: Apache-2.0
"""What a build takes from the checkout besides its files."""

from __future__ import annotations

import functools
import subprocess


@functools.cache
def commit_epoch(directory: str) -> str:
    """Return the time of the checkout's last commit (seconds since 1970), "" where git does not know it.

    As build date it is the same in every build of the same commit, whenever and wherever that is made.
    """
    command = ["git", "-c", "safe.directory=*", "-C", directory, "log", "-1", "--format=%ct"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
