"""Many streams, clients that vanish, and what a server has left of it: minutes of it by hand, seconds of it here."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks.load import Load, measure, parse, parse_lengths, percentiles
from tests.server.servers import save_folder


def test_percentiles() -> None:
    assert percentiles([n / 1000 for n in range(100, 0, -1)]) == pytest.approx(
        {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    )
    assert percentiles([]) == {}


def test_lengths_stay_within_their_bounds() -> None:
    rng = random.Random(0)
    drawn = {
        text: [parse_lengths(text, 50)(rng) for _ in range(2000)]
        for text in ("7", "3:9", "40:90", "lognormal:20:1", "lognormal:20:1e9")
    }
    assert {*drawn["7"]} == {7}
    assert {*drawn["3:9"]} == {*range(3, 10)}
    assert {*drawn["40:90"]} == {*range(40, 51)}
    assert {*drawn["lognormal:20:1e9"]} == {1, 50}
    assert min(drawn["lognormal:20:1"]) >= 1
    assert max(drawn["lognormal:20:1"]) == 50
    assert statistics.median(drawn["lognormal:20:1"]) == pytest.approx(20, abs=2)


NO_LENGTHS = ("", "out.json", "0", "9:3", "3:", "lognormal:20", "lognormal:0:1", "lognormal:a:1")


@pytest.mark.parametrize("text", [*NO_LENGTHS, "lognormal:inf:1", "lognormal:64:nan", "lognormal:64:inf"])
def test_other_lengths_are_refused_at_once(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["http://127.0.0.1:1", "--model", "tiny", "--clients", "1", f"--output-tokens={text}"])
    assert f"lengths are a number, A:B or lognormal:MEDIAN:SIGMA, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--rate=-1", "--rate=0", "--rate=nan", "--rate=inf", "--clients=0", "--vocab-size=0", "--longest=0"]
)
def test_other_figures_are_refused_at_once(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = [] if option.startswith(("--rate", "--clients")) else ["--clients=1"]
    with pytest.raises(SystemExit, match="2"):
        parse(["http://127.0.0.1:1", "--model", "tiny", option, *others])
    name, value = option.split("=")
    error = capsys.readouterr().err
    assert f"argument {name}: must be" in error
    assert error.endswith(f"got {value}\n")


@pytest.mark.parametrize(
    ("answer", "outcome", "tokens"),
    [
        (b"", "broken off", 0),
        (b"HTTP/1.1 2", "broken off", 0),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", "status 429", 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", "broken off", 7),
    ],
)
def test_answers_that_are_none(answer: bytes, outcome: str, tokens: int) -> None:
    """Counted as what they are, and their prompts only where the server took them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"logprobs": 0}')
        writer.write(answer)
        writer.close()

    async def run() -> Load:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            load = Load(
                parse([f"http://127.0.0.1:{port}", "--model", "tiny", "--clients", "1", "--prompt-tokens", "7"])
            )
            await load.request()
            return load

    load = asyncio.run(run())
    assert load.outcomes == {outcome: 1}
    assert load.prompt_tokens == tokens


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_loaded_server_loses_nothing_and_does_not_grow(tmp_path: Path) -> None:
    save_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "crosslayer", "serve", str(tmp_path / "tiny"), "--port", "0", "--cache", "128KiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        url = process.stdout.readline().strip()
        load = [url, "--model", "tiny", "--pid", str(process.pid), "--longest", "60", "--vanish", "0.3"]
        arrivals = asyncio.run(measure(parse([*load, "--rate", "30", "--seconds", "4"])))
        assert arrivals["outcomes"].keys() <= {"finished", "vanished"}
        assert 60 < sum(arrivals["outcomes"].values()) < 200  # 120 are due, with a standard deviation of 11
        result = asyncio.run(measure(parse([*load, "--clients", "200", "--seconds", "12"])))
        assert result["outcomes"].keys() == {"finished", "vanished"}
        assert result["most_open"] == 200
        memory = result["server_memory_mib"]
        assert memory[-1] - memory[len(memory) // 2] < 20
        for _ in range(50):  # the last to vanish may do so while the server is at a step of theirs
            with urllib.request.urlopen(f"{url}/metrics") as response:
                metrics = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
            if metrics["crosslayer_running"] == "0.0":
                break
            time.sleep(0.1)
        assert metrics['crosslayer_cache_blocks_used{span="128"}'] == metrics["crosslayer_running"] == "0.0"
        assert float(metrics["crosslayer_preemptions_total"]) > 0
        assert float(metrics['crosslayer_finished_total{reason="abort"}']) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
