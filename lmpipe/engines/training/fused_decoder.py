"""Forward and backward passes of decoders like Llama whose layers are tuned by LoRA, with the kernels in C.

They compute what transformers, PEFT and autograd compute, in fewer passes over memory: products with frozen weights use
oneDNN's layout in both directions, projections of the same input are one product, and normalization, rotation,
activation, attention and their gradients are one kernel each. Only what gradients need is kept. Models that look
different, and other methods than LoRA, are trained by transformers' and PEFT's own code.

Knows nothing about losses or the training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable

from lmpipe.engines.int8_linear import Int8Linear
from lmpipe.engines.kernels import (
    Segments,
    add_rms_norm,
    attend,
    attend_backward,
    has_kernels,
    rms_norm_backward,
    rotate,
    silu_mul,
    silu_mul_backward,
)
from lmpipe.engines.local.decoder import RecordingBatch, has_plain_layers, head_shape, is_lora, is_plain, split_heads
from lmpipe.engines.training.packed_batch import PackedBatch
from lmpipe.engines.training.projections import Projection, load_adapters

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits that agree, relative to their norm


@final
@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a batch, as the layers see them.

    Attributes:
        cosines: Cosines of the rotary embeddings, shape (tokens, size of a head).
        sines: Their sines.
        segments: Segments that the tokens attend to: of each list, a token attends to one segment at most.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    segments: Sequence[Segments]


@final
class _Layer:
    """One layer of the decoder: its frozen weights, its adapters, and the two passes.

    Args:
        layer: The layer, with PEFT's layers.
        dtype: Dtype of the products.

    Attributes:
        adapters: The adapters of its linear layers.
        parameters: The trainable weights, in the order of their gradients.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads, self._groups, self._size = head_shape(attention)
        self._scale = attention.scaling
        self._dtype = dtype
        self._norms = [
            (norm.weight.detach().float(), norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._out = Projection([attention.o_proj], dtype)
        self._gate_up = Projection([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = Projection([mlp.down_proj], dtype)
        projections = (self._qkv, self._out, self._gate_up, self._down)
        self.adapters = [lora for projection in projections for lora in projection.adapters]
        self.parameters = [weight for lora in self.adapters for weight in (lora.down, lora.up)]

    def forward(self, residual: torch.Tensor, tokens: _Tokens) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Returns the residual stream after the layer, and what the backward pass needs."""
        x = add_rms_norm(residual, None, *self._norms[0], self._dtype)
        qkv, qkv_low = self._qkv(x)
        rotate(qkv, tokens.cosines, tokens.sines, self._heads + self._groups)
        q, k, v = split_heads(qkv, self._heads, self._groups, self._size)
        out = torch.empty(len(x), self._groups, self._heads // self._groups, self._size, dtype=self._dtype)
        lse = torch.empty(out.shape[:-1])
        for number, segments in enumerate(tokens.segments):
            attend(q, k, v, segments, self._scale, out, lse, merge=number > 0)
        attended = out.view(len(x), -1)
        delta, out_low = self._out(attended)
        middle = residual.clone()
        z = add_rms_norm(middle, delta, *self._norms[1], self._dtype)
        gate_up, gate_low = self._gate_up(z)
        activated = silu_mul(*gate_up.chunk(2, dim=1))
        delta, down_low = self._down(activated)
        saved = (residual, x, qkv, qkv_low, attended, lse, out_low, middle, z, gate_up, gate_low, down_low)
        return middle + delta, saved

    def backward(
        self, gradient: torch.Tensor, tokens: _Tokens, saved: tuple[Any, ...], *, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Returns the gradient of the residual stream before the layer, if needed, and those of `parameters`."""
        residual, x, qkv, qkv_low, attended, lse, out_low, middle, z, gate_up, gate_low, down_low = saved
        gradient = gradient.clone()
        activated = silu_mul(*gate_up.chunk(2, dim=1))
        slope, down = self._down.backward(gradient.to(self._dtype), activated, down_low, needs_input=True)
        slope, gate = self._gate_up.backward(silu_mul_backward(gate_up, _needed(slope)), z, gate_low, needs_input=True)
        delta = rms_norm_backward(middle, *self._norms[1], _needed(slope), gradient)
        slope, out = self._out.backward(delta, attended, out_low, needs_input=True)
        qkv_gradient = self._attention_backward(_needed(slope), qkv, attended, lse, tokens)
        slope, qkv_gradients = self._qkv.backward(qkv_gradient, x, qkv_low, needs_input=needs_input)
        if slope is not None:
            rms_norm_backward(residual, *self._norms[0], slope, gradient)
        return (gradient if needs_input else None), [*qkv_gradients, *out, *gate, *down]

    def _attention_backward(
        self, slope: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor, lse: torch.Tensor, tokens: _Tokens
    ) -> torch.Tensor:
        q, k, v = split_heads(qkv, self._heads, self._groups, self._size)
        shape = (len(qkv), self._groups, self._heads // self._groups, self._size)
        deltas = (slope.float() * attended.float()).view(shape).sum(-1)
        gradients = torch.zeros(qkv.shape)
        for segments in tokens.segments:
            attend_backward(q, k, v, segments, self._scale, slope.view(shape), lse, deltas, gradients)
        rotate(gradients, tokens.cosines, -tokens.sines, self._heads + self._groups)
        return gradients.to(self._dtype)


def _needed(x: torch.Tensor | None) -> torch.Tensor:
    if x is None:
        raise ValueError("the gradient of an input was not computed")
    return x


class _LayerFunction(torch.autograd.Function):
    """A layer as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor, layer: _Layer, tokens: _Tokens, *parameters: Any) -> torch.Tensor:
        out, saved = layer.forward(residual, tokens)
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.tokens, ctx.saved = layer, tokens, saved
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, ctx.saved = ctx.saved, None
        if saved is None:
            raise RuntimeError("the backward pass of a layer ran twice; what it needs is freed after the first time")
        before, gradients = ctx.layer.backward(
            gradient.contiguous(), ctx.tokens, saved, needs_input=ctx.needs_input_grad[0]
        )
        return before, None, None, *gradients


class _FrozenFunction(torch.autograd.Function):
    """A projection without adapters as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        ctx.projection = projection
        return projection(x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return ctx.projection.backward(gradient.contiguous(), gradient, None, needs_input=True)[0], None


@final
class FusedTrainingDecoder:
    """Computes the logits of a decoder like Llama, with gradients of its LoRA adapter; made by `create`.

    Args:
        model: Causal LM with PEFT's layers.
        dtype: Dtype of matrix products.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._decoder = model, model.get_decoder()
        self._dtype = dtype
        self._layers = [_Layer(layer, dtype) for layer in self._decoder.layers]
        self._adapters = [lora for layer in self._layers for lora in layer.adapters]
        self._head = Projection([model.get_output_embeddings()], dtype)

    @classmethod
    def create(cls, model: Any, dtype: torch.dtype) -> FusedTrainingDecoder | None:
        """Returns the passes of a model; None if its own code must be used.

        Args:
            model: Model to train.
            dtype: Dtype of matrix products: float32 or bfloat16.
        """
        if not isinstance(model, PeftModel):
            return None
        base = model.get_base_model()
        if not (has_plain_layers(base) and _is_lora_only(base) and has_kernels()):
            return None
        decoder = cls(base, dtype)
        return decoder if decoder._agrees() else None

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether a few tokens, at positions from the whole context, have the logits that the model's code computes."""
        count, config = 24, self._model.config.get_text_config()
        tokens, batch = torch.arange(count), PackedBatch(0, [(0, [count])])
        input_ids = (tokens * 7 % config.vocab_size)[None]
        positions = torch.linspace(0, config.max_position_embeddings - 1, count).long()[None]
        recording = RecordingBatch(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            expected = self._model(
                input_ids=input_ids,
                position_ids=positions,
                logits_to_keep=tokens,
                forward_batch=recording,
                use_cache=False,
            ).logits[0]
        difference = (self.logits(input_ids, positions, tokens, batch).float() - expected.float()).norm()
        agree = difference <= _TOLERANCE[self._dtype] * expected.float().norm()
        return recording.windows == {None} and bool(agree)

    def logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        forward_batch: PackedBatch,
    ) -> torch.Tensor:
        """Returns the logits at the positions in ``logits_to_keep``, shape (positions, vocabulary).

        Args:
            input_ids: Token ids, shape (1, tokens).
            position_ids: Positions of the tokens, shape (1, tokens).
            logits_to_keep: Indices of tokens.
            forward_batch: The batch, which says what tokens attend to.
        """
        load_adapters(self._adapters)
        residual = self._decoder.embed_tokens(input_ids[0]).detach().float()
        cosines, sines = (x[0].float().contiguous() for x in self._decoder.rotary_emb(residual, position_ids))
        tokens = _Tokens(cosines, sines, forward_batch.segments)
        for layer in self._layers:
            residual = _apply(_LayerFunction, residual, layer, tokens, *layer.parameters)
        normalized = self._decoder.norm(residual[logits_to_keep]).to(self._dtype)
        return _apply(_FrozenFunction, normalized, self._head)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    return torch.as_tensor(function.apply(*arguments))  # type: ignore[no-untyped-call]


def _is_lora_only(model: Any) -> bool:
    """Whether the only trainable weights are those of usual LoRA layers in the decoder's linear layers."""
    linear = [module for name, module in model.get_decoder().named_modules() if name.endswith("_proj")]
    lora = [module for module in linear if is_lora(module)]
    bases = [module.base_layer if is_lora(module) else module for module in linear]
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    adapters = {
        id(weight)
        for module in lora
        for name in module.active_adapters
        for weight in (*module.lora_A[name].parameters(), *module.lora_B[name].parameters())
    }
    return (
        bool(trained)
        and trained <= adapters
        and all(map(is_plain, lora))
        and all(len(module.active_adapters) == 1 and not module.disable_adapters for module in lora)
        and not any(isinstance(drop, torch.nn.Dropout) and drop.p for m in lora for drop in m.lora_dropout.values())
        and all(type(module) in (torch.nn.Linear, Int8Linear) for module in (*bases, model.get_output_embeddings()))
    )
