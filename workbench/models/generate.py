"""Text from a model on one process: a stage filled from any tensor source, and sampling with a key/value cache.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.models.attention import KeyValueCache
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.decoder import DecoderStage, Output
from workbench.models.rope import rope_changes
from workbench.models.state import load
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if self.temperature < 0:
            faults.append(f"temperature={self.temperature} is negative; 0 takes the likeliest token")
        if self.top_k < 0:
            faults.append(f"top_k={self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p={self.top_p} is not in (0, 1]; 1 keeps all tokens")
        if faults:
            raise ConfigError("; ".join(faults))


def load_model(
    model: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> DecoderStage:
    """The whole model in one process, filled from `source`, ready to be evaluated."""
    built = build_stage(model, Mesh.single(device), dtype=dtype)
    load(built.parameters, source)
    return built.module.eval().requires_grad_(False)


def outputs(stage: DecoderStage, inputs: Mapping[str, Sequence[int]], name: Output = "logits") -> torch.Tensor:
    """The output called `name` of one sequence: [T, V] logits, or [labels] of a head that judges it.

    inputs: input_ids; token_type_ids where the model knows segments; decoder_input_ids where it has an encoder.
    """
    rows = {key: torch.tensor([list(ids)], device=stage.mesh.device) for key, ids in inputs.items()}
    with torch.inference_mode():
        ids, segments, decoder_ids = (rows.get(key) for key in ("input_ids", "token_type_ids", "decoder_input_ids"))
        assert ids is not None
        return stage(None, Batch(ids, segments=segments, decoder_ids=decoder_ids), name)[0]


def generate(
    stage: DecoderStage,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one, up to and without the first of `stop`.

    Raises ConfigError when prompt and new tokens are more than the model has positions for, or the prompt is empty.
    """
    sampling = sampling or Sampling()
    model = stage.model
    if model.num_labels:
        raise ConversionError(f"this model has a head of num_labels={model.num_labels} and no vocabulary to speak with")
    if model.num_encoder_layers:
        raise ConversionError("this model answers to what its encoder reads, and generation with one is not there yet")
    if not model.causal:
        raise ConversionError(
            "this model sees the tokens after each as well (causal=false) and cannot go on with a text"
        )
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one")
    if outside := [token for token in prompt if not 0 <= token < model.vocab_size]:
        raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary of {model.vocab_size}")
    if len(prompt) + max_new_tokens > model.max_length:
        raise ConfigError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the {model.max_length} of the "
            f"model (max_position_embeddings={model.max_position_embeddings}); shorten one of them"
        )
    return _generate(stage, list(prompt), max_new_tokens, sampling, frozenset(stop))


def _generate(
    stage: DecoderStage, prompt: list[int], max_new_tokens: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[int]:
    device = stage.mesh.device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache()
    tokens, pending = list(prompt), prompt
    for _ in range(max_new_tokens):
        if cache.length and rope_changes(stage.model, cache.length, len(tokens)):
            cache, pending = KeyValueCache(), tokens
        with torch.inference_mode():
            batch = Batch(torch.tensor([pending], device=device))
            logits_V = stage(None, batch, "logits", cache)[0, -1]
            token = choose(logits_V, sampling, generator)
        if token in stop:
            return
        yield token
        tokens.append(token)
        pending = [token]


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token: the likeliest, or a draw from what temperature, top_k and top_p leave."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.to("cpu", torch.float64) / sampling.temperature
    if 0 < sampling.top_k < scaled_V.numel():
        least = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < least, float("-inf"))
    probabilities_V = scaled_V.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered_V, order_V = probabilities_V.sort(descending=True)
        # The token that crosses top_p is kept, so that at least one is.
        beyond_V = ordered_V.cumsum(dim=-1) - ordered_V >= sampling.top_p
        probabilities_V = probabilities_V.masked_fill(torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), 0.0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
