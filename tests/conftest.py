"""Makes the scripts importable, and a small world for them in tmp_path."""

import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import collect_minigrid_data  # noqa: E402
import train_jepa  # noqa: E402

REST = {"epoch": 1, "history": [], "settings": {}, "data": {}}  # what a checkpoint has to hold

torch.set_num_threads(1)  # two oversubscribe a busy machine and are no faster on small worlds


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with a small collected world, to which train_jepa also writes: its path."""
    monkeypatch.setattr(collect_minigrid_data, "ENV_ID", "MiniGrid-Empty-5x5-v0")
    monkeypatch.setattr(collect_minigrid_data, "DATA_FILE", str(tmp_path / "data.npz"))
    monkeypatch.setattr(collect_minigrid_data, "NUM_EPISODES", 60)
    monkeypatch.setattr(collect_minigrid_data, "NUM_WORKERS", 1)
    monkeypatch.setattr(train_jepa, "HERE", tmp_path)
    monkeypatch.setattr(train_jepa, "EPOCHS", 3)
    monkeypatch.setattr(train_jepa, "DYNAMICS_EPOCHS", 2)
    collect_minigrid_data.main()
    return tmp_path
