"""Claims about evaluation during training: what is measured, which epoch's weights are saved, and
when a run is stopped."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ddpo
import evaluate
from ddpo import Config
from evaluate import diversity, fixed_prompts, guard, summary
from prompts import load_prompts
from run_folder import open_tracker, plot_rewards, read_metrics
from training import start, unguarded

SMALL = dict(
    images=4, sample_batch=4, train_batch=4, steps=3, epochs=4, eval_images=4, eval_every=1,
    group_size=2, updates=2, lora_rank=8, device="cpu",
)


def rows(rewards, watch, std=0.1):
    evaluated = [
        {"epoch": i, "eval_reward": reward, "eval_clip": value}
        for i, (reward, value) in enumerate(zip(rewards, watch, strict=True))
    ]
    evaluated[0]["eval_clip_std"] = std
    return evaluated


def decisions(evaluated, config):
    """What the guard decides after each evaluation."""
    return [guard(evaluated[:n], config) for n in range(1, len(evaluated) + 1)]


def test_a_run_says_that_nothing_it_found_was_within_the_guard_and_that_nothing_is_watched(tmp_path):
    run = SimpleNamespace(config=Config(guard=1.0, patience=2), folder=tmp_path, epoch=1,
                          rows=rows([0, 1], [0.7, 0.1]))
    assert "no evaluation was within the guard" in summary(run)
    run.rows = rows([0, 1], [0.7, 0.7])
    assert "guard" not in summary(run)
    assert "--guard has no effect" in unguarded(Config(reward="clip"))
    for config in (Config(), Config(reward="clip", guard=0.0), Config(reward="clip", watch=""),
                   Config(reward="clip", eval_prompts="objects")):
        assert unguarded(config) == ""


def test_the_prompts_of_an_evaluation_are_those_that_the_run_began_with(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a cat\na dog\n")
    run = ddpo.prepare(Config(**SMALL | dict(out=str(tmp_path), watch="", eval_prompts=str(file))))
    before = evaluate.evaluate(run, 0)
    file.unlink()
    assert evaluate.evaluate(run, 0) == before
    evaluate.close(run)


def test_the_best_evaluation_within_the_guard_is_saved_and_two_beyond_it_end_the_run():
    config = Config(guard=1.0, patience=2)
    falling = rows([0, 1, 2, 3, 4], [0.7, 0.69, 0.65, 0.59, 0.5])
    expected = [(None, False), (1, False), (2, False), (2, False), (2, True)]
    assert decisions(falling, config) == expected


def test_a_watched_metric_that_holds_stops_nothing():
    rising = rows(range(30), [0.7 + 0.001 * i for i in range(30)])
    assert guard(rising, Config(guard=0.1, patience=1)) == (29, False)


def test_one_bad_evaluation_ends_nothing_and_the_reward_decides_among_the_others():
    up_and_down = rows([0, 3, 5, 4], [0.7, 0.69, 0.3, 0.68])
    assert guard(up_and_down, Config(guard=1.0, patience=2)) == (3, False)


def test_held_out_prompts_decide_what_is_saved_and_end_a_run_that_no_longer_helps_them():
    held_out = [0, 2, 3, 2, 2.5, 2.9]
    evaluated = [
        row | {"eval_objects_reward": value}
        for row, value in zip(rows(range(6), [0.7] * 6), held_out, strict=True)
    ]
    config = Config(reward="clip", watch="", eval_prompts="objects", patience=3)
    expected = [(None, False), (1, False), (2, False), (2, False), (2, False), (2, True)]
    assert decisions(evaluated, config) == expected
    evaluated[-1]["eval_objects_reward"] = 3.5
    assert guard(evaluated, config) == (5, False)
    evaluated[-1]["eval_clip"] = 0.3  # the best of all, but for what is watched
    assert guard(evaluated, Config(eval_prompts="objects", patience=3)) == (2, True)


def test_without_a_guard_or_without_anything_to_watch_the_newest_is_saved():
    falling = rows([0, 1, 2, 3], [0.7, 0.1, 0.1, 0.1])
    for config in (Config(guard=0.0), Config(watch=""), Config(reward="clip", watch="clip")):
        assert guard(falling, config) == (None, False)


def test_rows_between_evaluations_do_not_count():
    first, second = rows([0, 1], [0.7, 0.5])
    without = {"epoch": 99, "reward_mean": 1.0}
    between = [first, without, second, without]
    assert guard(between, Config(guard=1.0, patience=2)) == (None, False)


def test_prompts_come_in_pairs_spread_over_a_long_list_and_again_over_a_short_one():
    assert fixed_prompts(list("abcdefgh"), 8) == list("aacceegg")
    assert fixed_prompts(list("ab"), 6) == list("aabbaa")
    assert len(fixed_prompts(list("abc"), 5)) == 5


def test_diversity_is_one_minus_the_mean_cosine_within_a_prompt():
    embeddings = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1]])
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    assert diversity(embeddings, ["a", "a", "b", "b"]) == pytest.approx(1 - (0 + 1) / 2)
    assert diversity(embeddings[2:], ["b", "b"]) == pytest.approx(0, abs=1e-6)


def test_the_run_stops_at_the_guard_and_its_folder_holds_the_best_evaluations_weights(
    tmp_path, monkeypatch
):
    """The evaluations are real; what they found for the watched metric is replaced, so that the
    guard stops the run after epoch 1, which has no checkpoint of its own."""
    real = evaluate.evaluate

    def doctored(run, epoch):
        clip = 0.7 if epoch < 2 else 0.1
        return real(run, epoch) | {"eval_reward": float(epoch), "eval_clip": clip}

    monkeypatch.setattr(evaluate, "evaluate", doctored)
    settings = SMALL | dict(out=str(tmp_path), epochs=9, watch="clip", guard=1.0, checkpoint_every=9)
    folder = ddpo.train(Config(**settings))
    assert [row["epoch"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    config = json.loads((folder / "config.json").read_text())
    config = Config(**config | dict(epochs=1, name="short"))
    short = ddpo.train(config)
    saved, of_epoch_1, last = map(weights, (folder, short, folder / "last"))
    assert all(torch.equal(saved[key], of_epoch_1[key]) for key in saved)
    assert any(not torch.equal(saved[key], last[key]) for key in saved)


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_held_out_sets_and_the_deterministic_sampler_have_columns_of_their_own(tmp_path):
    views = dict(eval_prompts="animals_held_out", eval_deterministic=True)
    settings = SMALL | dict(out=str(tmp_path), epochs=1, watch="clip") | views
    row = read_metrics(ddpo.train(Config(**settings)) / "metrics.jsonl")[-1]
    for view in ("eval", "eval_animals_held_out", "eval_eta0"):
        for metric in ("reward", "clip", "clip_top1", "diversity"):
            assert f"{view}_{metric}" in row
    assert row["eval_reward"] != row["eval_animals_held_out_reward"] != row["eval_eta0_reward"]


def test_averaged_weights_lag_behind_and_are_what_is_saved(tmp_path):
    settings = SMALL | dict(out=str(tmp_path), watch="", epochs=2, eval_every=9)
    for ema in (0.0, 0.9):
        ddpo.train(Config(name=f"ema{ema}", ema=ema, **settings))
    plain, averaged = weights(tmp_path / "ema0.0"), weights(tmp_path / "ema0.9")
    up = [key for key in plain if "lora_B" in key or ".up." in key]  # they start at zero
    assert 0 < sum(averaged[key].norm() for key in up) < 0.6 * sum(plain[key].norm() for key in up)
    config = ddpo.check(Config(name="ema0.9", ema=0.9, **settings | dict(epochs=4)))
    resumed = start(config, resume=True)
    assert any(not torch.equal(p, average) for p, average in zip(resumed.parameters, resumed.ema))


def test_an_evaluation_is_of_the_averaged_weights_and_the_same_in_every_epoch(tmp_path):
    run = ddpo.prepare(Config(out=str(tmp_path), **SMALL | dict(ema=0.5, watch="")))
    first = evaluate.evaluate(run, 1)["eval_reward"]
    with torch.no_grad():
        for p in run.parameters:
            p.add_(0.1)
    newest = [p.clone() for p in run.parameters]
    assert evaluate.evaluate(run, 2)["eval_reward"] == first
    assert all(torch.equal(p, value) for p, value in zip(run.parameters, newest))
    run.ema = newest
    assert evaluate.evaluate(run, 3)["eval_reward"] != first


def test_a_picture_is_recognised_among_all_animals_also_those_held_out(tmp_path, monkeypatch):
    seen, real = [], evaluate.embeddings_top1

    def embeddings_top1(embeddings, prompts, candidates, device):
        seen.append(candidates)
        return real(embeddings, prompts, candidates, device)

    monkeypatch.setattr(evaluate, "embeddings_top1", embeddings_top1)
    settings = SMALL | dict(out=str(tmp_path), watch="clip", eval_prompts="objects")
    evaluate.evaluate(ddpo.prepare(Config(**settings)), 0)
    animals = {*load_prompts("animals"), *load_prompts("animals_held_out")}
    assert all(animals <= {*candidates} for candidates in seen)
    assert {*seen[1]} - animals == {*fixed_prompts(load_prompts("objects"), SMALL["eval_images"])}


def test_the_curves_stand_over_the_pictures_sampled_and_the_guard_below_the_base_model(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    evaluated = [{"epoch": epoch, "images": 64 * epoch, "eval_reward": epoch, "eval_clip": 0.7 - 0.1 * epoch}
                 for epoch in range(3)]
    evaluated[0]["eval_clip_std"] = 0.1
    for row in evaluated[1:]:
        row["reward_mean"] = row["epoch"] - 0.5
    plot_rewards(evaluated, Config(watch="clip", guard=2.0), tmp_path / "rewards.png")
    lines = [{line.get_label(): [list(axis) for axis in line.get_data()] for line in axes.get_lines()}
             for axes in figures[0].axes]
    close(figures[0])
    reward, clip = lines
    assert reward["sampled"] == [[64, 128], [0.5, 1.5]]
    assert reward["fixed prompts and seeds"] == [[0, 64, 128], [0, 1, 2]]
    assert clip["fixed prompts and seeds"] == [[0, 64, 128], pytest.approx([0.7, 0.6, 0.5])]
    assert clip["guard"][1] == pytest.approx([0.5, 0.5]) and "guard" not in reward


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_is_told_each_number_with_its_epoch(tmp_path, monkeypatch, tracker):
    told = []
    writer = SimpleNamespace(add_scalar=lambda *call: told.append(call), flush=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = SimpleNamespace(log=lambda row, step: told.extend((*item, step) for item in row.items()))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    track = open_tracker(Config(tracker=tracker), tmp_path)
    track({"reward_mean": 1.5, "loss": 0.1}, 3)
    assert told == [("reward_mean", 1.5, 3), ("loss", 0.1, 3)]
    assert open_tracker(Config(), tmp_path) is None
