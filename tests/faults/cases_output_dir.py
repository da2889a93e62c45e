"""Output folders that are refused, with what the error must say."""

from faults.case import Case, flags, refused
from faults.damage import both, copy, cut, gone, link, pipe, put
from vico.io.output_dir import LOCK

OUTPUT_DIR: dict[str, Case] = {
    "output_dir is a file": refused(
        put("out", ""),
        "--output_dir {fixture}/out: '{fixture}/out' is not a folder; choose another",
    ),
    "output_dir in a file": refused(
        put("file", ""),
        "--output_dir {fixture}/file/out: Not a directory; choose another",
        line="--output_dir {fixture}/file/out",
    ),
    "output_dir with a name too long": flags(
        "--output_dir {fixture}/" + "x" * 300, "File name too long; choose another"
    ),
    "output_dir of another run": refused(
        copy("run", "out"),
        "{fixture}/out: holds a run with other settings (vaq, blr; table below); choose "
        "another --output_dir",
        "\n  vaq      false  true\n  blr      0.001  1.0\n",
        line="--blr 1 --vaq",
    ),
    "output_dir of a run that cannot be told": refused(
        put("out/args.json", "{"), "args.json:1: column 2: ", "choose another --output_dir"
    ),
    "output_dir of the published": refused(
        put("out/log.txt", '{"epoch": 0}\n'),
        "{fixture}/out/log.txt: is of another program or run (there is no args.json "
        "beside it); put that back, or choose another --output_dir",
    ),
    "output_dir with a damaged checkpoint": refused(
        both(copy("run", "out"), cut("out/checkpoint-1/optimizer.safetensors", 0)),
        "{fixture}/out: none of its 1 checkpoints can be used "
        "({fixture}/out/checkpoint-1/optimizer.safetensors: damaged (0 of ",
        "to start anew",
        code=3,
    ),
    "args.json that leads away": refused(
        both(copy("run", "out"), put("out/args.json", '{"output_dir": "/etc", "seed": 3}')),
        "{fixture}/out: holds a run with other settings",
    ),
    "args.json as a list": refused(
        both(copy("run", "out"), put("out/args.json", "[1]")),
        "args.json:1: column 1: a list where a JSON object",
    ),
    "a lock that is a link": refused(
        both(copy("run", "out"), link(f"out/{LOCK}", "args.json")),
        "{fixture}/out/.vico-lock: is a symbolic link, not a file; remove it, or choose another",
    ),
    "a lock that is a pipe": refused(
        both(copy("run", "out"), pipe(f"out/{LOCK}")),
        "{fixture}/out/.vico-lock: is a device or a pipe, not a file; remove it",
    ),
    "args.json is a pipe": refused(
        both(copy("run", "out"), pipe("out/args.json")),
        "args.json cannot be read (a device or a pipe",
    ),
    "a checkpoint of 60 GB": refused(
        both(copy("run", "out"), cut("out/checkpoint-1/optimizer.safetensors", 60 << 30)),
        "{fixture}/out: none of its 1 checkpoints can be used "
        "({fixture}/out/checkpoint-1/optimizer.safetensors: damaged (64,424,509,440 bytes, where ",
        code=3,
    ),
    "checkpoints gone": refused(
        both(copy("run", "out"), gone("out/checkpoint-1/state.json")),
        "none of its 1 checkpoints can be used",
        code=3,
    ),
}
