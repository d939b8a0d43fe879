"""ModelConfig: the shape of a model and its sharing plan, and its config.json form.

Field names are those of Hugging Face configs. With the identity plan and a shape that Llama, Mistral, Qwen2 or Qwen3
can express, the config.json written here is plainly that model's; anything else is written as model_type
"crosslayer" with its plan under "sharing_plan".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError
from crosslayer.files import read_json
from crosslayer.plan.sharing import SharingPlan
from crosslayer.settings import from_mapping

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "crosslayer")
ROPE_TYPES = ("linear", "llama3", "yarn")

# What transformers assumes where a config.json says nothing, as far as it differs from the defaults of ModelConfig.
HUGGING_FACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those first trained on.

    `rope_type` is linear, llama3 (Llama 3.1 and later) or yarn (arXiv 2309.00071, as in Qwen configs); the other
    fields have the meaning that Hugging Face configs give them.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type {self.rope_type!r} is not supported; known: default, {', '.join(ROPE_TYPES)}")
        if not self.factor > 0:
            raise UserError(f"rope scaling factor must be positive, got {self.factor!r}")
        if self.rope_type == "llama3" and not self.original_max_position_embeddings:
            raise UserError("rope_type llama3 needs original_max_position_embeddings")

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, under the names Hugging Face uses."""
        required = ("rope_type", "factor")
        needed = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(self.rope_type, ())
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in required or f.name in needed or getattr(self, f.name) != f.default
        }


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer (RMSNorm, RoPE, SwiGLU) and its sharing plan.

    `num_key_value_heads` and `head_dim` default to multi-head attention and hidden_size / num_attention_heads;
    `sharing_plan` defaults to the identity. `separate_kv_norm` gives owners of a shared slot an RMSNorm gain of their
    own for the K/V projections, next to the one for the Q projection (arXiv 2405.12981); it has no effect where
    nothing is shared. `attention_bias` is a bias on Q, K and V, `attention_output_bias` on the output projection,
    `qk_norm` an RMSNorm over each head's query and key before RoPE.

    Raises:
        UserError: sizes that do not fit together; the message names the field and what would be right.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    sharing_plan: SharingPlan | None = None
    separate_kv_norm: bool = True

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _positive_int(name, getattr(self, name))
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{name} must be a positive number, got {value!r}")
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _positive_int("num_key_value_heads", self.num_key_value_heads)
        _positive_int("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        plan = self.sharing_plan or SharingPlan(tuple(range(self.num_hidden_layers)))
        object.__setattr__(self, "sharing_plan", plan)
        if plan.num_layers != self.num_hidden_layers:
            raise UserError(
                f"the sharing plan has {plan.num_layers} layers but num_hidden_layers is {self.num_hidden_layers}"
            )

    @property
    def plan(self) -> SharingPlan:
        assert self.sharing_plan is not None  # filled in by __post_init__
        return self.sharing_plan

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def has_kv_norm(self, layer: int) -> bool:
        """Whether `layer` normalises its input separately for its K/V projections."""
        return self.separate_kv_norm and self.plan.shares_slot(layer)

    def with_plan(self, plan: SharingPlan) -> ModelConfig:
        return replace(self, sharing_plan=plan)

    # -- config.json -------------------------------------------------------------------------------------------

    @property
    def model_type(self) -> str:
        """The plainest Hugging Face model type that means the same model."""
        windows = set(self.plan.windows)
        if not self.plan.is_identity or len(windows) > 1:
            return "crosslayer"
        kind = (self.attention_bias, self.attention_output_bias, self.qk_norm)
        if windows != {None}:
            return "mistral" if kind == (False, False, False) else "crosslayer"
        known = {
            (False, False, False): "llama",
            (True, True, False): "llama",
            (True, False, False): "qwen2",
            (False, False, True): "qwen3",
            (True, True, True): "qwen3",
        }
        return known.get(kind, "crosslayer")

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        model_type = self.model_type
        architecture = {"crosslayer": "Crosslayer"}.get(model_type, model_type.capitalize()) + "ForCausalLM"
        data = asdict(self)
        for name in (
            "sharing_plan",
            "separate_kv_norm",
            "rope_scaling",
            "rope_theta",
            "attention_output_bias",
            "qk_norm",
        ):
            del data[name]
        scaling = self.rope_scaling.to_dict() if self.rope_scaling else {"rope_type": "default"}
        data |= {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            # Both spellings: the second is what transformers has written since version 5.
            "rope_scaling": self.rope_scaling.to_dict() if self.rope_scaling else None,
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }
        if model_type == "mistral":
            data["sliding_window"] = self.plan.windows[0]
        elif model_type == "crosslayer":
            data |= {
                "attention_output_bias": self.attention_output_bias,
                "qk_norm": self.qk_norm,
                "separate_kv_norm": self.separate_kv_norm,
                "sharing_plan": self.plan.to_dict(),
            }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json of one of `MODEL_TYPES`.

        Raises:
            UserError: another model type, a feature this model does not have, or a missing or unusable field.
        """
        model_type = data.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(f"model_type {model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}")
        data = HUGGING_FACE_DEFAULTS.get(model_type, {}) | dict(data)
        if data.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"hidden_act {data['hidden_act']!r} is not supported; this model uses silu")
        if data.get("mlp_bias"):
            raise UserError("mlp_bias is not supported")
        names = {f.name for f in fields(cls)} - {"rope_scaling", "sharing_plan", "rope_theta"}
        values = {name: data[name] for name in names if data.get(name) is not None}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in values:
                raise UserError(f"config.json: {name} is missing")
        values |= _rope(data, values.get("max_position_embeddings", 2048))
        if model_type == "llama" and values.get("attention_bias"):
            values["attention_output_bias"] = True
        elif model_type == "qwen2":
            values["attention_bias"] = True
        elif model_type == "qwen3":
            values["qk_norm"] = True
            values["attention_output_bias"] = bool(values.get("attention_bias"))
        if model_type == "crosslayer":
            plan = data.get("sharing_plan")
            if not isinstance(plan, Mapping):
                raise UserError("config.json: model_type crosslayer needs a sharing_plan")
            values["sharing_plan"] = SharingPlan.from_dict(plan)
        else:
            layers = _positive_int("num_hidden_layers", values["num_hidden_layers"])
            values["sharing_plan"] = SharingPlan(tuple(range(layers)), windows=_windows(data, model_type, layers))
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: Path) -> ModelConfig:
        """Read a config.json, or the one in a model folder.

        Raises:
            UserError: the file is missing or is not JSON, or as `from_dict`; the message names the file.
        """
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise UserError(f"{file}: no such file; a model folder has a config.json")
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None


def _positive_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _rope(data: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling (`rope_parameters` since transformers 5)."""
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found = data.get(name) or {}
        if not isinstance(found, Mapping):
            raise UserError(f"{name} must be an object such as {{'rope_type': 'linear', 'factor': 2.0}}, got {found!r}")
        parameters |= found
    theta = parameters.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = float(theta) if isinstance(theta, int) else theta
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if unknown := set(parameters) - {f.name for f in fields(RopeScaling)}:
        raise UserError(f"rope scaling {kind!r}: {sorted(unknown)[0]!r} is not supported")
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", max_position_embeddings)
    scaling = from_mapping(RopeScaling, {"rope_type": kind, **parameters}, "rope_scaling.")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _windows(data: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, as transformers reads Mistral and Qwen configs."""
    window = data.get("sliding_window")
    if model_type == "llama" or not window:
        return (None,) * layers
    if model_type == "mistral":
        return (window,) * layers
    if not data.get("use_sliding_window"):
        return (None,) * layers
    full, sliding = "full_attention", "sliding_attention"
    first, kinds = data["max_window_layers"], data.get("layer_types")
    if not isinstance(first, int) or not isinstance(kinds, list | None):
        raise UserError(
            f"max_window_layers and layer_types must be a whole number and a list, got {first!r} and {kinds!r}"
        )
    kinds = kinds or [sliding if layer >= first else full for layer in range(layers)]
    for layer, kind in enumerate(kinds):
        if kind not in (full, sliding):
            raise UserError(f"layer {layer}: layer_types {kind!r} is not supported; known: {full}, {sliding}")
    return tuple(window if kind == sliding else None for kind in kinds)
