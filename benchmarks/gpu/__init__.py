"""Speed and memory of the owner's engine and of training on one GPU: `python -m benchmarks.gpu`."""

from benchmarks.gpu import stand_ins as stand_ins
