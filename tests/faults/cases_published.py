"""Published checkpoints in layouts that are refused, with what the error must say."""

import numpy as np
import torch

from faults.case import Case, published, refused
from faults.damage import pth
from support.run_fixture import PUBLISHED, SHARD

PUBLISHED_FILES: dict[str, Case] = {
    "published, LLaMA-Adapter's own": published(
        pth(
            PUBLISHED,
            lambda c: {
                "adapter_query.weight": torch.zeros(30, 96),
                "layers.0.attention.gate": torch.zeros(1, 4, 1, 1),
            },
        ),
        "published.pth: was made for another model, LLaMA-Adapter: it has 1 tensors like layers.0",
        "adapter_query.weight [30, 96], and lacks visual_proj.weight, temporal_emb.weight, gate1",
        "leave --resume out to train from scratch",
    ),
    "published, a LLaMA": refused(
        None,
        " tensors of a LLaMA and none of an adapter; name a checkpoint of ViCo by --resume",
        line=f"eval --resume {{fixture}}/{SHARD}",
        code=3,
    ),
    "published, nothing but numbers": published(
        pth(PUBLISHED, lambda c: {"epoch": 3, "lr": 0.1}),
        "published.pth: has no 'model' dict of tensors; ",
        "this is a dict with 'epoch', 'lr'; name the file that the training saved",
    ),
    "published, a tensor": published(
        pth(PUBLISHED, lambda c: c["model"]["visual_proj.weight"]),
        "published.pth: has no 'model' dict of tensors; ",
        "this is a Tensor",
    ),
    "published, numpy arrays": published(
        pth(PUBLISHED, lambda c: {"model": {n: v.numpy() for n, v in c["model"].items()}}),
        "published.pth: the checkpoint holds the Python object numpy._core.multiarray._reconstruct",
    ),
    "published, DDP and missing": published(
        pth(
            PUBLISHED,
            lambda c: {
                "model": {f"module.{n}": v for n, v in c["model"].items() if "visual" not in n}
            },
        ),
        "published.pth: does not fit",
        "1 missing (visual_proj.weight)",
    ),
    "published, with and without module.": published(
        pth(
            PUBLISHED,
            lambda c: {
                "model": {
                    "module.adapter_query.weight": c["model"].pop("adapter_query.weight"),
                    **c["model"],
                    "module.visual_proj.weight": torch.zeros(1),
                }
            },
        ),
        "published.pth: does not fit",
        "1 missing (adapter_query.weight); 2 unexpected (module.adapter_query.weight, module.v",
    ),
    "published, gates of other heads": published(
        pth(
            PUBLISHED,
            lambda c: c["model"].update({"layers.0.attention.gate1": torch.zeros(8)}),
        ),
        "published.pth: does not fit",
        "1 misshapen (layers.0.attention.gate1 [8] instead of [1, 4, 1, 1])",
    ),
    "published, a negative number of epochs by numpy": refused(
        pth(PUBLISHED, lambda c: c.update(epoch=np.int64(-3))),
        "published.pth: 'epoch' is -3, not a whole number",
        line="--resume {fixture}/published.pth",
        code=3,
    ),
    "published, NaN in the optimizer": refused(
        pth(
            PUBLISHED,
            lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan) is None or c,
        ),
        "published.pth: 'adapter_query.weight.exp_avg' holds NaN or infinite values",
        line="--resume {fixture}/published.pth",
        code=3,
    ),
}
