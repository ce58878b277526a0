# SPDX-License-Identifier: Apache-2.0
"""Run a program in a container: EXEC_OUTPUT as it comes, then EXEC_END; input by EXEC_INPUT meanwhile.

- The program lives as long as the client's interest: a client that leaves, or ends its side, ends it.
- Output waits for the client to take it, and so in the end does the program.
- An empty EXEC_INPUT is the end of input. To anything else the original does nothing.
- The gate is asked about each input; when provisioning is completed, so is what was run in it.
"""

from __future__ import annotations

from typing import Final

from trustme_init.control.execution import Execution
from trustme_init.control.handlers.reply import (
    Context,
    Converse,
    Replies,
    named_uuid,
    refused,
)
from trustme_init.errors import CompartmentRefusal, Refusal
from trustme_init.proto.container_pb2 import ContainerState
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController

ENTERABLE: Final[frozenset[int]] = frozenset({ContainerState.BOOTING, ContainerState.RUNNING})


def execute(context: Context) -> Replies:
    """CONTAINER_EXEC_CMD: `exec_command`, looked for in PATH, with `exec_args`, its own name first."""
    mode = context.state.mode()
    try:
        execution = _begin(context)
    except Refusal as refusal:
        yield refused(refusal, DaemonToController.CMD_FAILED)
        return
    overflow: list[Refusal] = []

    def accept(request: Request) -> bool:
        mine = named_uuid(request) == named_uuid(context.request)
        if request.command != Request.CONTAINER_EXEC_INPUT or not mine:
            return False
        try:
            execution.write(request.exec_input.encode())
        except Refusal as refusal:
            overflow.append(refusal)
            execution.interrupt()
        return True

    try:
        while not (execution.over or overflow or context.state.mode() is not mode):
            output = execution.read()
            if output:
                yield DaemonToController(code=DaemonToController.EXEC_OUTPUT, exec_output=output)
            yield Converse(execution.when_ready, accept)
        for failure in ([execution.failure] if execution.failure else overflow)[:1]:
            yield refused(failure, DaemonToController.CMD_FAILED)
            return
        yield _end(execution)
    finally:
        execution.close()


def unexpected_input(_context: Context) -> Replies:
    """CONTAINER_EXEC_INPUT on a connection on which that container runs nothing."""
    refusal = CompartmentRefusal(
        "nothing-runs",
        "there is no program on this connection to take input",
        remedy="send input on the connection that asked for the program, before it ends",
    )
    yield refused(refusal, DaemonToController.CMD_FAILED)


def _begin(context: Context) -> Execution:
    from trustme_init.compartments.exec import enter

    uuid = named_uuid(context.request)
    compartment = None if uuid is None else context.state.compartment(uuid)
    if compartment is None or compartment.running is None or compartment.state not in ENTERABLE:
        raise CompartmentRefusal(
            "not-running",
            "the container does not run",
            evidence="unknown" if compartment is None else compartment.state.name,
            remedy="start it, or thaw it",
        )
    request = context.request
    entry = enter(
        compartment.running,
        compartment.spec,
        request.exec_command,
        request.exec_args,
        terminal=request.exec_pty,
    )
    return Execution(context.state.loop, entry)


def _end(execution: Execution) -> DaemonToController:
    message = DaemonToController(code=DaemonToController.EXEC_END)
    status = execution.status
    if not execution.ended:
        message.exec_end_reason = "provisioning was completed"
    elif status is None:
        message.exec_end_reason = "ended"
    else:
        message.exec_status = status
        message.exec_end_reason = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
    return message
