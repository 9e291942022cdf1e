"""The tables of bench/serve.py: medians of the rounds, ratios beside the goals, nothing for what was not measured."""

from __future__ import annotations

from bench.serve_limit import Machine, rows, step
from bench.serve_load import Cell
from bench.serve_points import _share
from bench.serve_report import goals, median

ONE, MANY = Cell(128, 64, 1, 4), Cell(128, 64, 16, 32)


def figures(output: list[float], first: list[float]) -> dict[str, list[float]]:
    return {"output": output, "ttft": first, "tpot": [1.0], "itl_p99": [2.0]}


SAMPLES = {
    ONE.name: {
        "heed bf16": figures([100, 120, 300], [40, 30, 90]),
        "heed int8": figures([110], [50]),
        "vLLM bf16": figures([80, 90, 100], [100, 90, 80]),
        "llama.cpp Q8_0": figures([160], [20]),
    },
    MANY.name: {"heed bf16": figures([400], [80])},
}


def test_a_figure_is_the_median_of_its_rounds() -> None:
    assert median(SAMPLES, ONE.name, "heed bf16", "output") == 120
    assert median(SAMPLES, ONE.name, "heed fp32", "output") is None
    assert median({}, ONE.name, "heed bf16", "output") is None


def test_a_goal_compares_medians_and_stands_only_where_both_sides_were_measured() -> None:
    made = {(row["goal"], row["clients"]): row for row in goals([ONE, MANY], SAMPLES)}
    assert made["output, heed bf16 over vLLM bf16", 1]["reached"] == "1.33"
    assert made["output, heed bf16 over vLLM bf16", 1]["holds"] == "yes"
    assert made["output, heed int8 over heed bf16", 1]["holds"] == "no"
    assert made["output, heed bf16 over llama.cpp Q8_0", 1]["reached"] == "0.75", "the fastest of ours by its median"
    assert made["first token, bf16, of vLLM's time", 1] == {
        "goal": "first token, bf16, of vLLM's time",
        "tokens in/out": "128/64",
        "clients": 1,
        "asked": "at most 0.65",
        "reached": "0.44",
        "holds": "yes",
    }
    assert not [goal for goal, clients in made if clients == 16]


def test_a_counter_is_set_against_the_steps_time() -> None:
    before = {"heed:step_seconds_total": 10.0, "heed:model_seconds_total": 9.0}
    after = {"heed:step_seconds_total": 20.0, "heed:model_seconds_total": 18.5}
    assert _share(before, after, "heed:model_seconds_total") == 0.95
    assert _share(before, after, "heed:prefix_cache_seconds_total") is None
    assert _share(after, after, "heed:model_seconds_total") is None


def test_a_step_reads_the_weights_once_and_the_cache_of_each_sequence(tmp_path) -> None:
    from lm import DecoderConfig, DecoderLM, pretrained

    config = DecoderConfig(vocab_size=100, context=64, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64)
    pretrained.save(DecoderLM(config), tmp_path / "model")
    weights = config.parameters()["total"]
    size, operations = step(tmp_path / "model", "bfloat16", batch=3, context=10)
    assert size == 2 * (weights + 3 * 10 * 2 * 2 * 2 * 8)
    assert operations == 3 * (2 * weights + 4 * 2 * 32 * 10)
    (row,) = rows(tmp_path / "model", Machine(1e9, {"bfloat16": 1e15}), {("bfloat16", 3): 1.0})
    assert row["limited by"] == "memory"
    assert row["limit, ms"] == step(tmp_path / "model", "bfloat16", 3)[0] / 1e6
