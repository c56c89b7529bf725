"""What every test needs: the repository on the path, one thread (the models are tiny), and no look at the network."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"            # `transformers`, which some tests compare with, must not ask for anything
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

torch.set_num_threads(1)
