"""A publication has the same outcome on all ranks, and is retried if that may help."""

import pytest

from tests.rlef_mega.distributed import launch
from tests.rlef_mega.engines.publish_worker import CASES
from tests.rlef_mega.tiny_llama import tiny_llama


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """Return the tries and outcomes of two ranks, by case."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(64).save_pretrained(folder)
    first, _ = launch("tests.rlef_mega.engines.publish_worker", str(folder), processes=2)
    found: dict[str, list[tuple[int, str]]] = {case: [] for case in CASES}
    for line in first.splitlines():
        if " | rank " in line:
            case, _, tries, said = line.split(" | ", 3)
            found[case].append((int(tries), said))
    return found


@pytest.mark.parametrize(("case", "named"), [("renamed", "model.rotary"), ("cut", "[31] instead")])
def test_weights_of_another_model_end_the_run_on_all_ranks_without_another_try(
    outcomes, case, named
):
    for tries, said in outcomes[case]:
        assert tries == 1 and said.startswith("WeightsMismatchError: version 1 was not published")
        assert named in said
    assert len(outcomes[case]) == 2


def test_a_publication_that_fails_is_tried_again(outcomes):
    assert outcomes["broken once"] == [(2, "published")] * 2


def test_a_publication_that_always_fails_loses_the_engine_on_all_ranks(outcomes):
    for tries, said in outcomes["broken"]:
        assert tries == 3 and said.startswith("EngineLostError: 3 tries to publish version 1")
        assert "model.norm.weight" in said
    assert len(outcomes["broken"]) == 2
