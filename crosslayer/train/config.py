"""What a training run is: a model, a corpus, and a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from crosslayer.data import DataConfig, Tokenizer
from crosslayer.errors import UserError
from crosslayer.plan import ModelConfig, parse_design, preset
from crosslayer.plan.cost import Recompute
from crosslayer.settings import from_mapping, to_mapping, unknown_key

# What may differ when a run goes on: it decides where and how the same steps are computed, what is written down about
# them and when, but not which weights come out (other than in rounding). All else makes another run.
MAY_CHANGE = frozenset(
    {
        "train.micro_batch_size",
        "train.tensor_parallel",
        "train.device",
        "train.compile",
        "train.activation_checkpointing",
        "train.eval_every",
        "train.eval_tokens",
        "train.checkpoint_every",
        "train.log_every",
        "train.tensorboard",
        "train.wandb",
        # The text and the tokenizer may move; `data_fingerprint` says what is in them.
        "data.paths",
        "data.valid_paths",
        "data.tokenizer",
    }
)


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's (arXiv 2405.12981, section 4) but for the size of a run.

    `tokens` is the budget; `batch_size` counts sequences per optimizer step, over all processes. A process sends at
    most `micro_batch_size` of its part through the model at a time (default: all). `tensor_parallel` processes hold
    parts of the same matrices and share the same sequences. The rate rises over the first `warmup_ratio` of the steps
    and falls along a cosine to `final_ratio` of its peak. Weight decay applies to matrices only. `mask_documents` keeps
    packed documents from seeing each other. `precision` auto is bf16 on CUDA and fp32 elsewhere; `compile`, left open,
    is on for CUDA only. `eval_every`, `checkpoint_every` and `log_every` count steps; 0 leaves evaluations and
    checkpoints during the run out. Evaluations during the run use `eval_tokens` of the held-out text, the last one all
    of it. `wandb` is the Weights & Biases project to log to.

    Raises:
        UserError: a value outside its range.
    """

    tokens: int = 1_000_000
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int | None = None
    tensor_parallel: int = 1
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.05
    final_ratio: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    mask_documents: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool | None = None
    activation_checkpointing: Recompute = "none"
    eval_every: int = 0
    eval_tokens: int = 100_000
    checkpoint_every: int = 500
    log_every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "batch_size", "tensor_parallel", "log_every", "eval_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_ratio", "final_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas must be two numbers from 0 up to 1, got {list(self.betas)}",
        )
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            f"micro_batch_size must divide batch_size {self.batch_size}, got {micro}",
        )
        _require(
            self.steps >= 1,
            f"tokens ({self.tokens}) must cover at least one batch of {self.batch_size} x {self.sequence_length}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    def micro_batch_of(self, data_ranks: int) -> int:
        """Sequences that each of `data_ranks` sends through the model at a time.

        Raises:
            UserError: a batch cannot be divided among them, or their parts not into micro batches.
        """
        rows, rest = divmod(self.batch_size, data_ranks)
        _require(not rest, f"train.batch_size {self.batch_size} must be a multiple of the data ranks, {data_ranks}")
        micro = min(self.micro_batch_size or rows, rows)
        _require(
            rows % micro == 0,
            f"train.micro_batch_size {micro} must divide the {rows} sequences of a data rank "
            f"(batch_size {self.batch_size} over {data_ranks})",
        )
        return micro


@dataclass(frozen=True)
class TrainConfig:
    """A training run. `model` holds `preset` or the fields of ModelConfig, and `design`, a name from the paper or a
    plan, applied to that shape; the vocabulary and the end-of-text id come from the tokenizer."""

    model: dict[str, Any]
    data: DataConfig = field(default_factory=DataConfig)
    train: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        # Checks the model's settings before any work is done; the vocabulary size is not known yet.
        make_model_config(self.model, vocab_size=256, eos_token_id=None, context=self.train.sequence_length)

    def model_config(self, tokenizer: Tokenizer) -> ModelConfig:
        """The model that the run trains, for text cut by `tokenizer`."""
        return make_model_config(
            self.model,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_id,
            context=self.train.sequence_length,
        )


def make_model_config(
    settings: dict[str, Any], *, vocab_size: int, eos_token_id: int | None, context: int
) -> ModelConfig:
    """The ModelConfig that the `model` section of a config describes.

    `settings` may name a `preset`, any field of ModelConfig (laid over the preset), and a `design`. Unless they say
    otherwise the vocabulary is the tokenizer's and max_position_embeddings is `context`.

    Raises:
        UserError: an unknown key or preset, a value that does not fit, or a vocab_size smaller than the tokenizer's,
            or max_position_embeddings than `context`.
    """
    derived = {"sharing_plan", "bos_token_id", "eos_token_id"}
    known = [f.name for f in fields(ModelConfig) if f.name not in derived]
    for key in settings:
        if key not in (*known, "preset", "design"):
            raise unknown_key(key, [*known, "preset", "design"], "model.")
    shape: dict[str, Any] = {"vocab_size": vocab_size, "max_position_embeddings": context}
    if settings.get("preset") is not None:
        base = to_mapping(preset(str(settings["preset"])))
        shape |= {key: base[key] for key in known}
    shape |= {key: value for key, value in settings.items() if key in known}
    config = from_mapping(ModelConfig, {**shape, "eos_token_id": eos_token_id}, "model.")
    # A matrix may have rows to spare (the paper's vocabulary is padded), but not too few.
    if config.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size {config.vocab_size} is less than the tokenizer's {vocab_size}")
    if config.max_position_embeddings < context:
        raise UserError(
            f"model.max_position_embeddings {config.max_position_embeddings} is less than "
            f"train.sequence_length {context}"
        )
    design = settings.get("design")
    if design is None:
        return config
    if not isinstance(design, str):
        raise UserError(f"model.design must be text such as H128-MQA-CLA2, cla2 or 0,0,2,2; got {design!r}")
    return parse_design(design, config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
