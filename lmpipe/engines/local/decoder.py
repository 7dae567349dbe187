"""The forward pass of decoders like Llama, with the kernels of `lmpipe.engines.kernels`.

It reads the weights from transformers' modules, and computes the same logits in fewer passes over memory: projections
of the same input are one matrix product, and addition, normalization, rotation and activation are one kernel each. A
model is a decoder like Llama if its modules look like one and the logits agree; the engine runs other models by
transformers' own code.

Knows nothing about sequences: attention is up to the `ForwardBatch`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.functional import linear, silu

from lmpipe.engines.kernels import add_rms_norm, has_kernels, rotate, silu_mul
from lmpipe.engines.local.attention import AttentionOptions, ForwardBatch
from lmpipe.engines.local.forward_batch import DecodeBatch, PrefillBatch, PromptSegment
from lmpipe.engines.local.kv_cache import KVCache
from lmpipe.engines.local.prefixes import PrefixNode
from lmpipe.engines.onednn_linear import OneDnnLinear

logger = logging.getLogger(__name__)

_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LANES = 16  # sizes must be multiples of it; see kernels.c
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of logits that agree, relative to the largest


@final
class FusedDecoder:
    """Computes the logits of a decoder like Llama; made by `create`.

    Args:
        model: A transformers causal LM, whose weights may be tuned by PEFT.
        onednn: Linear layers with prepacked weights.
    """

    def __init__(self, model: Any, onednn: OneDnnLinear) -> None:
        self._model, self._decoder, self._onednn = model, model.get_decoder(), onednn
        self._config = model.config.get_text_config()
        self._dtype: torch.dtype = model.dtype

    @classmethod
    @torch.inference_mode()
    def create(cls, model: Any, onednn: OneDnnLinear) -> FusedDecoder | None:
        """Returns the forward pass of a model; None if the model is no decoder like Llama, or there are no kernels.

        Args:
            model: A transformers causal LM with lmpipe's attention, not tuned.
            onednn: Linear layers with prepacked weights.
        """
        if not (has_kernels() and is_like_llama(model)):
            return None
        decoder = cls(model, onednn)
        batch = _sample_batch(model)
        expected = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, forward_batch=batch
        ).logits[0]
        with onednn:
            difference = (decoder.logits(_sample_batch(model)).float() - expected.float()).abs().max()
        if difference <= _TOLERANCE[model.dtype] * expected.float().abs().max():
            return decoder
        logger.info("%s looks like Llama, but its logits differ: it runs by transformers' code", type(model).__name__)
        return None

    def logits(self, batch: PrefillBatch | DecodeBatch) -> torch.Tensor:
        """Returns the logits at the batch's last tokens, shape (last tokens, vocabulary)."""
        decoder = self._decoder
        embedded = decoder.embed_tokens(batch.input_ids[0])
        cosines, sines = (x[0].float().contiguous() for x in decoder.rotary_emb(embedded, batch.position_ids))
        residual, delta = embedded.to(torch.float32, copy=True), None
        for layer in decoder.layers:
            x = self._norm(layer.input_layernorm, residual, delta)
            delta = self._attention(layer.self_attn, x, cosines, sines, batch)
            if layer is decoder.layers[-1]:  # later steps need nothing of the other tokens
                residual, delta = residual[batch.last], delta[batch.last]
            x = self._norm(layer.post_attention_layernorm, residual, delta)
            delta = self._mlp(layer.mlp, x)
        return self._project([self._model.get_output_embeddings()], self._norm(decoder.norm, residual, delta))

    def _norm(self, norm: Any, residual: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        return add_rms_norm(residual, delta, norm.weight.float(), norm.variance_epsilon, self._dtype)

    def _attention(
        self, attention: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        size, groups = attention.head_dim, self._config.num_key_value_heads
        heads = self._config.num_attention_heads
        qkv = self._project([attention.q_proj, attention.k_proj, attention.v_proj], x)
        rotated = qkv[:, : (heads + groups) * size]
        if "q_norm" in attention._modules:
            for norm, part in (
                (attention.q_norm, rotated[:, : heads * size]),
                (attention.k_norm, rotated[:, heads * size :]),
            ):
                flat = part.reshape(-1, size).float()
                part.copy_(self._norm(norm, flat, None).view(part.shape))
        rotate(qkv, cosines, sines, heads + groups)
        q, k, v = (
            part.view(len(x), -1, size).transpose(0, 1)
            for part in qkv.split([heads * size, groups * size, groups * size], dim=1)
        )
        options = AttentionOptions(attention.layer_idx, attention.scaling)
        out = batch.attend(q.view(groups, heads // groups, len(x), size), k, v, options)
        return self._project([attention.o_proj], out.reshape(len(x), -1))

    def _mlp(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._project([mlp.gate_proj, mlp.up_proj], x).chunk(2, dim=1)
        return self._project([mlp.down_proj], silu_mul(gate, up))

    def _project(self, modules: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of linear layers side by side, shape (tokens, all outputs)."""
        bases = [module.base_layer if type(module) is LoraLinear else module for module in modules]
        if not all(type(base) is torch.nn.Linear for base in bases) or not all(map(is_plain, modules)):
            return torch.cat([module(x) for module in modules], dim=1)
        y = self._onednn.linear(x, [base.weight for base in bases], [base.bias for base in bases])
        outputs = y.split([base.out_features for base in bases], dim=1)
        for module, output in zip(modules, outputs, strict=True):
            if type(module) is LoraLinear and not module.disable_adapters:
                for name in module.active_adapters:
                    low = linear(x.to(module.lora_A[name].weight.dtype), module.lora_A[name].weight)
                    output.add_(linear(low, module.lora_B[name].weight), alpha=module.scaling[name])
        return y


def has_plain_layers(model: Any) -> bool:
    """Whether the modules of a model on a CPU are those of Llama."""
    return is_like_llama(model) and not any(
        _HEAD_NORMS & set(layer.self_attn._modules) for layer in model.get_decoder().layers
    )


def is_like_llama(model: Any) -> bool:
    """Whether the modules of a model on a CPU are those of Llama, or of Qwen 3, which normalizes queries and keys."""
    decoder = model.get_decoder()
    return (
        model.device.type == "cpu"
        and model.dtype in _TOLERANCE
        and set(decoder._modules) == _DECODER
        and type(decoder.embed_tokens) is torch.nn.Embedding
        and "sliding_attention" not in (getattr(decoder.config, "layer_types", None) or ())
        and all(map(_is_llama_layer, decoder.layers))
    )


def _is_llama_layer(layer: Any) -> bool:
    parts = {name: set(child._modules) for name, child in layer.named_children()}
    if set(parts) != _LAYER or parts["mlp"] != _MLP or parts["self_attn"] not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.get_submodule(name) for name in parts["self_attn"] & _HEAD_NORMS]
    sizes = (attention.q_proj.in_features, attention.head_dim // 2, mlp.gate_proj.out_features)
    return (
        all("RMSNorm" in type(norm).__name__ and "variance_epsilon" in vars(norm) for norm in norms)
        and _is_silu(mlp.act_fn)
        and all(size % _LANES == 0 for size in sizes)
        and getattr(attention, "sliding_window", None) is None
    )


def _is_silu(function: Any) -> bool:
    x = torch.linspace(-8, 8, 65)
    return torch.allclose(function(x), silu(x))


def is_plain(module: Any) -> bool:
    """Whether a layer is not tuned, or tuned by LoRA in its usual form."""
    if type(module) is not LoraLinear:
        return True
    names = [name for name in module.active_adapters if name in module.lora_A]
    return (
        not module.merged
        and not module.fan_in_fan_out
        and not module.lora_variant
        and names == list(module.active_adapters)
        and all(module.lora_A[name].bias is None and module.lora_B[name].bias is None for name in names)
    )


def _sample_batch(model: Any) -> PrefillBatch:
    """Returns a short prompt whose logits are all needed."""
    tokens = [number * 7 % model.config.get_text_config().vocab_size for number in range(1, 25)]
    cache = KVCache()
    cache.reserve(1, len(tokens))
    batch = PrefillBatch([PromptSegment(tuple(tokens), PrefixNode((), 0, None), slots=(0,))], cache, model.device)
    batch.last = torch.arange(len(tokens))
    return batch
