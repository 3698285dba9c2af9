"""The stages, one module each: `python -m tasks.NAME …`."""

import gc
import sys

from dlplora.warm import hand_over

if sys.argv[0] == "-m":  # a stage is about to load torch and transformers
    hand_over()  # to a process that has loaded them, if there is one
    gc.disable()  # until it runs: loading makes little garbage, and looking for it takes long
