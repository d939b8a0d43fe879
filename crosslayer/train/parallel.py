"""A built model spread over processes: matrices over the tensor ranks (DTensor), then everything over the data ranks
(FSDP2).

These functions change a model in place and leave its code alone: weights become DTensors, and hooks turn activations
into DTensors where they meet them. Between modules activations are plain tensors. With tensor parallelism they are
whole outside attention, MLP and loss, and inside hold this rank's heads, features or part of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from crosslayer.model import Transformer
from crosslayer.plan import ModelConfig
from crosslayer.plan.training_memory import check_tensor_parallel

HEADS = 2  # the dimension of heads in [B, T, heads, D]


def parallelize(model: Transformer, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Spread `model`, whose weights are whole and equal on all processes, over a ("data", "tensor") mesh.

    A block is gathered when it runs, the rest of the model for the whole step. Gradients are summed over the data
    ranks, not averaged. With `bf16` weights are gathered in bfloat16, while gradients are summed, and the optimizer
    works, in float32.

    Raises:
        UserError: the shape of the model does not allow so many tensor ranks.
    """
    tensor, data = mesh["tensor"], mesh["data"]
    split = tensor.size() > 1
    check_tensor_parallel(model.config, tensor.size())
    # The tables of RoPE are inputs of a block, and stay in float32.
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = in_bf16 if bf16 else MixedPrecisionPolicy()
    for block in model.model.layers:  # one at a time, so that a device never holds the whole model
        if split:
            _split_block(block, model.config, tensor)
        fully_shard(block, mesh=data, mp_policy=policy)
    if split:
        _split_vocabulary(model, tensor)
    fully_shard(model, mesh=data, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the only sum that every backend has
    # Keys and values leave a block as views, but nothing ever writes to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def whole_model(model: Transformer) -> Transformer | None:
    """A copy of a spread model with whole weights, on the CPU of the first process; None on the others."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    return whole


def _split_block(block: nn.Module, config: ModelConfig, mesh: DeviceMesh) -> None:
    # Each rank gets some of the KV heads; where it cannot, as in MQA, it makes all and goes on with one.
    key_value = ColwiseParallel() if config.num_key_value_heads % mesh.size() == 0 else _OneHead(config)
    styles = {
        "input_layernorm": _Whole(),
        "kv_layernorm": _Whole(),
        "self_attn": _AttentionInput(),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": key_value,
        "self_attn.v_proj": key_value,
        "self_attn.q_norm": _Whole(Shard(HEADS)),
        "self_attn.k_norm": _Whole(Shard(HEADS)),
        "self_attn.o_proj": RowwiseParallel(),
        "post_attention_layernorm": _Whole(),
        "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    present = {name for name, _ in block.named_modules()}
    # Readers have no K/V projections. The weights are everywhere already: no rank needs to send them (None).
    plan = {name: style for name, style in styles.items() if name in present}
    parallelize_module(block, mesh, plan, src_data_rank=None)


def _split_vocabulary(model: Transformer, mesh: DeviceMesh) -> None:
    """Embedding and output projection by rows of the vocabulary; the loss deals with a weight split so."""
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "model.norm": _Whole(),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        },
        src_data_rank=None,
    )
    # The sum over the ranks is still on its way, which a compiled block does not see: it would lose the gradient.
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.clone())
    model.tie_weights()


class _Whole(ParallelStyle):
    """A module with one input whose weights every rank holds in full; input and output are laid out as `layout`."""

    def __init__(self, layout: Placement | None = None) -> None:
        self.layout = layout or Replicate()

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(self._enter(mesh))
        module.register_forward_hook(self._leave(mesh))
        return distribute_module(module, mesh)

    def _enter(self, mesh: DeviceMesh) -> Callable[[nn.Module, tuple[Tensor]], DTensor]:
        def enter(_: nn.Module, inputs: tuple[Tensor]) -> DTensor:
            (x,) = inputs
            return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.layout], run_check=False)

        return enter

    def _leave(self, mesh: DeviceMesh) -> Callable[[nn.Module, tuple[Tensor], DTensor], Tensor]:
        return lambda module, inputs, output: output.to_local()


class _OneHead(_Whole):
    """A K or V projection that every rank holds in full, and of whose output [B, T, G * D] it goes on with the one
    head that its queries use.

    What the ranks' queries send back are parts of one gradient. Autograd adds up those of all layers that read the
    head, and only their sum, at the owner, is summed over the ranks: that is what Partial says.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim

    def _leave(self, mesh: DeviceMesh) -> Callable[[nn.Module, tuple[Tensor], DTensor], Tensor]:
        first = mesh.get_local_rank() * self.heads // mesh.size() * self.head_dim
        last = first + self.head_dim
        return lambda module, inputs, output: output.to_local(grad_placements=[Partial()])[..., first:last]


class _AttentionInput(ParallelStyle):
    """Makes DTensors of the two inputs of attention once, for all its projections: their gradients then add up on
    each rank before the ranks are summed."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            q_input, kv_input, *rest = inputs
            q = DTensor.from_local(q_input, mesh, [Replicate()], run_check=False)
            kv = q if kv_input is q_input else DTensor.from_local(kv_input, mesh, [Replicate()], run_check=False)
            return (q, kv, *rest)

        module.register_forward_pre_hook(enter)
        return module
