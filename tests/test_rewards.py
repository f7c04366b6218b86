"""Rewards without a model: JPEG sizes, mixtures, functions from a file, and every way to get one wrong."""

import inspect
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards import RewardError, check_rewards, get_reward, jpeg_kilobytes, parse_reward

PROMPTS = ["a cat", "a dog", "an ant", "a fox"]


@pytest.fixture
def images():
    """From plain to noise: four pictures of growing JPEG size. uint8 (4, 3, 40, 56)"""
    noise = torch.randint(-128, 128, (4, 3, 40, 56), generator=torch.Generator().manual_seed(0))
    return (128 + noise * torch.tensor([0, 0.1, 0.4, 1]).view(4, 1, 1, 1)).to(torch.uint8)


@pytest.fixture
def my_file(tmp_path):
    """Writes a reward file and returns what to put before `:function`."""
    def write(code, name="my_file.py"):
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)
    return write


def test_jpeg_kilobytes_is_the_size_of_pillows_file_on_disk(images, tmp_path):
    sizes = []
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert jpeg_kilobytes(images).tolist() == pytest.approx(sizes, rel=1e-6)
    assert sizes == sorted(sizes)


def test_compress_and_incompress_are_the_size_with_either_sign(images):
    sizes = jpeg_kilobytes(images)
    assert torch.equal(get_reward("compress")(images, PROMPTS), -sizes)
    assert torch.equal(get_reward("incompress")(images, PROMPTS), sizes)
    assert torch.equal(get_reward("compress:0.5")(images, PROMPTS), -0.5 * sizes)


def test_a_reward_is_float32_on_the_cpu_with_one_value_an_image(images):
    for spec in ("compress", "incompress", "compress:2,incompress:1"):
        values = get_reward(spec)(images, PROMPTS)
        assert values.dtype == torch.float32 and values.shape == (4,) and values.device.type == "cpu"


@pytest.mark.parametrize("spec, parts", [
    ("compress", {"compress": 1}), ("clip:2", {"clip": 2}), ("compress:0.3,clip:1", {"compress": 0.3, "clip": 1}),
    ("compress, clip:-.5", {"compress": 1, "clip": -0.5}), ("clip=some/model:0.5", {"clip=some/model": 0.5}),
    ("align=a/vlm@b/encoder", {"align=a/vlm@b/encoder": 1}), ("align=@b/encoder,vqa", {"align=@b/encoder": 1, "vqa": 1}),
    ("my/file.py:f", {"my/file.py:f": 1}), ("file.py:f:0.5,clip:1", {"file.py:f": 0.5, "clip": 1})])
def test_a_spec_is_read_as_parts_with_weights(spec, parts):
    assert parse_reward(spec) == parts


@pytest.mark.parametrize("spec, says", [
    ("foo", "choose compress"), ("", "choose compress"), ("compress,", "choose compress"), ("Compress", "choose compress"),
    ("my_file.py", "file.py:function"), ("compress:", "weight"), ("compress:abc", "weight"), ("compress:0", "weight"),
    ("compress:nan,clip", "weight"), ("compress:inf", "weight"), ("compress:1:2", "weight"), ("file.py:f:x", "weight"),
    ("compress,compress:2", "twice"), ("compress=some/model", "takes no model"), ("vqa=a@b", "takes one model"),
    ("align=a@b@c", "takes two models")])
def test_a_wrong_spec_is_refused_in_one_line(spec, says):
    with pytest.raises(RewardError, match=says) as error:
        get_reward(spec)
    assert "\n" not in str(error.value)


def test_a_mixture_is_the_weighted_sum_of_z_scores(images, my_file):
    path = my_file("def height(images, prompts): return [len(prompt) ** 2 for prompt in prompts]")
    prompts = ["a", "a cat", "a brown dog", "a fox"]
    sizes, lengths = jpeg_kilobytes(images).numpy().astype(float), np.array([1.0, 25, 121, 25])
    expected = -0.3 * (sizes - sizes.mean()) / sizes.std() + 2 * (lengths - lengths.mean()) / lengths.std()
    mixed = get_reward(f"compress:0.3,{path}:height:2")(images, prompts)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_a_part_that_is_the_same_for_all_images_adds_nothing_to_a_mixture(images, my_file):
    path = my_file("def same(images, prompts): return [2.2] * len(images)")
    sizes = jpeg_kilobytes(images).numpy().astype(float)
    mixed = get_reward(f"compress:1,{path}:same:1")(images, PROMPTS)
    np.testing.assert_allclose(mixed, -(sizes - sizes.mean()) / sizes.std(), rtol=1e-5)


@pytest.mark.parametrize("result", ["[1, 2, 3, 4]", "np.arange(1, 5)", "torch.arange(1, 5.0, dtype=torch.float64)",
                                    "[torch.tensor(float(i)) for i in range(1, 5)]", "torch.arange(1., 5, requires_grad=True)"])
def test_a_function_may_return_any_list_of_numbers(images, my_file, result):
    path = my_file(f"import numpy as np\nimport torch\ndef mine(images, prompts): return {result}")
    values = get_reward(f"{path}:mine")(images, PROMPTS)
    assert torch.equal(values, torch.tensor([1.0, 2, 3, 4])) and not values.requires_grad


def test_a_function_gets_uint8_images_and_their_prompts(images, my_file):
    path = my_file("seen = []\ndef mine(images, prompts, extra=1): seen[:] = [images, prompts]; return [0] * 4")
    get_reward(f"{path}:mine")(images, PROMPTS)
    seen = sys.modules["reward_my_file"].seen
    assert torch.equal(seen[0], images) and seen[0].dtype == torch.uint8 and seen[1] == PROMPTS


@pytest.mark.parametrize("code, says", [
    (None, "there is no file"), ("def other(images, prompts): pass", "has no function mine; it has other"),
    ("mine = 3", "has no function mine"), ("def mine(images): pass", r"mine\(images\).*must take \(images, prompts\)"),
    ("def mine(a, b, c): pass", "must take"), ("import no_such_module", "cannot be imported"), ("def mine(", "cannot be imported")])
def test_a_file_without_a_fitting_function_is_refused_at_once_and_named(my_file, tmp_path, code, says):
    path = my_file(code) if code else str(tmp_path / "nowhere.py")
    with pytest.raises(RewardError, match=says) as error:
        get_reward(f"{path}:mine")
    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("result, says", [
    ("[1, 2, 3]", r"shape \(3,\) for 4 images"), ("1.0", r"shape \(\)"), ("images.float()", r"shape \(4, 3, 40, 56\)"),
    ("torch.zeros(4, 1)", r"shape \(4, 1\)"), ("None", "NoneType"), ("'good'", "str"), ("[None] * 4", "list"),
    ("[[1], [2, 3]]", "list"), ("{}", "dict")])
def test_anything_but_one_number_an_image_is_refused_by_name(images, my_file, result, says):
    path = my_file(f"import torch\ndef mine(images, prompts): return {result}")
    with pytest.raises(RewardError, match=says) as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert f"{path}:mine" in str(error.value)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e300"])
def test_a_value_that_is_not_finite_is_refused_with_its_image_and_prompt(images, bad):
    with pytest.raises(RewardError, match="image 2, 'an ant'") as error:
        check_rewards("mine", [0, 1, float(bad), float("nan")], images, PROMPTS)
    assert (error.value.index, error.value.prompt) == (2, "an ant") and torch.equal(error.value.image, images[2])


def test_a_function_that_raises_is_reported_with_the_image_that_makes_it_raise(images, my_file):
    path = my_file("def mine(images, prompts): return [1 / (prompt != 'an ant') for prompt in prompts]")
    with pytest.raises(RewardError, match="ZeroDivisionError.*image 2, 'an ant'") as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert error.value.index == 2 and torch.equal(error.value.image, images[2])


def test_a_function_that_raises_only_for_the_batch_is_reported_without_an_image(images, my_file):
    path = my_file("def mine(images, prompts):\n    if len(images) > 1: raise MemoryError('too many')\n    return [0]")
    with pytest.raises(RewardError, match="MemoryError: too many, for the batch") as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert error.value.index is None and error.value.image is None


def test_pictures_that_are_not_uint8_are_refused(images):
    for wrong in (images / 255.0, images[0], images[:, :1], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="takes uint8 images"):
            get_reward("compress")(wrong, PROMPTS)
    with pytest.raises(ValueError, match="takes uint8 images"):
        get_reward("compress")(images, PROMPTS[:3])


def test_every_name_is_a_factory_that_takes_the_device():
    assert set(rewards.REWARDS) == {"compress", "incompress", "clip", "aesthetic", "pickscore", "align", "vqa", "count"}
    assert all(next(iter(inspect.signature(factory).parameters)) == "device" for factory in rewards.REWARDS.values())
    assert rewards.REWARDS["compress"]("cpu")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["", ""]).shape == (2,)


def test_the_command_line_scores_pictures_and_refuses_in_one_line(images, tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "noise.png")
    Image.fromarray(images[3].permute(1, 2, 0).numpy()).save(file)
    monkeypatch.setattr(sys, "argv", ["rewards.py", file, "--reward", "compress:1,incompress:2"])
    runpy.run_path(rewards.__file__, run_name="__main__")
    size = jpeg_kilobytes(images[3:]).item()
    assert capsys.readouterr().out == f"compress {-size:.4f}  incompress {size:.4f}  {file}\n"
    monkeypatch.setattr(sys, "argv", ["rewards.py", file, "--reward", "foo"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(rewards.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose compress" in said
