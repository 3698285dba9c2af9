"""The stages, one module each: `python -m tasks.NAME …`."""

import gc

gc.disable()  # until a stage runs: loading torch and transformers makes little garbage, slowly
