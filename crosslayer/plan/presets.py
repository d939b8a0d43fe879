"""The shapes of the Cross-Layer Attention paper (arXiv 2405.12981), and its design names such as H128-MQA-CLA2.

A design name is `[H<d>]-[MHA|GQA<n>|MQA]-[plan]`: the size of a head, the number of KV heads, and any string that
`parse_plan` reads. Each part may be left out and then stays what it is in the model that the name is applied to;
upper and lower case mean the same.
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches

from crosslayer.errors import UserError
from crosslayer.plan.config import ModelConfig
from crosslayer.plan.designs import parse_plan
from crosslayer.plan.sharing import SharingPlan


def _paper(layers: int, hidden_size: int, intermediate_size: int) -> ModelConfig:
    # Vocabulary, norm epsilon and RoPE base are those of the authors' released config; the paper does not state them,
    # nor whether embeddings are tied.
    return ModelConfig(
        vocab_size=50304,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        head_dim=128,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.01275,
    )


PRESETS = {
    "paper-1b": _paper(layers=20, hidden_size=2048, intermediate_size=5472),
    "paper-3b": _paper(layers=32, hidden_size=3072, intermediate_size=8192),
}


def preset(name: str) -> ModelConfig:
    """The config of a preset: multi-head attention, nothing shared.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


# Query heads are hidden_size // head_dim, except in this row of the paper's table 1 (the quotient is 44).
_QUERY_HEADS = {(2048, 46): 45}

_DESIGN_NAME = re.compile(
    r"(?:h(?P<head_dim>\d+)(?:-(?=.)|$))?"
    r"(?:(?:(?P<mha>mha)|(?P<mqa>mqa)|gqa(?P<groups>\d+))(?:-(?=.)|$))?"
    r"(?P<plan>.*)",
    re.IGNORECASE,
)


def parse_design(name: str, base: ModelConfig) -> ModelConfig:
    """`base` with the head size, KV heads and sharing plan that a design name gives it.

    A new head size keeps the query width: hidden_size // head_dim query heads (45 for the paper's 2048 / 46). When
    the name says nothing of KV heads, their number stays, but multi-head attention stays multi-head.

    Raises:
        UserError: a part that is not known (the nearest name is given), or sizes that do not fit the base.
    """
    match = _DESIGN_NAME.fullmatch(name.strip())
    if match is None or not match[0]:
        raise UserError(f"design {name!r}: want a name such as H128-MQA-CLA2, MQA, CLA2 or 0,0,2,2")
    try:
        head_dim, heads = base.head_dim, base.num_attention_heads
        if match["head_dim"]:
            head_dim = int(match["head_dim"])
            if not 0 < head_dim <= base.hidden_size:
                raise UserError(f"head size {head_dim} must be between 1 and hidden_size, {base.hidden_size}")
            heads = _QUERY_HEADS.get((base.hidden_size, head_dim), base.hidden_size // head_dim)
        if match["groups"]:
            kv_heads = int(match["groups"])
            if not kv_heads:
                raise UserError("GQA0 has no KV heads; want at least 1, as in GQA4")
        elif match["mqa"]:
            kv_heads = 1
        elif match["mha"] or base.num_key_value_heads == base.num_attention_heads:
            kv_heads = heads
        else:
            kv_heads = base.num_key_value_heads
        plan = _plan(match["plan"], base.num_hidden_layers) if match["plan"] else base.plan
        return replace(
            base,
            head_dim=head_dim,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            sharing_plan=plan,
        )
    except UserError as error:
        raise UserError(f"design {name!r}: {error}") from None


def _plan(text: str, num_layers: int) -> SharingPlan:
    try:
        return parse_plan(text, num_layers)
    except UserError:
        first = text.partition("-")[0]
        if re.fullmatch(r"mha|mqa|gqa\d+", first, re.IGNORECASE):  # left over where one was read, or by a last dash
            if text == f"{first}-":
                raise UserError(f"nothing follows {text!r}; want a plan there, or no dash") from None
            raise UserError(f"{first!r} gives the KV heads a second time; want one of MHA, MQA and GQA<n>") from None
        spelt = {"mha": "MHA", "mqa": "MQA", "gqa": "GQA with a number of KV heads, as in GQA4"}
        near = get_close_matches(re.sub(r"\d+", "", first.lower()), spelt, n=1, cutoff=0.6)
        if near:
            raise UserError(f"unknown part {first!r}; did you mean {spelt[near[0]]}?") from None
        raise
