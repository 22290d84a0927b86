"""`/v1/completions` of real SGLang servers: what an evaluation with `--openai` samples from."""

import math
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.evaluation.completion_servers import OpenAIEngine
from rlef_mega.types import Sampling
from tests.sglang.conftest import CONTEXT, END_OF_TEXT
from tests.sglang.test_servers import TOLERANCE, gap, open_engine, random_prompts, sample

pytestmark = pytest.mark.sglang


def test_completions_are_of_the_servers_weights_and_exact_ids(serving, tmp_path):
    model = LlamaForCausalLM.from_pretrained(serving.model, dtype="float32")
    with open_engine(serving, tmp_path, "disk") as engine:  # whatever other tests brought them
        engine.update_weights(model.state_dict().items(), 1)
    chat = ChatFormat.from_folder(serving.model)
    prompts = [chat.open("Add 1 and 2."), *random_prompts(5, 30)]
    with OpenAIEngine(serving.urls, chat, context=CONTEXT) as engine:
        assert engine.facts["token_ids"] == "as sampled"
        assert engine.facts["prompts"].startswith("checked")
        assert engine.facts["log_probs"] == "as it says"
        stops = Sampling(40, 1.0, stop_token_ids=(7, 8, 9))
        for prompt, answer in zip(prompts, sample(engine, prompts, stops), strict=True):
            ids = answer.token_ids
            assert not {7, 8, 9} & set(ids[:-1]) and (len(ids) <= 40 or ids[39] == END_OF_TEXT)
            known = [p for p in answer.logprobs if not math.isnan(p)]
            assert len(ids) - len(known) <= 1  # the end of turn that was put after another end
            whole = replace(
                answer,
                token_ids=ids[: len(known)],
                logprobs=tuple(known),
                weight_versions=(0,) * len(known),
            )
            assert gap(model, prompt, whole) < TOLERANCE
