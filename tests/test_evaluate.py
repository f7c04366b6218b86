"""Claims about evaluation during training: what is measured, which epoch's weights are saved, and
when a run is stopped."""

import json
import math
import re
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
    assert "watched, since clip is trained on: --guard and --patience have no effect" in unguarded(
        Config(reward="clip"))
    assert "nothing is watched: --guard" in unguarded(Config(watch=""))
    for config in (Config(), Config(reward="clip", guard=0.0), Config(reward="clip", eval_prompts="objects")):
        assert unguarded(config) == ""


def test_a_run_says_that_its_updates_saw_another_policy_than_the_one_that_sampled(tmp_path):
    run = SimpleNamespace(config=Config(watch=""), folder=tmp_path, epoch=1, rows=rows([0, 1], [0.7, 0.7]))
    run.rows[1]["ratio_error"] = 1e-6
    assert "ratio_error" not in summary(run)
    run.rows[1]["ratio_error"] = 0.59
    assert "ratio_error was up to 0.59" in summary(run)


def test_a_metric_that_begins_at_0_has_no_change_in_per_cent(tmp_path):
    before, after = ({"epoch": epoch, "eval_reward": 1.0, "eval_clip_top1": top1}
                     for epoch, top1 in ((0, 0.0), (1, 0.25)))
    run = SimpleNamespace(config=Config(watch=""), folder=tmp_path, epoch=1, rows=[before, after])
    assert re.search(r"clip_top1 +0.000 -> 0.250$", summary(run), re.M) and "(+0%)" in summary(run)


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
    assert guard(evaluated, Config(eval_prompts="objects", patience=3, guard=0.0)) == (5, False)


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
    views = "eval", "eval_animals_held_out", "eval_eta0"
    assert len({row[f"{view}_reward"] for view in views}) == 3


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
             for axes in figures[-1].axes]  # matplotlib 3.8 closes all before it
    close(figures[-1])
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
    ids = []
    init = lambda **settings: ids.append(settings["id"]) or run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    open_tracker(Config(tracker=tracker), tmp_path)
    track = open_tracker(Config(tracker=tracker), tmp_path)  # of a run that is resumed
    assert len(ids) == (2 if tracker == "wandb" else 0) and len(set(ids)) <= 1
    track({"reward_mean": 1.5, "loss": 0.1}, 3)
    assert told == [("reward_mean", 1.5, 3), ("loss", 0.1, 3)]
    assert open_tracker(Config(), tmp_path) is None


def test_a_watched_metric_that_is_one_number_for_all_pictures_is_safe_while_it_holds():
    same = rows([0, 1, 2], [1.0, 1.0, 0.99], std=0.0)
    assert decisions(same, Config(guard=1.0, patience=1)) == [(None, False), (1, False), (1, True)]


def test_of_several_held_out_sets_the_sum_decides():
    evaluated = [row | {"eval_objects_reward": objects, "eval_pairs_reward": pairs}
                 for row, objects, pairs in zip(rows(range(3), [0.7] * 3), (0, 2, 3), (0, 2, 0))]
    for sets in ("objects,pairs", "pairs, objects"):
        assert guard(evaluated, Config(watch="", eval_prompts=sets, patience=9)) == (1, False)


@pytest.fixture
def drawn(monkeypatch):
    """(prompts, keys) of each batch of an evaluation whose pictures show their index."""
    batches = []

    def rollout(run, prompts, keys, *_):
        batches.append((prompts, keys))
        shades = torch.tensor([key[-1] for key in keys], dtype=torch.uint8).view(-1, 1, 1, 1)
        return SimpleNamespace(images=shades.expand(-1, 3, 8, 8))

    monkeypatch.setattr(evaluate, "rollout", rollout)
    monkeypatch.setattr(evaluate, "score", lambda run, images, prompts: {
        name: images[:, 0, 0, 0].float() for name in run.rewards})
    return batches


def evaluation(view, prompts, epoch=0, folder=None, **settings):
    config = Config(watch="incompress", **settings)
    run = SimpleNamespace(config=config, folder=folder, rank=0, world=1,
                          components={"compress": 1.0},
                          rewards={"compress": None, "incompress": None})
    return evaluate.evaluate_prompts(run, epoch, view, prompts, None, None)


def test_runs_of_all_seeds_are_evaluated_on_the_same_prompts_and_noise_in_every_epoch(drawn):
    for seed, epoch in ((0, 0), (0, 3), (7, 0)):
        evaluation("eval_objects", ["a cat", "a dog"], epoch, seed=seed, eval_images=4,
                   sample_batch=4)
    assert len(drawn) == 3 and all(batch == drawn[0] for batch in drawn)
    assert len(set(drawn[0][1])) == 4  # and each picture has noise of its own


def test_the_guards_unit_is_the_spread_over_the_base_models_own_pictures(drawn):
    """Also of one picture, which has none."""
    for images, spread in ((4, math.sqrt(1.25)), (1, 0.0)):  # the values are 0 to 3
        row = evaluation("eval_objects", ["a cat", "a dog"], eval_images=images, sample_batch=4)
        assert row["eval_objects_incompress_std"] == pytest.approx(spread)
    later = evaluation("eval_objects", ["a cat"], epoch=1, eval_images=4, sample_batch=4)
    assert "eval_objects_incompress_std" not in later


def test_a_strip_of_progress_shows_a_picture_of_each_of_the_first_eight_prompts(
        drawn, tmp_path, monkeypatch):
    strips = []
    monkeypatch.setattr(evaluate, "picture_grid", lambda *strip: strips.append(strip))
    monkeypatch.setattr(evaluate, "save_picture", lambda *_: None)
    monkeypatch.setattr(evaluate, "draw_progress", lambda *_: None)
    prompts = [f"prompt {i}" for i in range(10)]
    for epoch in (0, 5):
        evaluation("eval", prompts, epoch, tmp_path, eval_images=20, sample_batch=8)
    for (pictures,), *_ in strips:
        assert pictures[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [labels for _, labels, _ in strips] == [["epoch 0"], ["epoch 5"]]
    assert [titles for *_, titles in strips] == [prompts[:8], None]  # the first strip names them


def test_a_change_is_told_in_per_cent_of_what_was_there_before(tmp_path):
    run = SimpleNamespace(config=Config(guard=1.0, patience=2), folder=tmp_path, epoch=1,
                          rows=rows([-2, -1], [0.5, 0.6]))
    said = summary(run)
    assert "-2.000 -> -1.000  (+50%)" in said and "0.500 -> 0.600  (+20%)" in said


def test_each_nth_epoch_and_the_last_is_evaluated_in_a_time_beside_that_of_the_epoch(monkeypatch):
    for name in ("evaluate", "log", "save"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: {})
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: 110.0))
    bar = SimpleNamespace(set_postfix=lambda **_: None, update=lambda: None)
    run = SimpleNamespace(config=Config(watch="", epochs=5, eval_every=2), rows=[], bar=bar)
    rows_ = [{"epoch": epoch, "reward_mean": 0.0, "seconds": 7.0} for epoch in range(1, 6)]
    over = [evaluate.end_epoch(run, row, clock=100.0) for row in rows_]
    assert over == [False] * 4 + [True]
    assert [row.get("seconds_eval") for row in rows_] == [None, 3.0, None, 3.0, 3.0]


def test_there_is_a_panel_for_each_metric_and_a_line_in_it_for_each_set_of_prompts(
        tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    views = "eval", "eval_objects", "eval_eta0"
    columns = {f"{view}_{metric}": 1.0 for view in views for metric in ("reward", "clip")}
    evaluated = [{"epoch": epoch, "images": 64 * epoch} | columns for epoch in range(2)]
    evaluated[0]["eval_clip_std"] = 0.1
    for deterministic, lines in ((True, ["objects", "η = 0"]), (False, ["objects"])):
        config = Config(watch="clip", guard=0.0, eval_prompts="objects",
                        eval_deterministic=deterministic)
        shown = [{key: value for key, value in row.items() if deterministic or "eta0" not in key}
                 for row in evaluated]
        plot_rewards(shown, config, tmp_path / "rewards.png")
        panels = figures[-1].axes
        assert [panel.get_title() for panel in panels] == ["compress (trained)", "clip"]
        labels = [[line.get_label() for line in panel.get_lines()] for panel in panels]
        fixed = ["fixed prompts and seeds", *lines]
        assert labels == [["sampled", *fixed], fixed]
        close(figures[-1])


def test_a_run_is_told_by_the_evaluation_that_the_guard_chose_or_else_by_its_newest():
    evaluated = rows([0, 1, 2], [0.7, 0.7, 0.1])
    for guard_, epochs in ((1.0, [0, 1]), (0.0, [0, 2])):
        told = evaluate.first_and_kept(evaluated, Config(guard=guard_, patience=9))
        assert [row["epoch"] for row in told] == epochs


def test_a_run_that_is_resumed_is_over_at_its_last_epoch_or_where_the_guard_has_stopped_it():
    for clip, epochs, over in ((0.7, 9, False), (0.1, 9, True), (0.7, 1, True)):
        config = Config(guard=1.0, patience=1, epochs=epochs)
        run = SimpleNamespace(config=config, rank=1, epoch=1, rows=rows([0, 1], [0.7, clip]))
        assert evaluate.begin(run, "") == over
