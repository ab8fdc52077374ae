"""Answers from a model: greedy or sampled, in batches, and streamed for a chat.

In: a causal model and prompts in tokens. Out: answers in tokens, without the stop token, in the prompts' order.
Must not know: stages, recipes, what the answers are for.

Generation is transformers' own, left-padded, with the cache on, under the model's ordinary attention.

Shapes: B prompts of a batch, P the longest prompt, V vocabulary, S steps (generated tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tunesmith.sample.mode import CausalModel, generation_mode


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: its tokens, and the stop token that ended it (None: it was cut at `max_new_tokens`)."""

    ids: tuple[int, ...]
    stop_id: int | None

    @property
    def stopped(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.stop_id is not None

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The tokens that the model drew, the stop token included."""
        return self.ids if self.stop_id is None else (*self.ids, self.stop_id)


class _KeyedDraws(LogitsProcessor):
    """Turns sampling into a choice that depends on (seed, prompt number, step) alone.

    The token is the one at which the cumulative distribution passes a uniform number drawn for the prompt and step,
    so the same prompt gets the same answer in any batch, and the global generator is neither read nor moved. All
    other scores become -inf, and greedy decoding takes the token.
    """

    def __init__(self, uniform_BS: np.ndarray, *, temperature: float, prompt_width: int) -> None:
        self._uniform_BS = uniform_BS
        self._temperature = temperature
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with one finite entry a row."""
        step = input_ids.shape[1] - self._prompt_width
        # float64: a float32 cumulative sum over 150,000 tokens is off by more than the rarest tokens weigh
        cumulative_BV = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        draw_B1 = torch.from_numpy(self._uniform_BS[:, step : step + 1]).to(scores.device) * cumulative_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulative_BV, draw_B1, right=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


def uniform_draws(seed: int, prompt_number: int, num_steps: int) -> np.ndarray:
    """One uniform number in [0, 1) a step, [S], float64, from a generator keyed by seed and prompt number."""
    return np.random.default_rng([seed, prompt_number]).random(num_steps)


def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    pad_id: int | None = None,
) -> list[Answer]:
    """One answer a prompt, in the prompts' order.

    temperature None is greedy; else tokens are drawn from the whole distribution at that temperature, keyed by
    (seed, the prompt's number), so that neither batch size nor order changes an answer beyond float rounding.
    Prompts need at least one token. Batches are made of prompts of like length, to pad little.
    """
    assert all(len(prompt) > 0 for prompt in prompts)
    if pad_id is None:
        pad_id = stop_ids[0] if stop_ids else 0
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    answers: dict[int, Answer] = {}
    with generation_mode(model) as inner, torch.inference_mode():
        for numbers in _chunks(order, batch_size):
            batch = [prompts[number] for number in numbers]
            processors = LogitsProcessorList()
            if temperature is not None:
                uniform_BS = np.stack([uniform_draws(seed, number, max_new_tokens) for number in numbers])
                width = max(len(prompt) for prompt in batch)
                processors.append(_KeyedDraws(uniform_BS, temperature=temperature, prompt_width=width))
            rows = _generate_batch(inner, batch, processors, _settings(max_new_tokens, stop_ids, pad_id))
            answers.update(zip(numbers, (cut_answer(row, stop_ids) for row in rows), strict=True))
    return [answers[number] for number in range(len(prompts))]


def stream(
    model: CausalModel,
    prompt: Sequence[int],
    *,
    decode: Callable[[list[int]], str],
    on_text: Callable[[str], None],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float | None = None,
    seed: int = 0,
) -> Answer:
    """Generate one answer and hand its text to `on_text` piece by piece, as it grows.

    A character whose bytes are spread over several tokens is held back until it is whole. Stop tokens are not
    shown. An exception of `on_text` (or Ctrl-C) ends the generation and leaves the model as it was.
    """
    pieces = TextPieces(decode, on_text, stop_ids)
    pad_id = stop_ids[0] if stop_ids else 0
    processors = LogitsProcessorList()
    if temperature is not None:
        uniform_BS = uniform_draws(seed, 0, max_new_tokens)[None]
        processors.append(_KeyedDraws(uniform_BS, temperature=temperature, prompt_width=len(prompt)))
    with generation_mode(model) as inner, torch.inference_mode():
        settings = _settings(max_new_tokens, stop_ids, pad_id)
        rows = _generate_batch(inner, [prompt], processors, settings, streamer=pieces)
    return cut_answer(rows[0], stop_ids)


class TextPieces(BaseStreamer):
    """Receives tokens one by one and passes on the text that is certain so far."""

    def __init__(
        self, decode: Callable[[list[int]], str], on_text: Callable[[str], None], stop_ids: Sequence[int]
    ) -> None:
        self._decode = decode
        self._on_text = on_text
        self._stop_ids = frozenset(stop_ids)
        self._ids: list[int] = []
        self._shown = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """A new token; the first call brings the prompt, which is not shown."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += [int(token) for token in value.flatten() if int(token) not in self._stop_ids]
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):  # the mark of bytes that are not a whole character yet
            self._show(text)

    def end(self) -> None:
        """The answer is over: what was held back is shown as it is."""
        self._show(self._decode(self._ids))

    def _show(self, text: str) -> None:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        if piece:
            self._on_text(piece)


def cut_answer(drawn: Sequence[int], stop_ids: Sequence[int]) -> Answer:
    """The answer in `drawn`: everything before the first stop token; padding comes only after one."""
    for position, token in enumerate(drawn):
        if token in stop_ids:
            return Answer(tuple(drawn[:position]), token)
    return Answer(tuple(drawn), None)


def _settings(max_new_tokens: int, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


def _generate_batch(
    inner: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    processors: LogitsProcessorList,
    settings: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The tokens drawn for each prompt, stop token and padding still on."""
    width = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), width), settings.pad_token_id, dtype=torch.int64)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_BP[row, width - len(prompt) :] = 1
    drawn = inner.generate(  # type: ignore[operator]
        inputs=ids_BP.to(inner.device),
        attention_mask=mask_BP.to(inner.device),
        generation_config=settings,
        logits_processor=processors,
        streamer=streamer,
    )
    assert isinstance(drawn, Tensor)
    rows: list[list[int]] = drawn[:, width:].tolist()
    return rows


def _chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
