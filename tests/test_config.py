"""Every mistake gets one line: the file, the line, what is wrong, what to write instead."""

from pathlib import Path

import pytest

from router.config import Config, ConfigError, load, parse
from router.core.quotas import Quota

FOLDER = Path(__file__).parents[1] / "configs"
LORA = """
    lora_config:
      dynamic_lora_loading_path: s3://bucket/adapters
      max_num_adapters_per_replica: 4
"""
HEAD = """llm_configs:
  - model_loading_config: {model_id: base}
"""


def read(text: str) -> Config:
    return parse(text, name="c.yaml", folder=Path("somewhere"))


BAD = [
    ("", "c.yaml:1: the file is empty; it needs a list `llm_configs`"),
    ("llm_configs: [\n", "c.yaml:2: not valid YAML: expected the node content"),
    ("router: {}\n", "c.yaml:1: `llm_configs` is missing"),
    ("llm_configs: []\n", "c.yaml:1: llm_configs: Expected `array` of length >= 1"),
    ("just text\n", "c.yaml:1: Expected `object`, got `str`"),
    (
        HEAD + "    lora_cofig: {}\n",
        "c.yaml:3: unknown key `lora_cofig`; did you mean `lora_config`?",
    ),
    (
        HEAD + "    nonsense: 1\n",
        "c.yaml:3: unknown key `nonsense`; known here: model_loading_config,",
    ),
    (HEAD + "router:\n  prot: 80\n", "c.yaml:4: unknown key `prot`; did you mean `port`?"),
    (
        HEAD + "router:\n  port: 80\n  port: 81\n",
        "c.yaml:5: `port` stands here twice (first on line 4)",
    ),
    (HEAD + "router: {port: 99999}\n", "c.yaml:3: port: Expected `int` <= 65535"),
    (
        HEAD + "router: {policy: afinity}\n",
        "c.yaml:3: no policy `afinity`; did you mean `affinity`?",
    ),
    (
        HEAD + "router: {policy: zzz}\n",
        "c.yaml:3: no policy `zzz`; known: affinity, chwbl, cost, dynamo, ",
    ),
    (
        HEAD + LORA + "    engine_kwargs:\n      max_loras: 8\n",
        "c.yaml:8: max_loras is 8, but lora_config.max_num_adapters_per_replica is 4; "
        "write `max_loras: 4`",
    ),
    (
        HEAD + LORA + "    engine_kwargs: {enable_lora: false}\n",
        "c.yaml:7: enable_lora is false, but",
    ),
    (
        HEAD + "    engine_kwargs: {enable_lora: true}\n",
        "c.yaml:3: enable_lora is set, but there is no",
    ),
    (
        HEAD + "    lora_config: {dynamic_lora_loading_path: 'ftp://x'}\n",
        "c.yaml:3: `ftp://` is not known; write a folder or one of s3://, gs://, az://, https://",
    ),
    (
        HEAD + "    engine: attached\n",
        "c.yaml:3: `engine: attached` needs a list of URLs in `attach`",
    ),
    (HEAD + "    attach: ['http://h:1']\n", "c.yaml:3: `attach` is for `engine: attached`"),
    (
        HEAD + "    engine: attached\n    attach: [localhost]\n",
        "c.yaml:4: `localhost` is no address of a worker; write http://HOST:PORT",
    ),
    (
        HEAD + "    deployment_config:\n      autoscaling_config: {min_replicas: 3}\n",
        "c.yaml:4: min_replicas is 3, more than max_replicas, which is 1",
    ),
    (
        HEAD + "    deployment_config: {max_ongoing_requests: 0}\n",
        "c.yaml:3: max_ongoing_requests: Expected `int` >= 1",
    ),
    (
        HEAD + "  - model_loading_config: {model_id: base}\n",
        "c.yaml:3: model_id `base` is taken by",
    ),
    (
        "llm_configs:\n  - model_loading_config: {}\n",
        "c.yaml:2: model_loading_config: `model_id` is missing",
    ),
    (HEAD + "    engine: vlm\n", "c.yaml:3: engine: `vlm` is not one of vllm, emulated, attached"),
    (
        HEAD + "    lora_config: text\n",
        "c.yaml:3: lora_config: Expected `object | null`, got `str`; write",
    ),
    (HEAD + "    engine_kwargs: {1: x}\n", "c.yaml:3: the key `1` is not text; quote it"),
    (HEAD + "1: x\n", "c.yaml:3: the key `1` is not text; quote it"),
    (
        HEAD + LORA + "    engine_kwargs: {max_loras: '4'}\n",
        'c.yaml:7: max_loras is "4"; write a whole',
    ),
    (
        HEAD + LORA + "    engine_kwargs: {max_loras: true}\n",
        "c.yaml:7: max_loras is true; write a",
    ),
    (HEAD + "    engine_kwargs: {max_num_seqs: 0}\n", "c.yaml:3: max_num_seqs is 0; write a whole"),
    (
        HEAD + "    lora_config: {dynamic_lora_loading_path: 's3://'}\n",
        "c.yaml:3: `s3://` names no store",
    ),
    (
        HEAD + "    lora_config: {dynamic_lora_loading_path: 'S3://b'}\n",
        "c.yaml:3: `S3://` is not known; ",
    ),
    (HEAD + "    lora_config: {dynamic_lora_loading_path: ''}\n", "c.yaml:3: `` names no store"),
    (
        HEAD + "    lora_config: {dynamic_lora_loading_path: 'http://files.example/a'}\n",
        "c.yaml:3: `http://files.example/a` would bring adapters unprotected over a network; write",
    ),
    (
        HEAD
        + "    lora_config: {dynamic_lora_loading_path: 'https://me:secret@files.example/a'}\n",
        "c.yaml:3: `https://***@files.example/a` names no store; write https://HOST/PATH,",
    ),
    (
        HEAD + "    lora_config: {dynamic_lora_loading_path: 'hf://acme'}\n",
        "c.yaml:3: `hf://acme` names no store; write hf://ORG/REPO[/FOLDER][@REVISION]",
    ),
    (HEAD + "router: {download_connections: 0}\n", "c.yaml:3: download_connections: Expected"),
    (HEAD + "router: {download_connections: 65}\n", "c.yaml:3: download_connections: Expected"),
    (HEAD + "router: {download_mib_per_s: 0}\n", "c.yaml:3: download_mib_per_s: Expected `float"),
    (HEAD + "router: {cache_max_gib: 0}\n", "c.yaml:3: cache_max_gib: Expected `float"),
    (
        HEAD + "router:\n  record:\n    pth: x\n",
        "c.yaml:5: unknown key `pth`; did you mean `path`?",
    ),
    (
        HEAD + "router:\n  record: traffic.jsonl\n",
        "c.yaml:4: record: Expected `object | null`, got `str`; write a mapping",
    ),
    (HEAD + "router: {record: {max_mib: 9}}\n", "c.yaml:3: record: `path` is missing"),
    (HEAD + "router: {record: {path: ''}}\n", "c.yaml:3: path: Expected `str` of length >= 1"),
    (HEAD + "router: {record: {path: x, max_mib: 0}}\n", "c.yaml:3: max_mib: Expected `int` >= 1"),
    (
        HEAD + "router:\n  tenants:\n    - {name: a}\n    - {name: a}\n",
        "c.yaml:6: tenant `a` stands here twice (first as tenants[0]); remove one",
    ),
    (HEAD + "router: {tenants: [{wieght: 2}]}\n", "c.yaml:3: unknown key `wieght`; did you mean"),
    (HEAD + "router: {tenants: [{weight: 2}]}\n", "c.yaml:3: tenants[0]: `name` is missing"),
    (HEAD + "router: {tenants: [{name: a b}]}\n", "c.yaml:3: name: Expected `str` matching regex"),
    (
        HEAD + "router: {tenants: [{name: a, weight: 0}]}\n",
        "c.yaml:3: weight: Expected `float` > 0",
    ),
    (
        HEAD + "router: {tenants: [{name: a, tokens_per_minute: 0}]}\n",
        "c.yaml:3: tokens_per_minute: Expected `float` > 0",
    ),
    (
        HEAD + "router: {tenants: [{name: a, priority: 4}]}\n",
        "c.yaml:3: priority: Expected `int` <= 3",
    ),
    (
        HEAD + "router: {ttft_deadline_s: 0}\n",
        "c.yaml:3: ttft_deadline_s: Expected `float` > 0",
    ),
    (
        HEAD + "router: {explain_sample: 2}\n",
        "c.yaml:3: explain_sample: Expected `float` <= 1",
    ),
    (
        HEAD + LORA + "      preload_adapters: [a, 'base:b']\n",
        "c.yaml:7: `base:b` can be no adapter's name; write it without its base model, in letters, ",
    ),
    (
        HEAD + LORA + "      pinned_adapters:\n      - a\n      - ../b\n",
        "c.yaml:9: `../b` can be no adapter's name; write it without its base model",
    ),
    (
        HEAD + LORA + "      pinned_adapters: [a, b]\n      preload_adapters: [b, c, d, e]\n",
        "c.yaml:8: 5 adapters are to be pinned or preloaded, but all workers have 4 slots; name few",
    ),
    (
        HEAD + LORA + "      preload_adapter: [a]\n",
        "c.yaml:7: unknown key `preload_adapter`; did you mean `preload_adapters`?",
    ),
    (
        HEAD + LORA + "      pinned_adapters: [a, b, c, d, a]\n",
        "c.yaml:7: 4 pinned_adapters leave none of the 4 slots for others; pin at most 3, or raise",
    ),
    (HEAD + LORA + "      max_adapter_mib: 0\n", "c.yaml:7: max_adapter_mib: Expected `int` >= 1"),
    (HEAD + LORA + "      eviction: mru\n", "c.yaml:7: eviction: `mru` is not one of lru, gdsf"),
    (
        HEAD + "router: {api_keys_file: ''}\n",
        "c.yaml:3: api_keys_file: Expected `str` of length >=",
    ),
    (HEAD + 'router: {cache_dir: "a\\0b"}\n', "c.yaml:1: a path cannot be used: "),
    (HEAD + "router: {cache_dir: ~nosuchuser/x}\n", "c.yaml:1: a path cannot be used: "),
    (HEAD + "router: {queue_timeout_s: .inf}\n", "c.yaml:3: queue_timeout_s: Expected `float` <="),
    ("a\x01b", "c.yaml:1: not valid YAML: "),
    ("llm_configs: 2023-99-99\n", "c.yaml:1: not valid YAML: month must be in 1..12"),
    ("llm_configs: &a [*a]\n", "c.yaml:1: nested too deeply"),
    ("[" * 3000, "c.yaml:1: nested too deeply"),
    (
        "llm_configs:\n  - model_loading_config: {model_id: 'a:b'}\n",
        "c.yaml:2: model_id: `a:b` cannot be a model id",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_mistake_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_merge_keys_may_be_overridden() -> None:
    text = """llm_configs:
  - model_loading_config: {model_id: one}
    deployment_config: &usual {max_ongoing_requests: 8, autoscaling_config: {max_replicas: 3}}
  - model_loading_config: {model_id: two}
    deployment_config:
      <<: *usual
      max_ongoing_requests: 9
"""
    two = read(text).llm_configs[1].deployment_config
    assert (two.max_ongoing_requests, two.autoscaling_config.max_replicas) == (9, 3)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load(Path("nowhere.yaml"))


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = read(HEAD + LORA + "    engine_kwargs: {max_lora_rank: 32}\n")
    [llm] = config.llm_configs
    assert llm.engine_arguments() == {"enable_lora": True, "max_loras": 4, "max_lora_rank": 32}
    assert llm.model_loading_config.source == "base"
    assert read(HEAD).llm_configs[0].engine_arguments() == {}


def test_tenants_become_weights_and_quotas() -> None:
    router = read(
        HEAD + "router: {tenants: [{name: a, weight: 2, tokens_per_minute: 9}, {name: b}]}\n"
    ).router
    assert router.weights == {"a": 2.0, "b": 1.0}
    assert router.quotas == {"a": Quota(None, 9.0), "b": Quota()}
    assert read(HEAD).router.policy == "cost"


def test_links_are_followed_when_they_are_used(tmp_path: Path) -> None:
    """Kubernetes mounts a folder of links, and moves them when what it mounts has changed."""
    (tmp_path / "2026").mkdir()
    (tmp_path / "data").symlink_to("2026")
    (tmp_path / "2026" / "c.yaml").write_text(HEAD + "router: {api_keys_file: keys.yaml}\n")
    for name in ("c.yaml", "keys.yaml"):
        (tmp_path / name).symlink_to(f"data/{name}")
    assert load(tmp_path / "c.yaml").router.api_keys_file == str(tmp_path / "keys.yaml")


@pytest.mark.parametrize("bucket", ["my_dynamic_lora_path", "Old.Bucket", "plain-1/pre/fix"])
def test_what_a_bucket_may_be_called(bucket: str) -> None:
    text = HEAD + f"    lora_config: {{dynamic_lora_loading_path: 's3://{bucket}'}}\n"
    [llm] = read(text).llm_configs
    assert llm.lora_config is not None
    assert llm.lora_config.dynamic_lora_loading_path == f"s3://{bucket}"


def test_relative_folders_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    text = """llm_configs:
  - model_loading_config: {model_id: base, model_source: ../model}
    lora_config: {dynamic_lora_loading_path: adapters}
"""
    [llm] = parse(text, name="c", folder=tmp_path / "configs").llm_configs
    assert llm.model_loading_config.source == str(tmp_path / "model")
    assert llm.lora_config is not None
    assert llm.lora_config.dynamic_lora_loading_path == str(tmp_path / "configs" / "adapters")
    router = parse(
        HEAD + "router: {record: {path: t.jsonl}, api_keys_file: keys.yaml}\n",
        name="c",
        folder=tmp_path,
    ).router
    assert router.record is not None
    assert router.record.path == str(tmp_path / "t.jsonl")
    assert router.api_keys_file == str(tmp_path / "keys.yaml")


CONFIGS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "keys.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load(path).llm_configs


def test_what_is_loaded_at_the_start_fits_the_workers() -> None:
    text = HEAD + LORA + "      pinned_adapters: [a]\n      preload_adapters: [a, b, c, d]\n"
    lora = read(text).llm_configs[0].lora_config
    assert lora is not None
    assert (lora.pinned_adapters, lora.preload_adapters) == (("a",), ("a", "b", "c", "d"))
    more = text.replace("d]", "d, e]")
    scaling = "    deployment_config: {autoscaling_config: {min_replicas: 2, max_replicas: 2}}\n"
    with pytest.raises(ConfigError, match="5 adapters are to be pinned or preloaded"):
        read(more)
    assert read(more + scaling).llm_configs[0].replicas == 2


def test_the_admin_key_has_a_variable_of_its_own() -> None:
    assert read(HEAD).router.admin_key_env == "LORAYARD_ADMIN_KEY"
    assert read(HEAD + "router: {admin_key_env: OPS}\n").router.admin_key_env == "OPS"
