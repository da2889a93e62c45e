"""One rank of test_scale.py: loads a checkpoint as a run does; prints the sha256 of its state."""

import hashlib
import sys

from vico.checkpoint.validate import validate_for_model
from vico.cli.flags import parse
from vico.distributed import world as dist
from vico.train.build import build_engine, read_inputs
from vico.train.saved_run import read_checkpoint


def main(argv: list[str]) -> None:
    config = parse(argv, "vico train", "").resolve()
    assert config.resume is not None
    world = dist.connect()
    inputs = read_inputs(config, ("train",), world)
    checkpoint = read_checkpoint(config.resume)
    num_layers = inputs.weights.config.n_layers
    checkpoint = validate_for_model(checkpoint, inputs.trainable_shapes, num_layers)
    engine = build_engine(config, inputs, checkpoint.weights, world)
    assert checkpoint.moments is not None
    engine.set_moments(checkpoint.moments, checkpoint.state.num_updates)
    weights, moments = engine.state()
    digest = hashlib.sha256()
    for name, value in sorted({**weights, **moments}.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    world.print_rank0(f"state {digest.hexdigest()}")
    dist.disconnect(world)


if __name__ == "__main__":
    main(sys.argv[1:])
