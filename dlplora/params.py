"""The parameters: every value that a stage reads, as frozen sections of params.yaml.

No field has a default: a value that is not in the file is an error, so that DVC sees every
change. Each section goes to the one function that its stage calls.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dlplora.errors import ParamsError, choices
from dlplora.words import Primary

PARAMS_FILE = Path("params.yaml")
T = TypeVar("T")
Weighting = Literal["renormalise", "softmax_probabilities", "softmax_logits", "equal"]
MergeWeights = Literal["mean", "ones"]  # 1/N for each of N adapters, or 1
LogoScore = Literal["norm", "entropy"]
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", "default", "base", "single", "none"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}


def is_identifier(name: str) -> bool:
    """Tell whether a name may stand for a task, system or router, and so in paths."""
    return _IDENTIFIER.fullmatch(name) is not None and name.lower() not in _RESERVED


def _identifier(name: str) -> str:
    if not is_identifier(name):
        raise ValueError(
            f"{name[:80]!r} is no plain identifier: use a letter, then up to 63 letters, digits, _"
        )
    return name


def _summing_to_1(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares sum to {sum(shares)}, not to 1")
    return shares


Name = Annotated[str, AfterValidator(_identifier)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a whole commit: tags and branches move
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]


class Section(BaseModel):
    """A frozen group of parameters that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Runtime(Section):
    """What the same bytes depend on besides the inputs."""

    dtype: Literal["float32", "bfloat16"]
    threads: Count


class Flow(Section):
    """How the flows run the stages: how many at once, of all and of each kind in dvc.yaml's meta.

    Of the runs in worktrees of their own, the newest `keep_runs` stay checked out.
    """

    stages_at_once: Count
    limits: dict[Name, Count]
    keep_runs: Count


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
    path: str
    sha256: Sha256
    system_prompt: str | None


class ModelFolder(Section):
    """A base model in a local transformers folder, pinned by the hash of what is read of it."""

    kind: Literal["folder"]
    path: str
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
    path: str
    sha256: Sha256
    members: dict[Name, DatasetMember]


class Keys(Section):
    """What the fields of a raw item are called."""

    question: str
    answer: str
    options: str | None


class Task(Section):
    """One NLP task: where its items come from and how its answers are scored."""

    raw: str
    keys: Literal["auto"] | Keys
    on_bad_row: Literal["refuse", "skip"]
    primary: Primary
    max_new_tokens: Count


class UnseenTask(Section):
    """A task without an adapter: do the routers notice that they do not know it?"""

    raw: str
    keys: Literal["auto"] | Keys
    on_bad_row: Literal["refuse", "skip"]


class Splits(Section):
    """Sizes of the splits: the most and the least items of each, and their shares."""

    train: Count
    validation: Count
    test: Count
    shares: Annotated[tuple[Fraction, Fraction, Fraction], AfterValidator(_summing_to_1)]
    least: tuple[Count, Count, Count]


class Adapter(Section):
    """How one LoRA adapter is trained.

    A batch is computed in parts of `micro_batch_size`; "auto" begins with the whole batch and
    halves the parts whenever memory runs out. Training ends after `patience` validations without a
    new best, or never early if it is null. What all prompts of a part begin with is computed once:
    with `share_prefix` "exact" only without dropout, with "always" also when dropout would have
    dropped it otherwise in each row.
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

    path: str


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


class Arrow(Section):
    """For each token and layer the `top_k` adapters nearest to it, weighed by a softmax."""

    top_k: Count
    temperature: Annotated[float, Field(gt=0)]


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


class Balance(Section):
    """How router data is drawn from the tasks."""

    per_task: Count
    validation_per_task: Count
    composites: Annotated[int, Field(ge=0)]
    parts: list[Annotated[int, Field(ge=2)]]


class MlpRouter(Section):
    """The mini-MLP of DLP-LoRA over the tokens of the base model that it `reads`."""

    kind: Literal["mlp"]
    reads: str
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
    reads: str
    max_tokens: Count
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count
    epochs: Count
    patience: Count


class TfidfRouter(Section):
    """TF-IDF and logistic regression: the simple router beside every learned one."""

    kind: Literal["tfidf"]
    reads: str
    regularisation: Annotated[float, Field(gt=0)]


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
    path: str
    sha256: Sha256


class HubEmbedder(Section):
    """A sentence embedder of the Hugging Face hub, pinned by its revision."""

    kind: Literal["hub"]
    id: HubId
    revision: Revision


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


class DrawnRoute(Section):
    """A system whose route reads no text: one random adapter, or all alike."""

    artifact: str
    route: Literal["random", "uniform"]


class FixedRoute(Section):
    """A system of one adapter for every prompt: the artifact's."""

    artifact: str
    route: Literal["fixed"]


class ByTaskRoute(Section):
    """A system that is told the task: the artifact has an adapter for each."""

    artifact: str
    route: Literal["by_task"]


class TopP(Section):
    """Keep the smallest set of tasks whose probability reaches `p`."""

    route: Literal["top_p"]
    p: Annotated[float, Field(gt=0, le=1)]
    weights: Weighting


class TopK(Section):
    """Keep the `k` most probable tasks."""

    route: Literal["top_k"]
    k: Count
    weights: Weighting


class TopPRoute(TopP):
    """A system that routes by a classifier's likeliest tasks, down to a sum."""

    artifact: str


class TopKRoute(TopK):
    """A system that routes by a classifier's k likeliest tasks."""

    artifact: str


class OwnExpertRoute(Section):
    """A system that is told the task and answers by its experts, folded into one adapter."""

    route: Literal["own_expert"]
    artifact: str
    clusters: list[Name]


class GatedSystem(Section):
    """A system that mixes the experts of clusters by their gate over a router's probabilities."""

    experts: str
    router: str
    clusters: list[Name]


class LogoRoute(Section):
    """A system that asks the adapters themselves, as LoGo does: the `k` loudest answer.

    They are heard at `projection` of a `block` of the base model, by the norm of what they add
    or by the inverse entropy of its softmax. With `neutral` texts each score is relative to the
    adapter's mean over those; without, it is taken as it is.
    """

    artifact: str
    route: Literal["logo"]
    score: LogoScore
    k: Count
    block: Literal["last"] | Annotated[int, Field(ge=0)]
    projection: str
    neutral: list[str]


class FusionRoute(Section):
    """A system that answers by the average of the k likeliest adapters' matrices."""

    artifact: str
    route: Literal["fusion"]
    k: Count


class Evaluation(Section):
    """How answers are produced for scoring."""

    batch_size: Count
    max_prompt_tokens: Count


class CompositeSetting(Section):
    """A setting of composite prompts: several questions of different tasks in one."""

    system: Name
    artifact: str
    parts: Annotated[int, Field(ge=2)]
    count: Count


Model = Annotated[PackageGguf | GgufFile | ModelFolder | HubModel, Field(discriminator="kind")]
Source = Annotated[BigbenchPackage | HubDataset | DatasetFolder, Field(discriminator="kind")]
RouterParams = Annotated[MlpRouter | EncoderRouter | TfidfRouter, Field(discriminator="kind")]
Embedder = Annotated[PackageFolder | EmbedderFolder | HubEmbedder, Field(discriminator="kind")]
EmbeddingRouter = Annotated[
    RetrieverRouter | KnnRouter | CentroidRouter, Field(discriminator="kind")
]
Merge = Annotated[CatMerge | SvdMerge | LinearMerge | PrunedMerge, Field(discriminator="kind")]
System = Annotated[
    DrawnRoute
    | TopPRoute
    | TopKRoute
    | OwnExpertRoute
    | LogoRoute
    | FusionRoute
    | FixedRoute
    | ByTaskRoute,
    Field(discriminator="route"),
]


class Params(Section):
    """All of params.yaml."""

    seed: int
    runtime: Runtime
    flow: Flow
    base_model: Model
    sources: dict[Name, Source]
    tasks: dict[Name, Task]
    splits: Splits
    adapter: Adapter
    adapters: dict[Name, dict[str, Any]]
    imported_adapters: dict[Name, ImportedAdapter]
    experts: dict[Name, Experts]
    joint: dict[Name, dict[str, Any]]
    merges: dict[Name, Merge]
    arrow: dict[Name, Arrow]
    lorahub: dict[Name, LoraHub]
    balance: Balance
    routers: dict[Name, RouterParams]
    embedders: dict[Name, Embedder]
    tuned_embedders: dict[Name, TunedEmbedder]
    index: Index
    indexes: dict[Name, IndexedTask]
    embedding_routers: dict[Name, EmbeddingRouter]
    systems: dict[Name, System]
    gated_systems: dict[Name, GatedSystem]
    composites: dict[Name, CompositeSetting]
    unseen_tasks: dict[Name, UnseenTask]
    evaluation: Evaluation

    @property
    def embedder_names(self) -> list[str]:
        """All embedders, trained further or not."""
        return sorted({**self.embedders, **self.tuned_embedders})

    @property
    def router_names(self) -> list[str]:
        """All routers, of the base model's tokens or of an embedder's vectors."""
        return sorted({**self.routers, **self.embedding_routers})

    @property
    def composite_settings(self) -> list[str]:
        """The settings of composites for which there are enough tasks."""
        return [name for name, row in self.composites.items() if row.parts <= len(self.tasks)]

    def adapter_of(self, task: str) -> Adapter:
        """Return the training parameters of one task: `adapter` with its overrides."""
        return self._overridden(named(self.adapters, task, "adapters"), f"adapters.{task}")

    def joint_of(self, name: str) -> Adapter:
        """Return the training parameters of an adapter for all tasks: `adapter` with overrides."""
        return self._overridden(named(self.joint, name, "joint"), f"joint.{name}")

    def _overridden(self, overrides: dict[str, Any], source: str) -> Adapter:
        merged = self.adapter.model_dump() | overrides
        return _checked(lambda: Adapter.model_validate(merged), source)

    def expert_training_of(self, cluster: str) -> Adapter:
        """Return the training parameters of a cluster's experts: `adapter` with its overrides.

        Raises `ParamsError` unless the experts of one task have the adapter's rank together.
        """
        experts = named(self.experts, cluster, "experts")
        merged = self.adapter.model_dump() | experts.training
        where = f"experts.{cluster}"
        training = _checked(lambda: Adapter.model_validate(merged), f"{where}.training")
        active = (experts.common + experts.specific) * experts.expert_rank
        if active != training.rank:
            raise ParamsError(
                f"params.yaml: {where}: ({experts.common} common + {experts.specific} specific) × "
                f"expert_rank {experts.expert_rank} = {active}; expected the rank of an adapter, "
                f"{training.rank}"
            )
        return training


def named(section: dict[str, T], name: str, title: str) -> T:
    """Return one entry of a section of params, or say which there are."""
    if name not in section:
        raise ParamsError(f"params.yaml: no {title}.{name}; there are: {choices(section)}")
    return section[name]


def parse_params(values: object, source: str) -> Params:
    """Check parsed YAML against the sections; `source` names the file in errors."""
    params = _checked(lambda: Params.model_validate(values), source)
    trained, imported = set(params.adapters), set(params.imported_adapters)
    if both := trained & imported:
        raise ParamsError(f"{source}: {choices(both)}: in adapters and in imported_adapters")
    if uneven := set(params.tasks) ^ (trained | imported):
        raise ParamsError(
            f"{source}: {choices(uneven)}: expected in tasks and in adapters or imported_adapters"
        )
    if known := set(params.tasks) & set(params.unseen_tasks):
        raise ParamsError(f"{source}: {choices(known)}: in tasks and in unseen_tasks")
    _check_embedding(params, source)
    if twice := set(params.arrow) & {*params.systems, *params.gated_systems}:
        raise ParamsError(f"{source}: {choices(twice)}: in arrow and among the other systems")
    for name, setting in params.composites.items():
        if not isinstance(params.systems.get(setting.system), TopP | TopK):
            raise ParamsError(
                f"{source}: composites.{name}.system is {setting.system}; expected a system that "
                f"reads the text"
            )
    _check_experts(params, source)
    return params


def _check_experts(params: Params, source: str) -> None:
    """Raise `ParamsError` on clusters that overlap, or on systems whose clusters are not all."""
    home: dict[str, str] = {}
    for name, cluster in params.experts.items():
        params.expert_training_of(name)
        if unknown := set(cluster.tasks) - set(params.tasks):
            raise ParamsError(f"{source}: experts.{name}.tasks: {choices(unknown)}: not in tasks")
        for task in cluster.tasks:
            if task in home:
                raise ParamsError(f"{source}: {task}: in experts.{home[task]} and experts.{name}")
            home[task] = name
    systems: dict[str, Section] = {**params.systems}
    for name, gated in params.gated_systems.items():
        if name in systems:
            raise ParamsError(f"{source}: {name}: in systems and in gated_systems")
        systems[name] = gated
    for name, system in systems.items():
        if not isinstance(system, OwnExpertRoute | GatedSystem):
            continue
        for cluster_name in system.clusters:
            named(params.experts, cluster_name, "experts")
        missing = [task for task in params.tasks if home.get(task) not in system.clusters]
        if missing:
            raise ParamsError(
                f"{source}: {choices(missing)}: in none of the clusters of {name} "
                f"({choices(system.clusters)})"
            )


def _check_embedding(params: Params, source: str) -> None:
    """Raise `ParamsError` unless embedders, indexes and the routers over them fit together."""
    for one, other in (("embedders", "tuned_embedders"), ("routers", "embedding_routers")):
        if both := set(getattr(params, one)) & set(getattr(params, other)):
            raise ParamsError(f"{source}: {choices(both)}: in {one} and in {other}")
    wanted = set(params.tasks) if params.embedding_routers or params.indexes else set()
    if uneven := set(params.indexes) ^ wanted:
        raise ParamsError(
            f"{source}: {choices(uneven)}: expected in tasks and in indexes, for retrieval"
        )
    used = {f"embedding_routers.{name}": row for name, row in params.embedding_routers.items()}
    for where, router in used.items():
        if router.embedder not in params.embedder_names:
            raise ParamsError(
                f"{source}: {where}.embedder is {router.embedder}; there are: "
                f"{choices(params.embedder_names)}"
            )
    for name, tuned in params.tuned_embedders.items():
        if tuned.embedder not in params.embedders:
            raise ParamsError(
                f"{source}: tuned_embedders.{name}.embedder is {tuned.embedder}; there are: "
                f"{choices(params.embedders)}"
            )
        if unknown := set(tuned.tasks) - set(params.tasks):
            raise ParamsError(
                f"{source}: tuned_embedders.{name}.tasks: {choices(unknown)}: not in tasks"
            )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the parameters file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParamsError(f"{path}: {' '.join(str(error).split())}") from error
    return parse_params(values, str(path))


def _checked(validate: Callable[[], T], source: str) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        found = repr(first["input"])[:80]
        raise ParamsError(f"{source}: {where}: {first['msg']}; found {found}{more}") from error
