"""Scores one checkpoint of a run, for evaluation.py: exports it, then becomes eval/run.py with the FLAGS.

python pretrain/evaluate_checkpoint.py --run runs/NAME --step N --folder DIR --trainer PID [-- FLAGS]
"""

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path

from common.errors import user_errors

EVAL_SCRIPT = Path(__file__).parents[1] / "eval" / "run.py"
NICENESS = 10  # about a tenth of a core while ranks use all of them: training hardly notices
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parser = argparse.ArgumentParser(description="Score one checkpoint of a run, as its trainer does.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the results")
    parser.add_argument("--trainer", type=int, required=True, help="process with which this one ends")
    parser.add_argument("flags", nargs="*", help="after --: further flags of eval/run.py")
    arguments = parser.parse_args()
    if sys.platform == "linux":  # dies with a trainer that is killed; survives execv
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != arguments.trainer:  # it was killed before
            sys.exit("error: the run that asked for this evaluation has ended")
    os.nice(NICENESS)
    export = arguments.folder / "work" / "export"
    with user_errors(ValueError, OSError):
        # Imported late: torch takes seconds, and a trainer that dies meanwhile must take this process along.
        from pretrain.export import export_run

        export_run(arguments.run, arguments.step, export)
        paths = ["--checkpoint", str(export), "--output_path", str(arguments.folder)]
        os.execv(sys.executable, [sys.executable, str(EVAL_SCRIPT), *paths, *arguments.flags])


if __name__ == "__main__":
    main()
