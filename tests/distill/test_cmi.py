# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.distill.cmi import measure_information
from calib.distill.information import ClassInformation
from calib.errors import UsageError

RANK = """
import json, sys, torch
from pathlib import Path
from calib.distill.cmi import measure_information
from calib.models.evaluating import evaluating

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
logits, labels = torch.randn(60, 4, generator=generator), torch.randint(4, (60,), generator=generator)
part = slice(0, 25) if rank == 0 else slice(25, 60)
found = measure_information(torch.nn.Identity(), [(logits[part], labels[part])])[0]
Path(out).write_text(json.dumps(found.summary().to_dict()))
torch.distributed.barrier()  # a rank that leaves while the other still talks to it takes it down
torch.distributed.destroy_process_group()
"""


def test_a_loader_is_measured_as_its_logits_are(mixture: Any) -> None:
    found = measure_information(mixture.teacher, mixture.loader(shuffle=False), temperatures=(1.0, 4.0))
    for information, temperature in zip(found, (1.0, 4.0), strict=True):
        expected = ClassInformation(10, temperature=temperature)
        with torch.no_grad():
            expected.update(mixture.teacher(mixture.train.tensors[0]), mixture.train.tensors[1])
        assert information.summary().cmi == pytest.approx(expected.summary().cmi, rel=1e-6)
        assert information.summary().accuracy == expected.summary().accuracy


def test_at_high_temperature_all_outputs_are_alike_and_cmi_vanishes(mixture: Any) -> None:
    found = measure_information(mixture.teacher, mixture.loader(), temperatures=(1.0, 1e4))
    plain, hot = (information.summary().cmi for information in found)
    assert plain > 0.1
    assert hot < 1e-5


def test_an_empty_loader_is_refused(mixture: Any) -> None:
    with pytest.raises(UsageError, match="no batch"):
        measure_information(mixture.teacher, [])


def test_two_ranks_get_the_information_of_all_data(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(out)]) for rank, out in enumerate(outs)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    generator = torch.Generator().manual_seed(0)
    whole = ClassInformation(4)
    whole.update(torch.randn(60, 4, generator=generator), torch.randint(4, (60,), generator=generator))
    expected = whole.summary().to_dict()
    for out in outs:
        for name, value in json.loads(out.read_text()).items():
            assert value == pytest.approx(expected[name], rel=1e-12), name
