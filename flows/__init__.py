"""Prefect flows over the DVC pipeline: when, how many at once, and what is shown."""

from flows.settings import set_up_prefect

set_up_prefect()
