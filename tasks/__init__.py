"""The stages, one module each: `python -m tasks.NAME …`."""

import gc
import sys

if sys.argv[0] == "-m":  # a stage is about to load torch and transformers
    gc.disable()  # until it runs: loading makes little garbage, and looking for it takes long
