"""The mean of checkpoints: exact, in each tensor's own dtype, and nothing but of one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.average import average, whole
from train.checkpoint import CheckpointError, Progress, lasting, save


def folders(root: Path, *weights: dict[str, torch.Tensor]) -> list[Path]:
    made = []
    for number, tensors in enumerate(weights):
        folder = root / f"step-{number}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        made.append(folder)
    return made


def test_the_mean_is_exact(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [{"w": torch.randn(3, 4, generator=generator), "b": torch.randn(4, generator=generator)} for _ in range(5)]
    found = average(folders(tmp_path, *drawn))
    for name in ("w", "b"):
        exact = torch.stack([tensors[name].double() for tensors in drawn]).mean(dim=0)
        assert torch.equal(found[name], exact.float())
        assert found[name].dtype == torch.float32


def test_large_numbers_that_cancel(tmp_path: Path) -> None:
    """In float32 the small one would be lost beside the large ones."""
    found = average(folders(tmp_path, *({"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8))))
    assert found["w"].item() == pytest.approx(1 / 3)


def test_one_is_itself(tmp_path: Path) -> None:
    weights = {"w": torch.randn(2, 2, generator=torch.Generator().manual_seed(1)), "h": torch.ones(2).bfloat16()}
    found = average(folders(tmp_path, weights))
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in weights.items()
    )


def test_a_damaged_checkpoint_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    model, optimizer = torch.nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)])
    for step in (1, 2, 3):
        save(tmp_path, model, optimizer, Progress(step=step), keep=3, main=True)
    damaged = tmp_path / "checkpoints" / "step-2"
    (damaged / "model.safetensors").write_bytes(b"x")
    found, (problem,) = whole(lasting(tmp_path))
    assert [folder.name for folder in found] == ["step-3", "step-1"]
    assert problem.startswith(f"{damaged} cannot be read (model.safetensors has 1 bytes")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        average([])


def test_another_model_or_a_broken_file_is_a_sentence(tmp_path: Path) -> None:
    made = folders(tmp_path, {"w": torch.zeros(2)}, {"w": torch.zeros(3)}, {"v": torch.zeros(2)})
    for other in made[1:]:
        with pytest.raises(CheckpointError, match="holds another model than"):
            average([made[0], other])
    (made[1] / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        average(made)
