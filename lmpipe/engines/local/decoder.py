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
from torch.nn.functional import silu

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
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative difference of logits that agree


@final
class FusedDecoder:
    """Computes the logits of a decoder like Llama; made by `create`.

    Args:
        model: A transformers causal LM, whose weights may be tuned by PEFT.
        onednn: Linear layers with prepacked weights.
    """

    def __init__(self, model: Any, onednn: OneDnnLinear) -> None:
        self._model, self._decoder, self._onednn = model, model.get_decoder(), onednn
        self._dtype: torch.dtype = model.dtype
        self._heads, self._groups, self._size = head_shape(self._decoder.layers[0].self_attn)
        self._parts = self._find_parts()

    @classmethod
    @torch.no_grad()  # not in inference mode, where `Int8Linear` rounds, so that small differences would be large ones
    def create(cls, model: Any, onednn: OneDnnLinear) -> FusedDecoder | None:
        """Returns the forward pass of a model; None if the model is no decoder like Llama, or there are no kernels.

        Args:
            model: A transformers causal LM with lmpipe's attention, not tuned.
            onednn: Linear layers with prepacked weights.
        """
        if not (is_like_llama(model) and has_kernels()):
            return None
        decoder, batch = cls(model, onednn), _sample_batch(model)
        recording = RecordingBatch(batch)
        expected = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, forward_batch=recording
        ).logits[0]
        difference = _relative_difference(decoder.logits(_sample_batch(model)), expected)
        if recording.windows == {None} and difference <= _TOLERANCE[model.dtype]:
            return decoder
        logger.info("%s looks like Llama, but computes otherwise: it runs by transformers' code", type(model).__name__)
        return None

    @property
    def is_current(self) -> bool:
        """Whether tuning has wrapped nothing but linear layers and embeddings, which are called if they are wrapped."""
        return self._find_parts() == self._parts

    def _find_parts(self) -> list[Any]:
        """Returns the modules whose forward pass this one replaces, but linear layers."""
        decoder = self._decoder
        parts = [decoder.norm]
        for layer in decoder.layers:
            parts += [layer, *layer.children(), *map(layer.self_attn._modules.get, sorted(_HEAD_NORMS))]
        return parts

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
        heads, groups, size = self._heads, self._groups, self._size
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
        options = AttentionOptions(attention.layer_idx, attention.scaling)
        out = batch.attend(*split_heads(qkv, heads, groups, size), options)
        return self._project([attention.o_proj], out.reshape(len(x), -1))

    def _mlp(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._project([mlp.gate_proj, mlp.up_proj], x).chunk(2, dim=1)
        return self._project([mlp.down_proj], silu_mul(gate, up))

    def _project(self, modules: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of linear layers side by side, shape (tokens, all outputs)."""
        bases = [module.base_layer if is_lora(module) else module for module in modules]
        if not all(type(base) is torch.nn.Linear for base in bases) or not all(map(is_plain, modules)):
            with self._onednn:
                return torch.cat([module(x) for module in modules], dim=1)
        y = self._onednn.linear(x, [base.weight for base in bases], [base.bias for base in bases])
        outputs = torch.split(y, [base.out_features for base in bases], dim=1)
        for module, output in zip(modules, outputs, strict=True):
            if is_lora(module) and not module.disable_adapters:
                for name in module.active_adapters:
                    down, up = module.lora_A[name].weight, module.lora_B[name].weight
                    low = x.to(down.dtype) @ down.t()
                    if up.dtype == y.dtype:
                        output.addmm_(low, up.t(), alpha=module.scaling[name])
                    else:
                        output.add_(low @ up.t(), alpha=module.scaling[name])
        return y


@final
class RecordingBatch(ForwardBatch):
    """Another batch, with a record of the sliding windows that the model's layers ask for."""

    def __init__(self, batch: ForwardBatch) -> None:
        self._batch, self.windows = batch, set[int | None]()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        self.windows.add(options.window)
        return self._batch.attend(q, k, v, options)


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
        and _is_rms_norm(decoder.norm, decoder.embed_tokens.embedding_dim)
        and all(map(_is_llama_layer, decoder.layers))
        and len({head_shape(layer.self_attn) for layer in decoder.layers}) == 1
        and _size_of(decoder.rotary_emb, "inv_freq") * 2 == decoder.layers[0].self_attn.head_dim
    )


def _is_llama_layer(layer: Any) -> bool:
    parts = {name: set(child._modules) for name, child in layer.named_children()}
    if set(parts) != _LAYER or parts["mlp"] != _MLP or parts["self_attn"] not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    hidden_size, size, inner_size = attention.q_proj.in_features, attention.head_dim, mlp.gate_proj.out_features
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(_is_rms_norm(norm, hidden_size) for norm in norms)
        and all(_is_rms_norm(attention.get_submodule(name), size) for name in parts["self_attn"] & _HEAD_NORMS)
        and mlp.up_proj.out_features == inner_size
        and all(number % _LANES == 0 for number in (hidden_size, size // 2, inner_size))
        and _is_silu(mlp.act_fn)
    )


def _is_rms_norm(norm: Any, size: int) -> bool:
    named = "RMSNorm" in type(norm).__name__ and "variance_epsilon" in vars(norm)
    return named and _size_of(norm, "weight") == size


def head_shape(attention: Any) -> tuple[int, int, int]:
    """Returns the numbers of heads and of key heads, and their size."""
    size: int = attention.head_dim
    return attention.q_proj.out_features // size, attention.k_proj.out_features // size, size


def split_heads(
    qkv: torch.Tensor, heads: int, groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits projections into views of queries, keys and values.

    Args:
        qkv: Queries, keys and values of a token side by side, shape (tokens, numbers).
        heads: Number of heads.
        groups: Number of key heads.
        size: Size of a head.

    Returns:
        Queries, shape (key heads, queries per key head, tokens, size), and keys and values, shape (key heads, tokens,
            size).
    """
    parts = torch.split(qkv, [heads * size, groups * size, groups * size], dim=1)
    q, k, v = (part.view(len(qkv), -1, size).transpose(0, 1) for part in parts)
    return q.view(groups, heads // groups, len(qkv), size), k, v


def _size_of(module: Any, name: str) -> int:
    """Returns how many numbers a parameter or buffer of a module has; 0 if there is none."""
    tensor = getattr(module, name, None)
    return tensor.numel() if isinstance(tensor, torch.Tensor) else 0


def _is_silu(function: Any) -> bool:
    x = torch.linspace(-8, 8, 65)
    return torch.allclose(function(x), silu(x))


def is_lora(module: Any) -> bool:
    """Whether a layer is a linear layer with LoRA adapters."""
    return type(module) is LoraLinear


def is_plain(module: Any) -> bool:
    """Whether a layer is not tuned, or tuned by LoRA in its usual form."""
    if not is_lora(module):
        return True
    names = [name for name in module.active_adapters if name in module.lora_A]
    return (
        not module.merged
        and not module.fan_in_fan_out
        and not module.lora_variant
        and names == list(module.active_adapters)
        and all(module.lora_A[name].bias is None and module.lora_B[name].bias is None for name in names)
    )


def _relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the relative root-mean-square difference at the median token: a few may differ much in bfloat16."""
    difference = (logits.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(difference.median())


def _sample_batch(model: Any) -> PrefillBatch:
    """Returns a short prompt whose logits are all needed, at positions from the whole context."""
    tokens = [number * 7 % model.config.get_text_config().vocab_size for number in range(1, 25)]
    cache = KVCache()
    cache.reserve(1, len(tokens))
    batch = PrefillBatch([PromptSegment(tuple(tokens), PrefixNode((), 0, None), slots=(0,))], cache, model.device)
    positions = torch.linspace(0, model.config.get_text_config().max_position_embeddings - 1, len(tokens))
    batch.position_ids, batch.last = positions.long()[None], torch.arange(len(tokens))
    return batch
