"""The command line as a user meets it: results on stdout, one line for a mistake, quick answers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosslayer import checkpoint
from crosslayer.cli import COMMANDS, main
from crosslayer.compare import CompareConfig
from crosslayer.compare.config import DEFAULT
from crosslayer.data import Tokenizer
from crosslayer.errors import Stopped
from crosslayer.settings import load_settings
from crosslayer.train import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 2, design: MQA-CLA2}
data: {source: text, paths: [%s], vocab_size: 300, valid_fraction: 0.2}
train: {tokens: 640, sequence_length: 16, batch_size: 4, learning_rate: 1e-2, device: cpu}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with text, a config and a trained run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for n in range(20):
        (folder / "text" / f"{n}.txt").write_text(f"{n} cats sat on {n + 1} mats and saw {n * n} mice. " * 20)
    (folder / "config.yaml").write_text(CONFIG % (folder / "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLAYER_CACHE", str(folder / "cache"))
        assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
        yield folder


def test_train_then_generate_then_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(trained / "run" / "model")
    assert main(["generate", model, "3 cats", "--max-new-tokens", "5"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out.startswith("3 cats")
    assert "in 2 of 4 layers" in streamed.err

    assert main(["generate", model, "3 cats", "--max-new-tokens", "5", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert streamed.out == f"3 cats{record['text']}\n"
    assert record["tokens"] == 5

    assert main(["evaluate", model, "--held-out", str(trained / "config.yaml"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    result = json.loads((trained / "run" / "result.json").read_text())
    assert scored["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-5)
    assert scored["bits_per_byte"] == pytest.approx(result["validation"]["bits_per_byte"], rel=1e-5)

    assert main(["evaluate", model, "--text", str(trained / "text" / "1.txt"), "--stride", "4"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_evaluate_scores_task_sets(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tasks = str(trained / "run" / "model"), trained / "tasks"
    (tasks / "blimp" / "data").mkdir(parents=True)
    pairs = [{"sentence_good": f"{n} cats", "sentence_bad": f"{n} mats", "UID": "x"} for n in range(6)]
    (tasks / "blimp" / "data" / "x.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    command = ["evaluate", model, "--tasks", "blimp", "--task-data", str(tasks), "--task-items", "4"]
    file = trained / "tasks.json"
    assert main([*command, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    acc = record["tasks"]["blimp"]["metrics"]["acc"]
    assert record["tasks"]["blimp"]["items"] == 4
    assert "loss" not in record  # of text, which is scored where it is asked for
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["blimp", "acc", f"{acc['value']:.4f}", f"±{acc['standard_error']:.4f}", "0.5000", "4"]

    assert main([*command, "--text", str(trained / "text" / "1.txt"), "--json"]) == 0
    assert {"loss", "tasks"} < json.loads(capsys.readouterr().out).keys()
    for arguments, message in {
        ("--tasks", "blimp"): "--task-data DIR go together",
        ("--task-data", str(tasks)): "--task-data DIR go together",
        ("--tasks", "blimpp", "--task-data", str(tasks)): "unknown task 'blimpp'",
        ("--tasks", "", "--task-data", str(tasks)): "unknown task ''",
        ("--held-out", ""): "cannot be read",
        ("--tasks", "blimp", "--task-data", str(tasks), "--task-items", "0"): "--task-items must be positive, got 0",
        ("--recall",): "recall needs rows of at least 64",  # the model's context is 16
    }.items():
        assert main(["evaluate", model, *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_number_is_null_in_json(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    model = checkpoint.load(trained / "run" / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    checkpoint.save(model, tmp_path / "model", tokenizer=Tokenizer.load(trained / "run" / "model"))
    assert main(["evaluate", str(tmp_path / "model"), "--text", str(trained / "text" / "1.txt"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert record["loss"] is record["perplexity"] is None
    assert record["tokens"] > 0


def test_a_batch_of_prompts_equals_each_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompts = str(trained / "run" / "model"), ["3 cats", "11 cats sat on", "and"]
    (trained / "prompts.txt").write_text("\n".join(prompts))
    (trained / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    outputs = []
    for arguments in (["--prompts", "prompts.txt"], ["--prompts", "prompts.jsonl"]):
        options = [arguments[0], str(trained / arguments[1]), "--max-new-tokens", "6", "--json"]
        assert main(["generate", model, *options]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    for prompt, record in zip(prompts, outputs[0], strict=True):
        assert main(["generate", model, prompt, "--max-new-tokens", "6", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [record]


def test_a_line_of_prompts_ends_at_the_end_of_the_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not at other characters that Unicode counts as line ends, which JSON allows inside a string."""
    prompt = "3 cats\u2028sat"
    (trained / "lines.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8")
    (trained / "lines.txt").write_text(prompt + "\r\n", encoding="utf-8")
    for name in ("lines.jsonl", "lines.txt"):
        options = ["--prompts", str(trained / name), "--max-new-tokens", "1", "--json"]
        assert main(["generate", str(trained / "run" / "model"), *options]) == 0
        assert [record["prompt"] for record in json.loads(capsys.readouterr().out)] == [prompt]


def test_a_mark_of_the_byte_order_is_no_part_of_a_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "marked.txt").write_text("3 cats\n", encoding="utf-8-sig")
    options = ["--prompts", str(trained / "marked.txt"), "--max-new-tokens", "1", "--json"]
    assert main(["generate", str(trained / "run" / "model"), *options]) == 0
    assert [record["prompt"] for record in json.loads(capsys.readouterr().out)] == ["3 cats"]


def test_json_goes_to_a_file_beside_the_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "result-copy.json"
    command = ["train", str(trained / "config.yaml"), "--out", str(trained / "run"), "--json", str(file)]
    assert main(command) == 0
    assert "perplexity" in capsys.readouterr().out
    assert json.loads(file.read_text()) == json.loads((trained / "run" / "result.json").read_text())


def test_options_may_stand_anywhere(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, config, run = str(trained / "run" / "model"), str(trained / "config.yaml"), str(trained / "run")
    texts = []
    for arguments in (
        ["3 cats", "--max-new-tokens", "5", "--temperature", "1", "--seed", "7"],
        ["--max-new-tokens", "5", "3 cats", "--temperature", "1", "--seed", "7"],
        ["--seed", "7", "--max-new-tokens", "5", "--temperature", "1", "--", "3 cats"],
    ):
        assert main(["generate", model, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert main(["generate", model, "--max-new-tokens", "5", "--", "--help"]) == 0
    assert capsys.readouterr().out.startswith("--help")
    # Settings after an option are settings all the same: this one is not what the folder was started with.
    assert main(["train", config, "--out", run, "train.seed=5"]) == 2
    assert "train.seed" in capsys.readouterr().err


def test_what_the_model_was_not_made_for_is_warned_of(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(trained / "run" / "model")
    assert main(["generate", model, "3 cats", "--max-new-tokens", "50"]) == 0
    warning, _ = capsys.readouterr().err.splitlines()
    assert warning.startswith("crosslayer generate: warning: ")
    assert "beyond the model's context of 16" in warning
    assert main(["evaluate", model, "--text", str(trained / "text" / "1.txt"), "--window", "17"]) == 0
    assert "warning: 17 tokens go beyond the model's context of 16" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_reported_in_a_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "stopped"
    command = ["train", str(trained / "config.yaml"), "train.checkpoint_every=4", "--out", str(out)]
    assert main(command) == 0
    (out / "result.json").unlink()
    (out / "checkpoints" / "step-00000010" / "state.json").write_text("{}")
    capsys.readouterr()
    assert main(command) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("crosslayer train: warning: skipping a damaged checkpoint: ")
    assert "step-00000010" in first


def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a run that was stopped, without its data, to a folder that the other commands take."""
    run, out = tmp_path / "run", tmp_path / "model"
    command = ["train", str(trained / "config.yaml"), "train.checkpoint_every=4", "--out", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosslayer.train.loop._Run._score", interrupt)
        assert main(command) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLAYER_CACHE", str(tmp_path / "nothing"))
        capsys.readouterr()
        assert main(["export", str(run), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"step 10: {out}\n"
        assert main(["export", str(run), "--out", str(tmp_path / "earlier"), "--step", "8"]) == 0
        assert not (tmp_path / "nothing").exists()
    assert main(["generate", str(out), "3 cats", "--max-new-tokens", "2"]) == 0
    assert main(command) == 0
    names = {path.name for path in (run / "model").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (run / "model" / name).read_bytes() for name in names)
    weights = "model.safetensors"
    assert (tmp_path / "earlier" / weights).read_bytes() != (out / weights).read_bytes()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_cache_is_made_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (trained / "cache").glob("data/*/train-00000.bin")
    whole = shard.read_bytes()
    command = ["train", str(trained / "config.yaml"), "--out"]
    for number, damage in enumerate((whole[:-2], whole[:100] + b"\xff\x00" + whole[102:], None)):
        if damage is None:
            shard.unlink()
        else:
            shard.write_bytes(damage)
        capsys.readouterr()
        out = tmp_path / str(number)
        assert main([*command, str(out)]) == 0
        first = capsys.readouterr().err.splitlines()[0]
        assert str(shard) in first
        assert first.endswith("preparing the data again")
        assert shard.read_bytes() == whole
        weights = "model/model.safetensors"
        assert (out / weights).read_bytes() == (trained / "run" / weights).read_bytes()


def test_a_tokenizer_that_does_not_fit_or_is_not_there(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "changed"
    shutil.copytree(trained / "run" / "model", folder)
    (folder / "checksums.json").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<|more|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["generate", str(folder), "hello"]) == 2
    assert "the tokenizer has 301 tokens, the model only 300" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["evaluate", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer.json cannot be read" in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate {none} hello", "no model folder"),
        ("generate {run} hello", "its model is in"),
        ("generate {model}", "want either a PROMPT or --prompts FILE"),
        ("generate {model} hello --prompts {bad}", "want either a PROMPT or --prompts FILE"),
        ("generate {model} hello --json world", "--json writes to a file named *.json, got 'world'"),
        ("generate {model} hello --json {none}/a.json", "no such folder"),
        ("generate {model} --prompts {empty}", "no prompts in it"),
        ("generate {model} --prompts {latin}", "not UTF-8 at byte 3"),
        ("generate {model} --prompts {number}", "line 2 is not an object"),
        ("generate {model} hello --max-new-tokens many", "invalid int value: 'many'; see crosslayer generate --help"),
        ("generate {model} hello --top-k -1", "top_k must not be negative"),
        ("generate {model} hello --top-p 0", "top_p must lie above 0"),
        ("generate {model} --prompts {none}", "No such file"),
        ("generate {model} --prompts {bad}", "line 1"),
        ("generate {model} hello --max-new-tokens 0", "must be positive"),
        ("generate {model} hello --temperature -1", "temperature"),
        ("generate {model} hello --device nonsense", "nonsense"),
        ("evaluate {model} --text {none}", "none"),
        ("evaluate {model} --text {empty}", "the text has 0 tokens"),
        ("evaluate {model} --held-out {none}", "no such file"),
        ("evaluate {model} --window 0", "positive"),
        ("evaluate {model} --stride 0", "--stride must be positive"),
        ("evaluate {model} --batch -3", "--batch must be positive"),
        ("evaluate {model} --window 8 --stride 9", "stride"),
        ("train --out {out}", "want a config file"),
        ("train {config} {config} --out {out}", "one config file"),
        ("train {none} --out {out}", "no such file"),
        ("train {config} train.tokns=3 --out {out}", "did you mean train.tokens"),
        ("train {config} train.tokens=many --out {out}", "train.tokens must be a whole number"),
        ("train {config} model.design=cla22x --out {out}", "cla22x"),
        ("train {config} model.design=1@4,1,2,3 --out {out}", "above"),
        ("train {config} train.seed=5 --out {run}", "train.seed"),
        ("compare {config} --out {out}", "designs is missing"),
        ("export {none} --out {out}", "not the folder of a training run with checkpoints"),
        ("export {model} --out {out}", "not the folder of a training run with checkpoints"),
        ("export {run} --out {out} --step 3", "no whole checkpoint of step 3; there are those of [10]"),
        ("export {run} --out {bad}", "exists and is not a folder with a config.json"),
        ("export {run} --out {run}", "not apart from the run"),
        ("export {run} --out {run}/model", "not apart from the run"),
        ("export {run} --out {run}/..", "not apart from the run"),
        ("export {long} --out {out}", "File name too long"),
        ("train {config} --out {long}", "File name too long"),
        ("train {config} data.paths={long} --out {out}", "File name too long"),
        ("train {config} data.tokenizer={long} --out {out}", "File name too long"),
        ("export {run}", "required: --out"),
        ("plan --preset paper-9b", "paper-9b"),
        ("nonsense", "nonsense"),
        ("", "required: COMMAND; see crosslayer --help"),
        ("train {config}", "want --out DIR"),
        ("train {config} --out {bad}", "cannot be written"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    (tmp_path / "number.jsonl").write_text('\n{"prompt": 1}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    places = {
        "none": tmp_path / "none",
        "long": tmp_path / ("long" * 64),
        "bad": tmp_path / "bad.jsonl",
        "number": tmp_path / "number.jsonl",
        "empty": tmp_path / "empty.txt",
        "latin": tmp_path / "latin.txt",
        "out": tmp_path / "out",
        "model": trained / "run" / "model",
        "config": trained / "config.yaml",
        "run": trained / "run",
    }
    try:
        status = main(command.format(**places).split())
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    errors = capsys.readouterr().err
    assert status == 2
    (line,) = errors.splitlines()
    assert message in line
    assert line.startswith("crosslayer")
    assert not (tmp_path / "out" / "model").exists()


def test_stopped_by_sigterm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for told, message in (("at step 3", "crosslayer plan: at step 3\n"), ("", "")):

        def stop(arguments: object, told: str = told) -> None:
            raise Stopped(told)

        monkeypatch.setattr(COMMANDS["plan"], "run", stop)
        assert main(["plan", "--preset", "paper-1b"]) == 143
        assert capsys.readouterr().err == message


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(COMMANDS["plan"], "run", interrupt)
    assert main(["plan", "--preset", "paper-1b"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_at_once_and_without_torch(option: str) -> None:
    program = f"""
import sys
from crosslayer.cli import main
try:
    main([{option!r}])
finally:
    heavy = {{"torch", "numpy", "matplotlib", "tokenizers", "yaml"}} & set(sys.modules)
    assert not heavy, heavy
"""
    seconds = []
    for _ in range(3):  # the best of three, as other work may get in the way of one
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert "crosslayer" in done.stdout
    if option == "--help":
        assert all(name in done.stdout for name in COMMANDS)


def test_what_is_only_said_may_go_unheard() -> None:
    """With stderr on a full disk the status is that of the command: a mistake's here, that of a warning below."""
    for arguments, status in (("nonsense --preset paper-1b", 2), ("--preset paper-1b", 0)):
        command = f"{sys.executable} -m crosslayer plan {arguments} > /dev/null 2> /dev/full"
        assert subprocess.run(command, shell=True, cwd=ROOT).returncode == status


def test_a_warning_that_cannot_be_written_ends_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as log:  # noqa: PTH123 (line by line, as stderr is)
        monkeypatch.setattr(sys, "stderr", log)
        assert main(["generate", str(trained / "run" / "model"), "3 cats", "--max-new-tokens", "50"]) == 0


def test_a_reader_that_leaves_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is the one that head leaves with other programs, unless the work was done by then."""
    for text, status in (("much text " * 10_000, 141), ("a line", 0)):
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patch, open(writer, "w") as output:  # noqa: PTH123 (a descriptor)
            patch.setattr(sys, "stdout", output)
            patch.setattr(COMMANDS["plan"], "run", lambda _, text=text: print(text))
            assert main(["plan", "--preset", "paper-1b"]) == status
        assert capsys.readouterr().err == ""


def test_output_that_cannot_be_written_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as output:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["plan", "--preset", "paper-1b"]) == 2
    assert capsys.readouterr().err == "crosslayer plan: [Errno 28] No space left on device\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m crosslayer plan --preset paper-1b H128-MQA H128-MQA-CLA2 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""


def test_the_configs_that_we_ship_can_be_read() -> None:
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert configs
    for file in configs:
        load_settings(TrainConfig, file)
    assert load_settings(CompareConfig, DEFAULT).designs == ("H32-MQA", "H32-MQA-CLA2", "H16-MQA")
    assert "H128-MQA-CLA2" in load_settings(CompareConfig, ROOT / "configs" / "study" / "compare.yaml").designs
