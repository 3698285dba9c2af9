"""Where models, embedders and data come from, and how raw items are read and split."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dlplora.params.fields import (
    CommandPath,
    Count,
    Fraction,
    HubId,
    LocalPath,
    Name,
    Revision,
    Section,
    Sha256,
)
from dlplora.words import Primary


class PackageGguf(Section):
    """A base model in a GGUF file of a package, pinned by the hash of its wheel.

    A `system_prompt` of null leaves the system turn out, for templates that know none.
    """

    kind: Literal["package_gguf"]
    name: str
    version: str
    sha256: Sha256
    file: str
    system_prompt: str | None


class GgufFile(Section):
    """A base model in a local GGUF file, pinned by its hash."""

    kind: Literal["gguf"]
    path: LocalPath
    sha256: Sha256
    system_prompt: str | None


class ModelFolder(Section):
    """A base model in a local transformers folder, pinned by the hash of what is read of it."""

    kind: Literal["folder"]
    path: LocalPath
    sha256: Sha256
    system_prompt: str | None
    trust_remote_code: bool


class HubModel(Section):
    """A base model of the Hugging Face hub, pinned by its revision."""

    kind: Literal["hub"]
    id: HubId
    revision: Revision
    system_prompt: str | None
    trust_remote_code: bool


class BigbenchPackage(Section):
    """Tasks out of the archive of the package `bigbench`, pinned by its hash."""

    kind: Literal["bigbench_package"]
    version: str
    sha256: Sha256
    members: dict[Name, str]


class DatasetMember(Section):
    """One split of a dataset, and what its columns are called."""

    config: str | None
    split: str
    keys: "Keys"


class HubDataset(Section):
    """Tasks out of a dataset of the Hugging Face hub, pinned by its revision."""

    kind: Literal["hub_dataset"]
    id: HubId
    revision: Revision
    members: dict[Name, DatasetMember]


class DatasetFolder(Section):
    """Tasks out of a local folder that the library `datasets` reads, pinned by its hash."""

    kind: Literal["dataset_folder"]
    path: LocalPath
    sha256: Sha256
    members: dict[Name, DatasetMember]


class PackageFolder(Section):
    """A sentence embedder in a folder of a package, pinned by the hash of its wheel."""

    kind: Literal["package_folder"]
    name: str
    version: str
    sha256: Sha256
    folder: str


class EmbedderFolder(Section):
    """A sentence embedder in a local folder, pinned by the hash of what is read of it."""

    kind: Literal["folder"]
    path: LocalPath
    sha256: Sha256


class HubEmbedder(Section):
    """A sentence embedder of the Hugging Face hub, pinned by its revision."""

    kind: Literal["hub"]
    id: HubId
    revision: Revision


class Keys(Section):
    """What the fields of a raw item are called; those of `context` stand in front of a question."""

    question: str
    answer: str
    options: str | None
    context: list[str]

    @model_validator(mode="after")
    def _name_each_once(self) -> "Keys":
        names = [self.question, self.answer, *self.context]
        names += [] if self.options is None else [self.options]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return self


class Task(Section):
    """One NLP task: where its items come from and how its answers are scored.

    Where answers tell their reasoning first, exact match reads what follows the last
    `answer_after`, such as '####'. The file of `wordings` has others for its questions.
    """

    raw: CommandPath
    wordings: CommandPath
    keys: Literal["auto"] | Keys
    on_bad_row: Literal["refuse", "skip"]
    primary: Primary
    answer_after: Annotated[str, Field(min_length=1)] | None
    max_new_tokens: Count


class UnseenTask(Section):
    """A task without an adapter: do the routers notice that they do not know it?

    `raw` is a raw file of questions, or a YAML file of texts of no task.
    """

    raw: CommandPath
    keys: Literal["auto"] | Keys
    on_bad_row: Literal["refuse", "skip"]


def _summing_to_1(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares sum to {sum(shares)}, not to 1")
    return shares


class Splits(Section):
    """Sizes of the splits: the most and the least items of each, and their shares."""

    train: Count
    validation: Count
    test: Count
    shares: Annotated[tuple[Fraction, Fraction, Fraction], AfterValidator(_summing_to_1)]
    least: tuple[Count, Count, Count]


Model = Annotated[PackageGguf | GgufFile | ModelFolder | HubModel, Field(discriminator="kind")]
Source = Annotated[BigbenchPackage | HubDataset | DatasetFolder, Field(discriminator="kind")]
Embedder = Annotated[PackageFolder | EmbedderFolder | HubEmbedder, Field(discriminator="kind")]
