"""The study's driver on a micro model and the embedded corpus, and its report on those runs and on made-up ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import study
from benchmarks.study_plot import PAPER, draw, draw_layouts, is_of_the_paper, kind_of
from benchmarks.study_report import QUESTIONS, Arm, gather, render
from crosslayer import checkpoint
from crosslayer.compare import CompareConfig
from crosslayer.compare.statistics import Spread
from crosslayer.data import prepare
from crosslayer.errors import UserError
from crosslayer.evaluate import score, score_recall
from crosslayer.plan import ModelConfig, parse_design
from crosslayer.plan.cost import kv_bytes, num_parameters
from crosslayer.settings import load_settings
from crosslayer.train import make_model_config

CONFIG = {
    "designs": ["H16-MQA", "H16-MQA-CLA2", "H16-MQA-CLA2-wide"],
    "seeds": [0, 1],
    "overrides": {"H16-MQA-CLA2-wide": {"design": "H16-MQA-CLA2", "intermediate_size": 56}},
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2},
    "data": {"source": "stdlib", "vocab_size": 1024, "max_bytes": 200_000, "valid_fraction": 0.3},
    "train": {"tokens": 512, "sequence_length": 128, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 0},
}
STAGES = {
    "stages": {
        "noise": {"designs": ["H16-MQA", "H16-MQA-CLA2"], "seeds": [0, 1]},
        "tune": {"designs": ["H16-MQA-CLA2"], "seeds": [0], "tune": True},
        "control": {"designs": ["H16-MQA-CLA2-wide"], "seeds": [0]},
    }
}


class Place:
    """A folder with a config, stages, a task set, and results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "study.jsonl"
        self.config, self.stages = folder / "compare.yaml", folder / "stages.yaml"
        self.config.write_text(yaml.safe_dump(CONFIG))
        self.stages.write_text(yaml.safe_dump(STAGES, sort_keys=False))
        tasks = folder / "tasks" / "blimp" / "data"
        tasks.mkdir(parents=True)
        pairs = [{"sentence_good": f"They see {n}.", "sentence_bad": f"They sees {n}.", "UID": "x"} for n in range(5)]
        (tasks / "x.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        fixed = {
            "config": self.config,
            "stages-file": self.stages,
            "results": self.results,
            "runs": self.folder / "runs",
        }
        fixed |= {"task-data": self.folder / "tasks", "tasks": "blimp", "task-items": 3, "commit": "abc"}
        study.main([*(f"--{name}={value}" for name, value in fixed.items()), *arguments])
        return study.read_rows(self.results)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLAYER_CACHE", str(folder / "cache"))
        yield Place(folder)


@pytest.fixture(scope="module")
def rows(place: Place) -> list[dict[str, Any]]:
    return place.run("noise", "control")


def test_a_row_holds_what_the_saved_model_scores(place: Place, rows: list[dict[str, Any]]) -> None:
    assert [(row["design"], row["seed"]) for row in rows] == [
        ("H16-MQA", 0),
        ("H16-MQA-CLA2", 0),
        ("H16-MQA", 1),
        ("H16-MQA-CLA2", 1),
        ("H16-MQA-CLA2-wide", 0),
    ]
    config = load_settings(CompareConfig, place.config)
    data = prepare(config.data)
    row = rows[1]
    (folder,) = filter(Path.is_dir, (place.folder / "runs").glob("H16-MQA-CLA2-seed-0-rate-0.01-*"))
    model = checkpoint.load(folder / "model")
    held_out = score(model, data.valid, sequence_length=128)
    assert row["validation"]["loss"] == pytest.approx(held_out.loss, rel=1e-5)
    assert 0 < row["validation"]["standard_error"] < 1
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert row["kv_bytes_per_token"] == 2 * 2 * 16 * 2  # two owners, keys and values, two bytes
    assert [result["accuracy"] for result in row["recall"]] == [r.accuracy for r in score_recall(model, data.tokenizer)]
    assert row["course"] == {"2": row["validation"]["loss"]}  # of two steps
    assert row["tasks"]["blimp"]["items"] == 3
    assert (row["tokens"], row["learning_rate"], row["commit"], row["runs_on_gpu"]) == (512, 0.01, "abc", 1)
    assert row["settings"]["model"]["design"] == "H16-MQA-CLA2"
    assert rows[4]["settings"]["model"]["intermediate_size"] == 56
    assert row["environment"]["torch"]


def test_nothing_is_run_twice_and_the_clock_is_heeded(
    place: Place, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that do not change what comes out do not make another run."""

    def no_training(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("trained")

    with monkeypatch.context() as patch:
        patch.setattr(study, "train", no_training)
        assert place.run("control", "noise", "train.log_every=3", "--minutes=0") == rows
        assert "out of time" not in capsys.readouterr().err
    assert place.run("control", "train.clip=0.5", "--minutes=-1") == rows
    assert "out of time" in capsys.readouterr().err


def test_a_run_that_another_process_is_at_is_left_to_it(
    place: Place, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, and while, it is tuned; and what the other has added in the meantime is seen."""
    before = place.results.read_text()
    trained: list[str] = []

    def made_up(self: study.Study, training: Any, folder: Path) -> dict[str, Any]:
        trained.append(folder.name)
        with study.claimed(folder.with_name(f"{folder.name}.lock")) as mine:
            assert not mine
        assert len(place.run("tune")) == len(rows) + len(trained) - 1
        return {"error": "step 3: the loss is nan"}

    monkeypatch.setattr(study.Study, "_result", made_up)
    assert len(place.run("tune")) == len(rows) + 2  # a rate up and, as that diverged, one down
    assert len(trained) == 2
    place.results.write_text(before)


def test_a_design_whose_first_rate_another_process_trains_is_left_to_it(
    place: Place, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place.results.read_text()
    place.results.write_text("")

    def made_up(self: study.Study, training: Any, folder: Path) -> dict[str, Any]:
        if training.train.learning_rate == 1e-2:
            assert place.run("tune") == []
        return {"error": "step 3: the loss is nan"}

    monkeypatch.setattr(study.Study, "_result", made_up)
    assert len(place.run("tune")) == 3
    place.results.write_text(before)


@pytest.mark.parametrize(
    "tried",
    [
        {0.015: 1.0, 0.0225: 0.5, 0.03375: 0.5},  # up until it is no lower
        {0.015: 99.0, 0.006667: 1.0, 0.004445: 2.0},  # down, where the first step up is worse
        {0.015: None, 0.006667: None},  # a run that diverges is no better
    ],
)
def test_tuning(
    tried: dict[float, float | None], place: Place, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rate is in the results already."""

    def made_up(self: study.Study, training: Any, folder: Path) -> dict[str, Any]:
        loss = tried[training.train.learning_rate]
        if loss is None:
            return {"error": "step 3: the loss is nan"}
        return {**{k: rows[1][k] for k in ("tasks", "recall", "seconds", "evaluation_seconds")}} | {
            "validation": {**rows[1]["validation"], "loss": loss}
        }

    before = place.results.read_text()
    monkeypatch.setattr(study.Study, "_result", made_up)
    found = place.run("tune")[len(rows) :]
    assert [row["learning_rate"] for row in found] == list(tried)
    assert [row.get("error") is None for row in found] == [loss is not None for loss in tried.values()]
    place.results.write_text(before)


def test_a_run_whose_loss_is_no_number_is_recorded_as_that(place: Place, rows: list[dict[str, Any]]) -> None:
    before = place.results.read_text()
    *others, row = place.run("control", "train.learning_rate=1e38")
    assert others == rows
    assert re.fullmatch(r"step \d+: the loss is (nan|inf); .*", row["error"])
    assert "validation" not in row
    place.results.write_text(before)


def test_what_else_a_run_fails_of_ends_the_study_and_is_not_recorded(
    place: Place, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a folder that is none, of one run or of all."""
    (folder,) = filter(Path.is_dir, (place.folder / "runs").glob("H16-MQA-CLA2-wide-seed-0-rate-0.01-*"))
    before = place.results.read_text()
    place.results.write_text("")
    folder.rename(place.folder / "aside")
    folder.touch()
    for arguments in ((), (f"--runs={place.results}",)):
        with pytest.raises(SystemExit) as caught:
            place.run("control", *arguments)
        assert caught.value.code == 2
        assert re.match(r"study.py: output folder .* cannot be written", capsys.readouterr().err.splitlines()[-1])
        assert not place.results.read_text()
    folder.unlink()
    (place.folder / "aside").rename(folder)
    place.results.write_text(before)


def test_other_data_make_another_run(place: Place, rows: list[dict[str, Any]]) -> None:
    """In a folder of its own: that of the run before would be refused."""
    before = place.results.read_text()
    *others, row = place.run("control", "data.valid_fraction=0.4")
    assert others == rows
    assert row["validation"]["tokens"] > rows[-1]["validation"]["tokens"]
    assert row["settings"] == {**rows[-1]["settings"], "data": row["settings"]["data"]}
    place.results.write_text(before)


def test_mistakes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("nois",): "no stage 'nois'; stages: noise, tune, control",
        ("noise", "designs=[H16-MQA]", "overrides={}"): "stage noise: 'H16-MQA-CLA2' is not among the designs",
        ("noise", "train.tokens=1"): "tokens",
        ("noise", "--runs-on-gpu=0"): "--runs-on-gpu: at least 1",
    }.items():
        with pytest.raises(SystemExit) as caught:
            place.run(*arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_report_of_those_runs(place: Place, rows: list[dict[str, Any]]) -> None:
    config = load_settings(CompareConfig, place.config)
    assert render(gather(config, []), []) == "No runs yet."
    other = json.loads(json.dumps(rows[0]))
    other["settings"]["train"]["tokens"] = 1024
    other["validation"]["loss"] = -1.0
    better = json.loads(json.dumps(rows[0]))
    better["learning_rate"] = better["settings"]["train"]["learning_rate"] = 0.02
    better["validation"]["loss"] -= 0.5
    failed = {key: value for key, value in better.items() if key != "validation"} | {"error": "the loss is nan"}
    arms = gather(config, [*rows, other, better, failed])
    assert [(arm.design, arm.rate, list(arm.rows)) for arm in arms] == [
        ("H16-MQA", 0.02, [0]),
        ("H16-MQA-CLA2", 0.01, [0, 1]),
        ("H16-MQA-CLA2-wide", 0.01, [0]),
    ]
    assert arms[0].tried == {0.01: rows[0]["validation"]["loss"], 0.02: better["validation"]["loss"]}
    text = render(arms, [*rows, better, failed])
    assert "6 runs, 0.00 billion tokens of the crosslayer study corpus 2026-11" in text
    assert "1 more did not finish" in text
    assert f"| `H16-MQA` | 256 | {rows[0]['parameters'] / 1e6:.2f} M | 0.02 | 1 |" in text
    mean = (rows[1]["validation"]["loss"] + rows[3]["validation"]["loss"]) / 2
    assert f"| 0.01 | 2 | {mean:.4f} (" in text
    assert "blimp acc (chance 0.50)" in text
    rows[0]["settings"]["data"], kept = "other", rows[0]["settings"]["data"]
    with pytest.raises(UserError, match="runs on different data"):
        gather(config, rows)
    rows[0]["settings"]["data"] = kept


def made_up_arm(design: str, parameters: int, losses: list[float], scores: dict[str, list[float]]) -> Arm:
    """An arm with these losses, accuracies, perplexities of WikiText-2 and gains in recall by seed."""
    rows = {}
    for seed, loss in enumerate(losses):
        found = {name: values[seed] for name, values in scores.items()}
        acc = {
            task: {"metrics": {"acc": {"value": found[task], "standard_error": 0.0123, "chance": None}}}
            for task in ("lambada", "blimp")
        }
        perplexity = {"value": found["perplexity"], "standard_error": 2.0, "chance": None}
        rows[seed] = {
            "seed": seed,
            "parameters": parameters,
            "kv_bytes_per_token": 3072.0,
            "tokens": 100,
            "validation": {"loss": loss, "bits_per_byte": loss / 3, "standard_error": 0.05},
            "tasks": acc | {"wikitext-2": {"metrics": {"token_perplexity": perplexity}}},
            "recall": [
                {"length": 64, "depth": depth, "accuracy": 0.0, "gain": found["gain"] + depth, "chance": 0.001}
                for depth in (0.0, 1.0)
            ],
            "seconds": 60.0,
            "evaluation_seconds": 0.0,
            "environment": {"gpu": "here", "time": "2026-11-25"},
        }
    return Arm(design, 1e-3, rows, {1e-3: losses[0]})


def test_the_report_of_scores_over_seeds() -> None:
    """By hand: with three seeds in common, half an interval is 4.3027 / sqrt(3) standard deviations. Differences in
    LAMBADA are 0.01, 0.02, 0.03; in BLiMP -0.02 all three; in loss on WikiText-2 ln(1.25), ln(1.25), 0; in gain 0.5."""
    ours = {
        "lambada": [0.06, 0.08, 0.10],
        "blimp": [0.6, 0.61, 0.65],
        "perplexity": [50, 50, 50],
        "gain": [1.0, 2.0, 3.0],
    }
    other = {
        "lambada": [0.05, 0.06, 0.07, 0.9],
        "blimp": [0.62, 0.63, 0.67, 0.9],
        "perplexity": [40, 40, 50, 2000],
        "gain": [0.5, 1.5, 2.5, 9.0],
    }
    arms = [
        made_up_arm("H64-MQA", 49_220_000, [3.5, 3.6, 3.7, 3.8], other),
        made_up_arm("H128-MQA-CLA2", 50_000_000, [3.4, 3.5, 3.6], ours),
    ]
    text = render(arms, [row for arm in arms for row in arm.rows.values()])
    pair = "| Equal cache: sharing, or smaller heads | `H128-MQA-CLA2` | `H64-MQA` |"
    assert f"{pair} +0.78 M | −0.1000 ±0.0000 | 3 | lower loss |" in text
    assert (
        f"{pair} +0.0200 ±0.0248 | **−0.0200 ±0.0000** | +0.1488 ±0.3200 | +0.0000 ±0.0000 | **+0.5000 ±0.0000** |"
        in text
    )
    assert "as of 5 comparisons of equals about 0 would" in text
    assert "| `H64-MQA` | 0.270 (0.050–0.900) | 0.705 (0.620–0.900) | 532.5 (40.0–2,000) |" in text
    assert "| s.e. over items, of `H64-MQA` with seed 0 | ±0.012 | ±0.012 | ±2.000 |" in text
    assert text.count("±0.012 ") == 2
    assert (
        "| `H128-MQA-CLA2` | 0.000 (0.000–0.000) | 2.500 (1.500–3.500) | 0.000 (0.000–0.000) | 2.000 (1.000–3.000) |"
        in text
    )
    assert "0.0000 (H128-MQA-CLA2 against H64-MQA). Not all designs have the same seeds: means are over" in text
    equal = [made_up_arm(arm.design, 50_000_000, [3.5, 3.6], other) for arm in arms]
    text = render(equal, [row for arm in equal for row in arm.rows.values()])
    assert f"{pair} as many | +0.0000 ±0.0000 | 2 | not resolved at this size |" in text
    assert "Not all designs" not in text
    assert "added later" not in text
    more = [
        made_up_arm("H64-MQA", 50_000_000, [3.5, 3.6, 3.7, 3.8, 3.9], {name: [1.0] * 5 for name in other}),
        made_up_arm("H128-MQA-CLA2", 50_001_000, [3.4, 3.5, 3.6, 3.9, 4.0], {name: [1.0] * 5 for name in ours}),
    ]
    text = render(more, [row for arm in more for row in arm.rows.values()])
    assert f"{pair} as many | −0.0200 ±0.1360 | 5 | not resolved at this size |" in text
    assert "|  |  | by the seeds added later alone |  | +0.1000 ±0.0000 | 2 | higher loss |" in text
    shared = [made_up_arm("H64-MQA", 50_000_000, [3.5, 3.6], other), made_up_arm("H128-MQA-CLA2", 1, [3.4], ours)]
    runs = [row for arm in shared for row in arm.rows.values()]
    text = render(shared, [{**runs[0], "runs_on_gpu": 2}, {**runs[1], "runs_on_gpu": 2}, runs[2]])
    assert "3 runs, 0.00 billion tokens of the crosslayer study corpus 2026-11, 2 GPU minutes" in text
    assert f"{pair} −50.00 M | −0.1000 | 1 | one seed |" in text
    alone = render(arms[:1], list(arms[0].rows.values()))
    assert "comparisons of equals" not in alone


def test_the_report_of_losses_on_the_way() -> None:
    """By hand: differences of -0.3 and -0.1 after step 1000, -0.1 and -0.1 at the end; deviations from the means of the
    two designs are +-0.2 and +-0.1 on the way, +-0.05 both at the end. Of pairs at several rates nothing is said."""
    scores = {name: [1.0] * 3 for name in ("lambada", "blimp", "perplexity", "gain")}
    ours = made_up_arm("H128-MQA-CLA2", 1, [3.4, 3.5, 3.6], scores)
    other = made_up_arm("H64-MQA", 1, [3.5, 3.6, 3.7], scores)
    for arm, courses in ((ours, [[4.3, 3.4], [4.7, 3.5]]), (other, [[4.6, 3.5], [4.8, 3.6]])):
        for seed, losses in enumerate(courses):
            arm.rows[seed]["course"] = dict(zip(("1000", "2000"), losses, strict=True))
    rows = [row for arm in (ours, other) for row in arm.rows.values()]
    text = render([ours, other], rows)
    assert "| after step 1,000 | after step 2,000 |" in text
    pair = "| Equal cache: sharing, or smaller heads | `H128-MQA-CLA2` | `H64-MQA` |"
    assert f"{pair} −0.2000 ±1.2706 | −0.1000 ±0.0000 |" in text
    assert "at the end by 0.95 after step 1,000 (4 runs of 2 designs)." in text  # 0.3 / sqrt(0.1)
    text = render([replace(ours, rate=2e-3), other], rows)
    assert "on the way" not in text
    assert "at the end by 0.95" in text
    for row in rows:
        row.pop("course", None)
    assert "at the end" not in render([ours, other], rows)


# -- the study itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelConfig]:
    """The models of the study's designs."""
    config = load_settings(CompareConfig, study.CONFIG)
    return {
        design: make_model_config(
            config.training(design, 0).model, vocab_size=16384, eos_token_id=0, context=config.train.sequence_length
        )
        for design in config.designs
    }


def test_the_stages_cover_the_study(shapes: dict[str, ModelConfig]) -> None:
    stages = load_settings(study.Plan, study.STAGES).stages
    assert {design for stage in stages.values() for design in stage.designs} == set(shapes)


def test_the_config_has_the_rates_that_were_found() -> None:
    config = load_settings(CompareConfig, study.CONFIG)
    arms = gather(config, study.read_rows(study.RESULTS))
    assert arms
    assert {arm.design: config.training(arm.design, 0).train.learning_rate for arm in arms} == {
        arm.design: arm.rate for arm in arms
    }


def test_pairs_of_equal_cache_and_of_equal_parameters_are_that(shapes: dict[str, ModelConfig]) -> None:
    cache = {design: kv_bytes(config, 1024) for design, config in shapes.items()}
    parameters = {design: num_parameters(config) for design, config in shapes.items()}
    seen = set()
    for question, pairs in QUESTIONS.items():
        for design, reference in pairs:
            ratio = cache[design] / cache[reference]
            if "qual cache" in question or "same cache" in question:
                assert ratio == pytest.approx(1, abs=1e-3)
            if "Half the cache" in question:
                assert ratio == 0.5
            if "within 2%" in question:
                assert ratio == pytest.approx(1, rel=2e-2)
            if "third less" in question:
                assert ratio == pytest.approx(2 / 3)
            if "sixth more" in question:
                assert ratio == pytest.approx(7 / 6)
            if "equal parameters" in question:
                assert parameters[design] == pytest.approx(parameters[reference], rel=2e-3)
            seen.add(question)
    assert seen == set(QUESTIONS)
    assert parameters["H128-MQA-CLA2-wide"] == pytest.approx(parameters["H128-MQA"], rel=1e-3)


def test_the_papers_points_have_the_bytes_of_their_designs() -> None:
    """20 layers of width 2048: names and bytes of table 1 belong together."""
    base = ModelConfig(50304, 2048, 5472, num_hidden_layers=20, num_attention_heads=16, head_dim=128)
    assert {name: kv_bytes(parse_design(name, base), 1) for name in PAPER} == {
        n: count for n, (count, _) in PAPER.items()
    }


def test_what_the_paper_has() -> None:
    designs = load_settings(CompareConfig, study.CONFIG).designs
    layouts = [design for design in designs if ":" in design or "fusedkv" in design]
    controls = [design for design in designs if design.endswith("-wide")]
    assert [design for design in designs if not is_of_the_paper(design)] == [*layouts, *controls]


def test_the_plot_of_layouts() -> None:
    """The lowest loss on top; a range where there is one."""
    spreads = {"a": Spread.of([3.0, 3.2]), "b": Spread.of([3.5]), "c": Spread.of([2.0])}
    names = {"H128-MQA-CLA2": "a", "H128-MQA-fusedkv-lite": "b", "H64-MQA": "c"}
    left, right = draw_layouts([(name, spreads[key], spreads["c"]) for name, key in names.items()]).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "H128-MQA-fusedkv-lite",
        "H128-MQA-CLA2",
        "H64-MQA",
    ]
    assert [line.get_xdata()[0] for line in left.lines] == pytest.approx([3.5, 3.1, 2.0])
    assert [line.get_xdata()[0] for line in right.lines] == [2.0] * 3


def test_the_plot_shows_both_panels(place: Place, rows: list[dict[str, Any]]) -> None:
    arms = gather(load_settings(CompareConfig, place.config), rows)
    left, right = draw([(arm.kv_bytes, arm.loss, arm.design) for arm in arms], "here").axes
    assert {text.get_text() for text in left.texts} == {"H16-MQA", "H16-MQA-CLA2"}
    assert {text.get_text() for text in right.texts} == set(PAPER)
    assert {design: kind_of(design) for design in ("H128-GQA2", "H64-MQA-CLA2-wide", "H128-GQA2-yoco:window=341")} == {
        "H128-GQA2": "no sharing",
        "H64-MQA-CLA2-wide": "CLA2",
        "H128-GQA2-yoco:window=341": "other sharing",
    }


def test_a_label_that_no_line_leads_to_is_nearest_to_its_own_point() -> None:
    """In the paper's panel, which is crowded and always the same."""
    right = draw([(768, Spread.of([3.5]), "H16-MQA")], "here").axes[1]
    points = right.transData.transform([text.xy for text in right.texts])
    for own, text in enumerate(right.texts):
        box = text.get_window_extent()
        gaps = [math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0)) for x, y in points]
        if gaps[own] < 15:  # pixels; lines lead farther
            assert min(gaps) == gaps[own], text.get_text()


def test_a_line_to_a_label_passes_by_no_other_point() -> None:
    """On the left points as the study has them: DenseFront's line would lead through KeepEnds if nobody cared."""
    points = {
        "H32-MQA-CLA2": (768, 3.6524),
        "H128-MQA-CLA4": (1536, 3.5262),
        "H128-MQA-CLA2-KeepEnds": (3584, 3.5806),
        "H128-MQA-CLA2-DenseFront": (3584, 3.5784),
        "H64-GQA2": (6144, 3.5647),
        "H32-GQA4": (6144, 3.5946),
        "H128-MQA": (6144, 3.5735),
        "H128-GQA2": (12_288, 3.5610),
        "H128-MHA": (24_576, 3.5651),
        "H64-MHA": (24_576, 3.5701),
    }
    for axes in draw([(count, Spread.of([loss]), name) for name, (count, loss) in points.items()], "here").axes:
        lines = [line.get_xydata() for line in axes.lines if line.get_linewidth() == 0.6]
        assert lines
        for start, end in map(axes.transData.transform, lines):
            along = start + np.linspace(0, 1, 101)[:, None] * (end - start)
            for point in axes.transData.transform([text.xy for text in axes.texts]):
                if not np.allclose(point, start):
                    assert np.hypot(*(along - point).T).min() > 4  # pixels: about the radius of a point
