"""`--vary`: from text to axes, from axes to checked configurations."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import ConfigError, parse
from router.core.policies import POLICIES
from sim.commands.arguments import DEFAULT_CONFIG
from sim.replay import Options
from sim.variants import POINTS_MAX, Axis, Base, Choice, grid, parse_axes, parse_axis

THRESHOLD = "deployment_config.max_ongoing_requests"
GOOD: list[tuple[str, str | None, tuple[object, ...]]] = [
    (f"{THRESHOLD}=8,16,32", THRESHOLD, (8, 16, 32)),
    ("workers=2..6", "workers", (2, 3, 4, 5, 6)),
    ("workers=2..16:4", "workers", (2, 6, 10, 14)),
    ("workers=1,2..4,8", "workers", (1, 2, 3, 4, 8)),
    ("speed=0.1..0.3:0.1", "speed", (0.1, 0.2, 0.3)),
    ("speed=1,2.5", "speed", (1, 2.5)),
    ("policy=affinity,round_robin", "policy", ("affinity", "round_robin")),
    ("router.policy=affinity", "policy", ("affinity",)),
    ("slots=4, 8", "slots", (4, 8)),
    ("engine_kwargs.max_loras=4..16:4", "engine_kwargs.max_loras", (4, 8, 12, 16)),
    ("router.queue_timeout_s=1,60", "router.queue_timeout_s", (1, 60)),
    ("calibration=emulated", "calibration", ("emulated",)),
    ("deployment_config.autoscaling_config.min_replicas=2", None, (2,)),
    ("locality=0,0.8", "locality", (0, 0.8)),
]


@pytest.mark.parametrize(("text", "path", "values"), GOOD, ids=[text for text, _, _ in GOOD])
def test_axes(text: str, path: str | None, values: tuple[object, ...]) -> None:
    assert parse_axis(text) == Axis(path or text.partition("=")[0], values)  # type: ignore[arg-type]


BAD = [
    ("workers", "write PATH=VALUES, such as workers=2..16"),
    ("workers=", "write PATH=VALUES"),
    ("=3", "write PATH=VALUES"),
    ("worker=3", "there is no `worker`; did you mean `workers`?"),
    ("qqq=3", "there is no `qqq`; known: policy, workers"),
    ("max_ongoing_requests=3", f"no such path; did you mean `{THRESHOLD}`?"),
    (
        "deployment_config.max_ongoing=3",
        f"there is no `max_ongoing` in deployment_config; did you mean `{THRESHOLD}`?",
    ),
    ("engine_kwargs.max_lora=4", "did you mean `engine_kwargs.max_loras`?"),
    ("engine_kwargs=4", "name what is to vary in engine_kwargs; known: max_num_seqs"),
    ("lora_config=4", "name what is to vary in lora_config"),
    ("router.queue_timeout=4", "did you mean `router.queue_timeout_s`?"),
    ("router.port=4", "a simulation does not read it"),
    ("deployment_config.autoscaling_config.max_replicas=4", "a simulation does not read it"),
    ("router=4", "name what is to vary in router"),
    ("model_loading_config.model_id.x=4", "is one value; nothing stands below it"),
    ("policy=afinity", "no policy `afinity`; did you mean `affinity`?"),
    ("policy=4", "no policy `4`; known: "),
    ("workers=0", "0 is not between 1 and 100000"),
    ("workers=2.5", "2.5 is not a whole number"),
    ("workers=true", "True is not a whole number"),
    ("speed=x", "x is not a number"),
    ("workers=8..2", "8..2 goes down; write 2..8"),
    ("workers=2..8:0", "a step is above 0"),
    ("workers=1..100000", "more than 1,000 values"),
    ("workers=2..", "2.. is no range; write 2..16"),
    ("workers=2,,3", "`` is not one value"),
    ("slots=[1", "`[1` is not one value"),
    ("slots=4,4", "4 stands there twice"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_what_cannot_vary_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_axis(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["workers=1", "workers=2"], "workers is varied by --vary workers already"),
        (["slots=4", "engine_kwargs.max_loras=8"], "is varied by --vary slots already"),
        (["threshold=4", f"{THRESHOLD}=8"], "is varied by --vary threshold already"),
        (["workers=1..200", "slots=1..200"], f"40,000 points are more than {POINTS_MAX:,}"),
    ],
)
def test_axes_that_do_not_go_together(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axes(texts)


@given(first=st.integers(-50, 50), count=st.integers(1, 40), step=st.integers(1, 9))
def test_a_range_has_both_ends_and_even_steps(first: int, count: int, step: int) -> None:
    last = first + (count - 1) * step
    values = parse_axis(f"router.max_queued_requests={first}..{last}:{step}").values
    assert values == tuple(range(first, last + 1, step))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_grid_has_every_point_once(sizes: list[int]) -> None:
    names = ("workers", "slots", "threshold")
    axes = parse_axes([f"{names[index]}=1..{size}" for index, size in enumerate(sizes)])
    points = list(grid(axes))
    assert len(points) == len(set(points)) == math.prod(sizes)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(DEFAULT_CONFIG)


def test_values_reach_the_configuration_and_the_options(base: Base) -> None:
    choice: Choice = (
        ("slots", 128),
        ("threshold", 7),
        ("workers", 3),
        ("policy", "round_robin"),
        ("router.queue_timeout_s", 5),
        ("engine_kwargs.max_num_seqs", 9),
    )
    config, options = base.variant(choice, Options(seed=4))
    llm = config.llm_configs[0]
    assert (llm.slots, llm.engine_kwargs["max_loras"]) == (128, 128)
    assert llm.engine_kwargs["max_cpu_loras"] == 129, "vLLM wants a place for each slot"
    assert llm.deployment_config.max_ongoing_requests == 7
    assert config.router.queue_timeout_s == 5
    assert llm.engine_kwargs["max_num_seqs"] == 9
    assert (options.workers, options.policy, options.seed) == (3, "round_robin", 4)
    assert base.variant((), Options()) == (base.config, Options())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ((("engine_kwargs.max_loras", 4),), "max_num_adapters_per_replica is 16; .*vary `slots`"),
        ((("threshold", 0),), "^--vary threshold=0: max_ongoing_requests: Expected `int` >= 1$"),
        (
            (("router.max_queued_requests", "x"),),
            "^--vary router.max_queued_requests=x: max_queued_requests: Expected `int`",
        ),
        ((("lora_config.max_download_tries", None),), "max_download_tries=null: "),
    ],
)
def test_a_bad_value_gets_the_configurations_own_words(
    base: Base, choice: Choice, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        base.variant(choice, Options())


def test_the_text_of_a_choice_is_a_configuration(base: Base, tmp_path: Path) -> None:
    text = base.text((("workers", 5), ("slots", 4), ("policy", "round_robin")))
    config = parse(text, name="c.yaml", folder=tmp_path)
    assert config.llm_configs[0].replicas == 5
    assert config.llm_configs[0].slots == 4
    assert config.router.policy == "round_robin"


def test_paths_apply_to_each_model_and_slots_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        """llm_configs:
  - model_loading_config: {model_id: a}
    lora_config: &lora {dynamic_lora_loading_path: /x, max_num_adapters_per_replica: 2}
  - model_loading_config: {model_id: b}
  - model_loading_config: {model_id: c}
    lora_config: *lora
    engine: attached
    attach: [http://one:1, http://two:2]
"""
    )
    base = Base(path)
    config, _ = base.variant((("slots", 8), ("threshold", 3)), Options())
    assert [llm.slots for llm in config.llm_configs] == [8, 0, 8]
    assert all(llm.deployment_config.max_ongoing_requests == 3 for llm in config.llm_configs)
    again = parse(base.text((("workers", 1),)), name="c.yaml", folder=tmp_path)
    assert [llm.replicas for llm in again.llm_configs] == [1, 1, 1]


def test_every_policy_may_vary() -> None:
    assert parse_axis(f"policy={','.join(POLICIES)}").values == tuple(POLICIES)
