"""Rewards without a model: JPEG sizes, mixtures, functions from a file, and what such files do."""

import inspect
import logging
import os
import random
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reward_files
import rewards
from reward_files import check_rewards
from rewards import RewardError, get_reward, jpeg_kilobytes, parse_reward

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
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
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
    assert torch.equal(get_reward("compress:-2")(images, PROMPTS), 2 * sizes)


def test_a_reward_is_float32_on_the_cpu_with_one_value_an_image(images):
    for spec in ("compress", "incompress", "compress:2,incompress:1"):
        values = get_reward(spec)(images, PROMPTS)
        assert values.dtype == torch.float32 and values.shape == (4,)
        assert values.device.type == "cpu"


@pytest.mark.parametrize("spec, components", [
    ("compress", {"compress": 1}), ("clip:2", {"clip": 2}),
    ("compress:0.3,clip:1", {"compress": 0.3, "clip": 1}),
    ("compress, clip:-.5", {"compress": 1, "clip": -0.5}),
    ("clip=some/model:0.5", {"clip=some/model": 0.5}),
    ("align=a/vlm@b/encoder", {"align=a/vlm@b/encoder": 1}),
    ("align=@b/encoder,vqa", {"align=@b/encoder": 1, "vqa": 1}),
    ("my/file.py:f", {"my/file.py:f": 1}),
    ("file.py:f:0.5,clip:1", {"file.py:f": 0.5, "clip": 1})])
def test_a_spec_is_read_as_components_with_weights(spec, components):
    assert parse_reward(spec) == components


@pytest.mark.parametrize("spec, says", [
    ("foo", "choose compress"), ("", "choose compress"), ("compress,", "choose compress"),
    ("Compress", "choose compress"), ("my_file.py", "file.py:function"), ("compress:", "weight"),
    ("compress:abc", "weight"), ("compress:0", "weight"), ("compress:nan,clip", "weight"),
    ("compress:inf", "weight"), ("compress:1:2", "weight"), ("file.py:f:x", "weight"),
    ("compress,compress:2", "twice"), ("compress=some/model", "takes no model"),
    ("vqa=a@b", "takes one model"), ("align=a@b@c", "takes two models")])
def test_a_wrong_spec_is_refused_in_one_line(spec, says):
    with pytest.raises(RewardError, match=says) as error:
        get_reward(spec)
    assert "\n" not in str(error.value)


def test_a_mixture_is_the_weighted_sum_of_z_scores(images, my_file):
    path = my_file("def length(images, prompts): return [len(prompt) ** 2 for prompt in prompts]")
    prompts = ["a", "a cat", "a brown dog", "a fox"]
    sizes, lengths = jpeg_kilobytes(images).double().numpy(), np.array([1.0, 25, 121, 25])
    z_sizes, z_lengths = ((x - x.mean()) / x.std() for x in (sizes, lengths))
    expected = -0.3 * z_sizes + 2 * z_lengths
    mixed = get_reward(f"compress:0.3,{path}:length:2")(images, prompts)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_a_component_that_is_the_same_for_all_images_adds_nothing_to_a_mixture(images, my_file):
    path = my_file("def same(images, prompts): return [2.2] * len(images)")
    sizes = jpeg_kilobytes(images).numpy().astype(float)
    mixed = get_reward(f"compress:1,{path}:same:1")(images, PROMPTS)
    np.testing.assert_allclose(mixed, -(sizes - sizes.mean()) / sizes.std(), rtol=1e-5)


@pytest.mark.parametrize("result", [
    "[1, 2, 3, 4]", "(1.0, 2.0, 3.0, 4.0)", "range(1, 5)", "np.arange(1, 5)",
    "np.arange(4, 0, -1)[::-1]", "np.arange(1, 5, dtype=np.float16)",
    "np.arange(1, 5, dtype='>f4')", "np.arange(1, 5, dtype=np.longdouble)",
    "np.arange(1, 5, dtype=np.uint16)",
    "[np.float16(i) for i in range(1, 5)]", "[np.float64(i) for i in range(1, 5)]",
    "torch.arange(1, 5.0, dtype=torch.float64)", "torch.arange(1, 5, dtype=torch.bfloat16)",
    "torch.arange(1, 5, dtype=torch.uint8)", "[torch.tensor(float(i)) for i in range(1, 5)]",
    "torch.arange(1., 5, requires_grad=True)", "torch.nn.Parameter(torch.arange(1., 5))",
    pytest.param("torch.arange(1., 5, device='cuda')",
                 marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_a_function_may_return_any_list_of_numbers(images, my_file, result):
    path = my_file(f"import numpy as np\nimport torch\ndef mine(images, prompts): return {result}")
    values = get_reward(f"{path}:mine")(images, PROMPTS)
    assert torch.equal(values, torch.tensor([1.0, 2, 3, 4])) and not values.requires_grad


@pytest.mark.parametrize("result", ["torch.tensor([True, False, True, True])",
                                    "np.array([True, False, True, True])", "[1, False, True, 1]"])
def test_yes_and_no_are_one_and_zero(images, my_file, result):
    path = my_file(f"import numpy as np\nimport torch\ndef mine(images, prompts): return {result}")
    assert get_reward(f"{path}:mine")(images, PROMPTS).tolist() == [1, 0, 1, 1]


def test_a_function_in_inference_mode_returns_a_tensor_like_any_other(images, my_file):
    path = my_file("import torch\n@torch.inference_mode()\n"
                   "def mine(images, prompts): return images.float().mean((1, 2, 3))")
    values = get_reward(f"{path}:mine")(images, PROMPTS)
    assert torch.equal(values, images.float().mean((1, 2, 3))) and not values.is_inference()


@pytest.mark.parametrize("buffer", ["torch.zeros(4)", "np.zeros(4, np.float32)"])
def test_a_function_that_fills_one_buffer_again_does_not_change_what_it_returned(images, my_file,
                                                                                 buffer):
    path = my_file(f"import numpy as np\nimport torch\nbuffer = {buffer}\n"
                   "def mine(images, prompts):\n    buffer[:] += 1\n    return buffer")
    reward = get_reward(f"{path}:mine")
    first, second = reward(images, PROMPTS), reward(images, PROMPTS)
    assert first.tolist() == [1] * 4 and second.tolist() == [2] * 4


def test_a_function_gets_uint8_images_and_their_prompts(images, my_file, tmp_path):
    path = my_file("import torch\nfrom pathlib import Path\ndef mine(images, prompts, extra=1):\n"
                   "    torch.save([images, prompts], Path(__file__).parent / 'seen.pt')\n"
                   "    return [0] * 4")
    get_reward(f"{path}:mine")(images, PROMPTS)
    seen = torch.load(tmp_path / "seen.pt")
    assert torch.equal(seen[0], images) and seen[0].dtype == torch.uint8 and seen[1] == PROMPTS


@pytest.mark.parametrize("code, says", [
    (None, "there is no file"),
    ("def other(images, prompts): pass", "has no function mine; it has other"),
    ("mine = 3", "has no function mine"),
    ("def mine(images): pass", r"mine\(images\).*must take \(images, prompts\)"),
    ("def mine(a, b, c): pass", "must take"), ("import no_such_module", "cannot be imported"),
    ("def mine(", "cannot be imported")])
def test_a_file_without_a_fitting_function_is_refused_and_named(my_file, tmp_path, code, says):
    path = my_file(code) if code else str(tmp_path / "nowhere.py")
    with pytest.raises(RewardError, match=says) as error:
        get_reward(f"{path}:mine")
    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("result, says", [
    ("[1, 2, 3]", r"shape \(3,\) for 4 images"), ("1.0", r"shape \(\)"),
    ("images.float()", r"shape \(4, 3, 40, 56\)"), ("torch.zeros(4, 1)", r"shape \(4, 1\)"),
    ("None", "NoneType"), ("'good'", "str"), ("[None] * 4", "list"), ("[[1], [2, 3]]", "list"),
    ("{}", "dict"), ("{0: 1, 1: 2, 2: 3, 3: 4}", "dict"), ("(1 for _ in prompts)", "generator"),
    ("torch.ones(4, dtype=torch.complex64)", "Tensor"), ("np.ones(4) * 1j", "ndarray"),
    ("['1', '2', '3', '4']", "list"), ("np.array(['1', '2', '3', '4'])", "ndarray"),
    ("torch.ones(4).to_sparse()", "Tensor"), ("torch.ones(4, device='meta')", "Tensor"),
    ("np.array([1, 2, 3, None])", "ndarray"),
    ("type('Odd', (list,), {'__getitem__': lambda self, i: 1 / 0})([1, 2, 3, 4])", "Odd")])
def test_anything_but_one_number_an_image_is_refused_by_name(images, my_file, result, says):
    path = my_file(f"import numpy as np\nimport torch\ndef mine(images, prompts): return {result}")
    with pytest.raises(RewardError, match=says) as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert f"{path}:mine" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e300"])
def test_a_value_that_is_not_finite_is_refused_with_its_image_and_prompt(images, bad):
    with pytest.raises(RewardError, match="image 2, 'an ant'") as error:
        check_rewards("mine", [0, 1, float(bad), float("nan")], images, PROMPTS)
    assert (error.value.index, error.value.prompt) == (2, "an ant")
    assert torch.equal(error.value.image, images[2])


def test_a_value_that_numpy_has_masked_is_none(images):
    values = np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[False, False, True, False])
    with pytest.raises(RewardError, match="image 2, 'an ant'"):
        check_rewards("mine", values, images, PROMPTS)
    assert check_rewards("mine", np.ma.array([1, 2, 3, 4]), images, PROMPTS).tolist() == [1, 2, 3, 4]


def test_a_function_that_raises_is_reported_with_the_image_that_makes_it_raise(images, my_file):
    path = my_file("def mine(images, prompts): return [1 / (p != 'an ant') for p in prompts]")
    with pytest.raises(RewardError, match="ZeroDivisionError.*image 2, 'an ant'") as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert error.value.index == 2 and torch.equal(error.value.image, images[2])


def test_a_function_that_raises_only_for_the_batch_is_reported_without_an_image(images, my_file):
    path = my_file("def mine(images, prompts):\n"
                   "    if len(images) > 1: raise MemoryError('too many')\n    return [0]")
    with pytest.raises(RewardError, match="MemoryError: too many, for the batch") as error:
        get_reward(f"{path}:mine")(images, PROMPTS)
    assert error.value.index is None and error.value.image is None


def test_pictures_that_are_not_uint8_are_refused(images):
    for wrong in (images / 255.0, images[0], images[:, :1], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="takes uint8 images"):
            get_reward("compress")(wrong, PROMPTS)
    with pytest.raises(ValueError, match="takes uint8 images"):
        get_reward("compress")(images, PROMPTS[:3])


def test_a_factory_of_the_table_starts_alike_each_time_and_switches_nothing_outside(monkeypatch):
    def factory(device):
        torch.set_grad_enabled(False)
        weight = torch.randn(())
        return lambda images, prompts: weight.repeat(len(images))

    monkeypatch.setitem(rewards.REWARDS, "mine", factory)
    images, before = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.get_rng_state()
    values = [get_reward("mine", "cpu")(images, [""]).item() for _ in range(2)]
    assert values[0] == values[1] and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_emoji_classifier_refuses_pictures_of_a_size_that_it_has_not_learnt():
    file = Path(rewards.__file__).parent / "emoji/classifiers.py"
    with pytest.raises(RewardError, match="128 x 96 pixels: the emoji classifiers know 64 x 64"):
        get_reward(f"{file}:judge_a")(torch.zeros(1, 3, 96, 128, dtype=torch.uint8), ["two cats"])


def test_every_name_is_a_factory_that_takes_the_device():
    assert set(rewards.REWARDS) == {"compress", "incompress", "clip", "aesthetic", "pickscore",
                                    "align", "vqa", "count"}
    for factory in rewards.REWARDS.values():
        assert next(iter(inspect.signature(factory).parameters)) == "device"
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert rewards.REWARDS["compress"]("cpu")(black, ["", ""]).shape == (2,)


# What a reward's code does to the process

def test_a_reward_that_rewrites_its_images_and_prompts_changes_only_copies(images, my_file):
    path = my_file("""
def mine(images, prompts):
    images.zero_()
    prompts.sort()
    prompts[0] = 1 / (prompts[0] != "a cat")
    prompts.clear()
    return [1]
""")
    before = images.clone()
    with pytest.raises(RewardError, match="ZeroDivisionError.*image 0, 'a cat'") as error:
        get_reward(f"{path}:mine,compress")(images, PROMPTS)
    assert torch.equal(images, before) and torch.equal(error.value.image, before[0])
    assert PROMPTS == ["a cat", "a dog", "an ant", "a fox"]


def process():
    """All that the tests below find unchanged, as text."""
    cudnn = torch.backends.cudnn
    return {name: repr(value) for name, value in dict(
        grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
        made=torch.zeros(1) + 1, dtype=torch.get_default_dtype(), folder=os.getcwd(),
        torch_draws=torch.get_rng_state().tolist(), numpy_draws=np.random.get_state()[1].tolist(),
        draws=random.getstate(), threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        cudnn=(cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32),
        tf32=torch.backends.cuda.matmul.allow_tf32, matmul=torch.get_float32_matmul_precision(),
        anomalies=torch.is_anomaly_enabled(), warnings=warnings.filters, division=np.geterr(),
        log=(logging.root.level, logging.root.handlers), path=sys.path,
        streams=(sys.stdout, sys.stderr), signals=reward_files.signals()).items()}


SWITCHES = [
    "torch.set_grad_enabled(False)", "mode = torch.inference_mode(); mode.__enter__()",
    "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
    "torch.manual_seed(7)", "np.random.seed(7)", "random.seed(7)",
    "torch.rand(3), np.random.rand(3), random.random()",
    "os.chdir('/')", "gone = tempfile.mkdtemp(); os.chdir(gone); os.rmdir(gone)",
    "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch.use_deterministic_algorithms(True)",
    "torch.backends.cudnn.deterministic = True; torch.backends.cudnn.benchmark = True",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('high')", "torch.autograd.set_detect_anomaly(True)",
    "warnings.simplefilter('error')", "np.seterr(all='raise')", "sys.path.insert(0, '/somewhere')",
    "logging.basicConfig(level=logging.DEBUG, force=True)",
    "sys.stdout = sys.stderr = open(os.devnull, 'w')", "signal.signal(signal.SIGINT, signal.SIG_IGN)"]
IMPORTS = "import logging, os, random, signal, sys, tempfile, warnings\nimport numpy as np, torch\n"


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_a_reward_switches_is_afterwards_as_it_was(images, my_file, switch):
    before = process()
    at_import = my_file(f"{IMPORTS}{switch}\ndef mine(images, prompts): return [1.0] * len(images)")
    reward = get_reward(f"{at_import}:mine")
    assert process() == before
    reward(images, PROMPTS)
    assert process() == before

    indented = switch.replace("mode =", "global mode; mode =")
    in_calls = my_file(f"{IMPORTS}def mine(images, prompts):\n    {indented}\n"
                       "    return [1.0] * len(images)", "in_calls.py")
    get_reward(f"{in_calls}:mine")(images, PROMPTS)
    assert process() == before

    fails = my_file(f"{IMPORTS}def mine(images, prompts):\n    {indented}\n    raise OSError",
                    "fails.py")
    with pytest.raises(RewardError, match="OSError"):
        get_reward(f"{fails}:mine")(images, PROMPTS)
    assert process() == before


@pytest.mark.parametrize("draw", ["torch.rand(4)", "np.random.rand(4)", "[random.random() for _ in images]"])
def test_a_rewards_random_numbers_follow_from_its_pictures(images, my_file, draw):
    path = my_file(f"{IMPORTS}at_import = np.random.rand()\n"
                   f"def mine(images, prompts): return at_import + np.asarray({draw})")
    first, again = get_reward(f"{path}:mine"), get_reward(f"{path}:mine")
    values = first(images, PROMPTS)
    random.random(), np.random.rand(), torch.rand(1)  # what the process has drawn does not matter
    assert torch.equal(first(images, PROMPTS), values) and torch.equal(again(images, PROMPTS), values)
    assert not torch.equal(first(255 - images, PROMPTS), values)


def test_only_what_a_reward_calls_log_counts_is_counted(images, my_file):
    path = my_file("class Seen:\n    def __init__(self): self.counts = {'a cat': 2}\n"
                   "    def __call__(self, images, prompts): return [1.0] * len(images)\n"
                   "mine, wrong = Seen(), Seen()\nwrong.log_counts = ['a cat']")
    reward = get_reward(f"{path}:mine")
    assert reward(images, PROMPTS).tolist() == [1.0] * 4 and reward.log_counts == {}
    with pytest.raises(RewardError, match="log_counts must be a dict"):
        get_reward(f"{path}:wrong")


def test_no_gradients_stay_no_gradients_after_a_reward_switched_them_on(images, my_file):
    path = my_file("import torch\ndef mine(images, prompts):\n    torch.set_grad_enabled(True)\n"
                   "    return [1.0] * len(images)")
    reward = get_reward(f"{path}:mine")
    with torch.no_grad():
        reward(images, PROMPTS)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        reward(images, PROMPTS)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def test_what_a_reward_file_switches_holds_in_its_own_calls(images, my_file, tmp_path):
    (tmp_path / "weights.txt").write_text("3")
    path = my_file("""
import os, warnings, torch
torch.set_grad_enabled(False)
torch.set_default_device("meta")
warnings.simplefilter("error")
os.chdir(os.path.dirname(__file__))
def mine(images, prompts):
    assert torch.zeros(1).device.type == "meta" and not torch.is_grad_enabled()
    try:
        warnings.warn("careful")
    except UserWarning:
        with open("weights.txt") as file:
            return [float(file.read())] * len(images)
""")
    assert get_reward(f"{path}:mine")(images, PROMPTS).tolist() == [3] * 4


def test_the_process_draws_on_where_it_stopped_before_a_reward_drew(images, my_file):
    path = my_file("import torch\ntorch.manual_seed(5)\ndef mine(images, prompts):\n"
                   "    return torch.rand(len(images))")
    torch.manual_seed(6)
    reward, run = get_reward(f"{path}:mine"), []
    for _ in range(3):
        reward(images, PROMPTS)
        run.append(torch.rand(4))
    torch.testing.assert_close(torch.cat(run), draws(6), rtol=0, atol=0)


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(4, generator=generator) for _ in range(3)])


@pytest.mark.parametrize("end", ["sys.exit('no licence')", "raise SystemExit('no licence')",
                                 "raise asyncio.CancelledError('no licence')",
                                 "raise type('Stop', (BaseException,), {})('no licence')"])
def test_whatever_a_reward_raises_is_an_error_that_names_it(images, my_file, end):
    at_import = my_file(f"import asyncio, sys\n{end}\ndef mine(images, prompts): pass")
    with pytest.raises(RewardError, match="my_file.py cannot be imported .*no licence"):
        get_reward(f"{at_import}:mine")
    in_calls = my_file(f"import asyncio, sys\ndef mine(images, prompts):\n"
                       f"    if 'an ant' in prompts: {end}\n    return [0] * len(images)",
                       "late.py")
    says = "late.py:mine: raised .*no licence, for image 2"
    with pytest.raises(RewardError, match=says) as error:
        get_reward(f"{in_calls}:mine")(images, PROMPTS)
    assert error.value.index == 2 and "\n" not in str(error.value)


def test_an_interrupt_is_no_fault_of_the_reward(images, my_file):
    path = my_file("def mine(images, prompts): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        get_reward(f"{path}:mine")(images, PROMPTS)
    path = my_file("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        get_reward(f"{path}:mine")


def test_a_file_may_import_its_neighbours_at_once_and_in_its_calls(images, my_file, tmp_path):
    torch.testing.assert_close(images, images)  # what this imports when it is first used is not a file's
    before = list(sys.path), set(sys.modules)
    my_file("def score(images): return images.float().mean((1, 2, 3))", "early_helper.py")
    my_file("FACTOR = 2", "package/late_helper.py")
    my_file("from . import rest\nTERM = rest.TERM", "whole/__init__.py")
    my_file("TERM = 3", "whole/rest.py")
    path = my_file("""
from early_helper import score
def mine(images, prompts):
    from package.late_helper import FACTOR
    import whole
    return FACTOR * score(images) + whole.TERM
""")
    reward = get_reward(f"{path}:mine")
    for _ in range(2):
        torch.testing.assert_close(reward(images, PROMPTS), 2 * images.float().mean((1, 2, 3)) + 3)
    assert sys.path == before[0] and not (set(sys.modules) - before[1])


def test_a_neighbour_is_imported_once(images, my_file):
    my_file("calls = []", "counter.py")
    path = my_file("def mine(images, prompts):\n    import counter\n    counter.calls.append(1)\n"
                   "    return [float(len(counter.calls))] * len(images)")
    reward = get_reward(f"{path}:mine")
    assert [reward(images, PROMPTS)[0].item() for _ in range(3)] == [1, 2, 3]


def test_neighbours_of_one_name_in_two_folders_are_two_modules(images, my_file):
    for folder, value in (("a", 1), ("b", 2)):
        my_file(f"VALUE = {value}", f"{folder}/helper.py")
    code = ("import helper\ndef mine(images, prompts):\n    import helper as late\n"
            "    return [helper.VALUE + 10.0 * late.VALUE] * len(images)")
    paths = [my_file(code, f"{folder}/my_file.py") for folder in "ab"]
    rewards = [get_reward(f"{path}:mine") for path in paths]
    for reward, value in [*zip(rewards, (11, 22)), *zip(rewards, (11, 22))]:
        assert reward(images, PROMPTS).tolist() == [value] * 4


def test_a_neighbour_called_as_one_of_our_modules_hides_it_from_its_reward_alone(images, my_file):
    import kernels.ddim_step
    import prompts
    ours = {name: module for name, module in sys.modules.items() if name.startswith("kernels")}
    my_file("WORD = 'ant'", "prompts.py")
    my_file("NUMBER = 5", "kernels/__init__.py")
    path = my_file("""
from prompts import WORD
def mine(images, prompts):
    from kernels import NUMBER
    from rewards import get_reward  # ours, since there is no other
    return NUMBER * get_reward("compress")(images, prompts) * [WORD in p for p in prompts].count(1)
""")
    reward = get_reward(f"{path}:mine")
    torch.testing.assert_close(reward(images, PROMPTS), -5 * jpeg_kilobytes(images))
    assert sys.modules["prompts"] is prompts and sys.modules["kernels"] is kernels
    assert ours == {name: sys.modules[name] for name in ours}


def test_a_reward_that_keeps_one_waiting_says_so_once_a_call(images, my_file, monkeypatch, capsys):
    monkeypatch.setattr(reward_files, "PATIENCE", 0.2)
    path = my_file("import time\ndef mine(images, prompts):\n    time.sleep(0.7)\n"
                   "    return [1.0] * len(images)")
    reward = get_reward(f"{path}:mine")
    get_reward("compress")(images, PROMPTS)
    assert capsys.readouterr().err == ""
    reward(images, PROMPTS)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path}:mine" in said and "0.2 s" in said


def test_a_run_ends_with_a_failing_code_and_the_message_of_a_reward_that_exits(my_file, tmp_path,
                                                                               monkeypatch):
    import ddpo
    path = my_file("import sys\ncalls = []\ndef mine(images, prompts):\n    calls.append(1)\n"
                   "    if len(calls) > 1: sys.exit(0)\n    return [1.0] * len(images)")
    settings = dict(reward=f"{path}:mine", out=str(tmp_path), name="run", watch="", device="cpu",
                    images=4, group_size=2, sample_batch=4, train_batch=4, updates=1, steps=2,
                    epochs=1, eval_images=2, dtype="fp32")
    flags = [text for key, value in settings.items()
             for text in ("--" + key.replace("_", "-"), str(value))]
    with pytest.raises(SystemExit, match="my_file.py:mine: raised SystemExit: 0") as end:
        ddpo.main(flags)
    assert isinstance(end.value.code, str)  # which Python prints, and exits with 1


BUSY = """
import asyncio, multiprocessing, os, signal

async def ask():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
    return 1.0

def half(number):
    return number / 2

def mine(images, prompts):
    signal.signal(signal.SIGALRM, lambda *_: None)  # as a DataLoader has one for its workers
    signal.raise_signal(signal.SIGALRM)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [asyncio.run(ask()) + sum(pool.map(half, [1, 2]))] * len(images)
"""
SCORE = """
import os, signal, sys, time
import torch
from processes import stop_signals
from rewards import get_reward

with stop_signals(lambda number: print("stopped by", number, flush=True)):
    reward = get_reward(sys.argv[1])
    print(reward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""]).item(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_reward_with_signals_and_processes_of_its_own_neither_ends_a_run_nor_keeps_it_from_ending(my_file):
    done = subprocess.run([sys.executable, "-c", SCORE, f"{my_file(BUSY, 'busy.py')}:mine"], text=True,
                          cwd=Path(rewards.__file__).parent, capture_output=True, timeout=300)
    assert (done.stdout, done.returncode) == ("2.5\nstopped by 15\n", 130), done.stderr


def test_a_picture_file_is_scored_as_a_viewer_shows_it(tmp_path):
    grey = (torch.arange(16).view(4, 4) * 16).numpy().astype(np.uint8)
    plain = Image.fromarray(np.stack([grey] * 3, 2))
    turned = plain.rotate(90, expand=True)
    orientation = turned.getexif()
    orientation[0x0112] = 6  # to be turned by a quarter
    clear = plain.copy()
    clear.putalpha(0)
    for name, image in (("turned", turned), ("clear", clear), ("grey", Image.fromarray(grey)),
                        ("deep", Image.fromarray(grey.astype(np.uint16) * 257 + 100))):
        image.save(tmp_path / f"{name}.png", exif=orientation if name == "turned" else b"")
    expected = torch.from_numpy(np.array(plain)).permute(2, 0, 1)
    for name in ("turned", "grey", "deep"):
        assert torch.equal(rewards.open_picture(tmp_path / f"{name}.png"), expected), name
    assert (rewards.open_picture(tmp_path / "clear.png") == 255).all()
    Image.fromarray(grey / np.float32(255)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floats"):
        rewards.open_picture(tmp_path / "float.tiff")


def test_the_command_line_scores_pictures_and_refuses_in_one_line(images, tmp_path, monkeypatch,
                                                                  capsys):
    file = str(tmp_path / "noise.png")
    Image.fromarray(images[3].permute(1, 2, 0).numpy()).save(file)
    monkeypatch.setattr(sys, "argv", ["rewards.py", file, "--reward", "compress:1,incompress:2"])
    runpy.run_path(rewards.__file__, run_name="__main__")
    size = jpeg_kilobytes(images[3:]).item()
    assert capsys.readouterr().out == f"compress {-size:.4f}  incompress {size:.4f}  {file}\n"
    (tmp_path / "cut.png").write_bytes(open(file, "rb").read()[:-500])
    for more, says in ((["--reward", "foo"], "choose compress"), ([str(tmp_path / "cut.png")], "cut.png: "),
                       (["--reward", "clip"], "--reward clip: needs a --prompt"),
                       (["--reward", "aesthetic=./HEAD@./CLIP"], "reward aesthetic: cannot load")):
        monkeypatch.setattr(sys, "argv", ["rewards.py", file, *more])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(rewards.__file__, run_name="__main__")
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
@pytest.mark.parametrize("spec", ["compress", "clip"])
def test_a_device_that_is_not_there_is_named_in_one_line_whatever_the_reward(spec, device):
    with pytest.raises(RewardError, match=f"^device {device}: cannot be used here") as error:
        get_reward(spec, device)
    assert "\n" not in str(error.value)
