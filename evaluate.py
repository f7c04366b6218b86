"""Looking at a model while it trains: the same prompts and seeds each time, so that what changes is the model.

A reward that is trained on goes up; the question is what for. So a look also measures what is *not* trained on: watched rewards,
whether CLIP still finds the prompt in the picture among all others, and how different the pictures of one prompt are. `guard`
turns that into a decision: which epoch to keep, and when to stop.
"""

import torch

from prompts import load_prompts, set_names
from rewards import clip_image_embeddings, clip_top1
from run_folder import stack_pictures
from sample import picture_grid
from training import averaged, gather, own, rollout, score, stage, watched


def fixed_prompts(prompts, count):
    """`count` prompts, each twice in a row (diversity is a matter between pictures of one prompt), spread over a long list, again and
    again over a short one."""
    different = (count + 1) // 2
    chosen = [prompts[i * len(prompts) // different if different <= len(prompts) else i % len(prompts)] for i in range(different)]
    return [prompt for prompt in chosen for _ in range(2)][:count]


def diversity(embeddings, prompts):
    """1 − mean cosine between the pictures of one prompt: 0 where they are all the same. embeddings: (B, D), L2-normalised."""
    same = torch.tensor([[a == b for b in prompts] for a in prompts]) & ~torch.eye(len(prompts), dtype=torch.bool)
    return 1 - (embeddings @ embeddings.T)[same].mean().item()


def look(run, epoch):
    """Metrics of the fixed pictures: eval_* for the training prompts, eval_<set>_* for the sets of --eval-prompts, and eval_eta0_*
    for the same prompts sampled deterministically. Adds a row to progress.png."""
    config = run.config
    views = {"eval": (run.prompts, None)}
    views |= {f"eval_{name}": (load_prompts(name), None) for name in set_names(config.eval_prompts)}
    if config.eval_deterministic:
        views["eval_eta0"] = run.prompts, 0.0
    row = {}
    batches = len(own(run, config.eval_images).split(config.sample_batch))
    with averaged(run), stage(run, "looking", len(views) * batches * config.steps) as bar:
        for view, (prompt_set, eta) in views.items():
            row |= look_at(run, epoch, view, prompt_set, eta, bar)
    return row


def look_at(run, epoch, view, prompt_set, eta, bar):
    config = run.config
    prompts = fixed_prompts(prompt_set, config.eval_images)
    candidates = list(dict.fromkeys(prompts + load_prompts("animals") + load_prompts("animals_held_out")))
    batches, pictures, embeddings = [], [], []
    for index in own(run, len(prompts)).split(config.sample_batch):
        batch = [prompts[i] for i in index]
        images = rollout(run, batch, [(0, 0, i) for i in index.tolist()], bar, eta).images
        batches.append(score(run, images, batch))
        if "clip" in run.rewards:
            batches[-1]["clip_top1"] = clip_top1(images, batch, candidates, run.device).float()
            embeddings += clip_image_embeddings(images, run.device)
        pictures += [image.cpu() for i, image in zip(index.tolist(), images) if i % 2 == 0 and i < 16]
    pictures, embeddings = gather(pictures), gather(embeddings)
    values = {name: torch.tensor(gather(torch.cat([scores[name] for scores in batches]).tolist())) for name in batches[0]}
    trained = sum(weight * values[name] for name, weight in run.parts.items())
    row = {f"{view}_reward": trained.mean().item()}
    row |= {f"{view}_{name}": value.mean().item() for name, value in values.items() if [*run.parts] != [name]}
    row |= {f"{view}_{name}_std": values[name].std(correction=0).item() for name in watched(config) if epoch == 0}
    if embeddings and len(prompts) > 1:
        row[f"{view}_diversity"] = diversity(torch.stack(embeddings), prompts)
    if view == "eval" and run.rank == 0:
        strip = picture_grid([torch.stack(pictures)], [f"epoch {epoch}"], prompts[:16:2] if epoch == 0 else None)
        strip.save(run.folder / "progress" / f"{epoch:06d}.png")
        looks = sorted(path for path in (run.folder / "progress").glob("*.png") if int(path.stem) <= epoch)
        stack_pictures(looks, run.folder / "progress.png")
    return row


def with_looks(rows):
    """Those rows of metrics.jsonl that have a look's columns."""
    return [row for row in rows if "eval_reward" in row]


def guard(rows, config):
    """(epoch to keep or None, stop?) from the rows of metrics.jsonl so far.

    A look is *safe* while no watched reward has fallen by more than config.guard standard deviations of the base model's own
    pictures: a unit that means the same for a cosine and for kilobytes. The epoch to keep is the safe one with the highest trained
    reward: on the prompts of --eval-prompts where some are given, since what was not trained on cannot be learnt by heart. A run
    ends after config.patience looks in a row that are not safe or, on such prompts, no better than one before. With guard 0, or
    nothing to watch and no such prompts: (None, False).
    """
    names, unseen = watched(config), set_names(config.eval_prompts)
    if not config.guard or not (names or unseen):
        return None, False
    looks = with_looks(rows)
    base, later = looks[0], looks[1:]
    safe = [all(row[f"eval_{name}"] >= base[f"eval_{name}"] - config.guard * base[f"eval_{name}_std"] for name in names) for row in later]
    reward = [sum(row[f"eval_{name}_reward"] for name in unseen) if unseen else row["eval_reward"] for row in later]
    best = max((i for i in range(len(later)) if safe[i]), key=reward.__getitem__, default=None)
    late = len(later) - config.patience  # the looks from here on are the ones to be patient with
    stop = late >= 0 and (not any(safe[late:]) or bool(unseen) and best < late)
    return None if best is None else later[best]["epoch"], stop


def first_and_kept(rows, config):
    """The rows of the first look and of the one whose weights were kept: the guard's choice, or else the newest."""
    looks, best = with_looks(rows), guard(rows, config)[0]
    return looks[0], next((row for row in looks if row["epoch"] == best), looks[-1])


def summary(run):
    """What changed, on fixed prompts and seeds, and what to do next."""
    first, kept = first_and_kept(run.rows, run.config)
    best, stopped = guard(run.rows, run.config)
    lines = [f"{run.folder}: {run.epoch} epochs; see progress.png and rewards.png there"]
    if stopped:
        lines.append(f"  stopped after --patience {run.config.patience} looks beyond --guard {run.config.guard:g}"
                     + (", or no better on --eval-prompts" if run.config.eval_prompts else ""))
    if best not in (None, run.epoch):
        lines.append(f"  kept: the weights of epoch {best}; the newest are in {run.folder / 'last'}")
    elif stopped:
        lines.append("  kept: the newest weights, since no look was within the guard; a lower --lr or --eval-every 1 would find some")
    lines.append("  on fixed prompts and seeds:")
    for key in (key for key in first if key.startswith("eval_") and not key.endswith("_std")):
        change = (kept[key] - first[key]) / max(abs(first[key]), 1e-9)
        lines.append(f"    {key.removeprefix('eval_'):<12} {first[key]:8.3f} -> {kept[key]:.3f}  ({change:+.0%})")
    return "\n".join([*lines, f'next: python sample.py --lora {run.folder} --prompt "a cat" --prompt "a panda"'])
