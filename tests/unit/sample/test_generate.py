"""Generation: the same answer in any batch, nothing of the model changed, whole characters in a stream."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunesmith.engine.attention import NAME
from tunesmith.sample.generate import Answer, TextPieces, _KeyedDraws, cut_answer, generate, stream, uniform_draws

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config)


def greedy_by_hand(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    model.eval()
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(make: type) -> None:
    model = make()
    expected = [greedy_by_hand(model, prompt, 6) for prompt in PROMPTS]
    for batch_size in (1, 3, 4):
        answers = generate(model, PROMPTS, max_new_tokens=6, stop_ids=(), batch_size=batch_size)
        assert [list(answer.ids) for answer in answers] == expected
        assert not any(answer.stopped for answer in answers)


def test_an_answer_ends_before_its_stop_token() -> None:
    model = tiny_llama()
    drawn = greedy_by_hand(model, PROMPTS[0], 6)
    stop = drawn[3]
    answers = generate(model, PROMPTS, max_new_tokens=6, stop_ids=(stop,))
    place = drawn.index(stop)
    assert answers[0] == Answer(tuple(drawn[:place]), stop)
    assert answers[0].all_ids == tuple(drawn[: place + 1])


def test_any_of_several_stop_tokens_ends_an_answer() -> None:
    assert cut_answer([5, 8, 9, 7], (7, 8)) == Answer((5,), 8)
    assert cut_answer([5, 6], (7, 8)) == Answer((5, 6), None)
    assert cut_answer([7, 7], (7,)) == Answer((), 7)


def test_samples_do_not_depend_on_batch_size_or_the_global_generator() -> None:
    model = tiny_llama()
    runs = []
    for batch_size, global_seed in ((1, 1), (2, 2), (4, 3)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        runs.append(
            generate(model, PROMPTS, max_new_tokens=8, stop_ids=(2,), temperature=1.0, seed=7, batch_size=batch_size)
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] == runs[2]
    assert runs[0] != generate(model, PROMPTS, max_new_tokens=8, stop_ids=(2,), temperature=1.0, seed=8)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_models_distribution(temperature: float) -> None:
    model = tiny_llama()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = (logits.double() / temperature).softmax(-1).numpy()
    num = 2000
    answers = generate(
        model, [[5, 6, 7]] * num, max_new_tokens=1, stop_ids=(), temperature=temperature, seed=1, batch_size=500
    )
    counts = Counter(answer.ids[0] for answer in answers)
    observed = np.array([counts[token] / num for token in range(32)])
    # five standard errors of a share, for each of the 32 tokens
    assert np.all(np.abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / num) + 1e-12)


def test_a_draw_never_takes_a_token_of_no_probability() -> None:
    scores_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    uniform_BS = np.array([[0.0], [0.5 - 1e-9], [0.5], [1 - 1e-12]])  # the edges of the two tokens' halves
    drawn_BV = _KeyedDraws(uniform_BS, temperature=1.0, prompt_width=3)(torch.zeros(4, 3, dtype=torch.int64), scores_BV)
    assert drawn_BV.argmax(-1).tolist() == [1, 1, 3, 3]


def test_uniform_draws_are_keyed_by_seed_and_prompt() -> None:
    assert np.array_equal(uniform_draws(3, 4, 5), uniform_draws(3, 4, 9)[:5])
    assert not np.array_equal(uniform_draws(3, 4, 5), uniform_draws(3, 5, 5))
    assert not np.array_equal(uniform_draws(3, 4, 5), uniform_draws(4, 4, 5))


def test_a_models_own_generation_settings_are_set_aside() -> None:
    model = tiny_llama()
    plain = generate(model, PROMPTS, max_new_tokens=6, stop_ids=())
    assert model.generation_config is not None
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.eos_token_id = plain[0].ids[0]
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=()) == plain
    assert model.generation_config.repetition_penalty == 50.0


class Boom(Exception):
    pass


def snapshot(model: PreTrainedModel) -> tuple[list[bool], object, object]:
    modes = [module.training for module in model.modules()]
    return modes, model.config._attn_implementation, model.generation_config


@pytest.mark.parametrize("fails", [False, True])
def test_every_mode_and_setting_is_restored(fails: bool) -> None:
    model = tiny_llama()
    model.train()
    list(model.modules())[3].eval()  # a module of its own mode, which model.train() would lose
    model.set_attn_implementation(NAME)
    before = snapshot(model)
    if fails:
        hook = model.get_input_embeddings().register_forward_pre_hook(_boom)
        with pytest.raises(Boom):
            generate(model, PROMPTS, max_new_tokens=2, stop_ids=())
        hook.remove()
    else:
        generate(model, PROMPTS, max_new_tokens=2, stop_ids=())
    assert snapshot(model) == before
    assert before[1] == NAME
    assert True in before[0] and False in before[0]


def _boom(module: nn.Module, inputs: object) -> None:
    raise Boom


def test_a_stream_shows_whole_characters_only() -> None:
    raw = "né 🙂!".encode()
    shown: list[str] = []
    pieces = TextPieces(lambda ids: bytes(ids).decode("utf-8", "replace"), shown.append, stop_ids=(0,))
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in raw:
        pieces.put(torch.tensor([byte]))
    pieces.put(torch.tensor([0]))
    pieces.end()
    assert "".join(shown) == "né 🙂!"
    assert shown == ["n", "é", " ", "🙂", "!"]


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    shown: list[str] = []
    pieces = TextPieces(lambda ids: bytes(ids).decode("utf-8", "replace"), shown.append, stop_ids=())
    pieces.put(torch.tensor([[1]]))
    pieces.put(torch.tensor([65]))
    pieces.put(torch.tensor([0xF0]))
    assert shown == ["A"]
    pieces.end()
    assert "".join(shown) == "A\ufffd"


def test_a_stream_gives_the_answer_of_the_batch() -> None:
    model = tiny_llama()
    shown: list[str] = []
    answer = stream(
        model,
        PROMPTS[0],
        decode=lambda ids: " ".join(map(str, ids)),
        on_text=shown.append,
        max_new_tokens=6,
        stop_ids=(),
    )
    assert [answer] == generate(model, PROMPTS[:1], max_new_tokens=6, stop_ids=())
    assert "".join(shown) == " ".join(map(str, answer.ids))


def test_a_stopped_stream_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    before = snapshot(model)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(model, PROMPTS[0], decode=str, on_text=interrupt, max_new_tokens=6, stop_ids=())
    assert snapshot(model) == before
    assert math.isfinite(float(model(input_ids=torch.tensor([[1, 2]])).logits.detach().sum()))
