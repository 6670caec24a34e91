"""What passes here loads in vLLM: its own reading of adapters, over everything that was not refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_drafts import BASE, Files, spoilt
from deployment import ROOT
from hypothesis import Phase, given, settings

from router.adapters.validate import AdapterFacts, AdapterRules, InvalidAdapterError, check_files

pytestmark = pytest.mark.vllm
RULES = AdapterRules(("org/tiny", "tiny"), rank_max=16, base=BASE)


def test_what_was_not_refused_loads(tmp_path: Path) -> None:
    taken: dict[str, AdapterFacts] = {}

    @settings(max_examples=500, deadline=None, phases=[Phase.generate])
    @given(spoilt())
    def write(files: Files) -> None:
        folder = tmp_path / f"a{len(taken)}"
        folder.mkdir(exist_ok=True)
        files.write(folder)
        try:
            taken[folder.name] = check_files("x", folder, RULES)
        except InvalidAdapterError:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()

    write()
    assert len(taken) > 50
    # Apart, so that torch stays out of pytest.
    command = [sys.executable, str(ROOT / "tests" / "support" / "vllm_reads.py"), str(tmp_path)]
    command += [str(RULES.rank_max), *sorted(BASE.modules or ()), "experts"]
    read = json.loads(
        subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
    )
    assert read.keys() == taken.keys()
    failed = {name: one["error"] for name, one in read.items() if "error" in one}
    assert failed == {}
    for name, facts in taken.items():
        assert read[name]["rank"] == facts.rank
        for module, (first, second) in read[name]["shapes"].items():
            if "experts" not in module:
                assert first[0] == second[1] <= RULES.rank_max, (name, module)
