"""Tensor parallelism: several processes, each with its share of every matrix, compute one forward pass together.

Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053); Meta's reference does the same with fairscale. A rank is one of the
processes. It has some of the heads, of the feed-forward's channels and of the vocabulary, and runs model.py on its share as if
that were a model. Two sums a layer and one gathering of the logits are all that the ranks exchange.

| file | what it does |
|---|---|
| shares.py | which heads, channels and rows a rank has; its part of the parameters |
| groups.py | what a group of ranks can do: add up, gather, broadcast |
| passes.py | the parameters that a pass by all ranks belongs to |
| local.py | processes of one machine, and their shared memory |
| mpi.py | processes that mpiexec has started, on several machines |
| leading.py | rank 0 has the others make each pass that it makes; activations are gathered for a tap |
| following.py | the program that the other ranks run |
"""
