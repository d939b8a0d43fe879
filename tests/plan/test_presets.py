"""The paper's shapes and design names: all of its table 1, and the grammar of names."""

from __future__ import annotations

import pytest

from crosslayer.errors import UserError
from crosslayer.plan import ModelConfig, parse_design, parse_plan, preset
from crosslayer.plan.cost import Cost

# arXiv 2405.12981, table 1: name, head size, query heads, KV heads, KV layers, KV bytes per token.
TABLE_1 = """
H128-MHA 128 16 16 20 163840
H128-GQA4 128 16 4 20 40960
H128-GQA2 128 16 2 20 20480
H128-MQA 128 16 1 20 10240
H64-MQA 64 32 1 20 5120
H46-MQA 46 45 1 20 3680
H32-MQA 32 64 1 20 2560
H512-MQA-CLA2 512 4 1 10 20480
H256-MQA-CLA2 256 8 1 10 10240
H128-MQA-CLA2 128 16 1 10 5120
H90-MQA-CLA2 90 22 1 10 3600
H64-MQA-CLA2 64 32 1 10 2560
H256-GQA4-CLA2 256 8 4 10 40960
H128-GQA4-CLA2 128 16 4 10 20480
H128-GQA2-CLA2 128 16 2 10 10240
H128-MQA-CLA3 128 16 1 7 3584
H128-MQA-CLA4 128 16 1 5 2560
H128-MQA-CLA2-KeepEnds 128 16 1 11 5632
H128-MQA-CLA2-DenseFront 128 16 1 11 5632
H128-MQA-CLA2-DenseBack 128 16 1 11 5632
"""

# Table of the tuned runs: KV bytes per token at 3B.
TUNED_3B = "H128-MQA 16384 H128-MQA-CLA2 8192 H64-MQA 8192 H64-MQA-CLA2 4096 H32-MQA 4096"


@pytest.mark.parametrize("row", TABLE_1.split("\n")[1:-1], ids=lambda row: row.split()[0])
def test_table_1(row: str) -> None:
    name, *figures = row.split()
    config = parse_design(name, preset("paper-1b"))
    cost = Cost.of(config, context=2048, batch=1, memory=80 * 2**30)
    heads = [config.head_dim, config.num_attention_heads, config.num_key_value_heads]
    assert [*heads, cost.num_kv_layers, cost.kv_bytes_per_token] == list(map(int, figures))


def test_the_3b_bytes() -> None:
    words = TUNED_3B.split()
    for name, expected in zip(words[::2], words[1::2], strict=True):
        cost = Cost.of(parse_design(name, preset("paper-3b")), context=2048, batch=1, memory=1)
        assert cost.kv_bytes_per_token == int(expected)


def gqa_base() -> ModelConfig:
    return ModelConfig(
        vocab_size=100,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        sharing_plan=parse_plan("0@8,0@8,2,2", 4),
    )


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "kv_heads", "plan"),
    [
        ("cla4", 32, 8, 2, "cla4"),
        ("MQA", 32, 8, 1, "0@8,0@8,2,2"),
        ("h64", 64, 4, 2, "0@8,0@8,2,2"),
        ("mha-identity", 32, 8, 8, "identity"),
        ("H16-GQA4-yoco:window=3", 16, 16, 4, "yoco:3"),
        ("H64-MQA-0,1,1,1/0,1,0,0", 64, 4, 1, "0,1,1,1/0,1,0,0"),
        (" h128-mqa-CLA2-KEEPENDS ", 128, 2, 1, "cla2-keepends"),
    ],
)
def test_a_part_left_out_stays_as_it_was(name: str, head_dim: int, heads: int, kv_heads: int, plan: str) -> None:
    base = gqa_base()
    config = parse_design(name, base)
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (head_dim, heads, kv_heads)
    assert config.plan == parse_plan(plan, 4)
    assert (config.hidden_size, config.vocab_size) == (base.hidden_size, base.vocab_size)


def test_multi_head_attention_stays_so_under_another_head_size() -> None:
    assert parse_design("H64-CLA2", preset("paper-1b")).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("H128-MQX-CLA2", "unknown part 'MQX'; did you mean MQA"),
        ("H128-GQA-CLA2", "did you mean GQA with a number of KV heads"),
        ("H128-MQA-CLA2-KeepEnd", "did you mean 'cla2-keepends'"),
        ("H128-MQA-", "design 'H128-MQA-': nothing follows 'MQA-'; want a plan there, or no dash"),
        ("MHA-MQA", "design 'MHA-MQA': 'MQA' gives the KV heads a second time; want one of MHA, MQA and GQA<n>"),
        ("H128-gqa4-mqa-cla2", "'mqa' gives the KV heads a second time"),
        ("MQA-GQA4", "'GQA4' gives the KV heads a second time"),
        ("H0-MQA", "head size 0 must be between 1 and hidden_size, 2048"),
        ("H4096-MQA", "head size 4096 must be"),
        ("H127-MQA", "head_dim must be even"),
        ("H46-GQA4", r"num_key_value_heads \(4\) must divide num_attention_heads \(45\)"),
        ("GQA0", "no KV heads"),
        ("", "want a name such as"),
        ("MQA\nCLA2", "want a name such as"),
    ],
)
def test_a_wrong_name_is_refused_with_what_would_be_right(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_design(name, preset("paper-1b"))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'paper-2b'; known: paper-1b, paper-3b"):
        preset("paper-2b")
