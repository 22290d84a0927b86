"""Batched generation against transformers' own `generate` and a full forward pass, on a tiny random
Llama."""

import pytest
import torch
from transformers import LlamaForCausalLM

from rlef_mega.engines import EngineError, GenerationRequest
from rlef_mega.engines.generation import CPU_PREFILL_TOKENS, generate_batch
from rlef_mega.engines.sampling import request_uniforms, sample
from rlef_mega.types import Sampling
from tests.rlef_mega.tiny_llama import tiny_llama

VOCABULARY, POSITIONS = 61, 96


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(VOCABULARY, max_position_embeddings=POSITIONS, attn_implementation="sdpa")


def prompts(count, shortest=1, longest=40):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [
        tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
        for length in sorted(lengths)
    ]


def generate(model, requests):
    return generate_batch(model, requests, weight_version=7)


def requests_with_stops():
    """Return requests in which ten of 61 tokens end a response, so that rows finish at different
    steps."""
    sampling = Sampling(max_new_tokens=30, stop_token_ids=tuple(range(10)))
    return [GenerationRequest(prompt, sampling, seed) for seed, prompt in enumerate(prompts(24))]


def test_greedy_equals_transformers_generate_on_ragged_prompts(model):
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    found = generate(model, [GenerationRequest(prompt, sampling, 0) for prompt in prompts(9)])
    for prompt, completion in zip(prompts(9), found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None
        )
        assert completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_logprobs_are_those_of_a_full_forward_pass(model, temperature):
    sampling = Sampling(30, temperature, stop_token_ids=tuple(range(10)))
    requests = [
        GenerationRequest(prompt, sampling, seed) for seed, prompt in enumerate(prompts(24))
    ]
    for request, completion in zip(requests, generate(model, requests), strict=True):
        whole = torch.tensor([request.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(request.token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits / (temperature or 1), dim=-1)
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5
        )
        assert completion.weight_versions == (7,) * len(completion.token_ids)


def test_a_request_gives_the_same_tokens_alone_and_in_a_batch(model):
    """Covers the dropping of finished rows: about one in six tokens stops a row."""
    requests = requests_with_stops()
    together = generate(model, requests)
    assert len({len(completion.token_ids) for completion in together}) > 5
    for request, completion in zip(requests, together, strict=True):
        (alone,) = generate(model, [request])
        assert alone.token_ids == completion.token_ids
        torch.testing.assert_close(
            torch.tensor(alone.logprobs), torch.tensor(completion.logprobs), atol=1e-5, rtol=1e-5
        )


def test_the_same_batch_twice_is_equal_to_the_bit(model):
    assert generate(model, requests_with_stops()) == generate(model, requests_with_stops())


def test_a_prefill_in_groups_changes_nothing_and_each_is_within_the_budget(model, monkeypatch):
    requests = requests_with_stops()
    together = generate(model, requests)
    assert sum(len(request.token_ids) for request in requests) < CPU_PREFILL_TOKENS
    monkeypatch.setattr("rlef_mega.engines.generation.CPU_PREFILL_TOKENS", 50)
    sizes = []  # of the groups, with their padding
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with hook:
        grouped = generate(model, requests)
    assert [one.token_ids for one in grouped] == [one.token_ids for one in together]
    assert max(sizes) <= 50 and max(len(request.token_ids) for request in requests) > 25


def test_a_stop_token_ends_the_response_and_stays_in_it(model):
    stops = requests_with_stops()[0].sampling.stop_token_ids
    found = generate(model, requests_with_stops())
    assert sum(one.finish_reason == "stop" for one in found) > 12
    for completion in found:
        assert not set(completion.token_ids[:-1]) & set(stops)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] in stops
        else:
            assert len(completion.token_ids) == 30 and completion.token_ids[-1] not in stops


def test_each_request_has_its_own_limits(model):
    first, second, third = prompts(3)
    found = generate(
        model,
        [
            GenerationRequest(first, Sampling(1), 0),
            GenerationRequest(second, Sampling(5, temperature=0.0), 1),
            GenerationRequest(third, Sampling(5, temperature=0.7, top_p=0.5), 2),
        ],
    )
    assert [len(one.token_ids) for one in found] == [1, 5, 5]
    (greedy,) = generate(model, [GenerationRequest(second, Sampling(5, temperature=0.0), 9)])
    assert found[1].token_ids == greedy.token_ids


def test_generation_ends_at_the_last_position_that_the_model_knows(model):
    prompt = (1,) * (POSITIONS - 3)
    (completion,) = generate(model, [GenerationRequest(prompt, Sampling(50), 0)])
    assert len(completion.token_ids) == 3 and completion.finish_reason == "length"


def test_weights_that_give_nan_are_an_engine_error(model):
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(EngineError, match=r"NaN or infinite logits after 4 \+ 0 tokens"):
        generate(broken, [GenerationRequest((1, 2, 3, 4), Sampling(5), 0)])


def draw(logits, count, temperature=1.0, top_p=1.0):
    """Sample one token for each of `count` requests with seeds 0, 1, ..."""
    uniforms = torch.tensor([request_uniforms(seed, 1)[0] for seed in range(count)])
    return sample(
        logits.expand(count, -1),
        uniforms,
        torch.full((count,), temperature),
        torch.full((count,), top_p),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_tokens_of_many_seeds_are_distributed_as_the_softmax(temperature):
    """Chi-square with 11 degrees of freedom: a correct sampler exceeds 37.4 in 0.01% of cases."""
    generator = torch.Generator().manual_seed(0)
    logits, count = torch.randn(12, generator=generator), 20_000
    tokens, logprobs = draw(logits, count, temperature)
    expected = torch.log_softmax(logits / temperature, dim=-1)
    torch.testing.assert_close(logprobs, expected[tokens])
    counts, means = torch.bincount(tokens, minlength=12), count * expected.exp()
    assert ((counts - means).square() / means).sum() < 37.4


def test_top_p_narrows_the_choice_but_not_the_logprob():
    """Probabilities 0.4, 0.3, 0.2, 0.1: two tokens reach 0.6, and are then drawn 4 to 3."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    tokens, logprobs = draw(probabilities.log(), 4000, top_p=0.6)
    assert set(tokens.tolist()) == {1, 3}
    assert (tokens == 1).float().mean() == pytest.approx(4 / 7, abs=0.03)
    torch.testing.assert_close(logprobs, probabilities.log()[tokens])


def test_a_token_of_probability_zero_is_never_drawn():
    """At both ends of [0, 1), where rounding could first select an impossible token."""
    logits = torch.full((3, 100_000), -torch.inf)
    logits[:, 5:50_000] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    tokens, _ = sample(logits, uniforms, torch.ones(3), torch.ones(3))
    assert tokens.tolist()[:2] == [5, 49_999]


def test_uniforms_do_not_depend_on_how_many_are_drawn_and_differ_between_seeds():
    assert request_uniforms(3, 5).tolist() == request_uniforms(3, 9).tolist()[:5]
    assert request_uniforms(3, 5).tolist() != request_uniforms(4, 5).tolist()
