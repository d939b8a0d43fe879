"""What others need for the same workloads: transformers' generate and its continuous batching, and vLLM.

A peer runs the unshared design, which is a Llama, with random weights in bf16, greedily, and with no token that ends a
sequence. Each function gives a row per workload, as `benchmarks.serve_speed` wants it, and needs a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import Workload, time_runs
from crosslayer.plan import ModelConfig

Row = dict[str, Any]


def transformers_rows(config: ModelConfig, workloads: Iterable[Workload], device: str) -> Iterator[Row]:
    """`generate` with a static cache, whose step transformers compiles on a GPU, up to 64 requests at a time; for more
    of them, continuous batching."""
    import transformers

    with torch.device(device):
        llama = transformers.LlamaConfig.from_dict(config.to_dict())
        model: Any = transformers.AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16).eval()
    # Not in the call: there, None means what the model says, and what Llama's config says by default is 2.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def static(prompts: list[list[int]], new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts, device=device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        return [len(row) - ids.shape[1] for row in output.tolist()]  # tolist waits for the GPU

    def continuous(prompts: list[list[int]], new_tokens: int) -> list[int]:
        settings = transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        outputs = model.generate_batch(prompts, generation_config=settings, persistent_manager=True)
        return [len(output.generated_tokens) for output in outputs.values()]

    for workload in sorted(workloads, key=lambda workload: workload.requests):  # what is continuous keeps its memory
        kind, run = ("static", static) if workload.requests <= 64 else ("continuous", continuous)
        torch.compiler.reset()
        spent = time_runs(partial(run, new_tokens=workload.new_tokens), workload, config.vocab_size)
        yield {"who": f"transformers, {kind}", "version": transformers.__version__} | measures(workload, spent)
    model.destroy_cached_continuous_batching_manager()


def vllm_rows(config: ModelConfig, workloads: Iterable[Workload], device: str) -> Iterator[Row]:
    """vLLM's offline engine, with a place for each of 512 sequences and no prefix cache; `device` is a GPU."""
    import vllm

    workloads = list(workloads)
    longest = max(workload.length for workload in workloads)
    with tempfile.TemporaryDirectory() as folder:
        data = config.to_dict() | {"max_position_embeddings": max(longest, config.max_position_embeddings)}
        (Path(folder) / "config.json").write_text(json.dumps(data), encoding="utf-8")
        llm = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=512,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
        )
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None
        for workload in workloads:
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=workload.new_tokens, ignore_eos=True, detokenize=False
            )

            def generate(prompts: list[list[int]], params: Any = params) -> list[int]:
                inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
                return [len(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]

            spent = time_runs(generate, workload, config.vocab_size)
            row = {"who": "vLLM", "version": vllm.__version__, "cache_tokens": tokens}
            yield row | measures(workload, spent)


def measures(workload: Workload, spent: list[float]) -> Row:
    """A workload, the seconds it took, and the output in the median of them."""
    median = sorted(spent)[len(spent) // 2]
    rate = workload.requests * workload.new_tokens / median
    return {"workload": asdict(workload), "seconds": spent, "tokens_per_second": rate}
