"""The training command with a fault at one change of its files.

faulty_run.py KIND AT ROOT pretrain/main.py ARGUMENTS
"""

import atexit
import runpy
import sys
from pathlib import Path

from faults import Faults

if __name__ == "__main__":
    kind, at, root = sys.argv[1:4]
    faults = Faults(Path(root), kind, int(at))
    faults.install()
    atexit.register(lambda: print(f"CHANGES {faults.count}", flush=True))
    sys.argv = sys.argv[4:]
    runpy.run_path(sys.argv[0], run_name="__main__")
