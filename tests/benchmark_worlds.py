"""Many worlds, one recipe: how far the scripts come where nothing but ENV_ID is edited.

    python3 tests/benchmark_worlds.py                                       # all of WORLDS
    python3 tests/benchmark_worlds.py MiniGrid-Unlock-v0 BabyAI-GoToLocal-v0

Trains, inspects and plans, world by world, each stage in a process of its own with one thread, in
data/worlds/<world>/ (some 30 MB each). Writes data/worlds.json after each stage and goes on from
there when it is run again; what other scripts or settings made is made anew. In the end it prints a
Markdown table and draws figures/worlds.png, both of all worlds measured so far. A world that fails
has its error in the table, and is tried again by the next run.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import collect_minigrid_data as collect  # noqa: E402
import inspect_jepa_model  # noqa: E402
import plan_with_jepa  # noqa: E402
import train_jepa  # noqa: E402

SIDE_BY_SIDE = 1   # worlds at a time, one core each
PLAN_MINUTES = 2   # of a world, then no further task is begun: searches that fail take their time
# {script: {constant: value}}; the rest as it is
SETTINGS = {"train_jepa": {"SEED": 6}, "plan_with_jepa": {"NUM_TASKS": 30}}
WORLDS = """
    MiniGrid-MultiRoom-N4-S5-v1 MiniGrid-MultiRoom-N2-S4-v0 BabyAI-UnlockLocal-v0
    MiniGrid-FourRooms-v0 MiniGrid-LockedRoom-v0 MiniGrid-Playground-v0 MiniGrid-MemoryS13Random-v0
    BabyAI-FindObjS5-v0 MiniGrid-RedBlueDoors-8x8-v0 MiniGrid-ObstructedMaze-1Dlhb-v0
    MiniGrid-BlockedUnlockPickup-v0 MiniGrid-UnlockPickup-v0 MiniGrid-Unlock-v0
    MiniGrid-KeyCorridorS3R3-v0 MiniGrid-DoorKey-8x8-v0 MiniGrid-Fetch-8x8-N3-v0
    MiniGrid-PutNear-8x8-N3-v0 MiniGrid-GoToDoor-8x8-v0 MiniGrid-GoToObject-8x8-N2-v0
    MiniGrid-Dynamic-Obstacles-8x8-v0 MiniGrid-SimpleCrossingS9N2-v0 MiniGrid-LavaCrossingS9N2-v0
    MiniGrid-LavaGapS7-v0 MiniGrid-DistShift2-v0 MiniGrid-Empty-Random-6x6-v0 BabyAI-GoToLocal-v0
    BabyAI-PickupLoc-v0 BabyAI-PutNextLocal-v0 BabyAI-OpenRedDoor-v0 BabyAI-OneRoomS8-v0
    BabyAI-GoToRedBallNoDists-v0
""".split()        # the large ones first, so that they do not end last
NEEDS = ("toggle", "key", "carried thing")
DATA, LOCK = REPO / "data", threading.Lock()


# ---------------------------------------------------- the stages, each in a process of its own
def train(folder):
    if not (folder / "loss.png").exists():  # what training ends with
        train_jepa.main()  # collects first
    contents = train_jepa.read_checkpoint(folder / "jepa_world_model.pt")
    return {"minutes": sum(epoch["seconds"] for epoch in contents["history"]) / 60}


def inspect(folder):
    inspect_jepa_model.main()
    report = json.loads((folder / "inspection.json").read_text())
    score, simulator = report["checkpoints"]["jepa"], report["controls"].get("simulator", {})
    return {**{key: score.get(key) for key in ("hit@1", "hit@1 strict", "probes", "verdict")},
            "simulator": simulator.get("hit@1")}


def plan(folder):
    """The rows "JEPA, search" and "oracle" of plan_with_jepa.py, task by task."""
    def search(task, obs, goal, step):
        return plan_with_jepa.follow(models["JEPA"], obs, goal, step)

    world, models = plan_with_jepa.prepare()
    end, attempts = time.monotonic() + 60 * PLAN_MINUTES, []
    while len(attempts) < plan_with_jepa.NUM_TASKS and time.monotonic() < end:
        task = plan_with_jepa.make_task(world, len(attempts))
        attempts.append([plan_with_jepa.attempt(world, task, policy)
                         for policy in (search, plan_with_jepa.oracle_policy)])
    row, oracle = (plan_with_jepa.summarise("", some) for some in zip(*attempts))
    needs = {need: [t["success"] for t in row["by_task"] if t[need]] for need in NEEDS}
    return {**{key: row[key] for key in ("tasks", "success_rate", "spl")}, "random": world.random,
            "oracle": oracle["success_rate"],
            "needs": {need: f"{sum(of)} of {len(of)}" for need, of in needs.items() if of}}


def work(stage, env_id, folder, settings):
    """One stage of one world; what it found goes to <folder>/<stage>.json."""
    for name, values in settings.items():
        vars(importlib.import_module(name)).update(values)
    folder = Path(folder)
    collect.ENV_ID, collect.ROOT, collect.NUM_WORKERS = env_id, folder, 1
    train_jepa.HERE = inspect_jepa_model.HERE = plan_with_jepa.HERE = folder
    (folder / f"{stage}.json").write_text(json.dumps(STAGES[stage](folder)))


STAGES = {"train": train, "inspect": inspect, "plan": plan}


# ----------------------------------------------------------------------------- world by world
def made_by(stage):
    """A digest of the scripts and settings that decide what a stage finds."""
    names = ["collect_minigrid_data", "minigrid_dataset", "world_model_jepa", "train_jepa"]
    names += {"inspect": ["inspect_jepa_model"], "plan": ["plan_with_jepa"]}.get(stage, [])
    text = [(REPO / f"{name}.py").read_text() + repr(SETTINGS.get(name)) for name in names]
    return hashlib.sha256("".join(text).encode()).hexdigest()[:16]


def run_stage(stage, env_id, folder):
    """-> what the stage found, or {"error": with the last line that it printed}."""
    code = "import json, sys; import tests.benchmark_worlds as b; b.work(*json.loads(sys.argv[1]))"
    arguments, log = json.dumps([stage, env_id, str(folder), SETTINGS]), folder / f"{stage}.log"
    with log.open("a") as file:
        status = subprocess.call([sys.executable, "-c", code, arguments], cwd=REPO, stdout=file,
                                 stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if status == 0:
        return json.loads((folder / f"{stage}.json").read_text())
    last = [line.strip() for line in log.read_text().splitlines() if line.strip()][-1:]
    return {"error": f"{stage} failed ({status}) {''.join(last)}"}


def run_world(env_id, rows):
    """The stages of a world that are not done yet; each is noted in `rows` and saved."""
    row, folder = rows.setdefault(env_id, {}), DATA / "worlds" / env_id.replace(":", "_")
    now = {stage: made_by(stage) for stage in STAGES}

    def note(stage, found):
        with LOCK:
            row[stage] = {"made_by": now[stage], **found}
            collect.write_atomically(DATA / "worlds.json", lambda path: path.write_text(
                json.dumps(rows, indent=1)))

    if row.get("train", {}).get("made_by") != now["train"]:
        shutil.rmtree(folder, ignore_errors=True)  # else training goes on from another build's
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if row.get(stage, {}).get("made_by") == now[stage] and "error" not in row[stage]:
            continue
        note(stage, {"error": f"{stage} was stopped"})
        note(stage, run_stage(stage, env_id, folder))
        print(f"{time.strftime('%X')} {env_id}: {row[stage].get('error', stage)}", flush=True)
        if "error" in row["train"]:
            break


# ------------------------------------------------------------------- the table and the picture
def share(*values):
    """(0.5, 1.0) -> ".500 / 1.000"."""
    return " / ".join("-" if x is None else f"{x:.3f}".removeprefix("0") for x in values)


def one_and_ten(curve):
    return share(curve[0], curve[9]) if curve else "-"


def print_table(rows):
    """{world: {stage: what it found}} as Markdown, a line a world."""
    lines = [["world", "minutes", "hit@1 strict, 1 / 10", "hit@1, 1 / 10", "probes",
              "plans, success / SPL of tasks", *(f"with a {need}" for need in NEEDS), "notes"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        its = {key: value for found in row.values() for key, value in found.items()}
        probes = {fact: known["0"] for fact, known in (its.get("probes") or {}).items()}
        if "agent pose" in probes:  # the two at once
            del probes["agent cell"], probes["agent direction"]
        notes = [found["error"].replace("|", "/") for found in row.values() if "error" in found]
        if its.get("simulator"):
            notes.append(f"random: the simulator itself {one_and_ten(its['simulator'])}")
        if its.get("oracle", 1) < 1:
            what = "the path of one future" if its["random"] else "the oracle"
            notes.append(f"{what} {share(its['oracle'])}")
        lines.append([
            name.removeprefix("MiniGrid-"), f"{its['minutes']:.1f}" if "minutes" in its else "-",
            one_and_ten(its.get("hit@1 strict")), one_and_ten(its.get("hit@1")),
            ", ".join(f"{fact} {share(known)}" for fact, known in probes.items()),
            f"{share(its['success_rate'], its['spl'])} of {its['tasks']}" if "spl" in its else "-",
            *(its.get("needs", {}).get(need, "-") for need in NEEDS), "; ".join(notes)])
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def draw(path, rows):
    """hit@1 among all held-out frames, after one and after ten steps: a row a world."""
    found = {name: row["inspect"] for name, row in rows.items()
             if row.get("inspect", {}).get("hit@1")}
    ends = {name: [its["hit@1"][k] or 0 for k in (9, 0)] for name, its in found.items()}
    names = sorted(ends, key=ends.get)
    figure = Figure(figsize=(8, 0.25 * len(names) + 1.4), layout="constrained")
    axis, places = figure.subplots(), range(len(names))
    for y, name in enumerate(names):
        axis.plot(ends[name], [y, y], color="#999999", lw=2, zorder=1)
    for k, colour in ((1, "#0072B2"), (0, "#E69F00")):
        axis.scatter([ends[name][k] for name in names], places, color=colour,
                     label="1 step ahead" if k else "10 steps ahead")
    reached = [(found[name]["simulator"][k] or 0, y) for y, name in enumerate(names)
               for k in (0, 9) if found[name]["simulator"]]
    if reached:
        axis.plot(*np.transpose(reached), "k|", ms=11, label="a random world's own simulator")
    axis.set(yticks=places, yticklabels=names, xlim=(-0.02, 1.02), ylim=(-1, len(names)),
             xlabel="hit@1 among all held-out frames")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)


def main():
    file = DATA / "worlds.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    try:
        list(pool.map(lambda env_id: run_world(env_id, rows), sys.argv[1:] or WORLDS))
    except KeyboardInterrupt:  # the stages that run have heard it too
        os._exit(130)
    now = {stage: made_by(stage) for stage in STAGES}
    rows = {name: {stage: found for stage, found in rows[name].items()
                   if found["made_by"] == now[stage]} for name in [*WORLDS, *rows] if name in rows}
    print_table(rows)
    collect.write_atomically(REPO / "figures/worlds.png", lambda path: draw(path, rows))


if __name__ == "__main__":
    main()
