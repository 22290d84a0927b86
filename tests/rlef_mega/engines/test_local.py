"""The embedded engine: its waves, its refusals, and that it serves exactly the weights it was
sent."""

import asyncio

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig

from rlef_mega.engines import EngineError, GenerationRequest, WeightsMismatchError
from rlef_mega.engines.local import LocalEngine
from rlef_mega.types import Sampling
from tests.rlef_mega.tiny_llama import tiny_llama

SAMPLING = Sampling(max_new_tokens=8, stop_token_ids=(0, 1, 2, 3))


def small_llama(tied: bool = False, seed: int = 1) -> LlamaForCausalLM:
    return tiny_llama(61, seed=seed, max_position_embeddings=64, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny llama"
    small_llama(seed=0).save_pretrained(path)
    return path


@pytest.fixture
def engine(folder):
    return LocalEngine(folder, max_batch=3)


async def dialogue(engine, number, turns, pause=0.0, record=None):
    """Run a dialogue, with a pause after each turn, as if it were graded."""
    async with engine.session() as session:
        context = [4 + number % 50] * (1 + number % 5)
        for turn in range(turns):
            completion = await session(
                GenerationRequest(tuple(context), SAMPLING, seed=100 * number + turn)
            )
            context += [*completion.token_ids, 7]
            if record is not None:
                record.append((number, turn, completion))
            await asyncio.sleep(pause)
    return context


def run(*coroutines):
    async def together():
        return await asyncio.wait_for(asyncio.gather(*coroutines, return_exceptions=True), 60)

    return asyncio.run(together())


def batches_of(engine, monkeypatch) -> list[list[tuple[int, ...]]]:
    """Record the prompts of each batch that the engine generates from now on."""
    from rlef_mega.engines import local

    batches = []
    original = local.generate_batch

    def recording(model, requests, **options):
        batches.append([request.token_ids for request in requests])
        return original(model, requests, **options)

    monkeypatch.setattr(local, "generate_batch", recording)
    return batches


def test_dialogues_started_together_share_batches_sorted_by_length(engine, monkeypatch):
    batches = batches_of(engine, monkeypatch)
    run(*(dialogue(engine, number, turns=1) for number in range(7)))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    # prompt lengths are 1 2 3 4 5 1 2; equals keep the order of their sessions
    assert [ids[0] - 4 for batch in batches for ids in batch] == [0, 5, 1, 6, 2, 3, 4]


def test_what_a_run_samples_does_not_depend_on_how_long_grading_takes(folder, monkeypatch):
    turns = [3, 1, 2, 3, 2]
    pauses = ([0, 0, 0, 0, 0], [0.03, 0, 0.02, 0.01, 0], [0, 0.05, 0, 0.01, 0.02])
    runs = []
    for pause in pauses:
        engine = LocalEngine(folder, max_batch=3)
        with monkeypatch.context() as patch:
            batches = batches_of(engine, patch)
            contexts = run(*(dialogue(engine, n, turns[n], pause[n]) for n in range(len(turns))))
        runs.append((contexts, batches))
    assert runs[0] == runs[1] == runs[2]
    assert [len(batch) for batch in runs[0][1]] == [3, 2, 3, 1, 2]  # 5, then 4, then 2 dialogues


def test_the_same_run_twice_is_equal_to_the_bit(folder):
    def outcome():
        engine, record = LocalEngine(folder), []
        run(*(dialogue(engine, number, 2, record=record) for number in range(4)))
        return record

    assert outcome() == outcome()


def test_a_dialogue_that_ends_releases_those_that_wait_for_it(engine):
    """The short dialogue grades for a while after its only turn, then leaves."""
    short, long = run(dialogue(engine, 0, 1, pause=0.05), dialogue(engine, 1, 3))
    assert not isinstance(short, Exception) and not isinstance(long, Exception)
    assert not engine.open_sessions and not engine.waiting


def test_a_dialogue_that_fails_releases_those_that_wait_for_it(engine):
    async def failing():
        async with engine.session():
            await asyncio.sleep(0.02)
            raise KeyError("a bug in grading")

    failed, other = run(failing(), dialogue(engine, 1, 2))
    assert isinstance(failed, KeyError) and isinstance(other, list)


def test_a_dialogue_cancelled_while_it_waits_releases_the_others(engine):
    async def grades_for_ever():
        async with engine.session():
            await asyncio.sleep(3600)

    async def scenario():
        waits = asyncio.create_task(dialogue(engine, 0, 1))
        also_waits = asyncio.create_task(dialogue(engine, 1, 2))
        grades = asyncio.create_task(grades_for_ever())
        await asyncio.sleep(0.02)
        assert len(engine.waiting) == 2, "both wait for the dialogue that grades"
        waits.cancel()
        grades.cancel()
        await asyncio.gather(waits, grades, return_exceptions=True)
        return await asyncio.wait_for(also_waits, 30)

    assert isinstance(asyncio.run(scenario()), list)
    assert not engine.open_sessions and not engine.waiting


def test_an_engine_survives_an_event_loop_that_was_interrupted(engine):
    async def interrupted():
        waiting = asyncio.create_task(dialogue(engine, 0, 1))
        async with engine.session():
            await asyncio.sleep(0.02)
            assert engine.waiting
            waiting.cancel()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(interrupted())
    assert isinstance(run(dialogue(engine, 1, 2))[0], list)


def test_a_failed_wave_reaches_every_dialogue_and_none_hangs(engine):
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(torch.nan)
    outcomes = run(*(dialogue(engine, n, 2) for n in range(4)))
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    assert "NaN" in str(outcomes[0])


@pytest.mark.parametrize(
    ("token_ids", "sampling", "seed", "message"),
    [
        ([5] * 64, SAMPLING, 0, "64 tokens, but the engine takes at most 63"),
        ([5, 61], SAMPLING, 0, r"ids from 5 to 61, outside \[0, 61\)"),
        ([-1], SAMPLING, 0, "ids from -1 to -1"),
        ([], SAMPLING, 0, "prompt is empty"),
        ([5], Sampling(0), 0, "max_new_tokens is 0"),
        ([5], Sampling(4, temperature=-1.0), 0, "temperature is -1.0"),
        ([5], Sampling(4, top_p=0.0), 0, "top_p is 0.0"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(engine, token_ids, sampling, seed, message):
    async def bad():
        async with engine.session() as session:
            await session(GenerationRequest(tuple(token_ids), sampling, seed))

    failed, other = run(bad(), dialogue(engine, 1, 2))
    assert isinstance(other, list)
    with pytest.raises(ValueError, match=message):
        raise failed


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_after_an_update_the_engine_samples_as_the_new_model_does(engine, tmp_path):
    torch.manual_seed(5)
    new = small_llama()
    new.save_pretrained(tmp_path)
    before = run(dialogue(engine, 1, 2))
    engine.update_weights(weights(new).items(), version=3)
    assert engine.weight_version == 3
    record = []
    after = run(dialogue(engine, 1, 2, record=record))
    assert after != before
    assert after == run(dialogue(LocalEngine(tmp_path), 1, 2))
    assert {version for *_, one in record for version in one.weight_versions} == {3}


@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_weights_are_compared_after_the_cast_to_the_engines_type(folder, dtype, from_folder):
    engine = LocalEngine(folder, dtype=dtype, weights_from_folder=from_folder)
    torch.manual_seed(6)
    sent = weights(small_llama())
    engine.update_weights(sent.items(), version=1)
    served = engine.model.state_dict()["lm_head.weight"]
    assert served.dtype == torch.bfloat16
    assert torch.equal(served, sent["lm_head.weight"].bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sent: sent.pop("model.norm.weight"),
            r"missing from the update: model\.norm\.weight",
        ),
        (lambda sent: sent.update(extra=torch.ones(1)), "no weight extra"),
        (
            lambda sent: sent.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has shape \[31\] instead of \[32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_served(engine, change, message):
    torch.manual_seed(7)
    sent = weights(small_llama())
    change(sent)
    with pytest.raises(WeightsMismatchError, match=message):
        engine.update_weights(sent.items(), version=1)
    (outcome,) = run(dialogue(engine, 0, 1))
    assert isinstance(outcome, EngineError) and "no weights" in str(outcome)


def test_a_name_sent_twice_is_refused(engine):
    sent = list(weights(engine.model).items())
    with pytest.raises(EngineError, match=r"sent twice under the name model\.embed_tokens"):
        engine.update_weights([*sent, sent[0]], version=1)


def test_nothing_is_served_after_an_update_whose_verification_fails(engine):
    good = weights(engine.model)
    bad = good | {"model.norm.weight": torch.full((32,), torch.nan)}
    with pytest.raises(EngineError, match=r"differ from what was sent .*model\.norm\.weight"):
        engine.update_weights(bad.items(), version=1)
    (outcome,) = run(dialogue(engine, 0, 1))
    assert isinstance(outcome, EngineError) and "no weights" in str(outcome)
    engine.update_weights(good.items(), version=2)
    assert isinstance(run(dialogue(engine, 0, 1))[0], list)


def test_tied_weights_may_be_sent_under_one_name_or_equal_under_both(tmp_path):
    small_llama(tied=True).save_pretrained(tmp_path)
    engine = LocalEngine(tmp_path)
    torch.manual_seed(8)
    sent = weights(small_llama(tied=True))
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    engine.update_weights(sent.items(), version=1)
    without_head = {name: tensor for name, tensor in sent.items() if name != "lm_head.weight"}
    engine.update_weights(without_head.items(), version=2)
    unequal = sent | {"lm_head.weight": sent["lm_head.weight"] + 1}
    with pytest.raises(EngineError, match="tied weights that were sent unequal"):
        engine.update_weights(unequal.items(), version=3)


def test_an_engine_without_weights_serves_after_the_first_update_only(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    engine = LocalEngine(tmp_path, weights_from_folder=False)
    (outcome,) = run(dialogue(engine, 0, 1))
    assert isinstance(outcome, EngineError) and "no weights" in str(outcome)
    published = LocalEngine(folder)
    engine.update_weights(weights(published.model).items(), version=1)
    assert run(dialogue(engine, 0, 2)) == run(dialogue(published, 0, 2))


def test_a_folder_that_is_not_a_model_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no config\.json"):
        LocalEngine(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no weights"):
        LocalEngine(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        LocalEngine(tmp_path)


def test_a_folder_that_lacks_weights_is_refused_not_initialised(tmp_path):
    model = small_llama()
    kept = {k: v for k, v in weights(model).items() if k != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"weights are missing: model\.norm\.weight"):
        LocalEngine(tmp_path)


def test_a_model_with_sliding_windows_is_refused(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 2}
    MistralConfig(
        **small, num_attention_heads=2, num_key_value_heads=2, sliding_window=16
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without full attention"):
        LocalEngine(tmp_path, weights_from_folder=False)
