"""What happens before the first step does not make the later ones gather more."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import run_command, torchrun

WORKER = Path(__file__).parent / "workers" / "gathers.py"


def test_a_probed_model_gathers_its_weights_no_more_often(tmp_path):
    done = run_command(torchrun(1, str(WORKER)), cwd=tmp_path)
    assert done.code == 0, done.text[-3000:]
    gathers = json.loads(done.out.splitlines()[-1])
    assert gathers["probed"][-1] == gathers["not probed"][-1] > 0, gathers
