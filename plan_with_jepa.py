"""Reach goals given only as images, by searching over imagined latents of the world model.

    python3 plan_with_jepa.py

Reads:  jepa_world_model.pt, and reconstruction_world_model.pt if it is there.
Writes: plan.json and plan.png beside this script.

A task is a layout never trained on, a start pose and another pose (cell and direction) that can be
reached; the goal is the image that the environment would show there. The planner sees two images
and the model: no simulator, no labels, no decoder. A task is solved when the real environment is in
the goal pose within twice the oracle's path length plus 10 actions. The oracle is a breadth-first
search that steps the real simulator.

MiniGrid ends an episode on its green goal tile, so no task starts or ends there and the oracle does
not cross it. The planner knows of it what the model has learnt (predict_end): walking onto that
tile is a failure.
"""

import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, so no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from collect_minigrid_data import CollectError, Recorder, env_seed, make_env, pixels, render_frames
from world_model_jepa import (
    CheckpointError,
    build_model,
    pick_device,
    read_checkpoint,
    write_atomically,
)

# ---------------------------------------------------------------------------------------------
# Settings: edit and rerun. The environment is the one that the checkpoint was trained on.
# ---------------------------------------------------------------------------------------------
NUM_TASKS = 200
CONTROL_TASKS = 20   # the first of them, for the slow controls: CEM and the other models
SEED = 1000          # of the tasks; must differ from the data's, whose layouts were trained on
END_ODDS = (0.5, 0.9, 1.0)  # states likelier than this to end the episode are not crossed; the
                            # next odds count where these leave no way to the goal
MAX_STATES = 2500    # imagined states per search; FourRooms has about 1,040
STILL_SHARE = 0.5    # scale of the still part when latents are compared: it does not tell poses
                     # apart, and more than half of the drift of imagined latents is in it
ONE_STATE, TWO_STATES = 0.015, 0.1  # 1 - cosine: below, latents are one state; above, two states

HERE = Path(__file__).resolve().parent
MOVES = (0, 1, 2)    # left, right, forward: all that changes a pose, for oracle and random policy


# ---------------------------------------------------------------------------------------------
# 1. The planner: images and the model, nothing else
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def plan_actions(model, obs, goal_obs, max_actions=100, experience=()):
    """Breadth-first search over imagined latents: the shortest imagined way to the goal's image.

    Every action is imagined from every latent of the frontier, in one batch. What was met before is
    merged with it, so no-ops, blocked moves and detours drop out, and a world of 1,000 poses can be
    searched whole.

    Args:
        obs, goal_obs: (3, H, W) float in [0, 1], what the environment shows now and at the goal.
        max_actions: longest plan.
        experience: (z, action, z_next) of real steps so far, latents (D,) and an int. What really
            happened replaces what the model imagines there.

    Returns: list of action numbers, at most max_actions; [] where obs already looks like the goal.
        If the goal is not met, the way to the imagined state most similar to it, among those where
        no real step began.
    """
    device = next(model.parameters()).device
    start = model.encode(obs[None].to(device))                          # (1, D)
    goal = model.encode_target(goal_obs[None].to(device))               # (1, D)
    together = similarity(model, start, goal).item()
    if together > 1 - ONE_STATE:
        return []
    same = max(same_state(model, start), (1 + together) / 2)  # start and goal are two states
    plans = []
    for end_odds in END_ODDS:
        plan, closed = search(model, start, goal, same, end_odds, max_actions, experience)
        plans.append(plan)
        if not closed:
            return plan
    return next((plan for plan in plans if plan), [])


def search(model, start, goal, same, end_odds, max_actions, experience):
    """plan_actions from latents start (1, D) to goal (1, D) -> the plan, and whether every state
    that can be imagined was met without the goal among them."""
    device, A = start.device, model.arguments["num_actions"]
    z_real, a_real, z_next_real = zip((start[0], 0, start[0]), *experience)
    z_real, z_next_real = torch.stack(z_real), torch.stack(z_next_real)  # (M + 1, D); first: here
    a_real = torch.tensor(a_real, device=device)
    states = start.new_empty(MAX_STATES, start.shape[1])
    states[0], parents = start[0], [(0, None)]                          # (state, action) each
    every_action = torch.arange(A, device=device)
    best, nearest, first = 0, -1.0, 0                                   # first: of the frontier
    for _ in range(max_actions):
        z, count = states[first:len(parents)], len(parents)             # (F, D)
        if nearest > same or not len(z) or count == MAX_STATES:
            break
        z_next = model.predict_next(z[:, None], every_action)           # (F, A, D)
        f, m = (similarity(model, z, z_real[1:]) > same).nonzero().T
        z_next[f, a_real[1:][m]] = z_next_real[1:][m]
        z_next = z_next.flatten(0, 1)
        new = (similarity(model, z_next, states[:count]).amax(1) <= same).nonzero()[:, 0]
        # No way leads on from where the model expects the episode to end.
        to_goal = similarity(model, z_next, goal)[:, 0]                 # (F * A,)
        new = new[(model.predict_end(z_next[new]) <= end_odds) | (to_goal[new] > same)]
        new = new[first_of_each(model, z_next[new], same)][:MAX_STATES - count]
        parents += [(first + i // A, i % A) for i in new.tolist()]
        states[count:len(parents)], first = z_next[new], count
        if len(new):
            been = similarity(model, z_next[new], z_real).amax(1) > same
            closest, i = to_goal[new].masked_fill(been, -1).max(0)
            if closest > nearest:
                best, nearest = first + i.item(), closest.item()
    plan = []
    while best:
        best, action = parents[best]
        plan.append(action)
    return plan[::-1], nearest <= same and first == len(parents)


def similarity(model, a, b):
    """Cosines (N, M) of latents (N, D) and (M, D), their still part scaled by STILL_SHARE."""
    share = torch.ones(a.shape[1], device=a.device)
    share[model.moving_dim:] = STILL_SHARE
    return F.normalize(a * share, dim=1) @ F.normalize(b * share, dim=1).T


def same_state(model, z):
    """The cosine above which two latents near z (1, D) are taken for one state: a float.

    Imagining all sequences of three actions from z meets most states several times: by way of
    no-ops, blocked moves, turns there and back. So the distances 1 - cosine between what is met
    fall into two heaps, one state imagined twice or two states, and the line goes through the
    widest relative gap: no label is needed, and it follows each model's own scale.
    """
    actions = torch.arange(model.arguments["num_actions"], device=z.device)
    met = [z]
    for _ in range(3):
        met.append(model.predict_next(met[-1][:, None], actions).flatten(0, 1))
    met = torch.cat(met)                                                # (1 + A + A^2 + A^3, D)
    distance = (1 - similarity(model, met, met)).flatten()
    distance = distance.clamp(ONE_STATE, TWO_STATES).sort().values
    gap = (distance[1:] / distance[:-1]).argmax()
    return 1 - (distance[gap] * distance[gap + 1]).sqrt().item()


def first_of_each(model, z, same):
    """(N, D) -> (N,) bool: false for each latent that is the same state as an earlier kept one."""
    twins = (similarity(model, z, z) > same).triu(1).cpu().numpy()
    keep = np.ones(len(z), bool)
    for i, row in enumerate(twins):
        if keep[i]:
            keep &= ~row
    return torch.from_numpy(keep).to(z.device)


@torch.no_grad()
def plan_with_cem(model, obs, goal_obs, max_actions=20, experience=()):
    """Categorical cross-entropy method, for comparison: same contract as plan_actions.

    Samples action sequences from independent categoricals, one per step; refits them to the tenth
    whose imagined latents come nearest to the goal at any step. (Rubinstein 1999; for planning in
    latents e.g. Hafner et al. 2019.) Returns the best sequence up to its nearest step.
    """
    samples, rounds, horizon = 256, 4, min(max_actions, 20)
    device = next(model.parameters()).device
    A = model.arguments["num_actions"]
    goal = model.encode_target(goal_obs[None].to(device))[0]
    z_now = model.encode(obs[None].to(device))
    odds = torch.full((horizon, A), 1 / A, device=device)
    best, best_score = [], (z_now[0] @ goal).item()
    for _ in range(rounds):
        tries = torch.multinomial(odds, samples, replacement=True).T    # (samples, horizon)
        z, scores = z_now.expand(samples, -1), []
        for t in range(horizon):
            z = model.predict_next(z, tries[:, t])
            scores.append(z @ goal - 1e-3 * t)                          # the sooner the better
        score, steps = torch.stack(scores, 1).max(1)                    # (samples,) each
        elite = score.topk(samples // 10).indices
        if score[elite[0]] > best_score:
            best_score = score[elite[0]].item()
            best = tries[elite[0], :steps[elite[0]] + 1].tolist()
        counts = F.one_hot(tries[elite], A).float().mean(0)                 # (horizon, A)
        odds = 0.1 * odds + 0.9 * counts
    return best


@torch.no_grad()
def follow(model, planner, obs, goal_obs, step, max_actions):
    """Plan, act, look; plan again as soon as what is seen is not what was imagined.

    Args:
        planner: plan_actions or plan_with_cem.
        step: step(action) acts in the real environment and returns the next image (3, H, W), or
            None at the end.

    Returns: what was imagined, one latent (D,) per real step, and the seconds of each decision.
    """
    device = next(model.parameters()).device
    imagined, seconds, experience = [], [], []
    while obs is not None and len(imagined) < max_actions:
        began = time.perf_counter()
        plan = planner(model, obs, goal_obs, max_actions - len(imagined), experience)
        seconds.append(time.perf_counter() - began)
        if not plan:
            break
        z = z_real = model.encode(obs[None].to(device))                 # (1, D)
        same = same_state(model, z)
        for action in plan:
            z = model.predict_next(z, torch.tensor([action], device=device))
            imagined.append(z[0])
            obs = step(action)
            if obs is None:
                break
            z_before, z_real = z_real, model.encode(obs[None].to(device))
            experience.append((z_before[0], action, z_real[0]))
            if similarity(model, z, z_real) < same:
                break
    return imagined, seconds


# ---------------------------------------------------------------------------------------------
# 2. Tasks in the real environment, and the oracle
# ---------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A layout, two poses (x, y, direction) in it, and the oracle's actions between them."""

    number: int
    start: tuple
    goal: tuple
    oracle: list

    @property
    def max_actions(self):
        return 2 * len(self.oracle) + 10


def pose_of(env):
    return (int(env.agent_pos[0]), int(env.agent_pos[1]), int(env.agent_dir))


def place(env, pose):
    env.agent_pos, env.agent_dir = pose[:2], pose[2]


def image_of(env, tile_size):
    """What RGBImgObsWrapper would show now, as (3, H, W) float in [0, 1]."""
    frame = env.get_frame(highlight=env.highlight, tile_size=tile_size)
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def oracle_tree(env, start):
    """Breadth-first search by stepping the real simulator: {pose: (pose before, action)}.

    A pose that ends the episode (goal tile, lava) is neither kept nor crossed. Exact where moving
    changes nothing but the pose, as in all worlds without doors, objects to push or other agents.
    """
    tree, queue = {start: None}, deque([start])
    while queue:
        pose = queue.popleft()
        for action in MOVES:
            place(env, pose)
            terminated = env.step(action)[2]
            after = pose_of(env)
            if not terminated and after not in tree:
                tree[after] = (pose, action)
                queue.append(after)
    return tree


def oracle_path(tree, goal):
    """The shortest action list from the tree's root to `goal`."""
    path = []
    while tree[goal] is not None:
        goal, action = tree[goal]
        path.append(action)
    return path[::-1]


def make_task(env, number):
    """Task `number` of SEED; `env` is left in its layout."""
    env.reset(seed=env_seed(SEED, number))
    rng = np.random.default_rng((SEED, number))
    poses = sorted(oracle_tree(env, pose_of(env)))
    start = poses[rng.integers(len(poses))]
    tree = oracle_tree(env, start)
    others = sorted(set(tree) - {start})
    goal = others[rng.integers(len(others))]
    return Task(number, start, goal, oracle_path(tree, goal))


def attempt(env, task, policy, look):
    """Lets policy(obs, goal_obs, step, max_actions) act for real -> dict of what came of it."""
    env.reset(seed=env_seed(SEED, task.number))
    place(env, task.goal)
    goal_obs = look(env)
    place(env, task.start)
    trace = [task.start]

    def step(action):
        terminated = env.step(action)[2]
        trace.append(pose_of(env))
        over = terminated or trace[-1] == task.goal or len(trace) > task.max_actions
        return None if over else look(env)

    imagined, seconds = policy(look(env), goal_obs, step, task.max_actions)
    return {"task": task, "trace": trace, "imagined": imagined, "seconds": seconds,
            "success": trace[-1] == task.goal, "steps": len(trace) - 1}


def spl(successes, shortest, taken):
    """Success weighted by path length (Anderson et al. 2018): 1 if all take the shortest way."""
    ratios = [s * n / max(n, t) for s, n, t in zip(successes, shortest, taken, strict=True)]
    return float(np.mean(ratios))


# ---------------------------------------------------------------------------------------------
# 3. The comparison
# ---------------------------------------------------------------------------------------------


def load(path):
    """Checkpoint path -> (model on the device, metadata of the data that it was trained on).

    Raises:
        CheckpointError: as load_checkpoint, or the data file did not name its environment.
    """
    contents = read_checkpoint(path)
    model = build_model(contents, path).to(pick_device())
    try:
        metadata = contents["data"]["metadata"]
        metadata["env_id"], metadata["tile_size"], metadata["seed"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} was trained on data that do not name their environment: run "
                              "python3 collect_minigrid_data.py, then train_jepa.py") from None
    return model, metadata


def random_policy(obs, goal_obs, step, max_actions):
    """Left, right and forward with equal odds; the other four actions would only lose time."""
    rng = np.random.default_rng(SEED)
    while obs is not None:
        obs = step(int(rng.choice(MOVES)))
    return [], []


def follow_oracle(task):
    """The policy that takes the oracle's path: its row checks the oracle for real."""
    def policy(obs, goal_obs, step, max_actions):
        for action in task.oracle:
            step(action)
        return [], []
    return policy


def blind(env):
    """In place of image_of, for policies that do not look: rendering is most of their time."""
    return True


def summarise(name, attempts, seconds):
    """The attempts of one row -> the dict that the table and plan.json show."""
    decisions = [s for a in attempts for s in a["seconds"]]
    shortest = [len(a["task"].oracle) for a in attempts]
    return {
        "name": name, "tasks": len(attempts),
        "successes": sum(a["success"] for a in attempts),
        "success_rate": float(np.mean([a["success"] for a in attempts])),
        "spl": spl([a["success"] for a in attempts], shortest, [a["steps"] for a in attempts]),
        "mean_steps": float(np.mean([a["steps"] for a in attempts])),
        "mean_oracle_steps": float(np.mean(shortest)),
        "decisions": len(decisions),
        "seconds_per_decision": float(np.mean(decisions)) if decisions else None,
        "slowest_decision": max(decisions, default=None),
        "seconds": seconds,
        "by_task": [{"oracle_steps": n, "steps": a["steps"], "success": a["success"]}
                    for n, a in zip(shortest, attempts)],
    }


def compare(env, tile_size, models):
    """Runs every row of the table; models: {name: model}. -> {name: attempts}, [summary, ...]."""
    def search(model, planner=plan_actions):
        return lambda obs, goal, step, n: follow(model, planner, obs, goal, step, n)

    jepa = models["JEPA"]
    torch.manual_seed(SEED)
    untrained = type(jepa)(**jepa.arguments).to(pick_device()).eval()
    tasks = [make_task(env, n) for n in tqdm(range(NUM_TASKS), "tasks", leave=False)]
    few = tasks[:CONTROL_TASKS]
    rows = [(f"{name}, search", search(model), tasks if model is jepa else few)
            for name, model in models.items()]
    rows += [
        ("JEPA, CEM", search(jepa, plan_with_cem), few),
        ("untrained, search", search(untrained), few),
        ("random policy", random_policy, tasks),
    ]
    attempts, summaries = {}, []
    for name, policy, some in rows:
        began = time.perf_counter()
        look = blind if policy is random_policy else lambda env: image_of(env, tile_size)
        attempts[name] = [attempt(env, t, policy, look) for t in tqdm(some, name, leave=False)]
        summaries.append(summarise(name, attempts[name], time.perf_counter() - began))
    began = time.perf_counter()
    attempts["oracle"] = [attempt(env, t, follow_oracle(t), blind) for t in tasks]
    summaries.append(summarise("oracle", attempts["oracle"], time.perf_counter() - began))
    return attempts, summaries


def print_table(env_id, rows):
    print(f"{env_id}: from one pose to another, told by an image only\n")
    print(f"{'':24s}   tasks   success     SPL   actions   s / decision   total s")
    for r in rows:
        per = "" if r["seconds_per_decision"] is None else f"{r['seconds_per_decision']:.3f}"
        print(f"{r['name']:24s} {r['tasks']:7d} {r['success_rate']:9.3f} {r['spl']:7.3f} "
              f"{r['mean_steps']:9.1f} {per:>14s} {r['seconds']:9.1f}")


# ---------------------------------------------------------------------------------------------
# 4. The picture. Only here is the simulator asked what an imagined latent looks like.
# ---------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"  # told apart by colour-blind readers
FRAMES = 6                                            # imagined frames per task


def choose(attempts):
    """Four attempts to show: solved ones from short to long, and a failure if there is one."""
    solved = sorted((a for a in attempts if a["success"]), key=lambda a: len(a["task"].oracle))
    failed = [a for a in attempts if not a["success"] and a["imagined"]][:1]
    places = np.linspace(0.2, 0.98, 4 - len(failed)) * len(solved)
    return [solved[int(p)] for p in places if solved] + failed


@torch.no_grad()
def imagined_frames(env, model, result, tile_size):
    """[(after how many actions, image, its pose), ...], FRAMES at most.

    The image is the real frame of this layout whose target latent is nearest to the imagined one.
    """
    # With the trace: its last pose may be on the tile that ends the episode.
    poses = list(dict.fromkeys([*oracle_tree(env, result["task"].start), *result["trace"]]))
    recorder = Recorder()
    for pose in poses:
        place(env, pose)
        recorder.look(env, 0)
    images = pixels(*render_frames(env, recorder, tile_size))           # (K, H, W, 3) uint8
    device = next(model.parameters()).device
    frames = torch.from_numpy(images).permute(0, 3, 1, 2)
    chunks = [f.to(device).float() / 255 for f in frames.split(256)]
    targets = torch.cat([model.encode_target(f) for f in chunks])      # (K, D)
    steps = np.linspace(1, len(result["imagined"]), FRAMES).round().astype(int)
    shown = []
    for n in sorted(set(steps.tolist())):
        nearest = (targets @ result["imagined"][n - 1]).argmax().item()
        shown.append((n, images[nearest], poses[nearest]))
    return shown


def draw_frame(axis, image, pose, tile_size):
    """An image and, since the agent is a few pixels, a ring around it."""
    axis.imshow(image)
    x, y = ((c + 0.5) * tile_size - 0.5 for c in pose[:2])
    axis.plot(x, y, "o", ms=13, mfc="none", mec=ORANGE, mew=2)


def draw_map(axis, env, result):
    """The layout without its agent, and over it the path that was really taken."""
    task, tile = result["task"], 16
    axis.imshow(env.grid.render(tile, agent_pos=(-1, -1)))
    x, y = (np.array(result["trace"])[:, :2].T + 0.5) * tile
    axis.plot(x, y, color=ORANGE, lw=2.5, solid_joinstyle="round")
    for pose, colour in ((task.start, "white"), (task.goal, "#56B4E9")):
        angle = -90 - 90 * pose[2]  # matplotlib's triangle points up, direction 0 is right
        axis.plot((pose[0] + 0.5) * tile, (pose[1] + 0.5) * tile, marker=(3, 0, angle), ms=11,
                  color=colour, mec="black", zorder=3)


def draw(path, env, model, tile_size, attempts, rows, name="JEPA, search"):
    """plan.png: a few tasks, one a row, and success against the oracle's path length."""
    shown = choose(attempts[name])
    figure = plt.figure(figsize=(14, 1.9 * len(shown) + 4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9 * len(shown) or 0.1, 4))
    if shown:
        grid = top.subplots(len(shown), 3 + FRAMES, squeeze=False)
    for axes, result in zip(grid if shown else [], shown):
        task = result["task"]
        env.reset(seed=env_seed(SEED, task.number))
        for axis, pose in zip(axes, (task.start, task.goal)):
            place(env, pose)
            draw_frame(axis, image_of(env, tile_size).permute(1, 2, 0), pose, tile_size)
        imagined = imagined_frames(env, model, result, tile_size)
        draw_map(axes[2], env, result)
        end, best = "solved" if result["success"] else "FAILED", len(task.oracle)
        axes[0].set_ylabel(f"{end}\n{result['steps']} actions\n(oracle {best})", size=13)
        for axis, text in zip(axes, ("start", "goal image", "path taken")):
            axis.set_title(text, size=13)
        for axis, (n, image, pose) in zip(axes[3:], imagined):
            draw_frame(axis, image, pose, tile_size)
            came_true = pose == result["trace"][n]
            axis.set_title(f"imagined {n}" if came_true else f"{n}: mistaken", size=13,
                           color="black" if came_true else "#D55E00")
        for axis in axes[3 + len(imagined):]:
            axis.set_visible(False)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    draw_success(bottom.subplots(1, 2, width_ratios=(3, 2)), rows)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))
    plt.close(figure)


def draw_success(axes, rows):
    """Left: success against the oracle's path length. Right: success and SPL of every row."""
    styles = {"JEPA, search": (BLUE, "o-"), "random policy": (GREY, "s--")}
    longest = max(t["oracle_steps"] for t in rows[0]["by_task"])
    width = max(1, -(-(longest + 1) // 8))
    for row in rows:
        if row["name"] not in styles:
            continue
        colour, style = styles[row["name"]]
        bins = {}
        for t in row["by_task"]:
            bins.setdefault(t["oracle_steps"] // width, []).append(t["success"])
        x = [(b + 0.5) * width for b in sorted(bins)]
        axes[0].plot(x, [np.mean(bins[b]) for b in sorted(bins)], style, color=colour, lw=2, ms=8,
                     label=row["name"])
        if row is rows[0]:
            for b, at in zip(sorted(bins), x):
                axes[0].text(at, 1.06, f"{len(bins[b])}", size=13, ha="center", color="#555555")
    axes[0].set(ylim=(0, 1.13), xlim=(0, None))
    axes[0].set_xlabel("oracle's path length, actions (on top: how many tasks)", size=13)
    axes[0].set_ylabel("success rate", size=13)
    axes[0].legend(fontsize=13, loc="center right")
    y = np.arange(len(rows))[::-1]
    axes[1].barh(y + 0.2, [r["success_rate"] for r in rows], 0.38, color=BLUE, label="success")
    axes[1].barh(y - 0.2, [r["spl"] for r in rows], 0.38, color=ORANGE, label="SPL")
    for at, r in zip(y, rows):
        for key, y_text in (("success_rate", at + 0.2), ("spl", at - 0.2)):
            axes[1].text(r[key] + 0.01, y_text, f"{r[key]:.2f}", va="center", size=12)
    axes[1].set_yticks(y, [r["name"] for r in rows], size=13)
    axes[1].set_xlim(0, 1.12)
    axes[1].legend(fontsize=12, loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1), frameon=False)
    for axis in axes:
        axis.tick_params(labelsize=13)
        axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------


def prepare():
    """-> env, metadata, {name: model}. Raises CheckpointError or CollectError."""
    for name in ("NUM_TASKS", "CONTROL_TASKS"):
        if type(globals()[name]) is not int or globals()[name] < 1:
            raise CheckpointError(f"{name} is {globals()[name]!r}: make it a whole number of at "
                                  "least 1 in plan_with_jepa.py")
    path = HERE / "jepa_world_model.pt"
    model, metadata = load(path)
    if SEED == metadata["seed"]:
        raise CheckpointError(f"SEED is {SEED}, the seed of the training data: change it in "
                              "plan_with_jepa.py, or the layouts are not held out")
    env = make_env(metadata["env_id"])
    env.reset(seed=0)
    size = (env.height * metadata["tile_size"], env.width * metadata["tile_size"])
    if tuple(model.arguments["image_size"]) != size:
        raise CheckpointError(f"{path} expects images of {model.arguments['image_size']} pixels, "
                              f"{metadata['env_id']} shows {size}: run python3 train_jepa.py")
    models = {"JEPA": model}
    other = HERE / "reconstruction_world_model.pt"
    if other.exists():
        models["reconstruction"], its = load(other)
        if any(its[k] != metadata[k] for k in ("env_id", "tile_size")):
            raise CheckpointError(f"{other} was trained on {its['env_id']} at another tile size or "
                                  f"not on {metadata['env_id']}: move it away or train it again")
    return env, metadata, models


def main():
    try:
        env, metadata, models = prepare()
        attempts, rows = compare(env, metadata["tile_size"], models)
        print_table(metadata["env_id"], rows)
        result = {
            "env_id": metadata["env_id"],
            "settings": {"NUM_TASKS": NUM_TASKS, "CONTROL_TASKS": CONTROL_TASKS, "SEED": SEED,
                         "END_ODDS": END_ODDS, "MAX_STATES": MAX_STATES},
            "device": str(pick_device()), "threads": torch.get_num_threads(), "rows": rows,
        }
        text = json.dumps(result, indent=1)
        write_atomically(HERE / "plan.json", lambda temporary: Path(temporary).write_text(text))
        draw(HERE / "plan.png", env, models["JEPA"], metadata["tile_size"], attempts, rows)
    except (CheckpointError, CollectError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped: nothing more was written")
    print("\nSaved plan.json and plan.png")


if __name__ == "__main__":
    main()
