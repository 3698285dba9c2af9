"""Prefect flows over the DVC pipeline: when, how many at once, and what is shown."""

from dlplora.edge import set_up_process
from flows.settings import set_up_prefect

set_up_process()
set_up_prefect()
