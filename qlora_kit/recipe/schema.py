"""What a recipe may say: one frozen model a section, each key with its type, its default, its unit and its reason.

This file is the only place where a key or a default is written down. The check of a value and the words for it stand in
the same type (`Says`), so that an error message cannot promise what the check refuses; `words.py` reads both off.

Sources of defaults: QLoRA, Dettmers et al. 2023, arXiv 2305.14314, and its released scripts; LoRA, Hu et al. 2021,
arXiv 2106.09685; LoRA Without Regret, Schulman et al. 2025, doi 10.64434/tml.20250929.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qlora_kit import units
from qlora_kit.recipe.patterns import compile_pattern
from qlora_kit.recipe.tasks import TaskName

LARGEST_SIZE = 2**50
"""A budget above a PiB is a slip of the pen."""
LARGEST_WEIGHT = 1000
"""A larger weight of a source is meant as something else: an epoch would see each of its rows as often."""

LARGEST_RATE = 1000
"""A higher learning rate is a slip of the pen: a step of Adam moves every number by about the rate."""


class Says:
    """Stands in a type beside its check and says in words what passes: one phrase for each alternative."""

    def __init__(self, *alternatives: str) -> None:
        self.alternatives = alternatives


def _is_line(text: str) -> str:
    if not text.strip() or text.splitlines() != [text] or "\0" in text:
        raise ValueError("it must be one line and not empty")
    return text


def _is_block_size(size: int) -> int:
    if not 32 <= size <= 4096 or size & (size - 1):
        raise ValueError
    return size


def _is_size(text: str) -> str:
    try:
        count = units.parse_bytes(text)
    except (ValueError, OverflowError):
        raise ValueError from None
    if count > LARGEST_SIZE:
        raise ValueError(f"no device has more than {units.format_bytes(LARGEST_SIZE)}")
    return text


def _is_pattern(text: str) -> str:
    if text.startswith("re:"):
        try:
            compile_pattern(text.removeprefix("re:"))
        except ValueError as error:
            raise ValueError(f"the regular expression {error}") from None
    return text


Auto = Literal["auto"]
Text = Annotated[str, AfterValidator(_is_line), Says("text")]
Count = Annotated[int, Field(ge=1), Says("a whole number of at least 1")]
Above0 = Annotated[float, Field(gt=0), Says("a number above 0")]
Rate = Annotated[float, Field(gt=0, le=LARGEST_RATE), Says(f"a number above 0 up to {LARGEST_RATE}")]
Number = Annotated[int | float, Field(gt=0), Says("a number above 0")]
Weight = Annotated[int | float, Field(gt=0, le=LARGEST_WEIGHT), Says(f"a number above 0, at most {LARGEST_WEIGHT}")]
BlockSize = Annotated[int, AfterValidator(_is_block_size), Says("a power of two from 32 to 4096")]
Size = Annotated[str, AfterValidator(_is_size), Says("a size above 0 with its unit (24GiB)")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3})$"), Says("auto", "cpu", "cuda", "cuda:N")]
ModelName = Annotated[Text, Says("a folder", "a hub id")]
AdapterName = Annotated[Text, Says("the folder of an adapter", "the folder of a run")]
DataName = Annotated[Text, Says("a file", "a folder", "a hub id")]
EvalName = Annotated[Text, Says("auto", "a file", "a folder", "a hub id")]
TemplateName = Annotated[Text, Says("auto", "the name of a shipped template", "a file")]
Layers = Literal["all-linear", "attention", "mlp", "experts", "head"]
Expression = Annotated[
    str, Field(pattern=r"^re:."), AfterValidator(_is_pattern), Says('"re:" and a regular expression')
]
LayerName = Annotated[Text, AfterValidator(_is_pattern), Says("the name of a linear layer")]
LayerNames = Annotated[list[LayerName], Field(min_length=1), Says("a list of names ([q_proj, v_proj])")]
Columns = Annotated[dict[Text, Text], Says("a mapping of the expected column to the file's column")]
Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "completion", "text", "preference", "labelled", "classification"
]
Optimizer = Literal[
    "adamw", "sgd", "adamw_8bit", "adamw_32bit", "lion_8bit", "ademamix_8bit",
    "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "paged_ademamix_8bit",
]  # fmt: skip


class Section(BaseModel):
    """Values are taken as they are written, never converted; a key that is not listed is refused."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Base(Section):
    """The frozen model, and how its weights are held."""

    model: ModelName
    """The model to fine-tune: a folder if the name begins with ., / or ~ or exists on disk, otherwise a hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model; null: the newest."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the linear layers are stored; of the 4-bit types, nf4 has the lowest perplexity (QLoRA, table 2)."""
    double_quant: bool = True
    """Quantise the block constants as well: 4.127 bits per parameter instead of 4.5 (QLoRA, section 3)."""
    block_size: BlockSize = 64
    """Number of weights that share one quantisation constant; 64 as in QLoRA, section 3."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type that weights are decoded to; auto: bfloat16 if the hardware supports it, else float16 (float32 on a CPU)."""
    skip: list[Text] = []
    """Names of linear layers to leave unquantised, in addition to heads and classifiers."""
    quantize_head: bool | Auto = False
    """Also quantise output head and input embedding; block_size must divide their width; auto: if nothing else fits."""
    cache: bool = False
    """Keep the quantised weights on disk, so that later loads are fast; in nf4, 0.52 GB for a billion weights."""
    attention: Literal["sdpa", "eager", "flex", "flash"] = "sdpa"
    """Attention implementation; flex and flash need a CUDA device; a family without sdpa uses eager instead."""
    device: Device = "auto"
    """Device to train on; auto: the first CUDA device if there is one, else the CPU."""


class Lora(Section):
    """The adapters: which layers have them, how large they are and how they are initialised."""

    from_: AdapterName | None = Field(default=None, alias="from")
    """An adapter or run to continue from; the optimizer starts fresh."""
    rank: Count | Auto = 16
    """Rank of the update B A; it matters little (QLoRA, section 4); auto: 16 to 256, the least that holds the data."""
    alpha: Number = 32
    """The update is multiplied by alpha / rank; 32 as in LoRA Without Regret."""
    targets: Layers | Expression | LayerNames = "all-linear"
    """Layers that get an adapter; matching 16-bit tuning takes all linear layers (QLoRA, section 4)."""
    dropout: Annotated[float, Field(ge=0, lt=1), Says("a number from 0 to below 1")] = 0.0
    """Dropout on the adapter's input during training; 0 is fastest, QLoRA's scripts use 0.05 to 0.1."""
    scaling: Literal["standard", "rslora"] = "standard"
    """standard: alpha / rank, as in LoRA, section 4.1; rslora: alpha / sqrt(rank), for high ranks."""
    init: Literal["default", "gaussian", "pissa", "loftq"] = "default"
    """default: A uniform within 1 / sqrt(inputs), B zero; gaussian: A normal, B zero; pissa, loftq: from the weight."""
    dora: bool = False
    """DoRA: also train a magnitude for each output of a layer."""
    lr_ratio: Rate = 1.0
    """Learning rate of B divided by that of A (LoRA+); LoRA Without Regret keeps them equal."""
    rank_pattern: Annotated[
        dict[LayerName, Count], Says('a mapping of layer names or "re:..." to whole numbers of at least 1')
    ] = {}
    """Different ranks for some layers: from layer name or "re:..." to rank."""
    alpha_pattern: Annotated[
        dict[LayerName, Number], Says('a mapping of layer names or "re:..." to numbers above 0')
    ] = {}
    """Different alphas for some layers: from layer name or "re:..." to alpha."""
    also_train: list[Text] = []
    """Modules that are trained and saved in full beside the adapters, such as a new head: names, or ends of names."""
    added_tokens: list[Text] = []
    """Tokens whose embedding and head rows are trained and saved; a token that is not in the vocabulary is added."""
    untie_head: bool = False
    """Let an adapter change a head that is tied to the embedding; merged exports then store both."""


class Place(Section):
    """One of several sources of rows."""

    path: DataName
    """Where its rows are; for a configuration of a hub data set, ID:CONFIG."""
    split: Text = "train"
    """Split of a hub data set, such as train or train[:10%]."""
    format: Format | None = None
    """Format of its rows; null: that of data.format."""
    columns: Columns | None = None
    """Names of its columns, as in data.columns; null: those of data.columns."""


class Source(Place):
    """One of several sources of training rows."""

    weight: Weight = 1
    """How often an epoch sees each row: 2 is twice; 0.5 is half of the rows, and the other half in the next epoch."""


Sources = Annotated[
    list[DataName | Source], Field(min_length=1), Says("a list of these or of {path, split, format, columns, weight}")
]
Places = Annotated[
    list[DataName | Place], Field(min_length=1), Says("a list of these or of {path, split, format, columns}")
]


class Data(Section):
    """The rows (training examples): where they come from and which of their tokens are trained on."""

    train: DataName | Sources
    """The training rows: one source or several."""
    eval: EvalName | Places | None = "auto"
    """Held-out rows: one source or several; auto: 2 % of the rows, at most 200, chosen by content; null: none."""
    format: Format = "auto"
    """Format of the rows; auto: recognised by the column names."""
    columns: Columns = {}
    """Your names for the columns that a format expects, as in {instruction: question, output: answer}."""
    max_tokens: Count = 2048
    """Longest row that is taken whole, in tokens."""
    over_length: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to longer rows (they are counted): left out, cut to the length, cut into pieces, or an error."""
    packing: bool | Auto = "auto"
    """Put rows into sequences of at most max_tokens, each seeing only itself; auto: end to end without padding."""
    loss_on: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Tokens that are trained on: those of all assistant turns, of the last one, of the completion, or all."""
    template: TemplateName = "auto"
    """Chat template: chatml, plain or a Jinja file; auto: the tokenizer's, or plain if it has none."""
    thinking: Literal["keep", "strip", "empty"] = "keep"
    """Reasoning in assistant turns: kept, left out, or replaced by an empty block (both turn enable_thinking off)."""
    on_error: Literal["stop", "skip"] = "stop"
    """Rows that cannot be used: stop with an error that names them, or leave them out, counted and named."""


class Train(Section):
    """The run: objective, length, optimizer, and what is written along the way."""

    task: TaskName = "sft"
    """Objective: answers, raw text, classes, preference pairs (dpo, ipo, orpo), or answers rated good or bad (kto)."""
    epochs: Number = 1
    """Passes over the rows; fractions are allowed."""
    tokens: Count | None = None
    """Tokens to process, prompts included and padding not, by the mean length of the rows; overrides epochs."""
    steps: Count | None = None
    """Optimizer steps; overrides epochs and tokens."""
    micro_batch: Count | Auto = "auto"
    """Rows of the longest kind in one forward pass; auto: as many as fit into 2,048 tokens, at most 16."""
    accumulation: Count | Auto = "auto"
    """Micro-batches per step; auto: about 16 rows (not packed sequences) per step, as in QLoRA's scripts."""
    lr: Rate | Auto = "auto"
    """Peak learning rate; auto: LoRA Without Regret's fit (family, width); a tenth for preferences or full tuning."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning-rate schedule after the warm-up; constant as in QLoRA and LoRA Without Regret."""
    warmup: Annotated[float, Field(ge=0, le=1), Says("a number from 0 to 1")] = 0.03
    """Share of the steps over which the learning rate rises; 0.03 as in QLoRA's scripts."""
    optimizer: Optimizer = "paged_adamw_8bit"
    """Optimizer; paged: its state can move to host memory at a peak (QLoRA, section 3), on CUDA only."""
    master_weights: Literal["auto", "fp32", "stochastic", "none"] = "auto"
    """How bfloat16 weights keep small updates; auto: float32 copies, but stochastic rounding if all weights train."""
    weight_decay: Annotated[float, Field(ge=0), Says("a number of at least 0")] = 0.0
    """Decoupled weight decay, per step and unit of learning rate."""
    max_grad_norm: Above0 = 0.3
    """Gradient norm above which gradients are clipped; 0.3 as in QLoRA's scripts."""
    beta: Above0 = 0.1
    """For dpo, ipo and kto, how closely to stay to the starting model; for orpo, the weight of the odds ratio."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Says("a whole number from 0 to 4294967295")] = 0
    """Seed of every random choice; 32 bits, because NumPy takes no more."""
    eval_every: Count | Auto = "auto"
    """Steps between evaluations; auto: about 10 evaluations per run."""
    save_every: Count | Auto = "auto"
    """Steps between checkpoints; auto: about every 15 minutes. Each better evaluation and the end save one anyway."""
    sample_every: Count | None = None
    """Steps between sample answers to a few held-out prompts, written to samples.jsonl; null: none."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep; the one with the lowest held-out loss is kept besides."""
    early_stopping: Count | None = None
    """End the run after this many evaluations in a row without a lower held-out loss; null: never."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get the metrics, in addition to metrics.jsonl."""
    full_finetune: bool = False
    """Train every weight of the base instead of adapters; base.quantization has no effect then."""


class Memory(Section):
    """How much memory the run may take, and what is traded for it."""

    budget: Size | None = None
    """Device memory that the run may use, enforced; null on CUDA: what is free at the start, less a stated reserve."""
    activations: Literal["auto", "keep", "selective", "recompute", "offload"] = "auto"
    """What blocks keep for backward: all, products, inputs, or inputs in host memory; auto: the fastest that fits."""
    loss_chunk: Count | Auto = "auto"
    """Tokens whose logits exist at the same time; auto: as many as take 256 MiB."""
    eval_tokens: Count | Auto = "auto"
    """Tokens per evaluation batch (a longer row goes alone); auto: 2,048, or fewer where the budget needs it."""


class Recipe(Section):
    """Everything that a run depends on."""

    base: Base
    """Settings of the frozen model."""
    lora: Lora = Lora()
    """Settings of the adapters."""
    data: Data
    """Settings of the rows."""
    train: Train = Train()
    """Settings of the run."""
    memory: Memory = Memory()
    """Settings of the memory."""
    output: Text = "runs/NAME"
    """The run folder, relative to the working directory; NAME is the recipe's own name."""
