"""crosslayer generate"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import replace
from pathlib import Path

from crosslayer.cli.common import (
    add_device_argument,
    add_json_argument,
    check_json_argument,
    load_model,
    warn_beyond_context,
    write_json_output,
)
from crosslayer.errors import UserError
from crosslayer.files import say

HELP = "continue one prompt, streaming, or a file of prompts as a batch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="model folder")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    parser.add_argument(
        "--prompts", metavar="FILE", help='file with a prompt a line, or .jsonl with objects that have a "prompt"'
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="... from those that make up P")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_device_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    check_json_argument(arguments)
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("want either a PROMPT or --prompts FILE")
    prompts = [arguments.prompt] if arguments.prompts is None else _read_prompts(Path(arguments.prompts))
    if not all(prompts):
        raise UserError("the prompt is empty; give at least a character to continue")
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be positive, got {arguments.max_new_tokens}")

    from crosslayer.engine import LLM, Completion, EngineConfig, SamplingParams
    from crosslayer.train.host import choose_device

    device = choose_device(arguments.device)
    model, tokenizer, _ = load_model(arguments.model, "cpu")  # the engine puts a copy of the weights where it runs
    params = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_tokens=arguments.max_new_tokens,
    )
    # A hash, because seed + row would give row 1 of one seed the numbers of row 0 of the next.
    seeds = [zlib.crc32(f"{arguments.seed} {row}".encode()) for row in range(len(prompts))]
    each = [replace(params, seed=seed) for seed in seeds]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, ids)) + arguments.max_new_tokens
    warn_beyond_context(model, longest)
    # The cache need not be for more than these.
    config = EngineConfig(max_length=longest, max_running=min(len(prompts), EngineConfig.max_running))
    llm = LLM(model, config, tokenizer=tokenizer, device=device)
    completions = [Completion() for _ in prompts]
    streaming = arguments.prompt is not None and not arguments.json
    if streaming:
        print(prompts[0], end="", flush=True)
    started = time.monotonic()
    for row, output in llm.stream(ids, each):
        completions[row].add(output)
        if streaming:
            print(output.text, end="", flush=True)
    seconds = time.monotonic() - started
    if streaming:
        print()
    rows = list(zip(prompts, completions, strict=True))
    if arguments.json:
        records = [{"prompt": prompt, "text": c.text, "tokens": len(c.token_ids)} for prompt, c in rows]
        write_json_output(arguments.json, records)
    if not streaming and arguments.json != "-":
        for prompt, completion in rows:
            print(f"--- {prompt}\n{completion.text}")
    total = sum(len(completion.token_ids) for completion in completions)
    say(
        f"[{total} tokens, {total / seconds:,.0f} tokens/s, KV cache {llm.engine.most_cache_bytes_used:,} bytes in "
        f"{len(model.config.plan.key_owners)} of {model.config.num_hidden_layers} layers]"
    )


def _read_prompts(file: Path) -> list[str]:
    try:
        # Not splitlines, which also splits at characters that JSON may have inside a string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file}: not UTF-8 at byte {error.start}") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {file}: no prompts in it")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'--prompts {file}: line {number} is not an object with a "prompt" that is text')
        prompts.append(prompt)
    return prompts
