"""How adapters are trained, merged and composed."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dlplora.params.fields import CommandPath, Count, Fraction, Name, Section


class Adapter(Section):
    """How one LoRA adapter is trained.

    A batch is computed in parts of `micro_batch_size`; "auto" begins with the whole batch and
    halves the parts whenever memory runs out. Training ends after `patience` validations without a
    new best, or never early if it is null. What all prompts of a part begin with is computed once:
    with `share_prefix` "exact" only without dropout, with "always" also when dropout would have
    dropped it otherwise in each row. An item has at most `max_tokens`, its prompt and answer
    together: ingest refuses longer ones, and memory follows the items there are. A share of the
    items, `reworded`, is asked in other wordings.
    """

    target_modules: list[str]
    rank: Count
    alpha: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    steps: Count
    batch_size: Count
    micro_batch_size: Literal["auto"] | Count
    max_tokens: Count
    validate_every: Count
    patience: Count | None
    share_prefix: Literal["exact", "always"]
    reworded: Fraction


class Experts(Section):
    """The experts of one cluster of tasks, trained jointly: CGC-LoRA.

    `common` experts are shared by all tasks of the cluster, `specific` ones are of each task; those
    of one task have the rank of `adapter` together. The gate reads task embeddings of width
    `embedding`. `training` overrides `adapter`; its steps are of one task each, in turns.
    """

    tasks: Annotated[list[Name], Field(min_length=1)]
    common: Count
    specific: Count
    expert_rank: Count
    embedding: Count
    training: dict[str, Any]


class ImportedAdapter(Section):
    """A task's adapter that was trained elsewhere: PEFT's folder."""

    path: CommandPath


MergeWeights = Literal["mean", "ones"]  # 1/N for each of N adapters, or 1


class CatMerge(Section):
    """The matrices of all adapters side by side: exactly the weighted sum of what each adds."""

    kind: Literal["cat"]
    weights: MergeWeights


class SvdMerge(Section):
    """The weighted sum of what all adapters add, cut to its largest `rank` singular values."""

    kind: Literal["svd"]
    weights: MergeWeights
    rank: Count


class LinearMerge(Section):
    """The weighted sums of the matrices A and of the matrices B, each."""

    kind: Literal["linear"]
    weights: MergeWeights


class PrunedMerge(Section):
    """Matrices A and B merged by TIES, or DARE-TIES, after a share `density` of each is kept.

    Of each value the sign of the larger sum is kept, and the mean of those that have it.
    """

    kind: Literal["ties", "dare_ties"]
    weights: MergeWeights
    density: Annotated[float, Field(gt=0, lt=1)]


Merge = Annotated[CatMerge | SvdMerge | LinearMerge | PrunedMerge, Field(discriminator="kind")]


class LoraHub(Section):
    """A search for the weights of all adapters by the loss on `shots` training examples of a task.

    Weights stay between −`bound` and `bound`; `regularisation` times the mean of their absolute
    values is added to the loss.
    """

    shots: Count
    steps: Count
    bound: Annotated[float, Field(gt=0)]
    regularisation: Annotated[float, Field(ge=0)]
    max_tokens: Count
