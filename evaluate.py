"""Evaluation while a model trains: the same prompts and seeds each time; only the model changes.

The trained reward goes up. At what cost? An evaluation also measures what is *not* trained on: the
watched metrics, whether CLIP still finds the prompt in the picture among all others, and how
different the pictures of one prompt are. `guard` turns that into two decisions: which epoch's
weights to save as the result, and when to stop. The loops leave both to `begin`, `end_epoch` and
`finish`, which evaluate, log and save.
"""

import shlex
import time

import torch
from tqdm import tqdm

from processes import gather
from prompts import load_prompts, set_names
from rewards import clip_image_embeddings, embeddings_top1
from run_folder import draw_progress, picture_grid, save_picture
from settings import watched
from training import averaged, close, log, progress_bar, rollout, save, score, shard


def fixed_prompts(prompts, count):
    """`count` prompts, each twice in a row, because diversity is measured between pictures of one
    prompt. They are spread over a long list; a short one is repeated."""
    different = (count + 1) // 2
    if different <= len(prompts):
        chosen = [prompts[i * len(prompts) // different] for i in range(different)]
    else:
        chosen = [prompts[i % len(prompts)] for i in range(different)]
    return [prompt for prompt in chosen for _ in range(2)][:count]


def diversity(embeddings, prompts):
    """1 − mean cosine between the pictures of one prompt: 0 where they are all the same.

    embeddings: (B, D), L2-normalised."""
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    same &= ~torch.eye(len(prompts), dtype=torch.bool)
    return 1 - (embeddings @ embeddings.T)[same].mean().item()


def evaluate(run, epoch):
    """Metrics of pictures with fixed prompts and seeds, a dict: eval_* for the training prompts,
    eval_<set>_* for the sets of --eval-prompts, and eval_eta0_* for the training prompts sampled
    deterministically. Adds a row to progress.png."""
    config = run.config
    views = {"eval": (run.prompts, None)}
    views |= {f"eval_{name}": (prompts, None) for name, prompts in run.held_out.items()}
    if config.eval_deterministic:
        views["eval_eta0"] = run.prompts, 0.0
    row = {}
    batches = len(shard(run, config.eval_images).split(config.sample_batch))
    with averaged(run), progress_bar(run, "evaluating", len(views) * batches * config.steps) as bar:
        for view, (prompt_set, eta) in views.items():
            row |= evaluate_prompts(run, epoch, view, prompt_set, eta, bar)
    if config.offload:  # decoding has brought it to the device
        run.pipeline.vae.to("cpu")
    return row


def evaluate_prompts(run, epoch, view, prompt_set, eta, bar):
    config = run.config
    prompts = fixed_prompts(prompt_set, config.eval_images)
    animals = load_prompts("animals") + load_prompts("animals_held_out")
    candidates = list(dict.fromkeys(prompts + animals))
    batches, pictures, embeddings = [], [], []
    for index in shard(run, len(prompts)).split(config.sample_batch):
        batch = [prompts[i] for i in index]
        images = rollout(run, batch, [(0, 0, i) for i in index.tolist()], bar, eta).images
        batches.append(score(run, images, batch))
        if "clip" in run.rewards:
            embeddings += clip_image_embeddings(images, run.device)
        shown = [i % 2 == 0 and i < 16 for i in index.tolist()]  # one of each pair
        pictures += [image.cpu() for image, is_shown in zip(images, shown) if is_shown]
    pictures, found = gather(pictures), gather(embeddings)
    values = {}
    for name in batches[0]:
        mine = torch.cat([scores[name] for scores in batches])
        values[name] = torch.tensor(gather(mine.tolist()))
    if found:
        embeddings = torch.stack(found)  # (B, D)
        top1 = embeddings_top1(embeddings, prompts, candidates, run.device)
        values["clip_top1"] = top1.float()
    trained = sum(weight * values[name] for name, weight in run.components.items())
    row = {f"{view}_reward": trained.mean().item()}
    for name, value in values.items():
        if [*run.components] != [name]:
            row[f"{view}_{name}"] = value.mean().item()
    if epoch == 0:
        for name in watched(config):
            row[f"{view}_{name}_std"] = values[name].std(correction=0).item()
    if len(found) > 1:
        row[f"{view}_diversity"] = diversity(embeddings, prompts)
    if view == "eval" and run.rank == 0:
        titles = prompts[:16:2] if epoch == 0 else None
        strip = picture_grid([torch.stack(pictures)], [f"epoch {epoch}"], titles)
        save_picture(strip, run.folder / "progress" / f"{epoch:06d}.png")
        draw_progress(run.folder, epoch)
    return row


def evaluations(rows):
    """The rows of metrics.jsonl that have the columns of an evaluation."""
    return [row for row in rows if "eval_reward" in row]


def guard(rows, config):
    """(epoch whose weights to save or None, stop?) from the rows of metrics.jsonl so far.

    An evaluation is *safe* while no watched metric has fallen by more than config.guard standard
    deviations of the base model's own pictures: a unit that means the same for a cosine and for
    kilobytes. The weights to save are those of the safe evaluation with the highest trained reward.
    It is measured on the prompts of --eval-prompts where some are given, because the model cannot
    learn those by heart. A run ends after config.patience evaluations in a row that are not safe
    or, with --eval-prompts, not better than an earlier one. With guard 0 nothing is watched. With
    nothing to watch and no --eval-prompts: (None, False).
    """
    names, unseen = watched(config) if config.guard else [], set_names(config.eval_prompts)
    if not (names or unseen):
        return None, False
    evaluated = evaluations(rows)
    base, later = evaluated[0], evaluated[1:]
    lowest = {
        name: base[f"eval_{name}"] - config.guard * base[f"eval_{name}_std"] for name in names
    }
    safe = [all(row[f"eval_{name}"] >= lowest[name] for name in names) for row in later]
    reward = [row["eval_reward"] for row in later]
    if unseen:
        reward = [sum(row[f"eval_{name}_reward"] for name in unseen) for row in later]
    best = max((i for i in range(len(later)) if safe[i]), key=reward.__getitem__, default=None)
    late = len(later) - config.patience  # the first of the last --patience evaluations
    stop = late >= 0 and (not any(safe[late:]) or bool(unseen) and best < late)
    return None if best is None else later[best]["epoch"], stop


def first_and_kept(rows, config):
    """The rows of the first evaluation and of the one whose weights were saved: the guard's choice,
    or else the newest."""
    evaluated, (best, _) = evaluations(rows), guard(rows, config)
    return evaluated[0], next((row for row in evaluated if row["epoch"] == best), evaluated[-1])


def summary(run):
    """What changed, on fixed prompts and seeds, and what to do next."""
    config = run.config
    first, kept = first_and_kept(run.rows, config)
    best, stopped = guard(run.rows, config)
    lines = [f"{run.folder}: {run.epoch} epochs; see progress.png and rewards.png there"]
    if stopped:
        reasons = [f"beyond --guard {config.guard:g}"] if config.guard and watched(config) else []
        reasons += ["no better on --eval-prompts"] if config.eval_prompts else []
        lines.append(f"  stopped after --patience {config.patience} evaluations {', or '.join(reasons)}")
    if best not in (None, run.epoch):
        last = run.folder / "last"
        lines.append(f"  kept: the weights of epoch {best}; the newest are in {last}")
    elif best is None and config.guard and watched(config) and len(evaluations(run.rows)) > 1:
        lines.append("  kept: the newest weights, since no evaluation was within the guard; "
                     "a lower --lr or --eval-every 1 may find some")
    if (error := max(row.get("ratio_error") or 0 for row in run.rows)) > 0.01:
        lines.append(f"  ratio_error was up to {error:.2g}: sampling and training do not compute the same")
    lines.append("  on fixed prompts and seeds:")
    for key in (key for key in first if key.startswith("eval_") and not key.endswith("_std")):
        name, before, after = key.removeprefix("eval_"), first[key], kept[key]
        change = f"  ({(after - before) / abs(before):+.0%})" if before else ""
        lines.append(f"    {name:<12} {before:8.3f} -> {after:.3f}{change}")
    folder = shlex.quote(str(run.folder))
    lines.append(f'next: python sample.py --lora {folder} --prompt "a cat" --prompt "a panda"')
    return "\n".join(lines)


def begin(run, description):
    """What a loop does before its first epoch. Returns whether the run is over, as a resumed one
    may be."""
    config = run.config
    if run.rank == 0:
        print(description, flush=True)
    if run.epoch == 0:
        log(run, {"epoch": 0, "images": 0} | evaluate(run, 0))
    run.bar = tqdm(total=config.epochs, initial=run.epoch, desc=config.name, unit="epoch",
                   disable=run.rank > 0)
    return run.epoch >= config.epochs or guard(run.rows, config)[1]


def end_epoch(run, row, clock, **state):
    """What a loop does after an epoch's updates: evaluates, logs the row, saves. Returns whether
    the run is over.

    clock: time.perf_counter() at the epoch's start. state: what the loop wants back in run.saved
    when it is resumed."""
    config, run.epoch = run.config, row["epoch"]
    last = run.epoch >= config.epochs
    if run.epoch % config.eval_every == 0 or last:
        row |= evaluate(run, run.epoch)
        row["seconds_eval"] = time.perf_counter() - clock - row["seconds"]
    log(run, row)
    best, stop = guard(run.rows, config)
    if run.epoch % config.checkpoint_every == 0 or run.epoch == best or last or stop:
        save(run, run.epoch, best, **state)
    run.bar.set_postfix(reward=f"{row['reward_mean']:.3f}",
                        **{name: f"{row[f'reward_{name}']:.3f}" for name in watched(config)})
    run.bar.update()
    return last or stop


def finish(run):
    """Says what has changed. Returns the run's folder."""
    run.bar.close()
    close(run)
    if run.rank == 0:
        print(summary(run))
    return run.folder
