# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.distill.ranks import Ranks
from calib.errors import UsageError

SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from calib.distill.networks import make_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.ranks import Ranks
from calib.distill.student import StudentSettings, train_student
from calib.distill.teacher import TeacherSettings, fine_tune

torch.set_num_threads(1)
folder = Path(sys.argv[1])
data = load_file(folder / "data.safetensors")
loader = DataLoader(TensorDataset(data["x"], data["y"]), batch_size=16, shuffle=True, drop_last=True)
ranks = Ranks(cpu=True)
torch.manual_seed(ranks.rank)  # other first weights in each process: the first one's count
teacher, student = (make_network("mlp16", 4, channels=8, size=1) for _ in range(2))
adam = OptimiserSettings("adamw", 1e-2)
train_student(teacher, None, loader, "ce", StudentSettings(epochs=2, optimiser=adam), ranks=ranks)
fine_tune(teacher, loader, TeacherSettings(epochs=2, optimiser=OptimiserSettings("adamw", 1e-3)), ranks=ranks)
train_student(student, teacher, loader, "kd", StudentSettings(epochs=3, optimiser=adam), ranks=ranks)
save_file({**student.state_dict(), "count": torch.tensor(ranks.count)}, folder / f"{ranks.count}-{ranks.rank}.st")
ranks.leave()
"""


def test_two_processes_train_the_student_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    save_file(
        {"x": torch.nn.functional.one_hot(labels, 8) + 0.3 * torch.randn(64, 8), "y": labels},
        tmp_path / "data.safetensors",
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for count in (1, 2):
        processes = []
        for rank in range(count):
            # what `accelerate launch` and `torchrun` tell the processes that they start
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
            environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert not process.returncode, errors[-2000:]
    one, first, second = (load_file(tmp_path / f"{name}.st") for name in ("1-0", "2-0", "2-1"))
    assert int(first.pop("count")) == int(second.pop("count")) == 2
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.allclose(tensor, one[name], atol=1e-4), name


def test_shares_of_a_batch_are_disjoint_and_complete() -> None:
    ranks = Ranks()
    batch = (torch.arange(5), torch.arange(5))
    assert ranks.share(batch) is batch
    parts = []
    for rank in range(2):
        ranks.rank, ranks.count = rank, 2
        parts.append(ranks.share({"x": torch.arange(5), "name": "n"})["x"])
    assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="2 processes"):
        ranks.share((torch.arange(1),))
    with pytest.raises(UsageError, match="cannot be divided"):
        ranks.share(7)
