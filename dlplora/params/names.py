"""Names that stand in several sections; like overrides, this counts as code of the stages."""

from dlplora.params.project import Params


def embedder_names(params: Params) -> list[str]:
    """Return all embedders, tuned or not."""
    return sorted({**params.embedders, **params.tuned_embedders})


def router_names(params: Params) -> list[str]:
    """Return all routers, of the base model's tokens or of an embedder's vectors."""
    return sorted({**params.routers, **params.embedding_routers})
