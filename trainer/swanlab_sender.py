"""Hands a run's figures to SwanLab, in a process of its own: whatever that package or the network do, training goes on.

Standard input gives json lines: {"folder", "init"} with the arguments of swanlab.init, then {"values", "step"} for
every point, last {"summary"}. When they end without a summary, training died and the run counts as crashed. What goes wrong
here ends the process with code 1, after one line on standard output that says why. No torch in here: it starts at once.
"""

import json
import os
import select
import sys
import threading
import time
from typing import TextIO

ORPHAN_SECONDS = 300.0  # for the last points, once training has ended; a trainer that still lives ends this earlier


def main() -> None:
    """Reads to the end of standard input; ends the process."""
    report, code = os.fdopen(os.dup(1), "w"), 0
    os.dup2(2, 1)  # the package prints
    threading.Thread(target=end_with_training, daemon=True).start()
    try:
        send(sys.stdin)
    except BaseException as error:  # its login exits the process, its settings raise all kinds
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=report, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # its threads and exit handlers might wait for the network


def send(lines: TextIO) -> None:
    """One SwanLab run from its header to its summary."""
    header = json.loads(lines.readline())
    os.environ.setdefault("SWANLAB_LOGDIR", header["folder"])  # the lowest in rank of its ways to choose a folder
    import swanlab

    run, summary = swanlab.init(**header["init"]), None
    for line in lines:
        content = json.loads(line)
        if "summary" in content:
            summary = content["summary"]
            break
        run.log(content["values"], step=content["step"])
    if summary is None:
        run.finish(state="crashed", error="training ended without a word")
        return
    run.config.update({"summary": summary})
    run.finish()


def end_with_training() -> None:
    """Ends this process some time after the other end of standard input is closed, also when SwanLab hangs."""
    poll = select.poll()
    poll.register(0, 0)  # POLLHUP is always reported, and what waits unread does not hide it
    poll.poll()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
