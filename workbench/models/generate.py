"""Text from a model: a stage filled from any tensor source, and sampling with a key/value cache, many rows at once.

Legend: B batch, T tokens, S tokens with those in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.models.attention import KeyValueCache
from workbench.models.batch import Batch, hidden_shape
from workbench.models.build import build_stage
from workbench.models.decoder import DecoderStage, Output
from workbench.models.rope import rope_changes
from workbench.models.state import load
from workbench.parallel.hashing import hash_text
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
    mesh: Mesh | None = None,
    dtype: torch.dtype = torch.float32,
) -> DecoderStage:
    """The model, filled from `source`, ready to be evaluated: in one process, or this rank's part of it."""
    built = build_stage(model, mesh or Mesh.single(), dtype=dtype)
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
    """The tokens that follow `prompt`, one by one, up to and without the first of `stop`."""
    steps = generate_batch(stage, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
    return (token for step in steps for token in step.values())


def generate_batch(
    stage: DecoderStage,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    ends: Callable[[int], bool] = lambda row: False,
    recalled: Recalled | None = None,
) -> Iterator[dict[int, int]]:
    """The next token of each prompt that still goes on, by its row, a step at a time.

    A row ends before the first of `stop`, or when `ends(row)` says so after its token was taken. What a row says does
    not depend on the others: its draws have a seed of their own. With `recalled`, a single prompt is computed from
    where it differs from what was said last. Collective over the tensor and pipeline axes, whose ranks choose alike.
    Raises ConfigError for an empty prompt, or more tokens than the model has positions for.
    """
    assert recalled is None or len(prompts) == 1, "what is recalled belongs to one row"
    sampling = sampling or Sampling()
    _require_speech(stage.model)
    for prompt in prompts:
        _require_fits(stage.model, prompt, max_new_tokens)
    if stage.model.attention_mask != "causal" and len(set(map(len, prompts))) > 1:
        raise ConversionError(
            f"this model's attention_mask={stage.model.attention_mask!r} goes by the place in a row, which is another "
            "beside a longer prompt; give prompts of one length, or one at a time"
        )
    rows = [_Row(number, prompt, [], _generator(sampling.seed, number)) for number, prompt in enumerate(prompts)]
    if stage.model.num_encoder_layers:
        return _generate(_Answering(stage), rows, max_new_tokens, sampling, frozenset(stop), ends)
    speaker = _Continuing(stage, rows, recalled or Recalled())
    return _generate(speaker, rows, max_new_tokens, sampling, frozenset(stop), ends)


def _require_speech(model: ModelConfig) -> None:
    """ConversionError for a model that cannot go on with a text."""
    if model.num_labels:
        raise ConversionError(f"this model has a head of num_labels={model.num_labels} and no vocabulary to speak with")
    if not (model.causal or model.num_encoder_layers):
        raise ConversionError(
            "this model sees the tokens after each as well (causal=false) and cannot go on with a text"
        )


def _require_fits(model: ModelConfig, prompt: Sequence[int], max_new_tokens: int) -> None:
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one")
    if outside := [token for token in prompt if not 0 <= token < model.vocab_size]:
        raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary of {model.vocab_size}")
    if not model.num_encoder_layers and len(prompt) + max_new_tokens > model.max_length:
        raise ConfigError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the {model.max_length} of the "
            f"model (max_position_embeddings={model.max_position_embeddings}); shorten one of them"
        )


@dataclass(frozen=True)
class _Row:
    """A prompt and what follows it."""

    number: int
    prompt: Sequence[int]
    said: list[int]
    generator: torch.Generator


class Recalled:
    """What a decoder has computed of its rows. Kept from one call of `generate_batch` to the next (the turns of a
    chat), it spares the second what both begin with."""

    def __init__(self) -> None:
        self.cache = KeyValueCache()
        self.rows: Sequence[_Row] = ()

    def begin(self, rows: Sequence[_Row], model: ModelConfig) -> None:
        """Keeps what is of use for new rows: of a single one all but its last token at the most."""
        seen = [token for row in self.rows for token in (*row.prompt, *row.said)][: self.cache.length]
        self.rows = rows
        if not seen:
            return
        (row,) = rows
        pairs = enumerate(zip(seen, row.prompt[:-1], strict=False))
        shared = next((at for at, (old, new) in pairs if old != new), min(len(seen), len(row.prompt) - 1))
        # Keys are turned by the frequencies of the length that they were computed at.
        lengths = sorted((len(seen), len(row.prompt)))
        if rope_changes(model, *lengths) or not self.cache.cut_back(shared):
            self.cache = KeyValueCache()


class _Continuing:
    """A decoder that goes on with prompts, which begin behind as much padding as makes all rows end together."""

    def __init__(self, stage: DecoderStage, rows: Sequence[_Row], recalled: Recalled) -> None:
        self._stage, self._recalled = stage, recalled
        self._widest = max(len(row.prompt) for row in rows)
        recalled.begin(rows, stage.model)

    def logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Those of the next token of each row [B, V]; the cache has the tokens of these rows but the last."""
        lengths = [len(row.prompt) + len(row.said) for row in rows if row.said]
        if any(rope_changes(self._stage.model, length - 1, length) for length in lengths):
            self._recalled.cache = KeyValueCache()
        cache = self._recalled.cache
        return _last_logits(self._stage, _batch(rows, self._widest, cache.length, self._stage.mesh.device), cache)

    def keep(self, places: list[int]) -> None:
        """Goes on with some of the rows only."""
        self._recalled.cache.keep(places)


class _Answering:
    """An encoder that reads prompts and a decoder that answers from its padding token on. Each step reads anew."""

    def __init__(self, stage: DecoderStage) -> None:
        self._stage = stage

    def logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Those of the next token of each row [B, V]."""
        device, begin = self._stage.mesh.device, self._stage.model.pad_token_id or 0
        widest = max(len(row.prompt) for row in rows)
        ids_BT = torch.tensor([[*row.prompt, *[0] * (widest - len(row.prompt))] for row in rows], device=device)
        lengths_B = torch.tensor([len(row.prompt) for row in rows], device=device)
        said_BU = torch.tensor([[begin, *row.said] for row in rows], device=device)
        return _last_logits(self._stage, Batch(ids_BT, lengths=lengths_B, decoder_ids=said_BU))

    def keep(self, places: list[int]) -> None:
        """Nothing is held between steps."""


def _last_logits(stage: DecoderStage, batch: Batch, cache: KeyValueCache | None = None) -> torch.Tensor:
    """Those after the last token of each row [B, V], on every stage: hidden states go from each to the next."""
    model, pp = stage.model, stage.mesh.pp
    hidden_BTD = None
    if not stage.is_first():
        shape = hidden_shape(batch, stage.mesh.layout, model.hidden_size)
        hidden_BTD = torch.empty(shape, dtype=stage.compute_dtype, device=stage.mesh.device)
        pp.irecv(hidden_BTD, pp.rank - 1, "F").wait()
    found = stage(hidden_BTD, batch, "logits", cache)
    if stage.is_last():
        return pp.broadcast(found[:, -1].contiguous(), pp.size - 1)
    pp.isend(found.contiguous(), pp.rank + 1, "F").wait()
    return pp.broadcast(found.new_empty(len(found), model.vocab_size), pp.size - 1)


def _generate(
    speaker: _Continuing | _Answering,
    rows: Sequence[_Row],
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    ends: Callable[[int], bool],
) -> Iterator[dict[int, int]]:
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits_BV = speaker.logits(rows)
            chosen = [choose(logits_V, sampling, row.generator) for logits_V, row in zip(logits_BV, rows, strict=True)]
        going = [(row, token) for row, token in zip(rows, chosen, strict=True) if token not in stop]
        for row, token in going:
            row.said.append(token)
        yield {row.number: token for row, token in going}
        left = [row for row, _ in going if not ends(row.number)]
        if not left:
            return
        if len(left) < len(rows):
            speaker.keep([at for at, row in enumerate(rows) if row in left])
        rows = left


def _generator(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_text(f"{seed}/{row}") % 2**63)


def _batch(rows: Sequence[_Row], widest: int, cached: int, device: torch.device) -> Batch:
    """The tokens that the cache does not have yet; rows with padding see none of it."""

    def tensor(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    paddings = [widest - len(row.prompt) for row in rows]
    tokens = zip(paddings, rows, strict=True)
    ids_BT = tensor([[*[0] * padding, *row.prompt, *row.said][cached:] for padding, row in tokens])
    if not any(paddings):
        return Batch(ids_BT)
    places_BS = torch.arange(cached + ids_BT.shape[1], device=device) - tensor([[padding] for padding in paddings])
    return Batch(ids_BT, positions=places_BS[:, cached:].clamp(min=0), documents=places_BS.clamp(min=-1, max=0))


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
