"""docs/serving.md: its examples run, and its figures are today's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import crosslayer
from crosslayer.engine import EngineConfig, SamplingParams
from crosslayer.model.paged import divide_memory
from crosslayer.plan import PRESETS, parse_design
from tests.conftest import tiny_config
from tests.engine.test_llm import TOKENIZER
from tests.model.checks import random_model

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tiny_config(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128))
    crosslayer.save(model, tmp_path / "runs" / "tiny" / "model", tokenizer=TOKENIZER)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    offline = [block for block in blocks if "openai" not in block]  # tests/server runs the others
    assert len(offline) == 2
    for block in offline:
        exec(block, {})
        assert "length" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [SamplingParams, EngineConfig])
def test_every_setting_is_in_a_table(settings: type) -> None:
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    for field in dataclasses.fields(settings):
        assert f"`{field.name}`" in rows


@pytest.mark.parametrize("design", ["H128-MQA", "H128-MQA-CLA2"])
def test_what_8_gib_hold(design: str) -> None:
    config = parse_design(design, PRESETS["paper-1b"])
    counts, size = [], EngineConfig().block_size
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        (blocks,) = divide_memory(config, 8 * 2**30, size, config.max_position_embeddings, dtype).values()
        counts.append(f"{size * blocks:,}")
    assert f"| {design} | {' | '.join(counts)} |" in TEXT
