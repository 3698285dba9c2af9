"""How routers are trained, and what they are trained on."""

from typing import Annotated, Literal

from pydantic import Field

from dlplora.params.fields import CommandPath, Count, Fraction, Name, Section


class Balance(Section):
    """How router data is drawn from the tasks; the share `reworded` is asked in other wordings."""

    per_task: Count
    validation_per_task: Count
    reworded: Fraction


class MlpRouter(Section):
    """The mini-MLP of DLP-LoRA over the tokens of the base model that it `reads`."""

    kind: Literal["mlp"]
    reads: CommandPath
    parameters: Annotated[int, Field(ge=1)]
    hidden: Count
    max_tokens: Count
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count
    epochs: Count
    patience: Count


class EncoderRouter(Section):
    """A classifier over a pretrained encoder: `reads` is the encoder's transformers folder."""

    kind: Literal["encoder"]
    reads: CommandPath
    max_tokens: Count
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count
    epochs: Count
    patience: Count


class TfidfRouter(Section):
    """TF-IDF and logistic regression: the simple router beside every learned one."""

    kind: Literal["tfidf"]
    reads: CommandPath
    regularisation: Annotated[float, Field(gt=0)]


class LinearRouter(Section):
    """A logistic or a ridge regression over the vectors of the embedder's folder that it `reads`.

    `regularisation` is scikit-learn's: C of the one, where less is more, alpha of the other.
    """

    kind: Literal["logistic", "ridge"]
    reads: CommandPath
    regularisation: Annotated[float, Field(gt=0)]


class EnsembleRouter(Section):
    """TF-IDF and a logistic regression over the vectors of the embedder's folder that it `reads`.

    Both have their own `regularisation`: by words, and by meaning.
    """

    kind: Literal["ensemble"]
    reads: CommandPath
    words_regularisation: Annotated[float, Field(gt=0)]
    meaning_regularisation: Annotated[float, Field(gt=0)]


RouterParams = Annotated[
    MlpRouter | EncoderRouter | TfidfRouter | LinearRouter | EnsembleRouter,
    Field(discriminator="kind"),
]


class TunedEmbedder(Section):
    """An embedder trained further, by InfoNCE, on the questions of some tasks.

    The other tasks play the adapters that come later, which it was not trained for.
    """

    embedder: Name
    tasks: Annotated[list[Name], Field(min_length=2)]
    temperature: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    steps: Count
    batch_size: Annotated[int, Field(ge=4)]
    validate_every: Count
    patience: Count | None


class Index(Section):
    """How an adapter is embedded: the mean over so many training inputs of its task."""

    inputs: Count
    instruction: str


class IndexedTask(Section):
    """A task whose adapter can be retrieved."""


class RetrieverRouter(Section):
    """LoraRetriever: the adapters whose embeddings are most similar to the text's.

    Probabilities are a softmax of the similarities over the temperature.
    """

    kind: Literal["retriever"]
    embedder: Name
    similarity: Literal["cosine", "inner_product"]
    temperature: Annotated[float, Field(gt=0)]


class KnnRouter(Section):
    """The nearest router texts by embedding, each with one vote."""

    kind: Literal["knn"]
    embedder: Name
    neighbours: Count


class CentroidRouter(Section):
    """The nearest mean of a task's router texts by embedding.

    Probabilities are a softmax of the negative squared distances over the temperature.
    """

    kind: Literal["centroid"]
    embedder: Name
    temperature: Annotated[float, Field(gt=0)]


EmbeddingRouter = Annotated[
    RetrieverRouter | KnnRouter | CentroidRouter, Field(discriminator="kind")
]
