"""Tiny training runs: a corpus of sentences that repeat themselves, and a model that shares keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslayer import checkpoint
from crosslayer.data import DataConfig, PreparedData, prepare
from crosslayer.train import Recipe, TrainConfig, train
from crosslayer.train.metrics import read_metrics

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "design": "MQA-CLA2",
}


def prepare_corpus(folder: Path, documents: int = 120) -> PreparedData:
    """Short documents to train on, and 12 to hold out."""
    lines = [f"{n} cats sat on {n + 1} mats and saw {n * n} mice.\n" for n in range(documents + 12)]
    for name, part in (("train", lines[:documents]), ("valid", lines[documents:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in part), encoding="utf-8")
    paths, valid_paths = (str(folder / "train.jsonl"),), (str(folder / "valid.jsonl"),)
    config = DataConfig("jsonl", paths, valid_paths=valid_paths, vocab_size=300)
    return prepare(config, folder / "cache", progress=lambda line: None)


def config(model: dict[str, Any] | None = None, **recipe: Any) -> TrainConfig:
    """Ten steps of 4 x 16 tokens, unless `recipe` says otherwise."""
    steps = recipe.pop("steps", 10)
    settings = {
        "sequence_length": 16,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "log_every": 4,
        "device": "cpu",
        **recipe,
    }
    tokens = steps * settings["sequence_length"] * settings["batch_size"]
    return TrainConfig(MODEL | (model or {}), train=Recipe(**{"tokens": tokens, **settings}))


def run(data: PreparedData, out: Path, **settings: Any) -> dict[str, Any]:
    return train(config(**settings), data, out)


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "model").state_dict()


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for the speed, which no two runs share."""
    lines = read_metrics(out)
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
