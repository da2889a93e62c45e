"""Checkpoints that are refused, with what the error must say."""

import torch

from faults.case import EVAL, Case, flags, own, published, refused, safetensors
from faults.damage import (
    HTML,
    LFS,
    Payload,
    both,
    claims,
    cut,
    flip,
    folder,
    gone,
    js,
    link,
    old_format,
    pipe,
    pth,
    put,
    safetensors_of,
    tar,
)
from faults.payloads import as_old, of_size
from support.run_fixture import CHECKPOINT, OPTIMIZER, PARAMS, PUBLISHED, STATE, TINY, WEIGHTS

CHECKPOINTS: dict[str, Case] = {
    "nothing to resume": flags(
        "--resume {fixture}/nowhere",
        "{fixture}/nowhere: no such checkpoint; --resume takes a checkpoint folder or a .pth",
        code=3,
    ),
    "nothing to evaluate": flags(
        "eval", "--resume is missing: name the checkpoint folder, run folder or .pth file to"
    ),
    "empty folder": refused(
        folder("empty"),
        "{fixture}/empty/state.json: no such file; a checkpoint is a folder with state.json",
        line=f"{EVAL}empty",
        code=3,
    ),
    "a run that has not saved": refused(
        put("started/args.json", "{}"),
        "{fixture}/started/state.json: no such file; this run has saved no checkpoint",
        line=f"{EVAL}started",
        code=3,
    ),
    "a run whose checkpoints are damaged": refused(
        both(gone("run/checkpoint_best/state.json"), cut(STATE, 99)),
        "{fixture}/run/checkpoint_best/state.json: no such file",
        line=f"{EVAL}run",
        code=3,
    ),
    "a run whose only checkpoint is damaged": refused(
        cut(STATE, 99),
        "{fixture}/run: none of its 1 checkpoints can be used (state.json:",
        "name another by --resume",
        line="--resume {fixture}/run",
        code=3,
    ),
    "own, weights cut off": own(
        cut(WEIGHTS, 1000), "adapter_model.safetensors: damaged (1000 of ", "use another checkpoint"
    ),
    "own, moments flipped": own(
        flip(OPTIMIZER, 5000), "optimizer.safetensors: damaged (its sha256 is not the recorded one)"
    ),
    "own, state changed": own(
        js(STATE, progress={}),
        "state.json: damaged (its sha256 is not the recorded one); use another",
    ),
    "own, state cut off": own(
        cut(STATE, 99),
        "state.json:",
        "the text is cut off here; correct {fixture}/run/checkpoint-1/state.json",
    ),
    "own, of another version": own(
        js(STATE, format=2), "state.json: 'format' is 2 and not 1, so another version wrote it"
    ),
    "own, moments missing": own(
        gone(OPTIMIZER), "optimizer.safetensors: damaged (No such file or directory); use another"
    ),
    "own, other settings": flags(
        f"--seed 9 --resume {{fixture}}/{CHECKPOINT}",
        "checkpoint-1: was written by a run with other settings or files (seed; table below); "
        "give the same, or",
        "--allow_change seed",
        "seed     0    9",
    ),
    "own, other shape": flags(
        f"--adapter_len 4 --resume {{fixture}}/{CHECKPOINT}",
        "checkpoint-1: does not fit --model, --adapter_layer, --adapter_len and --max_feats",
        "(adapter_query.weight [30, 96] instead of [12, 96])",
        code=3,
    ),
    "moments as weights": flags(
        EVAL + OPTIMIZER,
        "optimizer.safetensors: does not fit",
        "9 missing (adapter_query.weight, ",
        "18 unexpected",
        code=3,
    ),
    "weights of garbage": safetensors(HTML, "x.safetensors: damaged (", "use another checkpoint"),
    "published, HTML": published(
        put(PUBLISHED, HTML),
        "published.pth: the checkpoint is an HTML page (42 bytes), most likely a failed",
    ),
    "published, git-lfs": published(
        put(PUBLISHED, LFS),
        "published.pth: the checkpoint is a git-lfs pointer",
        "run 'git lfs pull'",
    ),
    "published, cut off": published(
        cut(PUBLISHED, 9999),
        "published.pth: the checkpoint is cut off or damaged; fetch or copy it again",
    ),
    "published, flipped": published(
        flip(PUBLISHED, 50_000),
        "published.pth: the checkpoint is cut off",
        "(wrong checksum of its part",
    ),
    "published, runs code": published(
        pth(PUBLISHED, lambda c: c.update(args=Payload())),
        "published.pth: the checkpoint holds the Python object posix.mkdir",
    ),
    "published, not one": published(
        pth(PUBLISHED, lambda c: [c["model"]]),
        "published.pth: has no 'model' dict of tensors; a published checkpoint has one",
        "and this is a list; name the file that the training saved",
    ),
    "published, key missing": published(
        pth(PUBLISHED, lambda c: [c["model"].pop("visual_proj.weight")] and c),
        "published.pth: does not fit",
        "1 missing (visual_proj.weight)",
    ),
    "published, key unexpected": published(
        pth(PUBLISHED, lambda c: c["model"].update(lora=torch.zeros(1))),
        "published.pth: does not fit",
        "1 unexpected (lora)",
    ),
    "published, NaN": published(
        pth(
            "published.pth",
            lambda c: c["model"]["temporal_emb.weight"].fill_(torch.nan) is None or c,
        ),
        "published.pth: 'temporal_emb.weight' holds NaN or infinite values; use another checkpoint",
    ),
    "published, integers": published(
        pth(
            "published.pth",
            lambda c: c["model"].update(
                {"temporal_emb.weight": torch.zeros(10, 96, dtype=torch.int64)}
            ),
        ),
        "published.pth: 'model' entry 'temporal_emb.weight' is no dense tensor of "
        "floating-point numbers",
    ),
    "published, epoch": refused(
        pth(PUBLISHED, lambda c: c.update(epoch="3")),
        "'epoch' is '3', not a whole number",
        line="--resume {fixture}/published.pth",
        code=3,
    ),
    "state.json is a pipe": own(
        pipe(STATE), "state.json: the state of the checkpoint cannot be read (a device or a pipe"
    ),
    "weights are a device": own(link(WEIGHTS, "/dev/zero"), "adapter_model.safetensors: "),
    "state.json, files that lead away": own(
        js(STATE, files={"../../x": {}}), "state.json: damaged (its sha256 is not the recorded one)"
    ),
    "safetensors, a header without end": safetensors(
        (2**62).to_bytes(8, "little") + b"{}", "x.safetensors: damaged (", "use another checkpoint"
    ),
    "safetensors, more numbers than bytes": safetensors(
        safetensors_of(
            '{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
        ),
        "x.safetensors: damaged (",
        "use another checkpoint",
    ),
    "safetensors, another shape than bytes": safetensors(
        safetensors_of('{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        "x.safetensors: damaged (",
        "use another checkpoint",
    ),
    "published, asks for memory": published(
        put(PUBLISHED, as_old(of_size("torch.ByteTensor", 6_000_000_000))),
        "published.pth: the checkpoint builds torch.ByteTensor of any size; save it again",
    ),
    "published is a pipe": published(
        pipe(PUBLISHED), "published.pth: the checkpoint cannot be opened (a device or a pipe"
    ),
    "published, larger than its file": published(
        claims(PUBLISHED, 10**12), "published.pth: the checkpoint "
    ),
    "published in the old format, larger than its file": published(
        both(old_format(PUBLISHED), claims(PUBLISHED, 10**12)),
        "published.pth: the checkpoint claims ",
        "numbers that are not all among its ",
    ),
    "published in the old format, cut off": published(
        both(old_format(PUBLISHED), cut(PUBLISHED, 30_000)), "published.pth: the checkpoint "
    ),
    "published as a tar archive": published(
        tar(PUBLISHED), "published.pth: the checkpoint is no torch file"
    ),
    "published as a tar archive in disguise": published(
        tar(PUBLISHED, first=b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
        "published.pth: the checkpoint ",
    ),
    "a folder as .pth": refused(
        folder("x.pth"),
        "{fixture}/x.pth/state.json: no such file; a checkpoint is a folder with state.json",
        line=f"{EVAL}x.pth",
        code=3,
    ),
    "convert, nothing": flags(
        "!convert {fixture}/nowhere {fixture}/x.pth",
        "{fixture}/nowhere: no such file or folder to convert",
    ),
    "convert, onto something": flags(
        "!convert {fixture}/published.pth {fixture}/run",
        "{fixture}/run: already exists; name another target",
    ),
    "convert, HTML": refused(
        put(PUBLISHED, HTML),
        "published.pth: the checkpoint is an HTML page",
        line="!convert {fixture}/published.pth {fixture}/x.safetensors",
        code=3,
    ),
    "plan, a million layers": refused(
        js(PARAMS, n_layers=1_000_000),
        "params.json: 'n_layers' is 1000000 and must be a whole number from 1 to 1000",
        line="!plan --model {fixture}/" + TINY + " --gpu H100",
    ),
    "plan, broken params.json": refused(
        put(PARAMS, "{"),
        "params.json:1: column 2: ",
        line="!plan --model {fixture}/" + TINY + " --gpu H100",
    ),
}
