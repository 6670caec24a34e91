"""How far the simulator is from two real vLLM workers on this machine: `sim validate`, with its parts.

The store holds copies of the demonstration's adapters under twelve names: two workers of four slots
then have half again as many adapters as slots.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.support import RESULTS, ROOT, free_port
from sim.__main__ import main as sim

CACHE = ROOT / ".lorayard"
ADAPTERS = 12
CONFIG = """\
# Written by benchmarks/validation.py: two workers as the calibration measured one.
llm_configs:
  - model_loading_config: {{model_id: smollm2-135m, model_source: ./smollm2-135m}}
    lora_config:
      dynamic_lora_loading_path: ./validation-adapters
      max_num_adapters_per_replica: 4
      accepted_base_models: [HuggingFaceTB/SmolLM2-135M-Instruct]
    engine_kwargs:
      enable_lora: true
      max_loras: 4
      max_lora_rank: 8
      max_model_len: 2048
      max_num_seqs: 32
      dtype: bfloat16
      enforce_eager: true
    deployment_config:
      max_ongoing_requests: 32
      autoscaling_config: {{min_replicas: 2, max_replicas: 2}}
    calibration: {calibration}
router: {{host: 127.0.0.1, port: {port}, policy: affinity, queue_timeout_s: 600, cache_dir: .}}
"""


def main() -> int:
    """Prepare the store and the configuration, then validate."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.validation",
        description="Further arguments go to `python -m sim validate`.",
    )
    top.add_argument("--calibration", default="cpu-smollm2-135m")
    arguments, others = top.parse_known_args()
    if not (CACHE / "smollm2-135m" / "config.json").exists():
        raise SystemExit(
            "no demo model: run `python -m engine_worker.demo build .lorayard/smollm2-135m`"
        )
    demo = sorted(path for path in (ROOT / "configs" / "demo-adapters").iterdir() if path.is_dir())
    for number in range(ADAPTERS):
        copy = CACHE / "validation-adapters" / f"adapter-{number:02d}"
        if not copy.exists():
            shutil.copytree(demo[number % len(demo)], copy)
    config = CACHE / "validation.yaml"
    config.write_text(
        CONFIG.format(calibration=arguments.calibration, port=free_port()), encoding="utf-8"
    )
    report = ROOT / "docs" / "validation.md"
    wanted = ["--config", str(config.relative_to(Path.cwd())), *others]
    files = ["--json", str(RESULTS / "validation.json"), "--report", str(report)]
    sys.argv[1:] = ["validate", *wanted]  # the command that the report shows
    return sim(["validate", *wanted, *files])


if __name__ == "__main__":
    sys.exit(main())
