"""The supervised stage: train on generated dialogues, from random weights (the demo's base model)
or from a pretrained model.

It shares learner, packing and checkpoints with the loop in train.py and resumes in the same way.
Its folder holds `checkpoints/`, `metrics.jsonl` and, when the stage is finished, `model/`, a
Hugging Face folder; without a pretrained model also `init/`, with tokenizer and random weights.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.config import LearnerConfig, SFTConfig, load_config
from rlef_mega.demo.repair_dialogues import repair_dialogue
from rlef_mega.demo.taught_dialogues import sft_dialogue
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.hf_weights import export_hf
from rlef_mega.megatron.network import accelerations
from rlef_mega.megatron.supervised import SupervisedLearner
from rlef_mega.packing import pack
from rlef_mega.run.directory import Clock, RunDirectory, folder_written_whole
from rlef_mega.run.hub import find_model
from rlef_mega.run.launch import StopRequest, collect_garbage, worker_main
from rlef_mega.run.progress import StepProgress
from rlef_mega.run.ranks import any_rank
from rlef_mega.types import Completion, Episode, Turn, Verdict

UNGRADED = Verdict((), public_passed=False, solved=None)


def supervise(config: SFTConfig) -> int:
    """Run or resume the supervised stage. Returns 0 when `model/` is written, STOPPED if asked to
    stop."""
    run = RunDirectory(Path(config.dir))
    stop = StopRequest(run.stop_request)
    ranks = parallel.initialize(config.parallel, seed=config.seed)
    if ranks.is_writer:
        run.lock()
        accelerations.announce(ranks.device, getattr(torch, config.dtype))
    start_model = find_model(config.model) if config.model else run.path / "init"
    chat = ChatFormat.from_folder(start_model)
    learner = SupervisedLearner(
        ranks,
        start_model,
        learner=LearnerConfig(microbatch_tokens=config.microbatch_tokens, policy=config.optimizer),
        dtype=config.dtype,
    )
    checkpoints = Checkpoints(
        run.checkpoints, learner, keep=1, asynchronous=config.checkpoint_async
    )
    first, _ = checkpoints.resume()
    if ranks.is_writer:
        run.resume(first)
    clock = Clock()
    progress = StepProgress("supervised", done=first, total=config.steps, shown=ranks.is_writer)
    with progress:
        for step in range(first + 1, config.steps + 1):
            start = (step - 1) * config.dialogues_per_step
            batch = pack(dialogues_of_step(config, start, chat))
            record = {"step": step, "tokens": batch.num_tokens, **learner.supervised_update(batch)}
            record["checkpoint_failures"] = checkpoints.failures
            times = clock.lap()
            if ranks.is_writer:
                run.append_metrics({**record, "time": times})
            progress.step(
                f"loss {record['loss']:.3f}  {batch.num_tokens / times['step']:,.0f} tok/s"
            )
            due = step % config.checkpoint_every == 0
            stopping = any_rank(stop.requested())
            with clock("checkpoint"):
                checkpoints.poll()
                if due or stopping:
                    checkpoints.save(step, {})
            collect_garbage(step)
            if stopping:
                checkpoints.require_saved()
                return stop.obeyed(writer=ranks.is_writer)
    checkpoints.finish()
    dtype = getattr(torch, config.dtype)
    weights, out = learner.policy_weights(), run.path / "model"
    export_hf(weights, start_model, out, dtype, is_writer=ranks.is_writer)
    parallel.shutdown(ranks)
    return 0


def dialogues_of_step(config: SFTConfig, start: int, chat: ChatFormat) -> list[Episode]:
    """Return the dialogues of a step, the first of which has the number `start`."""
    numbers = range(start, start + config.dialogues_per_step)
    if config.dialogues == "functions":
        repairs = (repair_dialogue(number, config.seed) for number in numbers)
        return [encode(messages, chat, begun) for begun, messages in repairs]
    return [encode(sft_dialogue(number, config.seed), chat) for number in numbers]


def encode(messages: Sequence[str], chat: ChatFormat, begun: str = "") -> Episode:
    """Return a written dialogue as an episode, the form in which sampled ones are packed. All its
    responses begin with `begun`, which the model does not write."""
    turns: list[Turn] = []
    for prompt, response in zip(messages[::2], messages[1::2], strict=True):
        observed = chat.observe(prompt, True, begun) if turns else chat.open(prompt, begun)
        ids = tuple(chat.respond(response))
        completion = Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")
        turns.append(Turn(tuple(observed), completion, None, UNGRADED))
    return Episode("supervised", tuple(turns))


def make_initial_model(config: SFTConfig) -> None:
    """Train a tokenizer, draw random weights, and write both to `init/`, unless it exists or the
    stage begins with another model. The same seed gives the same weights on every machine."""
    init = Path(config.dir) / "init"
    if config.model or init.exists():
        return
    with folder_written_whole(init) as folder:
        tokenizer = train_tokenizer(folder, config.vocab_size)
        hf_config = LlamaConfig(
            **LlamaShape(**config.sizes()).hf_settings(),
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
        model = LlamaForCausalLM(hf_config)
        initialize_weights(model, torch.Generator().manual_seed(config.seed))
        model.save_pretrained(folder)


@torch.no_grad()
def initialize_weights(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Draw normal weights. Their standard deviation is 0.5 in the embedding, 0.02 in the head and
    1/sqrt(fan_in) elsewhere, times 1/sqrt(2 L) in the layers that add to the residual stream.

    With the usual 0.02 everywhere a model this small does not learn to copy within minutes.
    """
    layers = model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        if "embed_tokens" in name:
            deviation = 0.5
        elif "lm_head" in name:
            deviation = 0.02
        else:
            deviation = 1 / math.sqrt(weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= math.sqrt(2 * layers)
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


if __name__ == "__main__":
    worker_main(lambda run_dir: supervise(load_config(run_dir / "config.toml", [], SFTConfig)))
