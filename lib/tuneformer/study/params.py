"""What a study asks, as one typed, frozen object.

In: ``params/_base.yaml``, the task's file, the study's file and the changes of one run, laid over each other in that
order. Out: a `Study`; or an error that names file, key and the nearest valid key.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuneformer.study import paths, train_sets, treatments
from tuneformer.study.treatments import Baseline, Loss, Sampling

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class ParameterError(ValueError):
    """A parameter file or a changed parameter that cannot be used; the message says which and what to do."""


class Section(BaseModel):
    """Part of a study: strict types, no unknown keys, nothing changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class TaskParams(Section):
    """What is predicted, and on which cells it is tested. A task's file may set only these for another study."""

    label: str
    """obs column that holds the class of a cell; $VARIABLES are expanded."""
    classes: list[str]
    """Classes to keep, in the order of tables and figures; [] keeps all, sorted by name."""
    select_column: str | None
    """obs column by which cells are selected before anything else; null keeps all."""
    select_values: list[str]
    """Values of `select_column` to keep."""
    test_share: Share
    """Share of the cells in the fixed test set."""
    validation_share: Share
    """Share of the remaining cells used for validation (1/9 gives train : validation = 8 : 1)."""
    dose_column: str | None
    """obs column with the dose of a cell; made cells stay within class and dose; null has no doses."""
    group_by: str | None
    """obs column whose groups (wells, donors) stay whole in one part of the split; null splits cells at random."""

    @field_validator("label")
    @classmethod
    def _expanded(cls, label: str) -> str:
        return os.path.expandvars(label) or label  # params/own_data.yaml says $LABEL; without a value it stays


class CellsParams(TaskParams):
    """From raw counts to quality-controlled cells with a fixed split (01_qc)."""

    dataset: Literal[
        "demo",
        "demo_pancreas",
        "pbmc68k",
        "own",
        "sciplex2",
        "sciplex2_geo",
        "sciplex3",
        "pancreas",
        "cardiomyopathy",
    ]
    """Source of the cells: demo and demo_pancreas (simulated), pbmc68k (carried by scanpy), own (a file of yours), or
    one that is downloaded (`tuneformer.data.catalog`)."""
    path: str | None
    """The cells when dataset is own: an h5ad, a 10x h5 or folder, or a tokenized data set in the official format;
    relative to the repository; $VARIABLES are expanded."""
    counts: str
    """Where the raw counts are: X, raw, the name of a layer, or auto, which takes the first that holds counts."""
    fractional_counts: bool
    """Whether counts may be fractions, as full-length protocols give them; rank encoding needs no whole numbers."""
    min_hash_umis: Annotated[int, Field(ge=0)] | None
    """sciplex2, sciplex3: a kept cell has more hash UMIs; null for no limit, as the harmonised sciplex3 needs it."""
    min_hash_ratio: float | None
    """sciplex2, sciplex3: a kept cell has a larger ratio of its first hash to its second; null for no limit."""
    max_hash_qval: Share | None
    """sciplex2, sciplex3: a kept cell has a smaller q value of its hashes against background; null for no limit."""
    ensembl_id: str | None
    """var column with the gene identifiers; null takes the column, or the index, that holds Ensembl identifiers."""
    symbol: str | None
    """var column with gene symbols, for mitochondrial genes; null takes var["symbol"], or one of a usual name, or the
    index."""
    obs_table: str | None
    """csv or tsv whose first column names the cells: more obs columns for own data, such as labels of a 10x file."""
    min_class_cells: Annotated[int, Field(ge=0)]
    """With classes: [], smallest number of cells of a class that is kept; smaller ones are left out."""
    demo_cells: Positive
    """Number of simulated cells in the demo data set, before quality control."""
    demo_seed: int
    """Seed of the simulated cells."""
    min_counts: int
    """Smallest total count of a kept cell."""
    max_counts: int | None
    """Largest total count of a kept cell; null for no limit."""
    max_mito_share: float
    """Largest mitochondrial share of the counts of a kept cell (0 to 1)."""
    mito_prefix: str
    """Prefix of the symbols of mitochondrial genes."""
    split_seed: int
    """Seed of the split into train, validation and test; the same for every run of a study."""


class TrainSetParams(CellsParams):
    """From single cells to what a model is trained on (03_pseudobulk, 04_synthetic)."""

    group_spread: Annotated[float, Field(ge=0)]
    """Standard deviation of the size of a pseudo-bulk group, as a share of k."""
    untreated_class: str
    """Class whose cells alone give the variances of synthetic cells in train sets named ``_untreated``."""
    synthetic_cells: Positive | None
    """Synthetic cells of each class and dose; null makes as many as there are single cells."""
    covariance_rank: Positive
    """Factors that carry the correlations between genes in synthetic cells."""
    bulk_counts: str | None
    """Bulk counts, a csv or tsv of genes x samples, for train sets of the forms with bulk; demo is a simulated one."""
    bulk_samples: str | None
    """Sample sheet of the bulk counts, a csv or tsv with the columns sample, class and, where there are doses, dose."""
    padded_classes: list[str]
    """Classes to which mixtures named ``_pad<n>`` add n cells each."""


class TokensParams(TrainSetParams):
    """From cells to tokens (02_tokenize)."""

    checkpoint: str
    """Pre-trained model: demo (shipped, simulated), a published name, or a local folder in the official layout."""
    vocabulary: Literal["checkpoint", "fit"]
    """Gene tokens and medians: from the checkpoint, or medians fitted on the training cells (unknown genes added)."""
    max_length: Positive | None
    """Tokens per cell, special tokens included; null takes the number of positions of the checkpoint."""


class TrainingParams(TokensParams):
    """One fine-tuning run (05_finetune_strategies)."""

    train_cells: Positive | None
    """Number of training cells, drawn stratified by class from the training part; null takes all."""
    pooling: Literal["first", "mean"]
    """What the head reads: the first token (stock BERT pooler), or the mean over all tokens of a cell."""
    freeze_layers: Annotated[int, Field(ge=0)]
    """selective: number of encoder layers, from the first, that do not learn."""
    freeze_embeddings: bool
    """selective: whether the embeddings do not learn either (the official freeze_layers leaves them trainable)."""
    head_share: Share
    """lp_ft: share of the epochs in which only the head learns, before everything does."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """layerwise_lr_decay: factor on the learning rate from each layer to the one below it."""
    lora_rank: Positive
    """lora: rank of the low-rank update of query and value matrices."""
    lora_alpha: Positive
    """lora: scale of the update (alpha / rank multiplies it)."""
    loss: Loss
    """Training loss: cross_entropy, weighted (by class), balanced_softmax, focal, dice, or bce (one class against the
    rest); see `tuneformer.finetune.losses`."""
    sampling: Sampling
    """Training cells of an epoch: all once, upsampled (rare classes repeated), or balanced (drawn by class)."""
    focal_gamma: Annotated[float, Field(ge=0)]
    """focal: how much less well-classified cells count; 0 is cross-entropy."""
    focal_alpha: Literal["equal", "balanced"]
    """focal: weight of the classes; balanced weights by the inverse of their number of training cells."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    learning_rates: dict[Name, Annotated[float, Field(gt=0)]]
    """Peak learning rate of single strategies, as tuning found them; the others take learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Weight decay of AdamW."""
    epochs: Positive
    """Passes over the training cells."""
    batch_size: Positive
    """Cells per optimizer step."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Optimizer steps of linear warm-up."""
    min_steps: Annotated[int, Field(ge=0)]
    """Smallest number of optimizer steps of a run: with few cells the same cells are seen more often."""
    warmup_cap: Annotated[float, Field(gt=0, le=1)] | None
    """Largest share of a run's steps spent on warm-up; null takes warmup_steps literally."""
    early_stop: Positive | None
    """Stop after this many epochs without a better validation macro-F1; null trains all epochs."""
    device: Literal["auto", "cpu", "cuda"]
    """Where the model is trained; auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of training; auto takes bf16 autocast where the hardware computes it natively."""
    attention: Literal["sdpa", "eager"]
    """Attention kernel of transformers."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout on attention weights; above 0 the CPU falls back to a kernel several times slower."""
    threads: Positive | None
    """CPU threads of one run; null takes all cores (the batch sets 1 and runs as many jobs as there are cores)."""


class PretrainingParams(Section):
    """Masked-token pre-training of the demo checkpoint (00_pretrain)."""

    pretrain_cells: Positive
    """Simulated unperturbed cells in the corpus."""
    pretrain_types: Positive
    """Simulated cell types in the corpus."""
    pretrain_steps: Positive
    """Optimizer steps."""
    pretrain_batch: Positive
    """Cells per step."""
    pretrain_learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    pretrain_seed: int
    """Seed of corpus, weights, masks and order."""
    pretrain_output: str | None
    """Folder of the pre-trained checkpoint, relative to the repository; null writes runs/<study>/pretrained."""
    rank_noise: Annotated[float, Field(ge=0)]
    """Standard deviation of the log-normal noise on the counts of the corpus before they are ranked."""
    mask_share: Share
    """Share of the tokens that are hidden and have to be predicted."""
    pretrain_length: Positive
    """Tokens per cell, which is the number of positions of the model."""
    hidden_size: Positive
    """Width of the model."""
    layers: Positive
    """Encoder layers."""
    heads: Positive
    """Attention heads per layer."""
    feed_forward_size: Positive
    """Width of the feed-forward part of a layer."""


class GenesParams(Section):
    """Classification of genes in the context of cells (07_gene_dosage)."""

    gene_classes: str
    """Classes of genes: demo (simulated), or a csv or official pickle; relative to the repository."""
    gene_folds: Annotated[int, Field(ge=2)]
    """Folds of the cross-validation over genes."""
    gene_cells: Positive
    """Cells in whose context the genes are read."""
    gene_null: bool
    """demo: whether the classes are drawn without any tie to the network, so that nothing can be found."""
    gene_permutations: Positive
    """Permutations of the classes over the genes, for the control of each baseline."""


class CompressionParams(Section):
    """Compression of a fine-tuned model (08_compress)."""

    compressions: list[
        Literal["bf16", "int8_dynamic", "int8_weights", "pruned", "heads", "neurons", "layers", "onnx", "onnx_int8"]
    ]
    """What is done to the model, each by itself; `tuneformer.finetune.compression` says what they are."""
    pruned_shares: list[Share]
    """Shares of weights, heads or neurons that are pruned away."""
    benchmark_cells: Positive
    """Test cells predicted in one measurement of speed; all where there are fewer."""
    benchmark_batch: Positive
    """Cells of a batch in measurements of speed and memory."""
    benchmark_repeats: Positive
    """Repetitions of a measurement of speed; their median counts."""


class Study(TrainingParams, PretrainingParams, GenesParams, CompressionParams):
    """A study, resolved for one task: every key of ``params/_base.yaml``, and the name of the file it came from."""

    study: Name
    """Name of the study: its params file without the ending."""
    question: str
    """The question that the study answers, in one sentence."""
    kind: Literal["cells", "genes", "compression"]
    """What is studied: classification of cells (05, a grid of runs), of genes (07), or compression (08)."""
    tasks: list[Name]
    """Tasks of the grid: names of params files whose task keys are used; [] means the study's own keys."""
    train_sets: list[Name]
    """Train sets of the grid."""
    strategies: list[Name]
    """Strategies of the grid, with what differs from the study in the name (`tuneformer.study.treatments`)."""
    baselines: list[Baseline]
    """Simple classifiers on the same cells and seeds, which a strategy has to beat."""
    seeds: list[int]
    """Seeds of the grid: head initialisation, cell order, dropout and the draw of train_cells."""
    folds: Annotated[int, Field(ge=0)]
    """Folds of a cross-validation, each a run of its own; 0 keeps the one test set of test_share."""
    quick_train_sets: list[Name]
    """Train sets whose runs with the first task and seed belong to the default batch; [] leaves the study out of it."""
    task: Name
    """The task of this run."""
    train_set: Name
    """The train set of this run."""
    strategy: Name
    """The strategy, or the baseline, of this run."""
    seed: int
    """The seed of this run."""
    fold: Annotated[int, Field(ge=0)] | None
    """The fold of this run, from 0; null without folds."""
    expected_macro_f1: dict[Name, float]
    """Reference of the test macro-F1 of one run of a strategy, which 05 checks; one without a reference is free."""
    expected_mean_macro_f1: dict[Name, float]
    """Reference of the mean test macro-F1 of a strategy over all runs of the study, which 06 checks."""
    expected_tolerance: Annotated[float, Field(ge=0)]
    """Largest accepted distance to a reference: twice the seed-to-seed spread when it was recorded."""

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if self.dataset == "own" and not self.path:
            msg = "path: dataset is own, so path must name an h5ad file"
            raise ValueError(msg)
        for name in (self.train_set, *self.train_sets):
            try:
                train_sets.parse(name)
            except ValueError as error:
                msg = f"train_sets: {error}"
                raise ValueError(msg) from error
        named = {key: getattr(self, key) for key in ("strategies", "learning_rates", *REFERENCES)}
        for key, names in {**named, "strategy": [self.strategy]}.items():
            for name in names:
                try:
                    said = treatments.parse(name)
                except ValueError as error:
                    msg = f"{key}: {error}"
                    raise ValueError(msg) from error
                if said.strategy in treatments.BASELINES and key != "strategy":
                    msg = f"{key}: {name} is a baseline; name it in baselines"
                    raise ValueError(msg)
        if self.folds == 1:
            msg = "folds: one fold leaves nothing to train on; set 2 or more, or 0 for the test set of test_share"
            raise ValueError(msg)
        if (self.fold is None) != (self.folds == 0) or (self.fold is not None and self.fold >= self.folds):
            allowed = f"from 0 to {self.folds - 1}" if self.folds else "null, as folds is 0"
            msg = f"fold: it has to be {allowed}"
            raise ValueError(msg)
        if self.select_column is None and self.select_values:
            msg = "select_values: needs select_column, the obs column in which the values stand"
            raise ValueError(msg)
        return self

    @property
    def simulated(self) -> bool:
        """Whether the cells are simulated, which every document that shows their numbers has to say."""
        return self.dataset in ("demo", "demo_pancreas")

    @property
    def base_strategy(self) -> str:
        """Strategy, or baseline, of this run without the rest of its name."""
        return treatments.parse(self.strategy).strategy

    @property
    def peak_learning_rate(self) -> float:
        """Peak learning rate of this run's strategy."""
        of_base = self.learning_rates.get(self.base_strategy, self.learning_rate)
        return self.learning_rates.get(self.strategy, of_base)

    def treated(self, strategy: str) -> "Study":
        """Return the settings of another strategy or baseline; what its name says replaces what the study says.

        Raises
        ------
        ParameterError
            The name of the present strategy has replaced keys already, which the other would inherit.
        """
        if treatments.parse(self.strategy).keys and strategy != self.strategy:
            msg = f"strategy: {strategy} would inherit what {self.strategy} sets; set strategy: {self.base_strategy}."
            raise ParameterError(msg)
        return self.model_copy(update={"strategy": strategy, **treatments.parse(strategy).keys})

    def section(self, part: type[Section]) -> dict[str, Any]:
        """Return the keys of one section (such as `CellsParams`) with their values."""
        return self.model_dump(include=set(part.model_fields))


REFERENCES = ("expected_macro_f1", "expected_mean_macro_f1")
TASK_KEYS = tuple(TaskParams.model_fields)
UNDER_REFERENCE = {"task", "train_set", "strategy", "seed", "fold", "threads", "device"}
"""What a run may change and still be checked against the reference of its study."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once and 1e-4 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping; refuse a second value for a key."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                msg = f"the key {key!r} stands {keys.count(key)} times; keep one"
                raise ParameterError(msg)
        return super().construct_mapping(node, deep=deep)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_UniqueKeyLoader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))
_UniqueKeyLoader.add_constructor("!exponent", _construct_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one flat parameter file.

    Raises
    ------
    ParameterError
        The file is missing, is not a mapping, or holds a key twice.
    """
    if not path.is_file():
        available = sorted(file.stem for file in path.parent.glob("*.yaml") if not file.stem.startswith("_"))
        near = difflib.get_close_matches(path.stem, available, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        msg = f"{paths.shown(path)} does not exist.{hint} Studies here: {', '.join(available)}."
        raise ParameterError(msg)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ParameterError) as error:
        msg = f"{paths.shown(path)}: {' '.join(str(error).split())}"
        raise ParameterError(msg) from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        msg = f"{paths.shown(path)}: expected lines of the form `key: value`, found a {type(content).__name__}."
        raise ParameterError(msg)
    return content


def read_value(text: str) -> Any:
    """Read one value of a parameter as a params file would (``1e-4`` is a number, ``null`` is None)."""
    return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)


def load_study(name: str, **changes: Any) -> Study:
    """Resolve a study for one task and one run.

    Parameters
    ----------
    name
        Name of a file in ``params/``, without ``.yaml``.
    changes
        Keys that replace what the files say, such as ``task="nutlin_2class"`` or ``learning_rate=1e-4``.

    Returns
    -------
    The study. Later wins: ``_base.yaml``, the task keys of the task's file, the study's file, `changes`.

    Raises
    ------
    ParameterError
        Unknown or duplicate key, wrong type, bad name; the message names file, key and the nearest valid key.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        msg = f"{name!r} is not a study name: use at most 64 letters, digits, _ and -, the first a letter or digit."
        raise ParameterError(msg)
    base = read_yaml(paths.PARAMS / "_base.yaml")
    own = read_yaml(paths.PARAMS / f"{name}.yaml")
    _refuse_unknown(base, "params/_base.yaml")
    _refuse_unknown(own, f"params/{name}.yaml")
    _refuse_unknown(changes, f"the changes of a run of {name}")
    tasks = own.get("tasks") or [name]
    if not isinstance(tasks, list):
        msg = f"params/{name}.yaml: tasks: write a list, such as [drug_5class] (it is {tasks!r})."
        raise ParameterError(msg)
    task = changes.get("task", own.get("task", tasks[0]))
    from_task: dict[str, Any] = {}
    if task != name:
        if task not in tasks:
            near = difflib.get_close_matches(str(task), tasks, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            msg = f"{task!r} is not a task of params/{name}.yaml, which has {', '.join(map(str, tasks))}.{hint}"
            raise ParameterError(msg)
        whole = read_yaml(paths.PARAMS / f"{task}.yaml")
        _refuse_unknown(whole, f"params/{task}.yaml")
        from_task = {key: value for key, value in whole.items() if key in TASK_KEYS}
    if set(changes) - UNDER_REFERENCE:  # a reference holds for a study as its files state it
        changes = {**{key: {} for key in REFERENCES}, **changes}
    layers = {
        "params/_base.yaml": base,
        f"params/{task}.yaml": from_task,
        f"params/{name}.yaml": own,
        f"the changes of a run of {name}": changes,
    }
    values = _validated({"study": name, "task": task}, layers)
    return values.treated(values.strategy)


def from_notebook(namespace: Mapping[str, Any]) -> Study:
    """Resolve the study of a notebook from the plain values that its parameters cell defined.

    Every plain value (text, number, list, null) in `namespace` counts as a parameter, so that
    ``papermill … -p learning_rate 1e-4`` works for each key of ``params/_base.yaml`` and a misspelt one is an error
    (papermill itself only warns and goes on).

    Parameters
    ----------
    namespace
        ``globals()`` of the notebook, directly after its parameters cell.

    Raises
    ------
    ParameterError
        As `load_study`; also when ``study`` is not defined.
    """
    plain = (str, int, float, bool, list, type(None))
    hidden = {"In", "Out", "exit", "quit"}
    given = {
        key: value
        for key, value in namespace.items()
        if isinstance(value, plain) and not key.startswith("_") and key not in hidden
    }
    if "study" not in given:
        msg = 'The notebook has no parameter `study`: set one in its parameters cell, such as study = "tiny".'
        raise ParameterError(msg)
    return load_study(given.pop("study"), **given)


def _refuse_unknown(content: Mapping[str, Any], where: str) -> None:
    valid = [key for key in Study.model_fields if key != "study"]
    for key in content:
        if key in valid:
            continue
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
        msg = f"{where}: unknown key {key!r}; the nearest valid key is {near[0]!r} (params/_base.yaml lists all)."
        raise ParameterError(msg)


def _validated(values: dict[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Study:
    origin: dict[str, str] = {}
    for where, content in layers.items():
        for key, value in content.items():
            values[key] = _number(key, value)
            origin[key] = where
    values["tasks"] = values["tasks"] or [values["study"]]
    if values["folds"] and values["fold"] is None:
        values["fold"] = 0
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else first["msg"].removeprefix("Value error, ").split(":")[0]
        reason = first["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
        where = origin.get(key, "params/_base.yaml") if first["loc"] else f"params/{values['study']}.yaml"
        shown = "" if not first["loc"] else f" (it is {values.get(key)!r})"
        msg = f"{where}: {key}: {reason}{shown}."
        raise ParameterError(msg) from None


def _number(key: str, value: Any) -> Any:
    """Read a whole number as a float where the key is one (strict types would refuse ``1`` for ``1.0``)."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and "float" in str(Study.model_fields[key].annotation) else value
