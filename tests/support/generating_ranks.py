"""One rank of test_generation_ranks.py: FILE FLAGS. Generates under ZeRO-2 and ZeRO-3.

FILE is what torch.save wrote: prompts and trainables. Rank 0 writes the texts beside it.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from support.generated_texts import EOS, SETTINGS
from vico.cli.flags import parse
from vico.data.tokenizer import Tokenizer
from vico.distributed import world as dist
from vico.generation import generate as generation
from vico.generation.generate import generate
from vico.train.build import build_engine, read_inputs

# Three batches of the prompts: the second rank has one less than the first.
generation.BATCH_TOKENS = 100


def main(argv: list[str]) -> None:
    path = Path(argv[0])
    prompts, trainables = torch.load(path, weights_only=False)
    config = parse(argv[1:], "vico train", "").resolve()
    world = dist.connect()
    inputs = read_inputs(config, ("train",), world)
    tokenizer = Tokenizer(inputs.tokenizer_path)
    tokenizer.eos = EOS
    texts = {}
    for stage in (2, 3):
        section = {"stage": stage}
        if stage == 3:  # even the smallest tensor is divided among the ranks
            section["stage3_param_persistence_threshold"] = 0
        ds_config = {**inputs.ds_config, "zero_optimization": section}
        own = dataclasses.replace(inputs, ds_config=ds_config)
        engine = build_engine(config, own, trainables, world)
        texts[stage] = generate(engine.module, prompts, tokenizer, SETTINGS, world)
    assert world.gather_objects(texts) == [texts] * world.size, "every rank gets all texts"
    if world.is_main:
        torch.save(texts, path.with_suffix(".texts"))
    dist.disconnect(world)


if __name__ == "__main__":
    main(sys.argv[1:])
