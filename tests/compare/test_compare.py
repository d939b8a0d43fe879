"""Whole comparisons on a micro budget: what they measure, what survives failure and interruption, what they write."""

from __future__ import annotations

import argparse
import base64
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import crosslayer.compare.run
from crosslayer import checkpoint
from crosslayer.checkpoint.state import Checkpoints
from crosslayer.cli import compare as command
from crosslayer.cli import main
from crosslayer.compare import CompareConfig, Results, compare, format_table
from crosslayer.errors import Stopped, UserError
from crosslayer.settings import from_mapping
from crosslayer.train import step

TEXT = "shared keys and values travel up from layer to layer while queries stay at home, "


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a little text, and the cache of prepared data beside it."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    for number in range(12):
        lines = (TEXT[(number * i) % len(TEXT) :] for i in range(12))
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLAYER_CACHE", str(folder / "cache"))
        yield folder


def micro(folder: Path, **changes: Any) -> CompareConfig:
    """Three layers; CLA2 puts layer 0 alone, so `0,0,2` shares otherwise."""
    return from_mapping(
        CompareConfig,
        {
            "model": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            },
            "data": {"source": "text", "paths": [str(folder / "text")], "vocab_size": 300, "valid_fraction": 0.3},
            "train": {
                "tokens": 256,
                "sequence_length": 16,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "log_every": 1,
                "eval_every": 4,
                "eval_tokens": 100,
                "checkpoint_every": 3,
            },
            "designs": ["H8-MQA", "CLA2"],
            "seeds": [0, 1],
            **changes,
        },
    )


@pytest.fixture(scope="module")
def out(workplace: Path) -> Path:
    return workplace / "out"


@pytest.fixture(scope="module")
def results(workplace: Path, out: Path) -> Results:
    """Five designs: CLA2 and `0,1,1` are the same plan, H4-MQA diverges at its rate, and `nonsense` is no design."""
    config = micro(
        workplace,
        designs=["H8-MQA", "CLA2", "0,1,1", "H4-MQA", "nonsense"],
        learning_rates={"H4-MQA": 1e38},
        sample={"design": "CLA2", "prompt": "shared <keys>", "sampling": {"max_tokens": 5}},
    )
    return compare(config, out, command="crosslayer compare <here>")


def test_scores_are_those_of_the_saved_models(results: Results, out: Path) -> None:
    from crosslayer.data import prepare
    from crosslayer.evaluate import score

    data = prepare(results.config.data)
    for design, shape, _ in results.finished:
        for run in design.runs:
            model = checkpoint.load(out / run.folder / "model")
            held_out = score(model, data.valid, sequence_length=16)
            assert run.loss == pytest.approx(held_out.loss, rel=1e-5)
            assert run.bits_per_byte == pytest.approx(held_out.bits_per_byte, rel=1e-5)
            assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_kv_bytes_planned_and_allocated(results: Results) -> None:
    """Two bytes, keys and values, one head of 8: 32 a layer that has keys and values, of which CLA2 has 2 of 3."""
    measured = {
        design.design: (shape.kv_bytes_per_token, shape.allocated_kv_bytes_per_token)
        for design in results.designs
        if (shape := design.shape) is not None
    }
    assert measured == {"H8-MQA": (96, 96), "CLA2": (64, 64), "0,1,1": (64, 64), "H4-MQA": (48, 48)}


def test_equal_designs_differ_by_exactly_nothing(results: Results) -> None:
    difference = results.difference("0,1,1", "CLA2")
    assert difference is not None
    assert (difference.mean, difference.std, difference.low, difference.high) == (0, 0, 0, 0)
    assert not difference.resolved
    to_first = results.to_first("CLA2")
    assert to_first is not None
    losses = {run.seed: run.loss for run in results.designs[1].runs}
    base = {run.seed: run.loss for run in results.designs[0].runs}
    assert to_first.mean == pytest.approx(sum(losses[s] - base[s] for s in (0, 1)) / 2)
    assert to_first.mean != 0


def test_failures_are_reported_and_lose_nothing_else(results: Results, out: Path) -> None:
    assert [design.design for design, _, _ in results.finished] == ["H8-MQA", "CLA2", "0,1,1"]
    assert {(run.design, run.seed) for run in results.failures} == {
        (design, seed) for design in ("H4-MQA", "nonsense") for seed in (0, 1)
    }
    table, report = format_table(results), (out / "report.html").read_text(encoding="utf-8")
    for text in (table, report):
        assert "Failed: nonsense, seeds 0, 1: design" in text
        assert re.search(r"Failed: H4-MQA, seeds 0, 1: .*loss is (nan|inf)", text)


def test_results_json(results: Results, out: Path) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads((out / "results.json").read_text(encoding="utf-8"), parse_constant=no_constant)
    assert from_mapping(CompareConfig, data["config"]) == results.config
    assert data["environment"]["torch"]
    assert (data["tokens"], data["context"], data["cache_dtype"]) == (256, 16, "bf16")
    plain, shared, *_, nonsense = data["designs"]
    assert plain["design"] == "H8-MQA"
    assert shared["shape"]["num_kv_layers"] == 2
    assert shared["shape"]["sharing_plan"]["key_sources"] == [0, 1, 1]
    assert shared["summary"]["loss"]["low"] <= shared["summary"]["loss"]["mean"] <= shared["summary"]["loss"]["high"]
    assert [run["seed"] for run in shared["runs"]] == [0, 1]
    curve = shared["runs"][0]["curve"]
    assert curve["tokens"] == [32 * step for step in range(1, 9)]
    assert curve["validation_tokens"] == [128, 256]
    assert curve["validation_loss"][-1] == shared["runs"][0]["loss"]
    assert nonsense["shape"] is nonsense["summary"] is None
    assert {(d["design"], d["reference"]) for d in data["differences"]} == {
        ("CLA2", "H8-MQA"),
        ("0,1,1", "H8-MQA"),
        ("0,1,1", "CLA2"),
    }


class _Reader(HTMLParser):
    """What a page holds, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = ("src", "href", "srcset", "data", "action", "poster", "background")
        self.loads += [value or "" for name, value in attrs if name in loading]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_self_contained(results: Results, out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    reader = _Reader(page)
    prefix = "data:image/png;base64,"
    assert [load[: len(prefix)] for load in reader.loads] == [prefix, prefix]
    images = [base64.b64decode(load.removeprefix(prefix)) for load in reader.loads]
    assert images == [(out / name).read_bytes() for name in ("pareto.png", "curves.png")]
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in images)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page
    assert "@media print" in page
    assert "crosslayer compare <here>" in reader.text  # escaped in the page, as is the prompt
    assert results.sample is not None
    assert "shared <keys>" + results.sample.text in reader.text
    assert "1  ■─┐" in reader.text  # the drawing of CLA2's plan
    assert "hidden_size: 16" in reader.text


def test_continuation_is_the_models_with_less_cache(results: Results, out: Path) -> None:
    import torch

    sample = results.sample
    assert sample is not None
    tokenizer_folder = out / "runs" / "CLA2" / "seed-0" / "model"
    from crosslayer.data import Tokenizer

    tokenizer, model = Tokenizer.load(tokenizer_folder), checkpoint.load(tokenizer_folder)
    ids = tokenizer.encode(sample.prompt)
    length = len(ids) + 5
    with torch.no_grad():
        for _ in range(sample.tokens):  # without a cache
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == sample.prompt + sample.text
    assert sample.cache_bytes == length * 2 * 2 * 8 * 4
    assert sample.reference_cache_bytes == length * 3 * 2 * 8 * 4


def _without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_times(v) for k, v in data.items() if k not in ("seconds", "environment")}
    return [_without_times(item) for item in data] if isinstance(data, list) else data


def _outcome(out: Path) -> tuple[Any, dict[str, bytes]]:
    weights = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.glob("runs/*/*/model/*.safetensors"))}
    return _without_times(json.loads((out / "results.json").read_text(encoding="utf-8"))), weights


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_second_run_it_goes_on(
    signum: int, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workplace = micro(workplace), tmp_path
    compare(config, workplace / "whole")
    saves = 0
    save = Checkpoints.save

    def save_and_interrupt(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        save(*arguments)
        if saves == 4:  # each run saves three times
            signal.raise_signal(signum)

    # A shell starts what runs in its background with SIGINT ignored, and so perhaps these tests.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_and_interrupt)
            with pytest.raises(KeyboardInterrupt) as interrupted:
                compare(config, workplace / "cut")
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert isinstance(interrupted.value, Stopped) == (signum == signal.SIGTERM)
    assert "1 of 4 runs done; the same command goes on from here" in capsys.readouterr().err
    assert len(list((workplace / "cut").glob("runs/*/*/result.json"))) == 1
    assert not (workplace / "cut" / "results.json").exists()

    started: list[Path] = []
    train = crosslayer.compare.run.train

    def note(config: Any, data: Any, out: Path, **options: Any) -> Any:
        started.append(out)
        assert (out / "checkpoints").exists() == (len(started) <= 2)
        return train(config, data, out, **options)

    monkeypatch.setattr(crosslayer.compare.run, "train", note)
    compare(config, workplace / "cut")
    assert len(started) == 4
    whole, cut = _outcome(workplace / "whole"), _outcome(workplace / "cut")
    assert len(whole[1]) == 4
    assert cut[1] == whole[1]
    assert cut[0] == whole[0]


def test_a_finished_comparison_is_not_trained_again(
    results: Results, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/model/*")}
    assert before
    again = compare(results.config, out, command=results.command)
    assert {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/model/*")} == before
    assert again.designs == results.designs
    assert again.sample == results.sample


def test_a_changed_config_is_refused(results: Results, out: Path) -> None:
    written = (out / "results.json").read_bytes()
    changed = {
        "seeds": replace(results.config, seeds=(0, 1, 2)),
        "learning_rates.H4-MQA": replace(results.config, learning_rates={"H4-MQA": 1e-3}),
        "train.tokens": replace(results.config, train=replace(results.config.train, tokens=512)),
    }
    for key, config in changed.items():
        with pytest.raises(UserError, match=f"started with {key} = .*another output folder"):
            compare(config, out)
    assert (out / "results.json").read_bytes() == written


def test_any_exception_is_one_runs_failure(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the first design's, which then is no reference; and one seed's only."""
    train = crosslayer.compare.run.train

    def break_down(config: Any, *arguments: Any, **options: Any) -> Any:
        if config.model["design"] == "H8-MQA" or config.train.seed == 1:
            raise RuntimeError("no memory left\nand a long story")
        return train(config, *arguments, **options)

    monkeypatch.setattr(crosslayer.compare.run, "train", break_down)
    config = micro(workplace, designs=["H8-MQA", "CLA2", "0,0,2"])
    found = compare(config, tmp_path / "out")
    assert [summary.seeds for _, _, summary in found.finished] == [(0,), (0,)]
    assert found.to_first("CLA2") is None
    assert "cannot be told from one seed" in format_table(found).replace("\n", " ")
    assert "Failed: H8-MQA, seeds 0, 1: RuntimeError: no memory left\n" in format_table(found) + "\n"
    assert "Traceback" in capsys.readouterr().err  # for whoever has to find the reason
    assert (tmp_path / "out" / "report.html").exists()


def test_no_run_finished(workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run finished; the first, nonsense"):
        compare(micro(workplace, designs=["nonsense", "more nonsense"], seeds=[0]), tmp_path / "out")


def test_a_sample_that_no_model_could_write_is_refused_before_training(workplace: Path, tmp_path: Path) -> None:
    config = micro(workplace, designs=["H8-MQA", "2,2,2"], sample={"design": "2,2,2", "prompt": "shared"})
    with pytest.raises(UserError, match=r"^sample\.design: layer 0 reads a layer above it"):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_that_fails_costs_no_results(
    results: Results,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def break_down(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory left\nand a long story")

    monkeypatch.setattr(crosslayer.compare.run, "LLM", break_down)
    config = micro(workplace, designs=["CLA2"], seeds=[0], sample={"design": "CLA2", "prompt": "shared"})
    found = compare(config, tmp_path / "out")
    assert found.sample is None
    assert not found.failures
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sample"] is None
    assert (tmp_path / "out" / "report.html").exists()
    errors = capsys.readouterr().err
    assert "sample: failed: RuntimeError: no memory left\n" in errors
    assert "Traceback" in errors  # for whoever has to find the reason


def test_a_design_that_has_no_cache_is_not_trained(workplace: Path, tmp_path: Path) -> None:
    """Layer 0 keeps its keys for 4 tokens, its values for layers that see all 16; with a window of 16 it may."""
    found = compare(micro(workplace, designs=["CLA2", "0@4,1,1/0,1,0", "0@16,1,1/0,1,0"], seeds=[0]), tmp_path / "out")
    assert [design.design for design, _, _ in found.finished] == ["CLA2", "0@16,1,1/0,1,0"]
    assert not (tmp_path / "out" / "runs" / "0_4,1,1_0,1,0").exists()
    assert "Failed: 0@4,1,1/0,1,0, seed 0: layer 0: its keys (layer 0) are cached for 4 tokens but its values " in (
        " ".join(format_table(found).split())
    )


def test_windowed_designs_are_measured_at_the_context(workplace: Path, tmp_path: Path) -> None:
    """A layer with a window of 4 keeps 4 of 16 tokens: 16 bytes a token and layer, 8 for keys and 8 for values."""
    found = compare(micro(workplace, designs=["0@4,1@4,2"], seeds=[0]), tmp_path / "out")
    shape = found.designs[0].shape
    assert shape is not None
    assert shape.kv_bytes_per_token == shape.allocated_kv_bytes_per_token == (4 + 4 + 16) * 32 / 16


def test_command(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    from crosslayer.settings import to_mapping

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_mapping(micro(workplace, designs=["H8-MQA", "CLA2", "nonsense"]))))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = [str(config), "seeds=[7]", "train.tokens=64", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        command.run(parser.parse_args(arguments))
    assert caught.value.code == 1
    assert "not resolved at this size" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.run(parser.parse_args([*arguments, "--json"]))
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["seeds"] == [7]
    assert printed["tokens"] == 64
    assert "seeds=[7]" in printed["command"]


@pytest.mark.slow
def test_every_design_is_compiled_however_many_there_are(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit set here is enough for either design, in training and in scoring, and not for both."""
    import torch

    monkeypatch.setattr(step, "MOST_KINDS", 0)
    config = micro(workplace, seeds=[0], designs=["CLA2", "H4-MQA-CLA2"])
    config = replace(config, train=replace(config.train, compile=True, tokens=64, device="cpu"))
    with torch._dynamo.config.patch(recompile_limit=10, fail_on_recompile_limit_hit=True):
        assert not compare(config, tmp_path / "out").failures


@pytest.mark.slow
def test_a_plan_with_many_kinds_of_blocks_is_compiled(workplace: Path, tmp_path: Path) -> None:
    """PyTorch's own limit would leave some of them out."""
    import torch

    config = micro(workplace, seeds=[0], designs=["MQA-pizza-middle:2"])
    config = replace(config, train=replace(config.train, compile=True, tokens=64, device="cpu"))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        assert not compare(config, tmp_path / "out").failures


def test_several_processes_would_each_run_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--out", str(tmp_path / "out")]) == 2
    assert "a comparison runs in one process; torchrun is for crosslayer train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
