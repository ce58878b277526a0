# SPDX-License-Identifier: Apache-2.0
"""PID 1 of a sandbox in which something goes wrong at a chosen place.

Started like `sandbox_init.py`, with a JSON list of faults before the file of places. The product is not
changed for it: a named function is wrapped before the boot begins.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "src"), str(HERE.parents[2])]

from tests.integration.sandbox_init import prepare  # noqa: E402 - a script finds its own tree first
from trustme_init.boot import pid1, stages  # noqa: E402
from trustme_init.boot.console import Console  # noqa: E402
from trustme_init.linux.mount import MS_BIND, mount  # noqa: E402


def strike(fault: dict[str, Any]) -> None:
    """Do what the fault says: end this process, or fail."""
    match fault["do"]:
        case "kill":
            os.kill(os.getpid(), fault.get("signal", 9))
        case "value-error":
            raise ValueError("a value\nnobody expected")
        case "show-environment":
            raise ValueError(" ".join(sorted(os.environ)))
        case "os-error":
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        case "nothing":
            pass


def wrap(inner: Callable[..., Any], fault: dict[str, Any], work: Path) -> Callable[..., Any]:
    """Return `inner` with the fault before it, after it, or in its place; once unless it is to stay."""
    fired = work / f"fired-{fault['at']}"

    @functools.wraps(inner)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if fault.get("when") == "after":
            result = inner(*args, **kwargs)
        if fault.get("always") or not fired.exists():
            fired.touch()
            strike(fault)
            if fault["do"] == "nothing":
                return None
        return result if fault.get("when") == "after" else inner(*args, **kwargs)

    return faulty


def arm(fault: dict[str, Any], work: Path) -> None:
    """Put one fault in place: at a stage ("stage:NAME") or at "module:name" or "module:Class.name"."""
    module, _, name = fault["at"].partition(":")
    if module == "stage":
        table = [
            stage._replace(run=wrap(stage.run, fault, work)) if stage.name == name else stage
            for stage in stages.STAGES
        ]
        vars(stages)["STAGES"] = tuple(table)
    elif module == "file":
        mount(fault["source"], name, None, MS_BIND)
    else:
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        new = fault["value"] if fault["do"] == "set" else wrap(getattr(owner, last), fault, work)
        setattr(owner, last, new)


if __name__ == "__main__":
    faults, places = json.loads(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    machine = prepare(places)
    for each in faults:
        arm(each, Path(places["work"]))
    pid1.run(lambda: machine, Console(machine.console))
