"""Every key of a study: its type, its default, and one line with its meaning and unit. Nothing else has defaults.

``make params`` writes ``params/_base.yaml`` from these sections. Each stage depends on its section, which has all keys
of the stages before it: cells, train set, tokens, training.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from tuneformer.model.strategies import STRATEGIES  # light: it imports no torch

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

Baseline = Literal["majority", "logistic_counts", "logistic_ranks", "knn_pca", "frozen_embedding_ridge", "bayes"]
GeneBaseline = Literal["expression", "frozen_embedding", "frozen_context"]
BASELINES, GENE_BASELINES = get_args(Baseline), get_args(GeneBaseline)
CONTROL = "random_init"
CEILING = "bayes"  # knows how the demo cells were made: what no model can pass

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Index = Annotated[int, Field(ge=0)]


def _key(default: Any, text: str, **limits: Any) -> Any:
    """Return one key of a study: its default, and one line with its meaning and unit."""
    return Field(default, description=text, validate_default=True, **limits)


class Section(BaseModel):
    """Part of a study: strict types, no unknown keys, nothing changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskKeys(Section):
    """The task (the only keys that a task's file may set for another study)."""

    label: str = _key("treatment", "obs column with the class of a cell; $VARIABLES expanded")
    classes: list[str] = _key([], "classes kept, in this order; [] = all, sorted")
    select_column: str | None = _key(None, "obs column by which cells are selected first; null = all cells")
    select_values: list[str] = _key([], "values of select_column kept")
    test_share: Share = _key(0.1, "share of cells in the fixed test set")
    validation_share: Annotated[float, Field(ge=0, lt=1)] = _key(
        1 / 9, "share of the rest used for validation; 1/9 = train : validation 8 : 1; 0 = all of it is trained on"
    )
    dose_column: str | None = _key(None, "obs column with the dose; made cells stay within class and dose")
    ordered: bool = _key(False, "true: the classes are in order, as doses are; how far off a cell is called is scored")
    groups: dict[str, list[str]] = _key({}, "name: classes; groups of classes that get a score of their own")
    group_by: str | None = _key(None, "obs column whose groups (wells, donors) the split never divides; null = by cell")
    demo_mechanism: Literal["additive", "interacting"] = _key(
        "additive", "demo: drug effects are additive | interacting (up or down by the state of another program)"
    )


class CellsKeys(TaskKeys):
    """Cells (01_qc)."""

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
    ] = _key("demo", "demo | demo_pancreas (simulated) | pbmc68k (real) | own | a downloaded one (data/sources.py)")
    path: str | None = _key(None, "own: an h5ad, 10x h5 or folder, or .dataset; $VARIABLES expanded")
    more_paths: list[str] = _key([], "own: further files; the genes that all have are kept, obs column file tells them")
    only_genes: str | None = _key(None, "regular expression: only genes whose symbol matches are kept; null = all")
    counts: str = _key("X", "where the raw counts are: X | raw | name of a layer | auto (the first that holds counts)")
    fractional_counts: bool = _key(False, "true: counts may be fractions (full-length protocols)")
    ensembl_id: str | None = _key(None, "var column of gene identifiers; null = the one with Ensembl ids, or the index")
    symbol: str | None = _key(None, "var column of gene symbols; null = a usual name, else the index")
    obs_table: str | None = _key(None, "csv or tsv with more obs columns; first column: cell names")
    min_class_cells: Index = _key(0, "with classes: [], smallest number of cells of a class that is kept")
    demo_cells: Count = _key(6000, "simulated cells before quality control")
    demo_seed: int = _key(0, "seed of the simulated cells")
    min_counts: int = _key(500, "smallest total count of a kept cell (UMI)")
    max_counts: int | None = _key(12000, "largest total count of a kept cell (UMI); null = no limit")
    max_mito_share: float = _key(0.5, "largest mitochondrial share of a cell's counts, 0 to 1")
    mito_prefix: str = _key("MT-", "prefix of mitochondrial gene symbols")
    min_hash_umis: Index | None = _key(30, "sciplex: a cell has more hash UMIs than this; null = no limit")
    min_hash_ratio: float | None = _key(10.0, "sciplex: ratio of the first hash to the second above this; null = none")
    max_hash_qval: Share | None = _key(0.01, "sciplex: q value of a cell's hashes below this; null = no limit")
    split_seed: int = _key(0, "seed of train, validation and test; the same for every run")
    folds: Index = _key(0, "folds of a cross-validation; 0 = one test set of test_share")


class TrainSetKeys(CellsKeys):
    """What a model is trained on (03_pseudobulk, 04_synthetic)."""

    train_set: Literal["single_cell", "pseudobulk", "synthetic", "mixture", "bulk"] = _key(
        "single_cell", "single_cell | pseudobulk | synthetic | mixture | bulk (samples of bulk_counts)"
    )
    train_cells: Count | None = _key(None, "single cells behind a train set, drawn stratified by class; null = all")
    cells_per_class: Count | None = _key(None, "single_cell: at most so many training cells per class")
    k: Annotated[int, Field(ge=2)] | None = _key(None, "pseudobulk: mean number of cells in a group")
    aggregation: Literal["sum", "mean", "approx_mean", "one_cell"] = _key(
        "sum", "pseudobulk: sum | mean | approx_mean (sum / k) | one_cell (one single cell of each group)"
    )
    depth: Literal["own", "single_cell"] = _key(
        "own", "pseudobulk sum: own | single_cell (thinned to one cell's counts)"
    )
    token_length: Literal["own", "single_cell"] = _key(
        "own", "pseudobulk: own | single_cell (cut at their median length)"
    )
    points: Literal["own", "single_cell"] = _key(
        "own", "pseudobulk: own (each cell in one group) | single_cell (as many as single cells; groups share cells)"
    )
    steps_of: Literal["own", "single_cell", "pseudobulk", "upsampled"] = _key(
        "own", "whose number of cells sets the optimizer steps: own | single_cell | pseudobulk | upsampled"
    )
    validation_cells: Literal["made", "real"] = _key(
        "made", "pseudobulk: validate on points | on points and single cells"
    )
    group_spread: NotNegative = _key(0.25, "pseudobulk: standard deviation of the group size, as a share of k")
    generator: Literal["gaussian", "gaussian_full", "nb", "nb_copula", "copies"] = _key(
        "gaussian", "synthetic, mixture: gaussian (thesis) | gaussian_full | nb | nb_copula | copies (of real cells)"
    )
    variances: Literal["labelled", "untreated"] = _key("labelled", "synthetic: which cells give the variances")
    means: Literal["single_cell", "bulk"] = _key("single_cell", "synthetic: cells or bulk samples give the means")
    pad: Count | None = _key(None, "mixture: cells added to each of padded_classes")
    share: Share | None = _key(None, "mixture: share of the cells replaced by synthetic ones")
    padded_classes: list[str] = _key([], "mixture: classes that pad adds cells to")
    untreated_class: str = _key("Untreated", "synthetic: class whose cells alone give the variances")
    synthetic_cells: Count | None = _key(None, "synthetic cells per class and dose; null = as many as single cells")
    covariance_rank: Count = _key(20, "gaussian_full, nb_copula: factors that carry the correlations between genes")
    bulk_counts: str | None = _key(None, "csv or tsv of genes x samples; demo = simulated")
    bulk_samples: str | None = _key(
        None, "its sample sheet: csv or tsv with columns sample, class and, with doses, dose"
    )


class TokensKeys(TrainSetKeys):
    """Tokens (02_tokenize)."""

    checkpoint: str = _key(
        "demo", "demo (simulated) | mini (real cells) | Geneformer-V1-10M, -V2-104M, -V2-316M | a local folder"
    )
    vocabulary: Literal["checkpoint", "fit"] = _key("checkpoint", "checkpoint | fit (medians from the training cells)")
    max_length: Count | None = _key(None, "tokens per cell, special ones included; null = the checkpoint's positions")


class TrainingKeys(TokensKeys):
    """Fine-tuning (05_finetune_strategies)."""

    strategy: Literal[tuple(STRATEGIES)] | Baseline | GeneBaseline = _key(
        "full", "what learns when, or a baseline; an arm's name sets it"
    )
    pooling: Literal["first", "mean"] = _key(
        "first", "first (stock head, first token) | mean (over the tokens of a cell)"
    )
    freeze_layers: Index = _key(2, "selective: encoder layers frozen, from the first")
    freeze_embeddings: bool = _key(False, "selective: freeze the embeddings too (official freeze_layers does not)")
    head_share: Share = _key(0.5, "lp_ft: share of the epochs in which only the head learns")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = _key(
        0.8, "layerwise_lr_decay: factor from a layer to the next below"
    )
    lora_rank: Count = _key(8, "lora: rank of the update")
    lora_alpha: Count = _key(16, "lora: scale of the update")
    loss: Literal["cross_entropy", "weighted", "balanced_softmax", "focal", "dice", "bce"] = _key(
        "cross_entropy", "cross_entropy | weighted | balanced_softmax | focal | dice | bce"
    )
    sampling: Literal["all", "upsampled", "balanced"] = _key(
        "all", "training cells: all | upsampled (rare classes repeated) | balanced (drawn by class)"
    )
    focal_gamma: NotNegative = _key(2.0, "focal: 0 is cross-entropy; larger: well-classified cells count less")
    focal_alpha: Literal["equal", "balanced"] = _key("equal", "focal: equal | balanced (inverse class frequency)")
    learning_rate: Annotated[float, Field(gt=0)] = _key(5e-5, "peak learning rate of AdamW")
    weight_decay: NotNegative = _key(0.001, "AdamW")
    epochs: Count = _key(10, "passes over the training cells")
    batch_size: Count = _key(12, "cells per optimizer step")
    min_steps: Index = _key(0, "smallest number of optimizer steps; with few cells they are seen more often")
    warmup_steps: Index = _key(500, "optimizer steps of linear warm-up ...")
    warmup_cap: Annotated[float, Field(gt=0, le=1)] | None = _key(0.1, "... at most this share of all; null = no limit")
    epoch_rule: Literal["last", "validation_loss"] = _key(
        "last", "weights kept: last | validation_loss (lowest; of fewer than 200 validation cells: last)"
    )
    early_stop: Count | None = _key(None, "validation_loss: epochs without a lower one before stopping; null = never")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto | cpu | cuda")
    precision: Literal["auto", "fp32", "bf16"] = _key(
        "auto", "auto (bf16 where the hardware computes it) | fp32 | bf16"
    )
    attention: Literal["auto", "sdpa", "eager"] = _key(
        "auto", "auto (cells packed, the fastest kernel here) | sdpa | eager"
    )
    frozen_cache_gb: NotNegative = _key(
        4.0, "10^9 bytes for what frozen layers make of cells: kept, without their dropout; 0 = made in each step"
    )
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = _key(
        0.0, "above 0 the CPU takes a kernel several times slower"
    )
    threads: Count | None = _key(None, "CPU threads of a run; null = all cores")


class GenesKeys(Section):
    """Genes (07_gene_dosage)."""

    gene_classes: str = _key(
        "demo", "demo (simulated) | a csv with columns of genes and classes, or the official pickle"
    )
    gene_folds: Annotated[int, Field(ge=2)] = _key(5, "folds of the cross-validation over genes")
    gene_cells: Count = _key(200, "cells in whose context the genes are read")
    gene_null: bool = _key(False, "demo: true draws the classes without any tie to the network")
    gene_permutations: Count = _key(100, "permutations of the classes: the null of each method")


class CompressionKeys(Section):
    """Compression (08_compress)."""

    compressions: list[
        Literal["bf16", "int8_dynamic", "int8_weights", "pruned", "heads", "neurons", "layers", "onnx", "onnx_int8"]
    ] = _key(["bf16", "int8_dynamic", "int8_weights", "onnx_int8"], "also pruned | heads | neurons | layers | onnx")
    pruned_shares: list[Share] = _key([0.3, 0.5, 0.7], "shares of weights, heads or neurons that are pruned")
    benchmark_cells: Count = _key(256, "cells of one measurement of speed")
    benchmark_batch: Count = _key(32, "cells of a batch in measurements")
    benchmark_repeats: Count = _key(5, "repetitions of a measurement of speed; their median counts")


class PretrainingKeys(Section):
    """Pre-training of the checkpoints that the package ships (00_pretrain)."""

    pretrain_files: list[str] = _key([], "h5ad files of real cells, or folders of them; [] = simulated cells")
    pretrain_medians: str | None = _key(
        None, "real cells: folder with Geneformer's dictionaries, for medians and symbols; null = fit all medians"
    )
    pretrain_cells: Count = _key(40000, "simulated unperturbed cells")
    pretrain_types: Count = _key(300, "simulated cell types")
    pretrain_steps: Count = _key(8000, "optimizer steps")
    pretrain_batch: Count = _key(64, "cells per step")
    pretrain_learning_rate: Annotated[float, Field(gt=0)] = _key(2e-3, "peak learning rate")
    pretrain_seed: int = _key(0, "corpus, weights, masks, order")
    pretrain_output: str | None = _key(None, "folder of the checkpoint; null = runs/<study>/pretrained")
    rank_noise: NotNegative = _key(0.3, "log-normal noise on the corpus before ranking, so that medians tell nothing")
    mask_share: Share = _key(0.15, "share of tokens to be predicted")
    pretrain_length: Count = _key(192, "tokens per cell = positions of the model")
    hidden_size: Count = _key(64, "width")
    layers: Count = _key(3, "encoder layers")
    heads: Count = _key(2, "attention heads")
    feed_forward_size: Count = _key(128, "width of the feed-forward part")


class AskedKeys(Section):
    """What is asked."""

    question: str = _key("", "the question, in one sentence; heads the report")
    kind: Literal["cells", "genes", "compression"] = _key("cells", "cells (05) | genes (07) | compression (08)")
    tasks: list[Name] = _key([], "names of params files whose task keys are used; [] = the study's own task keys")
    arms: dict[str, dict[str, Any] | None] = _key(
        dict.fromkeys(
            ["full", "linear_probe", "selective", "lp_ft", CONTROL, *(name for name in BASELINES if name != CEILING)]
        ),
        "what is compared: a name and the keys that differ; {key} in a name makes one arm per value of a list",
    )
    contrasts: dict[str, list[str]] = _key(
        {"pre-training": [CONTROL, "full"], "linear model": ["logistic_counts", "full"]},
        "what is tested, and nothing else: [reference, arm]; {key} pairs arms with the same value",
    )
    figure: dict[Literal["x", "hue", "y"], str] = _key(
        {}, "columns of the results: {x: k, hue: aggregation, y: macro_f1}"
    )
    score: str = _key("macro_f1", "the score that is judged")
    margin: Share = _key(0.03, "two arms are the same if their difference is clearly smaller than this")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = _key(
        [0, 1, 2, 3, 4], "seeds: cells drawn, head, order, dropout"
    )
    seeds_per_job: Count | None = _key(None, "seeds that one job runs, to spread an arm over a cluster; null = all")
    expected_macro_f1: dict[str, float] = _key({}, "arm: mean test macro-F1 over all its runs, checked by 05 and 06")
    expected_tolerance: NotNegative = _key(0.0, "accepted distance to it: twice the seed-to-seed spread")
    task: Name | None = _key(None, "the task of a notebook; null = the first of the study")
    arm: Name | None = _key(None, "the arm of a notebook; null = the first of the study")
    seed: Index = _key(0, "the seed of a run; notebook 05 runs all seeds")
    fold: Index | None = _key(None, "the fold of a run; null = the first, where there are folds")


SECTIONS = (
    AskedKeys,
    TaskKeys,
    CellsKeys,
    TrainSetKeys,
    TokensKeys,
    TrainingKeys,
    GenesKeys,
    CompressionKeys,
    PretrainingKeys,
)
