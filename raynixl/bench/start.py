"""Start one module of raynixl as a program: `python -P start.py MODULE DIRECTORY`, with no installation in the way.

It does what -m does, without the working directory on the path, where a file of the user's may have any module's name.
No word of the command needs quoting, so it passes through ssh, too, which joins them.
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.path.append(sys.argv[2])
    runpy.run_module(sys.argv[1], run_name="__main__")
