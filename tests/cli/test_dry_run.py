"""`crosslayer train --dry-run` and `--prepare`: figures before a run, and its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crosslayer.cli import main
from crosslayer.cli.dry_run import MEASURED_TFLOPS
from crosslayer.plan import parse_design, preset
from crosslayer.plan.cost import forward_flops_per_token, num_parameters, training_flops_per_token
from crosslayer.plan.training_memory import training_memory

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "paper" / "1b.yaml")
DESIGN = "model.design=H128-MQA-CLA2"


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["train", CONFIG, DESIGN, *arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_design("H128-MQA-CLA2", preset("paper-1b"))
    figures = dry(capsys, "--gpus", "16", "--tflops", "400")
    assert figures["parameters"] == num_parameters(config)
    assert figures["tokens"] == 7152 * 2**22 == figures["steps"] * 2048 * 2048
    flops = training_flops_per_token(config, 2048)
    assert figures["training_flops"] == flops * figures["tokens"]
    assert figures["gpu_hours"] == pytest.approx(figures["tokens"] * flops / 400e12 / 3600)
    assert figures["hours"] == pytest.approx(figures["gpu_hours"] / 16)
    assert (figures["micro_batch_size"], figures["micro_batches"]) == (16, 8)
    memory = training_memory(config, tokens=16 * 2048, micro_batches=8, data_parallel=16)
    assert figures["memory"] == vars(memory)


def test_tensor_parallelism_and_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    plain = dry(capsys, "--gpus", "32")
    settings = ("train.tensor_parallel=4", "train.activation_checkpointing=group")
    figures = dry(capsys, "--gpus", "32", *settings)
    assert (figures["data_parallel"], figures["tensor_parallel"], figures["micro_batches"]) == (8, 4, 16)
    assert figures["memory"]["activations"] < plain["memory"]["activations"] / 10
    config = parse_design("H128-MQA-CLA2", preset("paper-1b"))
    again = forward_flops_per_token(config, 2048) - 2 * 50304 * 2048
    assert figures["gpu_hours"] / plain["gpu_hours"] == pytest.approx(
        1 + again / training_flops_per_token(config, 2048)
    )


def test_gpus_are_the_processes_unless_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry(capsys)["gpus"] == 1
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert dry(capsys)["gpus"] == 64
    assert dry(capsys, "--gpus", "2")["gpus"] == 2
    for wrong in ("x", "0", "-1", ""):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        assert main(["train", CONFIG, DESIGN, "--dry-run"]) == 2
        assert f"WORLD_SIZE={wrong!r} in the environment is no number of processes" in capsys.readouterr().err


def test_a_tokenizer_that_is_to_be_trained_gives_the_vocabulary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "configs" / "tiny.yaml"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 2048
    assert not list(tmp_path.iterdir())


def test_the_rate_is_the_one_that_was_measured() -> None:
    results = ROOT / "benchmarks" / "results" / "2026-11-24-train-speed-1b-h100.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    (rate,) = [r["tflops"] for r in rows if (r["who"], r["design"], r["batch"]) == ("crosslayer", "H128-MQA", 16)]
    assert pytest.approx(rate, abs=1) == MEASURED_TFLOPS


def test_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["train", CONFIG, DESIGN, "--dry-run", "--gpus", "16", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert f"{figures['parameters']:,} parameters" in printed
    assert f"{figures['memory']['peak'] / 2**30:.1f} GiB" in printed
    assert "at 513 TFLOP/s a GPU" in printed


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    _, _, rest = guide.partition("```text\n$ crosslayer ")
    command, _, shown = rest.partition("```")[0].partition("\n")
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--dry-run", "--tflops", "0"], "--tflops must be positive, got 0.0"),
        (["--dry-run", "--gpus", "3"], "batch_size 2048 must be a multiple of the data ranks, 3"),
        (["--dry-run", "--gpus", "6", "train.tensor_parallel=4"], "train.tensor_parallel 4 must divide --gpus 6"),
        (["--dry-run", "--gpus", "7", "train.tensor_parallel=7"], "tensor_parallel 7 must divide num_attention_heads"),
        (["--dry-run", "train.precision=fp32"], "a dry run knows compiled runs in bf16 only"),
        (["--dry-run", "train.compile=false"], "a dry run knows compiled runs in bf16 only"),
        (["--dry-run", "train.tensor_parallel=0"], "tensor_parallel must be at least 1, got 0"),
        (["--gpus", "8", "--out", "x"], "--gpus and --tflops go with --dry-run"),
        (["--dry-run", "--prepare"], "not allowed with argument --dry-run"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = main(["train", CONFIG, DESIGN, *arguments])
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr().err
    assert status == 2
    assert message in printed
    assert printed.count("\n") == 1


def test_a_tokenizer_file_does_not_tell_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(ROOT / "configs" / "tiny.yaml"), "data.tokenizer=some.json", "--dry-run"]
    assert main(arguments) == 2
    assert "say how large it is with model.vocab_size" in capsys.readouterr().err
    assert main([*arguments, "model.vocab_size=5000"]) == 0


def test_prepare_leaves_the_data_for_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CROSSLAYER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{n} cats\n"}) for n in range(99)))
    data = ["data.source=jsonl", f"data.paths={tmp_path / 'a.jsonl'}", "data.vocab_size=300"]
    assert main(["train", str(ROOT / "configs" / "tiny.yaml"), *data, "--prepare"]) == 0
    (folder,) = (tmp_path / "cache" / "data").iterdir()
    captured = capsys.readouterr()
    assert captured.out == f"{folder}\n"
    assert "prepared" in captured.err
    assert main(["train", str(ROOT / "configs" / "tiny.yaml"), *data, "--prepare"]) == 0
    assert capsys.readouterr().err == ""
