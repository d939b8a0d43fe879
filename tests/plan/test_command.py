"""`crosslayer plan`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosslayer.cli import plan as command
from crosslayer.errors import UserError
from crosslayer.plan import ModelConfig, parse_design, preset
from crosslayer.plan.draw import draw
from crosslayer.plan.units import format_bytes, format_flops, parse_bytes


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_json_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    figures = printed_json(capsys, "--preset", "paper-1b", "H128-MHA", "H90-MQA-CLA2", "H128-MQA-CLA3")
    assert [row["design"] for row in figures] == ["H128-MHA", "H90-MQA-CLA2", "H128-MQA-CLA3"]
    assert [row["kv_bytes_per_token"] for row in figures] == [163840, 3600, 3584]
    assert [row["unshared"]["kv_bytes_per_token"] for row in figures] == [163840, 7200, 10240]
    assert [row["num_kv_layers"] for row in figures] == [20, 10, 7]
    cla2 = figures[1]
    assert (cla2["context"], cla2["batch"], cla2["memory"], cla2["cache_dtype"]) == (2048, 1, 80 * 2**30, "bf16")
    # Half the K/V projections of 20 layers are gone; the ten owners have a second norm.
    assert cla2["unshared"]["parameters"] - cla2["parameters"] == 10 * 2 * 2048 * 90 - 10 * 2048
    assert cla2["kv_bytes"] == 2048 * 3600
    assert cla2["largest_batch"] == (80 * 2**30 - 2 * cla2["parameters"]) // (2048 * 3600)
    assert cla2["longest_context"] == (80 * 2**30 - 2 * cla2["parameters"]) // 3600
    assert cla2["training_flops_per_token"] == 3 * cla2["forward_flops_per_token"]


def test_the_workload_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    workload = ("--context", "100", "--batch", "3", "--cache-dtype", "int8", "--memory", "10GB")
    (row,) = printed_json(capsys, "--preset", "paper-1b", "MQA-CLA2", *workload)
    assert row["kv_bytes_per_token"] == 2560
    assert row["kv_bytes"] == 3 * 100 * 2560
    assert row["longest_context"] == (10**10 - 2 * row["parameters"]) // (3 * 2560)


def test_pipeline_stages(capsys: pytest.CaptureFixture[str]) -> None:
    run("--preset", "paper-1b", "MQA-cla2", "MQA-mlkv:2", "--pipeline-stages", "4")
    cla2, mlkv = capsys.readouterr().out.splitlines()[-2:]
    assert cla2 == "MQA-cla2: pipeline stages of layers 0-3, 4-7, 8-13, 14-19"
    reason = "a pipeline cut before layer 1: layer 1 reads the keys of layer 0"
    assert mlkv == f"MQA-mlkv:2: 4 pipeline stages need 3 cuts; legal are: 10 ({reason})"
    (row,) = printed_json(capsys, "--preset", "paper-1b", "MQA-mlkv:2", "--pipeline-stages", "2")
    assert row["pipeline_stages"] == "pipeline stages of layers 0-9, 10-19"
    with pytest.raises(UserError, match="--pipeline-stages must be at least 1, got 0"):
        run("--preset", "paper-1b", "--pipeline-stages", "0")


def test_a_model_folder_and_other_plans_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    llama |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    folder = tmp_path / "small-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama))
    (row,) = printed_json(capsys, "--config", str(folder))
    assert (row["design"], row["kv_bytes_per_token"]) == ("small-llama", 2 * 2 * 2 * 8 * 4)
    figures = printed_json(capsys, "cla2", "0,0,0,0", "--config", str(folder / "config.json"))
    assert [row["kv_bytes_per_token"] for row in figures] == [128, 64]
    assert figures[0]["unshared"] == {name: row[name] for name in figures[0]["unshared"]}

    ours = parse_design("cla2", ModelConfig.from_json_file(folder))
    (tmp_path / "ours.json").write_text(json.dumps(ours.to_dict()))
    (row,) = printed_json(capsys, "--config", str(tmp_path / "ours.json"))
    assert (row["design"], row["kv_bytes_per_token"], row["num_kv_layers"]) == ("ours", 128, 2)


def test_the_table_has_a_row_a_design_and_one_for_it_unshared(capsys: pytest.CaptureFixture[str]) -> None:
    run("--preset", "paper-1b", "H128-MQA", "H128-MQA-CLA2", "--memory", "1TiB")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "paper-1b: context 2,048 tokens, batch 1, bf16 cache"
    rows = [line.split("  ") for line in lines[4:7]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["H128-MQA", "H128-MQA-CLA2", "unshared"]
    assert cells[0][1:] == cells[2][1:]
    assert cells[1][1:4] == ["5 KiB", "10 of 20", "1,051.6 M"]
    assert not any("■" in line for line in lines)


def test_windows_get_a_column_and_a_missing_limit_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    every = ",".join(f"{layer}@64" for layer in range(20))
    run("--preset", "paper-1b", "MQA-yoco:window=256", f"MQA-{every}")
    yoco, _, windowed = capsys.readouterr().out.splitlines()[4:7]
    assert " 512 B" in yoco
    assert " 0 B" in windowed
    assert windowed.endswith("no limit")


def test_a_plan_above_its_reader_is_planned_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    run("--preset", "paper-1b", "MQA-lckv", "MQA")
    assert "MQA-lckv has a layer that reads one above it: from there to the owner its FLOPs are of 9 passes" in (
        capsys.readouterr().out
    )


def test_one_design_is_drawn_and_several_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    cla2 = draw(parse_design("cla2", preset("paper-1b")).plan)
    run("--preset", "paper-1b", "cla2")
    assert capsys.readouterr().out.endswith(f"\ncla2: {cla2}\n")
    run("--preset", "paper-1b", "cla2", "mqa", "--draw")
    out = capsys.readouterr().out
    assert f"\ncla2: {cla2}\n" in out
    assert "\nmqa: 20 layers, each with keys and values of its own" in out


def test_files_are_written_whole_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, svg, figures = tmp_path / "a.png", tmp_path / "b.svg", tmp_path / "c.json"
    run("--preset", "paper-1b", "MHA", "MQA-CLA2", "MQA-yoco", "--plot", str(png), "--json", str(figures))
    assert "MQA-CLA2" in capsys.readouterr().out  # the table is still printed
    run("--preset", "paper-3b", "CLA2", "--plot", str(svg), "--context", "2000000")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().count("<svg") == 1
    assert len(json.loads(figures.read_text())) == 3
    assert sorted(tmp_path.iterdir()) == [png, svg, figures]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset paper-2b", "known: paper-1b, paper-3b"),
        ("--preset paper-1b CLAA2", "design 'CLAA2'"),
        ("--preset paper-1b --context 0", "--context must be at least 1"),
        ("--preset paper-1b --batch -1", "--batch must be at least 1"),
        ("--preset paper-1b --memory 80G", "memory '80G': want a number and a unit, such as 80GiB"),
        ("--preset paper-1b --json MQA", "name designs before --json"),
        ("--preset paper-1b --json nowhere/a.json", "--json nowhere/a.json: No such file"),
        ("--preset paper-1b --plot a.txt", r"--plot writes \.png"),
        ("--preset paper-1b --plot nowhere/a.png", "--plot nowhere/a.png: No such file"),
        ("--config nowhere", "nowhere: no such file"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(*arguments.split())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, crosslayer.cli.plan, crosslayer.plan\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_units() -> None:
    assert [parse_bytes(text) for text in ("80GiB", "80 GB", "1.5kib", "7")] == [80 * 2**30, 80 * 10**9, 1536, 7]
    assert [format_bytes(n) for n in (0, 1023, 1024, 3600, 163840, 3 * 2**50)] == [
        *("0 B", "1,023 B", "1 KiB", "3.52 KiB", "160 KiB", "3 PiB"),
    ]
    assert [format_flops(n) for n in (999, 2389786624, 83_800_000_000)] == ["999 ", "2.39 G", "83.8 G"]
    for text in ("", "GiB", "1.2.3GB", "-1GB", "80Gb/s"):
        with pytest.raises(UserError, match="want a number and a unit"):
            parse_bytes(text)
    for text in ("9" * 400 + "GiB", "9" * 300 + "PiB"):
        with pytest.raises(UserError, match="more bytes than can be counted with"):
            parse_bytes(text)
