"""Deliberate faults in the model, to show that the checks would notice them.

`python -m tests.model.mutations` prints which checks catch which fault, as the table in docs/correctness.md.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from crosslayer.model import attention, cache, rope
from crosslayer.model.transformer import Attention, Block, Decoder
from tests.conftest import tiny_config
from tests.model.checks import CHECKS, random_model


@dataclass(frozen=True)
class Mutation:
    """A fault: in the source of `function`, `old` becomes `new`; on `plan`, at least the checks `caught_by` fail."""

    name: str
    plan: str
    function: Callable[..., Any]
    old: str
    new: str
    caught_by: tuple[str, ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the fault: the function keeps its identity and gets the code of the changed source."""
        function = self.function
        assert isinstance(function, FunctionType)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.name}: the code has changed, adapt the mutation"
        # A function around it provides the names that the original closes over, such as __class__ for super().
        around = f"def around({', '.join(function.__code__.co_freevars)}):\n"
        changed = source.replace(self.old, self.new) + f"\nreturn {function.__name__}.__code__"
        namespace: dict[str, Any] = {}
        code = compile(around + textwrap.indent(changed, "    "), f"<{self.name}>", "exec")
        exec(code, function.__globals__, namespace)
        original = function.__code__
        function.__code__ = namespace["around"](*function.__code__.co_freevars)
        try:
            yield
        finally:
            function.__code__ = original


# Two slots are alive at once, a slot is read through different windows, and keys and values have different sources.
TWO_SLOTS = "0,1,0,1,0,1"
WINDOWS = "0@6,1@6,1@4,0@6,4,4@3"
SPLIT = "0,1,1,1,4,1/0,1,0,1,1,0"

READ = "else keys[key_source]\n            v = None if plan.owns_values(layer) else values[value_source]"
MAKE_K = "self.k_norm, rope)"
NO_TURN = "(torch.ones_like(rope[0]), torch.zeros_like(rope[1]))"

MUTATIONS = (
    Mutation(
        "a reader reads the wrong owner (the lowest one at hand)",
        TWO_SLOTS,
        Decoder._run,
        READ,
        READ.replace("[key_source]", "[min(keys)]").replace("[value_source]", "[min(values)]"),
        ("reference", "gradients"),
    ),
    Mutation(
        "a reader reads the newest keys and values, whoever made them",
        TWO_SLOTS,
        Decoder._run,
        READ,
        READ.replace("[key_source]", "[max(keys)]").replace("[value_source]", "[max(values)]"),
        ("reference", "gradients"),
    ),
    Mutation(
        "values are read from the keys' source",
        SPLIT,
        Decoder._run,
        "else values[value_source]",
        "else values.get(key_source, values[value_source])",
        ("reference", "gradients"),
    ),
    Mutation(
        "RoPE is skipped on keys",
        "cla2",
        Attention.forward,
        MAKE_K,
        f"self.k_norm, {NO_TURN})",
        ("reference", "gradients"),
    ),
    Mutation(
        "RoPE is skipped on keys in prefill, not in decoding",
        "cla2",
        Attention.forward,
        MAKE_K,
        f"self.k_norm, {NO_TURN} if step is None or step.first else rope)",
        ("reference", "token by token", "chunked prefill", "ragged batch"),
    ),
    Mutation(
        "readers apply RoPE to keys again",
        "cla2",
        Attention.forward,
        "assert k is not None\n",
        "if self.k_proj is None and k.shape[2] == q.shape[2]:\n"
        "        k = apply_rope(k.transpose(1, 2), *rope).transpose(1, 2)\n",
        ("reference", "token by token", "gradients"),
    ),
    Mutation(
        "RoPE turns neighbouring components, not those half a head apart",
        "cla2",
        rope.apply_rope,
        "x.chunk(2, dim=-1)",
        "x[..., ::2], x[..., 1::2]",
        ("reference", "gradients"),
    ),
    Mutation(
        "one norm where two are meant",
        "cla2",
        Block.forward,
        "q_input if self.kv_layernorm is None else self.kv_layernorm(x)",
        "q_input",
        ("reference", "gradients"),
    ),
    Mutation(
        "queries go through the norm for keys and values",
        "cla2",
        Block.forward,
        "self.self_attn(q_input, kv_input, ",
        "self.self_attn(kv_input, kv_input, ",
        ("reference", "gradients"),
    ),
    Mutation(
        "windows are one token too long",
        WINDOWS,
        attention.positional_mask,
        "distance < window",
        "distance <= window",
        ("reference", "gradients"),
    ),
    Mutation(
        "a reader uses its owner's window",
        WINDOWS,
        Decoder._run,
        "masks[layer]",
        "masks[key_source]",
        ("reference", "gradients"),
    ),
    Mutation(
        "windows are ignored in decoding",
        WINDOWS,
        cache.ContiguousStep._make_mask,
        "return positional_mask(self.positions, keys.to(self.device), window)",
        "return positional_mask(self.positions, keys.to(self.device), None)",
        ("token by token", "chunked prefill", "ragged batch"),
    ),
    Mutation(
        "the ring is off by one when read",
        WINDOWS,
        cache.ContiguousStep._make_mask,
        "newest = self.old[:, None] - 1",
        "newest = self.old[:, None]",
        ("token by token", "chunked prefill", "ragged batch"),
    ),
    Mutation(
        "the ring is off by one when written",
        WINDOWS,
        cache.ContiguousStep._write_indices,
        "% capacity",
        "% max(capacity - 1, 1)",
        ("token by token", "chunked prefill", "ragged batch"),
    ),
    Mutation(
        "a chunk longer than the window keeps its first tokens",
        WINDOWS,
        cache.ContiguousStep._write_indices,
        "(columns >= self.new[:, None] - capacity)",
        "(columns < capacity)",
        ("chunked prefill", "ragged batch"),
    ),
    Mutation(
        "all rows are as long as the longest",
        "cla2",
        cache.ContiguousCache.advance,
        "step.old + step.new",
        "torch.full_like(step.old, int((step.old + step.new).max()))",
        ("ragged batch",),
    ),
    Mutation(
        "unused columns of short rows are stored too",
        "cla2",
        cache.ContiguousStep._write_indices,
        "(columns < self.new[:, None]) & ",
        "(columns >= 0) & ",
        ("ragged batch",),
    ),
    Mutation(
        "positions start at zero in every chunk",
        "cla2",
        cache.ContiguousStep.__init__,
        "self.old[:, None] + torch.arange(self.num_tokens)",
        "0 * self.old[:, None] + torch.arange(self.num_tokens)",
        ("token by token", "chunked prefill", "ragged batch"),
    ),
    Mutation(
        "the document mask is ignored",
        "cla2",
        attention.causal_mask,
        "if document_ids is None and (window is None or window >= length):",
        "document_ids = None\n    if window is None or window >= length:",
        ("packed documents",),
    ),
    Mutation(
        "documents see the one before",
        "cla2",
        attention.causal_mask,
        "document_ids[:, None, :, None] == document_ids[:, None, None, :]",
        "document_ids[:, None, :, None] - document_ids[:, None, None, :] <= 1",
        ("packed documents",),
    ),
    Mutation(
        "attention is not causal",
        "cla2",
        attention.attend,
        "is_causal=mask is None",
        "is_causal=False",
        ("reference", "token by token", "chunked prefill", "ragged batch", "packed documents", "gradients"),
    ),
    Mutation(
        "activation checkpointing detaches shared keys and values",
        "cla2",
        Decoder._run,
        "preserve_rng_state=False)\n            else",
        "preserve_rng_state=False); k, v = k.detach(), v.detach()\n            else",
        ("activation checkpointing", "gradients"),
    ),
    Mutation(
        "readers never pass gradients to their owner",
        "cla2",
        Decoder._run,
        "keys[key_source], values[value_source] = k, v",
        "keys[key_source], values[value_source] = k.detach(), v.detach()",
        ("gradients",),
    ),
    Mutation(
        "activation checkpointing is ignored",
        "cla2",
        Decoder.forward,
        "checkpoint_blocks=recompute",
        "checkpoint_blocks=False and recompute",
        ("activation checkpointing",),
    ),
    Mutation(
        "readers have a cache of their own",
        "cla2",
        cache.ContiguousCache.__init__,
        "for owner, slot in plan.key_slots.items()",
        "for owner, slot in ((i, plan.key_slots[s]) for i, s in enumerate(plan.key_sources))",
        ("allocated bytes",),
    ),
    Mutation(
        "windowed slots take the whole context",
        WINDOWS,
        cache.ContiguousCache.__init__,
        "slot.capacity(max_length)) for owner, slot in plan.value_slots.items()",
        "max_length) for owner, slot in plan.value_slots.items()",
        ("allocated bytes",),
    ),
    Mutation(
        "readers have projections of their own, and use them",
        "cla2",
        Attention.__init__,
        "projection(config.num_key_value_heads) if plan.owns_keys(layer) else None",
        "projection(config.num_key_value_heads)",
        ("owned parameters", "reference"),
    ),
    Mutation(
        "the second norm is not built",
        "cla2",
        Block.__init__,
        "norm() if config.has_kv_norm(layer) else None",
        "None",
        ("owned parameters",),
    ),
)


def failing_checks(mutation: Mutation) -> dict[str, str]:
    """The checks that fail on a model with this fault, and how: a wrong number or a crash."""
    failing = {}
    with mutation.applied():
        for name, check in CHECKS.items():
            try:
                check(random_model(tiny_config(mutation.plan)))
            except AssertionError:
                failing[name] = "wrong"
            except Exception:
                failing[name] = "crash"
    return failing


def table() -> str:
    lines = ["| fault | " + " | ".join(CHECKS) + " |", "|---|" + ":-:|" * len(CHECKS)]
    for mutation in MUTATIONS:
        failing = failing_checks(mutation)
        lines.append(f"| {mutation.name} | " + " | ".join(failing.get(name, "") for name in CHECKS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
