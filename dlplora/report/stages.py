"""The stages whose timings the report shows."""

from dlplora.params.project import Params

# The sections of params whose entries a stage runs for; stages that run once have none.
STAGE_SECTIONS = {
    "base_model": None,
    "fetch": "sources",
    "ingest": "tasks",
    "adapter": "adapters",
    "import_adapter": "imported_adapters",
    "experts": "experts",
    "joint": "joint",
    "merge": "merges",
    "lorahub": "lorahub",
    "router_data": None,
    "router": "routers",
    "embedder": "embedders",
    "retriever_data": "tuned_embedders",
    "tuned_embedder": "tuned_embedders",
    "index": "indexes",
    "embedding_router": "embedding_routers",
    "evaluate": "systems",
    "novelty": "unseen_tasks",
    "compare": None,
    "model": None,
}


def timed_stages(params: Params) -> list[tuple[str, str]]:
    """Return the stages that are timed, each with the entries of params that it runs for."""
    return [
        (stage, entry)
        for stage, section in STAGE_SECTIONS.items()
        for entry in (sorted(getattr(params, section)) if section else [""])
    ]
