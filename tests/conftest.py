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

train_jepa.MIN_BATCHES = 1  # few data are for quick tests
torch.set_num_threads(1)  # two oversubscribe a busy machine and are no faster on small worlds


def mutated(content, rng, places=()):
    """Bits flipped, bytes overwritten, removed, doubled, cut off, or two members swapped
    whose headers begin at `places` [(offset, size)]."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 3))):
        at, kind = rng.randrange(len(content)), rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at + 8] = rng.randbytes(8)
        elif kind == 2:
            del content[at:at + rng.randrange(1, 40)]
        elif kind == 3:
            content[at:at] = content[rng.randrange(len(content)):][:rng.randrange(1, 40)]
        elif kind == 4 and rng.random() < 0.2:
            del content[at:]
        elif kind == 5 and places:
            (a, size_a), (b, size_b) = sorted(rng.sample(places, 2))
            size = min(size_a, size_b) + 30  # with the fixed part of the header
            content[a:a + size], content[b:b + size] = content[b:b + size], content[a:a + size]
    return bytes(content)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with a small collected world, to which train_jepa also writes: its path."""
    monkeypatch.setattr(collect_minigrid_data, "ENV_ID", "MiniGrid-Empty-5x5-v0")
    monkeypatch.setattr(collect_minigrid_data, "DATA_FILE", str(tmp_path / "data.npz"))
    monkeypatch.setattr(collect_minigrid_data, "NUM_EPISODES", 60)
    monkeypatch.setattr(collect_minigrid_data, "MAX_STEPS_PER_EPISODE", 10)
    monkeypatch.setattr(collect_minigrid_data, "NUM_WORKERS", 1)
    monkeypatch.setattr(train_jepa, "HERE", tmp_path)
    collect_minigrid_data.main()
    return tmp_path
