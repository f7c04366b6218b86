"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is first imported."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
